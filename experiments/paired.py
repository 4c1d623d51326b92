"""Is one checkpoint better than another, or is it noise? By the questions that both answered.

    python eval.py runs/a; python eval.py runs/b
    python experiments/paired.py runs/a runs/b

Reads results.json and the samples_<task>.jsonl beside it. Per task the mean of the differences, a
question at a time, with its standard error (clustered, see eval.standard_error): pairs cancel how
hard the questions are, so that far smaller differences can be told from noise than by the two
scores with their own errors. Below two standard errors it is called noise.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import mean, percent, read_json, read_rows, standard_error, table  # noqa: E402


def main():
    if len(sys.argv) != 3:
        sys.exit("paired.py: give two directories that hold a results.json of eval.py")
    ours, theirs = map(Path, sys.argv[1:])
    try:
        tasks = [task for task in read_results(ours) if task in read_results(theirs)]
        if not tasks:
            raise ValueError(f"{ours} and {theirs} have no task in common")
        lines = [["task", "first", "second", "difference ± SE", "questions", "verdict"]]
        for task in tasks:
            d = paired(ours, theirs, task)
            lines.append([task, percent(d["first"]), percent(d["second"]),
                          percent(d["difference"], d["se"]), str(d["questions"]), d["verdict"]])
    except (ValueError, OSError) as e:
        sys.exit(f"paired.py: {e}")
    print(table(lines))


def paired(ours, theirs, task):
    """The mean difference (first - second) over the questions that both directories have."""
    a, b = by_question(ours, task), by_question(theirs, task)
    pairs = [(*a[question], b[question][0]) for question in a if question in b]
    if not pairs:
        raise ValueError(f"{ours} and {theirs} answered other questions of {task}: no pairs")
    first, groups, second = zip(*pairs)
    differences = [x - y for x, y in zip(first, second)]
    difference, se = mean(differences), standard_error(differences, groups)
    verdict = "better" if difference > 0 else "worse"
    if se is None or abs(difference) < 2 * se or difference == 0:
        verdict = "noise (below 2 SE)"
    return {"first": mean(first), "second": mean(second), "difference": difference, "se": se,
            "questions": len(pairs), "verdict": verdict}


def by_question(directory, task):
    """{(id, answer): (mean score, group)}: with another answer it is another question."""
    file = directory / f"samples_{task}.jsonl"
    try:
        result = read_results(directory)[task]
        n = result["n"]
        rows = read_rows(file)[:n * result["questions"]]
        runs = {row["run"] for row in rows}
        if len(rows) < n * result["questions"] or runs != {result["run"]}:
            raise KeyError("run")
        found = {}
        for i in range(0, len(rows), n):
            first, responses = rows[i], rows[i:i + n]
            score = mean([row["score"] for row in responses])
            found[first["id"], str(first["answer"])] = score, first["group"]
        return found
    except (KeyError, TypeError):
        raise ValueError(f"{file} has not the responses that {directory / 'results.json'} was "
                         "made of; run eval.py again") from None


def read_results(directory):
    results = read_json(directory / "results.json").get("results")
    if not isinstance(results, dict):
        raise ValueError(f"{directory / 'results.json'}: not a results.json of eval.py")
    return results


if __name__ == "__main__":
    main()
