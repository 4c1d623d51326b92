r"""A response in, a score in [0, 1] out: verifiable rewards that a policy cannot cheat, hang or break.

    score("math", r"... so \boxed{\frac12}", answer="0.5")                          -> 1.0
    grade("countdown", "<answer>(1+2)*8</answer>", numbers=[1, 2, 8], target=24)     -> (1.0, "ok")

Tasks and their problem fields:
    chainsum   answer="7"                     the default task: `...#7$`, $ being the end of sequence
    countdown  numbers=[..], target=24        last <answer> (format="boxed": last box), every number
                                              exactly once
    tableqa    answer=[..]                    last <answer>, all values in this order
    kk         answer={"Ann": "knight", ..}   last <answer>, every person exactly once
    qa         answer=[any, of]               last <answer>, metric="em" or "f1" (SQuAD, HotpotQA)
    math       answer="1/2" or [any, of]      last \boxed{} or \fbox{} anywhere in the response

Status: "ok" an answer was found and compared (right or wrong), "no_answer", "unparsable",
"timeout", "error". Count them: a grader that fails silently looks just like a policy that never
learns. Each grader below returns the score, or the status that explains the 0. In doubt the score
is 0: a wrong answer that is paid for will be learned. No model output is evaluated as Python.
"""
import ast
import json
import logging
import operator
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from queue import SimpleQueue

MAX_CHARS, MAX_DEPTH = 1000, 14  # longer or deeper math is unparsable, so that parsing stays fast


# ---- Where the answer is -------------------------------------------------------------------------

BOX = r"\\(?:boxed|fbox)\s*(?:\{|(?=[+-]?[0-9]))"  # \boxed 7 is 7
BETWEEN = (r"\}(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|and|or){0,40}"
           r"\\(?:boxed|fbox)\s*\{")

def last_boxed(text, join=False):
    """Content of the last \\boxed{...} or \\fbox{...}; None if there is none or its brace never
    closes (truncated). With `join`, of several that stand together: \\boxed{1}, \\boxed{2} is 1,2."""
    if join:
        text = re.sub(BETWEEN, ",", text)
    last = None
    for last in re.finditer(BOX, text):
        pass
    if last is None:
        return None
    tail = text[last.end():]
    if not last[0].endswith("{"):
        return re.match("[+-]?[0-9][0-9.,/]*", tail)[0]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", tail, re.S):  # \{ is no brace in TeX
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return tail[:token.start()]
    return None

def last_answer(text):
    """Content of the last <answer>...</answer>, without a \\boxed around it, at most 2000
    characters; "" if there is none."""
    inner = text.rpartition("</answer>")[0].rpartition("<answer>")
    inner = inner[2].partition("</answer>")[0] if inner[1] else ""
    box = last_boxed(inner)
    return (inner if box is None else re.sub(r"\\text\w*\s*\{([^{}]*)\}", r"\1", box)).strip()[:2000]


# ---- Procedural tasks ----------------------------------------------------------------------------

def chainsum(response, answer):
    found = re.fullmatch(r"[^#]*#([^$]*)\$", response)
    return found[1] == str(answer) if found else "no_answer"

def add(response, answer):
    box = last_boxed(response)
    if box is None:
        return "no_answer"
    return int(box) == int(answer) if re.fullmatch(r"\s*[+-]?[0-9]{1,100}\s*", box) else "unparsable"

def countdown(response, numbers, target, format="answer"):
    """1 iff the expression uses every number exactly once and equals the target exactly. Only
    + - * / ( ) and integers get through: `9**9**9` (would hang eval), `//`, `3.5` (would pass for
    3 and 5) are unparsable. A box may hold LaTeX, and end in `= target`."""
    text = last_answer(response)
    if format == "boxed":
        text = arithmetic(last_boxed(response) or "", target)
    if not text:
        return "no_answer"
    odd = re.search(r"[^0-9+\-*/() \t\r\n]|\b0[0-9]|//|\*\*", text)
    if odd or len(text) > 300:
        return "unparsable"
    try:
        value = exact_value(ast.parse(" ".join(text.split()), mode="eval").body)
    except ZeroDivisionError:
        return False
    except (SyntaxError, KeyError, RecursionError, MemoryError):  # no arithmetic, or too deep
        return "unparsable"
    used = Counter(int(n) for n in re.findall("[0-9]+", text))
    return value == target and used == Counter(numbers)

ARITHMETIC = [(r"\\times|\\cdot|[×·⋅]", "*"), (r"\\div|÷", "/"), ("[−–]", "-"),
              (r"\\(?:left|right)|\\[,;: ]|\$|\\[()]", " "), (r"\\[dt]frac", r"\\frac")]

def arithmetic(text, target):
    """LaTeX in a box as the plain expression that it shows."""
    for old, new in ARITHMETIC:
        text = re.sub(old, new, text)
    fractions = 1
    while fractions:  # from the inside out
        text, fractions = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    return re.sub(rf"=\s*{re.escape(str(target))}\s*$", "", text).strip()

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg}

