r"""A response in, a score in [0, 1] out: rewards that a policy cannot cheat, hang or break.

    score("math", r"... so \boxed{\frac12}", answer="0.5")                          -> 1.0
    grade("countdown", "<answer>(1+2)*8</answer>", numbers=[1, 2, 8], target=24)     -> (1.0, "ok")

Tasks and their problem fields:
    chainsum   answer="7"                     the default task; so is hops: `...#7$`, $ is the end
    add        answer="123"                   last \boxed{}, an integer
    countdown  numbers=[..], target=24        last <answer>, or last box (format="boxed")
    tableqa    answer=[..]                    last <answer>, all values in this order
    kk         answer={"Ann": "knight", ..}   last <answer>, every person exactly once
    qa         answer=[any, of]               last <answer>, metric="em" or "f1" (SQuAD, HotpotQA)
    search     answer=[any, of]               the same F1, and 0.3 for the format of the turns
    math       answer="1/2" or [any, of]      last \boxed{} or \fbox{} anywhere in the response
    exact_box  answer="1/2"                   last box, the same characters (WAPO's math_prm)
    exact_line answer="7"                     `<think>..</think> Answer: 7`, the same characters
    rg         name, config, entry            last <answer>, by reasoning-gym's own scorer

Status: "ok" an answer was found and compared (right or wrong), "no_answer", "unparsable",
"timeout", "error". Count them: a grader that fails silently looks like a policy that never learns.
Each grader below returns the score, or the status that explains the 0. In doubt the score is 0: a
policy learns what it is paid for by mistake. No model output is evaluated as Python.
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

BOX = r"\\(?:boxed|fbox)\s*(?=\{|[+-]?[0-9])"  # \boxed 7 is 7
BETWEEN = (r"\}(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|and|or){0,40}"
           r"\\(?:boxed|fbox)\s*\{")

def last_boxed(text, join=False):
    """Content of the last \\boxed{...} or \\fbox{...}; None if there is none or it never closes.
    With `join`, of several that stand together: \\boxed{1}, \\boxed{2} is 1,2."""
    *before, tail = re.split(BOX, re.sub(BETWEEN, ",", text) if join else text)
    if not before:
        return None
    if tail[0] != "{":
        return re.match("[+-]?[0-9][0-9.,/]*", tail)[0]
    depth = 0
    for token in re.finditer(r"\\.|[{}]", tail, re.S):  # \{ is no brace in TeX
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return tail[1:token.start()]
    return None

def last_answer(text):
    """Content of the last <answer>...</answer>, or of a box in it, up to 2000 characters; "" if
    there is none."""
    before, tag, inner = text.rpartition("</answer>")[0].rpartition("<answer>")
    inner = inner.partition("</answer>")[0] if tag else ""
    box = last_boxed(inner)
    return (inner if box is None else re.sub(MARKUP, r"\1", box)).strip()[:2000]

MARKUP = r"\\(?:text|math)\w*\s*\{([^{}]*)\}"


# ---- Procedural tasks ----------------------------------------------------------------------------

def chainsum(response, answer):
    found = re.fullmatch(r"[^#]*#([^$]*)\$", response)
    return found[1] == str(answer) if found else "no_answer"

def add(response, answer):
    box = last_boxed(response)
    if box is None:
        return "no_answer"
    return int(box) == int(answer) if re.fullmatch(r"\s*[+-]?\d{1,100}\s*", box) else "unparsable"

def countdown(response, numbers, target, format="answer"):
    """1 iff the expression uses every number exactly once and equals the target exactly. Only
    + - * / ( ) and integers get through, not `9**9**9` (would hang eval), `//`, or `3.5` (would
    pass for 3 and 5). A box may hold LaTeX, and end in `= target`."""
    text = last_answer(response)
    if format == "boxed":
        text = re.sub(r"\\(times|cdot) *", "*", clean((last_boxed(response) or "")[:MAX_CHARS]))
        fractions = 1
        while fractions:  # from the inside out
            text, fractions = re.subn(r"\\frac *\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(rf" *= *{re.escape(str(target))}$", "", text)
    if not text:
        return "no_answer"
    if len(text) > 300 or re.search(r"[^0-9+\-*/() \t\r\n]|\b0[0-9]|//|\*\*", text):
        return "unparsable"
    try:
        value = exact_value(ast.parse(" ".join(text.split()), mode="eval").body)
    except ZeroDivisionError:
        return False
    except (SyntaxError, AttributeError, RecursionError, MemoryError):  # none, or too deep
        return "unparsable"
    return value == target and Counter(map(int, re.findall("[0-9]+", text))) == Counter(numbers)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg}

def exact_value(node):
    """Value of an arithmetic syntax tree as a Fraction; AttributeError if there is more in it."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    children = ast.iter_child_nodes(node)
    operands = [exact_value(child) for child in children if isinstance(child, ast.expr)]
    return OPERATORS[type(node.op)](*operands)


# ---- Tables, puzzles, questions ------------------------------------------------------------------

DASHES = str.maketrans("−–—‐‑", "-----")

def tableqa(response, answer):
    """HiTab: numbers within 1e-5 (percent signs are ignored: 13.3% is 13.3), text equal up to case;
    all values, in order."""
    text = last_answer(response).strip(" ,;\n")
    if text[:1] + text[-1:] in ("[]", "{}"):
        text = text[1:-1]
    # value, separator, value, ...
    parts = re.split(r"([,;\n]\s*and\b|[,;\n]|\band\b)", text)
    return same_cells(parts, [str(gold) for gold in as_list(answer)]) if text else "no_answer"

def same_cells(parts, golds):
    """A value may span several parts: "1,234" or "technical, and other services"."""
    if not golds or not parts:
        return not golds and not parts
    return any(same_cell("".join(parts[:n]), golds[0]) and same_cells(parts[n + 1:], golds[1:])
               for n in range(1, min(len(parts), 40) + 1, 2))

def same_cell(text, gold):
    text, gold = cell(text), cell(gold)
    a, b = number(text), number(gold)
    return text == gold or None not in (a, b) and same_number(a, b, 1e-5)

