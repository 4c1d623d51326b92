r"""A response in, a score in [0, 1] out: verifiable rewards that a policy cannot cheat, hang or break.

    score("math", r"... so \boxed{\frac12}", answer="0.5")                           -> 1.0
    grade("countdown", "<answer>(1+2)*8</answer>", numbers=[1, 2, 8], target=24)      -> (1.0, "ok")

Tasks and their problem fields:
    chainsum   answer="7"                     the default task: `...#7$`, with $ the end-of-sequence character
    add        answer="123"                   last \boxed{}, exact integer
    countdown  numbers=[..], target=24        last <answer> (format="boxed": last box), every number exactly once
    tableqa    answer=[..]                    last <answer>, all values in this order
    kk         answer={"Ann": "knight", ..}   last <answer>, every person exactly once
    qa         answer=[any, of]               last <answer>, metric="em" or "f1" (SQuAD, HotpotQA)
    math       answer="1/2" or [any, of]      last \boxed{} or \fbox{} anywhere in the response

Status: "ok" an answer was found and compared (right or wrong), "no_answer", "unparsable", "timeout", "error". Count
them: a grader that fails silently looks just like a policy that never learns. Each grader below returns the score, or
the status that explains the 0. No model output is evaluated as Python.
"""
import ast
import json
import logging
import operator
import os
import re
import select
import signal
import string
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from queue import SimpleQueue

MAX_CHARS, MAX_DEPTH = 1000, 40  # longer or deeper math answers are unparsable, so that parsing stays fast


# ---- Where the answer is ---------------------------------------------------------------------------------------------

def last_boxed(text, join=False):
    """Content of the last \\boxed{...} or \\fbox{...}; None if there is none or its brace never closes (truncated).
    With `join`, of several that stand together: `\\boxed{1} and \\boxed{2}` is 1,2."""
    head = r"\\(?:boxed|fbox)\s*\{"
    between = r"(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|and|or){0,40}"
    *before, tail = re.split(head, re.sub(r"\}" + between + head, ",", text) if join else text)
    depth = 1
    for token in re.finditer(r"\\.|[{}]", tail, re.S) if before else ():  # \{ is no brace in TeX
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return tail[:token.start()]

def last_answer(text):
    """Content of the last <answer>...</answer>, without a \\boxed around it, at most 2000 characters; "" if none."""
    inner = text.rpartition("</answer>")[0].rpartition("<answer>")
    inner = inner[2].partition("</answer>")[0] if inner[1] else ""
    box = last_boxed(inner)
    return (inner if box is None else re.sub(TEXT, r"\1", box)).strip()[:2000]


# ---- Procedural tasks ------------------------------------------------------------------------------------------------

def chainsum(response, answer):
    found = re.fullmatch(r"[^#]*#([^$]*)\$", response)
    return found[1] == str(answer) if found else "no_answer"

def add(response, answer):
    box = last_boxed(response)
    if box is None:
        return "no_answer"
    return int(box) == int(answer) if re.fullmatch(r"\s*[+-]?[0-9]{1,100}\s*", box) else "unparsable"

def countdown(response, numbers, target, format="answer"):
    """1 iff the expression uses every number exactly once and equals the target exactly. Only + - * / ( ) and integers
    get through: `9**9**9` (would hang eval), `//`, `3.5` (would pass for 3 and 5), `1+2=3` are unparsable."""
    text = (last_boxed(response) or "").strip() if format == "boxed" else last_answer(response)
    if not text:
        return "no_answer"
    if len(text) > 300 or not re.fullmatch(r"[0-9+\-*/() \t\r\n]+", text) or re.search(r"\b0[0-9]|//|\*\*", text):
        return "unparsable"
    try:
        value = exact_value(ast.parse(" ".join(text.split()), mode="eval").body)
    except ZeroDivisionError:
        return False
    except (SyntaxError, KeyError, RecursionError, MemoryError):  # malformed, no arithmetic, too deep for ast.parse
        return "unparsable"
    return value == target and Counter(map(int, re.findall("[0-9]+", text))) == Counter(numbers)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.UAdd: operator.pos, ast.USub: operator.neg}

