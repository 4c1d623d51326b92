"""Graders: facts from the test suites of Math-Verify, verl, PRIME, PRM800K, MATH, Qwen2.5-Math, and
attacks. Each kind of answer has right and wrong siblings; a comment names the failure it prevents.

`pytest tests/test_rewards.py -m slow` sets off the other bombs."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from rewards import Scorer, check_gold, grade, reduce_gold, score  # noqa: E402

# (reference, [right], [wrong])
MATH = [
    # numbers: exact, as floats collide above 2^53; 1e999999 is never expanded to its digits
    ("5",
     ["5", "5.", "5,", "05", "+5", "5.0", "(5)", "{5}", "$5$", r"5\ ", "x=5",
      r"\text{5}", r"\mathbf{5}", r"5 \text{ apples}", r"\color{red}{5}", r"\textcolor{blue}{5}",
      r"{\color{red}5}", r"\underline{5}", r"\displaystyle 5", r"\textbf{(A)}\ 5"],
     ["-5", "50", "5 1", "x+5", "5x", "5+", "", "five", "5 apples and 3 oranges",
      r"5 \text{ apples and } 3 \text{ oranges}", r"\textbf{(A)}\ 6"]),
    ("9007199254740993", ["9007199254740993"], ["9007199254740992"]),
    ("1e400", ["1e400", "10^{400}"], ["1e401", "1e999999", "10^{401}"]),
    ("1e999999", ["10e999998"], ["1e999998"]),
    ("025", ["25", "025"], ["0.25", "250"]),
    ("142.0", ["142", "142.00"], ["142.1", "1420"]),
    ("033", ["33", "+033"], ["3.3", "330"]),
    ("0", ["-0", "000", "0.0"], ["1e-7", "O", "a=0 and b=0"]),
    ("0.1", [".1", "0.10"], ["0.11", "1"]),
    ("0,111", ["0.111"], ["0.11"]),
    ("0.33", ["0.33"], ["0.333", "1/3"]),
    (r"\frac{1}{12}",
     ["0.0833333333333333", "1/12", r"\frac1{12}", r"\dfrac{1}{12}", r"\frac{2}{24}"],
     ["0.083", "12"]),
    (r"\frac13", ["0.333333", r"0.\overline{3}", "1/3", r"\tfrac13"], ["0.33", "0.3334", "3"]),
    (r"\frac{1}{6}", [r"0.1\overline{6}"], [r"0.\overline{16}"]),
    (r"-\frac{1}{2}", [r"\frac{-1}{2}", "-1/2", "-0.5", r"\frac{1}{-2}", "−1/2"], ["1/2", "-2"]),
    (r"\frac{11}{2}", ["5.5", r"5\frac12", "5 1/2"], ["5.51", "51/2"]),
    ("3/2", ["1 1/2", r"1\frac{1}{2}", "1.5"], ["11/2", "1/2"]),
    ("1000000",
     [r"1\,000\,000", "1 000 000", "1,000,000", "1{,}000{,}000", r"1,\!000,\!000",
      r"1, \!000, \!000", "1e6", "10^6"],
     ["1,000", "1,000,00", "100000"]),
    ("32349", ["32,349", r"32,\! 349"], ["32, 349"]),
    ("18", ["18", "$18$"], ["1 8", "81"]),
    ("8.7e8", ["870000000", r"8.7\times 10^8", r"8.7 \cdot 10^{8}", "8.7E+08"], ["8.7e9", "8.7"]),
    ("300000000", ["3e8", r"3\times10^8"], ["3e9"]),
    ("1024", ["2^{10}", "2**10", "2^10"], ["2^9", "210"]),
    ("5!", ["120"], ["24", "5"]),
    # tiny: below the rounding of Math-Verify all are equal there
    ("6.63e-34",
     [r"6.63\times10^{-34}", r"6.63 \cdot 10^{-34}"],
     ["1.05e-34", "6.63e-33", "0", "6.6e-34"]),
    ("10^{-20}", ["1e-20", r"\frac{1}{10^{20}}"], ["10^{-21}", "0"]),
    (r"\frac{1}{2004!}", [r"\frac{1}{2004!}"], [r"\frac{1}{2006!}"]),
    (r"\frac{1}{2^{99}}", ["2^{-99}"], [r"\frac{1}{2^{98}}"]),
    ("100!", [r"100\cdot 99!"], ["99!", "101!"]),
    # percents and units: PRIME forgives factors of 100; the letters c, d, t are units elsewhere
    (r"50\%",
     ["50", "0.5", "50%", "1/2", "50 percent", r"50\text{ percent}", "50 pct"],
     [r"0.5\%", "5", "5000"]),
    ("0.5", ["50%", "1/2", ".5"], ["50", "5%"]),
    ("50", [r"50\%"], ["0.5", "5000"]),
    (r"33\frac13\%", [r"33\frac{1}{3}", r"\frac{100}{3}"], ["33"]),
    ("10",
     [r"10\text{ units}", "10 dollars", r"\$10", r"\$10.00", "€10", r"10~\mathrm{m/s}", "10 cm^2",
      "10m", r"\binom{5}{2}", r"{5 \choose 2}"],
     [r"100\text{ units}", "10c", "10x", r"\binom{5}{1}"]),
    (r"15\mbox{ cm}^2", ["15", r"15\text{ cm}^2", "15 cm^2"], ["15 km^2", "152"]),
    ("5 km", ["5", "5 km", r"5\text{ km}"], ["5 cm", "50 km"]),
    (r"\$32,\!348", ["32348", r"\$32,348"], ["32,349"]),
    (r"9\pi \text{ cm}^2", [r"9\pi", "9π"], ["9", r"3\pi"]),
    ("2c", ["2c", r"2\cdot c"], ["2", "2d", "2x"]),
    ("2",
     ["2", r"\lg 100", r"\log_{10} 100", r"\sqrt[3]{8}", r"\sqrt4"],
     ["2c", "2x", r"\frac{1+\sqrt5}{2}", "2 or 3", "1 < 2", r"\lg 10"]),
    (r"n \text{ odd}", [r"n\text{ odd}"], [r"n \text{ even}"]),
    (r"25^\circ C", ["25", r"25^\circ C."], ["52"]),
    # not read by math-verify: functions, degrees, styling, choices, moduli
    ("-1", [r"e^{i\pi}", "i^2"], ["1"]),
    (r"\frac{\sqrt3}{2}", [r"\sin 60^\circ", r"\cos 30^{\circ}"], [r"\sin 30^\circ"]),
    (r"30^\circ", ["30", r"\frac{\pi}{6}", "30°", "30 degrees"], [r"60^\circ", r"\frac{\pi}{3}"]),
    (r"\frac\pi6", [r"30^\circ", r"\frac{\pi}{6}"], [r"\frac\pi3"]),
    ("A",
     [r"\textbf{(A)}\ 5", "(A)", r"\text{A}", "A.", "A) 5", "(A) 5"],
     [r"\textbf{(B)}\ 5", "B", "a", "5"]),
    (r"\text{(C)}", ["C", "(C)"], ["(D)", "c"]),
    ("7", [r"7 \pmod{12}", r"7 \bmod 12", r"x \equiv 7 \pmod{12}"], [r"5 \pmod{12}"]),
    (r"7\pmod{12}", ["7", r"7 \pmod {12}"], [r"7\pmod{5}", "5"]),
    ("a", ["a"], ["A", "b"]),
    (r"\pi r^2", [r"r^2\pi"], [r"\pi R^2", r"\pi r"]),
    (r"\frac{N}{2}", ["N/2"], [r"\frac{n}{2}"]),
    ("ABC", ["ABC"], ["CAB", "abc"]),
    ("ab", ["ba"], ["AB", "a"]),
    ("E", [r"\text{E}"], ["e", "D"]),
    ("e", [r"\mathrm{e}"], ["2.718"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", "evelyn"], ["Carla", "Eve"]),
    (r"\text{Yes}", ["yes"], ["no"]),
    ("listen", ["Listen", r"\text{listen}"], ["silent"]),
    (r"1-\frac{1}{\mathrm{e}}",
     ["1-1/e", r"\frac{e-1}{e}", "1-e^{-1}"],
     [r"1+\frac{1}{\mathrm{e}}"]),
    (r"\{1,3\}",
     [r"\{3,1\}", "1,3", r"1 \text{ and } 3", r"\left\{1,3\right\}"],
     ["(1,3)", "[1,3]", r"\{1,2\}"]),
    ("(1,3)",
     [r"\left( 1, 3\right)", r"\langle1,3\rangle", "(1.0,3)"],
     [r"\{1,3\}", "(3,1)", "[1,3]", "(1,3,5)"]),
    ("[5]", ["5", "[5]"], ["[6]", "[5,5]"]),
    ("[0,1)", [r"\left[0,1\right)", r"0\le x<1"], ["[0,1]", "(0,1)", r"\{0,1\}"]),
    (r"(2,\infty)", ["x>2", "2<x", r"x \in (2,+\infty)"], ["x<2", r"x\ge 2", r"[2,\infty)"]),
    ("1,2", ["2,1", "1, 2", r"x=1 \text{ or } x=2", r"1,\ 2"], ["1", "2", "1,3", "1,2,3"]),
    ("19, 46, and 82", [r"19, 46, \text{ and } 82", "82,19,46"], ["19, 46", "21, 36, and 82"]),
    (r"1\pm\sqrt{2}", [r"1+\sqrt2,1-\sqrt2"], [r"1+\sqrt2"]),
    (r"\pm 3", ["3,-3"], ["3"]),
    ("12:30", ["12:30", r"12\!:\!30"], ["10:25", "6:15", "12:31"]),
    ("12:30 PM", ["12:30"], ["12:30 AM"]),
    ("2:5", ["2 : 5"], ["4:10", "5:2"]),
    ("f(1:2)", ["f(1 : 2)"], ["f(2:1)", "1:2", "[1:2"]),
    ("7:32", ["S_{MBCN}:S=7:32"], ["32:7"]),
    ("10110_2", ["10110_{2}", "(10110)_2"], ["10110", "10110_3", "22"]),
    ("10110", ["10110"], ["10110_2"]),
    (r"\infty", [r"+\infty"], [r"-\infty", "1/0", r"\frac{1}{0}"]),
    ("1/0", [], ["1/0", r"\frac{1}{0}"]),
    (r"(-\infty,0)\cup(1,\infty)", [r"(1,\infty)\cup(-\infty,0)"], [r"(-\infty,0]\cup(1,\infty)"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
      r"\begin{pmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{pmatrix}"],
     [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "1,2,3,4"]),
    ("x+1", ["1+x"], ["x+2", "x", "y+1"]),
    ("(x+1)^2", ["x^2+2x+1"], ["x^2+1"]),
    (r"\sqrt{12}", [r"2\sqrt3"], [r"3\sqrt2", "12"]),
    (r"\frac{x}{7}+\frac{2}{7}", [r"\frac{x+2}{7}"], [r"\frac{x+2}{14}"]),
    (r"\tan^2(y)+1", [r"\sec^2(y)"], [r"\sec(y)"]),
    ("(a+5)(b+2)", ["(b+2)(a+5)"], ["(+5)(b+2)"]),
    ("3s^2", ["3*s**2"], ["3s"]),
    ("7(x+3)(x-3)", ["7*(x - 3)*(x + 3)"], ["7(x-3)"]),
    ("20", ["10-10i^2"], ["0"]),
    ("y=2x+1", ["2x+1", "y = 1+2x"], ["y=2x"]),
    ("x=1", ["1", "x = 1"], ["y=1"]),
    ("2x+4y-3=0", [r"y=-\frac{1}{2}x+\frac{3}{4}"], ["0"]),
    ("5x-7y+11z+4=0", ["-5x+7y-11z-4=0"], ["x+y-z+2=0"]),
    ("f(2)<f(1)<f(4)", ["f(2) < f(1) < f(4)"], ["f(1)<f(2)<f(4)"]),
    (r"\pi", ["π"], ["3.14", "3.14159"]),
    (r"\sqrt2", ["1.41421356"], ["1.41"]),
    (r"\boxed{18}", ["18"], ["19"]),
    # letters and words: letters keep their case, products commute but words and triangles do not
    # structure: a set is no tuple, an interval no list, a time no ratio
    # algebra: DAPO takes what follows the last =; oat strips `a` as a unit
    # words behind a number: only known units are units; thirds, million and squared make it
    # another answer
    ("5",
     [r"5 \text{ apples}", r"5 \text{ students}", r"5\text{ ways}", "5 units", r"5\ \text{cm}",
      r"5 \mathrm{~cm}"],
     ["5 cubed", r"5 \text{ dozen}", r"5\text{ halves}", r"5 \text{ factorial}",
      r"5 \text{ million}", "5 pi", "2 pi", r"5 \text{ times } 2", r"5 \text{ hundred}",
      r"5 \text{ or less}", r"5 \text{ pairs of } 2", "5i", r"5\text{ percent of } 20",
      r"5 \text{ more}", r"5\text{ squared}", r"5 \text{ tenths}", r"\text{minus } 5", r"5\sqrt{}",
      "5e", "five"]),
    ("5000000", [r"5 \text{ million}", "5 million", r"5\times 10^6"], ["5"]),
    (r"\$5",
     ["5", r"5 \text{ dollars}", r"\$5.00", r"\$ 5", "5 USD"],
     [r"5 \text{ cents}", "5¢", "€5", "£5", r"5 \text{ euros}", "₹5"]),
    (r"3 \text{ hours}",
     ["3", "3 h", "3 hr", r"3\text{ hrs}"],
     [r"3\text{ minutes}", r"3 \text{ days}", "3 s", r"30 \text{ hours}", r"3 \text{ km}"]),
    (r"60 \text{ km/h}",
     ["60", r"60 \text{ kilometers per hour}", "60 km/h", "60 kph"],
     [r"60 \text{ mph}", r"60\text{ m/s}", r"60 \text{ km}"]),
    (r"9.8 \text{ m/s}^2",
     ["9.8", r"9.8\ \mathrm{m/s^2}"],
     [r"9.8\text{ m/s}", r"9.8 \text{ ft/s}^2"]),
    (r"25^\circ \text{C}",
     ["25", r"25^\circ C", r"25 \text{ degrees Celsius}", "25℃", r"25\,^\circ\mathrm{C}"],
     [r"25^\circ \text{F}", "25℉", r"25 \text{ K}", r"25 \text{ degrees Fahrenheit}"]),
    ("12",
     ["12个", "12元", "12人", r"12\text{米}", r"12 \text{ 厘米}", "12 cm", "12本"],
     ["12万", "12百"]),
    (r"16 \text{ cm}^2",
     [r"16 \text{ square centimeters}", r"16 \text{ sq cm}", "16 cm^2", "16",
      r"16\text{平方厘米}", r"16\text{ cm squared}"],
     [r"16\text{ cm}", r"16 \text{ cm}^3", r"16 \text{ m}^2"]),
    (r"2\sqrt{3} \text{ cm}", [r"2\sqrt3", r"2\sqrt{3}\ cm"], ["2", r"2\sqrt3 \text{ m}"]),
    ("3x", ["3x"], ["3", r"3 \text{ m}"]),
    ("2mg", ["2mg"], ["2"]),
    # names: k=2, n=45 is not k=45, n=2; f(2) is not f(1)
    ("k = 45, n = 2",
     ["n=2, k=45", "45, 2", "(45,2)", r"k=45 \text{ and } n=2"],
     ["k=2,n=45", "2,45", "(2,45)", "k=45", "45"]),
    ("x=1, y=2",
     ["(1,2)", "y=2,x=1", "(x,y)=(1,2)", r"\begin{cases}x=1\\y=2\end{cases}"],
     ["x=2,y=1", "(2,1)", "2,1", "y=1,x=2", "x=1"]),
    ("f(1)=2", ["2", "f(1) = 2"], ["f(2)=1", "f(2)=2", "1"]),
    ("x=2", ["2", "x = 2", "2 = x"], ["y=2", "x=-2", "x>2", "x=2, x=3", r"x \neq 2"]),
    ("x=5 or x=1",
     ["1,5", "x=1,5", "x=1, x=5", r"\{1,5\}", r"x \in \{1,5\}"],
     ["1<x<5", r"x\in(1,5)", r"(1,5) \cup (5,9)", "x=1", "y=1,y=5", r"x\in[1,5]",
      r"1 \le x \le 5"]),
    # ranges: a range is not its end points
    ("1,5", ["5,1", r"\{1,5\}"], ["1<x<5", r"x \in (1,5)", r"x\in[1,5]", "[1,5]", "15", "1.5"]),
    (r"\{1,5\}", ["1,5", "5,1"], ["(1,5)", "[1,5]", "1<x<5"]),
    ("1<x<5",
     ["(1,5)", r"x\in(1,5)", "5>x>1", "]1,5["],
     ["1,5", r"\{1,5\}", "[1,5]", r"1\le x<5", r"1<x\le 5", "x=1,x=5", "1<y<5"]),
    ("[1,5]", [r"1\le x\le 5", r"x\in[1,5]", "1<=x<=5"], ["(1,5)", "1,5", "1<x<5"]),
    (r"(-\infty,-2)\cup(2,\infty)",
     [r"x<-2 \text{ or } x>2", "x<-2, x>2", r"x > 2 \text{ or } x < -2",
      r"(2,+\infty)\cup(-\infty,-2)"],
     ["-2<x<2", "(-2,2)", "x<-2", r"x\le-2 \text{ or } x\ge 2"]),
    (r"x \ne 3",
     [r"(-\infty,3)\cup(3,\infty)", r"\mathbb{R}\setminus\{3\}", "x≠3"],
     ["3", "x=3", r"\mathbb{R}"]),
    # choices: a letter stands for what is behind it, a labelled point is no choice
    ("M: (1,2)", ["M: (1,2)", "(1,2)", "M=(1,2)", "(1,2)"], ["M: (3,4)", "N: (1,2)", "M", "(2,1)"]),
    ("A: (1,2)", ["A: (1,2)"], ["A: (3,4)", "A", "B: (1,2)"]),
    ("B",
     ["B", r"\textbf{(B)}", "(B) 12", "B. foo", r"\text{B: the second}", "B) 5"],
     ["A", "C", "A: B", r"\textbf{(C)}", "b", "BC"]),
    ("ACD",
     ["A, C, D", "A,C,D", "A、C、D", "A, C, D", "A and C and D"],
     ["A, C", "ACE", "AC", "A, B, C, D", "CAD"]),
    # commas, remainders, phantoms: 0,1 are two; 100 mod 7 is 2; a phantom is not seen
    ("0,1", ["1,0", "0, 1", r"\{0,1\}"], ["0.1", "01", "1", "10", ".1"]),
    ("0.1", ["1/10"], ["0,1", "1", "01"]),
    ("100", ["100", "100"], [r"100 \bmod 7", r"100 \mod 7", r"100\phantom{0}0"]),
    ("5", ["5"], [r"\phantom{5}", r"\hphantom{5}", r"\vphantom{5}5\phantom{1}6", r"\boxed{}"]),
    ("2", [r"100 \bmod 7", r"9 \bmod 7"], []),
    # unicode: what phones and Chinese models write
    ("x^{10}", ["x¹⁰", "x^10"], ["x¹0", "x^1"]),
    ("x^{-2}", ["x⁻²"], ["x²"]),
    (r"\frac{5}{2}", ["2½", "5⁄2", "5/2", "2½"], ["2"]),
    (r"\frac13", ["⅓"], ["⅔"]),
    (r"2\sqrt{3}", ["2√3", "2√(3)", "√12"], ["√6", "2√2"]),
    (r"\sqrt{x+1}", ["√(x+1)"], ["√x+1"]),
    ("x_1+x_2", ["x₁+x₂"], ["x₁+x₃"]),
    (r"\sqrt[3]{2}", ["∛2"], ["√2"]),
    ("(1,2)", ["（1，2）", "(1，2)"], ["（2，1）"]),
    ("x=5", ["x＝5"], ["x＝6"]),
    (r"50\%", ["50％"], ["5％"]),
    (r"x\ge 2", ["x≥2", r"[2,\infty)", "x>=2", r"x\geqslant 2"], ["x>2", "x≤2"]),
    ("1:2", ["1：2", "1∶2"], ["2：1"]),
    ("-3", ["－3", "−3", "–3", "‑3"], ["3"]),
    # chinese: or, no solution, degrees, right and wrong
    ("3,-2", [r"x=3\text{或}x=-2", "3或-2", "x=3 或 x=-2", "3和-2"], ["3", "3或2"]),
    (r"\emptyset",
     ["无解", r"\text{no solution}", "No solutions", r"\varnothing", r"\{\}", "空集", "∅",
      r"\text{No real solutions}"],
     ["0", r"\{0\}", "解"]),
    (r"\text{no solution}",
     [r"\emptyset", r"\text{No Solution}", "No solution"],
     ["0", "1 solution"]),
    ("60°", ["60度", r"60^\circ", r"60 \text{ degrees}"], ["6度"]),
    ("正确", ["正确", r"\text{正确}"], ["错误"]),
    # labels: what stands before the answer
    ("5",
     [r"\therefore x=5", r"\Rightarrow 5", r"\text{Answer: } 5", r"\text{Answer: 5}", "Answer: 5",
      r"\text{Area} = 5", "S = 5", r"\text{The answer is } 5", "a+b = 5", r"\implies 5", "x=5",
      r"\approx 5", r"\text{Total: }5"],
     [r"\text{not }5", r"x \ne 5", r"5 \text{ or } 6", "5 < 6", r"5 \pm 1", r"\text{Answer: } 6"]),
    # plus or minus: both values, and nothing else
    (r"\pm 3",
     ["3,-3", "-3,3", r"x=\pm3", r"x = 3 \text{ or } x=-3", r"\{-3,3\}"],
     ["3", "-3", "3,3", r"\pm 4"]),
    (r"2 \pm \sqrt{3}",
     [r"2+\sqrt3, 2-\sqrt3", r"\{2-\sqrt{3},2+\sqrt{3}\}", r"2\mp\sqrt3"],
     [r"2+\sqrt3", r"\pm2+\sqrt3"]),
    # plain text: pi/4 and sqrt(2) without a backslash
    (r"\frac{\pi}{4}", ["pi/4", "π/4", r"\pi/4", "0.25pi"], ["pi/3", "pi", "1/4"]),
    (r"\sqrt{2}", ["sqrt(2)", "sqrt2", "sqrt(2)"], ["sqrt(3)"]),
    (r"\frac{\sqrt{3}}{2}", ["sqrt(3)/2", "√3/2"], ["sqrt(3)"]),
    (r"2\pi r", ["2*pi*r", "2πr"], ["pi*r"]),
    (r"\sin x", ["sin(x)", "sin x"], ["cos x"]),
    ("x^2+2x", ["x**2+2*x", "x*(x+2)"], ["x**2"]),
    (r"\infty", ["infinity", "∞", r"+\infty"], ["-∞"]),
    # vectors and matrices: entry by entry; a column is a tuple
    (r"\begin{pmatrix}1\\2\\3\end{pmatrix}",
     ["(1,2,3)", r"\begin{bmatrix}1\\2\\3\end{bmatrix}", r"\langle 1,2,3\rangle",
      r"\left(\begin{array}{c}1\\2\\3\end{array}\right)"],
     ["(1,3,2)", "(1,2)", r"\{1,2,3\}", "[1,2]"]),
    (r"\vec{i}+2\vec{j}",
     [r"\mathbf{i}+2\mathbf{j}", r"\hat{i}+2\hat{j}", r"\vec i+2\vec j"],
     [r"\vec{i}-2\vec{j}", r"2\vec i+\vec j"]),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}",
     [r"\begin{bmatrix}1&0\\0&1\end{bmatrix}", r"\begin{pmatrix}1.0&0\\0&\frac22\end{pmatrix}"],
     [r"\begin{pmatrix}0&1\\1&0\end{pmatrix}", r"\begin{pmatrix}1&0\end{pmatrix}", "1", "I"]),
    # notation of numbers: repeating decimals, European separators, bases in words, minutes, bold
    (r"\frac13",
     [r"0.\overline{3}", r"0.\dot{3}", "0.(3)", "0.333...", r"0.333\ldots", r"0.\bar{3}",
      r"0.\dot3"],
     ["0.3", "0.33", r"0.\dot{6}"]),
    (r"\frac{1}{7}", [r"0.\overline{142857}", r"0.\dot{1}4285\dot{7}"], [r"0.\overline{14285}"]),
    (r"0.1\overline{6}",
     ["1/6", "0.1(6)", "0.1666...", r"0.1\overline{6}"],
     [r"0.\overline{16}", "0.16"]),
    ("1234.56",
     ["1.234,56", "1,234.56", "1234,56", "1 234.56", "1{,}234.56", "1.234,56"],
     ["123456", "1.23456", "1234"]),
    ("3.14", ["3,14", "3{,}14", "3.14"], ["314", "3,1", "3.15"]),
    ("1000000", ["1.000.000", "1'000'000", "1 000 000"], ["1.000"]),
    ("52_8",
     [r"52_{\text{eight}}", "52_{8}", "52_{eight}", r"52 \text{ base } 8", "52 (base 8)", "(52)_8",
      r"52 \text{ (base eight)}", "52_8"],
     ["52", "42", r"52_{\text{nine}}", "52_9"]),
    ("101_2", [r"101_{\text{two}}"], ["101", "5"]),
    (r"30^\circ 15'",
     [r"30.25^\circ", "30°15'", "30°15′", r"30^{\circ}15'"],
     ["30.15", "30", r"30^\circ 51'"]),
    ("73", ["**73**", r"\mathbf{73}", r"\textbf{73}", "73", r"\bf 73"], ["**74**"]),
    # qualifiers: what stands behind the answer and does not change it
    (r"k\pi",
     [r"k\pi, k \in \mathbb{Z}", r"k\pi \text{ for } k \in \mathbb{Z}",
      r"x = k\pi \quad (k\in\mathbb{Z})", r"k\pi \text{ where } k \text{ is an integer}",
      r"k\pi,\ k\in Z"],
     [r"2k\pi", r"k\pi, 5"]),
    ("12",
     [r"12 \text{ (approximately)}", r"12 \text{ total}", r"12 \text{ in total}",
      r"12 \text{ exactly}", r"12 \text{ only}"],
     [r"12 \text{ at least}", r"12 \text{ or more}", r"12 \text{ if odd}"]),
    # chains: either way round
    ("x<y<z", ["z>y>x", "x < y < z"], ["x<z<y", "z<y<x", "x<y", r"x\le y<z"]),
    ("a<b<c<d", ["d>c>b>a"], ["a<c<b<d"]),
    ("f(2) < f(1) < f(4)", ["f(4)>f(1)>f(2)"], ["f(1)<f(2)<f(4)"]),
    ("a>b", ["b<a"], ["a<b"]),
    # words: whole answers in words
    (r"\text{Yes}", ["yes", "YES", r"\text{yes}", "是"], ["no", "y"]),
    ("No", ["no", r"\text{No}", "否"], ["yes"]),
    ("odd", ["Odd", r"\text{odd}"], ["even"]),
    (r"\text{True}", ["true", "True"], ["false"]),
    ("does not exist",
     [r"\text{DNE}", r"\text{undefined}", r"\text{Does Not Exist}"],
     ["exists", "0"]),
    (r"(-\infty,\infty)",
     [r"\mathbb{R}", r"\text{all real numbers}", "ℝ", r"x \in \mathbb{R}", r"(-\infty, +\infty)"],
     [r"\mathbb{Z}", r"(0,\infty)"]),
    # more algebra: fractional powers, equations, complex numbers
    ("x^{5/6}", [r"x^{1/2}\cdot x^{1/3}", r"\sqrt{x}\sqrt[3]{x}"], ["x^{1/6}", "x^{6/5}"]),
    ("2x", ["(8x^3)^{1/3}", r"\sqrt[3]{8x^3}"], [r"\sqrt{4x^2}", "|2x|"]),
    ("|x|", [r"\sqrt{x^2}"], ["x", "-x"]),
    ("x", ["x"], ["|x|", r"\sqrt{x^2}", "X"]),
    ("2x+3y=6",
     ["4x+6y=12", r"y=2-\frac23x", "6=2x+3y", "2x+3y-6=0"],
     ["2x-3y=6", "6", "0", "2x+3y=7", "x=3", "y=2x+6"]),
    ("x^2+y^2=4", ["x^2=4-y^2", "y^2+x^2=4"], ["4", "x^2+y^2=2", "x^2-y^2=4"]),
    ("y=2x+1", ["2x+1", "y-2x=1", "y = 1+2x", "2x-y+1=0"], ["x=2y+1", "1", "2x-1"]),
    (r"\frac{1}{2}x^2+C", [r"\frac{x^2}{2}+C", "C+0.5x^2"], [r"\frac{x^2}{2}", r"\frac12x^2+D"]),
    ("n!", ["n!"], ["n", "(n-1)!"]),
    ("2^n", ["2^n"], ["n^2", "2n"]),
    (r"\binom{n}{2}", [r"\frac{n(n-1)}{2}"], [r"\frac{n(n+1)}{2}"]),
    ("1+i", ["i+1"], ["1-i", "1"]),
    ("3+4i", ["4i+3"], ["3-4i", "5"]),
    (r"\{(1,2),(3,4)\}",
     ["(3,4),(1,2)", r"\{(3,4),(1,2)\}"],
     ["(2,1),(4,3)", "1,2,3,4", "(1,3),(2,4)"]),
    ("7", [r"7 \pmod{12}", r"x \equiv 7 \mod 12"], [r"8 \pmod{12}"]),
    (r"7\pmod{12}", ["7"], [r"7\pmod{5}"]),
    ("12:30", ["12:30"], ["12:30:15", "30:12", "12.5"]),
    ("2:3", ["2:3"], ["3:2", "4:6"]),
    # siblings of all kinds
    (r"(-\infty, 3]",
     [r"x \leq 3", r"\{x : x \le 3\}", r"\{x \mid x \le 3\}", r"\left(-\infty,3\right]", "x<=3"],
     ["x<3", r"(-\infty,3)", r"x\ge 3", "3"]),
    (r"\{1,2,3\}",
     [r"\{1,2\}\cup\{3\}", r"\{3,2,1\}", r"\left\{ 1, 2, 3 \right\}", "1, 2, and 3"],
     [r"\{1,2\}", r"\{1,2,3,4\}", "(1,2,3)"]),
    ("x^2+y^2=1", ["y^2+x^2=1", "x^2+y^2-1=0"], ["1", "0", "x^2+y^2"]),
    ("F=ma", ["ma", "F = m a", "F=am"], ["F=m", "m", "E=ma"]),
    (r"E=\frac{1}{2}mv^2", [r"\frac12 mv^2", r"\frac{mv^2}{2}"], ["mv^2"]),
    ("-3 1/2", ["-3.5", r"-3\frac12", "-7/2"], ["3.5", "-2.5"]),
    ("1.5e-5",
     ["1.5x10^{-5}", r"1.5 \times 10^{-5}", "1.5*10^-5", "1.5e-05", "0.000015", r"1.5\cdot10^{-5}"],
     ["1.5e5", "1.5", "1.5x10^{-4}"]),
    ("e^{2x}", ["e^(2x)", r"\exp(2x)", "exp(2x)", "(e^x)^2"], ["e^x", "2e^x"]),
    (r"\frac{\sqrt{2}}{2}",
     ["sqrt(2)/2", "1/sqrt(2)", r"\frac{1}{\sqrt2}", "√2/2", "2^(-1/2)"],
     ["sqrt(2)"]),
    (r"\frac{1}{x+1}", ["1/(x+1)", "(x+1)^(-1)", "(1)/(x+1)"], ["1/x+1"]),
    ("|x-1|", ["|1-x|"], ["x-1"]),
    (r"\ln 2", ["ln(2)", "ln2"], ["ln 3", r"\log_{10} 2"]),
    ("6.02e23", [r"6.02 \times 10^{23} \text{ mol}^{-1}", r"6.02\times10^{23}"], ["6.02e22"]),
    ("3e8",
     [r"3 \times 10^8 \text{ m/s}", r"3\times10^{8}\ \mathrm{m\,s^{-1}}", "3*10^8"],
     ["3e7"]),
    ("5",
     [r"5\ \Omega", r"5 \,\mu\text{m}", r"5\text{ N}", "5.00", "5.", "+5", r"5\text{ m/s}", "5 kg",
      r"5 \mathrm{kg}", r"\boxed{5}", r"\fbox{5}", "{5}", "$5$", r"\(5\)", r"\text{5}",
      r"\displaystyle{5}", "5 \\\\", r"5\text{.}", r"\textbf{5}", r"\underline{5}",
      r"\color{blue}{5}", r"\bm{5}", r"5\,"],
     ["5?", "5|6", "5;6", r"5 \& 6", r"5 \text{ vs } 6", "1..10", r"\mathbb{N}", r"\ge 5", ">4",
      r"5+\epsilon", "5-6", "5–6", "5 6", "either 5 or 6", "x=5 or 6", "5/1.0001", r"\sim 6",
      r"\neg 5", "5'", "5''", "5^1.5", "5_1", "5!", "5x", "5e0.1", "(5,5)", "5,5", "[5,5]",
      r"5\cdot6", r"\frac{5}{}", "5..6", "5, probably 6", r"5 \text{ maybe } 6", "55", "5 5", "0x5",
      "5%2", "5 mod 3", "6", "not 5", "5 (or 6)", r"5\text{ if }x=1", "5=6", "6=5=6", r"\not=5"]),
    ("8:30",
     ["8:30 PM", r"8:30 \text{ p.m.}", "8:30", r"8\!:\!30"],
     ["8.5", "20:30", "9:30", "8:03"]),
    ("8:30 PM", ["8:30", r"8:30 \text{ p.m.}", "8:30 pm"], ["8:30 AM", r"8:30 \text{ a.m.}"]),
    ("CO_2", [r"\text{CO}_2", r"\mathrm{CO_2}", "CO₂"], ["CO", "CO_3", "O_2C"]),
    ("1010_2",
     ["(1010)_2", "1010_{2}", r"1010_{\text{two}}", "1010_{(2)}"],
     ["1010", "10", "1010_3"]),
    ("5050", [r"\frac{100 \cdot 101}{2}", r"\sum_{k=1}^{100} k"], ["5051"]),
    (r"\lceil x \rceil", [r"\lceil x\rceil"], [r"\lfloor x \rfloor", "x"]),
    ("impossible", [r"\text{Impossible}"], ["possible"]),
    (r"\text{undefined}", ["DNE", r"\text{does not exist}"], ["0", "defined", r"\infty"]),
    (r"\overrightarrow{AB}", [r"\vec{AB}"], [r"\overrightarrow{BA}"]),
    ("v", [r"\mathbf{v}", r"\vec{v}"], ["u"]),
    ("y'=2x", ["2x", "y' = 2x"], ["y=2x", "x"]),
    ("x=1,2", ["1,2", "x=2 or x=1", r"x\in\{1,2\}", "x=1, x=2"], ["x=1", "y=1,2", "1<x<2"]),
    (r"\frac{2}{3}\pi",
     [r"\frac{2\pi}{3}", "2π/3", "120°", r"\frac{2}{3} \pi"],
     [r"\frac{\pi}{3}", "2/3"]),
    ("2,500", ["2500", "2{,}500", "2 500", "2,500.00"], ["2.5", "2,50", "25"]),
    ("12.5", ["12.50", "25/2", r"12\frac12"], ["125", "12"]),
    (r"90^\circ",
     ["90", r"\frac{\pi}{2}", "90°", "90 degrees", r"\angle A = 90^\circ"],
     ["100", r"\pi", "90%"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     [r"\left[\begin{matrix}1&2\\3&4\end{matrix}\right]", r"A=\begin{pmatrix}1&2\\3&4\end{pmatrix}",
      r"\begin{bmatrix} 1 & 2 \\[4pt] 3 & 4 \end{bmatrix}"],
     [r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"]),
    ("-2", [r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"], ["2"]),
    ("x>2", [r"x \in (2,\infty)", "2<x", r"(2,\infty)", "x>2"], ["x>=2", "2>x", "y>2", "x>3"]),
    ("x=3,y=4",
     [r"\begin{aligned} x &= 3 \\ y &= 4 \end{aligned}", r"x=3 \text{ and } y=4", "(3,4)",
      r"\begin{cases} x=3 \\ y=4\end{cases}", r"x = 3,\; y = 4", "x=3; y=4"],
     ["(4,3)", "x=4,y=3", "7", "3"]),
    ("a=3, b=-2", ["b=-2,a=3", "(a,b)=(3,-2)"], ["a=-2,b=3", "(b,a)=(3,-2)"]),
    ("4",
     ["4 rad", r"4 \text{ units}^2", r"4 \text{ square units}", r"4\text{ sq. units}",
      r"4\text{ cubic meters}", r"4 \text{ inches}", "4 in", r"4\ \mathrm{hrs}",
      r"4 \text{ minutes}", "4 days", r"4 \text{ points}", r"4\text{ dollars}", r"\$4", "4 USD",
      r"4 \text{ integers}", r"4 \text{ solutions}", r"4 \text{ people}", r"4\text{ years old}",
      "4 cm", r"\text{4 cm}", "4元", r"4\text{小时}", "4 岁", "4件", "4分钟", r"4\text{厘米}",
      r"4\text{千克}", "4吨", "4千米", "4个"],
     ["4 score", "4 dozen", r"4\text{ thousand}", "4 squared", "4万", "4亿", "5",
      r"4 \text{ quarters of } 2"]),
    (r"x=\frac{\pi}{6}+2k\pi",
     [r"\frac{\pi}{6}+2k\pi", r"x = \frac{\pi}{6} + 2\pi k, k \in \mathbb{Z}",
      r"2k\pi+\frac{\pi}{6}\ (k\in \mathbf{Z})"],
     [r"\frac{\pi}{6}+k\pi", r"\frac{\pi}{6}"]),
    ("A",
     ["A.", "(A)", r"\text{(A)}", r"\mathrm{A}", r"\textbf{A}", "A) foo", "A: foo", "A. 12"],
     ["B", "(B)", "AB", "A or B", "A,B", "A and B", "not A", "B. A"]),
    ("12",
     ["x = 12", r"\text{Total} = 12", r"12 \text{ cm}", "12.0", r"\frac{24}{2}", "3*4",
      r"3 \times 4", r"12\%", "n=12"],
     ["x=13", "21", "1.2", "120", "-12"]),
    (r"\sqrt{5}", ["5^{1/2}", "5^{0.5}", "√5", r"\sqrt 5", r"\sqrt5", "5^(1/2)"], ["5", "2.236"]),
    ("1/3", ["0.3333333", "33.33333333%", r"33\frac13\%"], ["0.33", "33%", ".3"]),
    (r"\frac{x}{y}", ["x/y", "x y^{-1}"], ["y/x"]),
    ("正确", ["正确"], ["不正确", "错误"]),
    ("x=3", ["x＝3", "x = 3"], ["x＝4"]),
]

CHAINSUM = [  # response, answer, score
    ("#7$", "7", 1),
    (">301917#7$", "7", 1),
    (">301917#8$", "7", 0),
    ("#7", "7", 0),
    ("7$", "7", 0),
    ("#7$ ", "7", 0),
    ("#7$\n", "7", 0),
    ("#1#7$", "7", 0),
    ("#77$", "7", 0),
    ("#٧$", "7", 0),
]

ADD = [  # response, answer, score or status
    (r"\boxed{142}", "142", 1),
    (r"\boxed{1}, no, \boxed{ +142 }", 142, 1),
    (r"\boxed{-142}", "142", 0),
    (r"\boxed{142.0}", "142", "unparsable"),
    (r"\boxed{}", "142", "unparsable"),
    ("142", "142", "no_answer"),
]

BOXES = [  # response, answer, score: where the answer is, and what a reference may be
    (r"<think>\boxed{42}</think> done", "42", 1),
    (r"\boxed{41} no, \boxed{42}", "42", 1),
    (r"\boxed{42} or \boxed{41}", "42", 0),
    (r"\boxed{42} so \boxed{4", "42", 0),
    (r"\fbox{42}", "42", 1),
    (r"\boxed{\boxed{42}}", "42", 1),
    ("42", "42", 0),
    (r"\boxed{\frac{1}{2}} is \$0.5", "0.5", 1),
    (r"\boxed {42}", "42", 1),
    (r"$\boxed{1}$ and $\boxed{2}$", "1,2", 1),
    (r"\boxed{1}, then we see \boxed{2}", "1,2", 0),
    (r"\boxed{\text{5 or 6}}", "5", 0),
    (r"\boxed{2}", ['1', '2'], 1),
    (r"\boxed{3}", ['1', '2'], 0),
    (r"\boxed{142}", 142.0, 1),
    (r"\boxed{1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1}", "17", 1),
    (r"so \boxed 7", "7", 1),
    (r"so \boxed7", "7", 1),
    (r"so \boxed 12.", "12", 1),
    (r"put it in \boxed then", "5", 0),
    (r"so \boxed -7", "-7", 1),
    (r"\boxed{5} or \boxed 7", "5", 0),
    (r"$\boxed{3}$ and $\boxed{-3}$", r"\pm 3", 1),
    (r"$\boxed{3}$, $\boxed{4}$", r"\pm 3", 0),
    (r"\boxed{12}", "He has 3*4=<<3*4=12>>12 pens.\n#### 12", 1),
    (r"\boxed{1234}", "So many.\n#### 1,234", 1),
    (r"\boxed{42}", "The answer is 42.", 1),
    (r"\boxed{3}", "['3', '4']", 1),
    (r"\boxed{4}", '["3", "4"]', 1),
    (r"\boxed{5}", "['3', '4']", 0),
    (r"\boxed{3}", {'value': 3}, 1),
    (r"\boxed{12}", r"So we get $\boxed{12}$.", 1),
    (r"\boxed{[0,1]}", "[0,1]", 1),
    (r"\boxed{0}", "[0,1]", 0),
    (r"\boxed{42}", "**Answer:** 42", 1),
    (r"\boxed{42}", "Final answer: $42$", 1),
]

COUNTDOWN = [  # expression, numbers, target, score
    ("(1+2)*3", [1, 2, 3], 9, 1),
    ("3*(2+1)", [1, 2, 3], 9, 1),
    ("\n(1 + 2)\n* 3 ", [1, 2, 3], 9, 1),
    ("-(-1-2)*3", [1, 2, 3], 9, 1),
    ("+3*(1+2)", [1, 2, 3], 9, 1),
    ("(1+2)*3=9", [1, 2, 3], 9, 0),
    ("9", [1, 2, 3], 9, 0),
    ("3*3", [1, 2, 3], 9, 0),
    ("(1+2)*3*1", [1, 2, 3], 9, 0),
    ("(1+2)×3", [1, 2, 3], 9, 0),
    ("(1+2)*٣", [1, 2, 3], 9, 0),
    ("(01+2)*3", [1, 2, 3], 9, 0),
    ("(1+2)3", [1, 2, 3], 9, 0),
    ("", [1, 2, 3], 9, 0),
    ("(1+2)*3.0", [1, 2, 3], 9, 0),
    ("(1+2)*3#", [1, 2, 3], 9, 0),
    ("1+2", [1, 2, 3], 9, 0),
    ("(1+2)*3,", [1, 2, 3], 9, 0),
    ("9**9**9**9", [1, 2, 3], 9, 0),
    ("1/0", [1, 2, 3], 9, 0),
    ("(" * 250 + "9", [1, 2, 3], 9, 0),
    ("-" * 290 + "9", [1, 2, 3], 9, 0),
    ("9" * 10000, [1, 2, 3], 9, 0),
    ("__import__('os')", [1, 2, 3], 9, 0),
    ("(1+2)*3\u0000", [1, 2, 3], 9, 0),
    ("1+2+00", [1, 2, 0], 3, 0),
    ("7//2*3", [7, 2, 3], 9, 0),
    ("2**3", [2, 3], 8, 0),
    ("3.5*2", [3, 5, 2], 7, 0),
    ("3+1/(400*500)", [3, 1, 400, 500], 3, 0),
    ("8/(3-8/3)", [8, 3, 8, 3], 24, 1),
]

COUNTDOWN_BOXED = [  # response, numbers, target, score
    (r"\boxed{(1+2)*3}", [1, 2, 3], 9, 1),
    (r"\boxed{3 \times 5 - 2}", [3, 5, 2], 13, 1),
    (r"\boxed{3\cdot5-2=13}", [3, 5, 2], 13, 1),
    (r"\boxed{3×5−2}", [3, 5, 2], 13, 1),
    (r"\boxed{(3+5)\div 2}", [3, 5, 2], 4, 1),
    (r"\boxed{\frac{3+5}{2}}", [3, 5, 2], 4, 1),
    (r"\boxed{(3+5)÷2 = 4}", [3, 5, 2], 4, 1),
    (r"\boxed{\dfrac{3+5}{2}}", [3, 5, 2], 4, 1),
    (r"\boxed{\left(3+5\right)/2}", [3, 5, 2], 4, 1),
    (r"\boxed{\frac{3+5}{2}=5}", [3, 5, 2], 4, 0),
    (r"\boxed{\frac{3+5}{2}=4}", [3, 5, 2], 5, 0),
    (r"\boxed{3^5}", [3, 5, 2], 243, 0),
    (r"\boxed{3 5 2}", [3, 5, 2], 10, 0),
    (r"\boxed{$3\times5-2$}", [3, 5, 2], 13, 1),
    (r"\boxed{13 = 3\times 5-2}", [3, 5, 2], 13, 0),
    (r"\boxed{\text{3+5+2}}", [3, 5, 2], 10, 1),
]

TABLES = [  # answer, reference, score
    ("13.3%", [13.3], 1),
    ("13.3 percent", [13.3], 1),
    ("50%", [0.5], 0),
    ("0.484368", [0.484368], 1),
    ("0.48437", [0.484368], 1),
    ("0.4844", [0.484368], 0),
    ("1,234", [1234], 1),
    ("$1,234.0", ['1,234'], 1),
    ("men", ['men'], 1),
    ("women", ['men'], 0),
    ("men", ['women'], 0),
    ("Men.", ['men'], 1),
    ("5, 7", [5, 7], 1),
    ("7, 5", [5, 7], 0),
    ("5 and 7", [5, 7], 1),
    ("5; 7; 9", [5, 7, 9], 1),
    ("5, 6, and 7", [5, 6, 7], 1),
    ("5", [5, 7], 0),
    ("5, 7, 9", [5, 7], 0),
    ("", [5], 0),
    (r"\boxed{12}", [12], 1),
    ("1,234, 5", [1234, 5], 1),
    ("five", [5], 0),
    ("1e999999", [5], 0),
    ("Professional, scientific and technical services",
     ['professional, scientific and technical services'], 1),
    ("a, b and c; 4", ['a, b and c', 4], 1),
    ("men and women", ['men', 'women'], 1),
    ("['men', 'women']", ['men', 'women'], 1),
    (".5", [5], 0),
    (".5", [0.5], 1),
    ("5.", [5], 1),
    ("5(7)", [57], 0),
    ("(5)", [5], 1),
    ("5[7]", [57], 0),
    ("[5, 7]", [5, 7], 1),
    ("['a', 'b']", ['a', 'b'], 1),
    ("2008–2012", ['2008-2012'], 1),
    ("−5", [-5], 1),
    ("-5", [5], 0),
    ("$5", [5], 1),
    ("5 percent", [5], 1),
    ("1.5", ['15'], 0),
    ("5%%", [5], 0),
    ("R&D.", ['R&D'], 1),
    ("'men'", ['men'], 1),
    ("(a) men", ['men'], 0),
    ("5, ,7", [5, 7], 0),
    ("-.5", [-0.5], 1),
    ("{5}", [5], 1),
    ("5 - 7", [5, 7], 0),
    ("$1,234.5", [1234.5], 1),
    ("1,234.5, 6", [1234.5, 6], 1),
]

PAIR = {"Ann": "knight", "Bob": "knave"}
TRIO = {"Ann": "knight", "Bob": "knight", "Cy": "knave"}
KNIGHTS = [  # answer, reference, score
    ("Ann is a knight, Bob is a knave", PAIR, 1),
    ("Bob is a knave, and Ann is a knight.", PAIR, 1),
    ("(1) Ann is a knight\n(2) Bob is a knave", PAIR, 1),
    ("1. Ann is a knight (2) Bob is a knave", PAIR, 1),
    ("ann: Knight; BOB: Knave", PAIR, 1),
    ('{"Ann": "knight", "Bob": "knave"}', PAIR, 1),
    ("Ann is a knave, Bob is a knight", PAIR, 0),
    ("Ann is a knight", PAIR, 0),
    ("Ann is a knight, Bob is a knave, Bob is a knight", PAIR, 0),
    ("Ann is a knight, Ann is a knave, Bob is a knave", PAIR, 0),
    ("Ann is a knight, Bob is not a knave", PAIR, 0),
    ("Ann is a knight or a knave, Bob is a knave", PAIR, 0),
    ("Ann is a knight, Bob is a knave, Cy is a knave", PAIR, 0),
    ("", PAIR, 0),
    ("Ann is a knight, Ann is a knight, Bob is a knave", PAIR, 0),
    ("knight, knave", PAIR, 0),
    ("Thus **Ann**: Knight, **Bob**: Knave!", PAIR, 1),
    ("Ann is a knight or Bob is a knave", PAIR, 0),
    ("It is false that Ann is a knight, Bob is a knave", PAIR, 0),
    ("Knights: Ann\nKnaves: Bob", PAIR, 1),
    ("Knights: Bob\nKnaves: Ann", PAIR, 0),
    ("Knight: Ann\nKnave: Bob", PAIR, 1),
    ("Knight: Bob\nKnave: Ann", PAIR, 0),
    ("**Ann** is a **knight**, **Bob** is a **knave**", PAIR, 1),
    ("Ann → knight\nBob → knave", PAIR, 1),
    ("Ann — knight; Bob — knave", PAIR, 1),
    ("| Name | Role |\n|---|---|\n| Ann | knight |\n| Bob | knave |",
     PAIR, 1),
    ("Ann => knight, Bob => knave", PAIR, 1),
    ("Ann (knight), Bob (knave)", PAIR, 1),
    ("The knights are Ann; the knaves are Bob", PAIR, 1),
    ("Knights: Ann, Bob\nKnaves:", PAIR, 0),
    ("Knights: Ann, Bob\nKnaves: Bob", PAIR, 0),
    ("Knights: Ann", PAIR, 0),
    ("Ann is not a knight - knave, Bob is a knave", PAIR, 0),
    ("1. **Ann**: Knight\n2. **Bob**: Knave", PAIR, 1),
    ("Ann: Knight\n\nBob: Knave", PAIR, 1),
    ("- Ann is a Knight.\n- Bob is a Knave.", PAIR, 1),
    ("Ann and Bob are knights", PAIR, 0),
    ("Ann = knight\nBob = knave", PAIR, 1),
    ("Ann is the knight, Bob is the knave", PAIR, 1),
    ("| Ann | Bob |\n| knight | knave |", PAIR, 0),
    ("$Ann$ is a knight and $Bob$ is a knave", PAIR, 1),
    ("Ann: knight knave, Bob: knave", PAIR, 0),
    ("Knights: Ann, Bob\nKnaves: Cy", TRIO, 1),
    ("Knights: Ann and Bob; Knave: Cy", TRIO, 1),
    ("Knights: Ann\nKnaves: Bob, Cy", TRIO, 0),
    ("Knights: Ann, Bob", TRIO, 0),
    ("Knights: Ann, Bob, Dan\nKnaves: Cy", TRIO, 0),
]

QUESTIONS = [  # answer, references, metric, score
    ("The Eiffel Tower!", ['Eiffel tower'], "em", 1),
    ("Eiffel", ['Eiffel tower'], "em", 0),
    ("x", ['y', 'X'], "em", 1),
    ("", [''], "f1", 0),
    ("Eiffel", ['Eiffel tower'], "f1", 0.6666666666666666),
    ("b", ['a b', 'b c d'], "f1", 1),
    ("yes", ['yes indeed'], "f1", 0),
    ("yes it is", ['yes'], "f1", 0),
    ("yes", ['Yes.'], "f1", 1),
    ("a x x", ['x'], "f1", 0.6666666666666666),
    ("Paris", "Paris", "em", 1),
    ("The", ['The'], "em", 1),
    ("an", ['a'], "em", 0),
    ("A", ['B'], "em", 0),
    ("the", ['x'], "em", 0),
    ("A.", ['A'], "em", 1),
    ("the", ['a'], "em", 0),
    ("the", [''], "em", 0),
]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(workers=1) as s:
        yield s


# ---- Right and wrong, kind by kind ---------------------------------------------------------------

@pytest.mark.parametrize("gold, right, wrong", MATH, ids=[row[0] for row in MATH])
def test_math(scorer, gold, right, wrong):
    preds = right + wrong
    items = [("math", rf"So the answer is $\boxed{{{p}}}$.", {"answer": gold}) for p in preds]
    got = {p: value for p, (value, _) in zip(preds, scorer(items))}
    assert got == {p: float(p in right) for p in preds}


def graded(task, text, **problem):
    """Score of an <answer> that follows another try: the last one counts."""
    return score(task, f"<answer>0</answer> no, <answer>{text}</answer>", **problem)


@pytest.mark.parametrize("response, answer, expected", CHAINSUM)
def test_chainsum(response, answer, expected):
    assert score("chainsum", response, answer=answer) == expected


@pytest.mark.parametrize("response, answer, expected", ADD)
def test_add(response, answer, expected):
    value, status = grade("add", response, answer=answer)
    assert (value if status == "ok" else status) == expected


@pytest.mark.parametrize("response, answer, expected", BOXES)
def test_where_the_answer_is(response, answer, expected):
    assert score("math", response, answer=answer) == expected


@pytest.mark.parametrize("text, numbers, target, expected", COUNTDOWN)
def test_countdown(text, numbers, target, expected):
    assert graded("countdown", text, numbers=numbers, target=target) == expected


@pytest.mark.parametrize("response, numbers, target, expected", COUNTDOWN_BOXED)
def test_countdown_in_a_box(response, numbers, target, expected):
    problem = {"numbers": numbers, "target": target}
    assert score("countdown", response, format="boxed", **problem) == expected
    assert score("countdown", response, **problem) == 0  # a box is no <answer>


@pytest.mark.parametrize("text, answer, expected", TABLES)
def test_tableqa(text, answer, expected):
    assert graded("tableqa", text, answer=answer) == expected


@pytest.mark.parametrize("text, answer, expected", KNIGHTS)
def test_kk(text, answer, expected):
    assert graded("kk", text, answer=answer) == expected


@pytest.mark.parametrize("text, answer, metric, expected", QUESTIONS)
def test_qa(text, answer, metric, expected):
    assert graded("qa", text, answer=answer, metric=metric) == pytest.approx(expected)


# ---- Questions that take a search tool: what the policy wrote, turn by turn ----------------------

ASK = "<think>who?</think> <search>Ada</search>"
SAY = "\n<think>so</think>\n<answer>Ada Lovelace</answer>"


@pytest.mark.parametrize("text, expected", [
    (ASK + SAY, 1.0),
    (ASK + ASK + SAY.replace("Ada L", "L"), (2 / 3 + 0.3) / 1.3),
    (ASK + SAY + "x", (1 + 0.15) / 1.3),  # one turn of two is in order
    (ASK + SAY.replace("so", " "), (1 + 0.15) / 1.3),
    (ASK + SAY.replace("so", "<b>so</b>"), (1 + 0.15) / 1.3),
    (ASK.replace("Ada", " ") + SAY, (1 + 0.15) / 1.3),
    (ASK + SAY.replace("<think>so</think>", ""), (1 + 0.15) / 1.3),
    (ASK + ASK, 0.3 / 1.3),  # the turns are over
    (SAY, 1 / 1.3),  # never searched
    (SAY + ASK + ASK, (1 + 0.15) / 1.3),  # an answer before the last turn is out of order
    (ASK.replace("think", "thnk"), "no_answer"),
    (ASK, "no_answer"),
    ("", "no_answer"),
    ("<answer></answer>", "no_answer"),
])
def test_search(text, expected):
    value, status = rewards.grade("search", text, answer=["Ada Lovelace"])
    if expected == "no_answer":
        assert (value, status) == (0.0, expected)
    else:
        assert value == pytest.approx(expected) and status == "ok"


# ---- Exact answers: WAPO's two mathematical tasks ------------------------------------------------

FORM = re.compile(r"^\s*<think>(.+?)</think>\s*Answer:\s*(.+?)\s*$", re.DOTALL)  # the repository's


@pytest.mark.parametrize("text, expected", [
    ("<think>1+1</think> Answer: 2", 1),
    ("\n<think>a\nb</think>\n\nAnswer:2\n", 1),
    ("<think>a</think> Answer: 2 ", 1),
    ("<think>a</think> so </think>Answer: 2", 1),
    ("<think>a</think> Answer: 2.", 0),
    ("<think>a</think> Answer: 2.0", 0),
    ("<think>a</think> Answer: 3\nAnswer: 2", 0),
    ("<think>a</think> Answer: \\boxed{2}", 0),
    ("<think>a</think> Answer: ", 0),
    ("<think>a</think> answer: 2", "no_answer"),
    ("<think>a</think> The end. Answer: 2", "no_answer"),
    ("Answer: 2", "no_answer"),
    ("Well. <think>a</think> Answer: 2", "no_answer"),
    ("<think></think> Answer: 2", "no_answer"),
    ("<think>a Answer: 2", "no_answer"),
    ("", "no_answer"),
])
def test_exact_line(text, expected):
    score, status = grade("exact_line", text, answer="2")
    assert (score if status == "ok" else status) == expected
    found = FORM.match(text)
    assert (expected == 1) == bool(found and found[2].strip() == "2")


@pytest.mark.parametrize("text, expected", [
    (r"so \boxed{\frac12}", 1),
    (r"\boxed{1} or \boxed{ \frac12 }.", 1),
    (r"\boxed{0.5}", 0),
    (r"\boxed{\frac{1}{2}}", 0),
    (r"\boxed{\frac12", "no_answer"),
    (r"\frac12", "no_answer"),
    (r"\boxed{\frac12} \boxed{}", "no_answer"),
])
def test_exact_box(text, expected):
    score, status = grade("exact_box", text, answer=r"\frac12")
    assert (score if status == "ok" else status) == expected


@pytest.mark.parametrize("task, problem", [
    ("tableqa", {"answer": [13.3]}),
    ("kk", {"answer": PAIR}),
    ("qa", {"answer": ["13.3"]}),
    ("countdown", {"numbers": [1, 2], "target": 3}),
])
def test_without_the_tag_there_is_no_answer(task, problem):
    for response in ("13.3", "1+2", "Ann is a knight, Bob is a knave"):
        assert grade(task, response, **problem) == (0, "no_answer")


FIELDS = {"answer", "numbers", "target", "format", "metric"}
LINES = Path(__file__).with_name("grader_cases.jsonl").read_text(encoding="utf-8").splitlines()

def test_cases_of_public_graders():
    """Cases from the issues and test suites of fourteen public graders: at most 3 % missed, and
    never a wrong answer paid for (math-verify alone is right in 77 %)."""
    cases = [json.loads(line) for line in LINES]
    items = []
    for case in cases:
        problem = {key: case[key] for key in FIELDS & case.keys()}
        items.append((case["task"], case["response"], problem))
    with Scorer(workers=2) as s:
        scores = [value for value, _ in s(items)]
    paid, missed = [], []
    for case, value in zip(cases, scores):
        if value > case["expected"] + 1e-6:
            paid.append(case["id"])
        if value < case["expected"] - 1e-6:
            missed.append(case["id"])
    assert paid == []
    assert len(missed) <= 0.03 * len(cases), missed


def test_acpo_compat_grades_without_a_box_and_cuts_at_30_characters():
    long = "+".join("1" * 17)  # 33 characters
    assert score("math", "42", answer="42", acpo_compat=True) == 1
    assert score("math", r"\boxed{%s}" % long, answer="17", acpo_compat=True) == 0
    assert score("math", r"\boxed{%s}" % long, answer=long, acpo_compat=True) == 1
    assert score("math", r"\boxed{%s}" % long, answer="17") == 1


@pytest.mark.parametrize("task, response, problem, status", [
    ("math", r"\boxed{1}", {"answer": "2"}, "ok"),
    ("math", "1", {"answer": "1"}, "no_answer"),
    ("math", r"\boxed{}", {"answer": "1"}, "no_answer"),
    ("math", r"\boxed{+*}", {"answer": "x+1"}, "unparsable"),
    ("math", None, {"answer": "1"}, "unparsable"),
    ("kk", "<answer>?</answer>", {"answer": {"A": "knight"}}, "unparsable"),
    ("countdown", "<answer>a</answer>", {"numbers": [1], "target": 1}, "unparsable"),
    ("chainsum", "#", {"answer": "1"}, "no_answer")])
def test_status_tells_why(task, response, problem, status):
    """A run whose rewards are all zero must say whether the policy or the grader is at fault."""
    assert grade(task, response, **problem) == (0, status)


@pytest.mark.parametrize("said, expected", [
    (0.25, (0.25, "ok")),
    (1.5, (1.0, "ok")),
    (-1, (0.0, "ok")),
    (KeyError("x"), (0.0, "unparsable")),
])
def test_scores_of_reasoning_gym_stay_within_0_and_1(said, expected, monkeypatch):
    class Dataset:
        def score_answer(self, answer, entry):
            assert (answer, entry) == ("7", {"answer": "7"})
            if isinstance(said, Exception):
                raise said
            return said
    monkeypatch.setattr(rewards, "gym", lambda name, config: Dataset())
    problem = {"name": "x", "config": {}, "entry": '{"answer": "7"}'}
    assert grade("rg", "<answer>7</answer>", **problem) == expected
    assert grade("rg", "7", **problem) == (0.0, "no_answer")


def test_unknown_names_raise():
    """A typo in the task is the programmer's error, and must not look like a wrong response."""
    with pytest.raises(ValueError, match="countdown"):
        score("countdwn", "x")
    with pytest.raises(ValueError, match="em or f1"):
        score("qa", "<answer>x</answer>", answer="x", metric="rouge")