def cell(text):
    text = " ".join(text.casefold().translate(DASHES).split())
    text = text.strip(" '\"`").rstrip(". ")
    text = re.sub(r"^\(([^()]*)\)$", r"\1", text)
    return re.sub(r"^([+-]?)\\?\$(?=[0-9.])|(?<=[0-9.]) *(\\?%|percent)$", r"\1", text)

def kk(response, answer):
    """`Ann is a knight, Bob: knave`, `Knights: Ann`, ...: each person exactly once, nobody else."""
    text = re.sub(r"[*_|\"'`#{}$()]", " ", last_answer(response).casefold().translate(DASHES))
    if not text.strip():
        return "no_answer"
    gold = sorted((name.casefold(), role.casefold()) for name, role in answer.items())
    name = rf"(?<!\w)({'|'.join(re.escape(n) for n, _ in reversed(gold))})(?!\w)"  # Jackson, Jack
    groups = rf"\b(knight|knave)s?\s*(?::|=|\bare\b|\bis\b)((?:[\s,;&]|\band\b|{name})*)"
    claims = []
    for role, people, _ in re.findall(groups, text):
        claims += [(person, role) for person in re.findall(name, people)]
    text = re.sub(groups, " ", text)
    claim = rf"{name}\s*(?:\bis\b|:|[=-]+>?|→|⇒)?\s*(?:an?\s|the\s)?\s*(knight|knave)(?!\w)"
    claims += re.findall(claim, text)
    rest = set(re.findall(r"[^\W\d_]+", re.sub(claim, " ", text)))
    if not claims or rest - set("and so thus hence therefore the name person role type".split()):
        return "unparsable"  # `not`, `or`, or about somebody else
    return sorted(claims) == gold

def qa(response, answer, metric="em"):
    """Exact match or token F1 after SQuAD normalisation, best over golds; yes and no get no partial
    credit (HotpotQA)."""
    if metric not in ("em", "f1"):
        raise ValueError(f"unknown metric {metric!r}; choose em or f1")
    pred = squad_normal(last_answer(response))
    golds = [squad_normal(str(gold)) for gold in as_list(answer)]
    if not pred:
        return "no_answer"
    return pred in golds if metric == "em" else max((token_f1(pred, g) for g in golds), default=0)

def search(response, answer):
    """WAPO's reward for questions that take a search tool (layer6ai-labs/wapo), which is F1 + 0.3
    for the format, over 1.3 so that it stays in [0, 1]. Format: the share of turns, which end with
    </search>, that are <think>..</think><search>..</search>, the last one also <think>..</think>
    <answer>..</answer>, nothing empty and no other tag; 0 if the policy never searched."""
    turns = [turn for turn in re.split("(?<=</search>)", response) if turn.strip()]
    formed = [turn for turn in turns if WELL_FORMED.fullmatch(turn)]
    form = len(formed) / len(turns) if len(turns) > 1 else 0
    f1 = qa(response, answer, "f1")
    if f1 == "no_answer" and not form:
        return f1
    return ((0 if f1 == "no_answer" else f1) + 0.3 * form) / 1.3

TAG = "</?[a-zA-Z][a-zA-Z0-9]*>"
WORDS = rf"\s*(?!{TAG})\S(?:(?!{TAG}).)*"  # no tag in them, and not empty
WELL_FORMED = re.compile(rf"\s*<think>{WORDS}</think>\s*<(search|answer)>{WORDS}</\1>\s*", re.S)

def squad_normal(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", text).split() or text.split()  # an answer may be `A`
    return " ".join(words)

def token_f1(pred, gold):
    if pred != gold and {"yes", "no", "noanswer"} & {pred, gold}:
        return 0.0
    a, b = pred.split(), gold.split()
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))

def exact_box(response, answer):
    box = last_boxed(response)
    return box.strip() == answer if box else "no_answer"

def exact_line(response, answer):
    """WAPO's numina_lean_math: the thoughts, the answer, and nothing before, between or after."""
    found = re.match(r"(?s)\s*<think>.+?</think>\s*Answer:(.*)", response)
    return found[1].strip() == answer if found else "no_answer"

def as_list(value):
    return value if isinstance(value, (list, tuple)) else [value]


# ---- Math: the structure of the answer first, then text, exact numbers, computer algebra ---------

def math(response, answer, acpo_compat=False):
    """The score or status, or the pairs [(gold, pred), ...] of which computer algebra has to find
    one equal. acpo_compat: the ACPO paper's rule (arXiv 2606.22570), for comparison: with no box
    the whole response is the answer, and one of more than 30 characters must be identical."""
    golds = [gold for text in as_list(answer) for gold in as_list(reduce_gold(text))]
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
    joined = chain.endswith(pred) and not acpo_compat and not refused(chain)
    hard = []
    for gold in golds:
        several = joined and re.search(r"[,;]|\b(and|or)\b|\\(pm|cup)\b", gold)
        for candidate in {pred, chain} if several else {pred}:
            # `append` gives None: what only computer algebra can tell is unequal, until a child
            # process has told.
            asked = []
            if compare(gold, candidate, asked.append):
                return True
            if asked:
                hard.append((gold, candidate))
    return hard or False

def reduce_gold(gold):
    """The answer in a reference: behind GSM8K's `####`, in its box, without `The answer is`, the
    value of {"value": 3}; a list if it is one stored as text, of which any may be given."""
    text = str(gold["value"] if isinstance(gold, dict) and "value" in gold else gold)
    text = re.sub(r"<<[^<>]*>>", "", text).rpartition("####")[2].strip()
    text = last_boxed(text, join=True) or text
    text = re.sub(r"(?is)^.{0,200}\banswer(?: is|:)[\s:*]*(?=\S)", "", text)
    if not re.fullmatch(r"""(?s)\[\s*(['"]).*\1\s*\]""", text):
        return text
    quoted = re.findall(r"""(['"])(.*?)\1\s*(?=[,\]])""", text, re.S)
    return [item.replace("\\\\", "\\") for _, item in quoted]

