"""One prompt through the whole loop, with its numbers: python experiments/walkthrough.py

A small model that has mostly learned to guess (81 steps on demonstrations, seconds) answers one
prompt eight times. The responses are scored, the scores become advantages, the advantages weights
on log-probs (through the lens that makes the microscope's page), and two gradient steps (of plain
SGD, so that the first-order story can be checked by hand) change the probability of every token.
tests/test_walkthrough.py recomputes each number another way; README.md shows the output.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data
import losses
import rewards
import train
from experiments import microscope
from model import Model
from rollout import generate

PROMPT = "271828="
SAMPLES = 8
LR = 0.2
NAMES = ("grpo", "acpo", "cispo")
SHOWN = (0, 2)  # a winner that wrote something down first, and a loser


def walk() -> dict:
    """Every intermediate result, by name; tensors over responses are (8,), over tokens (8,T)."""
    flags = train.Flags(width=32, layers=1, skill_steps=1, habit_steps=80, samples=SAMPLES,
                        max_new_tokens=16, loss="grpo")
    model = Model.from_pretrained(train.small_model(flags))
    tokenizer = data.load_tokenizer(model.source)

    # Rollout: eight responses, each token with the log-prob it was drawn with.
    prompt = tokenizer.encode(PROMPT)
    rollouts = generate(model, [prompt], SAMPLES, flags.max_new_tokens, seed=125)
    responses = [r.tokens[r.prompt_len:] for r in rollouts]
    texts = [tokenizer.decode(response) for response in responses]

    # Reward and advantage: right or wrong, against the other samples of the same prompt.
    answer = str(sum(map(int, PROMPT[:-1])) % 10)
    for rollout, text in zip(rollouts, texts):
        rollout.score = rewards.score("chainsum", text, answer=answer)
    train.assign_advantages(rollouts, flags)
    adv = train.per_rollout(rollouts, "advantage")

    # Two updates on the same rollout: at the first the ratio is 1, at the second it is not.
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps = []
    for _ in range(2):
        tokens = train.token_stats(model, rollouts, flags)
        view = train.TokenStats(*(t.detach() for t in tokens))
        weights = {name: microscope.Lens(name, view, rollouts, flags).weights() for name in NAMES}
        loss, metrics = losses.policy_loss("grpo", tokens.logp, tokens.old_logp, adv, tokens.mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(view._asdict() | {"loss": loss.item(), "weights": weights, "metrics": metrics})
    with torch.no_grad():
        after = train.token_stats(model, rollouts, flags).logp
    written = [[tokenizer.decode([t]) for t in response] for response in responses]
    return {"answer": answer, "texts": texts, "tokens": written, "adv": adv, "steps": steps,
            "reward": train.per_rollout(rollouts, "score"), "after": after, "rollouts": rollouts,
            "flags": flags}


def report(w) -> str:
    lines = [f"prompt {PROMPT}   answer {w['answer']}", "", " i response  reward  advantage"]
    for i, text in enumerate(w["texts"]):
        lines.append(f" {i} {text:9s} {w['reward'][i]:6.0f} {w['adv'][i]:10.3f}")
    lines += ["", "                     update 1         update 2: weight of the token under",
              " i token  p_old   ratio  weight    ratio   grpo   acpo  cispo   p after"]
    first, second = w["steps"]
    for i in SHOWN:
        for t, token in enumerate(w["tokens"][i]):
            log_ratios = [step["logp"] - step["old_logp"] for step in w["steps"]]
            ratios = [log_ratio[i, t].exp() for log_ratio in log_ratios]
            weights = [second["weights"][name][i, t] + 0.0 for name in NAMES]  # no "-0.000"
            line = f" {i} {token:5s} {first['old_logp'][i, t].exp():6.3f} {ratios[0]:7.3f} "
            line += f"{first['weights']['grpo'][i, t]:7.3f} {ratios[1]:8.3f} "
            line += " ".join(f"{weight:6.3f}" for weight in weights)
            lines.append(f"{line} {w['after'][i, t].exp():9.3f}")
    clipped = 100 * (second["metrics"]["clip_low"] + second["metrics"]["clip_high"])
    lines += ["", f"loss {abs(first['loss']):.3f}, then {second['loss']:.3f}; clipped by grpo at "
              f"update 2: {clipped:.1f} % of the tokens"]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report(walk()))