# ---- References ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, reduced", [
    ("He has 3*4=<<3*4=12>>12 pens.\n#### 12", "12"),  # GSM8K
    ("#### 1,234", "1,234"),
    ("The answer is 42.", "42."),
    ("**Answer:** 42", "42"),
    ("[1, 2]", "[1, 2]"),
    ("['3', '4']", ["3", "4"]),
    (r'["\\frac{1}{2}", "0.5"]', [r"\frac{1}{2}", "0.5"]),
    (r"so we get $\boxed{\frac12}$.", r"\frac12"),
    (r"$\boxed{1}$ or $\boxed{2}$", "1,2"),
    ({"value": 3}, "3"),
    (7, "7"),
])
def test_references_are_reduced(text, reduced):
    assert reduce_gold(text) == reduced


@pytest.mark.parametrize("task, problem", [
    ("math", {"answer": "12"}),
    ("math", {"answer": r"\frac{x}{2}"}),
    ("math", {"answer": ["1", "2"]}),
    ("math", {"answer": "many words.\n#### 12"}),
    ("chainsum", {"answer": "7"}),
    ("tableqa", {"answer": [1234, "men, and women"]}),
    ("kk", {"answer": PAIR}),
    ("qa", {"answer": ["Paris", "paris"]}),
    ("countdown", {"numbers": [1, 2], "target": 3}),
])
def test_good_references_pass(task, problem):
    assert check_gold(task, problem) is None


