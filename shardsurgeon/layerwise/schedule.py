"""The cost model: how samples pass the layers, what is held where, and what that moves.

A decoder layer has far more bytes of experts than anything else. Either they stay while all
batches pass by, read once; or they come in groups, while the batches of a chunk wait, and are
read once for each chunk. Which of the two reads less, and how large batches and chunks may be,
follows from sizes alone; nothing here runs a model. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Self

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.memory import LayerSize, ModelSize, largest_group
from shardsurgeon.layerwise.settings import BatchSize
from shardsurgeon.units import format_size

Chunk = list[list[int]]
"""Batches for which each expert is read once; a batch is a list of sample positions."""

SAVE_SECONDS = 600
"""Hidden states are saved this often at most, and what is computed since is at stake."""
SAVED_SHARE = 0.05
"""The part of the time that saving may take: after a long one, the next one comes later."""
MOST_ROWS = 8192
"""Tokens that one expert computes at once where experts compute one by one."""

# The part of what is left of the memory that activations may take: estimates are no promises.
_SHARE = 0.5
# Tokens of a batch: what keeps a processor busy, and no more.
_BATCH_TOKENS = {False: 16_384, True: 65_536}
# Rows of a grouped product: what keeps a GPU busy; fewer where they took more than this part.
_GROUPED_ROWS = 1 << 17
_ROWS_SHARE = 1 / 16
# INT4 weights that a GPU's grouped product unpacks at a time (`shardsurgeon_kernels.gpu`).
_KERNEL_SCRATCH = 512 << 20
# What is left beside a layer's experts must hold a batch so often. A GPU's memory has one tenant,
# and to read experts for every batch costs it more than that it makes do.
_ROOM = {False: 2.0, True: 1.25}
# Hidden states stay on a GPU where they take no more than this part of what is free there.
_ON_DEVICE = 0.25


class Hold(StrEnum):
    """What becomes of a layer's experts.

    LAYER: all stay, ready to compute, while all batches pass; STORED: all stay as they lie on
    disk and are decoded for every batch; GROUPS: some at a time, dropped when a chunk has passed.
    """

    LAYER = "layer"
    STORED = "stored"
    GROUPS = "groups"


class Place(StrEnum):
    """Where hidden states are between two layers."""

    DEVICE = "device"
    HOST = "host"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use.

    itemsize: bytes of one number; on_gpu: whether the device has a memory of its own; device_free,
    host_free: bytes, the same where it has not; states_budget: bytes for hidden states in the
    host's memory, None for half of it; batch_size: samples of a batch, or auto; attention_pair:
    bytes of the scores of one pair of tokens where attention is computed in full, else 0; compared:
    bytes of each token of a batch that are kept until other models' are there; groups: layers that
    run together; device: its name in messages.
    """

    itemsize: int
    on_gpu: bool
    device_free: int
    host_free: int
    states_budget: int | None = None
    batch_size: BatchSize = "auto"
    attention_pair: int = 0
    compared: int = 0
    groups: tuple[range, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Schedule:
    """How samples pass the layers.

    hold: what becomes of a layer's experts; grouped: whether many compute in one product, where
    their class allows it; group: experts that are there at once; ahead: whether the next layer's
    experts arrive while this one computes; batch_size: samples of one forward pass; chunk: tokens
    that pass before experts are dropped; rows: tokens times experts of one product; states: where
    hidden states are; spare: bytes of states that may wait there to be saved, beside those that
    replaced them; device_nbytes, host_nbytes: the peaks, on one memory where the device has none
    of its own.
    """

    hold: Hold
    grouped: bool
    group: int
    ahead: bool
    batch_size: int
    chunk: int
    rows: int
    states: Place
    spare: int
    device_nbytes: int
    host_nbytes: int

    def as_json(self) -> dict[str, object]:
        """What a resumed run must do in the same way, to round in the same way."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, object]) -> Self:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        kinds = {"hold": Hold, "states": Place, "ahead": bool, "grouped": bool}
        values = {field.name: kept[field.name] for field in fields(cls)}
        numbers = [value for name, value in values.items() if name not in kinds]
        least = [int(name != "spare") for name in values if name not in kinds]
        given = zip(numbers, least, strict=True)
        if not all(type(number) is int and number >= low for number, low in given):
            raise ValueError(f"{numbers} are no sizes")
        return cls(**{name: kinds.get(name, int)(value) for name, value in values.items()})


def make_schedule(size: ModelSize, lengths: Sequence[int], limits: Limits) -> Schedule:
    """Choose what moves the fewest bytes of weights and, of those, what takes the least memory.

    lengths: tokens of each sample. Raises UsageError where one layer and one batch do not fit.
    """
    return _Chooser(size, lengths, limits).choose()


class _Chooser:
    """The sizes in bytes, for one model, its samples and one machine."""

    def __init__(self, size: ModelSize, lengths: Sequence[int], limits: Limits) -> None:
        self._limits, self._lengths = limits, lengths
        each = limits.itemsize
        self._samples = len(lengths)
        self._longest, self._tokens = max(lengths), sum(lengths)
        largest = max(size.layers, key=lambda layer: layer.ready(each))
        self._experts = max(largest.experts, 1)
        self._fixed = each * (size.outside + largest_group(size, limits.groups))
        if limits.on_gpu and any(layer.stays_packed for layer in size.layers):
            self._fixed += _KERNEL_SCRATCH
        self._stored = max(layer.stored for layer in size.layers)
        self._ready = largest.ready(each)
        # One expert as it is stored, in float32, and twice in the dtype of the run.
        self._one = largest.expert * (max(each, 4) + 2 * each)
        pair = max(limits.attention_pair, size.pair_nbytes)
        self._token = each * size.token + pair * self._longest + limits.compared
        if limits.on_gpu:
            # Outputs of all of a token's experts, before they are added up.
            self._token += each * size.top_k * size.width
        self._row, self._waiting = each * size.row, each * size.waiting + limits.compared
        self._top_k = max(size.top_k, 1)
        self._most_rows = _GROUPED_ROWS if limits.on_gpu else MOST_ROWS
        while self._most_rows > MOST_ROWS and (
            self._most_rows * self._row > limits.device_free * _ROWS_SHARE
        ):
            self._most_rows //= 2
        self._state = each * size.state
        self._place, most = self._states()
        held = self._tokens * self._state
        self._spare = 0 if self._place is Place.FILE else min(held, most - held)
        held += self._spare
        self._host = held if self._place is Place.HOST else 0
        on_device = self._place is Place.DEVICE or (self._place is Place.HOST and not limits.on_gpu)
        self._states_nbytes = held if on_device else 0
        self._free = limits.device_free - self._states_nbytes

    def choose(self) -> Schedule:
        """The schedule. Raises UsageError where nothing fits."""
        in_groups = self._in_groups()
        held = self._all_held()
        if held is None:
            return in_groups
        once = len(chunks(self._lengths, in_groups, mixed=True)) == 1
        # On a GPU the copies of weights hide behind products only where they are made ahead.
        if once and not self._limits.on_gpu:
            smaller = in_groups.device_nbytes <= held.device_nbytes
            return in_groups if smaller or held.hold is Hold.STORED else held
        return held

    def _all_held(self) -> Schedule | None:
        """All of a layer's experts, in the best of the ways that fit."""
        for hold in (Hold.LAYER, Hold.STORED):
            # A CPU's next layer arrives in the system's file cache, which is in the same memory.
            for ahead in (True, False) if self._limits.on_gpu else (False,):
                held = self._held(hold, ahead)
                if held is not None:
                    return held
        return None

    def _states(self) -> tuple[Place, int]:
        """Where hidden states are, and how many bytes of them may be there."""
        limits, nbytes = self._limits, self._tokens * self._state
        budget = limits.states_budget
        if budget is None:
            budget = limits.host_free // 2
        on_device = int(limits.device_free * _ON_DEVICE)
        if limits.on_gpu and nbytes <= on_device:
            return Place.DEVICE, on_device
        if not limits.on_gpu:
            least = self._fixed + 2 * self._one + self._of_batch(1, 1)
            budget = max(0, min(budget, limits.host_free - 2 * least))
        return (Place.HOST if nbytes <= budget else Place.FILE), budget

    def _in_groups(self) -> Schedule:
        """Experts that come in groups: a few while others are read."""
        limits = self._limits
        group = 1
        if limits.on_gpu:
            group = max(1, min(self._experts, limits.device_free // 10 // max(self._one, 1)))
        fixed = self._fixed + 2 * group * self._one
        batch = self._batch(fixed, at_once=group)
        budget = int((self._free - fixed) * _SHARE) - self._of_batch(batch, group)
        most = _padded(self._lengths, _batches(self._lengths, batch, mixed=True))
        chunk = max(1, min(budget // max(self._waiting, 1), most))
        waiting = chunk * self._waiting
        return self._schedule(Hold.GROUPS, group, False, batch, chunk, fixed + waiting)

    def _held(self, hold: Hold, ahead: bool) -> Schedule | None:
        """All of a layer's experts, None where they do not fit."""
        nbytes = self._ready if hold is Hold.LAYER else self._stored + 2 * self._one
        fixed = self._fixed + nbytes + (max(nbytes, self._stored) if ahead else 2 * self._one)
        least = self._of_batch(1, self._experts)
        if fixed + int(_ROOM[self._limits.on_gpu] * least) > self._free:
            return None
        batch = self._batch(fixed, at_once=self._experts)
        chunk = batch * self._longest
        return self._schedule(hold, self._experts, ahead, batch, chunk, fixed)

    def _batch(self, fixed: int, at_once: int) -> int:
        """Samples of a batch. Raises UsageError where not even one fits."""
        limits = self._limits
        asked = limits.batch_size if isinstance(limits.batch_size, int) else 1
        needed = fixed + self._of_batch(asked, at_once)
        if needed > self._free:
            raise UsageError(
                f"--device {limits.device}",
                f"one layer takes {format_size(fixed)}, a batch of {asked} of {self._longest:,} "
                f"tokens {format_size(needed - fixed)}, and {format_size(max(self._free, 0))} are "
                "free",
                "give a smaller --max-length or --batch-size, or more memory",
            )
        if isinstance(limits.batch_size, int):
            return asked
        budget = int((self._free - fixed) * _SHARE)
        each = self._of_batch(1, at_once)
        most = min(_BATCH_TOKENS[limits.on_gpu] // self._longest, self._samples)
        return max(1, min(budget // max(each, 1) // 2, most))

    def _of_batch(self, samples: int, at_once: int) -> int:
        """Bytes of the activations of a batch."""
        tokens = samples * self._longest
        return tokens * self._token + self._rows(tokens) * self._row

    def _rows(self, tokens: int) -> int:
        """Rows of the largest product."""
        if self._limits.on_gpu:
            return min(tokens * self._top_k, self._most_rows)
        return min(tokens, self._most_rows)

    def _schedule(
        self, hold: Hold, group: int, ahead: bool, batch: int, chunk: int, fixed: int
    ) -> Schedule:
        peak = fixed + self._of_batch(batch, group) + self._states_nbytes
        host = self._host if self._limits.on_gpu else peak
        return Schedule(
            hold=hold,
            grouped=self._limits.on_gpu,
            group=group,
            ahead=ahead,
            batch_size=batch,
            chunk=chunk,
            rows=self._most_rows,
            states=self._place,
            spare=self._spare,
            device_nbytes=peak,
            host_nbytes=max(host, 1),
        )


def chunks(
    lengths: Sequence[int], schedule: Schedule, *, mixed: bool, lanes: int = 1
) -> list[Chunk]:
    """Group batches into chunks of at most `schedule.chunk` tokens, padding included.

    mixed: whether samples of different lengths may be in one batch; lanes: how often each batch
    passes, one right behind the other: lane l has the positions from l · len(lengths) on. Where a
    layer's experts stay, nothing waits for anything: a chunk is a batch.
    """
    found: list[Chunk] = []
    left = 0
    for batch in _batches(lengths, schedule.batch_size, mixed=mixed):
        tokens = _padded(lengths, [batch])
        for lane in range(lanes):
            if not found or tokens > left or schedule.hold is not Hold.GROUPS:
                found.append([])
                left = schedule.chunk
            found[-1].append([lane * len(lengths) + position for position in batch])
            left -= tokens
    return found


def _padded(lengths: Sequence[int], batches: Iterable[list[int]]) -> int:
    """Tokens of batches, each sample as long as the first of its batch."""
    return sum(lengths[batch[0]] * len(batch) for batch in batches)


def _batches(lengths: Sequence[int], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Positions of samples of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batch: list[int] = []
    for position in order:
        differs = batch and not mixed and lengths[position] != lengths[batch[0]]
        if differs or len(batch) == size:
            yield batch
            batch = []
        batch.append(position)
    yield batch


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run moves and computes; bytes, but for flops.

    experts: of experts that are read; readings: how often each of them is; dense: of all other
    weights; states_in, states_out: of hidden states to and from where a layer computes; state: of
    the hidden states of all tokens at one time, which is what is saved for a resumed run; flops:
    of all products.
    """

    experts: int
    readings: int
    dense: int
    states_in: int
    states_out: int
    state: int
    flops: int


def costs(
    size: ModelSize,
    lengths: Sequence[int],
    schedule: Schedule,
    itemsize: int,
    num_chunks: int,
    crossings: int | None = None,
) -> Costs:
    """What a schedule costs.

    lengths: tokens of each sample; num_chunks: as `chunks` cuts them; crossings: groups of layers
    that run together, None where each layer runs alone. A group takes its input once and gives
    its output once; the output of the last one is dropped, and embeddings are the first input.
    """
    layers = layers_that_run(size)
    readings = num_chunks if schedule.hold is Hold.GROUPS else 1
    state = sum(lengths) * size.state * itemsize
    crossed = (crossings or len(layers)) * state
    return Costs(
        experts=readings * sum(layer.stored for layer in layers),
        readings=readings,
        dense=itemsize * (size.outside + sum(layer.dense for layer in layers)),
        states_in=crossed,
        states_out=crossed,
        state=state,
        flops=products(size, lengths),
    )


def layers_that_run(size: ModelSize) -> list[LayerSize]:
    """The layers that a calibration runs: none behind the last one with experts, and of those for
    next-token prediction the first alone."""
    further = [layer.index for layer in size.moe_layers if layer.is_mtp]
    last = min(further) if further else max(layer.index for layer in size.moe_layers)
    return [layer for layer in size.layers if layer.index <= last]


def products(size: ModelSize, lengths: Iterable[int]) -> int:
    """Operations of all products: two for each parameter that a token meets, and for each number of
    each pair of tokens, of which there are L² / 2."""
    met = pairs = 0
    for layer in layers_that_run(size):
        met += layer.dense + min(size.top_k, layer.experts) * layer.expert
        pairs += layer.pairs
    return sum(length * (2 * met + pairs * length) for length in lengths)


def words(schedule: Schedule, costs: Costs, program: int) -> Iterator[str]:
    """What a schedule does, in lines for people, before it starts.

    program: bytes of the same memory that the program itself has, torch and transformers.
    """
    often = "once" if costs.readings == 1 else f"{costs.readings} times"
    stay = {
        Hold.LAYER: "; those of a layer stay, ready to compute",
        Hold.STORED: "; those of a layer stay as they are stored",
        Hold.GROUPS: "",
    }
    weights = format_size(costs.experts + costs.dense)
    yield f"reads {weights} of weights, each expert {often}{stay[schedule.hold]}"
    where = {Place.DEVICE: "on the device", Place.HOST: "in memory", Place.FILE: "in files"}
    moved, state = format_size(costs.states_in), format_size(costs.state)
    yield f"moves {moved} of hidden states each way; {state} at a time, {where[schedule.states]}"
    peak = format_size(schedule.device_nbytes + program)
    stake = "the layer under way"
    if schedule.states is not Place.FILE:
        # Of a save that takes longer than half a minute.
        longer = f"or {1 / SAVED_SHARE:.0f} times as long as a save takes"
        stake = f"{SAVE_SECONDS // 60} minutes, {longer}, and {stake}"
    yield f"takes at most {peak} of memory; an interruption costs at most {stake}"