def exact_value(node):
    """Value of an arithmetic syntax tree as a Fraction; KeyError if there is more in it than
    integers and + - * /."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    children = ast.iter_child_nodes(node)
    operands = [exact_value(child) for child in children if isinstance(child, ast.expr)]
    return OPERATORS[type(getattr(node, "op", None))](*operands)


# ---- Tables, puzzles, questions ------------------------------------------------------------------

DASHES = str.maketrans("−–—‐‑", "-----")

def tableqa(response, answer):
    """HiTab: numbers within 1e-5 (percent signs are ignored: 13.3% is 13.3), text equal up to case;
    all values, in order."""
    text = last_answer(response).strip(" ,;\n")
    golds = answer if isinstance(answer, (list, tuple)) else [answer]
    if not text:
        return "no_answer"
    if text[0] + text[-1] in ("[]", "{}"):
        text = text[1:-1]
    # value, separator, value, ...
    parts = re.split(r"([,;\n]\s*and\b|[,;\n]|\band\b)", text)
    ends = {0}  # where the golds so far may end: one may span several parts, "1,234" or "a, b and c"
    for gold in golds:
        reached = set()
        for start in ends:
            for end in range(start + 1, min(len(parts), start + 40) + 1, 2):
                if same_cell("".join(parts[start:end]), str(gold)):
                    reached.add(end + 1)
        ends = reached
    return len(parts) + 1 in ends

def same_cell(text, gold):
    text, gold = cell(text), cell(gold)
    a, b = (number(re.sub(r"^([+-]?)\\?\$|\s*(\\?%|percent)$", r"\1", s)) for s in (text, gold))
    return text == gold or None not in (a, b) and same_number(a, b, 1e-5)

def cell(text):
    text = re.sub(r"\s+", " ", text.lower().translate(DASHES)).strip(" '\"`").rstrip(". ")
    inner = re.fullmatch(r"\(([^()]*)\)", text)
    return inner[1] if inner else text

def kk(response, answer):
    """`Ann is a knight, Bob: knave` or `Knights: Ann` in any order; each person exactly once, nobody
    else, no contradiction."""
    text = re.sub(r"[*_|\"'`#{}]", " ", last_answer(response).casefold().translate(DASHES))
    if not text.strip():
        return "no_answer"
    gold = sorted((name.casefold(), role.casefold()) for name, role in answer.items())
    names = "|".join(re.escape(name) for name, _ in reversed(gold))  # Jackson before Jack
    claims = []
    groups = rf"\b(knight|knave)s?\s*(?::|=|\bare\b)((?:[\s,;&]|\band\b|(?<!\w)(?:{names})(?!\w))*)"
    for role, people in re.findall(groups, text):
        claims += [(name, role) for name in re.findall(rf"(?<!\w)(?:{names})(?!\w)", people)]
    text = re.sub(groups, " ", text)
    claim = rf"(?<!\w)({names})\s*(?:\bis\b|:|=|-+>?|→|⇒)?\s*(?:an?\s|the\s)?\s*(knight|knave)(?!\w)"
    claims += re.findall(claim, text)
    rest = set(re.findall(r"[^\W\d_]+", re.sub(claim, " ", text)))
    if not claims or rest - set("and so thus hence therefore name person role type".split()):
        return "unparsable"  # `not`, `or`, or about somebody else
    return sorted(claims) == gold

def qa(response, answer, metric="em"):
    """Exact match or token F1 after SQuAD normalisation, best over golds; yes and no get no partial
    credit (HotpotQA)."""
    if metric not in ("em", "f1"):
        raise ValueError(f"unknown metric {metric!r}; choose em or f1")
    pred = squad_normal(last_answer(response))
    golds = [squad_normal(str(g)) for g in ([answer] if isinstance(answer, str) else answer)]
    if not pred:
        return "no_answer"
    if metric == "em":
        return pred in golds
    return max((token_f1(pred, gold) for gold in golds), default=0)

def squad_normal(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", text).split() or text.split()  # an answer may be `A`
    return " ".join(words)

def token_f1(pred, gold):
    if pred != gold and {"yes", "no", "noanswer"} & {pred, gold}:
        return 0.0
    a, b = pred.split(), gold.split()
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


# ---- Math: the structure of the answer first, then text, exact numbers, computer algebra ---------

class Undecided(Exception):
    """Only computer algebra can tell: it runs in a child process."""

def math(response, answer, acpo_compat=False):
    """The score or status, or the pairs [(gold, pred), ...] of which computer algebra has to find
    one equal. acpo_compat: the ACPO paper's rule (arXiv 2606.22570), for comparison: with no box the
    whole response is the answer, and one of more than 30 characters is right only if identical."""
    golds = [gold for text in as_list(answer) for gold in as_list(reduce_gold(str(text)))]
    pred = last_boxed(response)
    if acpo_compat:
        pred = response if pred is None else pred
        if len(pred) > 30:
            return pred in golds
    if not pred or not pred.strip():
        return "no_answer"
    if refused(pred):
        return "unparsable"
    chain = last_boxed(response, join=True) or ""  # values may stand in several boxes
    if acpo_compat or len(chain) > MAX_CHARS or not chain.endswith(pred):
        chain = pred
    hard = []
    for gold in golds:
        several = re.search(r"[,;]|\b(and|or)\b|\\(pm|cup)\b", gold)
        for candidate in {pred, chain} if several else {pred}:
            try:
                if compare(gold, candidate):
                    return True
            except Undecided:
                hard.append((gold, candidate))
    return hard or False

def as_list(value):
    return value if isinstance(value, (list, tuple)) else [value]

def reduce_gold(text):
    """The answer in a reference: behind GSM8K's `####`, in its box, without `The answer is`; a list
    if it is a list stored as text, of which any may be given."""
    text = re.sub(r"<<[^<>]*>>", "", text).rpartition("####")[2].strip()
    text = last_boxed(text, join=True) or text
    text = re.sub(r"(?is)^.{0,200}\banswer(?: is|:)\s*:?\s*(?=\S)", "", text)
    if re.fullmatch(r"""(?s)\[\s*(['"]).*\1\s*\]""", text):
        found = re.findall(r"""(['"])(.*?)\1\s*(?=[,\]])""", text, re.S)
        return [item.replace("\\\\", "\\") for _, item in found]
    return text

# Power towers, factorials of factorials, long products: the parser or SymPy would never come back.
BOMBS = re.compile(
    r"\^[^)}\]^]*\^[^)}\]^]*\^|![\s)}\]]*!|[0-9]{5}[\s)}\]]*!|\^[^()]*\)\s*!|(\|[^|]*){13}"
    r"|\\binom\s*\{[^{}]*(\^|[0-9]{5})|\^[\s{(]*[0-9]{5}|(_[^}\s]*){4}")
TOWER = re.compile(r"\^[\s{(]*([0-9]+)\s*\^[\s{(]*([0-9]+)")
ZERO = re.compile(r"/\s*\{?0(?![.0-9])|frac\{([^{}]|\{[^{}]*\})*\}\{0\}")  # 1/0 is not even 1/0

def refused(text):
    """Is it too long, too deep or too large to be parsed? Then it is no answer to any problem."""
    if len(text) > MAX_CHARS or max(depths(text), default=0) > MAX_DEPTH or ZERO.search(text):
        return True
    text = re.sub(r"\\left|\\right|\s", "", text)
    if number(text) is not None:  # 1e400 is a plain number
        return False
    towers = [int(base[-9:]) ** min(int(top[-9:]), 99) for base, top in TOWER.findall(text)]
    return bool(BOMBS.search(text)) or max(towers, default=0) > 10 ** 5

def compare(gold, pred, algebra=None):
    """Do two answers say the same? Undecided if that takes `algebra(gold, pred)` and it is None."""
    if gold.strip() == pred.strip():
        return True
    gold, pred = clean(gold), clean(pred)
    a, b = squeeze(unwrap(gold)), squeeze(unwrap(pred))
    if not a or not b or a == b:
        return a == b != ""
    if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", gold):
        pred = re.sub(r"^([+-]?[0-9]+),(?=[0-9]{2,}$)", r"\1.", pred)  # 3,14 where 3.14 is meant
    letters = [re.sub(r"\\text|[\s,{}]", "", s) for s in (gold, pred)]
    if all(re.fullmatch("[A-J]{2,}", s) for s in letters):  # A, C is AC, but ABC is not CAB
        return "," in gold + pred and set(letters[0]) == set(letters[1])
    return equal(gold, pred, algebra)

# One answer of a list: name = parts between ends. x < 3 has the name x, the ends << and the parts
# -oo and 3, like (-oo, 3); in_range then says that the list -oo, 3 will not do.
Item = namedtuple("Item", "name ends parts in_range unit")

def equal(gold, pred, algebra):
    """Lists in any order, named values by their names, tuples in their order."""
    golds, preds = items(gold), items(pred)
    named = [len({item.name for item in side} - {""}) for side in (golds, preds)]
    ordered = 0 in named and len(golds) in named and len(golds) > 1  # x=1,y=2 for 1,2
    if len(golds) != len(preds):
        ordered = True
        golds, preds = unpack(golds, preds), unpack(preds, golds)
    if len(golds) != len(preds):
        return False
    if ordered:
        return all(same_item(g, p, algebra) for g, p in zip(golds, preds))
    for g in golds:
        found = [p for p in preds if same_item(g, p, algebra)]
        if not found:
            return False
        preds.remove(found[0])
    return True

def unpack(side, other):
    """A tuple as the list of its parts, if the other side is a plain list."""
    one = side[0]
    if len(side) > 1 or one.ends != "<<" or any(item.in_range for item in [one, *other]):
        return side
    return [read_item(part) for part in one.parts]

def items(text):
    found = []
    for part in split(text, r",|;|\\cup(?![a-z])"):
        if not re.search(r"\\[pm][mp](?![a-z])", part):
            found.append(read_item(part))
            continue
        for upper, lower in ("+-", "-+"):
            signed = re.sub(r"\\pm(?![a-z])", upper, part)
            found.append(read_item(re.sub(r"\\mp(?![a-z])", lower, signed)))
    first = found[0]
    if len(found) == 1 and first.ends == "{}":
        inside = items(",".join(first.parts))
        return [i._replace(in_range=True, name=i.name or first.name) for i in inside]
    names = split(first.name[1:-1], ",")
    if len(found) == 1 and len(names) == len(first.parts) > 1:  # (x,y) = (1,2)
        return [read_item(part)._replace(name=n) for n, part in zip(names, first.parts)]
    if not any(item.name for item in found[1:]):  # k = 1, 5, 9
        return [item._replace(name=first.name) for item in found]
    return found

NAME = re.compile(r"\\?[a-zA-Z]+(_\{?\w+\}?)?'*(\([^()]*\))?")

def read_item(text):
    sides = split(text, r"=|\\equiv|\\in(?![a-z])")
    name = squeeze(unwrap(sides[0])) if len(sides) > 1 else ""
    name = re.sub(r"_\{(\w+)\}", r"_\1", name)
    value = sides[-1]
    if re.fullmatch("[a-zA-Z]", value) and not re.search("[a-zA-Z]", name):  # 5 = x
        name, value = (value, sides[0]) if name else ("", value)
    terms = split(value, "[<>≤≥]")
    if len(terms) > 1:
        return inequality(terms, re.findall("[<>≤≥]", value))
    value, unit = split_unit(value)
    value = re.sub(r"\\text\{ *(.) *\}", r"\1", value)  # \\mathrm{e} is a number, no word
    ends, parts = brackets(value)
    return Item(name, ends, parts, r"\in" in text, unit)

def inequality(terms, signs):
    if not {"<", "≤"} & set(signs):  # 3 > x is x < 3
        terms, signs = terms[::-1], ["<≤"[">≥".index(sign)] for sign in signs[::-1]]
    if len(terms) == 2 and NAME.fullmatch(terms[0]):
        terms, signs = [r"-\infty", *terms], ["<", *signs]
    elif len(terms) == 2 and NAME.fullmatch(terms[1]):
        terms, signs = [*terms, r"\infty"], [*signs, "<"]
    name = terms.pop(1) if len(terms) == 3 and NAME.fullmatch(terms[1]) else ""
    return Item(squeeze(name), "".join(signs), terms, True, "")

def brackets(text):
    """`(1,2]` -> ("<≤", ["1", "2"]); no brackets, or only around an expression: ("", [text])."""
    text = text.strip()
    if len(text) < 3 or text[-1] not in ")]}" or 0 in depths(text.lstrip("\\"))[:-1]:
        return "", [text]
    if text[:2] == r"\{":
        return "{}", split(text[2:-2], "[,;]")
    parts = split(text[1:-1], "[,;]")
    if len(parts) == 1:
        return ("", [text]) if text[0] == "[" and parts[0][0] not in "([" else brackets(parts[0])
    return "".join("<≤"[sign in "[]"] for sign in (text[0], text[-1])), parts

def same_item(gold, pred, algebra):
    units = {gold.unit, pred.unit} - {""}
    if len(units) > 1 and units not in ({"°", "celsius^1"}, {"°", "fahrenheit^1"}):
        return False
    if gold.name == f"({pred.parts[0]})" or pred.name == f"({gold.parts[0]})":
        return True  # (C) 12 for C
    if gold.name and pred.name and gold.name != pred.name:
        if gold.ends or pred.ends or all(NAME.fullmatch(item.name) for item in (gold, pred)):
            return False
        return same_reading(*(f"{i.name}={i.parts[0]}" for i in (gold, pred)), algebra)
    outside = re.sub(r"\(.*\)", "", gold.name)
    if gold.name and not pred.name and re.search(r"[a-z].*[-+]|[-+].*[a-z]", outside):
        return False  # 0 is not x+y-1=0
    if gold.ends != pred.ends or len(gold.parts) != len(pred.parts):
        return False
    if not gold.ends:
        return same_value(gold.parts[0], pred.parts[0], algebra)
    return all(equal(g, p, algebra) for g, p in zip(gold.parts, pred.parts))

MARKS = {r"\%": r"\cdot\frac{1}{100}", r"^\circ": r"\cdot\frac{\pi}{180}"}

def same_value(gold, pred, algebra):
    """50\\% is 50 and 0.5, but 50 is not 0.5; 30^\\circ is 30 and \\pi/6, in \\sin only \\pi/6."""
    readings = [(gold, pred)]
    for mark, factor in MARKS.items():
        if mark in gold + pred:
            plain = not re.search(r"\\(sin|cos|tan|cot|sec|csc)", gold + pred)
            readings = [(gold.replace(mark, meaning), pred.replace(mark, meaning))
                        for meaning in ["", factor][not plain:]]
    return any(same_reading(g, p, algebra) for g, p in readings)

def same_reading(gold, pred, algebra):
    a, b = (squeeze(unwrap(s)) for s in (gold, pred))
    if a == b or not a or not b:
        return a == b != ""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return same_number(x, y)
    bases = [re.fullmatch(r"\(?0*([0-9A-F]+)\)?_\{?([0-9]{1,2})\}?", s) for s in (a, b)]
    if any(bases):  # 10110_2 is not 10110
        return all(bases) and bases[0].groups() == bases[1].groups()
    if ":" in a and ":" in b:  # part by part: the time 12:30 is neither 10:25 nor 6:15
        a, b = ([number(part) or part for part in s.split(":")] for s in (a, b))
        return a == b
    if all(re.fullmatch(r"[a-zA-Z]|[A-Z]{2,}", s) for s in (a, b)):  # a is not A; ABC is an order
        return False
    if prose(gold) or prose(pred):  # "5 apples and 3 oranges" is not 5
        return a.casefold() == b.casefold()
    if algebra is None:
        raise Undecided
    return algebra(gold, pred)

SHORT_WORDS = set("yes no odd even true none both not all any".split())

def prose(text):
    """Words, not a product of letters? Beside an operator even four letters are a product."""
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)
    known = any(len(word) > 3 or word.lower() in SHORT_WORDS for word in words)
    return bool(re.search(r"\\(text|ldots)", text)) or known and not re.search(r"[-+*/^=]", text)


# ---- Math: what people write for one thing -------------------------------------------------------

# old new old new ...
SYMBOLS = r"""
    − - – - ‑ - × \times ÷ / · \cdot ⋅ \cdot ∙ \cdot ⁄ / ∕ / π \pi ∞ \infty ° ^\circ ′ ' ″ '' ’ '
    ≠ \ne ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ± \pm ∓ \mp → \to 、 , … \ldots ∠ \angle △ \triangle
    θ \theta α \alpha β \beta γ \gamma λ \lambda μ \mu σ \sigma φ \phi ω \omega Δ \Delta ≈ \approx
    ∨ , ∧ , ** ^ <= ≤ >= ≥ != \ne \le ≤ \leq ≤ \leqslant ≤ \ge ≥ \geq ≥ \geqslant ≥ \lt < \gt >
    \neq \ne \lor , \land , \vee , \wedge , \dfrac \frac \tfrac \frac \cfrac \frac \degree ^\circ
    \lbrace \{ \rbrace \} \langle ( \rangle ) \lg \log_{10} \mod \bmod \varnothing \emptyset
    \dots \ldots \cdots \ldots \lvert | \rvert | \vert | \mid | \colon : ℝ \mathbb{R} ℤ \mathbb{Z}
    ℃ ^\circ\text{C} ℉ ^\circ\text{F} 或 , 和 , 与 , 且 , 及 , 约 \approx ， , ； ; ： : （ ( ） )
    ［ [ ］ ] ｛ { ｝ } ＝ = ＋ + － - ＜ < ＞ > ％ % ／ / ！ ! ｜ | 。 . ． .
    ½ \frac{1}{2} ⅓ \frac{1}{3} ⅔ \frac{2}{3} ¼ \frac{1}{4} ¾ \frac{3}{4} ⅕ \frac{1}{5}
    ⅖ \frac{2}{5} ⅗ \frac{3}{5} ⅘ \frac{4}{5} ⅙ \frac{1}{6} ⅚ \frac{5}{6} ⅛ \frac{1}{8}
    ⅜ \frac{3}{8} ⅝ \frac{5}{8} ⅞ \frac{7}{8} ⁰ 0 ¹ 1 ² 2 ³ 3 ⁴ 4 ⁵ 5 ⁶ 6 ⁷ 7 ⁸ 8 ⁹ 9 ⁺ + ⁻ - ⁽ ( ⁾ )
    ⁿ n ˣ x ⁱ i ₀ 0 ₁ 1 ₂ 2 ₃ 3 ₄ 4 ₅ 5 ₆ 6 ₇ 7 ₈ 8 ₉ 9 ₊ + ₋ - ₙ n ₓ x
""".split()
SYMBOLS = {old: new + " " * new[-1].isalpha() for old, new in zip(SYMBOLS[::2], SYMBOLS[1::2])}
BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13)))