@pytest.mark.parametrize("task, problem, reason", [
    ("math", {"answer": "1" * 1001}, "equal"),
    ("math", {"answer": r"\frac{1}{0}"}, "1}{0"),
    ("math", {"answer": "{1"}, "equal"),
    ("math", {"answer": ""}, "equal"),
    ("qa", {"answer": [""]}, "equal"),
    ("chainsum", {"answer": "$"}, "equal"),
    ("kk", {"answer": {}}, "equal"),
])
def test_references_that_no_response_equals_are_named(task, problem, reason):
    assert reason in check_gold(task, problem)


def test_an_unknown_grader_is_named_with_the_known_ones():
    assert "countdown" in check_gold("countdwn", {"answer": "1"})


def test_plain_references_need_no_process(monkeypatch):
    """8,000 rows are checked when a file is loaded: text and numbers, no computer algebra."""
    monkeypatch.setattr(rewards.Worker, "ask", None)
    for i in range(200):
        assert check_gold("math", {"answer": str(i / 4)}) is None


# ---- Attacks -------------------------------------------------------------------------------------

INJECTIONS = [
    "__import__('os').system('touch {f}')",
    "exec(\"open('{f}','w')\")",
    "open('{f}','w')",
    r"\text{{exec(open('{f}','w'))}}",
    "eval(compile(\"open('{f}','w')\",'','exec'))",
    "[c for c in ().__class__.__base__.__subclasses__()] or open('{f}','w')",
]
SMALL = [
    ("math", {"answer": "x"}),
    ("countdown", {"numbers": [7], "target": 7}),
    ("countdown", {"numbers": [7], "target": 7, "format": "boxed"}),
    ("tableqa", {"answer": [7]}),
    ("kk", {"answer": {"A": "knight"}}),
    ("qa", {"answer": "y", "metric": "f1"}),
    ("chainsum", {"answer": "x"}),
    ("exact_box", {"answer": "x"}),
    ("exact_line", {"answer": "x"}),
]

