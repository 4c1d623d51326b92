"""Graders: facts from the test suites of Math-Verify, verl, PRIME, PRM800K, MATH, Qwen2.5-Math; then attacks.

Each comment names the failure that the row prevents. `pytest tests/test_rewards.py -m slow` runs the other bombs."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import rewards
from rewards import Scorer, grade, score

# (gold, [right], [wrong])
MATH = [
    # plain numbers are compared exactly, not as floats
    ("5", ["5", "5.", "5,", "05", "+5", "5.0", "(5)", "{5}", "$5$", r"5\ ", "x=5", r"\text{5}", r"\mathbf{5}"],
     ["-5", "50", "5 1", "x+5", "5x", "5+", "", "five"]),
    ("9007199254740993", ["9007199254740993"], ["9007199254740992"]),    # floats collide above 2^53
    ("1e400", ["1e400", "10^{400}"], ["1e401", "1e999999", "10^{401}"]),    # overflow to inf equals everything
    ("1e999999", ["10e999998"], ["1e999998"]),    # must not build the digits
    ("025", ["25", "025"], ["0.25", "250"]),    # AIME pads with zeros
    ("142.0", ["142", "142.00"], ["142.1", "1420"]),    # AMC golds are floats
    ("033", ["33", "+033"], ["3.3", "330"]),
    ("0", ["-0", "000", "0.0"], ["1e-7", "O", "a=0 and b=0"]),
    ("0.1", [".1", "0.10"], ["0.11", "1"]),
    ("0,111", ["0.111"], ["0.11"]),
    ("0.33", ["0.33"], ["0.333", "1/3"]),
    (r"\frac{1}{12}", ["0.0833333333333333", "1/12", r"\frac1{12}", r"\dfrac{1}{12}", r"\frac{2}{24}"],
     ["0.083", "12"]),
    (r"\frac13", ["0.333333", r"0.\overline{3}", "1/3", r"\tfrac13"], ["0.33", "0.3334", "3"]),
    (r"\frac{1}{6}", [r"0.1\overline{6}"], [r"0.\overline{16}"]),
    (r"-\frac{1}{2}", [r"\frac{-1}{2}", "-1/2", "-0.5", r"\frac{1}{-2}", "−1/2"], ["1/2", "-2"]),
    (r"\frac{11}{2}", ["5.5", r"5\frac12", "5 1/2"], ["5.51", "51/2"]),
    ("3/2", ["1 1/2", r"1\frac{1}{2}", "1.5"], ["11/2", "1/2"]),    # mixed numbers
    ("1000000", [r"1\,000\,000", "1 000 000", "1,000,000", "1{,}000{,}000", r"1,\!000,\!000", r"1, \!000, \!000",
     "1e6", "10^6"], ["1,000", "1,000,00", "100000"]),
    ("32349", ["32,349", r"32,\! 349"], ["32, 349"]),    # a list of two is not a number
    ("18", ["18", "$18$"], ["1 8", "81"]),
    ("8.7e8", ["870000000", r"8.7\times 10^8", r"8.7 \cdot 10^{8}", "8.7E+08"], ["8.7e9", "8.7"]),
    ("300000000", ["3e8", r"3\times10^8"], ["3e9"]),
    ("1024", ["2^{10}", "2**10", "2^10"], ["2^9", "210"]),    # unevaluated powers count
    ("5!", ["120"], ["24", "5"]),
    # numbers smaller than the rounding of Math-Verify are all equal there
    ("6.63e-34", [r"6.63\times10^{-34}", r"6.63 \cdot 10^{-34}"], ["1.05e-34", "6.63e-33", "0", "6.6e-34"]),
    ("10^{-20}", ["1e-20", r"\frac{1}{10^{20}}"], ["10^{-21}", "0"]),
    (r"\frac{1}{2004!}", [r"\frac{1}{2004!}"], [r"\frac{1}{2006!}"]),
    (r"\frac{1}{2^{99}}", ["2^{-99}"], [r"\frac{1}{2^{98}}"]),
    ("100!", [r"100\cdot 99!"], ["99!", "101!"]),
    # percents, units, currency
    (r"50\%", ["50", "0.5", "50%", "1/2", "50 percent", r"50\text{ percent}", "50 pct"], [r"0.5\%", "5", "5000"]),
    ("0.5", ["50%", "1/2", ".5"], ["50", "5%"]),    # PRIME forgives factors of 100
    ("50", [r"50\%"], ["0.5", "5000"]),
    (r"33\frac13\%", [r"33\frac{1}{3}", r"\frac{100}{3}"], ["33"]),
    ("10", [r"10\text{ units}", "10 dollars", r"\$10", r"\$10.00", "€10", r"10~\mathrm{m/s}", "10 cm^2", "10m"],
     [r"100\text{ units}", "10c", "10x"]),
    (r"15\mbox{ cm}^2", ["15", r"15\text{ cm}^2", "15 cm^2"], ["15 km^2", "152"]),
    ("5 km", ["5", "5 km", r"5\text{ km}"], ["5 cm", "50 km"]),
    (r"\$32,\!348", ["32348", r"\$32,348"], ["32,349"]),
    (r"9\pi \text{ cm}^2", [r"9\pi", "9π"], ["9", r"3\pi"]),
    ("5", [r"5 \text{ apples}"], ["5 apples and 3 oranges", r"5 \text{ apples and } 3 \text{ oranges}"]),
    ("2c", ["2c", r"2\cdot c"], ["2", "2d", "2x"]),    # Math-Verify's units include the letters c, d, t
    ("2", ["2"], ["2c", "2x", r"\frac{1+\sqrt5}{2}", "2 or 3", "1 < 2"]),
    (r"n \text{ odd}", [r"n\text{ odd}"], [r"n \text{ even}"]),    # words after a letter are no unit
    (r"25^\circ C", ["25", r"25^\circ C."], ["52"]),
    # what math-verify does not read
    ("2", [r"\lg 100", r"\log_{10} 100", r"\sqrt[3]{8}", r"\sqrt4"], [r"\lg 10"]),
    ("-1", [r"e^{i\pi}", "i^2"], ["1"]),
    (r"\frac{\sqrt3}{2}", [r"\sin 60^\circ", r"\cos 30^{\circ}"], [r"\sin 30^\circ"]),
    (r"30^\circ", ["30", r"\frac{\pi}{6}", "30°", "30 degrees"], [r"60^\circ", r"\frac{\pi}{3}"]),
    (r"\frac\pi6", [r"30^\circ", r"\frac{\pi}{6}"], [r"\frac\pi3"]),
    ("5", [r"\color{red}{5}", r"\textcolor{blue}{5}", r"{\color{red}5}", r"\underline{5}", r"\displaystyle 5"], []),
    ("A", [r"\textbf{(A)}\ 5", "(A)", r"\text{A}", "A.", "A) 5", "(A) 5"], [r"\textbf{(B)}\ 5", "B", "a", "5"]),
    ("5", [r"\textbf{(A)}\ 5"], [r"\textbf{(A)}\ 6"]),
    (r"\text{(C)}", ["C", "(C)"], ["(D)", "c"]),
    ("7", [r"7 \pmod{12}", r"7 \bmod 12", r"x \equiv 7 \pmod{12}"], [r"5 \pmod{12}"]),
    (r"7\pmod{12}", ["7", r"7 \pmod {12}"], [r"7\pmod{5}", "5"]),
    ("10", [r"\binom{5}{2}", r"{5 \choose 2}"], [r"\binom{5}{1}"]),
    # letters keep their case, words are words
    ("a", ["a"], ["A", "b"]),
    (r"\pi r^2", [r"r^2\pi"], [r"\pi R^2", r"\pi r"]),
    (r"\frac{N}{2}", ["N/2"], [r"\frac{n}{2}"]),
    ("ABC", ["ABC"], ["CAB", "abc"]),    # products commute, triangles do not
    ("ab", ["ba"], ["AB", "a"]),
    ("E", [r"\text{E}"], ["e", "D"]),
    ("e", [r"\mathrm{e}"], ["2.718"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", "evelyn"], ["Carla", "Eve"]),
    (r"\text{Yes}", ["yes"], ["no"]),
    ("listen", ["Listen", r"\text{listen}"], ["silent"]),    # words are no products of letters
    (r"1-\frac{1}{\mathrm{e}}", ["1-1/e", r"\frac{e-1}{e}", "1-e^{-1}"],
     [r"1+\frac{1}{\mathrm{e}}"]),    # cut at \mathrm
    # sets, tuples, intervals, times, ratios, bases
    (r"\{1,3\}", [r"\{3,1\}", "1,3", r"1 \text{ and } 3", r"\left\{1,3\right\}"], ["(1,3)", "[1,3]", r"\{1,2\}"]),
    ("(1,3)", [r"\left( 1, 3\right)", r"\langle1,3\rangle", "(1.0,3)"], [r"\{1,3\}", "(3,1)", "[1,3]", "(1,3,5)"]),
    ("[0,1)", [r"\left[0,1\right)", r"0\le x<1"], ["[0,1]", "(0,1)", r"\{0,1\}"]),
    (r"(2,\infty)", ["x>2", "2<x", r"x \in (2,+\infty)"], ["x<2", r"x\ge 2", r"[2,\infty)"]),
    ("1,2", ["2,1", "1, 2", r"x=1 \text{ or } x=2", r"1,\ 2"], ["1", "2", "1,3", "1,2,3"]),
    ("19, 46, and 82", [r"19, 46, \text{ and } 82", "82,19,46"], ["19, 46", "21, 36, and 82"]),
    (r"1\pm\sqrt{2}", [r"1+\sqrt2,1-\sqrt2"], [r"1+\sqrt2"]),
    (r"\pm 3", ["3,-3"], ["3"]),
    ("12:30", ["12:30", r"12\!:\!30"], ["10:25", "6:15", "12:31"]),    # ratios 12/30 = 10/25
    ("12:30 PM", ["12:30"], ["12:30 AM"]),
    ("2:5", ["2 : 5"], ["4:10", "5:2"]),
    ("7:32", [r"S_{MBCN}:S=7:32"], ["32:7"]),
    ("10110_2", ["10110_{2}", "(10110)_2"], ["10110", "10110_3", "22"]),
    ("10110", ["10110"], ["10110_2"]),
    (r"\infty", [r"+\infty"], [r"-\infty", "1/0", r"\frac{1}{0}"]),
    ("1/0", [], ["1/0", r"\frac{1}{0}"]),    # zoo equals zoo
    (r"(-\infty,0)\cup(1,\infty)", [r"(1,\infty)\cup(-\infty,0)"], [r"(-\infty,0]\cup(1,\infty)"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
      r"\begin{pmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{pmatrix}"], [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "1,2,3,4"]),
    # algebra
    ("x+1", ["1+x"], ["x+2", "x", "y+1"]),
    ("(x+1)^2", ["x^2+2x+1"], ["x^2+1"]),
    (r"\sqrt{12}", [r"2\sqrt3"], [r"3\sqrt2", "12"]),
    (r"\frac{x}{7}+\frac{2}{7}", [r"\frac{x+2}{7}"], [r"\frac{x+2}{14}"]),
    (r"\tan^2(y)+1", [r"\sec^2(y)"], [r"\sec(y)"]),
    ("(a+5)(b+2)", ["(b+2)(a+5)"], ["(+5)(b+2)"]),    # oat strips "a" as a unit
    ("3s^2", ["3*s**2"], ["3s"]),
    ("7(x+3)(x-3)", ["7*(x - 3)*(x + 3)"], ["7(x-3)"]),
    ("20", ["10-10i^2"], ["0"]),
    ("y=2x+1", ["2x+1", "y = 1+2x"], ["y=2x"]),
    ("x=1", ["1", "x = 1"], ["y=1"]),
    ("2x+4y-3=0", [r"y=-\frac{1}{2}x+\frac{3}{4}"], ["0"]),
    ("5x-7y+11z+4=0", ["-5x+7y-11z-4=0"], ["x+y-z+2=0"]),    # DAPO takes what follows the last "="
    ("f(2)<f(1)<f(4)", ["f(2) < f(1) < f(4)"], ["f(1)<f(2)<f(4)"]),
    (r"\pi", ["π"], ["3.14", "3.14159"]),
    (r"\sqrt2", ["1.41421356"], ["1.41"]),
    (r"\boxed{18}", ["18"], ["19"]),    # gold with its own box
]

REST = [    # (task, response, problem, score)
    # chainsum: everything after '#' is the answer, and the end must be reached
    ("chainsum", "#7$", {"answer": "7"}, 1), ("chainsum", ">301917#7$", {"answer": "7"}, 1),
    ("chainsum", ">301917#8$", {"answer": "7"}, 0), ("chainsum", "#7", {"answer": "7"}, 0),
    ("chainsum", "7$", {"answer": "7"}, 0), ("chainsum", "#7$ ", {"answer": "7"}, 0),
    ("chainsum", "#7$\n", {"answer": "7"}, 0),
    ("chainsum", "#1#7$", {"answer": "7"}, 0), ("chainsum", "#77$", {"answer": "7"}, 0),
    ("chainsum", "#٧$", {"answer": "7"}, 0),
    # where the answer is: last box anywhere, balanced, terminated
    ("math", r"<think>\boxed{42}</think> done", {"answer": "42"}, 1),
    ("math", r"\boxed{41} no, \boxed{42}", {"answer": "42"}, 1),
    ("math", r"\boxed{42} or \boxed{41}", {"answer": "42"}, 0),
    ("math", r"\boxed{42} so \boxed{4", {"answer": "42"}, 0),
    ("math", r"\fbox{42}", {"answer": "42"}, 1), ("math", r"\boxed{\boxed{42}}", {"answer": "42"}, 1),
    ("math", "42", {"answer": "42"}, 0),
    ("math", r"\boxed{\frac{1}{2}} is \$0.5", {"answer": "0.5"}, 1), ("math", r"\boxed {42}", {"answer": "42"}, 1),
    ("math", r"$\boxed{1}$ and $\boxed{2}$", {"answer": "1,2"}, 1),
    ("math", r"\boxed{1}, then we see \boxed{2}", {"answer": "1,2"}, 0),
    ("math", r"\boxed{\text{5 or 6}}", {"answer": "5"}, 0), ("math", r"\boxed{2}", {"answer": ["1", "2"]}, 1),
    ("math", r"\boxed{3}", {"answer": ["1", "2"]}, 0), ("math", r"\boxed{142}", {"answer": 142.0}, 1),
    ("math", "42", {"answer": "42", "acpo_compat": True}, 1),    # with no box the paper grades the whole response
    ("math", r"\boxed{%s}" % "+".join("1" * 17), {"answer": "17", "acpo_compat": True}, 0),    # 33 characters > 30
    ("math", r"\boxed{%s}" % "+".join("1" * 17), {"answer": "17"}, 1),
    # countdown: exact, once each, nothing but arithmetic
    *[("countdown", f"<answer>{e}</answer>", {"numbers": [1, 2, 3], "target": 9}, s) for e, s in [
        ("(1+2)*3", 1), ("3*(2+1)", 1), ("\n(1 + 2)\n* 3 ", 1), ("-(-1-2)*3", 1), ("+3*(1+2)", 1),
        ("(1+2)*3=9", 0), ("9", 0), ("3*3", 0), ("(1+2)*3*1", 0), ("(1+2)×3", 0), ("(1+2)*٣", 0), ("(01+2)*3", 0),
        ("(1+2)3", 0), ("", 0), ("(1+2)*3.0", 0), ("(1+2)*3#", 0), ("1+2", 0), ("(1+2)*3,", 0), ("9**9**9**9", 0),
        ("1/0", 0), ("(" * 250 + "9", 0), ("-" * 290 + "9", 0), ("9" * 10000, 0), ("__import__('os')", 0),
        ("(1+2)*3\x00", 0)]],
    ("countdown", "<answer>1+2+00</answer>", {"numbers": [1, 2, 0], "target": 3}, 0),
    ("countdown", "<answer>7//2*3</answer>", {"numbers": [7, 2, 3], "target": 9}, 0),
    ("countdown", "<answer>2**3</answer>", {"numbers": [2, 3], "target": 8}, 0),
    ("countdown", "<answer>3.5*2</answer>", {"numbers": [3, 5, 2], "target": 7}, 0),    # TinyZero's regex sees 3, 5, 2
    ("countdown", "<answer>3+1/(400*500)</answer>", {"numbers": [3, 1, 400, 500], "target": 3}, 0),    # within 1e-5
    ("countdown", "<answer>8/(3-8/3)</answer>", {"numbers": [8, 3, 8, 3], "target": 24}, 1),    # fails in floats
    ("countdown", "<answer>1+1</answer><answer>(1+2)*3</answer>", {"numbers": [1, 2, 3], "target": 9}, 1),
    ("countdown", r"\boxed{(1+2)*3}", {"numbers": [1, 2, 3], "target": 9, "format": "boxed"}, 1),
    ("countdown", r"\boxed{(1+2)*3}", {"numbers": [1, 2, 3], "target": 9}, 0),
    # tableqa: in order, percent sign ignored, commas inside one text value
    *[("tableqa", f"<answer>{a}</answer>", {"answer": gold}, s) for a, gold, s in [
        ("13.3%", [13.3], 1), ("13.3 percent", [13.3], 1), ("50%", [0.5], 0), ("0.484368", [0.484368], 1),
        ("0.48437", [0.484368], 1), ("0.4844", [0.484368], 0), ("1,234", [1234], 1), ("$1,234.0", ["1,234"], 1),
        ("men", ["men"], 1), ("women", ["men"], 0), ("men", ["women"], 0), ("Men.", ["men"], 1),
        ("5, 7", [5, 7], 1), ("7, 5", [5, 7], 0), ("5 and 7", [5, 7], 1), ("5; 7; 9", [5, 7, 9], 1),
        ("5, 6, and 7", [5, 6, 7], 1), ("5", [5, 7], 0), ("5, 7, 9", [5, 7], 0), ("", [5], 0),
        (r"\boxed{12}", [12], 1), ("1,234, 5", [1234, 5], 1), ("five", [5], 0), ("1e999999", [5], 0),
        ("Professional, scientific and technical services", ["professional, scientific and technical services"], 1),
        ("a, b and c; 4", ["a, b and c", 4], 1), ("men and women", ["men", "women"], 1),
        ("['men', 'women']", ["men", "women"], 1)]],
    ("tableqa", "13.3", {"answer": [13.3]}, 0),
    # kk: everybody once, with the right role
    *[("kk", f"<answer>{a}</answer>", {"answer": {"Ann": "knight", "Bob": "knave"}}, s) for a, s in [
        ("Ann is a knight, Bob is a knave", 1), ("Bob is a knave, and Ann is a knight.", 1),
        ("(1) Ann is a knight\n(2) Bob is a knave", 1), ("1. Ann is a knight (2) Bob is a knave", 1),
        ("ann: Knight; BOB: Knave", 1), ('{"Ann": "knight", "Bob": "knave"}', 1),
        ("Ann is a knave, Bob is a knight", 0), ("Ann is a knight", 0),
        ("Ann is a knight, Bob is a knave, Bob is a knight", 0),
        ("Ann is a knight, Ann is a knave, Bob is a knave", 0), ("Ann is a knight, Bob is not a knave", 0),
        ("Ann is a knight or a knave, Bob is a knave", 0), ("Ann is a knight, Bob is a knave, Cy is a knave", 0),
        ("", 0), ("Ann is a knight, Ann is a knight, Bob is a knave", 0), ("knight, knave", 0),
        ("Thus **Ann**: Knight, **Bob**: Knave!", 1), ("Ann is a knight or Bob is a knave", 0),
        ("It is false that Ann is a knight, Bob is a knave", 0)]],
    ("kk", "Ann is a knight, Bob is a knave", {"answer": {"Ann": "knight", "Bob": "knave"}}, 0),
    # qa: SQuAD
    *[("qa", f"<answer>{a}</answer>", {"answer": g, "metric": m}, s) for a, g, m, s in [
        ("The Eiffel Tower!", ["Eiffel tower"], "em", 1), ("Eiffel", ["Eiffel tower"], "em", 0),
        ("x", ["y", "X"], "em", 1), ("the", [""], "em", 0), ("the", ["the"], "em", 1), ("", [""], "f1", 0),
        ("Eiffel", ["Eiffel tower"], "f1", 2 / 3), ("b", ["a b", "b c d"], "f1", 1),
        ("yes", ["yes indeed"], "f1", 0), ("yes it is", ["yes"], "f1", 0), ("yes", ["Yes."], "f1", 1),
        ("a x x", ["x"], "f1", 2 / 3)]],
    ("qa", "Eiffel tower", {"answer": ["Eiffel tower"]}, 0), ("qa", "<answer>Paris</answer>", {"answer": "Paris"}, 1),
]

INJECTIONS = ["__import__('os').system('touch {f}')", "exec(\"open('{f}','w')\")", "open('{f}','w')",
              r"\text{{exec(open('{f}','w'))}}",
              "eval(compile(\"open('{f}','w')\",'','exec'))",
              "[c for c in ().__class__.__base__.__subclasses__()] or open('{f}','w')"]
DOS = ["9^{9^{9^{9}}}", "2^{2^{50}}", "(10^8)!", r"\prod_{i=1}^{10^9} i", r"\sum_{i=1}^{10^{10}} \sin i",
       r"\binom{10^9}{10^8}",
       "(x+y+z)^{500}", r"\gcd(10^{10^8},3)", r"\lfloor 10^{10^{10}} \rfloor",
        "e^{e^{e^{e^{e}}}}", r"3^{10^{15}} \mod 7",
       r"\sin(10^{10^{9}})", r"\int_0^1 x^{x^{x^x}} e^{x^2} dx",
        "(" * 39 + "1" + ")" * 39, r"\lim_{x\to\infty} x^{x^{x}}"]
CHEAP = ["9" * 100_000, "{" * 100_000, r"\boxed{" * 14_000, r"\frac{1}{" * 38 + "1" + "}" * 38, " " * 100_000 + "1",
 "1+" * 490 + "1",
         "4\x002", "\ud800", "\u202e42", "\u200b42", "٤٢", "４２", "1e9999999",
          "$" * 900, "\\\\" * 400, "x=" * 300 + "1", "a," * 400]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(workers=1) as s:
        yield s


@pytest.mark.parametrize("gold, right, wrong", MATH, ids=[f"{i}-{row[0]}" for i, row in enumerate(MATH)])
def test_math_table(scorer, gold, right, wrong):
    preds = right + wrong
    got = scorer([("math", rf"So the answer is $\boxed{{{p}}}$.", {"answer": gold}) for p in preds])
    assert {p: s for p, (s, _) in zip(preds, got)} == {p: float(p in right) for p in preds}


@pytest.mark.parametrize("task, response, problem, expected", REST)
def test_other_tasks(task, response, problem, expected):
    assert score(task, response, **problem) == pytest.approx(expected)


@pytest.mark.parametrize("task, response, problem, status", [
    ("math", r"\boxed{1}", {"answer": "2"}, "ok"), ("math", "1", {"answer": "1"}, "no_answer"),
    ("math", r"\boxed{}", {"answer": "1"}, "no_answer"), ("math", r"\boxed{+*}", {"answer": "x+1"}, "unparsable"),
    ("math", None, {"answer": "1"}, "unparsable"),
    ("kk", "<answer>?</answer>", {"answer": {"A": "knight"}}, "unparsable"),
    ("countdown", "<answer>a</answer>", {"numbers": [1], "target": 1}, "unparsable"),
    ("qa", "x", {"answer": "x"}, "no_answer"),
    ("chainsum", "#", {"answer": "1"}, "no_answer"), ("tableqa", "x", {"answer": [1]}, "no_answer")])
def test_status_tells_why(task, response, problem, status):
    """A run whose rewards are all zero must be able to say whether the policy or the grader is at fault."""
    assert grade(task, response, **problem)[1] == status


def test_unknown_names_raise():
    """A typo in the task is the programmer's error, and must not look like a wrong response."""
    with pytest.raises(ValueError, match="countdown"):
        score("countdwn", "x")
    with pytest.raises(ValueError, match="em or f1"):
        score("qa", "<answer>x</answer>", answer="x", metric="rouge")


