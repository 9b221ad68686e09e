"""Batches of samples run through some layers of the text model.

A batch is one call of the model's own `forward`: layers before the active ones are skipped, the
first active one gets the stored hidden states as its input, and the output of the last one is
kept. Where experts come in groups, the batches of a chunk wait for one another at the experts, so
that each expert is read once for all of them: each batch runs in a greenlet, which can be paused
in the middle of the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray
from torch import Tensor

from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.experts import Experts, Routing, TokenParts
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

    ids: int64 [B, S]; lengths: tokens of each sample; real: int64, the positions in [B · S] that
    are not padding, None where none is padding; counted: bool [B · S], which tokens count, None
    where all do; num_counted: how many that are; mask: int64 [B, S], 0 where no token may look, as
    transformers takes it, None where causal attention looks at real tokens alone; parts: of the
    B · S tokens, None where all samples are of one part; states: hidden states [B, S, ...], the
    input of the next layers to run; None before the first layer; lane: which of several models that
    run side by side they are of; positions: which samples of a run they are.
    """

    ids: Tensor
    lengths: list[int]
    real: Tensor | None
    counted: Tensor | None
    num_counted: int
    mask: Tensor | None = None
    parts: TokenParts | None = None
    states: Tensor | None = None
    lane: int = 0
    positions: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        samples: Sequence[NDArray[np.int64]],
        device: str,
        counted: Sequence[NDArray[np.bool_] | None] = (),
        gaps: Sequence[NDArray[np.bool_] | None] = (),
        parts: Sequence[int] = (),
    ) -> Batch:
        """Pad samples, each int64 [tokens], to the longest of them.

        counted: which of each sample's tokens count, None for all; gaps: which hold no token and
        are not to be looked at, None for none; parts: the number of each sample's part, empty
        where all are of one.
        """
        lengths = [len(ids) for ids in samples]
        shape = (len(samples), max(lengths))
        padded = np.zeros(shape, np.int64)
        real, counts, seen = (np.zeros(shape, bool) for _ in range(3))
        for row, ids in enumerate(samples):
            mask, gap = counted[row] if counted else None, gaps[row] if gaps else None
            padded[row, : len(ids)], real[row, : len(ids)] = ids, True
            counts[row, : len(ids)] = True if mask is None else mask
            seen[row, : len(ids)] = True if gap is None else ~gap
        all_real, all_count = real.all(), np.array_equal(counts, real)
        return cls(
            ids=torch.from_numpy(padded).to(device),
            lengths=lengths,
            real=None if all_real else torch.from_numpy(np.flatnonzero(real)).to(device),
            counted=None if all_count else torch.from_numpy(counts.ravel()).to(device),
            num_counted=int(counts.sum()),
            mask=None
            if np.array_equal(seen, real)
            else torch.from_numpy(seen.astype(np.int64)).to(device),
            parts=_token_parts(parts, counts, device) if parts else None,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    def set_packed(self, states: Tensor) -> None:
        """Set the hidden states, [tokens, ...], sample after sample without padding."""
        shape = (*self.ids.shape, *states.shape[1:])
        if self.real is not None:
            padded = states.new_zeros(self.ids.numel(), *states.shape[1:])
            states = padded.index_copy_(0, self.real, states)
        self.states = states.reshape(shape)

    def packed(self) -> Tensor:
        """The hidden states, [tokens, ...], sample after sample without padding."""
        assert self.states is not None
        flat = self.states.flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)


@dataclass(slots=True)
class _Call:
    """One call of the model's `forward`.

    layers: the active ones; request_experts: has the experts compute; embeds: whether embeddings
    are looked up; seen: a list that receives the layers' arguments other than the hidden states,
    or None.
    """

    batch: Batch
    layers: range
    request_experts: Callable[[Any], Any]
    embeds: bool
    seen: list[Any] | None = None