def symbol(found):
    return SYMBOLS[found[0]]

def base(found):
    return "_{%s}" % BASES.get(found[1], found[1])

def remainder(found):
    return str(int(found[1]) % int(found[2]))

def repeating(found):
    """0.1(6), 0.1\\overline{6} or 0.1666\\ldots as a fraction."""
    whole, *blocks = found.groups("")
    block = re.sub("[^0-9]", "", "".join(blocks))
    digits, decimals = whole.replace(".", ""), len(whole.partition(".")[2])
    above = int(digits + block) - int(digits or 0)
    return r"\frac{%d}{%d}" % (above, (10 ** len(block) - 1) * 10 ** decimals)

def rows(found):
    """A matrix as a tuple of tuples, a vector as a tuple; cases and lines of equations as a list."""
    factor, kind, body = found.groups()
    lines = [line for line in body.split(r"\\") if line.strip()]
    if kind[0] in "cag" and not re.search(r"&\s*[^=\s]", body):  # x &= 1
        return ",".join(lines).replace("&", "")
    if factor.strip():
        lines = ["&".join(f"{factor}({entry})" for entry in line.split("&")) for line in lines]
    lines = [line.replace("&", ",") for line in lines]
    vector = len(lines) == 1 or "&" not in body
    text = ",".join(lines if vector else [f"({line})" for line in lines])
    return text if kind == "cases" else f"({text})"

