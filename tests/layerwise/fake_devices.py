"""Devices for tests: a CPU that notes what it is asked for, and a GPU whose copies come late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from shardsurgeon.layerwise.devices import Arrival, Device


class Recording(Device):
    """A CPU that notes what it is asked for, and of which thread."""

    def __init__(self, name: str = "cpu") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, int]] = []

    def send(self, states: torch.Tensor, after: Arrival = Arrival()) -> Any:  # noqa: B008
        self.calls.append(("send", states.nbytes))
        return super().send(states, after)

    def load(self, weights: torch.Tensor) -> torch.Tensor:
        self.calls.append(("load", weights.nbytes))
        return super().load(weights)


class Deferred(Arrival):
    """A copy that is made when it is waited for, and not before."""

    def __init__(self, copy: Callable[[], None]) -> None:
        super().__init__()
        self._copy: Callable[[], None] | None = copy
        self._copying = threading.Lock()

    def wait(self) -> None:
        with self._copying, torch.inference_mode():
            copy, self._copy = self._copy, None
            if copy is not None:
                copy()

    finish = wait


class LazyGpu(Recording):
    """A GPU whose copies are as late as they may be: who does not wait for one finds NaN."""

    def __init__(self, name: str = "cpu") -> None:
        super().__init__(name)
        self.is_gpu = True

    def current(self) -> Any:
        return nullcontext()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def send(self, states: torch.Tensor, after: Arrival = Arrival()) -> Any:  # noqa: B008
        self.sent += states.nbytes
        there = torch.full_like(states, torch.nan)

        def copy() -> None:
            after.wait()
            there.copy_(states)

        return there, Deferred(copy)

    def fetch(self, states: torch.Tensor, into: torch.Tensor) -> Arrival:
        self.fetched += states.nbytes
        into.fill_(torch.nan)

        def copy() -> None:
            into.copy_(states)

        return Deferred(copy)

    def load(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.clone()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def loaded_so_far(self) -> Arrival:
        return Arrival()

    def retire(self) -> None:
        self.calls.append(("retire", 0))
