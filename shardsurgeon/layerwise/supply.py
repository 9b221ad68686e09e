"""A layer's expert weights: read ahead by threads, kept for the layer or passing by.

`Passing` reads each expert when it is its turn and drops it; `Staying` reads all of them, which
may begin while the layer before computes, and has them until the layer is done. Either gives them
one by one or, where products are grouped, as stacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

from shardsurgeon.layerwise.decoding import PackedWeight
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.grouped import Stack

Parameters: TypeAlias = Mapping[str, Tensor | PackedWeight]
"""An expert's parameters by their full names, each [1, ...]."""
Wanted = TypeVar("Wanted")
Made = TypeVar("Made")
Make = Callable[[int], Parameters]
"""Reads an expert by its id; runs in other threads."""


class Supply(Protocol):
    """What gives a layer's experts. stacked: whether as stacks."""

    stacked: bool

    def start(self) -> None:
        """Begin to read what stays."""
        ...

    def each(self, chosen: list[int]) -> Iterator[tuple[int, Parameters | None]]:
        """(expert, parameters) of the chosen ones; None for ids after the last expert."""
        ...

    def stacks(self) -> Iterator[tuple[range, Stack]]:
        """All experts in their order, some at a time."""
        ...

    def close(self) -> None:
        """Drop everything, and wait for what is being read."""
        ...


class Passing:
    """Experts that are read when they are needed, while those before them compute."""

    def __init__(
        self, make: Make, num_experts: int, device: Device, readers: Executor, group: int = 0
    ) -> None:
        """group: experts of a stack, 0 for one by one."""
        self.stacked = group > 0
        self._make = make
        self._num_experts = num_experts
        self._device = device
        self._readers = readers
        self._group = group

    def start(self) -> None:
        """Nothing stays."""

    def each(self, chosen: list[int]) -> Iterator[tuple[int, Parameters | None]]:
        """The next two are read while one computes."""
        for expert, parameters in zip(chosen, self._ahead(self._one, chosen), strict=True):
            yield expert, parameters
            self._device.retire()

    def stacks(self) -> Iterator[tuple[range, Stack]]:
        """One stack is filled while the one before computes."""
        every = range(self._num_experts)
        parts = [every[begin : begin + self._group] for begin in every[:: self._group]]
        for part, stack in zip(parts, self._ahead(self._stack, parts, most=1), strict=True):
            yield part, stack
            self._device.retire()

    def close(self) -> None:
        """Nothing is kept."""

    def _ahead(
        self, make: Callable[[Wanted], Made], wanted: Iterable[Wanted], most: int = 2
    ) -> Iterator[Made]:
        """Each one made, while so many after it are being made by the readers."""
        left = iter(wanted)
        under_way: deque[Future[Made]] = deque()
        try:
            while True:
                for _, one in zip(range(most - len(under_way)), left, strict=False):
                    under_way.append(self._readers.submit(self._loaded, make, one))
                if not under_way:
                    return
                made = under_way.popleft().result()
                self._device.loaded_so_far().wait()
                yield made
                del made
        finally:
            for future in under_way:
                future.cancel()

    def _loaded(self, make: Callable[[Wanted], Made], wanted: Wanted) -> Made:
        with self._device.loading():
            return make(wanted)

    def _one(self, expert: int) -> Parameters | None:
        return self._make(expert) if expert < self._num_experts else None

    def _stack(self, part: range) -> Stack:
        stack = Stack(len(part))
        for place, expert in enumerate(part):
            stack.put(place, self._make(expert))
        return stack


class Staying:
    """Experts that stay until the layer is done."""

    def __init__(
        self, make: Make, num_experts: int, device: Device, readers: Executor, *, stacked: bool
    ) -> None:
        self.stacked = stacked
        self._make = make
        self._num_experts = num_experts
        self._device = device
        self._readers = readers
        self._stack = Stack(num_experts)
        self._made: list[Future[Parameters]] = []

    def start(self) -> None:
        """Let the readers begin, once."""
        if not self._made:
            self._made = [self._readers.submit(self._read, i) for i in range(self._num_experts)]

    def each(self, chosen: list[int]) -> Iterator[tuple[int, Parameters | None]]:
        """Each as soon as it is there."""
        self.start()
        for expert in chosen:
            made = self._made[expert].result() if expert < self._num_experts else None
            self._device.loaded_so_far().wait()
            yield expert, made

    def stacks(self) -> Iterator[tuple[range, Stack]]:
        """One stack, once all are there."""
        self.start()
        for future in self._made:
            future.result()
        self._device.loaded_so_far().wait()
        yield range(self._num_experts), self._stack

    def close(self) -> None:
        """Drop them."""
        for future in self._made:
            future.cancel()
        for future in self._made:
            if not future.cancelled():
                future.exception()
        self._device.retire()
        self._made = []
        self._stack = Stack(self._num_experts)

    def _read(self, expert: int) -> Parameters:
        with self._device.loading():
            made = self._make(expert)
            if not self.stacked:
                return made
            self._stack.put(expert, made)
            return {}


class Held(Passing):
    """Experts that stay as they are stored, and are decoded whenever they are needed."""

    def __init__(
        self, make: Make, num_experts: int, device: Device, readers: Executor, group: int = 0
    ) -> None:
        """make: reads what it needs once, and keeps it."""
        super().__init__(make, num_experts, device, readers, group)
        self._read: list[Future[object]] = []

    def start(self) -> None:
        """Let the readers begin, once."""
        if not self._read:
            every = range(self._num_experts)
            self._read = [self._readers.submit(self._touch, expert) for expert in every]

    def close(self) -> None:
        """Wait for what is being read."""
        for future in self._read:
            future.cancel()
        for future in self._read:
            if not future.cancelled():
                future.exception()
        self._device.retire()

    def _touch(self, expert: int) -> None:
        self._loaded(self._make, expert)