# pattern => what it becomes: a template, or one of the functions above; an indented line goes on
RULES = r"""
^\s*\*\*(.*)\*\*\s*$ => \1
([⁰¹²³⁴-⁾ⁿˣⁱ]+) => ^{\1}
([₀-₋ₙₓ]+) => _{\1}
√ *\(([^()]*)\) => \\sqrt{\1}
√ *([0-9.]+|[a-zA-Z]) => \\sqrt{\1}
SYMBOL => symbol
# styling: 1,\!000 \left( \displaystyle $ \phantom{5}, \textbf{x} is \text{x}
, ?\\! ?(?=[0-9]{3}) =>
\\(?:left|right)\.|\\!|(?<!\\)\$|\\[()\[\]]|\\(?:[hv]?phantom|label|tag)\*?\s*\{[^{}]*\} =>
\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|underline|tiny|small|[lL]arge|bf|rm|it|limits
    |therefore|because|implies|Rightarrow|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z]) =>
\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|emph|boldsymbol|bm|vec
    |hat|overrightarrow|operatorname)\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|\s([a-zA-Z]))
    => \\text{\1\2}
\\text\{ *\} =>
(?<!\\)\\(?:[,;: ]|q?quad\b)|~|\s+ => \x20
# numbers: \frac12, 1 000, 1{,}000, 1'000, 3{,}14, 1,000, 1.234,56, 0,111, 1 1/2, 5 million, 0.1(6)
\\frac\s*(\\pi|[0-9a-zA-Z])\s*(\\pi|[0-9a-zA-Z]) => \\frac{\1}{\2}
(?<![0-9]{4})(?<=[0-9])(?:\{,\}|[ '])(?=[0-9]{3}(?![0-9/])) =>
(?<=[0-9])\{,\}(?=[0-9]) => .
(^[^\w({\[]*|= *)([1-9][0-9]{0,2}),([0-9]{3})(?:,([0-9]{3}))?(?:,([0-9]{3}))?(?![0-9]|, *[0-9])
    => \1\2\3\4\5
^([0-9]{1,3})\.([0-9]{3})(?:\.([0-9]{3}))?,([0-9]{1,2})(?![0-9,]) => \1\2\3.\4
^([0-9]{1,3})\.([0-9]{3})\.([0-9]{3})(?![0-9.]) => \1\2\3
^([+-]?0),(?=[0-9]{3,}$) => \1.
(?<![0-9.])([0-9]+) +([0-9]+) */ *([0-9]+) => (\1+\\frac{\2}{\3})
(?<=[0-9]) *(\\text\{)? *hundred\b => \\times10^{2}\1
(?<=[0-9]) *(\\text\{)? *thousand\b => \\times10^{3}\1
(?<=[0-9]) *(\\text\{)? *million\b => \\times10^{6}\1
(?<=[0-9]) *(\\text\{)? *billion\b => \\times10^{9}\1
([0-9]*\.[0-9]*)(?:\\(?:overline|bar)\s*\{?([0-9]{1,20})\}?|\(([0-9]{1,20})\)
    |(\\dot *\{?[0-9]\}?(?:[0-9]*\\dot *\{?[0-9]\}?)?)) => repeating
([0-9]*\.[0-9]*?)([0-9]{1,9}?)\2+ *(?:\.\.\.|\\ldots) => repeating
([0-9]+) *\\bmod *\{?([1-9][0-9]*)\}?$ => remainder
_\{?\(?(?:\\text\{)? *([a-z]{3,6}) *\}?\)?\}?$ => base
[_ ]*\{?\(?(?:\\text\{)? *\bbase[ -]+\}? *(\w+) *\}?\)?\}?$ => base
# what stands beside: 5 \pmod{12}, percent, degrees, where n is odd, k \in \mathbb{Z}, (C) 12, Area: 5
(\\equiv.*)\\bmod => \1\\pmod
,? *\(? *\\pmod *\{?([0-9]+)\}? *\)? => \\text{mod^\1}
\\text\{ *(?:percent\w*|pct) *\}|\b(?:percent\w*|pct)\b|(?<!\\)% => \\%
\^ *\{? *\\circ *\}? * => ^\\circ\x20
(?:\^\\circ|\bdegrees?\b)[ {]*(?:\\text\{ *)?C(?:elsius)?\b *\}? => \\text{celsius}
(?:\^\\circ|\bdegrees?\b)[ {]*(?:\\text\{ *)?F(?:ahrenheit)?\b *\}? => \\text{fahrenheit}
(?<=[0-9}]) *(?:\\text\{ *degrees? *\}|degrees?\b) => ^\\circ\x20
([0-9]+) *\^\\circ *([0-9]+) *' *([0-9]+) *'' => (\1+\\frac{\2}{60}+\\frac{\3}{3600})^\\circ\x20
([0-9]+) *\^\\circ *([0-9]+) *'(?!') => (\1+\\frac{\2}{60})^\\circ\x20
^(.*[=0-9].*)\\approx.*$ => \1
\\approx => =
(?<=[^ ,])[, ]*(?:\\text\{ *)?\(?\b(?:where|for (?:all|any|every|each)|approximately|exactly|only
    |in total|total|altogether)\b.*$ =>
(?<=[^ ,])[, ]*\(? *(?:\\text\{ *for *\} *)?[a-z](?:, *[a-z])* *\\in *\\(?:mathbb|mathbf|text)
    *\{?[ZNQ]\}?[^,]*$ =>
(?:, *)?\\text\{,? *(?:and|or|,) *\}|(?:, *)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) => ,
^(?:\\text\{)?\(?([A-J])\)?\}?$ => \1
^(?:\\text\{)?\(([A-J])\) *\}? *(?=[^ =(*/^+-]) => (\1)=
^(?:\\text\{)?([A-J])[.)]\}?  *(?=.) => (\1)=
^(\\text\{)?([A-J]): *(?=[a-zA-Z]) => (\2)=\1
^(?:\\text\{([^{}:]{1,40}): *\}|([A-Za-z][A-Za-z]{0,20}):)(?=.) => \1\2=
# plain text, matrices, {x : x > 2}, x \ne 5, ]2,5[, all reals
(?<![\\a-zA-Z])(pi|sqrt|a?r?c?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|theta|alpha|beta)(?![a-zA-Z])
    => \\\1
\\sqrt *\(([^()]*)\) => \\sqrt{\1}
\\sqrt *\(([^()]*)\) => \\sqrt{\1}
\{?([^{}\\]+)\\choose([^{}\\]+)\}? => \\binom{\1}{\2}
([^=,;&()\[\]]*?)\\begin\{([pbB]?(?:small)?matrix|array|cases|aligned|align\*?|gathered)\}(?:\{[lcr|]*\})?(.*?)
    \\end\{\2\}(?![\w^(\\]) => rows
\\\{ *[a-z] *[|:](.*)\\\}$ => \1
\\mathbb *\{?R\}? *(?:\\setminus|\\backslash|-) *\\\{([^,{}]+)\\\} => (-\\infty,\1)\\cup(\1,\\infty)
^([a-z]) *\\ne *([^,]+)$ => \1<\2,\1>\2
\\mathbb *\{?R\}? => (-\\infty,\\infty)
(^|\\cup *|\\in *|= *)\]([^\[\]]+)\[ => \1(\2)
(^|\\cup *|\\in *|= *)\]([^\[\]]+)\] => \1(\2]
(^|\\cup *|\\in *|= *)\[([^\[\]]+)\[ => \1[\2)
"""
COMPUTED = {"symbol": symbol, "base": base, "remainder": remainder, "repeating": repeating,
            "rows": rows}

