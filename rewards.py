"""A response in, a score in [0, 1] out: verifiable rewards that a policy cannot cheat, hang or break.

    score("math", r"... so \boxed{\frac12}", answer="0.5")                                     -> 1.0
    grade("countdown", "<answer>(1+2)*8</answer>", numbers=[1, 2, 8], target=24)                -> (1.0, "ok")
    with Scorer(workers=2) as scorer: scorer([("math", response, {"answer": "7"}), ...])        -> [(1.0, "ok"), ...]

Tasks and their problem fields:
    chainsum   answer="7"                     the default task: `...#7$`, with $ the end-of-sequence character
    add        answer="123"                   last \boxed{}, exact integer
    countdown  numbers=[..], target=24        last <answer> (format="boxed": last box), every number exactly once
    tableqa    answer=[..]                    last <answer>, all values in this order
    kk         answer={"Ann": "knight", ..}   last <answer>, every person exactly once
    qa         answer=[any, of]               last <answer>, metric="em" or "f1" (SQuAD, HotpotQA)
    math       answer="1/2" or [any, of]      last \boxed{} or \fbox{} anywhere in the response

Status: "ok" an answer was found and compared (right or wrong), "no_answer", "unparsable", "timeout", "error". Count
them: a grader that fails silently looks just like a policy that never learns.

Only math may need computer algebra (math-verify). That runs in a child process that can be killed, since math-verify's
alarm works in a main thread only and some answers (2^{2^{50}}) never come back. No model output is evaluated as Python.
"""
import ast
import difflib
import faulthandler
import itertools
import json
import os
import re
import select
import signal
import string
import subprocess
import sys
import threading
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

MAX_CHARS, MAX_DEPTH = 1000, 40    # longer or deeper math answers are right only if identical: parsing stays fast


# ---------------------------------------------------------------- where the answer is
def last_boxed(text):
    """Content of the last \\boxed{...} or \\fbox{...}; None if there is none or its brace never closes (truncated)."""
    return find_box(text, len(text))[2]


def find_box(text, end):
    """(start, stop, content) of the last box that begins before `end`; content None as in last_boxed."""
    heads, depth = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text[:end])), 0
    tokens = re.compile(r"\\.|[{}]", re.S)    # \{ is no brace in TeX
    for token in tokens.finditer(text, heads[-1].end()) if heads else ():
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return heads[-1].start(), token.end(), text[heads[-1].end():token.start()]
    return -1, -1, None


def box_chain(text):
    """`\\boxed{1} and \\boxed{2}` -> "1,2": the last box and those joined to it by and, or, commas; None if no box."""
    joint = r"(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|and|or){0,40}"
    contents, end = [], len(text)
    while len(contents) < 10:
        start, stop, content = find_box(text, end)
        if content is None or contents and not re.fullmatch(joint, text[stop:min(end, stop + 200)]):
            break
        contents.insert(0, content)
        end = start
    return ",".join(contents) if contents else None