def test_no_code_runs(tmp_path):
    """PRIME and reasoning-gym hand model text to sympy.parse_expr, which is eval."""
    f = tmp_path / "owned"
    for injection in INJECTIONS:
        attack = injection.format(f=f)
        for task, problem in SMALL:
            assert score(task, rf"<answer>{attack}</answer> \boxed{{{attack}}}", **problem) == 0
    assert not f.exists()


# Refused before the parser, each by another rule
REFUSED = [
    "9^{9^{9^{9}}}",
    "2^{2^{50}}",
    "(10^8)!",
    "((9!)!)!",
    "99999!",
    r"\binom{10^9}{10^8}",
    r"\prod_{i=1}^{10^9} i",
    r"\sum_{k=1}^{100000} k^2",
    r"3^{10^{15}} \mod 7",
    "|" * 40 + "x",
    "e^{e^{e^{e^{e}}}}",
    "x_{x_{x_{x_{x}}}}",
    "(9999!)^{999}",
    "(" * 20 + "1" + ")" * 20,
    r"\left(5^{\left(5^{\left(5^5\right)}\right)}\right)",
    r"\log_2" * 9 + "x",
    "1/0",
    "1" * 1001 + "x",
]
# Not refused: computer algebra does not come back from these
BOMBS = [
    r"\sum_{i=1}^{9999} \sin i",
    r"\int \frac{\sin(x^2)}{\ln x+e^x} dx",
    r"\int_0^1 x^{x} e^{x^2} dx",
    r"\sum_{i=1}^{999}\sum_{j=1}^{999} \frac{1}{i+j^2}",
]
SLOW = [pytest.param(text, marks=pytest.mark.slow) for text in BOMBS[1:]]