def compiled(table):
    """[(pattern, what it becomes), ...]"""
    keys = [re.escape(old) + r"(?![a-zA-Z])" * (old[0] == "\\" and old[-1].isalpha())
            for old in sorted(SYMBOLS, key=len, reverse=True)]
    found = []
    for line in re.sub(r"\n +", "", table).strip().split("\n"):
        pattern, _, new = line.partition("=> " if "=> " in line else "=>")
        if line[0] != "#":
            pattern = "|".join(keys) if pattern == "SYMBOL " else pattern.removesuffix(" ")
            found.append((re.compile(pattern, re.S), COMPUTED.get(new, new.replace(r"\x20", " "))))
    return found

RULES = compiled(RULES)
SYNONYMS = {alias: line.split("|")[0] for line in r"""
\emptyset|nosolution|nosolutions|norealsolution|norealsolutions|emptyset|theemptyset|\{\}|无解|空集
(-\infty,\infty)|allrealnumbers|allreals|anyrealnumber|allrealx|reals|全体实数|一切实数
\infty|infinity|positiveinfinity|+\infty
doesnotexist|dne|undefined|不存在
infinitelymany|infinitelymanysolutions|infinite|无数个|无穷多个
yes|是
no|否
""".split() for alias in line.split("|")}

@lru_cache(4096)
def clean(text):
    """LaTeX answer without styling and final full stop, with one way to write each thing."""
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".,;:\\ ")
    while text[:1] == "{" and 0 not in depths(text)[:-1] and len(text) > 2:
        text = text[1:-1].strip()
    return SYNONYMS.get(squeeze(unwrap(text)).casefold().replace(" ", ""), text)

