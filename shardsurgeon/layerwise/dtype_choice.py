"""Which dtype a calibration computes in where the request does not say.

The model's own; but on a CPU that multiplies faster in float32, which is never less exact, that:
many processors have no unit for bfloat16 or float16. A timing of milliseconds finds out. It is made
once a calibration: the choice is kept with the unfinished work, so that a resumed run goes on in
the same dtype, whatever its machine.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardsurgeon.layerwise.settings import require
from shardsurgeon.storage.files import write_file
from shardsurgeon.storage.system import System, default_system

_LOG = logging.getLogger(__name__)

WIDE = "float32"
_NARROWER = ("bfloat16", "float16")
# Float32 takes twice the memory: a little faster is not worth that, and would be chance.
_WORTH = 1.25
# Rows of states, and rows and columns of a weight: as little as one expert may have.
_SHAPE = (64, 512, 512)
_ROUNDS = 9
_KEPT = "dtype.json"


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype that was picked, or asked for.

    dtype: one of DTYPES; own: the one that it was picked instead of, and times_faster: how many
    times as fast it is on this machine; both None where it was asked for, or is the model's own.
    """

    dtype: str
    own: str | None = None
    times_faster: float | None = None

    @property
    def reason(self) -> str | None:
        """Why it is not the model's own, as a report says it."""
        if self.own is None or self.times_faster is None:
            return None
        return f"{self.times_faster:.1f} x faster here than the model's {self.own}"


def possible_dtypes(asked: str | None, own: str, device: str) -> tuple[str, ...]:
    """The dtypes that a request may be computed in: the one asked for, or the model's own first."""
    if asked is None and own in _NARROWER and device == "cpu":
        return own, WIDE
    return (asked or own,)


@contextmanager
def chosen_dtype(
    possible: Sequence[str], folder: Path, system: System | None = None
) -> Iterator[DtypeChoice]:
    """For the work in a `with`, the dtype to compute in, one of `possible_dtypes`.

    folder: of the unfinished work, where an earlier choice is found, and this one is kept unless
    the work leaves nothing else there. Raises OutputWriteError.
    """
    if len(possible) == 1:
        yield DtypeChoice(possible[0])
        return
    path = folder / _KEPT
    choice = _kept(path, possible)
    if choice is None:
        choice = _faster(possible[0])
        write_file(path, json.dumps(asdict(choice)).encode(), system or default_system())
    if choice.reason:
        _LOG.info("computing in %s: %s", choice.dtype, choice.reason)
    try:
        yield choice
    finally:
        with suppress(OSError):
            if [each.name for each in folder.iterdir()] == [_KEPT]:
                path.unlink()


def _kept(path: Path, possible: Sequence[str]) -> DtypeChoice | None:
    with suppress(OSError, ValueError, TypeError):
        kept = DtypeChoice(**json.loads(path.read_bytes()))
        if kept.dtype in possible:
            return kept
    return None


def _faster(own: str) -> DtypeChoice:
    narrow, wide = seconds_of_products((own, WIDE))
    ratio = narrow / wide
    return DtypeChoice(WIDE, own, round(ratio, 1)) if ratio >= _WORTH else DtypeChoice(own)


def seconds_of_products(dtypes: Sequence[str]) -> list[float]:
    """Seconds of one small matrix product on one core of this CPU, in each dtype.

    The least of some rounds in which the dtypes take turns: whatever else the machine does makes a
    product slower, never faster. On one core, because starting several takes as long as the
    product.
    """
    torch = require("torch")
    rows, outputs, inputs = _SHAPE
    operands = [
        [
            torch.ones(shape, dtype=getattr(torch, dtype))
            for shape in ((rows, inputs), (outputs, inputs))
        ]
        for dtype in dtypes
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            # The first product of a dtype prepares the code for it.
            for states, weight in operands:
                torch.nn.functional.linear(states, weight)
            rounds = [
                [_seconds(torch.nn.functional.linear, *pair) for pair in operands]
                for _ in range(_ROUNDS)
            ]
    finally:
        torch.set_num_threads(before)
    return [min(column) for column in zip(*rounds, strict=True)]


def _seconds(product: Callable[[Any, Any], object], states: Any, weight: Any) -> float:
    begin = time.perf_counter()
    product(states, weight)
    return time.perf_counter() - begin
