"""The hidden states of all samples between two groups of layers.

They are kept batch by batch: on the device, in the host's memory, or in files where memory ends.
In memory a batch's new states take the place of the old ones. By the clock, and not with every
layer, a complete generation is saved to a file, from which an interrupted run goes on; states that
are not saved yet stay until they are, and nothing waits for that unless memory is short.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.layerwise.saving import (
    Layout,
    Saver,
    bytes_of,
    read_saved,
    record,
    reserve,
    state_path,
)
from shardsurgeon.layerwise.schedule import Place, Schedule
from shardsurgeon.storage.files import read_into, write_all, write_file, writing
from shardsurgeon.storage.system import System, default_system

if TYPE_CHECKING:
    from torch import Tensor

    from shardsurgeon.layerwise.devices import Arrival, Device

_SCHEDULE = "schedule.json"
# Pinned memory is handed out in powers of two.
_SLAB_NBYTES = 1 << 30


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
        self._saver = Saver(folder, self._system, clock)
        self._found = self._resume()
        self._states: _InMemory | _InFiles | None = None
        self._layout: Layout | None = self._found
        self._next: Layout | None = None

    @property
    def generation(self) -> int | None:
        """The group of layers whose input is the current generation, None before the first."""
        return self._layout.generation if self._layout else None

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

    def arrange(
        self, batches: Sequence[Sequence[int]], place: Place, spare: int, device: Device
    ) -> None:
        """Say how samples are grouped, once, before anything is sent or kept.

        spare: bytes of states that may wait in memory to be saved, beside those that replaced
        them. Loads what an earlier run saved. Raises SourceReadError where that cannot be read.
        """
        begins = _sums([sum(self._lengths[sample] for sample in batch) for batch in batches])
        found = self._found
        if place is Place.FILE:
            self._states = _InFiles(self._folder, begins, device, self._system)
        else:
            on_device = place is Place.DEVICE and device.is_gpu
            self._states = _InMemory(begins, device, self._saver, spare, on_device)
        if found is not None:
            self._states.load(found, state_path(self._folder, found.slot))

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
        now = Layout(**{**asdict(self._next), "layers": layers})
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

    def _following(self, states: Tensor) -> Layout:
        row = states[:1]
        return Layout(
            generation=0 if self.generation is None else self.generation + 1,
            layers=0,
            slot=1 - self._layout.slot if self._layout else 0,
            dtype=str(states.dtype).removeprefix("torch."),
            row_shape=tuple(row.shape[1:]),
            row_nbytes=row.numel() * row.element_size(),
        )

    def _resume(self) -> Layout | None:
        """The generation that was saved last, None where none is complete."""
        layout = read_saved(self._folder, sum(self._lengths))
        if layout is not None:
            self._saver.slot = layout.slot
        return layout


class _InMemory:
    """All states in memory, a tensor [tokens, *row_shape] for each batch.

    begins: tokens before each batch, and of all; spare: bytes of states that are still to be saved,
    beside those that replaced them.
    """

    def __init__(
        self,
        begins: Sequence[int],
        device: Device,
        saver: Saver,
        spare: int,
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
        # Buffers that were replaced while they were still to be saved, and those that have been.
        self._replaced: list[Tensor] = []
        self._reusable: list[Tensor] = []

    def begin(self, layout: Layout) -> None:
        """See at the beginning whether there will be space to save a generation."""
        if layout.generation == 0:
            self._saver.require_space(self._begins[-1] * layout.row_nbytes)

    def load(self, layout: Layout, path: Path) -> None:
        """Read a generation that was saved."""
        with FileIO(path) as file:
            for batch, begin in enumerate(self._begins[:-1]):
                nbytes = (self._begins[batch + 1] - begin) * layout.row_nbytes
                raw = self._buffer(nbytes)
                read_into(file, bytes_of(raw), begin * layout.row_nbytes, path, self._saver.system)
                states = layout.shaped(raw)
                self._states[batch] = self._device.send(states)[0] if self._on_device else states
        self._device.sent = 0

    def send(self, batch: int, layout: Layout) -> tuple[Tensor, Arrival]:
        states = self._states[batch]
        assert states is not None
        return self._device.send(states, self._arrivals[batch])

    def keep(self, batch: int, states: Tensor, layout: Layout) -> None:
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
            self._replaced += [] if old is None else [old]
            old = layout.shaped(self._buffer(states.nbytes))
        self._states[batch] = old
        self._arrivals[batch] = self._device.fetch(states, old)

    def advance(self, layout: Layout) -> None:
        """Save the generation where it is time for that."""
        if self._saver.idle:
            self._reusable += self._replaced
            self._replaced.clear()
        self._saver.offer(layout, list(self._states), list(self._arrivals), self._begins)

    def close(self) -> None:
        self._states.clear()

    def _buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the host's memory; on a GPU's host a part of a large pinned piece."""
        import torch

        if not self._device.is_gpu or nbytes > _SLAB_NBYTES:
            return self._device.host_buffer(nbytes)
        for place, old in enumerate(self._reusable):
            if old.nbytes == nbytes:
                return self._reusable.pop(place).flatten().view(torch.uint8)
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

    def load(self, layout: Layout, path: Path) -> None:
        """Open a generation that was saved."""
        with writing(path):
            self._files[layout.slot] = FileIO(path, "r+")

    def begin(self, layout: Layout) -> None:
        """Reserve space for a generation."""
        path = state_path(self._folder, layout.slot)
        # A new file: the generation in the old one has another size where its rows have.
        if layout.slot in self._files:
            self._files.pop(layout.slot).close()
        reserve(path, self._begins[-1] * layout.row_nbytes, self._system)
        self.load(layout, path)

    def send(self, batch: int, layout: Layout) -> tuple[Tensor, Arrival]:
        begin, end = self._begins[batch], self._begins[batch + 1]
        raw = self._device.host_buffer((end - begin) * layout.row_nbytes)
        path, at = state_path(self._folder, layout.slot), begin * layout.row_nbytes
        read_into(self._files[layout.slot], bytes_of(raw), at, path, self._system)
        return self._device.send(layout.shaped(raw))

    def keep(self, batch: int, states: Tensor, layout: Layout) -> None:
        if self._device.is_gpu:
            buffer = layout.shaped(self._device.host_buffer(states.nbytes))
            self._device.fetch(states, buffer).finish()
            states = buffer
        else:
            self._device.fetched += states.nbytes
        path, at = state_path(self._folder, layout.slot), self._begins[batch] * layout.row_nbytes
        write_all(self._files[layout.slot], bytes_of(states), at, path, self._system)

    def advance(self, layout: Layout) -> None:
        """Record a generation, once it is on disk."""
        path = state_path(self._folder, layout.slot)
        with writing(path):
            self._system.sync_file(self._files[layout.slot])
        record(self._folder, layout, self._begins[-1], self._system)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def compact(states: Tensor) -> Tensor:
    """The states as a tensor of their own: a view would keep the whole batch in memory."""
    states = states.contiguous()
    if states.untyped_storage().nbytes() == states.nbytes:
        return states
    return states.clone()


def _sums(lengths: Sequence[int]) -> list[int]:
    """The number of tokens before each batch, and of all batches."""
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    return begins
