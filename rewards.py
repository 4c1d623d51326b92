"""A response in, a score in [0, 1] out: verifiable rewards that a policy cannot cheat, hang or break.

    score("math", r"... so \boxed{\frac12}.", answer="0.5")                                                   -> 1.0
    grade("countdown", "<answer>(1+2)*8</answer>", numbers=[1, 2, 8], target=24)                               -> (1.0, "ok")
    with Scorer(workers=2) as scorer: scorer([("math", response, {"answer": "7"}), ...])                       -> [(1.0, "ok"), ...]

Tasks and their problem fields (TASKS, at the end, maps the names):
    chainsum   answer="7"                     default task: `...#7$`, with $ the end-of-sequence character
    add        answer="123"                   last \boxed{}, exact integer
    countdown  numbers=[..], target=24        last <answer> (format="boxed": last box), every number exactly once
    math       answer="1/2" or [any, of]      last \boxed{} or \fbox{} anywhere in the response
    tableqa    answer=[..]                    last <answer>, all values in this order
    kk         answer={"Ann": "knight", ..}   last <answer>, every person exactly once
    qa         answer=[any, of]               last <answer>, metric="em" | "f1" (SQuAD, HotpotQA)

Status: "ok" an answer was found and compared (right or wrong), "no_answer", "unparsable", "timeout", "error". Count them:
a grader that fails silently looks just like a policy that never learns.

Only `math` may need computer algebra (math-verify). That runs in a killable child process, because math-verify's alarm works
in a main thread only, and some inputs (2^{2^{50}}) never come back. Nothing a model writes is ever evaluated as Python.
"""
import ast
import difflib
import faulthandler
import json
import os
import re
import select
import signal
import string
import subprocess
import sys
import threading
import unicodedata
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

MAX_CHARS, MAX_DEPTH = 1000, 40    # longest, most deeply nested math answer that is parsed; longer ones can only match as text


# ---------------------------------------------------------------- where the answer is
def last_boxed(text):
    """Content of the last \\boxed{...} or \\fbox{...}; None if there is none or its brace never closes (a truncated response)."""
    return _box(text, len(text))[2]


def _box(text, end):
    """(start, stop, content) of the last box that begins before `end`; content is None if there is none or it does not close."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text[:end]))
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.S).finditer(text, boxes[-1].end()) if boxes else ():    # as in TeX, \{ does not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return boxes[-1].start(), token.end(), text[boxes[-1].end():token.start()]
    return -1, -1, None


def box_chain(text):
    """`\\boxed{1} and \\boxed{2}` at the end of a response -> "1,2": the last box with those joined to it by and, or, commas."""
    contents, end, joint = [], len(text), r"(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|and|or){0,40}"
    while len(contents) < 10:
        start, stop, content = _box(text, end)
        if content is None or contents and not re.fullmatch(joint, text[stop:min(end, stop + 200)]):
            break
        contents.insert(0, content)
        end = start
    return ",".join(contents)


def last_answer(text):
    """Content of the last <answer>...</answer>, without a \\boxed around it; None if there is none."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    inner = text[start + len("<answer>"):text.index("</answer>", start)]
    box = last_boxed(inner)
    return (inner if box is None else box).strip()


# ---------------------------------------------------------------- procedural tasks
def chainsum(response, answer):
    found = re.fullmatch(r"[^#]*#([^$]*)\$", response)
    return (float(found[1] == str(answer)), "ok") if found else (0.0, "no_answer")


def add(response, answer):
    box = last_boxed(response)
    if box is None:
        return 0.0, "no_answer"
    if not re.fullmatch(r"[+-]?[0-9]{1,100}", box.strip()):
        return 0.0, "unparsable"
    return float(int(box) == int(answer)), "ok"