@pytest.mark.parametrize("text", REFUSED)
def test_towers_never_reach_the_parser(text, monkeypatch):
    monkeypatch.setattr(rewards, "compare", None)
    assert grade("math", rf"\boxed{{{text}}}", answer="x+1") == (0, "unparsable")


@pytest.mark.parametrize("gold, same", [
    ("e^{x^2}", "e^{xx}"),
    ("2^{2^5}+1", "2^{32}+1"),
    ("(2n)!", "(n+n)!"),
    (r"\frac{10!}{5!5!}", "252"),
    ("|x|+|y|", "|y|+|x|"),
    ("x_{n_k}+1", "1+x_{n_k}"),
    ("1e400", "1e400"),
    (r"\log_2 \log_2 16", "2"),
])
def test_what_only_looks_like_a_bomb_is_graded(scorer, gold, same):
    assert scorer([("math", rf"\boxed{{{same}}}", {"answer": gold})]) == [(1, "ok")]


@pytest.mark.parametrize("text", [BOMBS[0], *SLOW])
def test_bombs_time_out(text):
    assert graded_in_time("math", rf"\boxed{{{text}}}", answer="x+1") == 0
    assert score("math", r"\boxed{1+x}", answer="x+1") == 1


def test_tags_without_end_are_graded_in_time():
    blank = " " * 100_000
    for response in (
        "<think>" * 50_000,
        "<think>" + "</think> " * 50_000,
        "<think>a</think>" + blank + "Answer" + blank,
    ):
        assert graded_in_time("exact_line", response, answer="2") == 0


