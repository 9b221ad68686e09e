"""Batches of samples run through some layers of the text model.

A batch is one call of the model's own `forward`: the layers before those at work are skipped, the
first one at work is given the stored hidden states as its input, and what the last one returns is
kept. All batches of a chunk wait for one another at the experts, so that each expert is read once
and serves them all. Each batch has a thread, which can be paused in the middle of the model's own
code; only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardsurgeon.layerwise.experts import Routing, StreamedExperts
from shardsurgeon.layerwise.text_model import TextModel

Task = Callable[[Callable[[Any], Any]], None]

Embed = Callable[[str, Tensor], Tensor]

"""A computation. It is given `request_experts`, which takes a request and gives its answer."""
Compute = Callable[[list[Any]], list[Any]]
"""Requests of all computations that wait → their answers, in the same order."""


def run_interleaved(tasks: Sequence[Task], compute: Compute) -> None:
    """Run all tasks to their end, in turns; whenever all of them wait, serve their requests.

    What a task or `compute` raises stops all of them and is raised here.
    """
    if len(tasks) == 1:
        # No need to leave it in the middle.
        tasks[0](lambda request: compute([request])[0])
        return
    runners = [_Runner(task) for task in tasks]
    try:
        for runner in runners:
            runner.step(None)
        while waiting := [runner for runner in runners if runner.waits]:
            answers = compute([runner.request for runner in waiting])
            for runner in waiting:
                runner.request = None
            for position, runner in enumerate(waiting):
                answer, answers[position] = answers[position], None
                runner.step(answer)
    finally:
        for runner in runners:
            runner.abandon()


class _Abandoned(BaseException):
    """Unwinds a task that will not be answered."""


class _Runner:
    """One task in its thread; runs only between a call of `step` and its return."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._turn = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._answer: Any = None
        self._failure: BaseException | None = None
        self._stop = False
        self.request: Any = None
        self.waits = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self, answer: Any) -> None:
        """Let it run, with the answer it waits for, until it waits again or has ended."""
        self._answer, self.waits = answer, False
        del answer
        self._turn.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """End it where it stands, and wait for that."""
        self._stop = True
        self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stop:
                self._task(self._meet)
        except _Abandoned:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self._done.release()

    def _meet(self, request: Any) -> Any:
        self.request, self.waits = request, True
        del request
        self._done.release()
        self._turn.acquire()
        if self._stop:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer


"""(name of an embedding's weight, token ids ascending) → their rows [ids, width]."""


@dataclass(slots=True)
class Batch:
    """Samples that pass together, padded at their ends: what comes later changes nothing before.

    ids: int64 [B, S]; lengths: tokens of each sample; states: what the layers take, [B, S, ...],
    and after a pass what they give; None before the first layer.
    """

    ids: Tensor
    lengths: list[int]
    states: Tensor | None = None

    @classmethod
    def of(cls, samples: Sequence[NDArray[np.int64]], device: str) -> Batch:
        """Pad samples to the longest of them."""
        longest = max(len(ids) for ids in samples)
        padded = np.zeros((len(samples), longest), np.int64)
        for row, ids in zip(padded, samples, strict=True):
            row[: len(ids)] = ids
        return cls(torch.from_numpy(padded).to(device), [len(ids) for ids in samples])

    def take(self, states: Sequence[Tensor]) -> None:
        """Set the hidden states, one tensor [tokens, ...] a sample."""
        shape = (*self.ids.shape, *states[0].shape[1:])
        padded = torch.zeros(shape, dtype=states[0].dtype, device=self.ids.device)
        for row, state in zip(padded, states, strict=True):
            row[: len(state)] = state
        self.states = padded

    def give(self) -> list[Tensor]:
        """The hidden states of each sample, [tokens, ...], without the padding."""
        assert self.states is not None
        return [row[:length] for row, length in zip(self.states, self.lengths, strict=True)]

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(self.lengths)

    def real(self) -> Tensor | None:
        """Which positions are tokens, bool [B · S]; None where all are."""
        width = self.ids.shape[1]
        if self.num_tokens == self.ids.numel():
            return None
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        positions = torch.arange(width, device=self.ids.device)
        return (positions < lengths[:, None]).reshape(-1)


@dataclass(slots=True)
class _Pass:
    """What a running `forward` belongs to.

    layers: those at work; meet: asks the experts; embeds: whether embeddings are looked up;
    seen: a list for what the layers are given beside the hidden states, or None.
    """

    batch: Batch
    layers: range
    request_experts: Callable[[Any], Any]
    embeds: bool
    real: Tensor | None = None
    seen: list[Any] | None = None