def last_answer(text):
    """Content of the last <answer>...</answer>, without a \\boxed around it; None if there is none."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    inner = text[start + len("<answer>"):text.index("</answer>", start)]
    box = last_boxed(inner)
    return (inner if box is None else re.sub(TEXT, r"\1", box)).strip()


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
    """1 iff the expression uses every number exactly once and equals the target exactly. Only + - * / ( ) and integers
    get through: `9**9**9` (would hang eval), `//`, `3.5` (would pass for 3 and 5), `1+2=3` are unparsable."""
    text = last_boxed(response) if format == "boxed" else last_answer(response)
    if text is None:
        return 0.0, "no_answer"
    text = text.strip()
    if len(text) > 300 or not re.fullmatch(r"[0-9+\-*/() \t\r\n]+", text) or re.search(r"\b0[0-9]|//|\*\*", text):
        return 0.0, "unparsable"
    used = []
    try:
        value = exact_value(ast.parse(" ".join(text.split()), mode="eval").body, used)
    except ZeroDivisionError:
        return 0.0, "ok"
    except (SyntaxError, ValueError, RecursionError, MemoryError):    # what ast.parse raises on malformed or deep text
        return 0.0, "unparsable"
    return float(value == target and Counter(used) == Counter(numbers)), "ok"


def exact_value(node, used, depth=0):
    """Value of an arithmetic syntax tree as a Fraction; its literals are appended to `used`."""
    if depth > 32:
        raise ValueError("nested deeper than 32")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = exact_value(node.operand, used, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        a, b = exact_value(node.left, used, depth + 1), exact_value(node.right, used, depth + 1)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(node.op)](b)
    raise ValueError(f"{type(node).__name__} is not allowed")


# ---------------------------------------------------------------- tables, puzzles, questions
def tableqa(response, answer):
    """HiTab: numbers within 1e-5 (percent signs are ignored: 13.3% is 13.3), text equal up to case; all, in order."""
    text, golds = last_answer(response), answer if isinstance(answer, (list, tuple)) else [answer]
    if not text:
        return 0.0, "no_answer"
    text = text.strip(" ,;\n")
    if len(text) > 2000:
        return 0.0, "unparsable"
    cuts = [m.span() for m in re.finditer(r"[,;\n]\s*and\b|[,;\n]|\band\b", text)]
    starts, stops = [0] + [b for _, b in cuts], [a for a, _ in cuts] + [len(text)]
    ends = {0}    # pieces used up so far; one value may span several: "1,234", "scientific, and technical services"
    for gold in golds:
        ends = {j + 1 for i in ends for j in range(i, min(len(stops), i + 20))
                if same_cell(text[starts[i]:stops[j]], str(gold))}
    return float(len(stops) in ends), "ok"


def same_cell(text, gold):
    text, gold = (re.sub(r"\s+", " ", s.lower()).strip(" .'\"`[]{}") for s in (text, gold))
    a, b = (number(re.sub(r"[()$%\\]|percent", "", s).strip()) for s in (text, gold))
    near = None not in (a, b) and (a == b or small(a, b) and abs(Fraction(a) - Fraction(b)) < 1e-5)
    return text == gold or near


def kk(response, answer):
    """`Ann is a knight, Bob: knave` in any order; each person exactly once, nobody else, no contradiction."""
    text = last_answer(response)
    if not text:
        return 0.0, "no_answer"
    gold = sorted((name.casefold(), role.casefold()) for name, role in answer.items())
    names = "|".join(re.escape(name) for name, _ in reversed(gold))
    claim = rf"(?<!\w)({names})[\s\"'*]*(?:\bis\b|:|=|->)?[\s\"'*]*(?:an?\s|the\s)?\s*(knight|knave)(?!\w)"
    claims, rest = re.findall(claim, text[:2000].casefold()), re.sub(claim, " ", text[:2000].casefold())
    others = set(re.findall(r"[^\W\d_]+", rest)) - {"and", "so", "thus", "hence", "therefore"}
    if not claims or others or len(text) > 2000:    # other words may be `not`, `or`, or about somebody else
        return 0.0, "unparsable"
    return float(sorted(claims) == gold), "ok"


def qa(response, answer, metric="em"):
    """Exact match or token F1 after SQuAD normalisation, best over golds; yes/no get no partial credit (HotpotQA)."""
    if metric not in ("em", "f1"):
        raise ValueError(f"unknown metric {metric!r}; choose em or f1")
    pred = squad_normal((last_answer(response) or "")[:10000])
    golds = [squad_normal(str(g)) for g in ([answer] if isinstance(answer, str) else answer)]
    if not pred:    # "the" normalises to nothing, and nothing must not equal nothing
        return 0.0, "no_answer"
    if metric == "em":
        return float(pred in golds), "ok"
    return max((token_f1(pred, g) for g in golds), default=0.0), "ok"


def squad_normal(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(pred, gold):
    if pred != gold and {"yes", "no", "noanswer"} & {pred, gold}:
        return 0.0
    a, b = pred.split(), gold.split()
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


# ---------------------------------------------------------------- math: text, then exact numbers, then computer algebra
def math(response, answer, acpo_compat=False):
    """(score, status), or the pairs [(gold, pred), ...] for computer algebra to decide: one equal pair is enough.

    acpo_compat: the ACPO paper's rule (arXiv 2606.22570), for comparison: with no box the whole response is the answer,
    and one of more than 30 characters is right only if identical. So bare text scores, and long right answers do not.
    """
    golds = [str(g) for g in (answer if isinstance(answer, (list, tuple)) else [answer])]
    pred, chain = last_boxed(response), None
    if acpo_compat:
        pred = response if pred is None else pred
        if len(pred) > 30:
            return float(pred in golds), "ok"
    if pred is None or not pred.strip():
        return 0.0, "no_answer"
    if len(pred) > MAX_CHARS or max(depths(pred)) > MAX_DEPTH:
        return float(pred.strip() in [g.strip() for g in golds]), "unparsable"
    if re.search(r"/\s*\{?0(?![.0-9])|frac\{[^{}]*\}\{0\}", pred):    # 1/0 does not even equal 1/0
        return 0.0, "unparsable"
    pairs = []
    for gold in golds:
        gold = box_chain(gold) or gold
        if not acpo_compat and re.search(r",|;|\band\b|\bor\b", gold):    # several values may stand in several boxes
            chain = chain or box_chain(response)
        for candidate in {pred, chain[-MAX_CHARS:]} if chain else [pred]:
            verdict = compare(gold, candidate)
            if verdict is True:
                return 1.0, "ok"
            pairs += verdict or []
    return pairs or (0.0, "ok")


SYMBOLS = {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
           "°": r"^\circ ", "²": "^2", "³": "^3", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
           "∩": r"\cap ", "∈": r"\in ", "½": r"\frac{1}{2}", "€": "", "£": "", "¥": "", "，": ",", "（": "(", "）": ")"}
COMMANDS = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "lg": r"\log_{10}",
            "varnothing": r"\emptyset"}
FUNCTIONS = set("arcsin arccos arctan sinh cosh tanh sqrt frac".split())    # words of four letters that are not prose
SHORT_UNITS = set("mm cm dm m km in ft yd mi mg g kg lb lbs oz ml l s sec secs min mins h hr hrs am pm a.m p.m mph kph "
                  "km/h m/s hz pa ev rad deg".split())
UNIT = r"[a-zA-Z][a-zA-Z.\s/]*(?:\^\s*\{?-?[0-9]\}?)?"
UNITS = re.compile(r"(?:(?<=[0-9})\]])|(?<=\\pi))\s*\\text\{\s*(%s)\}(?:\^\s*\{?-?[0-9]\}?)?$|"
                   r"(?<=[0-9})\]])(?:\s+|(?=[a-z]{2}))(%s)$" % (UNIT, UNIT))
TEXT = (r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|emph|boldsymbol|bm)"
        r"\s*\{([^{}]*)\}")
STYLE = (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|underline|tiny|small|large|Large|"
         r"bf|rm|it|limits|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z])|\\!|\\(?=\$)|\$|\\[()\[\]]")
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\\pi|[0-9a-zA-Z])", r"\\frac{\1}"),    # \frac12, \frac\pi6
    (r"(\\frac\{[^{}]*\})\s*(\\pi|[0-9a-zA-Z])", r"\1{\2}"),
    (r"(?<![0-9.])([0-9]{1,3})((?:(?:\\[,;: !]|~|\{,\}|,\s?\\!|\s)\s*[0-9]{3})+)(?![0-9/])",    # 1\,000 1{,}000 1 000
     lambda m: m[1] + re.sub(r"[^0-9]", "", m[2])),
    (STYLE, ""),
    (r"\\begin\{([bB]|small)matrix\}(.*)\\end\{\1matrix\}|"    # brackets are all alike
     r"[\[(]?\s*\\begin\{(?:array|matrix)\}(?:\{[^{}]*\})?(.*)\\end\{(?:array|matrix)\}\s*[\])]?",
     lambda m: r"\begin{pmatrix}%s\end{pmatrix}" % (m[2] or m[3])),
    (r"\{?([^{}\\]+)\\choose([^{}\\]+)\}?", r"\\binom{\1}{\2}"),
    (TEXT, lambda m: r"\text{%s}" % m[1] if re.search("[a-zA-Z]", m[1]) and len(m[1].strip()) > 1 else m[1]),
    (r"\\(lbrace|rbrace|langle|rangle|lg|varnothing)(?![a-zA-Z])", lambda m: COMMANDS[m[1]]),
    (r"\*\*", "^"),
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b)(?:\s*[CF](?=\W*$))?", r"^\\circ "),
    (r"([0-9]*)\.([0-9]*)\\overline\{([0-9]{1,20})\}", lambda m: repeating(m[1], m[2], m[3])),
    (r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"(\1+\\frac{\2}{\3})"),    # 1 1/2
    (r"(?:,\s*)?\\text\{,?\s*(?:and|or)\s*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
    (r"(?<!\\)\\(?:[,;: ]|q?quad\b)|~|\s+", " "),
    (r"\\text\{\s*(?:percent|percentage|pct)\s*\}|\b(?:percent|percentage|pct)\b|(?<!\\)%", r"\\%"),
]]


def clean(text):
    """LaTeX answer -> (canonical text, unit): no styling, dollars, unit, final full stop; \\text{} only around words.
    After the lists of Hendrycks' strip_string and Math-Verify's normalisation."""
    text = "".join(SYMBOLS.get(c, c) for c in text.strip())
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".,;:\\ ")
    while len(text) > 2 and text[0] == "{" and enclosed(text):
        text = text[1:-1].strip()
    unit = UNITS.search(text)
    if not unit:
        return text, ""
    rest, word = text[:unit.start()].strip(), re.sub(r"\^.*", "", unit[1] or unit[2]).strip().rstrip(".").lower()
    short = word in SHORT_UNITS and (len(word) > 1 or number(rest) is not None)    # 5 m, but not x^2 m
    return (rest, word) if unit[1] or short or len(word) > 3 and " " in unit[0] else (text, "")


def repeating(whole, head, tail):
    """0.1\\overline{6} -> \\frac{15}{90}"""
    whole = whole or "0"
    above, below = int(whole + head + tail) - int(whole + head), (10 ** len(tail) - 1) * 10 ** len(head)
    return r"\frac{%d}{%d}" % (above, below)


def depths(text):
    """Bracket depth after each character."""
    return list(itertools.accumulate((c in "{([") - (c in "})]") for c in text))


def enclosed(text):
    """One pair of brackets holds the whole text: (1,2), not (1,2),(3,4)."""
    return 0 in depths(text) and depths(text).index(0) == len(text) - 1


def number(text):
    """Plain number -> exact Decimal or Fraction, else None. 1e400 is never expanded to its digits."""
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
        return Fraction(int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5])) * (-1 if ratio[1] == "-" else 1)


def small(*numbers):
    """None of them is so large or so tiny that its Fraction would have hundreds of digits."""
    return all(isinstance(v, Fraction) or abs(v.adjusted()) < 300 for v in numbers)


def close(a, b):
    """Equal to 6 decimals, like 1/3 and 0.333333; below 1e-3 to a relative 1e-6 (Math-Verify: 5e-7 is 0)."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= (5e-7 if size >= 1e-3 else 1e-6 * size))


