"""experiments/walkthrough.py, number by number, another way; and the page that shows it."""
import base64
import re
from pathlib import Path

import pytest
import torch

import train
from experiments import microscope, walkthrough


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("walk"))
        return walkthrough.walk()


def test_rewards_and_advantages_by_hand(walk):
    assert walk["answer"] == str((2 + 7 + 1 + 8 + 2 + 8) % 10)
    R = [float(text.endswith(f"#{walk['answer']}$")) for text in walk["texts"]]
    assert walk["reward"].tolist() == R and 0 < sum(R) < 8
    mean = sum(R) / 8
    std = (sum((r - mean)**2 for r in R) / 7)**0.5
    advantages = [(r - mean) / std for r in R]
    assert walk["adv"].tolist() == pytest.approx(advantages, abs=1e-5)


def test_first_update_has_ratio_one_and_weight_A(walk):
    first = walk["steps"][0]
    m = first["mask"]
    assert (first["logp"] - first["old_logp"])[m].abs().max() < 5e-5
    A = walk["adv"][:, None].expand_as(m)
    for weights in first["weights"].values():
        assert torch.allclose(weights[m], A[m], atol=1e-4)
    assert abs(first["loss"]) < 1e-5  # the advantages sum to zero; the gradient does not


def test_second_update_by_the_formulas(walk):
    step, m = walk["steps"][1], walk["steps"][1]["mask"]
    ratio = (step["logp"] - step["old_logp"]).exp()
    p = step["logp"].exp()
    A = walk["adv"][:, None].expand_as(ratio)
    outside = ((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))
    assert outside[m].any() and not outside[m].all()
    expected = {"cispo": ratio.clamp(0, 1.3) * A}
    expected["grpo"] = torch.where(outside, 0, ratio * A)
    band = torch.full_like(ratio, 0.2)
    for b in range(5):
        inside = m & ((5 * p).long().clamp(max=4) == b)
        if inside.any():
            variance = ratio[inside].double().var(correction=0)
            band[inside] += 3 * (variance + 1e-8).sqrt().float()
    too_high = (A > 0) & (ratio > 1 + band)
    too_low = (A < 0) & ((ratio < 1 - band) | (ratio > 3))
    expected["acpo"] = torch.where(too_high | too_low, 0, ratio * A)
    for name, weights in expected.items():
        assert torch.allclose(step["weights"][name][m], weights[m], atol=1e-3), name
    loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    mean = ((loss * m).sum(1) / m.sum(1)).mean()
    assert step["loss"] == pytest.approx(mean.item(), abs=1e-5)


def test_the_microscope_would_show_these_weights(walk):
    """The page holds them in half precision, one after the other."""
    for name in walkthrough.NAMES:
        views = [train.TokenStats(*(step[f] for f in train.TokenStats._fields))
                 for step in walk["steps"]]
        page = microscope.through(name, views, walk["rollouts"], walk["flags"])
        assert page["advantage"] == pytest.approx(walk["adv"].tolist(), abs=1e-4)
        for step, shown in zip(walk["steps"], page["views"]):
            held = torch.frombuffer(bytearray(base64.b64decode(shown["w"])), dtype=torch.float16)
            assert torch.equal(held, step["weights"][name][step["mask"]].half())


def test_the_updates_moved_probabilities_towards_the_winners(walk):
    first = walk["steps"][0]
    change = ((walk["after"] - first["logp"]) * first["mask"]).sum(1)
    right = walk["reward"] == 1
    assert change[right].min() > 0 > change[~right].max()


def test_the_pages_show_this_output(walk):
    """docs/walkthrough.md all of it, README some tokens' lines. Words equal, numbers to 0.02: other
    machines round the warm start differently."""
    number = re.compile(r"-?\d+\.\d+")

    def parts(line):
        return number.sub("N", line).split(), [float(x) for x in number.findall(line)]
    report = [parts(line) for line in walkthrough.report(walk).splitlines()]
    root = Path(__file__).parent.parent
    shown = {}
    for page in ("docs/walkthrough.md", "README.md"):
        text = (root / page).read_text()
        block = re.search(r"```text\n(prompt 271828=.*?)```", text, re.S).group(1)
        shown[page] = [parts(line) for line in block.splitlines()]
    assert len(shown["docs/walkthrough.md"]) == len(report)
    some = [line for line in shown["README.md"] if len(line[1]) >= 5]
    assert some
    for words, numbers in shown["docs/walkthrough.md"] + some:
        close = pytest.approx(numbers, abs=0.02)
        assert any(w == words and n == close for w, n in report), words