def exact_value(node):
    """Value of an arithmetic syntax tree as a Fraction; KeyError if there is more in it than integers and + - * /."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operands = [exact_value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return OPERATORS[type(getattr(node, "op", None))](*operands)


# ---- Tables, puzzles, questions --------------------------------------------------------------------------------------

def tableqa(response, answer):
    """HiTab: numbers within 1e-5 (percent signs are ignored: 13.3% is 13.3), text equal up to case; all, in order."""
    text, golds = last_answer(response).strip(" ,;\n"), answer if isinstance(answer, (list, tuple)) else [answer]
    if not text:
        return "no_answer"
    parts = re.split(r"([,;\n]\s*and\b|[,;\n]|\band\b)", text)  # value, separator, value, ...
    ends = {0}  # where the golds so far may end; one may span several parts: "1,234", "technical, and other services"
    for gold in golds:
        ends = {j + 2 for i in ends for j in range(i, min(len(parts), i + 40), 2)
                if same_cell("".join(parts[i:j + 1]), str(gold))}
    return len(parts) + 1 in ends

def same_cell(text, gold):
    text, gold = (re.sub(r"\s+", " ", s.lower()).strip(" .'\"`[]{}") for s in (text, gold))
    a, b = (number(re.sub(r"[()$%\\]|percent", "", s).strip()) for s in (text, gold))
    return text == gold or None not in (a, b) and same_number(a, b, 1e-5)

def kk(response, answer):
    """`Ann is a knight, Bob: knave` in any order; each person exactly once, nobody else, no contradiction."""
    text, gold = last_answer(response).casefold(), sorted((n.casefold(), r.casefold()) for n, r in answer.items())
    if not text:
        return "no_answer"
    names = "|".join(re.escape(name) for name, _ in reversed(gold))
    claim = rf"(?<!\w)({names})[\s\"'*]*(?:\bis\b|:|=|->)?[\s\"'*]*(?:an?\s|the\s)?\s*(knight|knave)(?!\w)"
    claims, rest = re.findall(claim, text), re.findall(r"[^\W\d_]+", re.sub(claim, " ", text))
    if not claims or set(rest) - {"and", "so", "thus", "hence", "therefore"}:  # `not`, `or`, or about somebody else
        return "unparsable"
    return sorted(claims) == gold

def qa(response, answer, metric="em"):
    """Exact match or token F1 after SQuAD normalisation, best over golds; yes/no get no partial credit (HotpotQA)."""
    if metric not in ("em", "f1"):
        raise ValueError(f"unknown metric {metric!r}; choose em or f1")
    pred = squad_normal(last_answer(response))
    golds = [squad_normal(str(g)) for g in ([answer] if isinstance(answer, str) else answer)]
    if not pred:  # "the" normalises to nothing, and nothing must not equal nothing
        return "no_answer"
    return pred in golds if metric == "em" else max((token_f1(pred, g) for g in golds), default=0)

def squad_normal(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

def token_f1(pred, gold):
    if pred != gold and {"yes", "no", "noanswer"} & {pred, gold}:
        return 0.0
    a, b = pred.split(), gold.split()
    return 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


# ---- Math: first text, then exact numbers, then computer algebra -----------------------------------------------------

def math(response, answer, acpo_compat=False):
    """The score or status, or the pairs [(gold, pred), ...] of which computer algebra has to find one equal.
    acpo_compat: the ACPO paper's rule (arXiv 2606.22570), for comparison: with no box the whole response is the answer,
    and one of more than 30 characters is right only if identical. So bare text scores, and long right answers do not.
    """
    golds = [str(g) for g in (answer if isinstance(answer, (list, tuple)) else [answer])]
    pred = last_boxed(response)
    if acpo_compat:
        pred = response if pred is None else pred
        if len(pred) > 30:
            return pred in golds
    if not pred or not pred.strip():
        return "no_answer"
    zero = r"/\s*\{?0(?![.0-9])|frac\{[^{}]*\}\{0\}"  # 1/0 does not even equal 1/0
    if len(pred) > MAX_CHARS or max(depths(pred)) > MAX_DEPTH or re.search(zero, pred):
        return "unparsable"
    chain = last_boxed(response, join=True) or pred
    if acpo_compat or len(chain) > MAX_CHARS or not chain.endswith(pred):
        chain = pred
    found = []
    for gold in (last_boxed(g, join=True) or g for g in golds):
        several = re.search(r",|;|\band\b|\bor\b", gold)  # values, which may stand in several boxes
        for candidate in {pred, chain} if several else {pred}:
            found += compare(gold, candidate)
    return True in found or found or False

REPLACE = {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
           "°": r"^\circ ", "²": "^2", "³": "^3", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "€": "",
           "∩": r"\cap ", "∈": r"\in ", "½": r"\frac{1}{2}", "£": "", "¥": "", "，": ",", "（": "(", "）": ")", "**": "^",
           r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\degree": r"^\circ ", r"\lbrace": r"\{",
           r"\rbrace": r"\}", r"\langle": "(", r"\rangle": ")", r"\lg": r"\log_{10}", r"\varnothing": r"\emptyset"}
TEXT = (r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|emph|boldsymbol|bm)"
        r"\s*\{([^{}]*)\}")
STYLE = (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|underline|tiny|small|large|Large|"
         r"bf|rm|it|limits|(?:text)?color\s*\{[^{}]*\})(?![a-zA-Z])|\\!|\\(?=\$)|\$|\\[()\[\]]")
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in [
    ("|".join(re.escape(old) + r"(?![a-zA-Z])" * old[1:].isalpha() for old in REPLACE), lambda m: REPLACE[m[0]]),
    (r"\\frac\s*(\\pi|[0-9a-zA-Z])\s*(\\pi|[0-9a-zA-Z])", r"\\frac{\1}{\2}"),  # \frac12, \frac\pi6
    (r"(?<![0-9.])([0-9]{1,3})((?:(?:\\[,;: !]|~|\{,\}|,\s?\\!|\s)\s*[0-9]{3})+)(?![0-9/])",  # 1\,000 1{,}000 1 000
     lambda m: m[1] + re.sub(r"[^0-9]", "", m[2])),
    (STYLE, ""),
    (r"\{?([^{}\\]+)\\choose([^{}\\]+)\}?", r"\\binom{\1}{\2}"),
    (TEXT, lambda m: r"\text{%s}" % m[1] if re.search("[a-zA-Z]", m[1]) and len(m[1].strip()) > 1 else m[1]),
    (r"\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?=\W*$))?", r"^\\circ "),
    (r"([0-9]*\.[0-9]*)\\overline\{([0-9]{1,20})\}", lambda m: m[1] + m[2] * 20),
    (r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"(\1+\\frac{\2}{\3})"),  # 1 1/2
    (r"(?:,\s*)?\\text\{,?\s*(?:and|or)\s*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
    (r"(?<!\\)\\(?:[,;: ]|q?quad\b)|~|\s+", " "),
    (r"\\text\{\s*(?:percent\w*|pct)\s*\}|\b(?:percent\w*|pct)\b|(?<!\\)%", r"\\%"),
]]
SHORT_UNITS = set("mm cm dm m km in ft yd mi mg g kg lb lbs oz ml l s sec secs min mins h hr hrs am pm a.m p.m mph kph "
                  "km/h m/s hz pa ev rad deg".split())
UNIT = r"[a-zA-Z][a-zA-Z.\s/]*(?:\^\s*\{?-?[0-9]\}?)?"
UNITS = re.compile(r"(?:(?<=[0-9})\]])|(?<=\\pi))\s*\\text\{\s*(%s)\}(?:\^\s*\{?-?[0-9]\}?)?$|"
                   r"(?<=[0-9})\]])(?:\s+|(?=[a-z]{2}))(%s)$" % (UNIT, UNIT))
NOT_PROSE = set("arcsin arccos arctan sinh cosh tanh sqrt frac matrix pmatrix bmatrix vmatrix array cases".split())

def clean(text):
    """LaTeX answer without styling, dollars, final full stop; \\text{} only around words. After the lists of Hendrycks'
    strip_string and Math-Verify's normalisation."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".,;:\\ ")
    while text[:1] == "{" and bracket(text) and len(text) > 2:
        text = text[1:-1].strip()
    return text

def remarks(text):
    """`(A) 5`, `5 km`, `5 \\pmod{12}` -> ("5", [unit, choice, modulus]). Without a remark is right too, but two answers
    with different ones are not equal."""
    text, *modulus = re.split(r"\s*\(?\\[pb]mod\b\s*", text)
    unit, word = UNITS.search(text), ""
    if unit:
        rest, word = text[:unit.start()].strip(), re.sub(r"\^.*", "", unit[1] or unit[2]).strip().rstrip(".").lower()
        short, plain = word in SHORT_UNITS, number(rest) is not None
        if unit[1] or short and (len(word) > 1 or plain) or len(word) > 3 and " " in unit[0]:  # 5 m, but not x^2 m
            text = rest
        word = "" if plain and not short else word  # 5 apples may be 5 pieces, but a number if odd is not it if even
    choice = re.fullmatch(r"\(?([A-Z])(?:\)\s*|[.:]\s+|$)(.*)", re.sub(r"^\\text\{([^{}]*)\}", r"\1 ", text).strip())
    text = choice[2] or text if choice else text
    return text, [word, choice[1] if choice else "", modulus[0].strip("{} )") if modulus else ""]

def depths(text):
    """Bracket depth after each character."""
    return list(accumulate((c in "{([") - (c in "})]") for c in text))

