"""Sample responses with their verdicts as one HTML page, because people read failures.

    python experiments/samples_page.py runs/default           # all samples_*.jsonl there -> runs/default/samples.html
    python experiments/samples_page.py samples_kk.jsonl 50     # one file, at most 50 responses of each kind

Nothing of a response is trusted: all of it is escaped, and the page has no script.
"""
import html
import json
import sys
from pathlib import Path

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f3;padding:.5em;margin:.3em 0;max-height:30em;
overflow:auto}
article{border-left:5px solid #c33;padding-left:.8em;margin:1em 0}article.right{border-color:#2a7}
summary{font-size:1.1em;margin:.6em 0;cursor:pointer}small{color:#666}"""


def kind(row):
    """What a reader looks for: right, wrong, or why there was nothing to compare."""
    if row["score"] == 1:
        return "right"
    return "truncated" if not row["finished"] else "wrong" if row["status"] == "ok" else row["status"]


def section(file, most):
    """The rows of one samples file, grouped by kind; the first response of each kind to a question comes first."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of an evaluation that is still going on
            break
    e, kinds, parts = html.escape, {}, [f"<h2>{html.escape(file.name)}: {len(rows)} responses</h2>"]
    for row in rows:
        kinds.setdefault(kind(row), []).append(row)
    for name, found in sorted(kinds.items(), key=lambda pair: (pair[0] == "right", pair[0])):
        first = {r["id"]: r for r in reversed(found)}
        shown = sorted(found, key=lambda r: first[r["id"]] is not r)[:most]
        parts.append(f"<details{' open' if name != 'right' else ''}><summary>{e(name)}: {len(found)} "
                     f"({100 * len(found) / len(rows):.1f}%), {len(shown)} shown</summary>")
        parts += [f"<article class='{e(name)}'><small>{e(r['id'])}, sample {r['sample']}, {r['length']} tokens, status "
                  f"{e(r['status'])}, score {r['score']:g}</small><pre>{e(r['prompt'])}</pre><pre>{e(r['response'])}"
                  f"</pre><small>expected {e(json.dumps(r['answer'], ensure_ascii=False))}</small></article>"
                  for r in shown]
        parts.append("</details>")
    return "\n".join(parts)


def page(where, most=20):
    """Write the page of a samples file or of all in a directory; its path."""
    where = Path(where)
    files = sorted(where.glob("samples_*.jsonl")) if where.is_dir() else [where] if where.is_file() else []
    if not files:
        sys.exit(f"samples_page.py: {where}: no samples_<task>.jsonl there; python eval.py writes them")
    out = where / "samples.html" if where.is_dir() else where.with_suffix(".html")
    body = "\n".join(section(file, most) for file in files)
    out.write_text(f"<!doctype html><meta charset='utf-8'><title>{html.escape(str(where))}</title>"
                   f"<style>{STYLE}</style>\n{body}\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not sys.argv[-1].isdecimal() and len(sys.argv) == 3:
        sys.exit(__doc__.strip())
    print(page(sys.argv[1], *map(int, sys.argv[2:])))