def unwrap(text):
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)

def squeeze(text):
    """Without spaces, but 1 8 and 32, 349 stay two numbers."""
    return re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", text)

def depths(text):
    """Bracket depth after each character."""
    return list(accumulate((c in "{([") - (c in "})]") for c in text))

def split(text, separator):
    """Parts between the separators that stand in no brackets."""
    depth, start, parts = depths(text), 0, []
    for found in re.finditer(separator, text):
        if depth[found.start()] == 0:
            parts.append(text[start:found.start()].strip())
            start = found.end()
    return parts + [text[start:].strip()]

# A unit, other ways to write it | the next one. What is counted contradicts nothing: 5 apples may be
# 5 pieces. Any other word behind a number makes it another answer: 5 thirds.
UNITS = {word: unit.split()[0] for unit in r"""
    m meter metre 米 | cm centimeter centimetre 厘米 | mm millimeter millimetre 毫米 | dm decimeter 分米
    | km kilometer kilometre 千米 公里 | nm nanometer | in inch inche | ft foot feet | yd yard | mi mile
    | m^2 平方米 | cm^2 平方厘米 | km^2 平方千米 | dm^2 平方分米 | m^3 立方米 | cm^3 cc 立方厘米
    | dm^3 立方分米 | acre | g gram 克 | kg kilogram kilo 千克 公斤 | mg milligram | t ton tonne 吨
    | lb pound | oz ounce | l L liter litre 升 | ml mL milliliter millilitre 毫升 | gal gallon | cup
    | s sec second 秒 | min minute 分钟 | h hr hour 小时 时 | d day 天 日 | wk week 周 星期
    | mo month 个月 月 | yr year 年 岁 | decade | am | pm | mi/h mph | km/h kph kmh kmph | Hz hertz
    | N newton 牛顿 牛 | J joule 焦耳 焦 | kJ kilojoule | W watt | kW kilowatt | V volt 伏 | A amp ampere
    | Ω ohm | F farad | C coulomb | T tesla | K kelvin | Pa pascal | kPa kilopascal | atm atmosphere
    | eV ev electronvolt | cal calorie | kcal | erg | dyne | mol mole | M molar | bit | byte | celsius
    | fahrenheit | dollar $ usd buck | cent ¢ | euro € eur | £ | ¥ | yuan 元 rmb 人民币 | yen | rupee ₹
    | peso | dime | nickel | quarter | penny pennie | mod
    | count unit square item piece apple orange banana pear cookie candy candie marble ball bead block
    toy book page pencil pen crayon sticker card coin stamp ticket bag box boxe bottle jar can person
    people student child children kid man men woman women boy girl teacher friend adult player team
    guest passenger worker employee member dog cat cow pig horse sheep duck chicken egg bird fish
    rabbit animal tree flower plant seed rose car bu buse truck bike wheel train house room chair
    table door window floor brick tile way time number integer solution root point goal score vote
    term digit letter word side edge vertex vertice face diagonal triangle circle rectangle cube
    angle line segment path pair set subset element value case outcome combination permutation
    arrangement possibility possibilitie sequence game match round race trip lap step mark question
    problem slice pizza cake pie cupcake muffin donut sandwich meal glass glasse dish dishe plate
    shirt shoe sock dres dresse hat color colour song movie photo picture radian rad 个 人 只 本 支 张
    件 块 条 棵 名 位 次 种 元素 袋 箱 辆 页 分 束
""".split("|") for word in unit.split()}
POWERS = [(r"\b(?:square|sq) +([^\W\d_]+)", r"\1^2"), (r"\bcubic +([^\W\d_]+)", r"\1^3"),
          (r"([^\W\d_]+) +squared", r"\1^2"), (r"([^\W\d_]+) +cubed", r"\1^3"),
          (r"\bper\b|每", "/"), (r"(?<=/) *an? ", "")]