# ---------------------------------------------------------------- attacks
def test_no_code_runs(tmp_path):
    """PRIME and reasoning-gym hand model text to sympy.parse_expr, which is eval."""
    f = tmp_path / "owned"
    for attack in (a.format(f=f) for a in INJECTIONS):
        for problem in [("math", {"answer": "x"}),
        ("countdown", {"numbers": [1], "target": 1}),
                        ("tableqa", {"answer": [1]}), ("kk", {"answer": {"A": "knight"}}), ("qa", {"answer": "y"})]:
            assert score(problem[0], rf"<answer>{attack}</answer> \boxed{{{attack}}}", **problem[1]) == 0
    assert not f.exists()


def check_in_time(task, response, **problem):
    start = time.monotonic()
    value = score(task, response, **problem)
    assert type(value) is float and 0 <= value <= 1
    assert time.monotonic() - start < 8
    return value


@pytest.mark.parametrize("text", CHEAP, ids=range(len(CHEAP)))
def test_long_or_odd_text_is_quick(text):
    score("math", r"\boxed{y+x}", answer="x+y")    # the worker's start is not measured
    start = time.monotonic()
    for response in (text, rf"\boxed{{{text}}}", f"<answer>{text}</answer>"):
        for task, problem in [("math", {"answer": "42"}), ("countdown", {"numbers": [42], "target": 42}),
        
                              ("tableqa", {"answer": [42]}), ("kk", {"answer": {"A": "knight"}}),
                              ("chainsum", {"answer": "4"}),
                              ("qa", {"answer": ["42"], "metric": "f1"})]:
            assert score(task, response, **problem) == 0
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("text", DOS[:2] + [pytest.param(t, marks=pytest.mark.slow) for t in DOS[2:]])
def test_bombs_time_out(text):
    assert check_in_time("math", rf"\boxed{{{text}}}", answer="x+1") == 0
    assert score("math", r"\boxed{1+x}", answer="x+1") == 1


