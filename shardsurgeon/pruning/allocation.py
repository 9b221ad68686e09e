"""How many experts each layer keeps: as many as the others, or a share of one budget. Pure.

Stands between `counts`, which turns the command's words into one number, and `selection`, which
takes that many of every layer.

The global allocation asks of every expert which share of its layer's saliency it carries,

    share(layer, expert) = saliency(layer, expert) / sum of the layer's saliencies,

a never-routed expert carrying nothing, and gives the budget to the layers so that the shares
kept, summed over all layers, are as large as they can be. Saliencies of different layers are on
scales of their own; shares compare.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.pruning.counts import (
    RoutingFacts,
    SelectionRequest,
    check_routing,
    fewest_kept,
    kept_count,
)
from shardsurgeon.units import format_size

Counts = Mapping[int, int]
"""Layer number → experts that it keeps."""


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """How many experts each layer keeps; note: as in KeptCount."""

    kept: dict[int, int]
    note: str = ""


def uniform_counts(
    request: SelectionRequest,
    facts: Mapping[int, RoutingFacts],
    size_of: Callable[[int], int] | None = None,
) -> LayerCounts:
    """The kept count of a ratio, a count or a target size, layer by layer.

    facts: layer → its router's. Where layers have different numbers of experts, a ratio is taken
    of each layer's own, and of a count a smaller layer keeps as many as it can. Raises what
    `kept_count` raises.
    """
    if request.ratio is not None:
        of = {fact: kept_count(request, fact) for fact in dict.fromkeys(facts.values())}
        notes = dict.fromkeys(count.note for count in of.values() if count.note)
        return LayerCounts({n: of[fact].kept for n, fact in facts.items()}, "; ".join(notes))
    count = kept_count(request, max(facts.values(), key=lambda fact: fact.num_experts), size_of)
    kept = {n: min(count.kept, _most(fact, request)) for n, fact in facts.items()}
    for layer, fact in facts.items():
        check_routing(kept[layer], fact, f"layer {layer}")
    return LayerCounts(kept, count.note)


@dataclass(frozen=True, slots=True)
class GlobalAllocation:
    """Every way to share a budget, best first.

    floors: what each layer keeps at least; order: the layer that gets each further `step` of
    experts.
    """

    floors: dict[int, int]
    order: tuple[int, ...]
    step: int

    @property
    def smallest(self) -> int:
        """The smallest budget: every layer at its floor."""
        return sum(self.floors.values())

    def counts(self, budget: int) -> dict[int, int]:
        """What each layer keeps of `budget` experts in all, a multiple of `step`.

        Counts never fall when the budget grows. Raises UsageError for a budget below the floors.
        """
        if budget < self.smallest:
            problem = f"{budget} experts in all are fewer than the {self.smallest} that "
            problem += f"{len(self.floors)} layers need at least"
            raise UsageError("--allocate", problem, "keep more experts or preserve fewer")
        kept = dict(self.floors)
        for layer in self.order[: (budget - self.smallest) // self.step]:
            kept[layer] += self.step
        return kept

    def largest_fitting(
        self, size_of: Callable[[Counts], int], limit: int, most: int
    ) -> dict[int, int]:
        """The counts of the largest budget up to `most` whose checkpoint has at most `limit` bytes.

        size_of: what each layer keeps → bytes. Raises UsageError where none has.
        """
        budgets = range(self.smallest, most + 1, self.step)
        fitting = bisect_right(budgets, limit, key=lambda budget: size_of(self.counts(budget)))
        if fitting == 0:
            least = format_size(size_of(self.counts(self.smallest)))
            problem = f"the smallest checkpoint possible has {least}, the target is"
            raise UsageError(
                "--target-size", f"{problem} {format_size(limit)}", "give a larger size"
            )
        return self.counts(budgets[fitting - 1])


def allocate(
    values: Mapping[int, NDArray[np.float64]],
    preserved: Mapping[int, Collection[int]],
    facts: Mapping[int, RoutingFacts],
    request: SelectionRequest,
) -> GlobalAllocation:
    """Share experts out by the layers' shares of saliency, as said at the top of this file.

    values, preserved: as `selection.select` takes them; facts: layer → its router's. A layer
    keeps at least what its router needs and what is preserved, and always a multiple of its
    groups and of --multiple-of. Within these bounds the sum of the shares kept is the largest
    possible for every budget: each layer's experts come in falling order of share, so that what
    a layer gains from one more step never grows, and taking the best step first is optimal.
    Among equal gains the lower layer comes first.

    Raises ScoreError for negative saliencies, which have no shares, and UsageError where a
    layer's preserved experts do not fit.
    """
    step = math.lcm(request.multiple_of or 1, *(fact.n_group for fact in facts.values()))
    floors, offers = {}, []
    for layer, fact in sorted(facts.items()):
        chosen = frozenset(preserved.get(layer, ()))
        marked = np.isposinf(values[layer]) | np.isin(np.arange(fact.num_experts), list(chosen))
        most = _most(fact, request)
        floor = _floor(fact, marked, step)
        if floor > most:
            problem = f"needs {floor} experts with those preserved, and may keep {most}"
            raise UsageError(f"layer {layer}", problem, "preserve fewer")
        floors[layer] = floor
        gains = _gains(shares(values[layer], layer), marked, fact.n_group)
        for number, begin in enumerate(range(floor, most, step)):
            width = slice(begin // fact.n_group, (begin + step) // fact.n_group)
            offers.append((-float(gains[width].sum()), layer, number))
    return GlobalAllocation(floors, tuple(layer for _, layer, _ in sorted(offers)), step)


def shares(values: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
    """Each expert's share of its layer's saliency, float64 [num_experts].

    NaN, a never-routed expert, and +inf, which is a mark and no saliency, have none; nor has
    anybody where all are 0. Raises ScoreError for negative values.
    """
    known = np.where(np.isfinite(values), values, 0.0)
    if known.min() < 0:
        problem = f"the saliency of expert {int(known.argmin())} is {known.min():.4g}"
        raise ScoreError(
            f"layer {layer}", f"{problem}; shares need 0 or more", "choose another --metric"
        )
    top = known.max()
    if top == 0:
        return known
    # Divided by the largest first, so that no sum can overflow.
    known = known / top
    return np.asarray(known / math.fsum(known.tolist()))


def _most(fact: RoutingFacts, request: SelectionRequest) -> int:
    """The largest multiple of what the count must be a multiple of."""
    step = math.lcm(fact.n_group, request.multiple_of or 1)
    return fact.num_experts // step * step


def _floor(fact: RoutingFacts, marked: NDArray[np.bool_], step: int) -> int:
    """What a layer keeps at least: its router's needs and the fullest group's preserved experts."""
    stay = int(marked.reshape(fact.n_group, -1).sum(axis=1).max()) * fact.n_group
    return -(-max(fewest_kept(fact), stay) // step) * step


def _gains(
    share: NDArray[np.float64], marked: NDArray[np.bool_], n_group: int
) -> NDArray[np.float64]:
    """What the next expert of every group adds, best first: float64 [experts per group].

    Preserved experts come first whatever their share: the floor holds them all.
    """
    order = np.where(marked, np.inf, share).reshape(n_group, -1)
    ranked = np.sort(order, axis=1)[:, ::-1]
    return np.asarray(np.where(np.isinf(ranked), 0.0, ranked).sum(axis=0))