def bracket(text):
    """( [ or { (for \\{) if one pair of brackets holds the whole text: (1,2), but not (1,2),(3,4); else ""."""
    text = text.lstrip("\\")
    return text[0] if text[:1] in list("([{") and 0 not in depths(text)[:-1] else ""

def number(text):
    """Plain number -> exact Decimal or Fraction, else None. 1e400 is never expanded to its digits."""
    text = re.sub(r"^([+-]?)(?:([0-9.]+)(?:\\times|\\cdot|\*))?10\^\{?([+-]?[0-9]{1,6})\}?$",
                  lambda m: f"{m[1]}{m[2] or 1}e{m[3]}", text)
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", text):
        text = text.replace(",", "")
    text = re.sub(r"^([+-]?0),(?=[0-9]+$)", r"\1.", text)  # 0,111
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?", text):
        return Decimal(text)
    text = re.sub(r"^([+-]?)\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?[0-9]{1,99}/0*[1-9][0-9]{0,98}", text):
        return Fraction(text)

def same_number(a, b, tolerance=None):
    """Exactly equal, or close if one of them is written with decimals (unless its exponent is huge)."""
    decimals = any(isinstance(v, Decimal) and v != v.to_integral_value() for v in (a, b))
    small = all(isinstance(v, Fraction) or abs(v.adjusted()) < 300 for v in (a, b))
    return a == b or decimals and small and close(Fraction(a), Fraction(b), tolerance)