# Power towers, factorials of factorials, long sums: the parser or SymPy would not come back.
BOMBS = re.compile(
    r"\^[^)}\]^]*\^[^)}\]^]*\^"
    r"|\^[({]*([5-9]\^[({]*[5-9]|[0-9]\^[({]*[0-9]{2}|[0-9]{2,}\^[({]*[0-9])"
    r"|![\s)}\]]*!|[0-9]{5}[\s)}\]]*!|\^[^()]*\)\s*!|![)}\]]*\^|\\binom\{[^{}]*(\^|[0-9]{5})"
    r"|\^[({]*[0-9]{5}|(\|[^|]*){13}|(_[^}]*){4}|(\\log.*){5}"
    r"|/\{?0(?![.0-9])|frac\{([^{}]|\{[^{}]*\})*\}\{0\}")  # 1/0 is not even 1/0

def refused(text):
    """Is it too long, too deep or too large to be parsed? Then it is no answer to any problem."""
    text = re.sub(r"\\left|\\right|\s", "", text)
    return (len(text) > MAX_CHARS or max(depths(text), default=0) > MAX_DEPTH
            or number(text) is None and bool(BOMBS.search(text)))  # 1e400 is only text

def compare(gold, pred, algebra):
    """Do two answers say the same? `algebra((gold, pred))` is asked about two expressions."""
    if gold.strip() == pred.strip():
        return True
    gold, pred = clean(gold), clean(pred)
    if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", gold):
        pred = re.sub(r"^([+-]?[0-9]+),(?=[0-9]{2,}$)", r"\1.", pred)  # 3,14 where 3.14 is meant
    a, b = squeeze(gold), squeeze(pred)
    return "" not in (a, b) and (a == b or equal(gold, pred, algebra))

# One answer of a list: name = parts between ends. x < 3 has the name x, the ends << and the parts
# -oo and 3, like (-oo, 3); in_range then says that the list -oo, 3 will not do.
Item = namedtuple("Item", "name ends parts in_range unit")

def equal(gold, pred, algebra):
    """Lists in any order, named values by their names, tuples in their order."""
    golds, preds = items(gold), items(pred)
    names = [{item.name for item in side} for side in (golds, preds)]
    # x=1, y=2 for 1, 2: one side has no names, on the other each value has its own.
    ordered = {""} in names and len(golds) in map(len, names)
    if len(golds) != len(preds):
        golds, preds = unpack(golds, preds), unpack(preds, golds)
        ordered = True
    if len(golds) != len(preds):
        return False
    for g in golds:
        found = [p for p in (preds[:1] if ordered else preds) if same_item(g, p, algebra)]
        if not found:
            return False
        preds.remove(found[0])
    return True

def unpack(side, other):
    """A tuple (or ACD) as the list of its parts, if the other side is a plain list."""
    one = side[0]
    same_name = other[0].name and all(item.name == other[0].name for item in other)  # x = 1, 2
    if len(side) > 1 or same_name or any(item.in_range for item in [one, *other]):
        return side
    letters = re.fullmatch("[A-J]+", one.parts[0])
    parts = one.parts[0] if letters else one.parts if one.ends == "<<" else []
    return [read_item(part) for part in parts] or side

def items(text):
    found = []
    for part in split(text, r",|;|\\cup(?![a-z])"):
        item = read_item(part)
        if item.ends != "{}":
            found.append(item)
        else:
            found += [inner._replace(in_range=True, name=inner.name or item.name)
                      for inner in items(",".join(item.parts))]
    if not any(item.name for item in found[1:]):  # k = 1, 5, 9
        found = [item._replace(name=found[0].name) for item in found]
    return found

IMPLICIT = "[a-z].*[-+]|[-+].*[a-z]|[a-z]\\^|^[a-z]{2}$"  # x+y=1, x^2=1, xy=1
NAME = re.compile(r"\\?[a-zA-Z]+(_\{?\w+\}?)?'*(\([^()]*\))?")

def read_item(text):
    *names, value = split(text, r"=|\\equiv|\\in(?![a-z])")
    terms = split(value, "[<>≤≥]")
    if len(terms) > 1:
        return inequality(terms, re.sub("[^<>≤≥]", "", value))
    name = re.sub(r"_\{(\w+)\}", r"_\1", squeeze(names[0])) if names else ""
    value, unit = split_unit(value)
    value = re.sub(r"\\text\{ *(.) *\}", r"\1", value)  # \mathrm{e} is a number, no word
    in_range = r"\in" in text  # or \infty, which ends an interval, too
    return Item(name, *brackets(value), in_range, unit)

def inequality(terms, signs):
    if not re.search("[<≤]", signs):  # 3 > x is x < 3
        terms.reverse()
        signs = signs[::-1].replace(">", "<").replace("≥", "≤")
    if len(terms) == 2 and NAME.fullmatch(terms[0]):
        terms, signs = [r"-\infty", *terms], "<" + signs
    elif len(terms) == 2 and NAME.fullmatch(terms[1]):
        terms, signs = [*terms, r"\infty"], signs + "<"
    name = terms.pop(1) if len(terms) == 3 and NAME.fullmatch(terms[1]) else ""
    return Item(squeeze(name), signs, terms, True, "")

def brackets(text):
    """`(1,2]` -> ("<≤", ["1", "2"]); no brackets, or only around an expression: ("", [text])."""
    opened = 0 not in depths(text.lstrip("\\"))[:-1]  # one pair around all of it
    if len(text) < 3 or text[-1] not in ")]}" or not opened:
        return ":" * (":" in text), split(text, ":")
    if text[:2] == r"\{":
        return "{}", split(text[2:-2], "[,;]")
    parts = split(text[1:-1], "[,;]")
    if len(parts) > 1:
        return "<≤"[text[0] == "["] + "<≤"[text[-1] == "]"], parts
    return brackets(parts[0])

