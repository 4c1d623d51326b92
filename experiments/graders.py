"""Graders side by side: which answers are right, who pays for a wrong one, and how fast is ours?

    python experiments/graders.py                      # both tables, into results/graders.json
    python experiments/graders.py cases --cases FILE   # other cases, one JSON object a line

cases    each case (tests/grader_cases.jsonl) through rewards.py, and the math ones through
         math-verify, TRL's accuracy reward and verl's math_verify score where they are installed
speed    512 responses: mixed tasks, math only, with 3 % and with 100 % bombs; seconds, three times
"""
import argparse
import importlib.util
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402

FIELDS = {"answer", "numbers", "target", "format", "metric"}
RESULTS = ROOT / "experiments" / "results" / "graders.json"


# ---- Other graders: each makes a function(response, gold) -> score -------------------------------

def math_verify_grader():
    from math_verify import parse, verify
    return lambda response, gold: verify(parse(f"${gold}$"), parse(response))


def trl_grader():
    from trl.rewards import accuracy_reward

    def grade(response, gold):
        completion = [[{"role": "assistant", "content": response}]]
        return accuracy_reward(completion, [f"${gold}$"])[0] or 0.0
    return grade


def verl_grader():
    from verl.utils.reward_score.math_verify import compute_score
    return compute_score


OTHERS = {"math_verify": math_verify_grader, "trl": trl_grader, "verl": verl_grader}


# ---- Cases ---------------------------------------------------------------------------------------

def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def item(case):
    """What a Scorer takes: (task, response, problem)."""
    return case["task"], case["response"], {key: case[key] for key in FIELDS & case.keys()}


def run_cases(path):
    cases = [case for case in read(path) if case["task"] in rewards.TASKS]
    with rewards.Scorer(workers=1) as scorer:
        ours = [score for score, _ in scorer([item(case) for case in cases])]
    table = [row("ours, all tasks", zip(cases, ours))]
    for task in rewards.TASKS:
        some = [pair for pair in zip(cases, ours) if pair[0]["task"] == task]
        if some:
            table.append(row(f"ours, {task}", some))
    # The others know math alone.
    math = [case for case in cases if case["task"] == "math" and case["response"] is not None]
    for name, make in OTHERS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed, left out")
            continue
        grade = make()
        table.append(row(f"{name}, math", [(case, other_score(grade, case)) for case in math]))
    return table


def other_score(grade, case):
    """Best score over the golds; a grader that raises has given none."""
    scores = [0.0]
    for gold in rewards.as_list(case["answer"]):
        try:
            scores.append(float(grade(case["response"], str(gold))))
        except Exception as error:  # whatever a foreign grader may raise
            print(f"{case['id']}: {type(error).__name__}")
    return max(scores)


def row(name, scored):
    """Of (case, score) pairs."""
    wrong = [score - case["expected"] for case, score in scored]
    right = sum(abs(w) < 1e-6 for w in wrong)
    result = {"grader": name, "cases": len(wrong), "right": right,
              "false_positives": sum(w > 1e-6 for w in wrong),
              "false_negatives": sum(w < -1e-6 for w in wrong),
              "percent": round(100 * right / len(wrong), 1)}
    print(result, flush=True)
    return result


# ---- Speed ---------------------------------------------------------------------------------------

BOMBS = [r"9^{9^{9^{%d}}}", r"\sum_{i=1}^{9999} \sin(%di)", r"((%d!)!)!", r"2^{2^{5%d}}",
         r"\int_0^{%d} x^{x} e^{x^2} dx", r"\prod_{k=1}^{9999} (k^2+%d)"]


def batches(path):
    """{name: 512 (task, response, problem)}: as in a step of 64 problems with 8 samples each."""
    some = [item(case) for case in read(path) if case["response"] is not None]
    math = [one for one in some if one[0] == "math"]
    bombs = []
    for i in range(512):
        bomb = BOMBS[i % len(BOMBS)] % (i + 10)
        bombs.append(("math", rf"\boxed{{{bomb}}}", {"answer": "x+1"}))
    rng = random.Random(0)
    few = rng.choices(math, k=496) + bombs[:16]
    rng.shuffle(few)
    return {"mixed": rng.choices(some, k=512), "math": rng.choices(math, k=512),
            "math, 3 % bombs": few, "bombs": bombs,
            "bombs that no rule refuses": [b for b in bombs if "9999" in b[1] or "int" in b[1]]}


def run_speed(path):
    table = []
    for name, batch in batches(path).items():
        seconds = []
        for _ in range(3):
            with rewards.Scorer(workers=2) as scorer:
                scorer([("math", r"\boxed{x+1}", {"answer": "1+x"})] * 4)  # start the workers
                start = time.perf_counter()
                graded = scorer(batch)
                seconds.append(time.perf_counter() - start)
        table.append({"batch": name, "grader": "ours", "responses": len(batch),
                      "seconds": round(statistics.median(seconds), 2),
                      "spread": [round(min(seconds), 2), round(max(seconds), 2)],
                      "timeouts": sum(status == "timeout" for _, status in graded)})
        print(table[-1], flush=True)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["cases", "speed"])
    parser.add_argument("--cases", type=Path, default=ROOT / "tests" / "grader_cases.jsonl")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, run in {"cases": run_cases, "speed": run_speed}.items():
        if name in args.what:
            results[name] = run(args.cases)
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
