"""The hidden states of all samples between two groups of layers, and what is saved of them.

They are kept batch by batch: on the device, in the host's memory, or in files where memory ends.
In memory a batch's new states take the place of the old ones. By the clock, and not with every
layer, a thread writes a complete generation to a file, from which an interrupted run goes on;
states that it has not written yet stay until it has, and nothing waits for that unless memory is
short.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.layerwise.schedule import SAVE_SECONDS, SAVED_SHARE, Place, Schedule
from shardsurgeon.storage.files import (
    free_space,
    read_into,
    reserve_file,
    write_all,
    write_file,
    writing,
)
from shardsurgeon.storage.system import System, default_system
from shardsurgeon.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

    from shardsurgeon.layerwise.devices import Arrival, Device

_LAYOUT = "activations.json"
_SCHEDULE = "schedule.json"
# Pinned memory is handed out in powers of two.
_SLAB_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Layout:
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


class ActivationStore:
    """The hidden states of all samples; a context manager. For one thread at a time."""

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        budget_nbytes: int,
        system: System | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look for what an earlier run left in the folder, which must exist.

        lengths: tokens of each sample; budget_nbytes: of the host's memory that states may take.
        """
        self.budget = budget_nbytes
        self._folder = folder
        self._lengths = list(lengths)
        self._system = system or default_system()
        self._clock = clock
        self._saver = _Saver(folder, self._system, clock)
        self._found = self._resume()
        self._states: _InMemory | _InFiles | None = None
        self._layout: _Layout | None = self._found
        self._next: _Layout | None = None

    @property
    def generation(self) -> int | None:
        """The group of layers whose input is the current generation, None before the first."""
        return self._layout.generation if self._layout else None

    @property
    def saved_layers(self) -> int:
        """Decoder layers that a run which begins now need not compute."""
        return saved_layers(self._folder)

    def keep_schedule(self, schedule: Schedule) -> Schedule:
        """The schedule of an earlier run, or the given one, which is kept.

        Float sums are rounded as samples are grouped into batches; with another amount of free
        memory, a resumed run would group them differently. Raises OutputWriteError.
        """
        path = self._folder / _SCHEDULE
        with suppress(OSError, ValueError, TypeError, KeyError):
            return Schedule.from_json(json.loads(path.read_bytes()))
        # States of another grouping are in another order.
        self._found = self._layout = None
        write_file(path, json.dumps(schedule.as_json()).encode(), self._system)
        return schedule

    def arrange(self, batches: Sequence[Sequence[int]], place: Place, device: Device) -> None:
        """Say how samples are grouped, once, before anything is sent or kept.

        Loads what an earlier run saved. Raises SourceReadError where that cannot be read.
        """
        begins = _sums([sum(self._lengths[sample] for sample in batch) for batch in batches])
        found = self._found
        if place is Place.FILE:
            self._states = _InFiles(self._folder, begins, device, self._system)
        else:
            on_device = place is Place.DEVICE and device.is_gpu
            spare = self.budget - (begins[-1] * found.row_nbytes if found else 0)
            self._states = _InMemory(begins, device, self._saver, spare, on_device=on_device)
        if found is not None:
            self._states.load(found, self._path(found))

    def send(self, batch: int) -> tuple[Tensor, Arrival]:
        """A batch's states of the current generation, [tokens, ...], on their way to the device;
        do not modify them."""
        assert self._states is not None and self._layout is not None
        return self._states.send(batch, self._layout)

    def keep(self, batch: int, states: Tensor) -> None:
        """Keep a batch's states for the next generation: [tokens, ...], on the device.

        In memory the batch's current states are gone then. All batches of a generation have one
        dtype and, after the first axis, one shape. Raises OutputWriteError, also where the disk
        has no space for all samples.
        """
        assert self._states is not None
        if self._next is None:
            self._next = self._following(states)
            self._states.begin(self._next)
        assert self._next.row_shape == tuple(states.shape[1:])
        self._states.keep(batch, states, self._next)

    def advance(self, layers: int) -> None:
        """Make the next generation, which must be complete, the current one.

        layers: decoder layers before it. Raises OutputWriteError where this or an earlier
        generation could not be written.
        """
        assert self._next is not None and self._states is not None
        now = _Layout(**{**asdict(self._next), "layers": layers})
        self._layout, self._next = now, None
        self._states.advance(now)

    def close(self) -> None:
        """Wait until what is being saved is on disk. Raises OutputWriteError if that fails."""
        try:
            self._saver.close()
        finally:
            if self._states is not None:
                self._states.close()
            self._states = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        if kind is None:
            self.close()
        else:
            # The exception that ends the block is reported, not a second one.
            with suppress(OutputWriteError):
                self.close()

    def _following(self, states: Tensor) -> _Layout:
        row = states[:1]
        return _Layout(
            generation=0 if self.generation is None else self.generation + 1,
            layers=0,
            slot=1 - self._layout.slot if self._layout else 0,
            dtype=str(states.dtype).removeprefix("torch."),
            row_shape=tuple(row.shape[1:]),
            row_nbytes=row.numel() * row.element_size(),
        )

    def _path(self, layout: _Layout) -> Path:
        return _path(self._folder, layout.slot)

    def _resume(self) -> _Layout | None:
        """The generation that was saved last, None where none is complete."""
        layout = _saved(self._folder, sum(self._lengths))
        if layout is not None:
            self._saver.slot = layout.slot
        return layout