def same_item(gold, pred, algebra):
    if gold.unit and pred.unit and gold.unit != pred.unit:
        return False
    for one, other in ((gold, pred), (pred, gold)):
        if one.name.startswith("(") and re.fullmatch("[A-J]", other.parts[0]):
            return one.name == f"({other.parts[0]})"  # (C) 12 for C
    if gold.ends != pred.ends or len(gold.parts) != len(pred.parts):
        return False
    if gold.name and pred.name and gold.name != pred.name:
        if gold.ends or NAME.fullmatch(gold.name) and NAME.fullmatch(pred.name):
            return False
        equations = [f"{item.name}={item.parts[0]}" for item in (gold, pred)]
        return same_value(*equations, algebra)
    if not pred.name and re.search(IMPLICIT, re.sub(r"\(.*\)", "", gold.name)):
        return False  # 0 is not x+y-1=0
    test = equal if len(gold.parts) > 1 else same_value  # f(1:2) is one part, with ends
    return all(test(g, p, algebra) for g, p in zip(gold.parts, pred.parts))

MARKS = {r"\%": r"\cdot\frac{1}{100}", r"^{\circ}": r"\cdot\frac{\pi}{180}"}

def same_value(gold, pred, algebra):
    """50\\% is 50 and 0.5, but 50 is not 0.5; 30^\\circ is 30 and \\pi/6, in \\sin only \\pi/6."""
    for mark, factor in MARKS.items():
        if mark in gold + pred:
            trig = re.search(r"\\(sin|cos|tan|cot|sec|csc)", gold + pred)
            readings = [factor] if trig else ["", factor]
            return any(same_value(gold.replace(mark, reading), pred.replace(mark, reading), algebra)
                       for reading in readings)
    a, b = squeeze(gold), squeeze(pred)
    if a == b or "" in (a, b):
        return a == b != ""
    x, y = number(a), number(b)
    if None not in (x, y):
        return same_number(x, y)
    if prose(gold) or prose(pred):  # "5 apples and 3 oranges" is not 5; ABC is an order, no product
        return a.casefold() == b.casefold() and a.isupper() == b.isupper()
    return algebra((gold, pred))

WORD = re.compile(r"(?<![\\{a-zA-Z])([a-zA-Z]{4,}|[A-Z]{2,}|(?i:yes|no|odd|not|any))(?![a-zA-Z])")

def prose(text):
    """Words, not a product of letters? Beside an operator even four letters are a product."""
    alone = WORD.search(text) and not re.search(r"[-+*/^=]", text)
    return alone or re.search(r"\\(text|ldots)|'", text)


# ---- Math: what people write for one thing -------------------------------------------------------

# old new old new ...
SYMBOLS = r"""
    − - – - ‑ - × \times ÷ / \div / · \cdot ⋅ \cdot ∙ \cdot ⁄ / ∕ / π \pi ∞ \infty ° ^{\circ}
    度 ^{\circ} ′ ' ″ '' ’ ' ≠ \ne ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ± \pm ∓ \pm \mp \pm 、 ,
    … \ldots ... \ldots ∠ \angle △ \triangle θ \theta α \alpha β \beta γ \gamma λ \lambda
    σ \sigma φ \phi ω \omega Δ \Delta \Omega Ω ≈ \approx ∨ , ∧ , ** ^ <= ≤ >= ≥ != \ne
    \le ≤ \leq ≤ \leqslant ≤ \ge ≥ \geq ≥ ∶ : \geqslant ≥ \lt < \gt > \neq \ne \lor , \land ,
    \vee , \wedge , \dfrac \frac \tfrac \frac \cfrac \frac \degree ^{\circ} \lbrace \{ \rbrace \}
    \langle ( \rangle ) \lg \log_{10} \mod \bmod \varnothing \emptyset \dots \ldots \cdots \ldots
    \lvert | \rvert | \vert | \mid | \colon : ℝ \mathbb{R} ℤ \mathbb{Z} ℃ ^{\circ}C ℉ ^{\circ}F
    或 , 和 , 与 , 且 , 及 , 约 \approx ， , ； ; ： : （ ( ） ) ［ [ ］ ] ｛ { ｝ } ＝ = ＋ + － - ＜ <
    ＞ > ％ % ／ / ！ ! ｜ | 。 . ． . ½ \frac{1}{2} ⅓ \frac{1}{3} ⅔ \frac{2}{3} ¼ \frac{1}{4}
    ¾ \frac{3}{4} ⅕ \frac{1}{5} ⅖ \frac{2}{5} ⅗ \frac{3}{5} ⅘ \frac{4}{5} ⅙ \frac{1}{6}
    ⅚ \frac{5}{6} ⅛ \frac{1}{8} ⅜ \frac{3}{8} ⅝ \frac{5}{8} ⅞ \frac{7}{8}
""".split()
SYMBOLS = {old: re.sub("(?<=[a-z])$", " ", new)
           for old, new in zip(SYMBOLS[::2], SYMBOLS[1::2])}
SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣⁱ₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-()nxi0123456789+-nx")
SYMBOL = re.compile(r"\\[a-zA-Z]+|" + "|".join(map(re.escape, SYMBOLS)))  # \left is no \le
BASES = dict(zip("two three four five six seven eight nine ten eleven".split(), range(2, 12)))

def base(found):
    """Text, which is equal to itself alone: 101_2 is neither 101 nor 5."""
    return r"\text{%s base %s}" % (found[1], BASES.get(found[2], found[2]))

def remainder(found):
    return str(int(found[1]) % int(found[2]))

def repeating(found):
    """0.1(6), 0.1\\overline{6} or 0.1666\\ldots as a fraction."""
    whole, *blocks = found.groups("")
    block = re.sub("[^0-9]", "", "".join(blocks))
    nines = (10 ** len(block) - 1) * 10 ** len(whole.partition(".")[2])
    value = Fraction("0" + whole) + Fraction(int(block), nines)
    return r"\frac{%d}{%d}" % value.as_integer_ratio()

def rows(found):
    """A matrix as a tuple of tuples, a vector as a tuple; cases, lines of equations as a list."""
    factor, kind, body = found.groups()
    lines = [line for line in re.split(r"\\\\(?:\[\w*\])?", body) if line.strip()]
    if kind[0] in "cag" and not re.search(r"&\s*[^=\s]", body):  # x &= 1
        return ",".join(lines).replace("&", "")
    if factor.strip():
        lines = ["&".join(f"{factor}({entry})" for entry in line.split("&")) for line in lines]
    vector = len(lines) == 1 or "&" not in body
    text = ",".join(lines if vector else [f"({line})" for line in lines]).replace("&", ",")
    return text if kind == "cases" else f"({text})"

