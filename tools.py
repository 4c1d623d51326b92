"""Tools that a policy may call while it writes (rollout.converse): texts of calls in, texts of
replies out.

    tool = facts(data.fact)                           # of the task `hops`: nothing to install
    tool = search(passages)                           # BM25 in this process: pip install bm25s
    tool = search(url="http://127.0.0.1:8000/retrieve")    # any server of Search-R1's kind
    tool.ask(["kit.B"])                               # [(text, whether it failed)]

Neither side is trusted. A call reaches a tool as one line of at most CALL characters; a reply comes
back without the characters that our tags are made of and without control characters. A tool that
raises, is late or answers something else costs its calls a short error text, and the run nothing.
"""
import json
import math
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

CALL = 1000         # characters of a call
REPLY = 6000        # characters of a reply: three passages of Wikipedia are some 2,000
THREADS = 16        # parts of a batch that are asked at once
BODY = 64 * 2**20   # bytes that a server may send


@dataclass
class Tool:
    """What the policy writes between `call_open` and `call_close` is a call. The reply stands
    behind it, between `reply_open` and `reply_close`."""
    answer: Callable        # calls (list of str) -> replies, one each
    call_open: str
    call_close: str
    reply_open: str
    reply_close: str
    marks: str              # characters that no reply may hold, as tags are made of them
    ends: tuple = ()        # texts that end a response: it has answered
    part: int = 10**6       # calls that `answer` gets at once, or more; parts run in parallel
    seconds: float = 20.0   # for a whole batch of calls
    error: str = "error"    # what the policy reads where there is no reply

    def call_in(self, text):
        """The call with which a turn ends; None if it ends in another way."""
        before, closed, _ = text.partition(self.call_close)
        _, opened, call = before.rpartition(self.call_open)
        return call if opened and closed else None

    def ask(self, calls):
        """[(reply, whether the tool failed)] of the calls, within `seconds`."""
        calls = [" ".join(printable(call).split())[:CALL] for call in calls]
        asked = list(dict.fromkeys(calls))  # the samples of a prompt often ask the same
        size = max(self.part, math.ceil(len(asked) / THREADS))
        replies = {}
        threads = []
        for i in range(0, len(asked), size):
            part = (asked[i:i + size], replies)
            threads.append(threading.Thread(target=self.work, args=part, daemon=True))
            threads[-1].start()  # a daemon, so that one can stop waiting for it
        deadline = time.monotonic() + self.seconds
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        in_time = dict(replies)  # what comes from now on is too late
        return [(in_time.get(call, self.error), call not in in_time) for call in calls]

    def work(self, calls, replies):
        with suppress(Exception):  # whatever a stranger's code or server does; it is counted
            found = map(self.defused, self.answer(calls))
            replies.update(dict(zip(calls, found, strict=True)))  # all of them or none

    def defused(self, reply):
        """A reply that cannot be taken for anything but text."""
        reply = printable(reply[:REPLY])
        return "".join(c for c in reply if c not in self.marks).strip()


def printable(text):
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def facts(fact):
    """The Tool of a small task, as data.fact of hops: `fact` is a function of one call."""
    return Tool(lambda calls: map(fact, calls), "[", "]", "(", ")", marks="[]()#$", error="?")


# ---- Search: the tags of WAPO and Search-R1 ------------------------------------------------------

TOP = 3  # passages of a reply


def search(passages=(), url=""):
    """The Tool over `passages` (texts), or of a server (url)."""
    answer = partial(retrieve, url) if url else bm25(passages)
    return Tool(answer, "<search>", "</search>", "\n\n<information>", "</information>\n\n",
                marks="<>", ends=("</answer>",), part=16 if url else 10**6, seconds=60.0,
                error="the search failed; try again, or answer")


def bm25(passages):
    """The classic ranking by words in common, in this process."""
    try:
        import bm25s
    except ImportError:
        raise ValueError("--tool search needs a package: pip install bm25s; or give --search_url "
                         "a server") from None
    quiet = {"show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, **quiet), **quiet)

    def answer(calls):
        found, _ = index.retrieve(bm25s.tokenize(calls, **quiet), k=min(TOP, len(passages)),
                                  **quiet)
        return [shown(passages[i] for i in best) for best in found]
    return answer


def retrieve(url, calls):
    """Of a Search-R1 server: {"result": [[{"document": {"contents": text}, "score": s}, ..], ..]},
    a list for each query."""
    question = {"queries": calls, "topk": TOP, "return_scores": True}
    request = urllib.request.Request(url, json.dumps(question).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        found = json.loads(response.read(BODY))["result"]  # cut where it is longer: an error
    return [shown(hit["document"]["contents"] for hit in best[:TOP]) for best in found]


def shown(passages):
    return "\n\n".join(" ".join(passage.split()) for passage in passages)


# ---- By name -------------------------------------------------------------------------------------

KINDS = ("none", "facts", "search")


def make(kind, fact=None, url="", passages=list):
    """The Tool of --tool, or None. fact: what facts() needs, if the task has it; passages: a
    function that loads them."""
    if kind == "none":
        return None
    if kind == "facts" and fact:
        return facts(fact)
    if kind != "search":
        raise ValueError(f"--tool {kind}: this --data has no {kind}; choose none, search or, with "
                         "--data hops, facts")
    if url and not url.startswith(("http://", "https://")):  # urllib would open a file:// as well
        raise ValueError(f"--search_url {url}: must begin with http:// or https://")
    return search(() if url else passages(), url)
