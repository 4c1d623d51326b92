"""Two results of eval.py, question by question: the difference, its error, and the verdict."""
import json
import math
import statistics
import sys

import pytest

import eval as evaluation
from experiments import paired


def write(directory, scores, groups=None, ids=None, answer="7"):
    """What eval.py leaves of a task `t` with these scores, a list a question."""
    directory.mkdir(exist_ok=True)
    rows = []
    for i, block in enumerate(scores):
        for j, score in enumerate(block):
            rows.append({"id": ids[i] if ids else i, "sample": j, "score": score, "status": "ok",
                         "group": groups[i] if groups else "", "answer": {"answer": answer},
                         "run": directory.name, "finished": True, "length": 3})
    (directory / "samples_t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"t": evaluation.score_rows(rows, len(scores[0]))}
    (directory / "results.json").write_text(json.dumps({"results": results}))
    return directory


def test_the_paired_difference_and_its_error(tmp_path):
    """Paired by id, in any order, over the questions that both have."""
    ours = [[1, 1], [0, 1], [0, 0], [1, 1]]
    theirs = [[0, 0], [0, 0], [1, 0], [1, 1]]
    a = write(tmp_path / "a", ours, ids="wxyz")
    b = write(tmp_path / "b", theirs, ids="zyxv")
    found = paired.paired(a, b, "t")
    d = [0.5 - 0.5, 0 - 0, 1 - 0]  # x, y, z
    assert found["difference"] == pytest.approx(sum(d) / 3) and found["questions"] == 3
    assert found["se"] == pytest.approx(statistics.stdev(d) / math.sqrt(3))
    assert (found["first"], found["second"]) == pytest.approx((0.5, 0.5 / 3))


def test_the_verdict_is_noise_below_two_standard_errors(tmp_path):
    def verdict(x, y, groups=None):
        a, b = write(tmp_path / "a", x, groups), write(tmp_path / "b", y, groups)
        return paired.paired(a, b, "t")["verdict"]
    no, half = [[0]] * 12, [[1]] * 6 + [[0]] * 6
    assert verdict(half, no) == "better" and verdict(no, half) == "worse"
    assert verdict(half, half).startswith("noise")
    assert verdict([[1]] * 2 + [[0]] * 10, no).startswith("noise")  # 0.17 +- 0.11
    assert verdict(half, no, ["table 1"] * 6 + ["table 2"] * 6).startswith("noise")  # two tables
    assert verdict([[1]], [[0]]).startswith("noise")  # one question proves nothing


def test_the_command(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a", [[1]] * 6 + [[0]] * 6)
    b = write(tmp_path / "b", [[0]] * 12)
    monkeypatch.setattr(sys, "argv", ["paired.py", str(a), str(b)])
    paired.main()
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["t", "50.0", "0.0", "50.0", "±", "15.1", "12", "better"]
    (b / "results.json").write_text('{"results": {"other": {}}}')
    with pytest.raises(SystemExit, match="no task in common"):
        paired.main()
    (b / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="not a results.json"):
        paired.main()


def test_what_cannot_be_paired(tmp_path):
    a = write(tmp_path / "a", [[1, 1]] * 3)
    for more in ({"ids": "xyz"}, {"answer": "8"}):  # other questions; the same ids in another file
        b = write(tmp_path / "b", [[1, 1]] * 3, **more)
        with pytest.raises(ValueError, match="no pairs"):
            paired.paired(a, b, "t")
    file = b / "samples_t.jsonl"
    good = file.read_text()
    for text in (good.replace('"run": "b"', '"run": "other"'), good[:100], "5\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="has not the responses that"):
            paired.paired(a, b, "t")