def countdown(response, numbers, target, format="answer"):
    """1 iff the expression uses every number exactly once and equals the target exactly. Only + - * / ( ) and integers are let
    through, so there is nothing to run: `9**9**9` (hangs eval), `//`, `3.5` (would count as 3 and 5), `1+2=3` are unparsable."""
    text = last_boxed(response) if format == "boxed" else last_answer(response)
    if text is None:
        return 0.0, "no_answer"
    text = text.strip()
    if len(text) > 300 or not re.fullmatch(r"[0-9+\-*/() \n]+", text) or re.search(r"\b0[0-9]|//|\*\*", text):
        return 0.0, "unparsable"
    used = []
    try:
        value = _exact(ast.parse(text.replace("\n", " "), mode="eval").body, used)
    except ZeroDivisionError:
        return 0.0, "ok"
    except (SyntaxError, ValueError, RecursionError, MemoryError):    # ast.parse raises any of these on malformed or deep text
        return 0.0, "unparsable"
    return float(value == target and Counter(used) == Counter(numbers)), "ok"


def _exact(node, used, depth=0):
    """Value of an arithmetic syntax tree as a Fraction; its literals are appended to `used`."""
    if depth > 32:
        raise ValueError("nested deeper than 32")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _exact(node.operand, used, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        a, b = _exact(node.left, used, depth + 1), _exact(node.right, used, depth + 1)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(node.op)](b)
    raise ValueError(f"{type(node).__name__} is not allowed")


# ---------------------------------------------------------------- tables, puzzles, questions
def tableqa(response, answer):
    """HiTab: numbers within 1e-5 (a percent sign is ignored: 13.3% is 13.3), text equal up to case; all values, in order."""
    text, golds = last_answer(response), answer if isinstance(answer, (list, tuple)) else [answer]
    if not text:
        return 0.0, "no_answer"
    text = text.strip(" ,;\n")
    if len(text) > 2000:
        return 0.0, "unparsable"
    cuts = [m.span() for m in re.finditer(r"[,;\n]\s*and\b|[,;\n]|\band\b", text)]
    starts, stops = [0] + [b for _, b in cuts], [a for a, _ in cuts] + [len(text)]
    ends = {0}    # pieces used up so far; a value may span several pieces, as in "1,234" or "scientific, and technical services"
    for gold in golds:
        ends = {j + 1 for i in ends for j in range(i, min(len(stops), i + 20)) if same_cell(text[starts[i]:stops[j]], str(gold))}
    return float(len(stops) in ends), "ok"


def same_cell(text, gold):
    text, gold = (re.sub(r"\s+", " ", s.lower()).strip(" .'\"`[]{}") for s in (text, gold))
    a, b = (number(re.sub(r"[()$%\\]|percent", "", s).strip()) for s in (text, gold))
    return text == gold or a is not None and b is not None and (a == b or small(a, b) and abs(Fraction(a) - Fraction(b)) < 1e-5)


def kk(response, answer):
    """Knights and knaves: `Ann is a knight, Bob: knave` in any order; each person exactly once, nobody else, no contradiction."""
    text = last_answer(response)
    if not text:
        return 0.0, "no_answer"
    if len(text) > 2000:
        return 0.0, "unparsable"
    text = re.sub(r"\([0-9]{1,2}\)|(?<!\w)[0-9]{1,2}[.)]", ",", re.sub(r"[\"'{}*]", "", text))    # (1) Ann ... (2) Bob ...
    pieces = [p.strip() for p in re.split(r"[,;\n]|\.(?!\w)|\band\b", text.casefold()) if p.strip(" .-")]
    said = [re.fullmatch(r"[-\s]*(.+?)\s*(?:\bis\b|:|=|->)\s*(?:an?\s|the\s)?\s*(knight|knave)", p) for p in pieces]
    if not all(said):
        return 0.0, "unparsable"
    gold = sorted((name.casefold(), role.casefold()) for name, role in answer.items())
    return float(sorted(m.groups() for m in said) == gold), "ok"


def qa(response, answer, metric="em"):
    """Exact match or token F1 after SQuAD normalisation, best over the gold answers; yes/no never get partial credit (HotpotQA)."""
    text = last_answer(response)
    if text is None:
        return 0.0, "no_answer"
    pred, golds = _squad(text[:10000]), [_squad(str(g)) for g in ([answer] if isinstance(answer, str) else answer)]
    if metric not in ("em", "f1"):
        raise ValueError(f"unknown metric {metric!r}; choose em or f1")
    if not pred:    # "the" normalises to nothing, and nothing must not equal nothing
        return 0.0, "no_answer"
    return (float(pred in golds) if metric == "em" else max((_f1(pred, g) for g in golds), default=0.0)), "ok"


