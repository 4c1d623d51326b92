"""What every objective makes of every token, as one HTML page that needs nothing else.

    python experiments/microscope.py                     # the small model of train.py's default run
    python experiments/microscope.py runs/default --loss grpo --updates 16 --groups 4
    python experiments/microscope.py Qwen/Qwen3-0.6B --data gsm8k --samples 8 --lr 1e-6
    python experiments/microscope.py runs/default/samples_chainsum.jsonl   # eval.py's: no weights

A few groups are sampled, and the model takes K updates, each on all of them. Before each step
losses.policy_loss runs with each objective, and autograd says what weight w it gives each token:
grad loss = -Agg(w grad log pi). The page only shows. Any flag of train.py may follow; those of a
run are known.
"""
import argparse
import base64
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import data
import losses
import rewards
import train
from eval import read_rows

MOST = 8_000_000  # weights in a page, 4 bytes each
FIRST = ("acpo", "grpo", "gspo", "cispo", "kl3", "dapo", "sapo")  # kept where not all fit
NOT, UPPER, LOWER, DUAL_CLIP, LEFT_OUT, NO_ADVANTAGE = range(6)  # what made a weight 0


def microscope(flags, updates) -> dict:
    """Sample, look, update, look, ...: everything the page shows."""
    run, numbers = set_up(flags), range(flags.prompts)
    questions = [train.nth_question(run, i) for i in numbers]
    with run.scorer:
        rollouts = train.sample(run, questions, numbers, flags.samples)
    tokens = sum(r.length for r in rollouts)
    names, looks = what_fits(flags, tokens, updates)
    train.assign_advantages(rollouts, flags)
    views = []
    for k in range(1, updates + 1):
        if k in looks:
            views.append(look(run, rollouts))
        train.update(run, rollouts, {}, train.Meter())

    about = (f"{run.model.source}, {flags.data}: {flags.prompts} groups of {flags.samples} "
             f"responses, {tokens:,} tokens. {updates} updates with {flags.loss}, AdamW, learning "
             f"rate {flags.lr:g}, each on all of these responses. Every objective has the "
             "advantage of its own publication.")
    if len(names) < len(losses.OBJECTIVES) or len(looks) < updates:
        about += (f" Left out, so that this page stays usable: all but {len(names)} of "
                  f"{len(losses.OBJECTIVES)} objectives and {len(looks)} of {updates} updates.")
    first = views[0]
    return {
        "title": f"Microscope: {flags.data}", "about": about, "kinds": [], "updates": looks,
        "loss": flags.loss, "groups": texts(run, questions, rollouts),
        "old_logp": packed(first.old_logp[first.mask], torch.float32),
        "log_ratio": [packed((view.logp - view.old_logp)[view.mask]) for view in views],
        "entropy": [packed(view.entropy[view.mask]) for view in views],
        "lenses": {name: through(name, views, rollouts, flags) for name in names}}


def set_up(flags) -> train.Run:
    """train.py's Run, without a directory: nothing of it is kept."""
    train.start_ranks(flags)
    model = train.load_model(flags.model or train.small_model(flags), flags)
    tokenizer = data.load_tokenizer(model.source)
    flags.template = data.choose_template(flags.template, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr, betas=(0.9, flags.beta2))
    end_ids = data.end_ids(tokenizer, model.eos_ids, model.config.vocab_size)
    return train.Run(flags, Path(), model, None, tokenizer, end_ids, rewards.Scorer(workers=2),
                     *train.load_questions(flags, model, tokenizer), optimizer, None, None, step=1)


