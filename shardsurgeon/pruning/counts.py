"""How many experts each layer keeps: from a ratio, a count, a size or a shared budget. Pure.

The router limits every count: top-k, groups that keep the same number each, a multiple asked for.
Without --allocate all layers keep alike (`uniform_counts`); with it they share one budget
(`allocate`), and a layer whose saliency sits in few experts gives some of its share to others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.pruning.request import Allocation, Rounding, SelectionRequest, removed_count
from shardsurgeon.pruning.routing import (
    RoutingFacts,
    check_kept,
    check_routing,
    fewest_kept,
    group_problem,
)
from shardsurgeon.units import format_size

# Layer number → experts that it keeps.
Counts = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class KeptCount:
    """How many experts a layer keeps; note: one clause where that is not what was asked, or ""."""

    kept: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Layer → experts that it keeps; note: as in KeptCount."""

    kept: dict[int, int]
    note: str = ""


def uniform_counts(
    request: SelectionRequest,
    facts: Mapping[int, RoutingFacts],
    size_of: Callable[[int], int] | None = None,
) -> LayerCounts:
    """The kept count of a ratio, a count or a target size, layer by layer.

    facts: layer → its router's; size_of: as in `kept_count`. Where layers have different numbers
    of experts, a ratio is taken of each layer's own, and of a count a smaller layer keeps as many
    as it can. Raises what `kept_count` raises.
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


def kept_count(
    request: SelectionRequest,
    facts: RoutingFacts,
    size_of: Callable[[int], int] | None = None,
) -> KeptCount:
    """The kept count of a ratio, a count or a target size.

    facts: of the layer's router; size_of: kept count → bytes of the checkpoint, for a target
    size (which is in bytes) only. A ratio r removes floor(r * experts), or rounds as the request
    says (`removed_count`). The count of a ratio or a size is then raised to the next multiple of
    n_group and multiple_of, an explicit count to that of multiple_of only: the user who gives a
    number means that number.

    Raises UsageError where the count prunes nothing, leaves the router too few experts or, when
    explicit, does not divide into the groups; TypeError for a request with a keep-list file,
    which brings its own counts.
    """
    if request.target_size is not None:
        if size_of is None:
            raise TypeError("a target size needs size_of")
        fitting = largest_kept(size_of, request.target_size, facts)
        count = _raised(fitting, request, facts, "--target-size")
        above = size_of(count.kept) - request.target_size
        note = f"{count.note}, {_size(above)} above the target" if above > 0 else count.note
        return KeptCount(count.kept, note)
    if request.ratio is not None:
        return _raised(_kept_at(request.ratio, request, facts), request, facts, "--ratio")
    if request.keep is None:
        raise TypeError("a keep-list from a file brings its own count")
    if request.keep % facts.n_group:
        raise UsageError("--keep", *group_problem(request.keep, facts))
    return _raised(request.keep, request, facts, "--keep")


def largest_kept(size_of: Callable[[int], int], limit: int, facts: RoutingFacts) -> int:
    """The largest kept count whose checkpoint has at most `limit` bytes.

    size_of: kept count → bytes, growing with the count. Raises UsageError where nothing needs
    pruning or where even the fewest experts that the router needs are too large.
    """
    whole = size_of(facts.num_experts)
    if whole <= limit:
        problem = f"nothing needs pruning: the checkpoint has {_size(whole)}, the target {{}}"
        raise UsageError("--target-size", problem.format(_size(limit)), "give a smaller size")
    counts = range(facts.top_k, facts.num_experts)
    return _largest_fitting(counts, size_of, limit, f", with {facts.top_k} experts kept,")


@dataclass(frozen=True, slots=True)
class SharedBudget:
    """The best way to share any budget.

    floors: what each layer keeps at least; order: the layer that gets each further `step`
    experts, the most urgent first. The counts of every budget are a beginning of one order.
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

        size_of: what each layer keeps → bytes. Raises UsageError where even the smallest budget
        is too large.
        """
        budgets = range(self.smallest, most + 1, self.step)
        return self.counts(
            _largest_fitting(budgets, lambda budget: size_of(self.counts(budget)), limit)
        )


def allocate(
    values: Mapping[int, NDArray[np.float64]],
    preserved: Mapping[int, Collection[int]],
    facts: Mapping[int, RoutingFacts],
    request: SelectionRequest,
) -> SharedBudget:
    """Share experts out so that the layers lose little, together or each, of their saliency.

    values, preserved: as `selection.select` takes them; facts: layer → its router's. A share is
    an expert's part of its own layer's saliency, because saliencies of two layers do not
    compare. A layer keeps at least what its router needs and what is preserved, and always a
    multiple of its groups and of --multiple-of. Within these bounds, for every budget:

    - Allocation.GLOBAL: the sum of the shares kept is the largest possible. Each layer's experts
      come in falling order of share, so that what a layer gains from one more step never grows,
      and taking the best step first is optimal.
    - Allocation.WATERFILL: the largest share that a layer loses is the smallest possible. Each
      step goes to the layer that has lost the largest share so far and can still keep more, as
      water fills basins to one level; no other way keeps less in a layer that got a step.

    Among equal ones the lower layer comes first. A single layer keeps what a uniform count keeps.

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
        # What is lost with the first n experts of every group kept; it never grows, even rounded.
        lost = np.cumsum(gains[::-1])[::-1]
        for number, begin in enumerate(range(floor, most, step)):
            width = slice(begin // fact.n_group, (begin + step) // fact.n_group)
            level = request.allocate is Allocation.WATERFILL
            urgency = float(lost[width.start] if level else gains[width].sum())
            # Negated: the smallest tuple is the most urgent, then the lowest layer.
            offers.append((-urgency, layer, number))
    return SharedBudget(floors, tuple(layer for _, layer, _ in sorted(offers)), step)


def shares(values: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
    """Each expert's share of its layer's saliency, float64 [num_experts].

    NaN, a never-routed expert, and +inf, which marks a preserved one, count as 0, and all shares
    are 0 where no value is above 0. Raises ScoreError for negative values.
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


def _kept_at(ratio: float, request: SelectionRequest, facts: RoutingFacts) -> int:
    """What a ratio keeps, before any raising."""
    experts, rounding = facts.num_experts, request.effective_rounding or Rounding.FLOOR
    removed = removed_count(ratio, experts, rounding)
    if removed == 0:
        problem = f"{ratio} of {experts} experts is {ratio * experts:.3g}, which removes 0"
        remedy = f"the smallest step is 1 expert, {1 / experts:.4f}"
        raise UsageError("--ratio", f"{problem} ({rounding})", remedy)
    return experts - removed


def _raised(asked: int, request: SelectionRequest, facts: RoutingFacts, where: str) -> KeptCount:
    """`asked`, raised to the multiple it must be, and checked."""
    multiple_of = request.multiple_of or 1
    step = math.lcm(facts.n_group, multiple_of)
    kept = -(-asked // step) * step
    if kept == asked:
        check_kept(kept, facts, where)
        return KeptCount(kept)
    reasons = [f"n_group {facts.n_group}"] if facts.n_group > 1 else []
    reasons += [f"{multiple_of} (--multiple-of)"] if multiple_of > 1 else []
    note = f"kept count raised from {asked} to {kept}: a multiple of {' and of '.join(reasons)}"
    if kept >= facts.num_experts:
        problem = f"{note}; that leaves nothing to prune of {facts.num_experts} experts"
        raise UsageError(where, problem, "ask for fewer experts or a smaller multiple")
    check_kept(kept, facts, where)
    return KeptCount(kept, note)


def _largest_fitting(
    counts: Sequence[int], size_of: Callable[[int], int], limit: int, smallest: str = ""
) -> int:
    """The largest of the ascending `counts` with at most `limit` bytes; smallest: says for the
    message what the first of them is."""
    fitting = bisect_right(counts, limit, key=size_of)
    if fitting == 0:
        least = (
            f"the smallest checkpoint possible{smallest} takes up to {_size(size_of(counts[0]))}"
        )
        problem = f"{least}, the target is {_size(limit)}"
        raise UsageError("--target-size", problem, "give a larger size")
    return counts[fitting - 1]


def _size(nbytes: int) -> str:
    return f"{format_size(nbytes)} ({nbytes:,} bytes)"


def _most(fact: RoutingFacts, request: SelectionRequest) -> int:
    """The most that a layer can keep: its experts, rounded down to the multiple asked for."""
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