def graded_in_time(task, response, **problem):
    start = time.monotonic()
    value = score(task, response, **problem)
    assert type(value) is float and 0 <= value <= 1
    assert time.monotonic() - start < 8  # the contract
    return value


CHEAP = [
    "9" * 100_000,
    "{" * 100_000,
    r"\boxed{" * 14_000,
    r"\frac{1}{" * 38 + "1" + "}" * 38,
    "4\x002",
    " " * 100_000 + "1",
    "1+" * 490 + "1",
    "\ud800",
    "\u202e42",
    "\u200b42",
    "٤٢",
    "４２",
    "1e9999999",
    "$" * 900,
    "\\\\" * 400,
    "x=" * 300 + "1",
    "a," * 400,
    "1 " * 499,
    "{," * 400,
    "-" * 900,
]

@pytest.mark.parametrize("text", CHEAP, ids=range(len(CHEAP)))
def test_long_or_odd_text_scores_0(text):
    for response in (text, rf"\boxed{{{text}}}", f"<answer>{text}</answer>"):
        for task, problem in [*SMALL, ("math", {"answer": "42"})]:
            assert graded_in_time(task, response, **problem) == 0


EVERY = [
    *SMALL,
    ("math", {"answer": ["1,2", "(3,4)"]}),
    ("math", {"answer": "7", "acpo_compat": True}),
    ("countdown", {"numbers": [1, 2], "target": 3}),
    ("qa", {"answer": ["a b"]}),
    ("tableqa", {"answer": [1, "a"]}),
]
TOKENS = (r"\frac { } \sqrt ^ _ 1 2 x + - ( ) , \{ \} \text \pi = < [ ] \cup ! % \circ \left & : "
          r"and | \in \overline \pm \begin{cases} \end{cases} \pmod cm or 0. \ldots").split()
