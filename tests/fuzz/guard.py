"""What holds for every execution, whatever the target: no hang, no hunger for memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

# A second for a small input; what is large may take as long as reading it does.
MAX_SECONDS = 1.0
# Python needs up to 30 bytes for one of JSON or pickle; the rest is the modules' own.
MAX_GROWTH = 64
FREE_NBYTES = 16 << 20
_MEASURED = 64


class Guard:
    """Runs a target; every 64th time its memory is measured, which is slow."""

    def __init__(self, run: Callable[[bytes, Path], None], scratch: Path) -> None:
        self._run = run
        self._scratch = scratch
        self.executions = 0

    def __call__(self, data: bytes) -> None:
        """Raise what the target raises, or AssertionError for a hang or hunger."""
        self.executions += 1
        if self.executions % _MEASURED == 0:
            self.measured(data)
            return
        begun = time.thread_time()
        self._run(data, self._scratch)
        seconds = time.thread_time() - begun
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s for {len(data):,} bytes"

    def measured(self, data: bytes) -> None:
        """Run once and look at the peak of its memory."""
        tracemalloc.start()
        try:
            self._run(data, self._scratch)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        limit = MAX_GROWTH * len(data) + FREE_NBYTES
        assert peak <= limit, f"{peak:,} bytes of memory for {len(data):,} of input"
