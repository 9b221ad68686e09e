"""The terminal is lost, in each phase of each command: what that costs is the words.

A command that makes something ends as if nothing had happened, with the same bytes; one that only
prints ends quietly where its reader left, else with status 1; none takes a minute.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.faults.catalogue import EVERY_CALL, RESUMES, Attempt, Entry, injected, spread
from tests.faults.checkpoint import ROOT
from tests.faults.driver import LOSSES
from tests.faults.trial import Bench, Ended, Lost, contents

READER_LEFT = 141


@dataclass(frozen=True)
class Case:
    """A command: made: what it writes, None where its status or its words are all."""

    words: list[str]
    made: Path | None = None
    only_prints: bool = False


def cases(bench: Bench) -> list[Case]:
    """Every command that needs no network."""
    scores, model, folder = str(bench.model / "scores.pt"), str(bench.model), bench.place / "made"
    plan = ["plan", scores, "--model", model, "--ratio", "0.5", "--mtp", "last"]
    found = [
        Case(bench.words("--progress"), bench.out),
        Case([*plan, "-o", str(folder / "plan.json")], folder / "plan.json"),
        Case(["verify", model, model, "--progress"]),
        Case(["scores", "random", model, "-o", str(folder / "r.npz")], folder / "r.npz"),
        Case(["scores", "convert", scores, "-o", str(folder / "c.json")], folder / "c.json"),
        Case(["inspect", model], only_prints=True),
        Case(plan, only_prints=True),
        Case([*plan, "--json"], only_prints=True),
        Case(["scores", "show", scores], only_prints=True),
        Case(["apply", *plan[1:], "--dry-run"], only_prints=True),
    ]
    if find_spec("torch") and find_spec("datasets"):
        chats = bench.place.parent / "chats.jsonl"
        turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "the cat"}]
        chats.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(4)))
        words = ["calibrate", str(ROOT / "fixtures" / "qwen3_moe"), "--dataset", str(chats)]
        words += ["--samples", "4", "--progress", "-o", str(folder / "s.npz")]
        found.append(Case(words, folder / "s.npz"))
    return found


def lost(what: str, *, nohup: bool = False) -> Attempt:
    """The streams go where no word is taken, or the signal comes: before the first call, and at
    calls of every part of the run; `closed`: there never were any."""

    def attempt(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
        every = cases(bench)[:tries]
        share = [range(tries)[number :: len(every)] for number in range(len(every))]
        for case, moments in zip(every, share, strict=True):
            (bench.place / "made").mkdir(exist_ok=True)
            begun = time.monotonic()
            alone = bench.run_words(case.words, alone=120)
            seconds = time.monotonic() - begun
            wanted = _made(case)
            bench.clear()
            for nth in _moments(bench, case, what, len(moments), numbers):
                (bench.place / "made").mkdir(exist_ok=True)
                fault: dict[str, Any] = {"calls": EVERY_CALL, "what": what, "nth": nth}
                closed = what == "closed"
                ended = bench.run_words(
                    case.words,
                    None if closed else {**fault, "nohup": nohup},
                    closed=closed,
                    alone=seconds,
                )
                status = _status(case, what) if case.only_prints else alone.status
                bench.require(ended.status == status, f"{case.words}: not {status}", ended)
                bench.require("Traceback" not in ended.stderr, f"{case.words}", ended)
                bench.require(_made(case) == wanted, f"{case.words} made something else", ended)
                left = {path.name for path in bench.place.iterdir()}
                bench.require(left <= {"made", "out"}, f"{case.words} left {left}", ended)
                bench.require_source(ended)
                bench.clear()
                yield ended

    return attempt


def _made(case: Case) -> object:
    if case.made is None or not case.made.exists():
        return None
    if case.made.is_dir():
        return contents(case.made)
    return case.made.read_bytes()


def _moments(bench: Bench, case: Case, what: str, tries: int, numbers: random.Random) -> list[int]:
    """At which calls: 0 is before the first. A command may make no call that is counted."""
    if what == "closed" or tries == 0:
        return [0] * tries
    (bench.place / "made").mkdir(exist_ok=True)
    counted = bench.place.parent / "counted"
    bench.run_words(case.words, {"calls": EVERY_CALL, "counted": str(counted)}, alone=120)
    count = int(counted.read_text())
    bench.clear()
    first = 1 if what == "hang up" else 0
    if count == 0:
        return [0] * tries
    return [first, *spread(count, tries - 1, numbers)]


def _status(case: Case, what: str) -> int:
    if what == "hang up":
        return 0
    return READER_LEFT if what == "reader left" else 1


def lost_while_sending(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """The same while shards are uploaded, with bars; what is made is the commit."""
    count = bench.count(calls=EVERY_CALL)
    kinds = cycle(LOSSES)
    for nth in spread(count, tries, numbers):
        fault = {"calls": EVERY_CALL, "what": next(kinds), "nth": nth, "batch": 1 << 20}
        ended = bench.run_words(bench.words("--progress"), fault)
        if ended.status:
            raise Lost(f"status {ended.status}: {ended.stderr}")
        bench.require_finishes()
        bench.clear()
        yield ended


TERMINALS = [
    *(Entry(f"stdout and stderr: {what}, each command", lost(what), 44) for what in LOSSES),
    Entry("stdout and stderr: closed from the beginning, each command", lost("closed"), 11),
    Entry("SIGHUP under nohup, each command", lost("hang up", nohup=True), 33),
    Entry(
        "the terminal is closed (SIGHUP)",
        injected({129}, RESUMES, calls=EVERY_CALL, what="hang up"),
    ),
]
SENDINGS = [Entry("stdout and stderr lost while shards are sent", lost_while_sending, 12)]