def close(a, b, tolerance=None):
    """Equal to 6 decimals, like 1/3 and 0.333333; below 1e-3 to a relative 1e-6 (Math-Verify: 5e-7 is 0)."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= (tolerance or (5e-7 if size >= 1e-3 else 1e-6 * size)))

def compare(gold, pred):
    """[True] if equal, [] if not, or the pairs [(gold, pred), ...] of which computer algebra has to find one equal."""
    if gold.strip() == pred.strip():
        return [True]
    (gold, gold_remarks), (pred, pred_remarks) = remarks(clean(gold)), remarks(clean(pred))
    if any(g and p and g != p for g, p in zip(gold_remarks, pred_remarks)):
        return []
    if gold_remarks[1] and pred_remarks[1]:  # the same choice, whatever is written behind it
        return [True]
    heads = [re.match(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*(?:=|\\in(?![a-z])|\\equiv)\s*", s) for s in (gold, pred)]
    plain = [not re.search(r"=|\\in(?![a-z])", s) for s in (gold, pred)]
    same_head = all(heads) and heads[0][1] == heads[1][1]  # x = 5 is 5, but x = 5 is not y = 5
    gold, pred = (s[h.end():] if h and (p or same_head) else s for s, h, p in zip((gold, pred), heads, reversed(plain)))

    percents = [s.endswith(r"\%") for s in (gold, pred)]  # 50\% is 50 and 0.5, but 50 is not 0.5
    gold, pred = (re.sub(r"\s*\\%$", "", s) for s in (gold, pred))
    pairs = [(gold, pred)]
    if percents[0] != percents[1]:
        pairs.append((r"\frac{%s}{100}" % gold, pred) if percents[0] else (gold, r"\frac{%s}{100}" % pred))
    if r"^\circ" in gold + pred:  # 30^\circ is 30 and \pi/6, but inside \sin only \pi/6
        degrees = [r"\cdot\frac{\pi}{180}"] + [""] * (not re.search(r"\\(sin|cos|tan|cot|sec|csc)", gold + pred))
        pairs = [(gold.replace(r"^\circ", unit), pred.replace(r"^\circ", unit)) for unit in degrees]
    return [equal or pair for pair in pairs if (equal := decide(*pair)) is not False]

def decide(gold, pred):
    """True, False, or None where it takes computer algebra. Rules for what Math-Verify would get wrong."""
    a, b = (re.sub(r"\\text\{([^{}]*)\}", r"\1", s).strip() for s in (gold, pred))
    a, b = (re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", s) for s in (a, b))  # but 1 8 and 32, 349 stay two numbers
    if not a or not b or a == b:
        return bool(a) and a == b
    x, y = number(a), number(re.sub(r"(?<=[0-9])[msghl]$", "", b))  # 5m is 5; but 2c is not 2
    if None not in (x, y):
        return same_number(x, y)
    bases = [re.fullmatch(r"\(?0*([0-9A-F]+)\)?_\{?([0-9]{1,2})\}?", s) for s in (a, b)]
    if any(bases):  # 10110_2 is not 10110
        return all(bases) and bases[0].groups() == bases[1].groups()
    if ":" in a and ":" in b:  # part by part: the time 12:30 is neither 10:25 nor 6:15
        a, b = ([number(part) or part for part in s.rpartition("=")[2].split(":")] for s in (a, b))
        return a == b
    if "," in a and {bracket(a), bracket(b)} in ({"{", "("}, {"{", "["}):  # a set is neither a tuple nor an interval
        return False
    if all(re.fullmatch(r"[a-zA-Z]|[A-Z]{2,}", s) for s in (a, b)):  # a is not A; ABC is an order, not a product
        return False
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", gold + " " + pred)
    if r"\text" in gold + pred or not NOT_PROSE.issuperset(words):  # "5 apples and 3 oranges" is not 5
        return a.casefold() == b.casefold()


# ---- Computer algebra, in the worker process only --------------------------------------------------------------------

def algebra_equal(gold, pred):
    """Math-Verify's parser and comparison, but with the case of letters kept, and numbers compared by same_value."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import get_last_eq
    from sympy import Expr, I
    # units off: its list strips the letters c, d, h, o, t from the end, so that 2c would equal 2
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    options = dict(is_real=not (should_treat_as_complex(gold) or should_treat_as_complex(pred)),
                   normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))
    a, b = (latex2sympy(get_last_eq(normalize_latex(s, normal)), **options) for s in (gold, pred))  # a = b = c is c
    if all(isinstance(v, Expr) and not v.is_Matrix for v in (a, b)):
        x, y = (v.subs({s: I for s in v.free_symbols if s.name == "i"}).doit() for v in (a, b))
        if x.is_number and y.is_number:
            return same_value(x, y)
    return verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)