class LayerRunner:
    """Leads batches through a text model, whose layers and experts it takes over."""

    def __init__(self, text: TextModel, embed: Embed, hidden: torch.dtype) -> None:
        """embed: looks rows of embeddings up; hidden: the dtype of what they give."""
        self._text = text
        self._dtype = hidden
        self._here = threading.local()
        self._extra = 0
        self._embeds_everywhere = True
        self._lookup = embed
        text.take_over(self._visit, self._route)
        for name, module in text.embeddings.items():
            module.padding_idx = None
            module.forward = partial(self._embed, name, module)

    def probe(self, ids: Tensor) -> None:
        """Learn how the model deals with its layers. ids: int64 [1, S].

        That is how many values each layer gives, and whether its layers are told of the
        embeddings by another way than through the hidden states.
        """
        for extra in range(4):
            self._extra = extra
            try:
                found = self._calls(ids, embeds=True)
            except ValueError as error:
                if "unpack" not in str(error):
                    raise
            else:
                break
        self._embeds_everywhere = not _same(found, self._calls(ids, embeds=False))

    def embed(self, batch: Batch) -> None:
        """Set a batch's states to what reaches the first layer."""
        self._forward(_Pass(batch, range(0), _unexpected_request, embeds=True))

    def run(
        self, batches: Sequence[Batch], layers: range, experts: dict[int, StreamedExperts]
    ) -> None:
        """Lead batches that have states through some layers, each expert read once for all."""

        def compute(routings: list[Any]) -> list[Any]:
            with torch.inference_mode(), _current(routings[0].inputs):
                return list(experts[routings[0].layer].compute(routings))

        run_interleaved([partial(self._task, batch, layers) for batch in batches], compute)

    def finish(self, batch: Batch) -> Tensor:
        """What the model makes of a batch's states behind its layers: the final norm."""
        done: Tensor = self._forward(
            _Pass(batch, range(0), _unexpected_request, self._embeds_everywhere)
        ).last_hidden_state
        return done

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings of token ids."""
        self._here.job = _Pass(Batch(ids, []), range(0), _unexpected_request, embeds=True)
        try:
            with torch.inference_mode():
                rows: Tensor = self._text.text.get_input_embeddings()(ids)
                return rows
        finally:
            self._here.job = None

    def _task(self, batch: Batch, layers: range, request_experts: Callable[[Any], Any]) -> None:
        self._forward(_Pass(batch, layers, request_experts, self._embeds_everywhere, batch.real()))

    def _forward(self, job: _Pass) -> Any:
        self._here.job = job
        try:
            with torch.inference_mode(), _current(job.batch.ids):
                return self._text.text(input_ids=job.batch.ids, use_cache=False)
        finally:
            self._here.job = None

    def _visit(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_states: Tensor,
        *more: Any,
        **named: Any,
    ) -> Any:
        """A layer's place: its own code where it is at work, else what arrived."""
        job: _Pass = self._here.job
        batch, layers = job.batch, job.layers
        if index not in layers:
            if index == 0 and batch.states is None:
                batch.states = hidden_states
            elif index == 0:
                hidden_states = batch.states
            if job.seen is not None:
                job.seen.append((more, named))
            return (hidden_states, *[None] * self._extra) if self._extra else hidden_states
        if index == layers.start:
            assert batch.states is not None
            hidden_states, batch.states = batch.states, None
        result = forward(hidden_states, *more, **named)
        if index == layers[-1]:
            batch.states = result[0] if isinstance(result, tuple) else result
        return result

    def _route(self, layer: int, inputs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The place of a layer's experts."""
        job: _Pass = self._here.job
        flat = inputs.reshape(-1, inputs.shape[-1])
        choice = (index.reshape(len(flat), -1), weights.reshape(len(flat), -1))
        outputs: Tensor = job.request_experts(Routing(layer, flat, *choice, job.real))
        return outputs.reshape(inputs.shape)

    def _embed(self, name: str, module: Any, ids: Tensor) -> Tensor:
        """An embedding's own forward on the rows that are asked for, and no others."""
        if not self._here.job.embeds:
            # The states are put in place of it; only its shape is looked at.
            shape = (*ids.shape, module.embedding_dim)
            return torch.zeros(1, dtype=self._dtype, device=ids.device).expand(shape)
        wanted, places = ids.unique(return_inverse=True)
        weight = module._parameters["weight"]
        module._parameters["weight"] = self._lookup(f"{name}.weight", wanted)
        try:
            embedded: Tensor = type(module).forward(module, places)
        finally:
            module._parameters["weight"] = weight
        return embedded

    def _calls(self, ids: Tensor, *, embeds: bool) -> list[Any]:
        """What the layers are given beside the hidden states."""
        seen: list[Any] = []
        batch = Batch(ids, [ids.shape[1]])
        self._forward(_Pass(batch, range(0), _unexpected_request, embeds, seen=seen))
        return seen


def _current(tensor: Tensor) -> AbstractContextManager[Any]:
    """A tensor's device as the current one of this thread, where kernels look for it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _unexpected_request(request: Any) -> Any:
    """Where no layer is at work, nobody asks experts."""
    raise AssertionError(request)


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(left, right) for left, right in pairs)
    return True