class LayerRunner:
    """Runs batches through a text model, whose layers and experts it takes over."""

    def __init__(self, text: TextModel, embed: Embed, dtype: torch.dtype, device: Device) -> None:
        """embed: looks up rows of embeddings; dtype: of embedded tokens."""
        self._text = text
        self._dtype = dtype
        self._device = device
        self._lookup = embed
        # The call that runs now; the others wait for experts.
        self._call: _Call | None = None
        # (lane, layer) → the forward of a layer that is another one in this lane.
        self.others: dict[tuple[int, int], Callable[..., Any]] = {}
        # The dtype of states that the head is given.
        self.head_dtype = dtype
        # Called with each batch and the output [B, S, ...] of each layer that it passes.
        self.watch: Callable[[int, Batch, Tensor], None] | None = None
        # Learned by `probe`.
        self._extra_outputs = 0
        self._layers_see_embeddings = True
        text.take_over(self._visit, self.route)
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
        self,
        batches: Sequence[Batch],
        layers: range,
        experts: Mapping[int, Experts],
    ) -> None:
        """Run batches that have states through some layers, which replaces their states.

        layers: filled with their weights; experts: of those layers that have some, by layer.
        Each expert is read once for all batches.
        """

        def compute(routings: list[Any]) -> list[Any]:
            return list(experts[routings[0].layer].compute(routings))

        run_interleaved([partial(self._task, batch, layers) for batch in batches], compute)

    def finish(self, batch: Batch) -> Tensor:
        """The output of the model's final norm for states behind the last layer: [B, S, H]."""
        done: Tensor = self._forward(
            _Call(batch, range(0), _unexpected_request, self._layers_see_embeddings)
        ).last_hidden_state
        return done

    def logits(self, ids: Tensor, states: Tensor) -> Tensor:
        """What the model's head makes of states behind the last layer: [n, vocabulary].

        ids: int64 [n], any tokens of the run; states: [n, ...], theirs.
        """
        batch = _plain(ids[None])
        batch.states = states[None].to(self.head_dtype)
        call = _Call(batch, range(0), _unexpected_request, self._layers_see_embeddings)
        assert self._text.predictor is not None
        done: Tensor = self._forward(call, self._text.predictor[1]).logits[0]
        return done

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings [B, S, H] of token ids [B, S]."""
        self._call = _Call(_plain(ids), range(0), _unexpected_request, embeds=True)
        try:
            with torch.inference_mode():
                rows: Tensor = self._text.text.get_input_embeddings()(ids)
                return rows
        finally:
            self._call = None

    def _task(self, batch: Batch, layers: range, request_experts: Callable[[Any], Any]) -> None:
        self._forward(_Call(batch, layers, request_experts, self._layers_see_embeddings))

    def _forward(self, call: _Call, model: Any = None) -> Any:
        """model: what to call, None for the text model."""
        self._call = call
        model = self._text.text if model is None else model
        try:
            with torch.inference_mode(), self._device.current():
                batch = call.batch
                masked = {} if batch.mask is None else {"attention_mask": batch.mask}
                return model(input_ids=batch.ids, use_cache=False, **masked)
        finally:
            self._call = None

    def _visit(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_states: Tensor,
        *more: Any,
        **named: Any,
    ) -> Any:
        """Called instead of a layer's forward: runs it where the layer is active."""
        call = self._current_call()
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
        forward = self.others.get((batch.lane, index), forward)
        result = forward(hidden_states, *more, **named)
        states = result[0] if isinstance(result, tuple) else result
        if self.watch is not None:
            self.watch(index, batch, states)
        if index == layers[-1]:
            batch.states = states
        return result

    def route(self, layer: int, inputs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Called instead of the forward of a layer's experts."""
        call = self._current_call()
        flat, batch = inputs.reshape(-1, inputs.shape[-1]), call.batch
        choice = (index.reshape(len(flat), -1), weights.reshape(len(flat), -1))
        real, counted, number = batch.real, batch.counted, batch.num_counted
        asked = Routing(layer, flat, *choice, real, counted, number, batch.parts, batch.lane)
        outputs: Tensor = call.request_experts(asked)
        self._call = call  # Other batches ran meanwhile.
        return outputs.reshape(inputs.shape)

    def _current_call(self) -> _Call:
        assert self._call is not None
        return self._call

    def _embed(self, name: str, module: Any, ids: Tensor) -> Tensor:
        """Called instead of an embedding's forward: runs it on the rows of these ids alone."""
        if not self._current_call().embeds:
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
        call = _Call(_plain(ids), range(0), _unexpected_request, embeds, seen=seen)
        self._forward(call)
        return seen


def _plain(ids: Tensor) -> Batch:
    """A batch of these token ids [B, S], without padding."""
    return Batch(ids, [ids.shape[1]] * len(ids), None, None, ids.numel())


def _token_parts(parts: Sequence[int], counts: NDArray[np.bool_], device: str) -> TokenParts:
    """Of samples with these numbers; counts: bool [B, S], which of their tokens are added up."""
    rows = np.array(parts)
    numbers = torch.from_numpy(np.repeat(rows, counts.shape[1])).to(device)
    return TokenParts(numbers, {part: int(counts[rows == part].sum()) for part in set(parts)})


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
        # A single task has no other to wait for.
        tasks[0](lambda request: compute([request])[0])
        return
    # Switching to the parent with a request pauses a task.
    request_experts = getcurrent().switch
    runners = [greenlet(task) for task in tasks]
    try:
        requests = {runner: runner.switch(request_experts) for runner in runners}
        while waiting := [runner for runner in runners if not runner.dead]:
            answers = compute([requests.pop(runner) for runner in waiting])
            for position, runner in enumerate(waiting):
                # No reference may stay here: an answer is as large as a layer's activations.
                answer, answers[position] = answers[position], None
                requests[runner] = runner.switch(answer)
                del answer
    finally:
        for runner in runners:
            if not runner.dead:
                runner.throw()