def same_value(a, b):
    """Two SymPy numbers to 25 digits; but like decimals if one is a float (Math-Verify: all below 5e-7 are equal)."""
    from sympy import Float
    if a == b or a.is_Rational and b.is_Rational or False in (a.is_finite, b.is_finite):
        return a == b
    decimals, a, b = a.has(Float) or b.has(Float), a.evalf(40), b.evalf(40)
    return close(a, b, None if decimals else 1e-25 * max(abs(a), abs(b)))

def worker():
    """The child process: lines [seconds, [[gold, pred], ...]] in, lines [score, status] out."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes; (10^9)! is to fail, not to fill memory
    for line in sys.stdin:
        seconds, pairs = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends this process, should the parent not live to kill it
        score, status = 0.0, "unparsable"
        for gold, pred in pairs:
            with suppress(Exception):  # on odd input the parser and SymPy raise nearly every type
                score, status = max(score, float(algebra_equal(gold, pred))), "ok"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([score, status]), file=out, flush=True)

class Worker:
    """Child process `python rewards.py --worker`, started on first use. Math-Verify's alarm works only in main threads,
    and some answers (2^{2^{50}}) never come back: so a process, which can be killed."""

    def __init__(self):
        self.process = self.owner = None

    def ask(self, pairs, seconds):
        """(score, status) of [(gold, pred), ...] within `seconds`; one that hangs or dies is killed and replaced."""
        if self.owner != os.getpid():  # a forked child must not read its parent's answers
            self.process, self.owner = None, os.getpid()
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], bufsize=0,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            start_new_session=True)  # Ctrl-C is for the parent alone
            if self.talk([("x+1", "1+x")], 60) != (1.0, "ok"):  # imports everything before the clock starts
                self.stop()
                raise RuntimeError("the worker of math-verify does not start: pip install 'math-verify>=0.9'")
        return self.talk(pairs, seconds)

    def talk(self, pairs, seconds):
        with suppress(BrokenPipeError):  # if it has just died, there will be nothing to read
            self.process.stdin.write(json.dumps([seconds, pairs]).encode() + b"\n")
        poll = select.poll()  # select.select cannot watch descriptors above 1023
        poll.register(self.process.stdout, select.POLLIN)
        in_time = poll.poll(seconds * 1000)
        line = self.process.stdout.readline() if in_time else b""
        if not line:
            self.stop()
        return tuple(json.loads(line)) if line else (0.0, "error" if in_time else "timeout")

    def stop(self):
        if self.process:
            with self.process:  # closes its pipes and waits for its end
                self.process.kill()
        self.process = None


# ---- The functions to call -------------------------------------------------------------------------------------------

TASKS = {"chainsum": chainsum, "add": add, "countdown": countdown, "tableqa": tableqa, "kk": kk, "qa": qa, "math": math}

def judge(task, response, problem):
    """(score, status), or what `math` leaves to computer algebra."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; valid: {', '.join(TASKS)}")
    result = TASKS[task](response, **problem) if isinstance(response, str) else "unparsable"
    if isinstance(result, list):
        return result
    return (0.0, result) if isinstance(result, str) else (float(result), "ok")

class Scorer(AbstractContextManager):
    """scorer([(task, response, problem), ...]) -> [(score, status), ...] in the same order, from any thread. Computer
    algebra, which only math may need, is spread over `workers` processes, at most `timeout` seconds for a response."""

    def __init__(self, workers=2, timeout=6):
        self.workers, self.timeout, self.idle = [Worker() for _ in range(max(1, workers))], timeout, SimpleQueue()
        for w in self.workers:
            self.idle.put(w)

    def __call__(self, items):
        results = [judge(*item) for item in items]
        hard = [i for i, result in enumerate(results) if isinstance(result, list)]
        with ThreadPoolExecutor(len(self.workers)) as pool:
            for i, result in zip(hard, pool.map(self.ask, [results[i] for i in hard])):
                results[i] = result
        return results

    def ask(self, pairs):
        w = self.idle.get()
        try:
            return w.ask(pairs, self.timeout)
        finally:
            self.idle.put(w)

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
