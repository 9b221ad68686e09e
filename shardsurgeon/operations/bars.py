"""Bars for notebooks: what a call from Python is at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shardsurgeon.storage.phases import Phase, listening


class _Bars:
    """A bar of tqdm for each phase that counts, as notebook and terminal have them.

    A thread looks at the phases; a bar goes when its phase ends, since a notebook keeps the others.
    """

    def __init__(self) -> None:
        self._shown: dict[Phase, Any] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()

    def begin(self, phase: Phase) -> None:
        """Open its bar."""
        from tqdm.auto import tqdm

        if phase.total:
            bar = tqdm(
                desc=phase.name,
                total=phase.total,
                initial=phase.resumed,
                unit=phase.unit or "it",
                unit_scale=bool(phase.unit),
                leave=False,
            )
            with self._lock:
                self._shown[phase] = bar

    def end(self, phase: Phase) -> None:
        """Close its bar."""
        with self._lock:
            if (bar := self._shown.pop(phase, None)) is not None:
                _update(bar, phase)
                bar.refresh()
                bar.close()

    def look(self) -> None:
        """Twice a second, until `stop`: a notebook writes down what each look prints."""
        while not self._over.wait(0.5):
            with self._lock:
                for phase, bar in self._shown.items():
                    _update(bar, phase)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()


def _update(bar: Any, phase: Phase) -> None:
    bar.set_postfix_str(phase.detail, refresh=False)
    bar.update(phase.done - bar.n)


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Bars for what is done in a `with`; none where they are not wanted."""
    if not wanted:
        yield
        return
    shown = _Bars()
    thread = threading.Thread(target=shown.look, name="bars", daemon=True)
    thread.start()
    try:
        with listening(shown):
            yield
    finally:
        shown.stop()
        thread.join()