LATEX = st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join)
UNICODE = st.text(st.characters(), max_size=60)  # includes lone surrogates
FRAMES = [
    "{}",
    r"\boxed{{{}}}",
    "<answer>{}</answer>",
    r"<answer>\boxed{{{}}}</answer>",
    "<think></think>{}</think> Answer: {}",
]
NUMBERS = st.lists(st.integers(1, 99), min_size=2, max_size=4)

@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(UNICODE, LATEX), st.sampled_from(EVERY), st.sampled_from(FRAMES))
def test_any_text_gives_a_score_in_time(text, task, frame):
    graded_in_time(task[0], frame.format(text, text), **task[1])


@settings(deadline=None, max_examples=50)
@given(LATEX)
def test_any_answer_equals_itself_whatever_surrounds_it(text):
    if text and not rewards.refused(text) and not set("{}") & set(text):  # braces may not match
        assert check_gold("math", {"answer": text}) is None


@settings(deadline=None, max_examples=500)
@given(LATEX, LATEX)
def test_any_two_texts_can_be_compared(gold, pred):
    """Where both had a colon inside brackets, comparing them never ended."""
    assert rewards.compare(gold, pred, lambda pair: False) in (True, False)


@settings(deadline=None, max_examples=50)
@given(NUMBERS, st.randoms())
def test_countdown_accepts_what_it_should(numbers, rng):
    """Random expression trees, valued independently in integers, score 1; with a number changed
    they score 0."""
    text, value = str(numbers[0]), numbers[0]
    for n in numbers[1:]:
        op = rng.choice("+-*")
        text = f"({text} {op} {n})"
        value = {"+": value + n, "-": value - n, "*": value * n}[op]
    response = f"<answer>{text}</answer>"
    changed = [*numbers[:-1], numbers[-1] + 1]
    assert score("countdown", response, numbers=numbers, target=value) == 1
    assert score("countdown", response, numbers=numbers, target=value + 1) == 0
    assert score("countdown", response, numbers=changed, target=value) == 0


