"""The order of tensors in an output shard with which most bytes need not be copied. Pure.

A file system that shares extents takes whole blocks of 4096 bytes from the source where source
and target agree modulo 4096. safetensors allows no holes, but it leaves the order of tensors and
the padding of the header free. So every large tensor is put where its offset agrees with that of
its bytes in the source (its phase), and the small ones, which are copied anyway (shapes, scales,
norms), are the filler that moves the position from one phase to the next.

Phases lie on a circle of 4096. All large tensors of one phase follow one another in source order,
for most of them are whole blocks and leave the position where it is; one that is not moves it to
the phase of the tensor that stood behind it. To get on, the walk looks for the phase that it can
reach with several fillers of one size, and takes the one that uses up the smallest part of what
there is of them: hundreds of 8-byte shapes are spent before the one bias. With 8-byte fillers
this goes upwards around the circle from behind the widest gap, with those of 3,584 bytes
downwards in steps of 512. Where one size does not do, a table of what sums of all fillers reach
says the cheapest one. Fillers may be too few to reach all: the walk begins where they reach most
bytes, and what it does not reach is copied.

Every tensor must begin at a multiple of its dtype's width. A shard is therefore laid out in
sections of falling unit (8, 4, 2, 1 bytes): in a section all positions are multiples of its unit,
because all that stands in it has a size and a phase that are, and no wider dtype than the unit.
Most shards need one section. That no walk is worse than a simple order is not proven but seen
to: of all orders that were tried the best is taken, and the simple ones are tried first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.storage.formats.tensor_table import Column
from shardsurgeon.units import BLOCK_NBYTES

Mask = NDArray[np.bool_]

# The data of a file begins at a multiple of this: the padding of the header sees to it.
START_UNIT = 8
# No better order is looked for when this part of what any could share is shared.
ENOUGH = 0.999
# Large tensors that together hold no more than this part of the bytes may serve as fillers.
MINOR = 0.02
# Shards of few tensors are walked from more than the best beginning, while it is cheap.
BEGINNINGS = 4
CHEAP = 1000


@dataclass(frozen=True, slots=True)
class Layout:
    """order[k]: the tensor at place k. start: offset of the data in the file modulo 4096.

    start is None where nothing can be shared, so that any multiple of 8 serves.
    """

    order: Column
    start: int | None


class _Columns(NamedTuple):
    """As in `lay_out`; no phase, and no gain, where the phase is misaligned."""

    nbytes: Column
    width: Column
    phase: Column
    gain: Column


class _Tried(NamedTuple):
    shared: int
    start: int
    order: Column


def lay_out(nbytes: Column, width: Column, phase: Column, gain: Column) -> Layout:
    """Order the tensors of one output shard, given in source order, so that most is shared.

    nbytes: sizes, each a multiple of its width; width: bytes of an element, 1, 2, 4 or 8;
    phase: what an offset in the file must be modulo 4096 for the tensor to share its bytes with
    the source, -1 where it cannot; gain: the bytes that it then shares. All int64[n]. The result
    depends on nothing else. Every tensor begins at a multiple of its width, and no less is shared
    than by the simple order: wider dtypes first, then as given.
    """
    large = (gain > 0) & (phase >= 0) & (phase % width == 0)
    shard = _Columns(nbytes, width, np.where(large, phase, -1), np.where(large, gain, 0))
    simple = np.argsort(-width, kind="stable")
    if not large.any():
        return Layout(simple, None)
    best = _try(simple, shard)
    given = np.arange(len(nbytes))
    if not (_positions(given, nbytes) % width).any():
        # Among equals the source's own order: it has the longest runs.
        best = max(_try(given, shard), best, key=_shared)
    # All positions of a file agree modulo the largest power of two that is in all sizes.
    power = int(np.bitwise_or.reduce(nbytes, initial=BLOCK_NBYTES))
    enough = np.bincount(phase[large] % (power & -power), gain[large]).max() * ENOUGH
    walks = _walks(shard)
    while best.shared < enough and (order := next(walks, None)) is not None:
        best = max(best, _try(order, shard), key=_shared)
    return Layout(best.order, best.start) if best.shared else Layout(simple, None)


def shared_nbytes(
    order: Column, start: int | None, nbytes: Column, phase: Column, gain: Column
) -> int:
    """The bytes that tensors in this order share with the source, where the data begins at start.

    Columns: as in `lay_out`; start: modulo 4096, or None, where nothing is shared.
    """
    if start is None:
        return 0
    agree = (start + _positions(order, nbytes)) % BLOCK_NBYTES == phase[order]
    return int(gain[order][agree].sum())


def _positions(order: Column, nbytes: Column) -> Column:
    """Offset of each tensor from the begin of the data, in the order of the file."""
    ends: Column = np.cumsum(nbytes[order])
    return ends - nbytes[order]


def _try(order: Column, shard: _Columns) -> _Tried:
    """What an order shares with the best of all starts."""
    starts = (shard.phase[order] - _positions(order, shard.nbytes)) % BLOCK_NBYTES
    shared = np.bincount(starts, shard.gain[order], minlength=BLOCK_NBYTES)[::START_UNIT]
    place = int(shared.argmax())
    return _Tried(int(shared[place]), place * START_UNIT, order)


def _shared(tried: _Tried) -> int:
    return tried.shared


def _walks(shard: _Columns) -> Iterator[Column]:
    """Orders made by walking the phases, the most promising first."""
    nbytes, width, phase, gain = shard
    # Large tensors that move the position and hold few bytes (norms, a router) help most as
    # fillers: they are walked to only where they were not needed.
    moving = np.flatnonzero((phase >= 0) & (nbytes % BLOCK_NBYTES != 0))
    moving = moving[np.argsort(gain[moving], kind="stable")]
    minor = np.zeros(len(nbytes), dtype=bool)
    minor[moving[np.cumsum(gain[moving]) <= gain.sum() * MINOR]] = True
    # The widest unit that a tensor leaves intact, and the phase that it asks for.
    intact = nbytes | START_UNIT | np.where(phase >= 0, phase, 0)
    intact &= -intact
    # Dtypes up to this width share their sections, so that one walk may serve them all; wider
    # ones come before, each width in its own.
    for merged in np.unique(width)[::-1].tolist():
        first = np.minimum(intact, np.maximum(width, merged))
        for beginning in range(1 + min(CHEAP // len(nbytes), BEGINNINGS)):
            for fillers in (minor, minor & False):
                yield _walked(shard, first, fillers, beginning)
        if first.min() == first.max():
            # Narrower sections would only have less in them.
            break


def _walked(shard: _Columns, first: Column, minor: Mask, beginning: int) -> Column:
    """The order that one walk makes, section by section.

    first: unit of the first section that a tensor may stand in; it may stand in later ones too
    if they are no narrower than its dtype. minor: large tensors that serve as fillers. beginning:
    which phase the walk begins at, 0 being the best.
    """
    nbytes, width, phase, gain = shard
    units = np.unique(first)[::-1].tolist()
    walk = _Walk(nbytes, beginning)
    left = np.ones(len(nbytes), dtype=bool)
    whole = nbytes % BLOCK_NBYTES == 0
    rounds = ((phase >= 0) & ~minor, ((phase < 0) | minor) & ~whole), (minor, (phase < 0) & ~whole)
    for unit, following in zip(units, [*units[1:], 0], strict=True):
        # Wider dtypes than the unit are all placed by now.
        usable = first >= unit
        for large, small in rounds:
            nodes = np.flatnonzero(usable & left & large)
            if len(nodes):
                placed = len(walk.order)
                fillers = np.flatnonzero(usable & left & small)
                walk.section(nodes, phase[nodes], gain[nodes], fillers)
                left[walk.order[placed:]] = False
        # What was not needed may help in a section that follows, if it may stand there.
        rest = np.flatnonzero(usable & left & (width > following))
        walk.rest(rest)
        left[rest] = False
    return np.array(walk.order, dtype=np.int64)


class _Filler:
    """Small tensors of one size modulo 4096 (step), in source order."""

    def __init__(self, step: int, tensors: list[int]) -> None:
        self.step, self.tensors = step, tensors
        self.left = len(tensors)
        # What one of them costs: the part of its kind, so that the rare ones are kept.
        self.price = 1 / self.left


class _Reach:
    """Where sums of fillers lead: for each distance modulo 4096 what the cheapest one costs."""

    def __init__(self, fillers: list[_Filler]) -> None:
        self.cost = np.full(BLOCK_NBYTES, inf)
        self.cost[0] = 0
        self._layers: list[tuple[_Filler, int, Mask]] = []
        for filler in fillers:
            left, times = filler.left, 1
            while left:
                # 1, 2, 4, ... and a remainder: some of them sum up to every number up to all.
                times = min(times, left)
                moved = np.roll(self.cost, times * filler.step) + times * filler.price
                better = moved < self.cost
                self.cost = np.where(better, moved, self.cost)
                self._layers.append((filler, times, better))
                left, times = left - times, times * 2

    def cheapest(self, distances: Column) -> list[tuple[_Filler, int]]:
        """Fillers, and how many of each, to the cheapest of distances; none: all out of reach."""
        distance = int(distances[self.cost[distances].argmin()])
        parts = []
        if self.cost[distance] < inf:
            for filler, times, better in reversed(self._layers):
                if better[distance]:
                    distance = (distance - times * filler.step) % BLOCK_NBYTES
                    parts.append((filler, times))
        return parts


class _Walk:
    """The order so far, and the position behind it modulo 4096.

    Until the first phase is met the data may begin at any multiple of 8 (`free`).
    """

    def __init__(self, nbytes: Column, beginning: int) -> None:
        self._moves, self._beginning = nbytes % BLOCK_NBYTES, beginning
        self.order: list[int] = []
        self.position = 0
        self.free = True

    def section(self, large: Column, phases: Column, gains: Column, small: Column) -> None:
        """Walk through as many phases as the small tensors allow."""
        fillers = _fillers(small, self._moves[small])
        # Of one phase, those that leave the position where it is come first.
        by_phase = np.lexsort((self._moves[large] != 0, phases))
        begins = np.flatnonzero(np.diff(phases[by_phase], prepend=-1))
        nodes = phases[by_phase][begins]
        tensors, moves = large[by_phase].tolist(), self._moves[large[by_phase]].tolist()
        ends = [*begins[1:].tolist(), len(tensors)]
        # Phase → its tensors that are not placed yet.
        spans = dict(zip(nodes.tolist(), zip(begins.tolist(), ends, strict=True), strict=True))
        waiting = bytearray(BLOCK_NBYTES)
        for node in spans:
            waiting[node] = 1
        if self.free:
            summed = np.add.reduceat(gains[by_phase], begins)
            ranked = _beginnings(nodes, summed, fillers)
            worse = self._beginning % len(ranked)
            self._begin(ranked[worse:] + ranked[:worse], fillers)
        while spans and not self.free:
            node = self.position
            if waiting[node]:
                place, end = spans[node]
                behind = place + 1
                while behind < end and not moves[behind - 1]:
                    behind += 1
                self._put(tensors[place:behind], moves[behind - 1])
                spans[node] = behind, end
                if behind == end:
                    waiting[node] = 0
                    del spans[node]
            elif near := _nearest(node, waiting, fillers):
                self._spend([near])
            else:
                parts = _Reach(fillers).cheapest((np.array(list(spans)) - node) % BLOCK_NBYTES)
                if not parts:
                    return
                self._spend(parts)

    def _begin(self, nodes: list[int], fillers: list[_Filler]) -> None:
        """Choose the first phase, of some the best first, and with it the start of the data.

        A phase that is no multiple of 8 from here needs fillers before it.
        """
        reach = _Reach(fillers) if any((n - self.position) % START_UNIT for n in nodes) else None
        for node in nodes:
            odd = (node - self.position) % START_UNIT
            parts = (
                reach.cheapest(np.arange(odd, BLOCK_NBYTES, START_UNIT)) if reach and odd else []
            )
            if parts or not odd:
                self._spend(parts)
                self.position, self.free = node, False
                return

    def rest(self, tensors: Column) -> None:
        """Place tensors here, wherever that is."""
        self._put(tensors.tolist(), int(self._moves[tensors].sum()))

    def _put(self, tensors: list[int], moves: int) -> None:
        self.order += tensors
        self.position = (self.position + moves) % BLOCK_NBYTES

    def _spend(self, parts: list[tuple[_Filler, int]]) -> None:
        for filler, times in parts:
            used = len(filler.tensors) - filler.left
            self._put(filler.tensors[used : used + times], times * filler.step)
            filler.left -= times


def _fillers(small: Column, steps: Column) -> list[_Filler]:
    """Small tensors by size modulo 4096, the most numerous sizes first."""
    by_step = small[np.argsort(steps, kind="stable")].tolist()
    sizes, counts = np.unique(steps, return_counts=True)
    ends = np.cumsum(counts)
    found = [
        _Filler(step, by_step[end - count : end])
        for step, count, end in zip(sizes.tolist(), counts.tolist(), ends.tolist(), strict=True)
    ]
    return sorted(found, key=lambda filler: -filler.left)


def _nearest(
    position: int, waiting: bytearray, fillers: list[_Filler]
) -> tuple[_Filler, int] | None:
    """The one filler, and how many of it, that reaches a phase at the lowest price."""
    cheapest, found = inf, None
    for filler in fillers:
        if cheapest <= filler.price:
            # Those that follow are no cheaper.
            break
        at = position
        for times in range(1, filler.left + 1):
            at = (at + filler.step) % BLOCK_NBYTES
            if waiting[at]:
                if times * filler.price < cheapest:
                    cheapest, found = times * filler.price, (filler, times)
                break
            if at == position:
                break
    return found


def _beginnings(nodes: Column, gains: Column, fillers: list[_Filler]) -> list[int]:
    """Phases to begin at, the best first: from where steps of the first size reach most bytes.

    Where they reach the same, it is the one that needs the fewest steps, hence the one behind
    the widest gap.
    """
    step, left = (fillers[0].step, fillers[0].left) if fillers else (1, 0)
    # Steps of one size visit the phases that agree modulo the largest power of two in it: these
    # lie on one circle, each at so many steps.
    power = step & -step
    around = BLOCK_NBYTES // power
    steps = nodes // power * pow(step // power, -1, around) % around
    # Each circle is laid down twice, one circle behind the other, so that no walk is cut in two.
    along = nodes % power * (4 * around) + steps
    twice = np.concatenate((along, along + around))
    by_place = np.argsort(twice)
    places = twice[by_place]
    summed = np.concatenate(([0], np.cumsum(np.tile(gains, 2)[by_place])))
    begins = np.searchsorted(places, along)
    ends = np.searchsorted(places, along + min(left, around - 1), side="right")
    needed = places[ends - 1] - along
    best_first = np.lexsort((nodes, needed, summed[begins] - summed[ends]))
    return [int(node) for node in nodes[best_first]]
