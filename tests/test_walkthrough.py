"""experiments/walkthrough.py, number by number, another way; and the README shows what the script prints."""
import re
from pathlib import Path

import pytest
import torch

from experiments import walkthrough


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("walk"))
        return walkthrough.walk()


def test_rewards_and_advantages_by_hand(walk):
    assert walk["answer"] == str((2 + 7 + 1 + 8 + 2 + 8) % 10)
    R = [float(text.count("#") == 1 and text.endswith(f"#{walk['answer']}$")) for text in walk["texts"]]
    assert walk["reward"].tolist() == R and 0 < sum(R) < 8
    mean = sum(R) / 8
    std = (sum((r - mean) ** 2 for r in R) / 7) ** 0.5
    assert walk["adv"].tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in R], abs=1e-5)


def test_first_update_has_ratio_one_and_weight_A(walk):
    s = walk["steps"][0]
    m = s["mask"]
    assert ((s["logp"] - s["old_logp"])[m]).abs().max() < 5e-5
    for w in s["weights"].values():
        assert torch.allclose(w[m], walk["adv"][:, None].expand_as(m)[m], atol=1e-4)
    assert abs(s["loss"]) < 1e-5  # the advantages sum to zero; the gradient does not


def test_second_update_by_the_formulas(walk):
    s, A = walk["steps"][1], walk["adv"][:, None]
    r, p, m = (s["logp"] - s["old_logp"]).exp(), s["logp"].exp(), s["mask"]
    A = A.expand_as(r)
    outside = ((A > 0) & (r > 1.2)) | ((A < 0) & (r < 0.8))
    assert outside[m].any() and not outside[m].all()
    assert torch.allclose(s["weights"]["grpo"][m], torch.where(outside, 0, r * A)[m], atol=1e-4)
    assert torch.allclose(s["weights"]["cispo"][m], (r.clamp(0, 1.3) * A)[m], atol=1e-4)
    band = torch.full_like(r, 0.2)
    for b in range(5):
        inside = m & (p >= b / 5) & ((p < (b + 1) / 5) | (b == 4))
        if inside.any():
            band[inside] = 0.2 + 3 * (r[inside].double().var(correction=0) + 1e-8).sqrt().float()
    stop = ((A > 0) & (r > 1 + band)) | ((A < 0) & (r < 1 - band)) | ((A < 0) & (r > 3))
    assert torch.allclose(s["weights"]["acpo"][m], torch.where(stop, 0, r * A)[m], atol=1e-3)
    loss = -torch.minimum(r * A, r.clamp(0.8, 1.2) * A)
    assert s["loss"] == pytest.approx(((loss * m).sum(1) / m.sum(1)).mean().item(), abs=1e-5)


def test_the_update_moved_probabilities_towards_the_winners(walk):
    before, after, m = walk["steps"][0]["logp"], walk["after"], walk["steps"][0]["mask"]
    change = ((after - before) * m).sum(1)
    assert change[walk["reward"] == 1].mean() > change[walk["reward"] == 0].mean()


def test_the_readme_shows_this_output(walk):
    """Text equal, numbers to 0.02: other machines round the warm start differently."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    shown = re.search(r"```text\n(prompt 271828=.*?)```", readme, re.S).group(1)
    number = re.compile(r"-?\d+\.\d+")
    report = walkthrough.report(walk)
    squeeze = lambda text: re.sub(r"\s+", " ", number.sub("N", text)).strip()
    assert squeeze(shown) == squeeze(report)
    for a, b in zip(number.findall(shown)[:-1], number.findall(report)):
        assert abs(float(a) - float(b)) < 0.02, (a, b)
