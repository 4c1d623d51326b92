"""One prompt through the whole loop, with its numbers: python experiments/walkthrough.py

A small model that has mostly learned to guess (81 steps on demonstrations, two seconds) answers one prompt eight times. Its
responses are scored, the scores become advantages, the advantages weights on log-probs, and two gradient steps (of one
plain SGD, so that the first-order story can be checked by hand) change the probability of every token. tests/test_walkthrough.py recomputes each number another way; README.md shows the output.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data
import losses
import train
from experiments.warm_start import new_model
from model import Model
from rewards import score
from rollout import generate

PROMPT, SAMPLES, LR = "271828=", 8, 0.2
SHOWN = (4, 0)  # a winner that wrote something down first, and a loser


def walk():
    """Every intermediate result, by name; tensors over responses are (8,), over tokens (8, T)."""
    cfg = train.Config(width=32, layers=1, skill_steps=1, habit_steps=80, samples=SAMPLES, max_new_tokens=16)
    model = Model.from_pretrained(new_model(cfg, train.forward))
    tokenizer = data.load_tokenizer(model.source)

    # rollout: eight responses, each token with the log-prob it was drawn with
    prompt = tokenizer.encode(PROMPT)
    rollouts = generate(model, [prompt], n=SAMPLES, max_new_tokens=cfg.max_new_tokens, seed=4)
    texts = [tokenizer.decode(r.tokens[r.prompt_len:]) for r in rollouts]

    # reward and advantage: right or wrong, against the other samples of the same prompt
    answer = str(sum(map(int, PROMPT[:-1])) % 10)
    reward = torch.tensor([score("chainsum", text, answer=answer) for text in texts])
    adv = losses.advantages(reward, SAMPLES, "grpo")

    # two updates on the same rollout: at the first the ratio is 1, at the second it is not
    rows = [train.Row(r.tokens, r.prompt_len, r.logp, r.finished, 0.0, "ok") for r in rollouts]
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=LR), []
    for _ in range(2):
        mask, old_logp, logp, _, _ = train.token_stats(model, rows, cfg)
        weights = {name: token_weights(name, logp, old_logp, adv, mask) for name in ("grpo", "acpo", "cispo")}
        loss, metrics = losses.policy_loss("grpo", logp, old_logp, adv, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(dict(mask=mask, old_logp=old_logp, logp=logp.detach(), loss=loss.item(), weights=weights, metrics=metrics))
    with torch.no_grad():
        after = train.token_stats(model, rows, cfg)[2]
    tokens = [[tokenizer.decode([t]) for t in r.tokens[r.prompt_len:]] for r in rollouts]
    return dict(prompt=prompt, answer=answer, texts=texts, tokens=tokens, reward=reward, adv=adv, steps=steps, after=after)


def token_weights(name, logp, old_logp, adv, mask):
    """w of grad loss = -mean_i mean_t (w grad log pi), by autograd: what the objective makes of each token."""
    logp = logp.detach().requires_grad_()
    loss, _ = losses.policy_loss(name, logp, old_logp, adv, mask, agg="seq-mean-token-mean")
    return -torch.autograd.grad(loss, logp)[0] * len(logp) * mask.sum(1, keepdim=True)


def report(w):
    lines = [f"prompt {PROMPT}   answer {w['answer']}", "", " i response  reward  advantage"]
    rows = zip(w["texts"], w["reward"].tolist(), w["adv"].tolist())
    lines += [f" {i} {text:9s} {r:6.0f} {a:10.3f}" for i, (text, r, a) in enumerate(rows)]
    lines += ["", "                     update 1         update 2: weight of the token under", " i token  p_old   ratio  weight    ratio"
              "   grpo   acpo  cispo   p after"]
    first, second = w["steps"]
    for i in SHOWN:
        for t, token in enumerate(w["tokens"][i]):
            r1, r2 = ((s["logp"] - s["old_logp"])[i, t].exp().item() for s in w["steps"])
            ws = [second["weights"][n][i, t].item() + 0.0 for n in ("grpo", "acpo", "cispo")]  # + 0.0: no "-0.000"
            lines.append(f" {i} {token:5s} {first['old_logp'][i, t].exp().item():6.3f} {r1:7.3f} {first['weights']['grpo'][i, t]:7.3f} "
                         f"{r2:8.3f} {ws[0]:6.3f} {ws[1]:6.3f} {ws[2]:6.3f} {w['after'][i, t].exp().item():9.3f}")
    lines += ["", f"loss {abs(first['loss']):.3f}, then {second['loss']:.3f}; clipped by grpo at update 2: "
              f"{100 * (second['metrics']['clip_low'] + second['metrics']['clip_high']).item():.1f} % of the tokens"]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report(walk()))