# pattern => what it becomes (␣ a space): a template, or a function above; an indented line goes on
RULES = r"""
\\not= => \\ne␣
^\s*\^(.*)\^\s*$ => \1
([⁰¹²³⁴-⁾ⁿˣⁱ]+) => ^{\1}
([₀-₋ₙₓ]+) => _{\1}
_\{(\w)\} => _\1
([√∛]) *\(([^()]*)\) => \1{\2}
([√∛]) *([0-9.]+|[a-zA-Z]) => \1{\2}
√ => \\sqrt
∛ => \\sqrt[3]
# styling: 1,\!000 \left( \displaystyle $ \phantom{5}, \textbf{x} is \text{x}
, ?\\! ?(?=[0-9]{3}) =>
\\(?:left|right)\.|\\!|(?<!\\)\$|(?<!\\)\\[()\[\]]|\\(?:[hv]?phantom|label|tag)\*?\s*\{[^{}]*\} =>
\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|underline|tiny|small|[lL]arge|bf|rm|it|limits
    |therefore|because|implies|Rightarrow|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z]) =>
\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|emph|boldsymbol|bm|vec
    |hat|overrightarrow|operatorname)\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|\s([a-zA-Z])) => \\text{\1\2}
\\text\{\s*\} =>
(?<!\\)\\(?:[,;: ]|q?quad\b)|~|\s+ => ␣
# numbers: \frac12, 1 000, 1{,}000, 1'000, 3{,}14, 1,000, 1.234,56, 0,111, 1 1/2, 5 million, 0.1(6)
\\frac *(\\pi|[0-9a-zA-Z]) *(\\pi|[0-9a-zA-Z]) => \\frac{\1}{\2}
(?<![0-9]{4})(?<=[0-9])(?:\{,\}|[ '])(?=[0-9]{3}(?![0-9/])) =>
(?<=[0-9])\{,\}(?=[0-9]) => .
(^[^\w({\[]*|= *)([1-9][0-9]{0,2}),([0-9]{3})(?:,([0-9]{3}))?(?:,([0-9]{3}))?(?![0-9]|, *[0-9])
     => \1\2\3\4\5
^([0-9]{1,3})\.([0-9]{3})(?:\.([0-9]{3}))?,([0-9]{1,2})(?![0-9,]) => \1\2\3.\4
^([0-9]{1,3})\.([0-9]{3})\.([0-9]{3})(?![0-9.]) => \1\2\3
^([+-]?0),(?=[0-9]{3,}$) => \1.
(?<=[0-9]) *x *(?=10\^) => \\times
(?<![0-9.])([0-9]+) +([0-9]+) */ *([0-9]+) => (\1+\\frac{\2}{\3})
(?<=[0-9]) *(\\text\{)? *hundred\b => \\times10^{2}\1
(?<=[0-9]) *(\\text\{)? *thousand\b => \\times10^{3}\1
(?<=[0-9]) *(\\text\{)? *million\b => \\times10^{6}\1
(?<=[0-9]) *(\\text\{)? *billion\b => \\times10^{9}\1
([0-9]*\.[0-9]*)(?:\\(?:overline|bar) *\{?([0-9]{1,20})\}?|\(([0-9]{1,20})\)
    |(\\dot *\{?[0-9]\}?(?:[0-9]*\\dot *\{?[0-9]\}?)?)) => repeating
([0-9]*\.[0-9]*?)([0-9]{1,9}?)\2+ *\\ldots => repeating
([0-9]+) *\\bmod *\{?([1-9][0-9]*)\}?$ => remainder
^\(?0*([0-9A-F]+)\)?(?:_\{?|[ (]*(?:\\text\{)?[ (]*base )[ (}]*(?:\\text\{)? *(\w+)[ )}]*$ => base
# lists: and, or, \pm; (x,y) = (1,2), 5 = x
(?:, *)?\\text\{,? *(?:and|or|,) *\}|(?:, *)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) => ,
(^|[,=]|\\\{)([^,=()]*?)\\pm(?![a-z])([^,()]*?)(?=,|\\\}|$) => \1\2+\3,\2-\3
^\((\w+), *(\w+)\) *= *\(([^,()]+)[,;]([^,()]+)\)$ => \1=\3,\2=\4
^\((\w+), *(\w+), *(\w+)\) *= *\(([^,()]+)[,;]([^,()]+)[,;]([^,()]+)\)$ => \1=\4,\2=\5,\3=\6
^([0-9.+-]+) *= *([a-zA-Z])$ => \2=\1
# beside it: 5 \pmod{12}, percent, degrees, where n is odd, k \in \mathbb{Z}, (C) 12, Area: 5
(\\equiv.*)\\bmod => \1\\pmod
,? *\(? *\\pmod *\{?([0-9]+)\}? *\)? => \\text{mod^\1}
\\text\{ *(?:percent\w*|pct) *\}|\b(?:percent\w*|pct)\b|(?<!\\)% => \\%
\^ *\{? *\\circ *\}? * => ^{\\circ}
(?:\\text\{ *)?(?:\^\{\\circ\}|\bdegrees?\b) *(?:\\text\{ *)?C(?:elsius)?\b *\}? => \\text{celsius}
(?:\\text\{ *)?(?:\^\{\\circ\}|\bdegrees?\b) *(?:\\text\{ *)?F(?:ahrenheit)?\b *\}?
     => \\text{fahrenheit}
(?<=[0-9}]) *(?:\\text\{ *degrees? *\}|degrees?\b) => ^{\\circ}
([0-9]+) *\^\{\\circ\} *([0-9]+) *' *([0-9]+) *'' => (\1+\\frac{\2}{60}+\\frac{\3}{3600})^{\\circ}
([0-9]+) *\^\{\\circ\} *([0-9]+) *'(?!') => (\1+\\frac{\2}{60})^{\\circ}
^(.*[=0-9].*)\\approx.*$ => \1
\\approx => =
(?<=[^ ,])[, ]*(?:\\text\{ *)?\(?\b(?:where|for(?: all| any| every| each| *\})|exactly|only
    |approximately|in total|total|altogether)\b.*$ =>
(?<=[^ ,])(?: *,[, ]*\(?| *\(| *\\text\{ *for *\}) *[a-z](?:, *[a-z])* *\\in *(?:\\mathbb|\\text)? *
    \{?[ZNQ]\}?[^,]*$ =>
^(?:\\text\{)?\(?([A-J])\)?\}?$ => \1
^(?:\\text\{)?\(([A-J])\) *\}? *(?=[^ =(*/^+-]) => (\1)=
^(?:\\text\{)?([A-J])[.)]\}?  *(?=.) => (\1)=
^(\\text\{)?([A-J]): *(?=[a-zA-Z]) => (\2)=\1
^\\text\{([^{}:]{1,40}):? *\} *= *(?=.) => \1=
^\\text\{([^{}:]{1,40}): *\} *(?=.) => \1=
^\\text\{([^{}:]{1,40}): *([^{}]+)\}$ => \1=\2
^([A-Za-z][A-Za-z ]{0,20}): *(?=.) => \1=
^\\text\{[^{}]{0,40}\bis:? *\} *(?=.) =>
^([+-]?) *\\?([$€£¥₹]) *(?=[0-9.])(.*)$ => \1\3\\text{\2}
\b(?:square|sq\.?) +([a-z]+)\b => \1^2
\b([ap])\.m\b\.? => \1m
(?<=[0-9]) *\\mu *(?:\\text\{ *)?([a-zA-Z])\b *\}? => \\text{μ\1}
^\\text\{([0-9][^{}]*)\}$ => \1
\bcubic +([a-z]+)\b => \1^3
([a-z]{2,}) squared\b => \1^2
([a-z]{2,}) cubed\b => \1^3
[ ]*(?:\bper(?: an?)?\b|每) * => /
# plain text, matrices, {x : x > 2}, x \ne 5, ]2,5[, all reals
(?<![\\a-zA-Z])(pi|sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|theta|alpha|beta)
    (?![a-zA-Z]) => \\\1
\\sqrt *\(([^()]*)\) => \\sqrt{\1}
\{?([^{}\\]+)\\choose([^{}\\]+)\}? => \\binom{\1}{\2}
([^=,;&()\[\]]*?)\\begin\{([pbB]?(?:small)?matrix|array|cases|aligned|align\*?|gathered)\}
    (?:\{[lcr|]*\})?(.*?)\\end\{\2\}(?![\w^(\\]) => rows
\\\{ *[a-z] *[|:](.*)\\\}$ => \1
\\mathbb *\{?R\}? *(?:\\setminus|\\backslash|-) *\\\{([^,{}]+)\\\} => (-\\infty,\1)\\cup(\1,\\infty)
^([a-z]) *\\ne *([^,]+)$ => \1<\2,\1>\2
\\mathbb *\{?R\}? => (-\\infty,\\infty)
(^|\\cup *|\\in *|= *)\]([^\[\]]+)\[ => \1(\2)
(^|\\cup *|\\in *|= *)\]([^\[\]]+)\] => \1(\2]
(^|\\cup *|\\in *|= *)\[([^\[\]]+)\[ => \1[\2)
"""
FUNCTIONS = {"base": base, "remainder": remainder, "repeating": repeating, "rows": rows}

