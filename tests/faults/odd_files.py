"""What is no plain file in every place that is read, and a disk that fails in the middle of one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.catalogue import Entry, spread
from tests.faults.checkpoint import ROOT
from tests.faults.trial import Bench, Ended, Lost

_LIMIT_SECONDS = 60
_SIDE_FILE = "NOTICE"
# Place -> the file in the model's folder, or the option that takes one.
_IN_MODEL = {
    "config": "config.json",
    "index": "model.safetensors.index.json",
    "shard": "model-00002-of-000004.safetensors",
    "tokenizer": "tokenizer.json",
    "side file": _SIDE_FILE,
}
_GIVEN = ["score file", "keep-list", "plan", "family file"]
_KINDS = ["link out", "FIFO", "device", "link to nothing", "link to itself"]


def _lay(path: Path, kind: str, elsewhere: Path) -> None:
    """Put what is no plain file in a file's place; elsewhere: where the file itself is now."""
    ends = {"link out": elsewhere, "device": Path("/dev/zero"), "link to itself": path}
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(ends.get(kind, path.with_name("gone")))


def _given(bench: Bench, folder: Path) -> dict[str, Path]:
    """Good files for the places that a user names."""
    files = {place: folder / f"{place.replace(' ', '-')}.json" for place in _GIVEN}
    files["score file"] = folder / "scores.pt"
    files["family file"] = folder / "family.toml"
    shutil.copy(bench.model / "scores.pt", files["score file"])
    shutil.copy(ROOT / "shardsurgeon" / "families" / "deepseek_v3.toml", files["family file"])
    model = ["--model", str(bench.model), "--mtp", "last"]
    plan = ["plan", str(files["score file"]), *model, "--ratio", "0.5", "-o", str(files["plan"])]
    ended = _run(bench, plan)
    if ended.status:
        raise Lost(ended.stderr)
    shutil.copy(files["plan"], files["keep-list"])
    return files


def _run(bench: Bench, words: list[str]) -> Ended:
    command = [sys.executable, "-m", "shardsurgeon", *words]
    try:
        done = subprocess.run(
            command,
            env=bench.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Lost(f"hung for {_LIMIT_SECONDS} s: {' '.join(words)}") from error
    status = done.returncode
    return Ended(128 - status if status < 0 else status, done.stderr)


def _words(bench: Bench, place: str, path: Path) -> list[str]:
    """The command that reads the file as what it is; path: of a file that the user names."""
    if place in ("keep-list", "plan"):
        model = ["--model", str(bench.model), "--mtp", "last", "-o", str(bench.out)]
        return ["apply", "--plan", str(path), *model]
    words = bench.words()
    if place == "score file":
        words[1] = str(path)
    return [*words, "--family", str(path)] if place == "family file" else words


def odd_files(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """Every kind in every place, as many of them as there are tries; then the file is back."""
    folder = bench.place.parent / "given"
    folder.mkdir(exist_ok=True)
    (bench.model / _SIDE_FILE).write_bytes(b"text")
    try:
        files = {place: bench.model / name for place, name in _IN_MODEL.items()}
        files |= _given(bench, folder)
        every = [(place, kind) for place in files for kind in _KINDS]
        for place, kind in numbers.sample(every, min(tries, len(every))):
            path, elsewhere = files[place], folder / "aside"
            shutil.move(path, elsewhere)
            _lay(path, kind, elsewhere)
            ended = _run(bench, _words(bench, place, path))
            path.unlink()
            shutil.move(elsewhere, path)
            _require_right(bench, place, kind, ended)
            bench.clear()
            yield ended
    finally:
        (bench.model / _SIDE_FILE).unlink()
        shutil.rmtree(folder)


def _require_right(bench: Bench, place: str, kind: str, ended: Ended) -> None:
    what = f"{kind} as {place}"
    # A shard may lie elsewhere, and so may what the user names.
    welcome = kind == "link out" and (place == "shard" or place in _GIVEN)
    if welcome or place == "side file":
        bench.require(ended.status == 0, what, ended)
        bench.require((bench.out / "config.json").is_file(), what, ended)
        bench.require(not (bench.out / _SIDE_FILE).exists() or welcome, what, ended)
    else:
        bench.require_told(ended, {2}, r"error: \S+: ")
        bench.require("SHARDSURGEON_DEBUG" not in ended.stderr, what, ended)
        bench.require(not list(bench.place.iterdir()), f"{what} left something", ended)


def failing_disk(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """EIO in the middle of a shard: of the source, of the result, and of one that is resumed."""
    smallest = min(path.stat().st_size for path in bench.model.glob("*.safetensors"))
    places = (f"{bench.model}/", f"{bench.out}.partial/files/")
    faults: list[dict[str, Any]] = [
        {"calls": ["read_at"], "inside": place, "beyond": smallest // 3} for place in places
    ]
    counts = [bench.count(**fault) for fault in faults]
    for number in range(tries):
        phase = min(number % 3, 1)
        if number % 3 == 2:
            bench.run(fault={"calls": ["rename"], "what": "kill", "nth": numbers.randint(2, 4)})
        nth = spread(counts[phase], tries, numbers)[number]
        error = {**faults[phase], "what": "error", "code": errno.EIO, "nth": nth}
        ended = bench.run(fault=error)
        # Threads may have had fewer calls, and a resumed run has fewer.
        if ended.status:
            bench.require_told(ended, {1}, "Input/output error.*check the disk")
            bench.require_no_out(ended)
        bench.require_source(ended)
        bench.require_finishes()
        bench.clear()
        yield ended


ODD_FILES = [
    Entry("links and devices in every place that we read", odd_files, 45),
    Entry("a read error (EIO) in the middle of a shard", failing_disk, 21),
]
