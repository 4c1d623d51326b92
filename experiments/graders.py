"""Graders side by side: which answers are right, who pays for a wrong one, and how fast is ours?

    python experiments/graders.py                      # every table, into experiments/results/graders.json
    python experiments/graders.py cases --cases FILE   # other cases, one JSON object a line
    python experiments/graders.py crossed --old DIR    # pairs that DIR/rewards.py did not accept, too

cases    each case (tests/grader_cases.jsonl) through rewards.py, and the math ones through
         math-verify, TRL's accuracy reward and verl's math_verify score where they are installed
speed    512 responses: mixed tasks, math only, with 3 % and with 100 % bombs; seconds, three times
crossed  40,000 pairs of distinct answers: a pair that is accepted is a false positive or a synonym
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


# ---- Other graders: function(response, gold) -> score, None where the package is missing ----------

def math_verify_grader():
    from math_verify import parse, verify
    def grade(response, gold):
        return float(verify(parse(f"${gold}$"), parse(response)))
    return grade

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

def graders():
    """{name: function(task, response, problem) -> score}; the others know math alone."""
    found = {}
    for name, make in OTHERS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed, left out")
            continue
        found[name] = make()
    return found


# ---- Cases ---------------------------------------------------------------------------------------

def problem_of(case):
    return {key: case[key] for key in FIELDS & case.keys()}

def run_cases(path):
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cases = [case for case in cases if case["task"] in rewards.TASKS]
    with rewards.Scorer(workers=1) as scorer:
        items = [(case["task"], case["response"], problem_of(case)) for case in cases]
        ours = [score for score, _ in scorer(items)]
    table = [row("ours, all tasks", cases, ours)]
    for task in rewards.TASKS:
        chosen = [i for i, case in enumerate(cases) if case["task"] == task]
        if chosen:
            table.append(row(f"ours, {task}", [cases[i] for i in chosen], [ours[i] for i in chosen]))
    plain = [case for case in cases if case["task"] == "math" and case["response"] is not None]
    for name, grade in graders().items():
        table.append(row(f"{name}, math", plain, [other_score(grade, case) for case in plain]))
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

def row(name, cases, scores):
    wrong = [score - case["expected"] for case, score in zip(cases, scores)]
    result = {"grader": name, "cases": len(cases),
              "right": sum(abs(w) < 1e-6 for w in wrong),
              "false_positives": sum(w > 1e-6 for w in wrong),
              "false_negatives": sum(w < -1e-6 for w in wrong)}
    result["percent"] = round(100 * result["right"] / len(cases), 1)
    print(result, flush=True)
    return result


# ---- Speed ---------------------------------------------------------------------------------------

BOMBS = [r"9^{9^{9^{%d}}}", r"\sum_{i=1}^{9999} \sin(%di)", r"((%d!)!)!", r"2^{2^{5%d}}",
         r"\int_0^{%d} x^{x} e^{x^2} dx", r"\prod_{k=1}^{9999} (k^2+%d)"]

def batches(path):
    """{name: 512 (task, response, problem)}: as in a step of 64 problems with 8 samples each."""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    quick = [(c["task"], c["response"], problem_of(c)) for c in cases if not c["response"] is None]
    math = [item for item in quick if item[0] == "math"]
    bombs = [("math", r"\boxed{%s}" % (BOMBS[i % len(BOMBS)] % (i + 10)), {"answer": "x+1"})
             for i in range(512)]
    pick = random.Random(0)
    few = pick.choices(math, k=496) + bombs[:16]
    pick.shuffle(few)
    return {"mixed": pick.choices(quick, k=512), "math": pick.choices(math, k=512),
            "math, 3 % bombs": few, "bombs": bombs,
            "bombs that no rule refuses": [b for b in bombs if "9999" in b[1] or "int" in b[1]]}

def run_speed(path, modules):
    table = []
    for name, items in batches(path).items():
        for label, module in modules.items():
            seconds, timeouts = [], 0
            known = [item for item in items if item[0] in module.TASKS]
            for _ in range(1 if "bombs" in name and label != "ours" else 3):
                with module.Scorer(workers=2) as scorer:
                    scorer([("math", r"\boxed{x+1}", {"answer": "1+x"})] * 4)  # start the workers
                    start = time.perf_counter()
                    graded = scorer(known)
                    seconds.append(time.perf_counter() - start)
                timeouts = sum(status == "timeout" for _, status in graded)
            table.append({"batch": name, "grader": label, "responses": len(known),
                          "seconds": round(statistics.median(seconds), 2),
                          "spread": [round(min(seconds), 2), round(max(seconds), 2)],
                          "timeouts": timeouts})
            print(table[-1], flush=True)
    return table


# ---- Crossed pairs of distinct answers -----------------------------------------------------------

def run_crossed(path, pairs, modules):
    """Golds against each other: what is accepted although distinct, and what of it is new?"""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    golds = sorted({str(c["answer"]) for c in cases if c["task"] == "math"} | set(more_golds()))
    pick = random.Random(1)
    chosen = set()
    while len(chosen) < min(pairs, len(golds) * (len(golds) - 1)):
        gold, pred = pick.sample(golds, 2)
        chosen.add((gold, pred))
    accepted = accepted_pairs(rewards, sorted(chosen))
    result = {"golds": len(golds), "pairs": len(chosen), "accepted": accepted}
    if "old" in modules:  # which of them are new? The rest of the pairs is no news
        before = accepted_pairs(modules["old"], accepted)
        result["newly_accepted"] = [pair for pair in accepted if pair not in before]
    print(json.dumps(result, ensure_ascii=False, indent=0))
    return result

def accepted_pairs(module, pairs):
    found = []
    with module.Scorer(workers=2) as scorer:
        for start in range(0, len(pairs), 500):  # a batch is given up after a few time-outs
            part = pairs[start:start + 500]
            graded = scorer([("math", r"\boxed{%s}" % p, {"answer": g}) for g, p in part])
            found += [pair for pair, (score, _) in zip(part, graded) if score == 1]
    return found

def more_golds():
    """The references of the tests, each of which stands for another answer or another spelling."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_rewards import MATH
    return [gold for gold, _, _ in MATH]


def other_version(directory):
    """rewards.py of another checkout, under a name of its own."""
    spec = importlib.util.spec_from_file_location("rewards_old", Path(directory) / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["cases", "speed", "crossed"])
    parser.add_argument("--cases", type=Path, default=ROOT / "tests" / "grader_cases.jsonl")
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--old", help="a checkout whose rewards.py is measured, too")
    args = parser.parse_args()
    modules = {"ours": rewards}
    if args.old:
        modules["old"] = other_version(args.old)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for what, run in (("cases", lambda: run_cases(args.cases)),
                      ("speed", lambda: run_speed(args.cases, modules)),
                      ("crossed", lambda: run_crossed(args.cases, args.pairs, modules))):
        if what in args.what:
            results[what] = run()
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
