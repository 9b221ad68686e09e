"""Test files run in copies of the tree, in children of one process that has the libraries loaded.

A child begins without any of our own modules, so that it imports what lies in its copy: all as it
is, to note which lines each test file reaches, or with one module changed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.mutation.mutants import Mutant

# What tests import and no mutant changes.
LIBRARIES = [
    "pytest",
    "_pytest.assertion.rewrite",
    "hypothesis",
    "click",
    "huggingface_hub",
    "numpy",
    "safetensors.numpy",
    "starlette.applications",
    "uvicorn",
    "yaml",
]
OURS = ("shardsurgeon", "tests", "fixtures")
# A line that a test reaches first in a later call of its function is not noted: tracing takes time.
MOST_CALLS = 2000


@dataclass
class Job:
    """Test files to run, as they are or with a mutant; done: told the answer.

    traced: modules of which the reached lines are noted. The answer is {"by": the first test that
    failed, or "", "seconds": of processor time, "lines": of each traced module}; {"by": "time"}
    after `limit` seconds by the clock, {"by": "crash"} where the process itself went down.
    """

    files: list[str]
    limit: float
    done: Callable[[dict[str, Any]], None]
    mutant: Mutant | None = None
    traced: Collection[str] = ()


class Copy:
    """A copy of a tree, in which one job runs at a time."""

    def __init__(self, root: Path, tree: Path) -> None:
        """Copy what git does not ignore."""
        self.root = root
        self._answer = root / "answer.json"
        self._writes = 0
        self._job: Job | None = None
        self._pid = 0
        self._began = 0.0
        self._original = b""
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (tree / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, root / name)

    @property
    def is_free(self) -> bool:
        """Whether no job runs here."""
        return self._job is None

    def begin(self, job: Job) -> None:
        """Start a job."""
        self._job = job
        if job.mutant:
            self._original = (self.root / job.mutant.path).read_bytes()
            self._write(job.mutant.path, job.mutant.applied(self._original))
        self._answer.unlink(missing_ok=True)
        shutil.rmtree(self.root / "tmp", ignore_errors=True)
        self._began = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                answer = _tested(self.root, job)
                self._answer.write_text(json.dumps(answer), encoding="utf-8")
            finally:
                os._exit(0)

    def look(self) -> None:
        """See whether the job has ended, or must."""
        job = self._job
        if job is None:
            return
        ended, _ = os.waitpid(self._pid, os.WNOHANG)
        if ended or time.monotonic() - self._began > job.limit:
            self.stop(wait=not ended)
            answer = {"by": "crash" if ended else "time", "seconds": 0.0, "lines": {}}
            if ended and self._answer.exists():
                answer = json.loads(self._answer.read_text("utf-8"))
            job.done(answer)

    def stop(self, *, wait: bool = True) -> None:
        """End what runs here, and what it has started; put the module back."""
        if self._job is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if wait:
            os.waitpid(self._pid, 0)
        if self._job.mutant:
            self._write(self._job.mutant.path, self._original)
        self._job = None

    def _write(self, path: str, source: bytes) -> None:
        """Write a module with a time of its own, so that no compiled one is taken for it."""
        self._writes += 1
        (self.root / path).write_bytes(source)
        os.utime(self.root / path, (10**9 + self._writes,) * 2)


def run(jobs: Iterable[Job], copies: list[Copy]) -> None:
    """Run all jobs, one in each copy at a time."""
    waiting: Iterator[Job] = iter(jobs)
    _load_libraries()
    try:
        while True:
            for copy in copies:
                copy.look()
                if copy.is_free and (job := next(waiting, None)):
                    copy.begin(job)
            if all(copy.is_free for copy in copies):
                return
            time.sleep(0.05)
    finally:
        for copy in copies:
            copy.stop()


def _load_libraries() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a fork takes no threads along
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()


class _First:
    """A pytest plugin: the first test, or file, that failed. Hypothesis need not shrink."""

    def __init__(self, calls: dict[CodeType, int]) -> None:
        self.failed = ""
        self._calls = calls

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", deadline=None, derandomize=True, phases=phases)
        settings.load_profile("mutation")

    def pytest_runtest_logstart(self) -> None:
        self._calls.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def _tested(root: Path, job: Job) -> dict[str, Any]:
    """Run test files in this process, a child made for it, until one fails."""
    os.setsid()
    os.chdir(root)
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else log, stream)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(root), str(root / "kernels"), *sys.path]
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'kernels'}"
    import pytest

    lines: dict[str, set[int]] = defaultdict(set)
    calls: dict[CodeType, int] = defaultdict(int)
    if job.traced:
        trace = _tracer(root, job.traced, lines, calls)
        threading.settrace(trace)
        sys.settrace(trace)
    first = _First(calls)
    options = [
        "-m",
        "not slow and not torch",
        "--loop=full",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        f"--basetemp={root / 'tmp'}",
    ]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *job.files], plugins=[first])
    sys.settrace(None)
    if not first.failed and status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        first.failed = f"pytest, with {status!r}"
    return {
        "by": first.failed,
        "seconds": round(sum(os.times()[:4]), 2),
        "lines": {path: sorted(lines[path]) for path in lines},
    }


def _tracer(
    root: Path,
    modules: Collection[str],
    lines: dict[str, set[int]],
    calls: dict[CodeType, int],
) -> Callable[..., Any]:
    """A trace function that notes the lines reached of some modules, and lets go of a function
    once all of its lines, or very many calls in one test, were seen.
    """
    names = {str(root / module): module for module in modules}
    unseen: dict[CodeType, set[int]] = {}

    def note(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            lines[names[frame.f_code.co_filename]].add(frame.f_lineno)
            unseen[frame.f_code].discard(frame.f_lineno)
        return note

    def enter(frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code.co_filename not in names:
            return None
        calls[code] += 1
        if code not in unseen:
            # The first is that of `def`, which no call reaches.
            unseen[code] = {line for _, _, line in code.co_lines() if line} - {code.co_firstlineno}
        return note if unseen[code] and calls[code] <= MOST_CALLS else None

    return enter