def rules(table):
    """[(pattern, what it becomes), ...]"""
    for line in table.strip().replace("\n    ", "").split("\n"):
        if not line.startswith("#"):
            pattern, new = line.split(" =>")
            new = new.strip().replace("␣", " ")
            yield re.compile(pattern, re.S), FUNCTIONS.get(new, new)

RULES = list(rules(RULES))
SYNONYMS = {alias: line.split("|")[0] for line in r"""
\emptyset|nosolution|nosolutions|norealsolution|norealsolutions|emptyset|theemptyset|\{\}|无解|空集
(-\infty,\infty)|allrealnumbers|allreals|anyrealnumber|allrealx|reals|全体实数|一切实数
\infty|infinity|positiveinfinity|+\infty
doesnotexist|dne|undefined|不存在
infinitelymany|infinitelymanysolutions|无数个|无穷多个
yes|是
no|否
""".split() for alias in line.split("|")}

@lru_cache(4096)
def clean(text):
    """LaTeX answer without styling and final full stop, with one way to write each thing."""
    text = SYMBOL.sub(lambda found: SYMBOLS.get(found[0], found[0]), text)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = text.translate(SCRIPTS).strip().rstrip(".,;:\\ ")
    while text[:1] == "{" and 0 not in depths(text)[:-1] and len(text) > 2:
        text = text[1:-1].strip()
    return SYNONYMS.get(squeeze(text).casefold().replace(" ", ""), text)