def same_number(a, b):
    """Exact, unless one of them is written with decimals."""
    decimals = any(isinstance(v, Decimal) and v != v.to_integral_value() for v in (a, b))
    return a == b or decimals and small(a, b) and close(Fraction(a), Fraction(b))


def choice(text):
    """`\\text{(A)} 5`, `(A) 5`, `A. 5` or `A` -> (letter, rest)."""
    found = re.fullmatch(r"\\text\{\s*\(?([A-Z])\)?[.:]?\s*\}[.:]?\s*(.*)|\(([A-Z])\)\s*(.*)|"
                         r"([A-Z])\)?(?:[.):]\s+(.*))?", text)
    return (found[1] or found[3] or found[5], found[2] or found[4] or found[6] or "") if found else ("", "")


def compact(text):
    """Without spaces and \\text{}; but 1 8 stays two numbers, and so does 32, 349."""
    return re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip())


def bracket(text):
    """( [ or { (for \\{) if the text is one tuple, interval or set."""
    text = text.lstrip("\\")
    return text[0] if text[0] in "{([" and "," in text and enclosed(text) else ""


def compare(gold, pred):
    """True, False, or the pairs [(gold, pred), ...] that computer algebra has to decide; one equal pair is enough."""
    if gold.strip() == pred.strip():
        return True
    (gold, gold_unit), (pred, pred_unit) = clean(gold), clean(pred)
    known = {gold_unit, pred_unit} <= SHORT_UNITS or number(pred) is None
    if gold_unit and pred_unit and gold_unit != pred_unit and known:    # 5 km is not 5 cm, 12:30 am is not pm
        return False
    (gold_letter, gold_rest), (pred_letter, pred_rest) = choice(gold), choice(pred)
    if gold_letter and pred_letter:
        return gold_letter == pred_letter
    gold, pred = gold_rest or gold, pred_rest or pred
    if re.search(r"\\[pb]mod", gold + pred):    # 7 \pmod{12} is 7, but not 7 \pmod{5}
        (gold, *gold_mod), (pred, *pred_mod) = (re.split(r"\s*\(?\\[pb]mod\b\s*", s) for s in (gold, pred))
        if gold_mod and pred_mod and gold_mod[0].strip("{} )") != pred_mod[0].strip("{} )"):
            return False
    percents = gold.endswith(r"\%") - pred.endswith(r"\%")    # 50\% is 50 and 0.5, but 50 is not 0.5
    gold, pred = (re.sub(r"\s*\\%$", "", s) for s in (gold, pred))
    heads = [re.match(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*(?:=|\\in(?![a-z])|\\equiv)\s*", s) for s in (gold, pred)]
    plain = [not re.search(r"=|\\in(?![a-z])", s) for s in (gold, pred)]
    same_head = all(heads) and heads[0][1] == heads[1][1]    # x = 5 is 5, but x = 5 is not y = 5
    gold, pred = (s[h.end():] if h and (p or same_head) else s for s, h, p in zip((gold, pred), heads, reversed(plain)))
    a, b = compact(gold), compact(pred)
    if not a or not b or a == b:
        return bool(a) and a == b
    x, y = number(a), number(b)
    if x is not None and y is None:
        y = number(re.sub(r"(?<=[0-9])[msghl]$", "", b))    # 5m is 5; but 2c is not 2
    if x is not None and y is not None:
        scale = Fraction(100) ** percents
        return same_number(x, y) or scale != 1 and small(x, y) and close(Fraction(x), Fraction(y) * scale)
    bases = [re.fullmatch(r"\(?0*([0-9A-F]+)\)?_\{?([0-9]{1,2})\}?", s) for s in (a, b)]
    if any(bases):    # 10110_2 is not 10110
        return all(bases) and bases[0].groups() == bases[1].groups()
    ratios = [re.sub(r"^.*=", "", s).split(":") for s in (a, b)]
    if min(map(len, ratios)) > 1:    # part by part: the time 12:30 is neither 10:25 nor 6:15
        return len(ratios[0]) == len(ratios[1]) and all(
            p == q or number(p) is not None and number(p) == number(q) for p, q in zip(*ratios))
    if {bracket(a), bracket(b)} in ({"{", "("}, {"{", "["}):    # a set is neither a tuple nor an interval
        return False
    if all(re.fullmatch(r"[a-zA-Z]|[A-Z]{2,}", s) for s in (a, b)):    # a is not A; ABC is an order, not a product
        return False
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", re.sub(r"\\(?:begin|end)\{[a-z]*\}", "", gold + " " + pred))
    if r"\text" in gold + pred or not FUNCTIONS.issuperset(words):    # prose: "5 apples and 3 oranges" is not 5
        return a.casefold() == b.casefold()
    pairs = [(gold, pred)] if len(gold) <= MAX_CHARS else []
    if percents:
        pairs.append((gold, r"\frac{%s}{100}" % pred) if percents < 0 else (r"\frac{%s}{100}" % gold, pred))
    if r"^\circ" in gold + pred:    # 30^\circ is 30 and \pi/6, but inside \sin only \pi/6
        units = [r"\cdot\frac{\pi}{180}"] + [""] * (not re.search(r"\\(sin|cos|tan|cot|sec|csc)", gold + pred))
        pairs = [(gold.replace(r"^\circ", unit), pred.replace(r"^\circ", unit)) for unit in units]
    return pairs


# ---------------------------------------------------------------- computer algebra, in the worker process only
def algebra_equal(gold, pred):
    """Math-Verify's parser and comparison, but with the case of letters kept, and numbers compared by number_equal."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import get_last_eq
    # units off: its list strips the letters c, d, h, o, t from the end, so that 2c would equal 2
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    options = dict(is_real=not (should_treat_as_complex(gold) or should_treat_as_complex(pred)),
                   normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))

    def parse(text):
        text = normalize_latex(text, normal)
        try:
            return latex2sympy(text, **options)
        except Exception:    # ANTLR raises bare Exception; of a chain a = b = c that does not parse, the last link may
            if get_last_eq(text) == text:
                raise
            return latex2sympy(get_last_eq(text), **options)

    a, b = parse(gold), parse(pred)
    verdict = number_equal(a, b)
    return bool(verify(a, b, timeout_seconds=None, allow_set_relation_comp=True) if verdict is None else verdict)


def number_equal(a, b):
    """True or False if both SymPy objects are numbers, else None."""
    from sympy import Expr, Float, I
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or a.is_Matrix or b.is_Matrix:
        return None
    a, b = (v.subs({s: I for s in v.free_symbols if s.name == "i"}).doit() for v in (a, b))
    if not (a.is_number and b.is_number):
        return None
    if a.is_finite is False or b.is_finite is False:
        return a == b and a.is_extended_real is True    # infinity is an answer; 1/0 and nan are not
    if a.is_Rational and b.is_Rational:
        return a == b
    if a.has(Float) or b.has(Float):
        return close(a.evalf(40), b.evalf(40))
    return bool(abs((a - b).evalf(40)) <= 1e-25 * max(abs(a.evalf(40)), abs(b.evalf(40))))


class OutOfTime(BaseException):
    """A BaseException, so that no `except Exception` inside a parser can swallow it."""


def worker():
    """Answers JSON lines [seconds, [[gold, pred], ...]] on standard input with JSON lines [score, status]."""
    import logging
    import resource
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)    # whatever a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))    # bytes; (10^9)! is to fail, not to fill memory

    def alarm(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, alarm)
    algebra_equal(r"\frac{1}{2}+x", r"x+\frac{1}{2}")    # imports everything before the clock starts
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seconds, pairs = json.loads(line)
        result = [0.0, "unparsable"]
        faulthandler.dump_traceback_later(seconds + 5, exit=True)    # in case the parent is no longer there to kill it
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for gold, pred in pairs:
                try:
                    result = [float(algebra_equal(gold, pred)), "ok"]
                except Exception:    # on odd input the parser and SymPy raise nearly every type: unparsable
                    continue
                if result[0]:
                    break
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            result = [0.0, "timeout"]
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=out, flush=True)


class Worker:
    """A child process `python rewards.py --worker`, started on first use; no torch in it, may be killed any time."""

    def __init__(self):
        self.process = self.owner = None
        self.lock = threading.Lock()

    def ask(self, pairs, seconds):
        """(score, status) of [(gold, pred), ...] within `seconds`; one that hangs or dies is killed and replaced."""
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([seconds - 1, pairs]).encode() + b"\n")
                self.process.stdin.flush()
                line = self.read(seconds)
            except BrokenPipeError:
                line = ""
            if line:
                return tuple(json.loads(line))
            self.stop()
            return 0.0, "error" if line == "" else "timeout"

    def start(self):
        self.stop()
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)    # Ctrl-C is for the parent alone
        self.owner = os.getpid()
        self.finalizer = weakref.finalize(self, end_process, self.process, self.owner)
        if self.read(60) != "ready":
            self.stop()
            raise RuntimeError("the math-verify worker did not start, see above (pip install 'math-verify>=0.9')")

    def stop(self):
        if self.process:
            self.finalizer()
        self.process = None

    def read(self, seconds):
        """One line, None on silence, "" if the process died. Lines are short and so arrive in one piece."""
        poll = select.poll()    # select.select cannot watch descriptors above 1023
        poll.register(self.process.stdout, select.POLLIN)
        return os.read(self.process.stdout.fileno(), 4096).decode().strip() if poll.poll(seconds * 1000) else None


def end_process(process, owner):
    if owner == os.getpid():    # a forked child must not kill its parent's worker
        process.kill()
        process.wait()
    process.stdin.close()
    process.stdout.close()


class Scorer:
    """scorer([(task, response, problem), ...]) -> [(score, status), ...] in the same order. Computer algebra is spread
    over `workers` processes (0: the one that `score` uses), with `timeout` seconds for each response."""

    def __init__(self, workers=2, timeout=6):
        assert workers >= 0 and timeout >= 2, f"need workers >= 0 and timeout >= 2 s, got {workers} and {timeout}"
        self.workers, self.timeout = [Worker() for _ in range(workers)] or [SINGLE], timeout

    def __call__(self, items):
        results = [judge(task, response, problem) for task, response, problem in items]
        queue = deque(i for i, r in enumerate(results) if isinstance(r, list))

        def drain(worker):
            while True:
                try:
                    i = queue.popleft()
                except IndexError:
                    return
                results[i] = worker.ask(results[i], self.timeout)

        if queue:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                try:
                    for done in [pool.submit(drain, w) for w in self.workers]:
                        done.result()
                finally:
                    queue.clear()    # on Ctrl-C the threads finish the response they are at, not the batch
        return results

    def close(self):
        for w in self.workers:
            w.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# ---------------------------------------------------------------- the functions to call
TASKS = {"chainsum": chainsum, "add": add, "countdown": countdown, "tableqa": tableqa, "kk": kk, "qa": qa, "math": math}
SINGLE = Worker()


def judge(task, response, problem):
    """(score, status), or what `math` leaves to computer algebra."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, cutoff=0.5) or sorted(TASKS)
        raise ValueError(f"unknown task {task!r}; did you mean {', '.join(near)}?")
    if not isinstance(response, str):
        return 0.0, "unparsable"
    return TASKS[task](response, **problem)


def grade(task, response, **problem):
    """(score in [0, 1], status) of one response; may be called in any thread."""
    result = judge(task, response, problem)
    return SINGLE.ask(result, 5) if isinstance(result, list) else result


def score(task, response, **problem):
    """Score in [0, 1] of one response; never raises on any response, and returns within 8 s."""
    return grade(task, response, **problem)[0]


if __name__ == "__main__" and "--worker" in sys.argv:
    worker()