class _InMemory:
    """All states in memory, a tensor [tokens, *row_shape] for each batch.

    begins: tokens before each batch, and of all; spare: bytes that states which are still to be
    saved may take beside those that replaced them.
    """

    def __init__(
        self,
        begins: Sequence[int],
        device: Device,
        saver: _Saver,
        spare: int,
        *,
        on_device: bool,
    ) -> None:
        from shardsurgeon.layerwise.devices import ARRIVED

        self._begins = begins
        self._device = device
        self._saver = saver
        self._spare = spare
        self._on_device = on_device
        number = len(begins) - 1
        self._states: list[Tensor | None] = [None] * number
        self._arrivals = [ARRIVED] * number
        self._slab: Tensor | None = None

    def begin(self, layout: _Layout) -> None:
        """See at the beginning whether there will be space to save a generation."""
        if layout.generation == 0:
            self._saver.require_space(self._begins[-1] * layout.row_nbytes)

    def load(self, layout: _Layout, path: Path) -> None:
        """Read a generation that was saved."""
        with FileIO(path) as file:
            for batch, begin in enumerate(self._begins[:-1]):
                nbytes = (self._begins[batch + 1] - begin) * layout.row_nbytes
                raw = self._buffer(nbytes)
                read_into(file, _bytes(raw), begin * layout.row_nbytes, path, self._saver.system)
                states = layout.shaped(raw)
                self._states[batch] = self._device.send(states)[0] if self._on_device else states
        self._device.sent = 0

    def send(self, batch: int, layout: _Layout) -> tuple[Tensor, Arrival]:
        states = self._states[batch]
        assert states is not None
        return self._device.send(states, self._arrivals[batch])

    def keep(self, batch: int, states: Tensor, layout: _Layout) -> None:
        self._saver.let_go(batch, states.nbytes, self._spare)
        if self._on_device:
            self._states[batch] = compact(states)
            return
        if not self._device.is_gpu:
            self._device.fetched += states.nbytes
            self._states[batch] = compact(states)
            return
        old = self._states[batch]
        # What is still to be saved, or has another form, stays where it is.
        fits = old is not None and old.shape == states.shape and old.dtype == states.dtype
        if old is None or not fits or self._saver.needs(batch):
            old = layout.shaped(self._buffer(states.nbytes))
        self._states[batch] = old
        self._arrivals[batch] = self._device.fetch(states, old)

    def advance(self, layout: _Layout) -> None:
        """Save the generation where it is time for that."""
        tokens = self._begins[-1]
        self._saver.offer(layout, tokens, list(self._states), list(self._arrivals), self._begins)

    def close(self) -> None:
        self._states.clear()

    def _buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the host's memory; on a GPU's host a part of a large pinned piece."""
        if not self._device.is_gpu or nbytes > _SLAB_NBYTES:
            return self._device.host_buffer(nbytes)
        if self._slab is None or len(self._slab) < nbytes:
            self._slab = self._device.host_buffer(_SLAB_NBYTES)
        buffer, self._slab = self._slab[:nbytes], self._slab[-(-nbytes // 512) * 512 :]
        return buffer


class _InFiles:
    """Two generations as one file each; every generation is complete on disk when it counts."""

    def __init__(self, folder: Path, begins: Sequence[int], device: Device, system: System) -> None:
        self._folder = folder
        self._begins = begins
        self._device = device
        self._system = system
        self._files: dict[int, FileIO] = {}

    def load(self, layout: _Layout, path: Path) -> None:
        """Open a generation that was saved."""
        with writing(path):
            self._files[layout.slot] = FileIO(path, "r+")

    def begin(self, layout: _Layout) -> None:
        """Reserve space for a generation."""
        path = _path(self._folder, layout.slot)
        # A new file: the generation in the old one has another size where its rows have.
        if layout.slot in self._files:
            self._files.pop(layout.slot).close()
        _reserve(path, self._begins[-1] * layout.row_nbytes, self._system)
        self.load(layout, path)

    def send(self, batch: int, layout: _Layout) -> tuple[Tensor, Arrival]:
        begin, end = self._begins[batch], self._begins[batch + 1]
        raw = self._device.host_buffer((end - begin) * layout.row_nbytes)
        path, at = _path(self._folder, layout.slot), begin * layout.row_nbytes
        read_into(self._files[layout.slot], _bytes(raw), at, path, self._system)
        return self._device.send(layout.shaped(raw))

    def keep(self, batch: int, states: Tensor, layout: _Layout) -> None:
        if self._device.is_gpu:
            buffer = layout.shaped(self._device.host_buffer(states.nbytes))
            self._device.fetch(states, buffer).finish()
            states = buffer
        else:
            self._device.fetched += states.nbytes
        path, at = _path(self._folder, layout.slot), self._begins[batch] * layout.row_nbytes
        write_all(self._files[layout.slot], _bytes(states), at, path, self._system)

    def advance(self, layout: _Layout) -> None:
        """Record a generation, once it is on disk."""
        path = _path(self._folder, layout.slot)
        with writing(path):
            self._system.sync_file(self._files[layout.slot])
        _record(self._folder, layout, self._begins[-1], self._system)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Saver:
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
        layout: _Layout,
        tokens: int,
        states: list[Tensor | None],
        arrivals: list[Arrival],
        begins: Sequence[int],
    ) -> None:
        """Save a complete generation, unless it is too early or another one is being saved.

        Raises OutputWriteError where an earlier one could not be saved.
        """
        if self._saving is not None:
            if not self._saving.done():
                return
            self._wait()
        if self._clock() < self._next_time:
            return
        self._left = set(range(len(states)))
        self._replaced = {}
        job = (layout, tokens, states, arrivals, begins)
        self._saving = self._thread.submit(self._save, *job)

    def require_space(self, nbytes: int) -> None:
        """Raise OutputWriteError where the disk has no space for a generation."""
        _require_space(_path(self._folder, 1 - self.slot), nbytes, self.system)

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
        layout: _Layout,
        tokens: int,
        states: list[Tensor | None],
        arrivals: list[Arrival],
        begins: Sequence[int],
    ) -> None:
        begun = self._clock()
        slot = 1 - self.slot
        path = _path(self._folder, slot)
        try:
            _reserve(path, tokens * layout.row_nbytes, self.system)
            with writing(path):
                file = FileIO(path, "r+")
            with file:
                for batch, arrival in enumerate(arrivals):
                    arrival.finish()
                    own, states[batch] = states[batch], None
                    assert own is not None
                    write_all(
                        file, _bytes(own), begins[batch] * layout.row_nbytes, path, self.system
                    )
                    self.saved_nbytes += own.nbytes
                    del own
                    self._written(batch)
                with writing(path):
                    self.system.sync_file(file)
            _record(self._folder, _Layout(**{**asdict(layout), "slot": slot}), tokens, self.system)
        finally:
            with self._changed:
                self._left.clear()
                self._changed.notify_all()
        self.slot = slot
        ended = self._clock()
        pause = (ended - begun) * (1 / SAVED_SHARE - 1)
        self._next_time = ended + max(SAVE_SECONDS, pause)

    def _written(self, batch: int) -> None:
        with self._changed:
            self._left.discard(batch)
            self._replaced.pop(batch, None)
            self._changed.notify_all()


def saved_layers(folder: Path) -> int:
    """Decoder layers before the generation that was saved last, 0 where none is."""
    layout = _saved(folder, None)
    return layout.layers if layout else 0


def compact(states: Tensor) -> Tensor:
    """The states as a tensor of their own: a view would keep the whole batch in memory."""
    states = states.contiguous()
    if states.untyped_storage().nbytes() == states.nbytes:
        return states
    return states.clone()


def _saved(folder: Path, tokens: int | None) -> _Layout | None:
    """The generation that was saved last and is complete. tokens: of all samples, if known."""
    try:
        content = json.loads((folder / _LAYOUT).read_bytes())
        held = content.pop("tokens")
        layout = _Layout(**{**content, "row_shape": tuple(content["row_shape"])})
        nbytes = _path(folder, layout.slot).stat().st_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    complete = nbytes == held * layout.row_nbytes and tokens in (None, held)
    return layout if complete else None


def _path(folder: Path, slot: int) -> Path:
    return folder / f"activations.{slot}"


def _record(folder: Path, layout: _Layout, tokens: int, system: System) -> None:
    content = {**asdict(layout), "tokens": tokens}
    write_file(folder / _LAYOUT, json.dumps(content).encode(), system)


def _reserve(path: Path, nbytes: int, system: System) -> None:
    """Reserve disk space for a file. Raises OutputWriteError where there is not enough."""
    _require_space(path, nbytes, system)
    reserve_file(path, nbytes, system)


def _require_space(path: Path, nbytes: int, system: System) -> None:
    held = path.stat().st_size if path.exists() else 0
    free = free_space(path.parent, system) + held
    if free < nbytes:
        raise OutputWriteError(
            path,
            f"activations between two layers take {format_size(nbytes)}, {format_size(free)} "
            "are free there",
            "free some space there or give fewer samples",
        )


def _bytes(states: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, in order; numpy has no bfloat16 to go through."""
    import torch

    flat = states.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _sums(lengths: Sequence[int]) -> list[int]:
    """The number of tokens before each batch, and of all batches."""
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    return begins