def squeeze(text):
    """Without \\text{} and spaces, but 1 8 and 32, 349 stay two numbers."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
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

# A unit, other ways to write it | the next one. What is counted contradicts nothing (5 apples may
# be 5 pieces). Any other word behind a number makes it another answer: 5 thirds.
UNITS = {word: unit.split()[0] for unit in r"""
    m meter metre 米 | cm centimeter centimetre 厘米 | mm millimeter millimetre 毫米 | dm decimeter 分米 |
    km kilometer kilometre 千米 公里 | nm nanometer | μm | μs | μg | in inch inche | ft foot feet | yd
    yard | mi mile | m^2 平方米 | cm^2 平方厘米 | km^2 平方千米 | dm^2 平方分米 | m^3 立方米 | cm^3 cc 立方厘米 | acre | g
    gram 克 | kg kilogram kilo 千克 公斤 | mg milligram | t ton tonne 吨 | lb pound | oz ounce | cup | l L
    liter litre 升 | ml mL milliliter 毫升 | gal gallon | s sec second 秒 | min minute 分钟 | h hr hour 小时
    时 | d day 天 日 | wk week 周 星期 | mo month 个月 月 | yr year 年 岁 | am | pm | mi/h mph | km/h kph kmh |
    Hz hertz | N newton 牛顿 牛 | J joule 焦耳 焦 | kJ kilojoule | W watt | kW kilowatt | V volt 伏 | A amp
    ampere | Ω ohm | F farad | C coulomb | T tesla | K kelvin | Pa pascal | kPa | atm | eV ev | cal
    calorie | kcal | erg | dyne | mol mole | M molar | bit | byte | celsius | fahrenheit | dollar $
    usd buck | cent ¢ | euro € eur | £ | ¥ | yuan 元 rmb 人民币 | yen | rupee ₹ | dime | nickel | penny
    pennie | mod | count unit square item piece apple orange banana cookie candy candie marble ball
    block toy book page pencil pen card coin stamp ticket bag box boxe bottle person people student
    child children man men woman women boy girl teacher friend adult player team member dog cat cow
    horse sheep egg chicken bird fish animal tree flower plant car bus buse truck bike house room
    chair table tile way time number integer solution root point goal vote term digit letter word
    side edge vertex vertice face diagonal triangle circle rectangle cube angle line segment path
    set subset element value case outcome combination permutation arrangement possibility
    possibilitie sequence game match round trip step question problem slice pizza cake pie cupcake
    glass glasse plate shirt hat color song photo picture radian rad old long tall wide high deep 个
    人 只 本 支 张 件 块 条 棵 名 位 次 种 元素
""".split("|") for word in unit.split() for word in (word, word + "s")}
ATOM = (r"(?:\\text\{(?:[^{}]|\{[^{}]*\})*\}|[a-zA-Z][a-zA-Z.]*|[¢$€£¥₹Ω\u4e00-\u9fff]+|/|\\cdot)"
        r"(?: *\^ *\{? *-?[0-9] *\}?)?")
UNIT = re.compile(rf"(.*?(?:[0-9)}}\]!]|\\pi|(?<=.)(?= *\\text)))[ (]*((?:{ATOM} *)+)\)?", re.S)
def split_unit(text):
    """`5\\text{ km}` -> ("5", "km"); the unit is "" if there is none."""
    found = UNIT.fullmatch(text.strip())
    if not found:
        mark = re.search(r"(\^\{\\circ\}|\\%)\s*$", text)
        return text, mark[1] if mark else ""
    value, tail = found[1], found[2].strip()
    unit = read_unit(tail)
    letter = re.match("[a-zA-Z](?![a-zA-Z])|mg$", tail)  # 5m is 5, but 2c is not 2, nor is 2mg
    plain = number(value) is not None and (tail in "msghl" or "/" in tail)
    return (text, "") if unit is None or letter and not plain else (value, unit)

def read_unit(text):
    """`kilometers per hour` or `km/h` -> "km/h"; None if a word in it is no unit."""
    text = re.sub(r"\\text|\\cdot|[{}() .\\]", " ", text)
    names = [UNITS.get(word) or UNITS.get(word.lower()) or word
             for word in re.findall(r"[^\W\d_]+|\S", text)]
    known = all(name in UNITS or not name.isalpha() for name in names)
    return "".join(names).replace("count", "") if known else None

def number(text):
    """Plain number -> exact Fraction; Decimal from 1e300 on, as digits are many; else None."""
    text = re.sub(r"^([+-]?)10\^", r"\g<1>1*10^", text)
    text = re.sub(r"(?<=[0-9.])(\\times|\\cdot|\*)10\^\{?([+-]?[0-9]{1,6})\}?$", r"e\2", text)
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?", text):
        value = Decimal(text)
        return Fraction(value) if abs(value.adjusted()) < 300 else value
    text = re.sub(r"^([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?[0-9]{1,99}/0*[1-9][0-9]{0,98}", text):
        return Fraction(text)
    return None

def same_number(a, b, tolerance=None):
    """Exactly equal, or close unless the exponent is huge."""
    return a == b or Decimal not in (type(a), type(b)) and close(a, b, tolerance)

def close(a, b, tolerance=None):
    """Equal to 6 decimals, like 1/3 and 0.333333; below 1e-3 relative (Math-Verify: 5e-7 is 0)."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= (tolerance or (5e-7 if size >= 1e-3 else 1e-6 * size)))


# ---- Computer algebra, in the worker process only ------------------------------------------------

@lru_cache(4096)
def algebra_equal(pair):
    """Two expressions, or two equations, which are equal if one is a multiple of the other."""
    from sympy import Eq
    a, b = map(parse, pair)
    if isinstance(a, Eq) and isinstance(b, Eq):
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
        point = next(points(a, b))
        a, b = a * b.subs(point), b * a.subs(point)
    agreed = same_everywhere(a, b)
    return (a - b).simplify() == 0 if agreed is None else agreed

def parse(text):
    """Math-Verify's parser, but with the case of letters kept."""
    from latex2sympy2_extended.latex2sympy2 import (ConversionConfig, NormalizationConfig,
                                                    latex2sympy)
    from sympy import I
    # units off: its list strips the letters c, d, h, o, t from the end, so that 2c would equal 2
    normal = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    value = latex2sympy(text, is_real=True, normalization_config=normal,
                        conversion_config=ConversionConfig(lowercase_symbols=False))
    return value.subs({s: I for s in value.free_symbols if s.name == "i"}).doit()

def points(a, b):
    """Values for all letters: positive, negative, mixed; no integers, at which much is equal."""
    from sympy import Rational
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for turn in range(8):
        yield {symbol: (-1) ** (turn >> (i % 3)) * Rational(31 + 17 * i + 7 * turn, 29)
               for i, symbol in enumerate(symbols)}

def same_everywhere(a, b):
    """Are two expressions equal wherever both are real? To 25 digits, but like decimals if one is a
    float (Math-Verify: all below 5e-7 are equal). None if that cannot be told."""
    from sympy import Float, Integral, Product, Sum
    numbers = a.is_number and b.is_number
    if a == b or numbers and (a.is_Rational and b.is_Rational or not (a.is_finite and b.is_finite)):
        return a == b
    if (a + b).has(Sum, Product, Integral) and not numbers:
        return None
    decimals = (a + b).has(Float)
    told = 0
    for point in points(a, b):
        x, y = a.subs(point).evalf(40), b.subs(point).evalf(40)
        if numbers or x.is_real and y.is_real:
            if not close(x, y, None if decimals else 1e-25 * max(abs(x), abs(y))):
                return False
            told += 1
    return True if told > 1 else None