# ---- Threads and processes -----------------------------------------------------------------------

def test_other_threads_grade_too():
    """math-verify's alarm raises outside the main thread; verl swallowed that, and all scored 0."""
    wrong = {i: [(j >> i) % 2 for j in range(16)] for i in range(4)}  # each thread has its pattern
    got = {i: [] for i in range(4)}

    def run(i):
        for change in wrong[i]:
            got[i].append(grade("math", rf"\boxed{{{i}+x}}", answer=f"x+{i + change}"))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(4):  # and nobody got another's
        assert got[i] == [(1.0 - change, "ok") for change in wrong[i]]


def test_callers_alarm_survives():
    """math-verify in process resets SIGALRM, so a caller's own alarm would never ring."""
    rang = threading.Event()
    old = signal.signal(signal.SIGALRM, lambda *_: rang.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        score("math", r"\boxed{x+1}", answer="1+x")
        assert rang.wait(20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


BATCH = [("math", rf"\boxed{{x+{i % 7}}}", {"answer": f"{i % 5}+x"}) for i in range(40)]
EXPECTED = [(float(i % 7 == i % 5), "ok") for i in range(40)]
BATCH.append(("chainsum", "#7$", {"answer": "7"}))
EXPECTED.append((1.0, "ok"))
BOMB = [("math", r"\boxed{\sum_{i=1}^{9999} \sin i}", {"answer": "x"})]


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_keeps_order(workers):
    with Scorer(workers=workers) as s:
        assert s(BATCH) == EXPECTED
        assert s([]) == []


def test_hung_worker_is_replaced():
    """A stopped process ignores its alarm: it is killed, and only the response it had gets 0."""
    with Scorer(workers=1, timeout=1) as s:
        s(BATCH[:1])
        hung = s.workers[0].process
        os.kill(hung.pid, signal.SIGSTOP)
        assert s(BATCH) == [(0.0, "timeout")] + EXPECTED[1:]
        assert hung.poll() is not None and s.workers[0].process.pid != hung.pid


def test_crashed_worker_is_replaced():
    with Scorer(workers=1, timeout=20) as s:
        s(BATCH[:1])
        crashed = s.workers[0].process
        threading.Timer(0.5, crashed.kill).start()
        assert s(BOMB + BATCH) == [(0.0, "error")] + EXPECTED
        s.workers[0].process.kill()  # dies between two batches: nobody's response suffers
        s.workers[0].process.wait()
        assert s(BATCH) == EXPECTED


def test_bomb_costs_its_time_and_not_its_worker():
    with Scorer(workers=1, timeout=1) as s:
        s(BATCH[:1])
        pid = s.workers[0].process.pid
        got = s(BATCH[:3] + BOMB + BATCH[3:])
        assert got == EXPECTED[:3] + [(0.0, "timeout")] + EXPECTED[3:]
        assert s.workers[0].process.pid == pid  # a start takes seconds of its own


def test_a_batch_of_bombs_is_given_up(monkeypatch):
    """512 bombs of 2 s each would stop a run for minutes at every step."""
    asked = []
    def ask(self, pairs, seconds):
        asked.append(seconds)
        return 0.0, "timeout"
    monkeypatch.setattr(rewards.Worker, "ask", ask)
    with Scorer(workers=1, timeout=2) as s:
        assert s(BOMB * 512) == [(0.0, "timeout")] * 512
        assert asked == [2] * s.PATIENT + [0.5] * (s.GIVE_UP - s.PATIENT)
        asked.clear()
        s(BOMB)
        assert asked == [2]  # the next batch starts with patience again


GRADING_BOMBS = r"""
import signal
import rewards
# a job in the background may have been started with SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
s = rewards.Scorer(workers=1, timeout=2)
s([('math', r'\boxed{x+1}', {'answer': '1+x'})])
print('ready', flush=True)
s([('math', r'\boxed{\sum_{i=1}^{9999} \sin i}', {'answer': 'x'})] * 500)
"""

def test_ctrl_c_is_heard_while_grading():
    child = subprocess.Popen([sys.executable, "-c", GRADING_BOMBS], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and child.returncode != 0


def test_a_worker_without_reader_ends_in_silence():
    child = subprocess.Popen([sys.executable, rewards.__file__, "--worker"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    child.stdout = None
    _, errors = child.communicate("[1, []]\n", timeout=60)
    assert errors == "" and child.returncode == 0


WITH_A_WORKER = r"""
import rewards
s = rewards.Scorer(workers=1, timeout=2)
s([('math', r'\boxed{x+1}', {'answer': '1+x'})])
print(s.workers[0].process.pid, flush=True)
"""

@pytest.mark.parametrize("then", [
    "input()",
    r"s([('math', r'\boxed{\sum_{i=1}^{9999} \sin i}', {'answer': 'x'})])",
], ids=["idle", "busy"])
def test_workers_end_with_their_parent(then):
    """A killed run must leave no graders behind, be they idle or inside a bomb."""
    parent = subprocess.Popen([sys.executable, "-c", WITH_A_WORKER + then], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    """Is it running? An orphan that nobody has waited for is a zombie, and has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_close_leaves_no_process():
    s = Scorer(workers=1)
    s(BATCH)
    processes = [w.process for w in s.workers]
    s.close()
    for p in processes:
        with pytest.raises(ProcessLookupError):  # neither running nor a zombie
            os.kill(p.pid, 0)


def test_worker_reports_that_it_cannot_start(monkeypatch):
    """Without math-verify every answer that needs it would be 0 for ever: say so instead."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Scorer(workers=1) as s, pytest.raises(RuntimeError, match="math-verify"):
        s(BATCH[:1])


def test_rewards_imports_neither_torch_nor_sympy():
    """The worker must start in a second, and the trainer pays for SymPy only if it grades math."""
    code = "import sys, rewards; print({'torch', 'sympy', 'math_verify'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"
