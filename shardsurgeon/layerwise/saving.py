"""States that are saved while a calibration computes, and found again by the run that resumes.

One generation at a time is complete on disk: `activations.json` says which of two files holds it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.layerwise.schedule import SAVE_SECONDS, SAVED_SHARE
from shardsurgeon.storage.files import free_space, reserve_file, write_all, write_file, writing
from shardsurgeon.storage.system import System
from shardsurgeon.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

    from shardsurgeon.layerwise.devices import Arrival

_LAYOUT = "activations.json"
_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Layout:
    """One generation: the input of one group of layers, for all samples.

    generation: its number; layers: decoder layers before it; slot: the file that holds it;
    dtype: its name in torch; row_shape, row_nbytes: of one token's state.
    """

    generation: int
    layers: int
    slot: int
    dtype: str
    row_shape: tuple[int, ...]
    row_nbytes: int

    def shaped(self, raw: Tensor) -> Tensor:
        """The states [tokens, *row_shape] that some bytes hold."""
        import torch

        return raw.view(getattr(torch, self.dtype)).view(-1, *self.row_shape)


class Saver:
    """Writes generations that are in memory to files, in a thread, when it is time.

    slot: of the file that was recorded last; the other one is written. saved_nbytes: in all.
    """

    def __init__(self, folder: Path, system: System, clock: Callable[[], float]) -> None:
        self.system = system
        self.slot = 1
        self.saved_nbytes = 0
        self._folder = folder
        self._clock = clock
        self._next_time = clock() + SAVE_SECONDS
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._saving: Future[None] | None = None
        self._changed = threading.Condition()
        # Batches that are still to be written, and the bytes that replaced such batches.
        self._left: set[int] = set()
        self._replaced: dict[int, int] = {}

    def offer(
        self,
        layout: Layout,
        states: list[Tensor | None],
        arrivals: list[Arrival],
        begins: Sequence[int],
    ) -> None:
        """Save a complete generation, unless it is too early or another one is being saved.

        states: of each batch, dropped one by one as they are written; arrivals: when they have
        come to the host; begins: tokens before each batch, and of all. Raises OutputWriteError
        where an earlier one could not be saved.
        """
        if self._saving is not None:
            if not self._saving.done():
                return
            self._wait()
        if self._clock() < self._next_time:
            return
        self._left = set(range(len(states)))
        self._replaced = {}
        self._saving = self._thread.submit(self._save, layout, states, arrivals, begins)

    def require_space(self, nbytes: int) -> None:
        """Raise OutputWriteError where the disk has no space for a generation."""
        require_space(state_path(self._folder, 1 - self.slot), nbytes, self.system)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be written."""
        with self._changed:
            return not self._left

    def needs(self, batch: int) -> bool:
        """Whether a batch's states are still to be written."""
        with self._changed:
            return batch in self._left

    def let_go(self, batch: int, nbytes: int, spare: int) -> None:
        """Wait until a batch's states may be replaced: at once, where there is spare memory."""
        with self._changed:
            if batch not in self._left:
                return
            if sum(self._replaced.values()) + nbytes <= spare:
                self._replaced[batch] = nbytes
                return
            self._changed.wait_for(lambda: batch not in self._left)

    def close(self) -> None:
        """Wait for what is being saved. Raises OutputWriteError if that failed."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _save(
        self,
        layout: Layout,
        states: list[Tensor | None],
        arrivals: list[Arrival],
        begins: Sequence[int],
    ) -> None:
        begun, tokens = self._clock(), begins[-1]
        slot = 1 - self.slot
        path = state_path(self._folder, slot)
        try:
            reserve(path, tokens * layout.row_nbytes, self.system)
            with writing(path):
                file = FileIO(path, "r+")
            with file:
                for batch, arrival in enumerate(arrivals):
                    arrival.finish()
                    own, states[batch] = states[batch], None
                    assert own is not None
                    write_all(
                        file, bytes_of(own), begins[batch] * layout.row_nbytes, path, self.system
                    )
                    self.saved_nbytes += own.nbytes
                    del own
                    self._written(batch)
                with writing(path):
                    self.system.sync_file(file)
            record(self._folder, Layout(**{**asdict(layout), "slot": slot}), tokens, self.system)
        finally:
            with self._changed:
                self._left.clear()
                self._changed.notify_all()
        self.slot = slot
        # What is computed since the beginning is at stake.
        self._next_time = begun + max(SAVE_SECONDS, (self._clock() - begun) / SAVED_SHARE)

    def _written(self, batch: int) -> None:
        with self._changed:
            self._left.discard(batch)
            self._replaced.pop(batch, None)
            self._changed.notify_all()


def saved_layers(folder: Path) -> int:
    """Decoder layers before the generation that was saved last, 0 where none is."""
    layout = read_saved(folder, None)
    return layout.layers if layout else 0


def read_saved(folder: Path, tokens: int | None) -> Layout | None:
    """The generation that was saved last and is complete. tokens: of all samples, if known."""
    try:
        content = json.loads((folder / _LAYOUT).read_bytes())
        held = content.pop("tokens")
        layout = Layout(**{**content, "row_shape": tuple(content["row_shape"])})
        nbytes = state_path(folder, layout.slot).stat().st_size
        row = _SIZES[layout.dtype] * math.prod(layout.row_shape)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    complete = nbytes == held * row == held * layout.row_nbytes and tokens in (None, held)
    return layout if complete else None


def state_path(folder: Path, slot: int) -> Path:
    """One of the two files that hold generations."""
    return folder / f"activations.{slot}"


def record(folder: Path, layout: Layout, tokens: int, system: System) -> None:
    """Make a generation, which is complete on disk, the one that a resumed run finds."""
    content = {**asdict(layout), "tokens": tokens}
    write_file(folder / _LAYOUT, json.dumps(content).encode(), system)


def reserve(path: Path, nbytes: int, system: System) -> None:
    """Reserve disk space for a file. Raises OutputWriteError where there is not enough."""
    require_space(path, nbytes, system)
    reserve_file(path, nbytes, system)


def require_space(path: Path, nbytes: int, system: System) -> None:
    """Raise OutputWriteError where a file of so many bytes finds no space."""
    held = path.stat().st_size if path.exists() else 0
    free = free_space(path.parent, system) + held
    if free < nbytes:
        raise OutputWriteError(
            path,
            f"activations between two layers take {format_size(nbytes)}, {format_size(free)} "
            "are free there",
            "free some space there or give fewer samples",
        )


def bytes_of(states: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, in order; numpy has no bfloat16 to go through."""
    import torch

    flat = states.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())