def _squad(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(pred, gold):
    if pred != gold and {"yes", "no", "noanswer"} & {pred, gold}:
        return 0.0
    a, b = pred.split(), gold.split()
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


# ---------------------------------------------------------------- math: text first, then exact numbers, then computer algebra
def math(response, answer, acpo_compat=False):
    """Compares the last box with each gold answer. Returns (score, status), or the pairs [(gold, pred), ...] that only computer
    algebra can decide, any of which makes the response right.

    acpo_compat: the ACPO paper's rule (arXiv 2606.22570): without a box the whole response is the answer, and an answer of more
    than 30 characters is right only if identical. Short correct prose scores, long correct answers do not: for comparison only.
    """
    golds = [str(g) for g in (answer if isinstance(answer, (list, tuple)) else [answer])]
    pred = last_boxed(response)
    if acpo_compat:
        pred = response if pred is None else pred
        if len(pred) > 30:
            return float(pred in golds), "ok"
    if pred is None or not pred.strip():
        return 0.0, "no_answer"
    if len(pred) > MAX_CHARS or _depth(pred) > MAX_DEPTH:    # before any regular expression sees it
        return float(pred.strip() in [g.strip() for g in golds]), "unparsable"
    if re.search(r"/\s*\{?0(?![.0-9])|frac\{[^{}]*\}\{0\}", pred) or any(
            unicodedata.category(c)[0] == "C" and c not in "\n\t\r" or c.isdigit() and c not in "0123456789²³" for c in pred):
        return 0.0, "unparsable"    # division by zero, invisible characters, foreign digits: never an answer
    pairs, chain = [], box_chain(response)[-MAX_CHARS:]
    for gold in golds:
        gold = box_chain(gold) or gold
        listed = chain != pred and not acpo_compat and re.search(r",|;|\band\b|\bor\b", gold)
        for candidate in [pred, chain] if listed else [pred]:
            verdict = compare(gold, candidate)
            if verdict is True:
                return 1.0, "ok"
            pairs += verdict or []
    return pairs or (0.0, "ok")


def _depth(text):
    depth = deepest = 0
    for c in text:
        depth += (c in "{([") - (c in "})]")
        deepest = max(deepest, depth)
    return deepest


SYMBOLS = {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "²": "^2",
           "³": "^3", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "√": r"\sqrt ", "½":
           r"\frac{1}{2}", "€": "", "£": "", "¥": "", "，": ",", "（": "(", "）": ")"}
STYLE = re.compile(r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|underline|tiny|small|large|"
                   r"Large|bf|rm|it|limits|phantom\{[^{}]*\}|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z])|\\!|\\(?=\$)|\$|\\[()\[\]]")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|emph|boldsymbol|bm)"
                  r"\s*\{([^{}]*)\}")
UNIT = r"[a-zA-Z][a-zA-Z.\s/]*(?:\^\s*\{?-?[0-9]\}?)?"
SHORT_UNITS = set("mm cm dm m km in ft yd mi mg g kg lb lbs oz ml l s sec secs min mins h hr hrs am pm a.m p.m mph kph km/h m/s hz pa ev "
                  "rad deg".split())
COMMANDS = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "lg": r"\log_{10}", "varnothing": r"\emptyset"}
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp max min gcd lcm mod det sqrt frac".split())


