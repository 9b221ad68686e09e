"""Which counts of experts fit which machines, with how much context.

A pruned model fits where its weights, what the engine needs beside them, and the KV cache of the
sequences asked for are less than the memory that the engine takes. `checkpoint/serving_memory.md`
gives every formula with its source, `ASSUMED` the numbers that are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import Numbers, read_numbers
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.checkpoint.kv_cache import KVCache, read_kv_cache, text_section, value_at
from shardsurgeon.checkpoint.tensor_parallel import (
    GpuWeights,
    Parallel,
    block_problem,
    gpu_weights,
)
from shardsurgeon.errors import ConfigError, UsageError
from shardsurgeon.pruning.machines import CONTEXT, FitRequest, Machine
from shardsurgeon.pruning.routing import check_routing, fewest_kept, routing_facts
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.limits import CONFIG
from shardsurgeon.units import format_size

# vLLM's --gpu-memory-utilization, --max-num-batched-tokens and --max-num-seqs, where not given.
UTILIZATION, BATCHED_TOKENS, MAX_SEQUENCES = 0.92, 8192, 256
# CUDA context, communication buffers and captured graphs.
RUNTIME_NBYTES = 2**30
# Vectors of the hidden size that a layer holds for each token of a batch, beside one per chosen
# expert: residual, norm, queries, keys, values, output and what is computed from them.
VECTORS = 12
# Kernels like counts of experts that are a multiple of this.
STEP = 8
ASSUMED = (
    "a GPU of N GB has 0.98 N GiB, unified memory 0.75 N GiB; N MiB and N GiB are exact",
    f"of it the engine takes {UTILIZATION:g} (vLLM's default)",
    f"beside weights and KV cache it needs 1 GiB per GPU, and for {BATCHED_TOKENS:,} tokens at "
    f"once {VECTORS} + top-k vectors of the hidden size each, the logits of {MAX_SEQUENCES} "
    "tokens, and copies of a latent's up-projections",
    "MTP layers are not loaded: vLLM loads them to speculate, and `fit --mtp-layers` counts them",
)


@dataclass(frozen=True, slots=True)
class FitRow:
    """One count of experts on one machine. Sizes in bytes of one GPU.

    ratio: fraction of the experts removed; weights_nbytes; cache_nbytes: left for the KV cache,
    below 0 where not even the weights fit; tokens: of KV cache left in all, counted in sequences
    of the context asked for; longest_context: that the sequences asked for can have, 0 for none;
    fits: whether they can have the context asked for; note: what an engine would not like.
    saliency_dropped_mean, saliency_dropped_worst: share of a layer's saliency that goes with its
    experts, on average and in the worst layer; None without scores.
    """

    kept: int
    ratio: float
    weights_nbytes: int
    cache_nbytes: int
    tokens: int
    longest_context: int
    fits: bool
    note: str | None = None
    saliency_dropped_mean: float | None = None
    saliency_dropped_worst: float | None = None


@dataclass(frozen=True, slots=True)
class MachineFit:
    """What fits one machine.

    gpu_nbytes: memory of one GPU; tensor_parallel, replicas: how the engine uses the GPUs;
    sequence_nbytes: KV cache per GPU of one sequence; other_nbytes: what is needed beside weights
    and cache; rows: one per count, fewest experts first; kept: the most that fit, None for none;
    problem: why no engine runs it so, None where one does; flags: what to start vLLM with; note:
    why the experts are not split, where that was not asked for.
    """

    machine: str
    gpus: int
    gpu_nbytes: int
    tensor_parallel: int
    replicas: int
    sequence_nbytes: int
    other_nbytes: int
    rows: tuple[FitRow, ...]
    kept: int | None
    problem: str | None
    flags: str
    note: str | None = None

    @property
    def best(self) -> FitRow | None:
        """The row of the most experts that fit."""
        return next((row for row in self.rows if row.kept == self.kept), None)


@dataclass(frozen=True)
class Fit:
    """A model to be fitted: what is read of it once, for every machine and count.

    Raises UsageError for a context that the model is not made for, FamilyError where its
    attention is unknown.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    request: FitRequest

    def __post_init__(self) -> None:
        most = self.alone.context
        if self.request.context is not None and most and self.request.context > most:
            problem = f"{self.request.context:,} tokens are more than the {most:,} that the model "
            raise UsageError("--context", f"{problem}is made for", f"give at most {most}")

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.request.context or min(CONTEXT, self.alone.context or CONTEXT)

    @cached_property
    def alone(self) -> KVCache:
        """The KV cache on a single GPU."""
        return self._cache(1)

    @cached_property
    def weights(self) -> GpuWeights:
        """How the weights are divided."""
        return gpu_weights(self.checkpoint, self.anatomy, mtp=self.request.mtp)

    @cached_property
    def _numbers(self) -> Numbers:
        place = self.checkpoint.config_place
        return read_numbers(self.anatomy.family, self.checkpoint.settings, place)

    @cached_property
    def _beside(self) -> Mapping[str, Any] | None:
        """What ModelOpt says of quantization in a file of its own, None where there is none."""
        name = QUANTIZATION_FILES[0]
        if all(file.name != name for file in self.checkpoint.files):
            return None
        raw = self.checkpoint.read_file(name, CONFIG)
        value = Document.parse(raw, f"{self.checkpoint.location}/{name}").value
        return value if isinstance(value, Mapping) else None

    def _cache(self, ranks: int) -> KVCache:
        return read_kv_cache(
            self.anatomy.family,
            self.checkpoint.settings,
            self._numbers,
            self.checkpoint.config_place,
            ranks=ranks,
            dtype=self.request.kv_dtype,
            mtp=self.request.mtp,
            beside=self._beside,
        )

    def other_nbytes(self, parallel: Parallel) -> int:
        """What one GPU needs beside weights and KV cache, as `ASSUMED` says."""
        section = text_section(self.anatomy.family, self.checkpoint.settings)
        paths = (*self.anatomy.family.attention.paths("heads", "hidden"), "hidden_size")
        found = (value_at(section, path) for path in paths)
        hidden = next((value for value in found if type(value) is int), 0)
        vocabulary = section.get("vocab_size")
        logits = MAX_SEQUENCES * 4 * (vocabulary if type(vocabulary) is int else 0)
        batch = BATCHED_TOKENS * hidden * 2 * (VECTORS + self.anatomy.top_k)
        return RUNTIME_NBYTES + batch + logits + self.weights.latent // parallel.tensor

    def on(self, machine: Machine, counts: Iterable[int | Mapping[int, int]]) -> MachineFit:
        """What fits a machine, of counts per layer, or of layer → count."""
        ranks = self.request.tensor_parallel or machine.gpus
        parallel = Parallel(machine.gpus, ranks, self.request.expert_parallel)
        other = self.other_nbytes(parallel)
        try:
            cache = self._cache(ranks)
        except ConfigError as error:
            return self._told(machine, parallel, 0, other, (), error.problem)
        # What cannot be split can be spread: vLLM then wants --enable-expert-parallel.
        spread = block_problem(self.checkpoint, self.anatomy, parallel)
        if spread:
            parallel = replace(parallel, experts=True)
        budget = int(machine.nbytes * UTILIZATION) - other
        rows = tuple(self._row(count, budget, cache, parallel) for count in counts)
        told = self._told(machine, parallel, cache.sequence_nbytes(self.context), other, rows, None)
        return replace(told, note=f"experts stay whole: {spread}") if spread else told

    def _told(
        self,
        machine: Machine,
        parallel: Parallel,
        sequence: int,
        other: int,
        rows: tuple[FitRow, ...],
        problem: str | None,
    ) -> MachineFit:
        return MachineFit(
            machine=machine.label,
            gpus=machine.gpus,
            gpu_nbytes=machine.nbytes,
            tensor_parallel=parallel.tensor,
            replicas=parallel.replicas,
            sequence_nbytes=sequence,
            other_nbytes=other,
            rows=rows,
            kept=max((row.kept for row in rows if row.fits), default=None),
            problem=problem,
            flags=self.flags(parallel),
        )

    def _row(
        self, count: int | Mapping[int, int], budget: int, cache: KVCache, parallel: Parallel
    ) -> FitRow:
        weights = self.weights.nbytes(count, parallel)
        left = budget - weights
        each = -(-self.request.sequences // parallel.replicas)
        one = cache.sequence_nbytes(self.context)
        tokens = int(max(left, 0) / one * self.context) * parallel.replicas if one else 0
        most = max(count.values()) if isinstance(count, Mapping) else count
        note = None
        if parallel.experts and most % parallel.ranks_of_experts:
            note = f"{most} experts do not divide by {parallel.ranks_of_experts} ranks"
        before = self.anatomy.experts_per_layer
        kept = sum(min(count, n) if isinstance(count, int) else count[i] for i, n in before.items())
        return FitRow(
            kept=most,
            ratio=1 - kept / sum(before.values()),
            weights_nbytes=weights,
            cache_nbytes=left,
            tokens=tokens,
            longest_context=self._longest(left // each, cache),
            fits=left >= each * one,
            note=note,
        )

    def _longest(self, nbytes: int, cache: KVCache) -> int:
        """The most tokens of a sequence whose KV cache has at most so many bytes."""
        low, high = 0, cache.context or 2**20
        while low < high:
            middle = (low + high + 1) // 2
            fits = cache.sequence_nbytes(middle) <= nbytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def flags(self, parallel: Parallel) -> str:
        """What vLLM is started with."""
        words = [f"--tensor-parallel-size {parallel.tensor}"]
        words += [f"--data-parallel-size {parallel.replicas}"] if parallel.replicas > 1 else []
        words += ["--enable-expert-parallel"] if parallel.experts else []
        words += [f"--max-model-len {self.context}"]
        words += ["--kv-cache-dtype fp8"] if self.request.kv_dtype == "fp8" else []
        return " ".join(words)

    def counts(self, ranks: int) -> Iterator[int]:
        """The counts that engines like, fewest first; the last is all experts, nothing pruned.

        Multiples of 8, of the ranks and of the router's groups; where the model has too few
        experts for that, of the groups. Only those that the router can choose from.
        """
        facts = routing_facts(self.anatomy)
        step = math.lcm(STEP, ranks, facts.n_group)
        if 2 * step > facts.num_experts:
            step = facts.n_group
        least = fewest_kept(facts)
        for count in range(-(-least // step) * step, facts.num_experts, step):
            check_routing(count, facts, "fit")
            yield count
        yield facts.num_experts

    def largest(self, machine: Machine) -> int:
        """The most experts per layer that fit, fewer than there are.

        Raises UsageError where not even the fewest fit, or all do.
        """
        found = self.on(machine, self.counts(self.request.tensor_parallel or machine.gpus))
        asked = f"{self.request.sequences} sequences of {self.context:,} tokens"
        if found.problem:
            raise UsageError("--fit", f"{machine.label}: {found.problem}", "name other GPUs")
        if found.kept is None:
            row = found.rows[0]
            need = (
                row.weights_nbytes
                + found.other_nbytes
                + -(-self.request.sequences // found.replicas) * found.sequence_nbytes
            )
            problem = f"with {row.kept} experts kept a GPU of {machine.label} needs "
            problem += f"{format_size(need)} for {asked}, and may take "
            problem += format_size(int(machine.nbytes * UTILIZATION))
            raise UsageError("--fit", problem, "name more GPUs, or give a smaller --context")
        if found.kept == self.anatomy.num_experts:
            problem = f"nothing needs pruning: all {found.kept} experts fit {machine.label} with "
            raise UsageError("--fit", problem + asked, "name fewer GPUs, or more --sequences")
        return found.kept