EVERY = [("math", {"answer": "x+1"}), ("math", {"answer": ["1,2", "(3,4)"]}),
("math", {"answer": "7", "acpo_compat": True}),
         ("countdown", {"numbers": [1, 2], "target": 3}),
         ("countdown", {"numbers": [1, 2], "target": 3, "format": "boxed"}),
         ("chainsum", {"answer": "7"}), ("tableqa", {"answer": [1, "a"]}),
         ("qa", {"answer": ["a b"]}),
         ("qa", {"answer": ["a b"], "metric": "f1"}), ("kk", {"answer": {"A": "knight"}})]
TOKENS = r"\frac { } \sqrt ^ _ 1 2 x + - ( ) , \{ \} \text \pi = < [ ] \cup ! % \circ \left & : and \overline".split()
LATEX = st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join)
UNICODE = st.text(st.characters(), max_size=60)    # includes lone surrogates


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(UNICODE, LATEX), st.sampled_from(EVERY),
       st.sampled_from(["{}", r"\boxed{{{}}}", "<answer>{}</answer>", r"<answer>\boxed{{{}}}</answer>"]))
def test_any_text_gives_a_score_in_time(text, task, frame):
    check_in_time(task[0], frame.format(text), **task[1])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.randoms())
def test_countdown_accepts_what_it_should(numbers, rng):
    """Random expression trees over the numbers, valued independently in integers, score 1; with a number changed, 0."""
    text, value = str(numbers[0]), numbers[0]
    for n in numbers[1:]:
        op = rng.choice("+-*")
        text, value = f"({text} {op} {n})", {"+": value + n, "-": value - n, "*": value * n}[op]
    assert score("countdown", f"<answer>{text}</answer>", numbers=numbers, target=value) == 1
    assert score("countdown", f"<answer>{text}</answer>", numbers=numbers, target=value + 1) == 0
    assert score("countdown", f"<answer>{text}</answer>", numbers=numbers[:-1] + [numbers[-1] + 1], target=value) == 0