def alarm(seconds):
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds)

def worker():
    """The child process: lines [seconds, [[gold, pred], ...]] in, lines [score, status] out. It
    ends when its input does, with its parent."""
    sys.stdout = sys.stderr  # what a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes: (10^9)! is to fail
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt
    for line in sys.stdin:
        seconds, pairs = json.loads(line)
        score, status = 0.0, "unparsable"
        try:
            alarm(seconds)
            for gold, pred in pairs:
                with suppress(Exception):  # on odd input the parser and SymPy raise nearly any type
                    score, status = max(score, float(compare(gold, pred, algebra_equal))), "ok"
        except KeyboardInterrupt:
            status = "timeout"
        alarm(0)
        with suppress(OSError):  # the parent has died, and so the input ends, too
            os.write(1, json.dumps([score, status]).encode() + b"\n")

class Worker:
    """Child process `python rewards.py --worker`, started on first use: computer algebra may never
    come back, and a process can be killed."""

    process = owner = None

    def ask(self, pairs, seconds):
        """(score, status) of [(gold, pred), ...] within `seconds` + 1; a process that hangs or dies
        is replaced."""
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
        start, line = time.monotonic(), b""
        late = threading.Timer(seconds + 1, self.process.kill)  # on Windows no pipe can be polled
        late.start()
        with suppress(OSError):  # it has just died
            self.process.stdin.write(json.dumps([seconds, pairs]).encode() + b"\n")
            line = self.process.stdout.readline()
        late.cancel()
        if line:
            return tuple(json.loads(line))
        self.stop()
        return 0.0, "timeout" if time.monotonic() - start > seconds else "error"

    def stop(self):
        if self.process:
            with self.process:  # closes its pipes and waits for its end
                self.process.kill()
        self.process = None


# ---- The functions to call -----------------------------------------------------------------------

def rg(response, name, config, entry):
    """What reasoning-gym's own scorer says of the last <answer>. (data.load refuses the datasets
    whose scorers evaluate it.)"""
    answer = last_answer(response)
    if not answer:
        return "no_answer"
    dataset = gym(name, json.dumps(config))
    with suppress(Exception):  # on odd text their scorers raise nearly any type
        return min(1.0, max(0.0, float(dataset.score_answer(answer, json.loads(entry)))))
    return "unparsable"

@lru_cache
def gym(name, config):
    import reasoning_gym
    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(config))

TASKS = {"chainsum": chainsum, "hops": chainsum, "add": add, "countdown": countdown,
         "tableqa": tableqa, "kk": kk, "qa": qa, "search": search, "math": math,
         "exact_box": exact_box, "exact_line": exact_line, "rg": rg}
# tasks whose answer, in its tags, is a right response
SAY_THE_ANSWER = "chainsum hops add tableqa kk qa math exact_box".split()

def judge(task, response, problem):
    """(score, status), or what `math` leaves to computer algebra."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; valid: {', '.join(TASKS)}")
    result = TASKS[task](response, **problem) if isinstance(response, str) else "unparsable"
    if isinstance(result, list):
        return result
    return (0.0, result) if isinstance(result, str) else (float(result), "ok")

def check_gold(task, problem):
    """None, or why no response can be right: the reference is graded as if it were a response."""
    if task not in TASKS:
        return f"there is no grader {task!r}, only {', '.join(TASKS)}"
    if task not in SAY_THE_ANSWER:
        return None
    golds = as_list(problem["answer"])
    text = ", ".join(map(str, golds)) if task == "tableqa" else str(golds[0])
    if task == "math":
        text = as_list(reduce_gold(golds[0]))[0]
    response = rf"<answer>{text}</answer>\boxed{{{text}}}"
    if TASKS[task] is chainsum:
        response = f"#{text}$"
    if judge(task, response, problem) != (1.0, "ok"):
        return f"no response can equal its reference {text[:60]!r}"
    return None

class Scorer(AbstractContextManager):
    """scorer([(task, response, problem), ...]) -> [(score, status), ...] in the same order, from
    any thread. Computer algebra, which only math may need, is spread over `workers` processes, at
    most `timeout` seconds for a response. In a batch full of bombs it gets a quarter of that after
    PATIENT time-outs, and after GIVE_UP the rest is marked "timeout" unseen."""

    PATIENT, GIVE_UP = 4, 16

    def __init__(self, workers=2, timeout=2):
        self.workers = [Worker() for _ in range(max(1, workers))]
        self.timeout, self.idle = timeout, SimpleQueue()
        for w in self.workers:
            self.idle.put(w)

    def __call__(self, items):
        results = [judge(*item) for item in items]
        late = []  # a list, as all threads add to it
        pool = ThreadPoolExecutor(len(self.workers))
        try:
            asked = [pool.submit(self.ask, r, late) if isinstance(r, list) else r for r in results]
            return [r if isinstance(r, tuple) else r.result() for r in asked]
        finally:
            pool.shutdown(cancel_futures=True)  # at Ctrl-C the rest is not graded first

    def ask(self, pairs, late):
        if len(late) >= self.GIVE_UP:
            return 0.0, "timeout"
        w = self.idle.get()
        try:
            result = w.ask(pairs, self.timeout if len(late) < self.PATIENT else self.timeout / 4)
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

SINGLE = Scorer(workers=1, timeout=4)

def grade(task, response, **problem):
    """(score in [0, 1], status) of one response; may be called in any thread."""
    return SINGLE([(task, response, problem)])[0]

def score(task, response, **problem):
    """Score in [0, 1] of one response; never raises on any response, and returns within 8 s."""
    return grade(task, response, **problem)[0]


if __name__ == "__main__" and "--worker" in sys.argv:
    worker()
