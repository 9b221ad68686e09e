"""Where a layer computes, and how bytes get there and back while it does.

On a GPU three streams of copies run beside the products: hidden states in, hidden states out, and
weights. What one of them needs of another it waits for on the device; the host waits for nothing
but what it reads itself. On a CPU the same calls copy at once or, where nothing needs to move, not
at all: everything above is one piece of code for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from shardsurgeon.errors import UsageError

READERS = {False: 2, True: 4}
"""Threads that read experts, by whether a GPU computes meanwhile: what keeps a disk busy."""


def require_device(name: str) -> None:
    """Raise UsageError where torch cannot use the device."""
    if name == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        problem = f"torch {torch.__version__} finds {count} CUDA devices"
        raise UsageError(f"--device {name}", problem, "give another device, such as cpu")


class Arrival:
    """A copy that may still be under way. event: marks its end on a stream, None where it ended."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event

    def wait(self) -> None:
        """Let what is submitted from now on, on this thread's stream, run after the copy."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def finish(self) -> None:
        """Return when the copy has ended: before the host reads the bytes, or changes them."""
        if self.event is not None:
            self.event.synchronize()


ARRIVED = Arrival()


class Device:
    """One device, and counts of what it moved.

    name: `cpu` or `cuda:<n>`; is_gpu: whether it has a memory of its own; sent, fetched, loaded:
    bytes of hidden states in and out, and of weights.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_gpu = name != "cpu"
        self.sent = self.fetched = self.loaded = 0
        if self.is_gpu:
            self._device = torch.device(name)
            with torch.cuda.device(self._device):
                self._inward, self._outward, self._weights = (torch.cuda.Stream() for _ in range(3))

    def current(self) -> AbstractContextManager[object]:
        """Make it the current device of this thread, on which kernels are launched."""
        return torch.cuda.device(self._device) if self.is_gpu else nullcontext()

    def host_buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the host's memory that copies run to and from beside products."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_gpu)

    def send(self, states: Tensor, after: Arrival = ARRIVED) -> tuple[Tensor, Arrival]:
        """Hidden states to the device; after: what must have happened to them on the host.

        Always a copy: the code of a model may write to its input, and the states may be those that
        are being saved.
        """
        self.sent += states.nbytes
        if not self.is_gpu or states.is_cuda:
            return states.clone(), ARRIVED
        with torch.cuda.stream(self._inward):
            after.wait()
            there = states.to(self._device, non_blocking=True)
            event = self._inward.record_event()
        there.record_stream(torch.cuda.current_stream())
        return there, Arrival(event)

    def fetch(self, states: Tensor, into: Tensor) -> Arrival:
        """Hidden states from the device into a buffer of their shape, wherever that is."""
        self.fetched += states.nbytes
        if not self.is_gpu:
            into.copy_(states)
            return ARRIVED
        with torch.cuda.stream(self._outward):
            self._outward.wait_stream(torch.cuda.current_stream(self._device))
            into.copy_(states, non_blocking=True)
            states.record_stream(self._outward)
            return Arrival(self._outward.record_event())

    def load(self, weights: Tensor) -> Tensor:
        """Weights to the device. In a thread of readers that is beside the products."""
        self.loaded += weights.nbytes
        if not self.is_gpu:
            return weights
        return weights.pin_memory().to(self._device, non_blocking=True)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For a thread that loads weights: its copies and conversions run beside the products."""
        stream = torch.cuda.stream(self._weights) if self.is_gpu else nullcontext()
        with torch.inference_mode(), self.current(), stream:
            yield

    def loaded_so_far(self) -> Arrival:
        """The end of what was loaded up to now."""
        return Arrival(self._weights.record_event()) if self.is_gpu else ARRIVED

    def retire(self) -> None:
        """Say that weights which were used will be dropped: later ones may take their memory only
        when the products that used them have ended."""
        if self.is_gpu:
            self._weights.wait_stream(torch.cuda.current_stream(self._device))
