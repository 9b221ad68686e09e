"""Uploads side by side: all of them, and none that a program waits for when it is to stop."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from shardsurgeon.storage.hub.upload import upload_in_parallel
from tests.support.hub.models import ROOT

FILES = {f"{number}": Path(f"/{number}") for number in range(9)}


def test_every_file_is_sent_once_and_answered_by_name() -> None:
    seen: list[str] = []

    def send(name: str, path: Path) -> str:
        seen.append(name)
        return str(path)

    assert upload_in_parallel(send, FILES) == {name: f"/{name}" for name in FILES}
    assert sorted(seen) == sorted(FILES)
    assert upload_in_parallel(send, {}) == {}


def test_several_are_on_their_way_at_once() -> None:
    together = threading.Barrier(3, timeout=10)
    upload_in_parallel(lambda name, path: together.wait(), FILES, at_once=3)


def test_the_program_does_not_wait_for_what_cannot_be_ended() -> None:
    code = (
        "import signal, time, _thread, threading\n"
        "from pathlib import Path\n"
        "from shardsurgeon.storage.hub.upload import upload_in_parallel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Timer(0.3, _thread.interrupt_main).start()\n"
        "upload_in_parallel(lambda name, path: time.sleep(60), {'a': Path('a')})\n"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - begun < 30