def clean(text):
    """LaTeX answer -> (canonical text, unit): styling, dollars, units, percent and trailing punctuation removed; `\\text{..}`
    only where words are the answer. Follows the lists of Hendrycks' strip_string and Math-Verify's normalisation."""
    for a, b in SYMBOLS.items():
        text = text.replace(a, b)
    text = re.sub(r"\\([dtc])frac", r"\\frac", text.strip())
    text = re.sub(r"\\frac\s*(\\pi|[0-9a-zA-Z])", r"\\frac{\1}", text)    # \frac12, \frac\pi6
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\\pi|[0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\{?([^{}\\]+)\\choose([^{}\\]+)\}?", r"\\binom{\1}{\2}", text)
    group = r"(?<![0-9.])([0-9]{1,3})((?:(?:\\[,;: !]|~|\{,\}|,\s?\\!|\s)\s*[0-9]{3})+)(?![0-9/])"
    text = re.sub(group, lambda m: m[1] + re.sub(r"[^0-9]", "", m[2]), text)    # 1\,000\,000, 1{,}000, 1 000
    text = STYLE.sub("", text)
    text = re.sub(r"\\begin\{([bB]|small)matrix\}(.*)\\end\{\1matrix\}|"
                  r"[\[(]?\s*\\begin\{(?:array|matrix)\}(?:\{[^{}]*\})?(.*)\\end\{(?:array|matrix)\}\s*[\])]?",
                  lambda m: r"\begin{pmatrix}%s\end{pmatrix}" % (m[2] or m[3]), text, flags=re.S)
    text = TEXT.sub(lambda m: m[1] if len(m[1].strip()) == 1 or re.fullmatch(r"[^a-zA-Z]*", m[1]) else r"\text{%s}" % m[1], text)
    text = re.sub(r"\\(lbrace|rbrace|langle|rangle|lg|varnothing)(?![a-zA-Z])", lambda m: COMMANDS[m[1]], text).replace("**", "^")
    text = re.sub(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b)(?:\s*[CF]$)?", r"^\\circ ", text)
    text = re.sub(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]{1,20})\}", _repeating, text)
    text = re.sub(r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"(\1+\\frac{\2}{\3})", text)    # 1 1/2
    text = re.sub(r"(?:,\s*)?\\text\{,?\s*(?:and|or)\s*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ",", text)
    text = re.sub(r"(?<!\\)\\(?:[,;: ]|q?quad\b)|~|\s+", " ", text)
    text = re.sub(r"\\text\{\s*(?:percent|percentage|pct)\s*\}|\b(?:percent|percentage|pct)\b", r"\\%", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text).strip().rstrip(".,;:\\ ")
    while len(text) > 2 and text[0] == "{" and text[-1] == "}" and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    unit = re.search(r"(?:(?<=[0-9})\]])|(?<=\\pi))\s*\\text\{\s*(%s)\}(?:\^\s*\{?-?[0-9]\}?)?$|"
                     r"(?<=[0-9})\]])(?:\s+|(?=[a-z]{2}))(%s)$" % (UNIT, UNIT), text)
    if not unit:
        return text, ""
    rest, word = text[:unit.start()].strip(), (unit[1] or unit[2]).strip().rstrip(".").lower()
    bare = re.sub(r"\^.*", "", word) in SHORT_UNITS and (len(word) > 1 or number(rest) is not None)    # 5 m, but not x^2 m
    return (rest, word) if unit[1] or bare or len(word) > 3 and " " in unit[0] else (text, "")


def _repeating(match):
    """0.1\\overline{6} -> \\frac{15}{90}"""
    whole, head, tail = match[1] or "0", match[2], match[3]
    return r"\frac{%d}{%d}" % (int(whole + head + tail) - int(whole + head), (10 ** len(tail) - 1) * 10 ** len(head))


def _closes(text):
    """Index of the bracket that closes the one at text[0]; -1 if none."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "{([") - (c in "})]")
        if depth == 0:
            return i
    return -1


def number(text):
    """Plain number -> exact Decimal or Fraction; None if it is anything else. 1e400 is never expanded to its digits."""
    power = re.fullmatch(r"([+-]?)(?:([0-9.]+)(?:\\times|\\cdot|\*))?10\^\{?([+-]?[0-9]{1,6})\}?", text)
    if power:
        text = f"{power[1]}{power[2] or 1}e{power[3]}"
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", text):
        text = text.replace(",", "")
    text = re.sub(r"^([+-]?0),(?=[0-9]+$)", r"\1.", text)    # 0,111
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?", text):
        return Decimal(text)
    ratio = re.fullmatch(r"([+-]?)(?:\\frac\{([+-]?[0-9]{1,99})\}\{([0-9]{1,99})\}|([0-9]{1,99})/([0-9]{1,99}))", text)
    if ratio and int(ratio[3] or ratio[5]):
        value = Fraction(int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5]))
        return -value if ratio[1] == "-" else value


def small(*numbers):
    """None of them is so large or so tiny that its Fraction would have hundreds of digits."""
    return all(isinstance(v, Fraction) or abs(v.adjusted()) < 300 for v in numbers)


def close(a, b):
    """Equal to 6 decimals, as 1/3 and 0.333333; below 1e-3 to a relative 1e-6 (Math-Verify takes all numbers < 5e-7 for equal)."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= (5e-7 if size >= 1e-3 else 1e-6 * size))


def same_number(a, b):
    """Exact, unless one is written with decimals."""
    decimals = any(isinstance(v, Decimal) and v != v.to_integral_value() for v in (a, b))
    return a == b or decimals and small(a, b) and close(Fraction(a), Fraction(b))


def choice(text):
    """`\\text{(A)} 5`, `(A)`, `A. 5` or `A` -> (letter, rest)."""
    found = re.fullmatch(r"\\text\{\s*\(?([A-Z])\)?[.:]?\s*\}[.:]?\s*(.*)|\(([A-Z])\)\s*(.*)|([A-Z])\)?(?:[.):]\s+(.*))?", text, re.S)
    return ((found[1] or found[3] or found[5]), (found[2] or found[4] or found[6] or "").strip()) if found else ("", text)


def compare(gold, pred):
    """True, False, or the list of (gold, pred) texts that computer algebra has to decide."""
    if gold.strip() == pred.strip():
        return True
    (gold, gold_unit), (pred, pred_unit) = clean(gold), clean(pred)
    if gold_unit and pred_unit and gold_unit != pred_unit and ({gold_unit, pred_unit} <= SHORT_UNITS or number(pred) is None):
        return False    # 5 km is not 5 cm, 12:30 am is not pm
    (gold_letter, gold_rest), (pred_letter, pred_rest) = choice(gold), choice(pred)
    if gold_letter and pred_letter:
        return gold_letter == pred_letter
    gold, pred = gold_rest or gold, pred_rest or pred
    if r"\pmod" in pred + gold or r"\bmod" in pred + gold:
        parts = [re.split(r"\s*\(?\\[pb]?mod\b\s*", s) for s in (gold, pred)]
        if len(parts[0]) == len(parts[1]) == 2 and parts[0][1].strip("{} )") != parts[1][1].strip("{} )"):
            return False
        gold, pred = parts[0][0].strip(), parts[1][0].strip()
    percent = [s.endswith(r"\%") for s in (gold, pred)]
    gold, pred = (s[:-2].strip() if p else s for s, p in zip((gold, pred), percent))
    heads = [re.match(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*(?:=|\\in(?![a-z])|\\equiv)\s*", s) for s in (gold, pred)]
    for head in heads:    # x = 5 is 5, but x = 5 is not y = 5
        if head and (not re.search(r"=|\\in(?![a-z])", pred if head is heads[0] else gold) or all(heads) and heads[0][1] == heads[1][1]):
            gold, pred = (gold[head.end():], pred) if head is heads[0] else (gold, pred[head.end():])
    a, b = (_compact(s) for s in (gold, pred))
    if not a or not b:
        return False
    if a == b:
        return True
    x, y = number(a), number(b)
    if x is not None and y is None:
        y = number(re.sub(r"(?<=[0-9])[msghl]$", "", b))    # 5m is 5 if a number is asked for; 2c is not 2
    if x is not None and y is not None:
        scale = Fraction(100) ** (percent[0] - percent[1])
        return same_number(x, y) or scale != 1 and small(x, y) and close(Fraction(x), Fraction(y) * scale)
    bases = [re.fullmatch(r"\(?([0-9A-F]+)\)?_\{?([0-9]{1,2})\}?", s) for s in (a, b)]
    if any(bases):
        return all(bases) and [m[1].lstrip("0") + "_" + m[2] for m in bases][0] == bases[1][1].lstrip("0") + "_" + bases[1][2]
    ratios = [re.sub(r"^.*=", "", s).split(":") for s in (a, b)]
    if min(map(len, ratios)) > 1:    # times and ratios: part by part, 12:30 is neither 10:25 nor 6:15
        return len(ratios[0]) == len(ratios[1]) and all(
            p == q or None not in (number(p), number(q)) and number(p) == number(q) for p, q in zip(*ratios))
    if {_bracket(a), _bracket(b)} in ({"{", "("}, {"{", "["}):    # a set is neither a tuple nor an interval
        return False
    if re.fullmatch(r"[A-Z]{2,}", a) and re.fullmatch(r"[A-Z]{2,}", b):    # the line ABC: letters in order, not a product
        return False
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", re.sub(r"\\(?:begin|end)\{[a-z]*\}", "", gold + " " + pred))
    if r"\text" in gold + pred or not FUNCTIONS.issuperset(words):    # prose: "5 apples and 3 oranges" is not 5
        return a.casefold() == b.casefold()
    if len(gold) > MAX_CHARS:
        return False
    pairs = [(gold, pred)]
    if percent[0] != percent[1]:
        pairs.append((gold, r"\frac{%s}{100}" % pred) if percent[1] else (r"\frac{%s}{100}" % gold, pred))
    if r"^\circ" in gold + pred:    # 30^\circ is 30 and \pi/6, but inside \sin only the radians are meant
        radians = [s.replace(r"^\circ", r"\cdot\frac{\pi}{180}") for s in (gold, pred)]
        plain = [] if re.search(r"\\(sin|cos|tan|cot|sec|csc)", gold + pred) else [tuple(s.replace(r"^\circ", "") for s in (gold, pred))]
        pairs = plain + [tuple(radians)]
    return pairs


def _compact(text):
    """Without spaces and \\text{}; but 1 8 stays two numbers, and 32, 349 too."""
    return re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip())


def _bracket(text):
    """The opening bracket if one pair of brackets encloses the whole text, with a comma in it: a set, tuple or interval."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{"
    return text[0] if text[0] in "([" and "," in text and _closes(text) == len(text) - 1 else ""


# ---------------------------------------------------------------- computer algebra, in the worker process only
def algebra_equal(gold, pred):
    """Math-Verify's parser and comparison, with letter case kept and numbers compared by `close` instead of by rounding."""
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import get_last_eq
    # units stay off: that list strips the letters c, d, h, o, t from the end, so that 2c equals 2
    norm = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    real = not (should_treat_as_complex(gold) or should_treat_as_complex(pred))

    def parse(text):
        text = normalize_latex(text, norm)
        options = dict(is_real=real, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))
        try:
            return latex2sympy(text, **options)
        except Exception:    # ANTLR raises bare Exception; a chain a = b = c does not parse as a whole, its last link may
            if get_last_eq(text) == text:
                raise
            return latex2sympy(get_last_eq(text), **options)

    a, b = parse(gold), parse(pred)
    verdict = _numbers_equal(a, b)
    if verdict is None:
        verdict = verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(verdict)


def _numbers_equal(a, b):
    """True or False if both SymPy objects are numbers, else None."""
    from sympy import Expr, Float, I
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or a.is_Matrix or b.is_Matrix:
        return None
    a, b = (v.subs({s: I for s in v.free_symbols if s.name == "i"}).doit() for v in (a, b))
    if not (a.is_number and b.is_number):
        return None
    if a.is_finite is False or b.is_finite is False:
        return a == b and a.is_extended_real is True    # infinity is an answer, 1/0 and nan are not
    if a.is_Rational and b.is_Rational and not (a.has(Float) or b.has(Float)):
        return a == b
    if a.has(Float) or b.has(Float):
        return close(a.evalf(40), b.evalf(40))
    return bool(abs((a - b).evalf(40)) <= 1e-25 * max(abs(a.evalf(40)), abs(b.evalf(40))))


class OutOfTime(BaseException):
    """BaseException, so that no `except Exception` in the parser can swallow it."""


def worker():
    """Answers JSON lines [seconds, [[gold, pred], ...]] from standard input with [score, status]."""
    import logging
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)    # whatever a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))    # (10^9)! is to fail here, not to fill the machine
    except (ImportError, ValueError, OSError):
        pass    # not on this platform: the timeout still holds
    algebra_equal("\\frac{1}{2}+x", "x+\\frac{1}{2}")    # import everything before the clock starts

    def alarm(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, alarm)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seconds, pairs = json.loads(line)
        result = [0.0, "unparsable"]
        try:
            faulthandler.dump_traceback_later(seconds + 5, exit=True)    # if the parent is no longer there to kill it
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for gold, pred in pairs:
                try:
                    result = [float(algebra_equal(gold, pred)), "ok"]
                except Exception:    # parser and SymPy raise nearly every type on odd input: this pair is unparsable
                    continue
                if result[0]:
                    break
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            result = [0.0, "timeout"]
        print(json.dumps(result), file=out, flush=True)