ATOM = (r"(?:\\text\{(?:[^{}]|\{[^{}]*\})*\}|[a-zA-Z][a-zA-Z.]*|[¢$€£¥₹Ω\u4e00-\u9fff]+|/|\\cdot)"
        r"(?: *\^ *\{? *-?[0-9] *\}?)?")
UNIT = re.compile(rf"(.*?(?:[0-9)}}\]!]|\\pi|\\circ|(?<=.)(?= *\\text)))[ (]*((?:{ATOM} *)+)\)?",
                  re.S)
MONEY = re.compile(r"([+-]?) *\\?([$€£¥₹]) *(?=[0-9.])")

def split_unit(text):
    """`5\\text{ km}` -> ("5", "km^1"); the unit is "" if there is none."""
    money = MONEY.match(text)
    if money:
        text = f"{money[1]}{text[money.end():]}\\text{{{money[2]}}}"
    found = UNIT.fullmatch(text.strip())
    if not found:
        return text, "°" * text.rstrip().endswith(r"\circ")
    value, tail = found[1], found[2].strip()
    letters = re.match("[a-zA-Z](?![a-zA-Z])|mg$", tail)  # 5m is 5, but 2c is not 2, and 2mg may be a force
    unit = read_unit(tail)
    if unit is None or letters and not (
            number(value) is not None and (tail in "msghl" or "/" in tail)):
        return text, ""
    return value, unit

def read_unit(text):
    """`km/h`, `kilometers per hour`, `km \\cdot h^{-1}` -> "h^-1 km^1"; None if a word is no unit."""
    text = re.sub(r"\\text|\\cdot|[{}()]", " ", text).replace(".", "")
    for old, new in POWERS:
        text = re.sub(old, new, text)
    text = re.sub(r"[^\W\d_]+|[¢$€£¥₹]", unit_name, text)
    powers, sign = Counter(), 1
    for slash, name, power in re.findall(r"(/)|([^\W\d_]+|[?£¥])(?: *\^ *(-?[0-9]+))?", text):
        if slash:
            sign = -1
        else:
            powers[name] += sign * int(power or 1)
    del powers["count"]
    return None if "?" in text else " ".join(f"{n}^{p}" for n, p in sorted(powers.items()))

def unit_name(found):
    word = found[0]
    for form in (word, word.lower() if len(word) > 1 else word):
        for name in (form, form.removesuffix("s")):
            if name in UNITS:
                return UNITS[name]
    return "?"

def number(text):
    """Plain number -> exact Decimal or Fraction, else None. 1e400 is never expanded to its digits."""
    power = re.fullmatch(r"([+-]?)(?:([0-9.]+) *(?:\\times|\\cdot|\*) *)?10\^\{?([+-]?[0-9]{1,6})\}?",
                         text)
    if power:
        text = f"{power[1]}{power[2] or 1}e{power[3]}"
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?", text):
        return Decimal(text)
    text = re.sub(r"^([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?[0-9]{1,99}/0*[1-9][0-9]{0,98}", text):
        return Fraction(text)
    return None

def same_number(a, b, tolerance=None):
    """Exactly equal, or close if one of them is written with decimals (unless its exponent is huge)."""
    decimals = any(isinstance(v, Decimal) and v != v.to_integral_value() for v in (a, b))
    small = all(isinstance(v, Fraction) or abs(v.adjusted()) < 300 for v in (a, b))
    return a == b or decimals and small and close(Fraction(a), Fraction(b), tolerance)

def close(a, b, tolerance=None):
    """Equal to 6 decimals, like 1/3 and 0.333333; below 1e-3 to a relative 1e-6 (Math-Verify: 5e-7
    is 0)."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= (tolerance or (5e-7 if size >= 1e-3 else 1e-6 * size)))


# ---- Computer algebra, in the worker process only ------------------------------------------------

@lru_cache(4096)
def algebra_equal(gold, pred):
    """Two expressions, or two equations, which are equal if one is a multiple of the other."""
    from math_verify import verify
    from sympy import Eq
    a, b = parse(gold), parse(pred)
    if isinstance(a, Eq) and isinstance(b, Eq):
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
        point = next(points(a, b))
        a, b = a * b.subs(point), b * a.subs(point)
    if getattr(a, "is_Matrix", False) and getattr(b, "is_Matrix", False):
        return a.shape == b.shape and all(same_numbers(x, y) for x, y in zip(a, b))
    agreed = same_numbers(a, b)
    return verify(a, b, timeout_seconds=None) if agreed is None else agreed

def parse(text):
    """Math-Verify's parser, but with the case of letters kept."""
    from latex2sympy2_extended.latex2sympy2 import (ConversionConfig, NormalizationConfig,
                                                    latex2sympy, normalize_latex)
    from sympy import I
    # units off: its list strips the letters c, d, h, o, t from the end, so that 2c would equal 2
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True,
                                 boxed="none")
    value = latex2sympy(normalize_latex(text, normal), is_real=True, normalization_config=None,
                        conversion_config=ConversionConfig(lowercase_symbols=False))
    return value.subs({s: I for s in value.free_symbols if s.name == "i"}).doit()

def points(a, b):
    """Values for all letters: positive, negative, mixed; no integers, at which much is equal."""
    from sympy import Rational
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for turn in range(8):
        yield {s: Rational((31 + 17 * i + 7 * turn) * (-1) ** (turn >> i % 3), 29)
               for i, s in enumerate(symbols)}

def same_numbers(a, b):
    """Are two expressions equal wherever both are real? To 25 digits, but like decimals if one is a
    float (Math-Verify: all below 5e-7 are equal). None if that cannot be told."""
    from sympy import Float, Integral, Product, Sum
    if a == b or a.is_Rational and b.is_Rational or a.is_number and b.is_number and False in (a.is_finite, b.is_finite):
        return a == b
    if a.has(Sum, Product, Integral) or b.has(Sum, Product, Integral):
        return None
    decimals, told = a.has(Float) or b.has(Float), 0
    for point in points(a, b):
        x, y = a.subs(point).evalf(40), b.subs(point).evalf(40)
        if x.is_number and y.is_number and (x.is_real and y.is_real or not point):
            if not close(x, y, None if decimals else 1e-25 * max(abs(x), abs(y))):
                return False
            told += 1
    return True if told > 1 else None

def worker():
    """The child process: lines [seconds, [[gold, pred], ...]] in, lines [score, status] out. It ends
    with its parent: at the end of its input, or by the alarm where it is busy."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes: (10^9)! is to fail
    for line in sys.stdin:
        seconds, pairs = json.loads(line)
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        score, status = 0.0, "unparsable"
        for gold, pred in pairs:
            with suppress(Exception):  # on odd input the parser and SymPy raise nearly every type
                score, status = max(score, float(compare(gold, pred, algebra_equal))), "ok"
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([score, status]), file=out, flush=True)

class Worker:
    """Child process `python rewards.py --worker`, started on first use. Some answers never come back
    from computer algebra: so a process, which can be killed."""

    def __init__(self):
        self.process = self.owner = None

    def ask(self, pairs, seconds):
        """(score, status) of [(gold, pred), ...] within `seconds`; one that hangs or dies is killed
        and replaced."""
        if self.owner != os.getpid():  # a forked child must not read its parent's answers
            self.process, self.owner = None, os.getpid()
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker"], bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                start_new_session=True)  # Ctrl-C is for the parent alone
            if self.talk([("x+1", "1+x")], 60) != (1.0, "ok"):  # imports before the clock starts
                self.stop()
                raise RuntimeError("the worker of math-verify does not start: "
                                   "pip install 'math-verify>=0.9'")
        return self.talk(pairs, seconds)

    def talk(self, pairs, seconds):
        start = time.monotonic()
        late = threading.Timer(seconds, self.process.kill)  # select cannot watch pipes on Windows
        late.start()
        line = b""
        with suppress(OSError):  # it has just died
            self.process.stdin.write(json.dumps([seconds, pairs]).encode() + b"\n")
            line = self.process.stdout.readline()
        late.cancel()
        if line:
            return tuple(json.loads(line))
        self.stop()
        return 0.0, "timeout" if time.monotonic() - start >= seconds else "error"

    def stop(self):
        if self.process:
            with self.process:  # closes its pipes and waits for its end
                self.process.kill()
        self.process = None


# ---- The functions to call -----------------------------------------------------------------------

TASKS = {"chainsum": chainsum, "add": add, "countdown": countdown, "tableqa": tableqa, "kk": kk,
         "qa": qa, "math": math}

def judge(task, response, problem):
    """(score, status), or what `math` leaves to computer algebra."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; valid: {', '.join(TASKS)}")
    result = TASKS[task](response, **problem) if isinstance(response, str) else "unparsable"
    if isinstance(result, list):
        return result
    return (0.0, result) if isinstance(result, str) else (float(result), "ok")

class Scorer(AbstractContextManager):
    """scorer([(task, response, problem), ...]) -> [(score, status), ...] in the same order, from any
    thread. Computer algebra, which only math may need, is spread over `workers` processes, at most
    `timeout` seconds for a response. A batch that is full of bombs gets less and less: after PATIENT
    time-outs a quarter of that, after GIVE_UP the rest is marked "timeout" unseen."""

    PATIENT, GIVE_UP = 4, 16

    def __init__(self, workers=2, timeout=2):
        self.workers = [Worker() for _ in range(max(1, workers))]
        self.timeout, self.idle = timeout, SimpleQueue()
        for w in self.workers:
            self.idle.put(w)

    def __call__(self, items):
        results = [judge(*item) for item in items]
        late = []
        pool = ThreadPoolExecutor(len(self.workers))
        try:
            asked = {i: pool.submit(self.ask, result, late)
                     for i, result in enumerate(results) if isinstance(result, list)}
            return [asked[i].result() if i in asked else r for i, r in enumerate(results)]
        finally:
            pool.shutdown(cancel_futures=True)  # at Ctrl-C the rest is not graded first

    def ask(self, pairs, late):
        if len(late) >= self.GIVE_UP:
            return 0.0, "timeout"
        w = self.idle.get()
        try:
            seconds = self.timeout if len(late) < self.PATIENT else self.timeout / 4
            result = w.ask(pairs, seconds)
        finally:
            self.idle.put(w)
        if result[1] == "timeout":
            late.append(pairs)
        return result

    def close(self):
        for w in self.workers:
            w.stop()

    def __exit__(self, *exc):
        self.close()

SINGLE = Scorer(workers=1, timeout=5)

def grade(task, response, **problem):
    """(score in [0, 1], status) of one response; may be called in any thread."""
    return SINGLE([(task, response, problem)])[0]

def score(task, response, **problem):
    """Score in [0, 1] of one response; never raises on any response, and returns within 8 s."""
    return grade(task, response, **problem)[0]


if __name__ == "__main__" and "--worker" in sys.argv:
    worker()