# ---------------------------------------------------------------- threads and processes
def test_other_threads_grade_too():
    """math-verify's alarm raises outside the main thread; verl swallowed that, and scored 0 for everything."""
    got = {}
    def run(i):
        got[i] = [grade("math", rf"\boxed{{{i}+x}}", answer=f"x+{i + (j >> i) % 2}") for j in range(40)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert got == {i: [(float((j >> i) % 2 == 0), "ok") for j in range(40)] for i in range(4)}    # and not another's


def test_callers_alarm_survives():
    """math-verify in process resets SIGALRM, so a caller's own alarm would never ring."""
    rang = []
    old = signal.signal(signal.SIGALRM, lambda *a: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        score("math", r"\boxed{x+1}", answer="1+x")
        time.sleep(0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rang


BATCH = [("math", rf"\boxed{{x+{i % 7}}}", {"answer": f"{i % 5}+x"}) for i in range(40)] + [("chainsum", "#7$",
 {"answer": "7"})]
EXPECTED = [(float(i % 7 == i % 5), "ok") for i in range(40)] + [(1.0, "ok")]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batch_keeps_order(workers):
    with Scorer(workers=workers) as s:
        assert s(BATCH) == EXPECTED
        assert s([]) == []


def test_hung_worker_is_replaced():
    """A stopped process ignores even its own alarm: only killing it helps, and only the response it had gets 0."""
    with Scorer(workers=1, timeout=2) as s:
        s(BATCH[:1])
        hung = s.workers[0].process
        os.kill(hung.pid, signal.SIGSTOP)
        assert s(BATCH) == [(0.0, "timeout")] + EXPECTED[1:]
        assert hung.poll() is not None and s.workers[0].process.pid != hung.pid


def test_crashed_worker_is_replaced():
    with Scorer(workers=1, timeout=6) as s:
        s(BATCH[:1])
        crashed = s.workers[0].process
        bomb = [("math", r"\boxed{2^{2^{50}}}", {"answer": "x"})]
        threading.Timer(0.5, crashed.kill).start()
        assert s(bomb + BATCH) == [(0.0, "error")] + EXPECTED
        s.workers[0].process.kill()    # dies between two batches: nobody's response suffers
        s.workers[0].process.wait()
        assert s(BATCH) == EXPECTED


def test_bomb_in_a_batch_costs_only_itself():
    with Scorer(workers=2, timeout=3) as s:
        s(BATCH)
        bomb = [("math", r"\boxed{9^{9^{9^9}}}", {"answer": "x"})]
        assert s(BATCH[:3] + bomb + BATCH[3:]) == EXPECTED[:3] + [(0.0, "timeout")] + EXPECTED[3:]


def test_close_leaves_no_process():
    s = Scorer(workers=2)
    s(BATCH)
    processes = [w.process for w in s.workers]
    s.close()
    for p in processes:
        with pytest.raises(ProcessLookupError):    # neither running nor a zombie
            os.kill(p.pid, 0)


def test_worker_reports_that_it_cannot_start(monkeypatch):
    """Without math-verify every answer that needs it would be 0 for ever: say so instead."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Scorer(workers=1) as s, pytest.raises(RuntimeError, match="math-verify"):
        s(BATCH[:1])


def test_rewards_imports_neither_torch_nor_sympy():
    """The worker must start in under a second, and the trainer must not pay for SymPy unless it grades math."""
    code = "import sys, rewards; print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))"
    root = os.path.dirname(os.path.abspath(rewards.__file__))
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