class Worker:
    """One child process `python rewards.py --worker`: it imports no torch, and can be killed at any moment."""

    def __init__(self):
        self.process = self.owner = None

    def start(self):
        self.stop()
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True)    # own session: Ctrl-C is the parent's
        self.owner, self.finalizer = os.getpid(), weakref.finalize(self, _end, self.process, os.getpid())
        if self.read(60) != "ready":
            self.stop()
            raise RuntimeError("the math-verify worker did not start; its error is above (pip install 'math-verify>=0.9')")

    def stop(self):
        if self.process:
            self.finalizer()
        self.process = None

    def read(self, seconds):
        """One line, None on silence, '' if the process died. Answers are short, so a line arrives in one piece."""
        poll = select.poll()    # select.select cannot watch descriptors above 1023
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        return os.read(self.process.stdout.fileno(), 4096).decode().strip()

    def ask(self, pairs, seconds):
        """(score, status) for [(gold, pred), ...], within `seconds`; a worker that hangs or dies is killed and replaced."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([seconds - 1, pairs]).encode() + b"\n")
            self.process.stdin.flush()
            line = self.read(seconds)
        except OSError:    # broken pipe: it died
            line = ""
        if not line:
            self.stop()
            return 0.0, "error" if line == "" else "timeout"
        value, status = json.loads(line)
        return value, status


def _end(process, owner):
    if owner == os.getpid():    # a forked child must not kill its parent's worker
        process.kill()
        process.wait()
    process.stdin.close()
    process.stdout.close()


class Scorer:
    """Scores batches. Computer algebra is spread over `workers` processes (0: the one that `score` uses); `timeout` seconds each.

    scorer([(task, response, problem), ...]) -> [(score, status), ...] in the same order.
    """

    def __init__(self, workers=2, timeout=6):
        assert workers >= 0 and timeout >= 2, f"workers {workers} >= 0, timeout {timeout} >= 2 s"
        self.workers, self.timeout = [Worker() for _ in range(workers)] or [SINGLE], timeout

    def __call__(self, items):
        results = [judge(task, response, problem) for task, response, problem in items]
        queue = deque(i for i, r in enumerate(results) if isinstance(r, list))

        def drain(worker):
            while queue:
                try:
                    i = queue.popleft()
                except IndexError:    # another thread was faster
                    return
                results[i] = _ask(worker, results[i], self.timeout)

        if queue:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                try:
                    for done in [pool.submit(drain, w) for w in self.workers]:
                        done.result()
                finally:
                    queue.clear()    # on Ctrl-C the threads finish the item they are at, not the batch
        return results

    def close(self):
        for w in self.workers:
            w.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# ---------------------------------------------------------------- the two functions to call
TASKS = {"chainsum": chainsum, "add": add, "countdown": countdown, "math": math, "tableqa": tableqa, "kk": kk, "qa": qa}
SINGLE, SINGLE_LOCK = Worker(), threading.Lock()


def judge(task, response, problem):
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; did you mean {' or '.join(difflib.get_close_matches(task, TASKS, 3, 0) or TASKS)}?")
    if not isinstance(response, str):
        return 0.0, "unparsable"
    return TASKS[task](response, **problem)


def _ask(worker, pairs, seconds):
    if worker is not SINGLE:
        return worker.ask(pairs, seconds)
    with SINGLE_LOCK:
        return worker.ask(pairs, seconds)


def grade(task, response, **problem):
    """(score in [0, 1], status) of one response; works in any thread."""
    result = judge(task, response, problem)
    return _ask(SINGLE, result, 5) if isinstance(result, list) else result


def score(task, response, **problem):
    """Score in [0, 1] of one response: never raises on any response, and returns within 8 s."""
    return grade(task, response, **problem)[0]


if __name__ == "__main__" and "--worker" in sys.argv:
    worker()
