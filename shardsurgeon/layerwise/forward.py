"""Batches of samples run through some layers of the text model.

A batch is one call of the model's own `forward`: layers before the active ones are skipped, the
first active one gets the stored hidden states as its input, and the output of the last one is
kept. The batches of a chunk wait for one another at the experts, so that each expert is read once
for all of them. Each batch runs in a thread, which can be paused in the middle of the model's own
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

Embed = Callable[[str, Tensor], Tensor]
"""(name of an embedding's weight, token ids ascending) → their rows [ids, width]."""
Task = Callable[[Callable[[Any], Any]], None]
"""A computation; its argument, `request_experts`, takes a request and returns the answer."""
Compute = Callable[[list[Any]], list[Any]]
"""Requests of all waiting tasks → their answers, in the same order."""


@dataclass(slots=True)
class Batch:
    """Samples of one forward pass, padded at their ends, where causal attention ignores padding.

    ids: int64 [B, S]; lengths: tokens of each sample; states: hidden states [B, S, ...], the
    input of the next layers to run; None before the first layer.
    """

    ids: Tensor
    lengths: list[int]
    states: Tensor | None = None

    @classmethod
    def of(cls, samples: Sequence[NDArray[np.int64]], device: str) -> Batch:
        """Pad samples, each int64 [tokens], to the longest of them."""
        longest = max(len(ids) for ids in samples)
        padded = np.zeros((len(samples), longest), np.int64)
        for row, ids in zip(padded, samples, strict=True):
            row[: len(ids)] = ids
        return cls(torch.from_numpy(padded).to(device), [len(ids) for ids in samples])

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Set the hidden states, one tensor [tokens, ...] a sample."""
        shape = (*self.ids.shape, *states[0].shape[1:])
        padded = torch.zeros(shape, dtype=states[0].dtype, device=self.ids.device)
        for row, state in zip(padded, states, strict=True):
            row[: len(state)] = state
        self.states = padded

    def unpadded_states(self) -> list[Tensor]:
        """The hidden states of each sample, [tokens, ...], without the padding."""
        assert self.states is not None
        return [row[:length] for row, length in zip(self.states, self.lengths, strict=True)]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    def real(self) -> Tensor | None:
        """Which positions are not padding, bool [B · S]; None where none is padding."""
        width = self.ids.shape[1]
        if self.num_tokens == self.ids.numel():
            return None
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        positions = torch.arange(width, device=self.ids.device)
        return (positions < lengths[:, None]).reshape(-1)


@dataclass(slots=True)
class _Call:
    """One call of the model's `forward`.

    layers: the active ones; request_experts: has the experts compute; embeds: whether embeddings
    are looked up; real: as `Batch.real`; seen: a list that receives the layers' arguments other
    than the hidden states, or None.
    """

    batch: Batch
    layers: range
    request_experts: Callable[[Any], Any]
    embeds: bool
    real: Tensor | None = None
    seen: list[Any] | None = None


class LayerRunner:
    """Runs batches through a text model, whose layers and experts it takes over."""

    def __init__(self, text: TextModel, embed: Embed, dtype: torch.dtype) -> None:
        """embed: looks up rows of embeddings; dtype: of embedded tokens."""
        self._text = text
        self._dtype = dtype
        self._lookup = embed
        # The call that each thread is in.
        self._local = threading.local()
        # Learned by `probe`.
        self._extra_outputs = 0
        self._layers_see_embeddings = True
        text.take_over(self._visit, self._route)
        for name, module in text.embeddings.items():
            module.padding_idx = None
            module.forward = partial(self._embed, name, module)

    def probe(self, ids: Tensor) -> None:
        """Find out how the model calls its layers. ids: int64 [1, S], any tokens.

        That is: how many values a layer returns beside the hidden states, and whether layers
        depend on the embeddings in another way than through the hidden states.
        """
        for extra in range(4):
            self._extra_outputs = extra
            # A skipped layer returns as many values as the model's code unpacks.
            try:
                found = self._layer_arguments(ids, embeds=True)
            except ValueError as error:
                if "unpack" not in str(error):
                    raise
            else:
                break
        self._layers_see_embeddings = not _same(found, self._layer_arguments(ids, embeds=False))

    def embed(self, batch: Batch) -> None:
        """Set a batch's states to the input of the first layer."""
        self._forward(_Call(batch, range(0), _unexpected_request, embeds=True))

    def run(
        self, batches: Sequence[Batch], layers: range, experts: dict[int, StreamedExperts]
    ) -> None:
        """Run batches that have states through some layers, which replaces their states.

        layers: filled with their weights; experts: of those layers that have some, by layer.
        Each expert is read once for all batches.
        """

        def compute(routings: list[Any]) -> list[Any]:
            with torch.inference_mode(), _current(routings[0].inputs):
                return list(experts[routings[0].layer].compute(routings))

        run_interleaved([partial(self._task, batch, layers) for batch in batches], compute)

    def finish(self, batch: Batch) -> Tensor:
        """The output of the model's final norm for states behind the last layer: [B, S, H]."""
        done: Tensor = self._forward(
            _Call(batch, range(0), _unexpected_request, self._layers_see_embeddings)
        ).last_hidden_state
        return done

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings [B, S, H] of token ids [B, S]."""
        self._local.call = _Call(Batch(ids, []), range(0), _unexpected_request, embeds=True)
        try:
            with torch.inference_mode():
                rows: Tensor = self._text.text.get_input_embeddings()(ids)
                return rows
        finally:
            self._local.call = None

    def _task(self, batch: Batch, layers: range, request_experts: Callable[[Any], Any]) -> None:
        self._forward(
            _Call(batch, layers, request_experts, self._layers_see_embeddings, batch.real())
        )

    def _forward(self, call: _Call) -> Any:
        self._local.call = call
        try:
            with torch.inference_mode(), _current(call.batch.ids):
                return self._text.text(input_ids=call.batch.ids, use_cache=False)
        finally:
            self._local.call = None

    def _visit(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_states: Tensor,
        *more: Any,
        **named: Any,
    ) -> Any:
        """Called instead of a layer's forward: runs it where the layer is active."""
        call: _Call = self._local.call
        batch, layers = call.batch, call.layers
        if index not in layers:
            if index == 0 and batch.states is None:
                batch.states = hidden_states
            elif index == 0:
                hidden_states = batch.states
            if call.seen is not None:
                call.seen.append((more, named))
            if self._extra_outputs:
                return (hidden_states, *[None] * self._extra_outputs)
            return hidden_states
        if index == layers.start:
            assert batch.states is not None
            hidden_states, batch.states = batch.states, None
        result = forward(hidden_states, *more, **named)
        if index == layers[-1]:
            batch.states = result[0] if isinstance(result, tuple) else result
        return result

    def _route(self, layer: int, inputs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called instead of the forward of a layer's experts."""
        call: _Call = self._local.call
        flat = inputs.reshape(-1, inputs.shape[-1])
        choice = (index.reshape(len(flat), -1), weights.reshape(len(flat), -1))
        outputs: Tensor = call.request_experts(Routing(layer, flat, *choice, call.real))
        return outputs.reshape(inputs.shape)

    def _embed(self, name: str, module: Any, ids: Tensor) -> Tensor:
        """Called instead of an embedding's forward: runs it on the rows of these ids alone."""
        if not self._local.call.embeds:
            # The stored states replace the result; the model looks at its shape only.
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

    def _layer_arguments(self, ids: Tensor, *, embeds: bool) -> list[Any]:
        """The arguments of all layers, hidden states left out."""
        seen: list[Any] = []
        batch = Batch(ids, [ids.shape[1]])
        self._forward(_Call(batch, range(0), _unexpected_request, embeds, seen=seen))
        return seen


def _current(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one of this thread, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _unexpected_request(request: Any) -> Any:
    """Stands for `request_experts` in calls without active layers."""
    raise AssertionError(request)


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors in two nested structures are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(left, right) for left, right in pairs)
    return True


def run_interleaved(tasks: Sequence[Task], compute: Compute) -> None:
    """Run all tasks to their end, in turns; whenever all of them wait, answer their requests.

    An exception of a task or of `compute` stops all tasks and is raised here.
    """
    if len(tasks) == 1:
        # A single task has no other to wait for: it needs no thread.
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
                # No reference may stay here: an answer is as large as a layer's activations.
                answer, answers[position] = answers[position], None
                runner.step(answer)
    finally:
        for runner in runners:
            runner.abandon()


class _Abandoned(BaseException):
    """Ends a task that waits for an answer it will not get."""


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
        """Give it the answer it waits for, and return when it waits again or has ended."""
        self._answer, self.waits = answer, False
        del answer
        self._turn.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """End the task where it waits, and join its thread."""
        self._stop = True
        self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stop:
                self._task(self._request)
        except _Abandoned:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self._done.release()

    def _request(self, request: Any) -> Any:
        self.request, self.waits = request, True
        del request
        self._done.release()
        self._turn.acquire()
        if self._stop:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer
