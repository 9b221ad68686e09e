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
it has of them: hundreds of 8-byte shapes are spent before the one bias. With 8-byte fillers this
goes upwards around the circle from behind the widest gap, with those of 3,584 bytes downwards in
steps of 512. Where one size does not do, a table of what sums of all fillers reach says the
cheapest one. Fillers may be too few to reach all: the walk begins where they reach most bytes,
and what it does not reach is copied.

Every tensor must begin at a multiple of its dtype's width. A shard is therefore laid out in
sections of falling unit (8, 4, 2, 1 bytes): in a section all positions are multiples of its unit,
because all that stands in it has a size and a phase that are, and no wider dtype than the unit.
Most shards need one section. That no walk is worse than the simple order is not proven but seen
to: the best of all that were tried is taken, and the simple order is one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]

BLOCK = 4096
# The data of a file begins at a multiple of this: the padding of the header sees to it.
START_UNIT = 8
# No better order is looked for when this part of what could be shared is.
ENOUGH = 0.999
# The part of all bytes that large tensors together hold which may serve as fillers.
MINOR = 0.02


@dataclass(frozen=True, slots=True)
class Layout:
    """order[k]: the tensor at place k. start: offset of the data in the file modulo 4096.

    start is None where nothing can be shared, so that any multiple of 8 serves.
    """

    order: Column
    start: int | None


def lay_out(nbytes: Column, width: Column, phase: Column, gain: Column) -> Layout:
    """Order the tensors of one output shard, given in source order, so that most is shared.

    nbytes: sizes, each a multiple of its width; width: bytes of an element, 1, 2, 4 or 8;
    phase: what an offset in the file must be modulo 4096 for the tensor to share its bytes with
    the source, -1 where it cannot; gain: the bytes that it then shares. All int64[n]. The result
    depends on nothing else. Every tensor begins at a multiple of its width, and no order that
    was thought of shares more; among them is the simple one: wider dtypes first, then as given.
    """
    phase = np.where((gain > 0) & (phase % width == 0), phase, -1)
    wanted = _most_possible(nbytes, phase, gain)
    best, best_start, most = np.argsort(-width, kind="stable"), None, 0
    for order in _orders(nbytes, width, phase, gain) if wanted else ():
        start, shared = _best_start(order, nbytes, phase, gain)
        if shared > most:
            best, best_start, most = order, start, shared
        if most >= wanted * ENOUGH:
            break
    return Layout(best, best_start)


def shared_nbytes(
    order: Column, start: int | None, nbytes: Column, phase: Column, gain: Column
) -> int:
    """The bytes that tensors in this order share with the source, where the data begins at start.

    Columns: as in `lay_out`; start: modulo 4096, or None, where nothing is shared.
    """
    if start is None:
        return 0
    agree = (start + _positions(order, nbytes)) % BLOCK == phase[order]
    return int(gain[order][agree].sum())


def _positions(order: Column, nbytes: Column) -> Column:
    """Offset of each tensor from the begin of the data, in the order of the file."""
    ends: Column = np.cumsum(nbytes[order])
    return ends - nbytes[order]


def _best_start(order: Column, nbytes: Column, phase: Column, gain: Column) -> tuple[int, int]:
    """The start, a multiple of 8, with which an order shares most bytes, and how many."""
    starts = (phase[order] - _positions(order, nbytes)) % BLOCK
    gains = np.where(phase >= 0, gain, 0)[order]
    shared = np.bincount(starts, weights=gains, minlength=BLOCK)[::START_UNIT]
    place = int(shared.argmax())
    return place * START_UNIT, int(shared[place])


def _most_possible(nbytes: Column, phase: Column, gain: Column) -> int:
    """What no order can share more than, in bytes.

    All positions of a file agree modulo the largest power of two that is in all sizes.
    """
    power = int(np.bitwise_or.reduce(nbytes, initial=BLOCK))
    power &= -power
    large = phase >= 0
    return int(np.bincount(phase[large] % power, weights=gain[large], minlength=1).max())


def _orders(nbytes: Column, width: Column, phase: Column, gain: Column) -> Iterator[Column]:
    """Valid orders: those that must not be missed, then those that are likely to share most."""
    yield np.argsort(-width, kind="stable")
    given = np.arange(len(nbytes))
    if not (_positions(given, nbytes) % width).any():
        yield given
    # Large tensors that move the position and hold few bytes: norms, a router.
    moving = np.flatnonzero((phase >= 0) & (nbytes % BLOCK != 0))
    moving = moving[np.argsort(gain[moving], kind="stable")]
    minor = np.zeros(len(nbytes), dtype=bool)
    minor[moving[np.cumsum(gain[moving]) <= gain.sum() * MINOR]] = True
    # The widest unit that a tensor leaves intact, and the phase that it asks for.
    intact = nbytes | START_UNIT | np.where(phase >= 0, phase, 0)
    intact &= -intact
    for merged in np.unique(width)[::-1].tolist():
        for fillers, beginning in ((minor, 0), (minor, 1), (minor & False, 0)):
            yield _walked(nbytes, width, phase, gain, intact, fillers, merged, beginning)
        if intact.min() >= merged:
            # One section held all.
            break


def _walked(
    nbytes: Column,
    width: Column,
    phase: Column,
    gain: Column,
    intact: Column,
    minor: NDArray[np.bool_],
    merged: int,
    beginning: int,
) -> Column:
    """One order by walking the phases, section by section.

    intact: the widest unit that a tensor leaves; minor: large tensors that are fillers, and walked through only if they were not needed;
    merged: dtypes up to this width share sections, so that one walk may serve them all; wider
    ones come before, each width in its own; beginning: the filler, from the most numerous size,
    to which the walk's begin is fitted.
    """
    # The unit of the first section that a tensor may stand in.
    first = np.minimum(intact, np.maximum(width, merged))
    units = np.unique(first)[::-1].tolist()
    walk = _Walk(nbytes, beginning)
    left = np.ones(len(nbytes), dtype=bool)
    for unit, following in zip(units, [*units[1:], 0], strict=True):
        usable = (width <= unit) & (first >= unit)
        for large, small in (
            ((phase >= 0) & ~minor, (phase < 0) | minor),
            (minor, phase < 0),
        ):
            nodes = np.flatnonzero(usable & left & large)
            if len(nodes):
                placed = len(walk.order)
                fillers = np.flatnonzero(usable & left & small & (nbytes % BLOCK != 0))
                walk.section(nodes, phase[nodes], gain[nodes], fillers)
                left[walk.order[placed:]] = False
        # What was not needed may help in a section that follows, if it may stand there.
        rest = np.flatnonzero(usable & left & (width > following))
        walk.rest(rest)
        left[rest] = False
    return np.array(walk.order, dtype=np.int64)


@dataclass(slots=True)
class _Fillers:
    """Small tensors of one size modulo 4096, in source order."""

    step: int
    tensors: list[int]
    used: int = 0

    @property
    def left(self) -> int:
        return len(self.tensors) - self.used

    def log(self, phases: Column) -> tuple[Column, Column, int]:
        """For each phase: the circle it lies on, the steps to it on that, and steps around one.

        Steps of one size visit the phases that agree modulo the largest power of two in it.
        """
        power = self.step & -self.step
        around = BLOCK // power
        inverse = pow(self.step // power, -1, around) if around > 1 else 0
        return phases % power, phases // power * inverse % around, around


class _Reach:
    """Where sums of fillers lead: for each distance modulo 4096 the cheapest, or inf."""

    def __init__(self, fillers: list[_Fillers]) -> None:
        self.cost = np.full(BLOCK, inf)
        self.cost[0] = 0
        self._layers: list[tuple[int, int, int, NDArray[np.bool_]]] = []
        for place, filler in enumerate(fillers):
            left, times = filler.left, 1
            while left:
                # 1, 2, 4, ... and a remainder: some of them sum up to every number up to all.
                times = min(times, left)
                moved = np.roll(self.cost, times * filler.step) + times / len(filler.tensors)
                better = moved < self.cost
                self.cost = np.where(better, moved, self.cost)
                self._layers.append((place, times, times * filler.step, better))
                left, times = left - times, times * 2

    def recipe(self, distance: int) -> dict[int, int]:
        """Place of the filler → how many of it, for a distance that can be reached."""
        counts: dict[int, int] = {}
        for place, times, moved, better in reversed(self._layers):
            if better[distance]:
                distance = (distance - moved) % BLOCK
                counts[place] = counts.get(place, 0) + times
        return counts


@dataclass(slots=True)
class _Walk:
    """The order so far, and the position behind it.

    nbytes: sizes of all tensors; beginning: as in `_walked`. Until the first phase is met the
    data may begin at any multiple of 8 (`free`); with it the position becomes that of the file.
    """

    nbytes: Column
    beginning: int
    order: list[int] = field(default_factory=list)
    position: int = 0
    free: bool = True

    def rest(self, tensors: Column) -> None:
        """Put tensors here, wherever that is."""
        self.order += tensors.tolist()
        self.position = (self.position + int(self.nbytes[tensors].sum())) % BLOCK

    def section(self, large: Column, phases: Column, gains: Column, small: Column) -> None:
        """Walk through as many phases as the small tensors allow."""
        moves = self.nbytes[large] % BLOCK
        # Of one phase, those that leave the position come first, as one run.
        by_phase = np.lexsort((moves != 0, phases))
        phases = phases[by_phase]
        begins = np.flatnonzero(np.diff(phases, prepend=-1))
        nodes = _Nodes(
            large[by_phase].tolist(),
            moves[by_phase].tolist(),
            phases[begins],
            begins.tolist(),
            np.add.reduceat(gains[by_phase], begins),
        )
        fillers = _fillers(small, self.nbytes[small] % BLOCK)
        if self.free and not self._begin(nodes, fillers):
            return
        reach: _Reach | None = None
        while True:
            if nodes.waiting[self.position]:
                self._visit(nodes)
                continue
            if not nodes.open:
                return
            if near := _nearest(self.position, nodes.waiting, fillers):
                self._spend(*near)
                continue
            recipe = reach and _cheapest(self.position, nodes, reach)
            if not recipe or any(fillers[place].left < n for place, n in recipe.items()):
                # What is left of the fillers has changed since the table was made.
                reach = _Reach(fillers)
                recipe = _cheapest(self.position, nodes, reach)
            if not recipe:
                return
            for place, count in recipe.items():
                self._spend(fillers[place], count)

    def _begin(self, nodes: _Nodes, fillers: list[_Fillers]) -> bool:
        """Choose the first phase, and with it the start of the data; False where none can be.

        A phase that is no multiple of 8 from here needs fillers before it.
        """
        kind = fillers[min(self.beginning, len(fillers) - 1)] if fillers else None
        reach: _Reach | None = None
        for phase in _beginnings(nodes, kind):
            odd = (phase - self.position) % START_UNIT
            if odd:
                reach = reach or _Reach(fillers)
                distance = odd + START_UNIT * int(reach.cost[odd::START_UNIT].argmin())
                if reach.cost[distance] == inf:
                    continue
                for place, count in reach.recipe(distance).items():
                    self._spend(fillers[place], count)
            self.position = phase
            self.free = False
            return True
        return False

    def _visit(self, nodes: _Nodes) -> None:
        """Place the tensors whose phase is the position, up to one that moves it."""
        place, end = nodes.next[self.position], nodes.end[self.position]
        behind = place
        while behind < end and not nodes.moves[behind]:
            behind += 1
        moved = nodes.moves[behind] if behind < end else 0
        behind = min(behind + 1, end)
        self.order += nodes.tensors[place:behind]
        nodes.next[self.position] = behind
        if behind == end:
            nodes.waiting[self.position] = 0
            nodes.open -= 1
        self.position = (self.position + moved) % BLOCK

    def _spend(self, filler: _Fillers, count: int) -> None:
        self.order += filler.tensors[filler.used : filler.used + count]
        filler.used += count
        self.position = (self.position + count * filler.step) % BLOCK


class _Nodes:
    """Large tensors by phase: what waits where.

    tensors, moves: sorted by phase; moves: sizes modulo 4096; phases, begins, gains: of each
    distinct phase, begins pointing into tensors.
    """

    def __init__(
        self,
        tensors: list[int],
        moves: list[int],
        phases: Column,
        begins: list[int],
        gains: Column,
    ) -> None:
        self.tensors, self.moves, self.phases, self.gains = tensors, moves, phases, gains
        keys = phases.tolist()
        self.open = len(keys)
        self.next = dict(zip(keys, begins, strict=True))
        self.end = dict(zip(keys, [*begins[1:], len(tensors)], strict=True))
        self.waiting = bytearray(BLOCK)
        for key in keys:
            self.waiting[key] = 1


def _fillers(small: Column, steps: Column) -> list[_Fillers]:
    """Small tensors by size modulo 4096, the most numerous sizes first."""
    by_step = np.argsort(steps, kind="stable")
    sizes, counts = np.unique(steps, return_counts=True)
    tensors = small[by_step].tolist()
    ends = np.cumsum(counts).tolist()
    found = [
        _Fillers(step, tensors[end - count : end])
        for step, count, end in zip(sizes.tolist(), counts.tolist(), ends, strict=True)
    ]
    return sorted(found, key=lambda filler: -filler.left)


def _nearest(
    position: int, waiting: bytearray, fillers: list[_Fillers]
) -> tuple[_Fillers, int] | None:
    """The filler, and how many of it, that reaches a phase for the smallest part of its kind."""
    cheapest, found = inf, None
    for filler in fillers:
        total = len(filler.tensors)
        if cheapest * total <= 1:
            # One of them costs as much as what is found, and one of those that follow more.
            break
        at = position
        for times in range(1, filler.left + 1):
            at = (at + filler.step) % BLOCK
            if waiting[at] and times / total < cheapest:
                cheapest, found = times / total, (filler, times)
            if waiting[at] or at == position:
                break
    return found


def _cheapest(position: int, nodes: _Nodes, reach: _Reach) -> dict[int, int] | None:
    """The fillers to a waiting phase that cost least; None where none can be reached."""
    waiting = np.flatnonzero(np.frombuffer(nodes.waiting, dtype=np.uint8))
    distances = (waiting - position) % BLOCK
    place = int(reach.cost[distances].argmin())
    if reach.cost[distances[place]] == inf:
        return None
    return reach.recipe(int(distances[place]))


def _beginnings(nodes: _Nodes, filler: _Fillers | None) -> list[int]:
    """Phases to begin at, the best first: from where steps of one filler reach most bytes.

    Where they reach the same, it is the one that needs the fewest steps, hence the one behind
    the widest gap.
    """
    phases, gains = nodes.phases, nodes.gains
    if filler is None:
        return phases[np.argsort(-gains, kind="stable")].tolist()
    circle, steps, around = filler.log(phases)
    # Each circle is laid down twice, behind the one before, so that a walk may run over its end.
    along = circle * (4 * around) + steps
    twice = np.concatenate((along, along + around))
    by_place = np.argsort(twice, kind="stable")
    places = twice[by_place]
    summed = np.concatenate(([0], np.cumsum(np.concatenate((gains, gains))[by_place])))
    begins = np.searchsorted(places, along)
    ends = np.searchsorted(places, along + min(filler.left, around - 1), side="right")
    needed = places[ends - 1] - along
    ranks = np.lexsort((phases, needed, summed[begins] - summed[ends]))
    return phases[ranks].tolist()