def what_fits(flags, tokens, updates) -> tuple[list[str], list[int]]:
    """(objectives, updates) whose weights a page can hold; updates are thinned out first."""
    names = list(dict.fromkeys([flags.loss, *FIRST, *losses.OBJECTIVES]))
    count = min(updates, max(4, MOST // (tokens * len(names))))
    names = names[:max(1, MOST // (tokens * count))]
    looks = torch.linspace(1, updates, count).round().int().tolist()
    return [name for name in losses.OBJECTIVES if name in names], looks


@torch.no_grad()
def look(run, rollouts) -> train.TokenStats:
    """Of all rollouts in their order, (B,T) on the CPU."""
    longest = max(r.length for r in rollouts)
    parts = []
    for group in train.groups_of(rollouts, run.flags.samples):  # so that long ones fit, too
        stats = train.token_stats(run.model, group, run.flags)
        parts.append([padded(t, longest).cpu() for t in stats])
    columns = [torch.cat(column) for column in zip(*parts)]
    return train.TokenStats(*columns)


def padded(t, length):
    return F.pad(t, (0, length - t.shape[1]))


# ---- One objective -------------------------------------------------------------------------------

def through(name, views, rollouts, flags) -> dict:
    """What the page knows of an objective."""
    train.assign_advantages(rollouts, replace(flags, loss=name))
    lenses = [Lens(name, view, rollouts, flags) for view in views]
    return {"advantage": rounded(train.per_rollout(rollouts, "advantage")),
            "views": [lens.seen() for lens in lenses], "band": band(lenses)}


class Lens:
    """An objective and one view of the tokens. All tensors are (B,T)."""

    def __init__(self, name, view, rollouts, flags):
        self.name, self.how = name, {"group_size": flags.samples,
                               "max_len": flags.max_tokens or flags.max_new_tokens}
        if name == flags.loss:
            self.how |= flags.hyperparameters()
        advantage = train.per_rollout(rollouts, "advantage").cpu()
        self.inputs = view._asdict() | {  # by policy_loss's names
            "adv": advantage[:, None].expand(view.mask.shape),
            "pass_rate": train.per_rollout(rollouts, "pass_rate").cpu()}
        self.totals, statistics = {}, losses.OBJECTIVES[name].statistics
        if statistics:
            self.totals["statistics"] = statistics(view.logp, view.old_logp, view.mask, **self.how)

    def gradient(self, inputs={}, totals={}, **how):
        """-d loss / d logp; what is given goes before what was seen."""
        inputs = self.inputs | inputs
        inputs["logp"] = inputs["logp"].clone().requires_grad_()
        loss, _ = losses.policy_loss(self.name, **inputs, totals=self.totals | totals,
                                     **(self.how | how))
        return -torch.autograd.grad(loss, inputs["logp"])[0]

    def weights(self, inputs={}, **how):
        """w: the mean over "one token" is a sum, so each derivative is the token's own weight."""
        return self.gradient(inputs, {"tokens": 1}, agg="token-mean", **how)

    def seen(self) -> dict:
        """Weights and what made them 0; and by ten bins of p, the share of the gradient of the
        logits that comes from there, and that would come if the ratio clipped nothing, 1 in all."""
        mask, A, logp, old_logp = (self.inputs[k] for k in ("mask", "adv", "logp", "old_logp"))
        w, before = self.weights(), self.gradient({"logp": old_logp})  # before any update
        zero, state = w == 0, torch.full(w.shape, NOT)
        state[zero & (A > 0)] = UPPER
        state[zero & (A < 0)] = LOWER
        if "dual_clip" in inspect.signature(losses.OBJECTIVES[self.name]).parameters:
            state[zero & (A < 0) & (self.weights(dual_clip=None) != 0)] = DUAL_CLIP
        state[zero & (before == 0)] = LEFT_OUT  # whatever the ratio
        state[zero & (A == 0)] = NO_ADVANTAGE

        p = logp.exp()
        size = logit_norm(p, self.inputs["sum_p2"])
        kept = (self.gradient().abs() * size)[mask]
        clipped = (before.abs() * (logp - old_logp).exp() * size * zero)[mask]
        bins = (p[mask] * 10).long().clamp(max=9)
        count = bins.bincount(minlength=10)
        sums = torch.zeros(2, 10).index_add_(1, bins, torch.stack([kept, clipped]))
        share = sums / sums.sum().clamp(min=1e-30)  # all 0 where no token has an advantage
        digits = "".join(str(s) for s in state[mask].tolist())
        return {"w": packed(w[mask]), "state": digits, "count": count.tolist(),
                "kept": rounded(share[0]), "clipped": rounded(share[1])}

    def probe(self, logp, log_ratio, sign, company=False):
        """Weights of made-up responses (N,T), A = sign, half of the group right: alone, or in
        company of the real ones."""
        one = torch.ones_like(logp)
        made = {"logp": logp, "old_logp": logp - log_ratio, "adv": sign * one, "mask": one,
                "entropy": one, "sum_p2": one / 2, "pass_rate": one[:, :1] / 2}
        if company:
            for name, real in self.inputs.items():
                real = real.view(len(real), -1).to(one)  # pass_rate is (B,)
                made[name] = torch.cat([padded(made[name], real.shape[1]), real])
        return self.weights(made)[:len(one), :one.shape[1]]


def logit_norm(p, sum_p2):
    """L2 norm of d log p / d logits: sqrt((1-p)^2 + the other tokens' p^2)."""
    return ((1 - p)**2 + (sum_p2 - p**2).clamp(min=0)).sqrt()


# ---- Its band, found by trying -------------------------------------------------------------------

P = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)[:, None].log()  # (50,1), log p
OUTWARD = torch.logspace(-4, 0.5, 2000, dtype=torch.float64)  # log ratios, 0.5 % apart


def band(lenses) -> dict:
    """A note, and lines for each update, or once where they stay as they are."""
    spread = torch.linspace(-2, 2, len(P), dtype=P.dtype)[:, None]
    for lens in lenses:
        for sign in (1, -1):
            alone = lens.probe(P, spread, sign)
            if not torch.allclose(alone, lens.probe(P, spread, sign, company=True)):
                return {"note": "No band drawn: it depends on the whole batch.", "lines": []}
    note = "Band at A = ±1, half of the group right."
    if not torch.allclose(alone, lens.probe(P.T, spread.T, sign).T):
        note += " It is that of a lone token: others in the response count, too."
    lenses = lenses if lens.totals else [lens]
    sides = [(sign, side) for sign in (1, -1) for side in (1, -1)]
    return {"note": note, "lines": [[edge(lens, *way) for way in sides] for lens in lenses]}


def edge(lens, sign, side) -> dict:
    """The log ratio at which w becomes 0 on one side of ratio 1 or, where it never does, stops
    being ratio x A: at each p, None where there is none."""
    walk = side * OUTWARD
    # Every log ratio at every p, each a response of one token.
    logp, log_ratio = (t.reshape(-1, 1) for t in torch.broadcast_tensors(P, walk))
    w = lens.probe(logp, log_ratio, sign).view(len(P), -1)  # (50,2000)
    at_1 = lens.probe(P, 0.0, sign)
    ends = w[:, -1:] == 0
    follows = (w - at_1 * walk.exp()).abs() <= 1e-5 * w.abs()
    inside = (w != 0) & (ends | follows)
    steps = inside.cumprod(1).sum(1)  # until the first that is not
    found, capped = [], False
    for p, n, zero in zip(P, steps.tolist(), ends):
        first = 0 if zero else 1000  # a w that bends before ratio 1.02 is smooth: no edge
        exists = first < n < len(walk) and walk[n] > p  # beyond, p_old would be above 1
        found.append(round(walk[n].item(), 5) if exists else None)
        capped |= bool(exists and not zero)
    return {"sign": sign, "capped": capped, "edge": found}


# ---- Texts and the file --------------------------------------------------------------------------

def texts(run, questions, rollouts) -> list[dict]:
    groups = []
    for question, group in zip(questions, train.groups_of(rollouts, run.flags.samples)):
        groups.append(new_group(question.problem.id, question.text, question.problem.answer))
        for r in group:
            tokens = [run.tokenizer.decode([t]) for t in r.tokens[r.prompt_len:]]
            add_response(groups[-1], tokens, r.score, r.status, r.finished, r.length)
    return groups


def new_group(name, prompt, answer) -> dict:
    answer = json.dumps(answer, ensure_ascii=False)
    return {"name": name, "prompt": prompt, "answer": answer, "responses": []}


def add_response(group, tokens, score, status, finished, length) -> None:
    kind = "wrong" if status == "ok" else status
    if score == 1:
        kind = "right"
    elif not finished:
        kind = "truncated"
    group["responses"].append({"tokens": tokens, "score": score, "length": length, "kind": kind})


def samples(path) -> dict:
    """The page of eval's samples_TASK.jsonl: a group is a question, a response one "token"."""
    groups = {}
    for row in read_rows(path):
        group = new_group(row["id"], row["prompt"], row["answer"])
        add_response(groups.setdefault(row["id"], group), [row["response"]], row["score"],
                     row["status"], row["finished"], row["length"])
    if not groups:
        raise ValueError(f"{path}: no responses in it; eval.py writes such files")
    kinds = [r["kind"] for group in groups.values() for r in group["responses"]]
    about = f"{path}: {len(kinds):,} responses to {len(groups):,} questions"
    return {"title": path.name, "about": about, "groups": list(groups.values()), "loss": "",
            "kinds": sorted(set(kinds)), "lenses": {}, "updates": []}


def rounded(t) -> list[float]:
    return [round(x, 5) for x in t.tolist()]


def packed(t, dtype=torch.float16) -> str:
    return base64.b64encode(t.to(dtype).numpy().tobytes()).decode()


def write(page, path) -> None:
    """Models wrote part of this. No "<" of theirs reaches the file, so nothing in it can end the
    script that holds it."""
    template = Path(__file__).with_suffix(".html").read_text()
    numbers = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(template.replace("__DATA__", numbers))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MB")


def main(argv) -> None:
    source = argv[0] if argv and not argv[0].startswith("-") else ""  # run, checkpoint, samples
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--loss", default="acpo", help="what the updates are made with")
    parser.add_argument("--groups", default="4", help="questions, --samples responses to each")
    parser.add_argument("--page", type=Path, default="microscope.html", help="file to write")
    known, rest = parser.parse_known_args(argv[1:] if source else argv)
    if source.endswith(".jsonl"):
        return write(samples(Path(source)), known.page)
    own = ["--loss", known.loss, "--prompts", known.groups, "--updates", "1", "--kl_beta", "0"]
    if source and (Path(source) / "latest").is_file():  # a run
        # Its --loss_args may be another objective's.
        own = [*train.flags_of_run(source), *own, "--loss_args", "--resume", "False",
               "--track", ""]
    flags = train.parse([*own, "--model", source, *rest])
    write(microscope(flags, known.updates), known.page)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"microscope.py: {e}")
