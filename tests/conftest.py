"""What holds for every test: which loop it is in, no network, signals as a terminal gives them."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Two processes run tests side by side, on tensors so small that a second thread costs more than it
# gives: several times as much on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tables are as wide as the terminal.
os.environ["COLUMNS"] = "80"
# What a command is at is shown where a test asks for it; elsewhere stderr has its errors alone.
os.environ["SHARDSURGEON_PROGRESS"] = "none"

# `--loop`; the local Hub, `hub` and `online`; the S3 server, `s3`: for tests in every folder.
pytest_plugins = [
    "tests.support.loops",
    "tests.support.hub.fixture",
    "tests.support.stores.fixture",
]

# A slow machine is no counterexample.
settings.register_profile("shardsurgeon", deadline=None)
settings.load_profile("shardsurgeon")


def pytest_collection_finish() -> None:
    """Let the collector pass by what importing and collecting has made: a million objects that
    stay, and that it would look through again and again."""
    gc.collect()
    gc.freeze()


# A shell ignores SIGINT for what it runs in the background, `nohup` ignores SIGHUP. Children
# inherit what is ignored, but not a handler: they start with the system's default.
DEFAULTS = {
    "SIGINT": signal.default_int_handler,
    "SIGTERM": signal.SIG_DFL,
    "SIGHUP": signal.SIG_DFL,
    "SIGQUIT": signal.SIG_DFL,
}


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_foreground_process() -> Iterator[None]:
    """Undo what the parent process ignores or blocks, so that tests end alike everywhere."""
    numbers = {getattr(signal, name): DEFAULTS[name] for name in DEFAULTS if hasattr(signal, name)}
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, numbers[number])
    blocked = set()
    if hasattr(signal, "pthread_sigmask"):
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, set(numbers))
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if blocked:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
