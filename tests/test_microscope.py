"""The microscope's page: its numbers against another way to them, its texts against hostile models,
and what a real browser shows of it (`-m "not browser"` leaves that out)."""
import base64
import json
import math
import os
import re
import shutil
import subprocess
from functools import partial

import pytest
import torch

from experiments import microscope

HOSTILE = "</script><img src=x onerror=\"document.title='run'\"><!-- <script> &amp; \u2028\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Headless Chromium by its own protocol: JSON over two pipes, each message ended by a zero."""

    def __init__(self, url, home):
        from_here, self.to = os.pipe()
        self.source, from_there = os.pipe()
        command = (f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --user-data-dir={home} "
                   f"--remote-debugging-pipe about:blank 3<&{from_here} 4>&{from_there}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(from_here, from_there),
                                        stderr=subprocess.DEVNULL)
        os.close(from_here)
        os.close(from_there)
        self.number, self.buffer, self.session = 0, b"", {}
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.to)
        os.close(self.source)

    def message(self):
        while b"\0" not in self.buffer:
            more = os.read(self.source, 1 << 20)
            assert more, "chromium ended"
            self.buffer += more
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def wait_for(self, event):
        while self.message().get("method") != event:
            pass

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def look(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key):
        code = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9}.get(key, 0)
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code)

    def screenshot(self, path, width=1280, height=900, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        # Two frames, so that what follows from the new size is drawn.
        self.call("Runtime.evaluate", awaitPromise=True, expression="new Promise(done => "
                  "requestAnimationFrame(() => requestAnimationFrame(done)))")
        picture = self.call("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(picture))
        return path


# ---- A page to look at ---------------------------------------------------------------------------

SMALL = """--groups 3 --samples 8 --updates 5 --lr 5e-3 --width 16 --layers 1 --skill_steps 60
--habit_steps 60 --max_new_tokens 16 --page page.html""".split()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The file, and what it holds with its arrays decoded."""
    home = tmp_path_factory.mktemp("microscope")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        microscope.main(SMALL)
        yield home / "page.html"


@pytest.fixture(scope="module")
def shown(page):
    return held_by(page)


def held_by(path):
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    held = json.loads(text[1])
    for name in ("log_ratio", "entropy"):
        held[name] = [decoded(part) for part in held.get(name, [])]
    for lens in held["lenses"].values():
        for view in lens["views"]:
            view["w"] = decoded(view["w"])
    return held


def decoded(text, dtype=torch.float16):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).double()


def by_token(held, values):
    """A number per response, repeated for each of its tokens."""
    responses = [r for group in held["groups"] for r in group["responses"]]
    lengths = torch.tensor([r["length"] for r in responses])
    return torch.tensor(values).double().repeat_interleave(lengths)


# ---- Numbers -------------------------------------------------------------------------------------

def advantage(held, kind):
    out = []
    for group in held["groups"]:
        reward = torch.tensor([r["score"] for r in group["responses"]]).double()
        A = 2 * reward - 1 if kind == "signed" else reward - reward.mean()
        out.append(A / (reward.std() + 1e-6) if kind == "grpo" else A)
    return by_token(held, torch.cat(out).tolist())


def ppo(r, A, low, high, dual_clip=math.inf):
    too_high = (A > 0) & (r > high)
    too_low = (A < 0) & ((r < low) | (r > dual_clip))
    return torch.where(too_high | too_low, 0, r * A)


def of_response(held, d):
    """exp of the mean log ratio of the response, per token."""
    lengths = [r["length"] for group in held["groups"] for r in group["responses"]]
    means = [part.mean() for part in d.split(lengths)]
    return by_token(held, torch.stack(means).exp().tolist())


def kl3(d, r, A):
    too_far = r - 1 - d > 0.1
    return torch.where(too_far & (A * d > 0), 0, r * A)


def gspo(d, r, A, held):
    return ppo(of_response(held, d), A, 1 - 3e-4, 1 + 4e-4)


def psr_nsr(d, r, A):
    return ppo(r, torch.where(A > 0, 0.1, -1), 0.8, 1.2)


def sapo(d, r, A):
    tau = torch.where(A > 0, 1.0, 1.05)
    return r * A / torch.cosh(tau * (r - 1) / 2) ** 2


WEIGHTS = {  # w by the papers' formulas: (advantage, function of log ratio, r, A)
    "grpo": ("grpo", lambda d, r, A: ppo(r, A, 0.8, 1.2)),
    "dapo": ("grpo", lambda d, r, A: ppo(r, A, 0.8, 1.28, 10)),
    "dr_grpo": ("mean", lambda d, r, A: ppo(r, A, 0.8, 1.2)),
    "kl3": ("grpo", kl3),
    "cispo": ("grpo", lambda d, r, A: r.clamp(max=1.3) * A),
    "wapo": ("mean", lambda d, r, A: ppo(r, A.clamp(min=0), 0, 10)),
    "psr_nsr": ("signed", psr_nsr),
    "sapo": ("grpo", sapo),
    "dro": ("grpo", lambda d, r, A: A - 0.1 * d),
}


@pytest.mark.parametrize("name", [*WEIGHTS, "gspo"])
def test_weights_are_those_of_the_papers_formulas(shown, name):
    """From the page's ratios and rewards alone, at its last update."""
    # gspo alone looks at the other tokens of the response
    kind, formula = WEIGHTS.get(name, ("grpo", partial(gspo, held=shown)))
    d, A = shown["log_ratio"][-1], advantage(shown, kind)
    assert d.abs().max() > 0.5 and (A != 0).any(), "nothing to see at this update"
    w = shown["lenses"][name]["views"][-1]["w"]
    expected = formula(d, d.exp(), A)
    wrong = (w - expected).abs() > 2e-3 * (1 + expected.abs())
    # Ratios have three digits here, so one may fall on the other side.
    assert wrong.double().mean() < 0.01


def test_probabilities_are_transformers(page, shown):
    """Probability and entropy at the first update, where the model is the checkpoint; and the share
    of the gradient by probability, from whole distributions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source = next((page.parent / "runs/warmstart").iterdir())
    model = AutoModelForCausalLM.from_pretrained(source).double()
    tokenizer = AutoTokenizer.from_pretrained(source)
    p, entropy = [], []
    share, count = torch.zeros(10).double(), torch.zeros(10)
    A = advantage(shown, "grpo")
    for group in shown["groups"]:
        prompt = tokenizer(group["prompt"]).input_ids
        for response in group["responses"]:
            ids = tokenizer.convert_tokens_to_ids(response["tokens"])
            logits = model(torch.tensor([prompt + ids])).logits[0].detach()
            every = logits[len(prompt) - 1:-1].softmax(-1)
            entropy += (-(every * every.log()).sum(-1)).tolist()
            for t, token in enumerate(ids):
                tenth = min(9, int(10 * every[t, token]))
                one = torch.nn.functional.one_hot(torch.tensor(token), every.shape[1])
                share[tenth] += A[len(p)].abs() * (one - every[t]).norm() / len(ids)
                count[tenth] += 1
                p.append(every[t, token].item())
    old_p = decoded(shown["old_logp"], torch.float32).exp()
    assert torch.allclose(old_p, torch.tensor(p).double(), atol=1e-5)
    assert torch.allclose(shown["entropy"][0], torch.tensor(entropy).double(), atol=2e-3)
    first = shown["lenses"]["grpo"]["views"][0]
    assert first["clipped"] == [0] * 10
    assert first["count"] == pytest.approx(count.tolist(), abs=1)
    assert first["kept"] == pytest.approx((share / share.sum()).tolist(), abs=0.01)


@pytest.mark.parametrize("name", ["grpo", "dapo", "kl3", "acpo", "cispo_masked", "ar_lopti"])
def test_tokens_are_clipped_where_the_band_ends(shown, name):
    """The lines come from made-up tokens, the states from those of the rollout."""
    lens, d = shown["lenses"][name], shown["log_ratio"][-1]
    p = (decoded(shown["old_logp"], torch.float32) + d).exp()
    stretch = (p * 50).long().clamp(max=49)
    A, state = by_token(shown, lens["advantage"]), lens["views"][-1]["state"]
    clipped = torch.tensor([s in "123" for s in state])
    beyond, close = torch.zeros_like(clipped), torch.zeros_like(clipped)
    for line in lens["band"]["lines"][-1]:
        if line["capped"]:
            continue
        edges = [math.nan if e is None else e for e in line["edge"]]
        edge = torch.tensor(edges).double()[stretch]
        outside = torch.where(edge > 0, d > edge, d < edge)
        beyond |= (A * line["sign"] > 0) & outside
        close |= (d - edge).abs() < 0.01
    assert beyond.any(), "nothing was clipped"
    assert torch.equal(clipped | close, beyond | close)


def test_what_made_a_weight_zero(shown):
    """acpo: the upper and lower bound, the dual clip at ratio 3, no advantage; entropy_top: a fifth
    of each response, of at least one token, may learn."""
    def state(name):
        return shown["lenses"][name]["views"][-1]["state"]
    d, A = shown["log_ratio"][-1], advantage(shown, "grpo")
    for sign, ratio, s in zip(A.sign().tolist(), d.exp().tolist(), state("acpo")):
        assert s in {0: "5", 1: "01", -1: "023"}[sign]
        assert s != "3" or ratio > 2.99
    lengths = by_token(shown, [r["length"] for g in shown["groups"] for r in g["responses"]])
    chosen = torch.tensor([s in "0123" for s in state("entropy_top")])[A != 0]
    shares = ((lengths / 5).floor().clamp(min=1) / lengths)[A != 0]
    assert chosen.sum().item() == pytest.approx(shares.sum().item())


def seen_by_hand(name, p_old, ratios):
    """A winner of three tokens and a loser of two."""
    flags = microscope.train.parse(["--loss", name, "--samples", "2"])
    old_logp = torch.tensor(p_old).log()
    logp = old_logp + torch.tensor(ratios).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    sum_p2 = torch.full((2, 3), 0.4)
    view = microscope.train.TokenStats(mask, old_logp, logp, mask * 1.0, sum_p2)
    winner, loser = (microscope.train.Rollout([], 0, [], True, advantage=A) for A in (1.0, -1.0))
    return microscope.Lens(name, view, [winner, loser], flags).seen()


def test_the_dual_clip_is_told_from_the_lower_bound():
    p_old = [[0.9, 0.9, 0.9], [0.1, 0.5, 1.0]]
    ratios = [[1.0, 1.0, 1.0], [3.5, 0.05, 1.0]]
    seen = seen_by_hand("acpo", p_old, ratios)
    assert seen["state"] == "00032"


def test_share_of_what_is_clipped():
    """By hand: ratio 1.5 is clipped where A > 0, not where A < 0."""
    p_old = [[0.1, 0.5, 0.25], [0.1, 0.5, 1.0]]
    seen = seen_by_hand("grpo", p_old, [[1.5, 1.0, 1.0]] * 2)
    size = [(1 - 2 * p + 0.4)**0.5 for p in (0.15, 0.5, 0.25)]  # of the three kinds of tokens
    kept, clipped = [0.0] * 10, [0.0] * 10
    clipped[1] = 1.5 * size[0] / 3
    kept[1] = 1.5 * size[0] / 2
    kept[5] = size[1] / 3 + size[1] / 2
    kept[2] = size[2] / 3
    total = sum(kept) + sum(clipped)
    assert seen["kept"] == pytest.approx([x / total for x in kept], abs=2e-5)
    assert seen["clipped"] == pytest.approx([x / total for x in clipped], abs=2e-5)
    assert seen["state"] == "10000"
    assert seen["count"] == [0, 2, 1, 0, 0, 2, 0, 0, 0, 0]


def test_bands_known_by_heart(shown):
    def lines(name):
        return shown["lenses"][name]["band"]["lines"]
    ends = {1: set(), -1: set()}
    for line in lines("grpo")[0]:
        ends[line["sign"]] |= {e for e in line["edge"] if e}
    for sign, ratio in ((1, 1.2), (-1, 0.8)):
        assert ends[sign]
        for end in ends[sign]:
            assert end == pytest.approx(math.log(ratio), rel=6e-3)
    cap = lines("cispo")[0][0]
    assert cap["capped"] and cap["edge"][0] == pytest.approx(math.log(1.3), rel=6e-3)
    assert len(lines("acpo")) == len(shown["updates"])  # its band moves
    assert lines("kl_cov") == [], "it looks at the batch"
    assert {e for line in lines("sapo")[0] for e in line["edge"]} == {None}, "it has none"
    assert "lone token" in shown["lenses"]["gspo"]["band"]["note"]


# ---- Texts ---------------------------------------------------------------------------------------

def write_samples(path):
    row = {"id": HOSTILE, "sample": 0, "length": 3, "status": "ok", "score": 0.0, "prompt": HOSTILE,
           "response": HOSTILE, "answer": {"answer": HOSTILE}, "finished": True}
    rows = [row, row | {"sample": 1, "score": 1.0, "response": "fine"},
            row | {"id": "b", "status": "no_answer", "finished": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half a li')
    page = path.with_suffix(".html")
    microscope.main([str(path), "--page", str(page)])
    return page


def test_hostile_text_stays_text(tmp_path):
    page = write_samples(tmp_path / "samples_math.jsonl")
    template = (microscope.Path(microscope.__file__).with_suffix(".html")).read_text()
    for tag in ("<script", "</script", "<!--", "<img"):
        assert page.read_text().lower().count(tag) == template.lower().count(tag)
    assert template.count("__DATA__") == 1
    held = held_by(page)
    assert held["about"].endswith("3 responses to 2 questions")  # and half a line
    first = held["groups"][0]
    assert first["prompt"] == first["responses"][0]["tokens"][0] == HOSTILE
    kinds = [r["kind"] for group in held["groups"] for r in group["responses"]]
    assert kinds == ["wrong", "right", "truncated"]
    assert not re.search("innerHTML|https?:", template)


def test_a_page_too_large_says_what_it_lacks(monkeypatch):
    flags = microscope.train.parse(["--loss", "sapo"])
    names, looks = microscope.what_fits(flags, 200 * 2000, 16)
    assert 200 * 2000 * len(names) * len(looks) <= microscope.MOST
    assert {"sapo", "acpo", "grpo"} <= set(names) and looks[0] == 1 and looks[-1] == 16
    assert len(microscope.what_fits(flags, 500, 16)[0]) == len(microscope.losses.OBJECTIVES)


def test_an_empty_file_is_one_line(tmp_path):
    (tmp_path / "samples_x.jsonl").write_text("")
    with pytest.raises(ValueError, match="samples_x.jsonl: no responses"):
        microscope.main([str(tmp_path / "samples_x.jsonl")])


# ---- A browser -----------------------------------------------------------------------------------

browser = [pytest.mark.browser,
           pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")]


def with_marks(test):
    for mark in browser:
        test = mark(test)
    return test


def numbers_shown(chromium):
    """What the bar at the bottom says, by its keys."""
    return json.loads(chromium.look(
        "JSON.stringify(Object.fromEntries([...document.querySelectorAll('#inspector dd')]"
        ".map(dd => [dd.dataset.key, dd.textContent])))"))


def number(text):
    return float(text.replace("−", "-"))


def check_numbers(chromium, held, update, token, names):
    seen = numbers_shown(chromium)
    d = held["log_ratio"][update][token].item()
    old = decoded(held["old_logp"], torch.float32)[token].item()
    assert number(seen["ratio"]) == pytest.approx(math.exp(d), rel=1e-3)
    assert number(seen["p_old"]) == pytest.approx(math.exp(old), rel=1e-3)
    assert number(seen["p"]) == pytest.approx(math.exp(old + d), rel=1e-3)
    assert number(seen["entropy"]) == pytest.approx(
        held["entropy"][update][token].item(), rel=1e-3)
    for k, name in enumerate(names):
        view = held["lenses"][name]["views"][update]
        assert seen[f"objective{k}"] == name
        w = view["w"][token].item()
        assert number(seen[f"w{k}"]) == pytest.approx(w, rel=1e-3, abs=1e-6)
        assert seen[f"clipped{k}"] == ["no", "upper bound", "lower bound", "dual clip", "left out",
                                       "A = 0"][int(view["state"][token])]


def select(chromium, name, value):
    chromium.look(f"document.getElementById('{name}').value = '{value}'; "
                  f"document.getElementById('{name}').dispatchEvent(new Event('change'))")


@with_marks
def test_the_page_shows_the_files_numbers(page, shown, tmp_path):
    """Slider by its arrow keys, tokens by Tab and arrows, objectives by their lists; two of them
    side by side; at two widths, light and dark."""
    scores = [{r["score"] for r in group["responses"]} for group in shown["groups"]]
    group = next(i for i, found in enumerate(scores) if len(found) > 1)
    lengths = [sum(r["length"] for r in g["responses"]) for g in shown["groups"]]
    first, length = sum(lengths[:group]), lengths[group]
    with Browser(f"file://{page}#group={group}&token={first}", tmp_path) as chromium:
        check_numbers(chromium, shown, 0, first, ["acpo"])
        chromium.look("document.getElementById('update').focus()")
        for _ in range(3):
            chromium.press("ArrowRight")
        assert chromium.look("document.getElementById('updates').textContent") == "4 of 5"
        check_numbers(chromium, shown, 3, first, ["acpo"])
        for _ in range(3):  # the list of groups, the prompt, the first response
            chromium.press("Tab")
        chromium.press("ArrowRight")
        chromium.press("ArrowRight")
        check_numbers(chromium, shown, 3, first + 2, ["acpo"])
        select(chromium, "objective", "grpo")
        select(chromium, "second", "gspo")
        check_numbers(chromium, shown, 3, first + 2, ["grpo", "gspo"])

        colored = chromium.look("[...document.querySelectorAll('.tokens span')].slice(0, 3)"
                                ".map(span => span.style.background.length > 0).join()")
        w = shown["lenses"]["grpo"]["views"][3]["w"][first:first + 3]
        assert colored == ",".join(str(bool(x)).lower() for x in w)
        views = [shown["lenses"][name]["views"][3] for name in ("grpo", "gspo")]
        differ = chromium.look("document.getElementById('differ').textContent")
        scale = max(1, max(map(abs, shown["lenses"]["acpo"]["advantage"])))
        distance = (views[0]["w"] - views[1]["w"])[first:first + length]
        apart = distance.abs() > 0.01 * scale
        assert differ == f"{int(apart.sum())} of {length} tokens here" and apart.any()
        kept = chromium.look("[...document.querySelectorAll('figure tr td:nth-child(3)')]"
                             ".map(td => td.textContent).join()").split(",")
        for part, x in zip(kept, views[0]["kept"] + views[1]["kept"]):
            assert float(part) == pytest.approx(100 * x, abs=0.051)

        for width in (1280, 420):
            for dark in (False, True):
                picture = chromium.screenshot(tmp_path / f"{width}{dark}.png", width, 900, dark)
                assert picture.stat().st_size > 20_000
                assert chromium.look("document.documentElement.scrollWidth") <= width
        assert chromium.look("[...document.querySelectorAll('canvas')].every(canvas => canvas"
                             ".getContext('2d').getImageData(0, 0, 200, 200).data.some(x => x))")


@with_marks
def test_a_browser_runs_nothing_of_a_response(tmp_path):
    page = write_samples(tmp_path / "samples_math.jsonl")
    with Browser(f"file://{page}", tmp_path / "profile") as chromium:
        assert chromium.look("document.title") == "samples_math.jsonl"
        assert chromium.look("document.images.length") == 0
        text = chromium.look("document.querySelector('.tokens').textContent")
        assert text == HOSTILE.replace("\n", "↵\n")
        select(chromium, "kind", "truncated")
        assert chromium.look("document.getElementById('group').selectedOptions[0].text") == "b"
