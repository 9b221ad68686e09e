"""How many experts each layer keeps: from a ratio, a size or a shared budget. Pure.

A router limits the count: top-k, groups that lose the same number each, a multiple asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ConfigError, InputError, ScoreError, UsageError
from shardsurgeon.pruning.request import SelectionRequest, removed_count
from shardsurgeon.units import format_size

Counts = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """What the router of a model needs to stay able to choose.

    num_experts: routed experts per MoE layer; top_k: experts chosen per token.
    n_group, topk_group: groups the experts are split into, and how many of them a token may
    use; group g owns the ids [g * num_experts / n_group, (g + 1) * num_experts / n_group).
    group_score_top: how many of its best experts a group is scored by.
    Raises ConfigError where the numbers contradict each other.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_score_top: int = 1

    def __post_init__(self) -> None:
        counts = (self.num_experts, self.top_k, self.n_group, self.topk_group)
        if min(counts) < 1:
            problem = "experts, top-k, n_group and topk_group are {}, {}, {}, {}; all must be >= 1"
            raise ConfigError("config.json", problem.format(*counts))
        if self.top_k > self.num_experts:
            problem = f"top-k is {self.top_k}, more than the {self.num_experts} experts"
            raise ConfigError("config.json", problem)
        if self.num_experts % self.n_group:
            problem = f"{self.num_experts} experts do not divide into {self.n_group} equal groups"
            raise ConfigError("config.json", problem)
        if self.topk_group > self.n_group:
            problem = f"topk_group is {self.topk_group}, more than the {self.n_group} groups"
            raise ConfigError("config.json", problem)

    def of_layer(self, num_experts: int) -> RoutingFacts:
        """The same for a layer of another number of experts, of which a token gets no more."""
        return replace(self, num_experts=num_experts, top_k=min(self.top_k, num_experts))


@dataclass(frozen=True, slots=True)
class KeptCount:
    """How many experts stay in every MoE layer.

    note: one clause where that is not what was asked for, else "".
    """

    kept: int
    note: str = ""


def kept_count(
    request: SelectionRequest,
    facts: RoutingFacts,
    size_of: Callable[[int], int] | None = None,
) -> KeptCount:
    """The kept count of a ratio, a count or a target size (for which `size_of` is needed:
    kept count → bytes of the checkpoint).

    The count of a ratio or a size is raised to the next multiple of n_group and multiple_of, an
    explicit count to that of multiple_of only. Raises UsageError where the count prunes nothing,
    leaves the router too few experts or, when explicit, does not divide into the groups.
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
        return _raised(_kept_at(request, facts.num_experts), request, facts, "--ratio")
    if request.keep is None:
        raise TypeError("a keep-list from a file brings its own count")
    if request.keep % facts.n_group:
        raise UsageError("--keep", *_group_problem(request.keep, facts))
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
    fitting = bisect_right(counts, limit, key=size_of)
    if fitting == 0:
        smallest = f"the smallest checkpoint possible, with {facts.top_k} experts kept, has"
        problem = f"{smallest} {_size(size_of(facts.top_k))}, the target is {_size(limit)}"
        raise UsageError("--target-size", problem, "give a larger size")
    return counts[fitting - 1]


def check_kept(
    kept: int, facts: RoutingFacts, where: str, error: type[InputError] = UsageError
) -> None:
    """Raise `error`, naming `where`, unless `kept` experts per layer prune something and leave
    the router enough to choose from."""
    if kept >= facts.num_experts:
        problem = f"keeping {kept} of {facts.num_experts} experts prunes nothing"
        raise error(where, problem, f"keep fewer than {facts.num_experts}")
    check_routing(kept, facts, where, error)


def check_routing(
    kept: int, facts: RoutingFacts, where: str, error: type[InputError] = UsageError
) -> None:
    """Raise `error`, naming `where`, unless a router can choose from `kept` experts."""
    problems = _group_problem(kept, facts) if kept % facts.n_group else None
    problems = problems or _routing_problem(kept, facts)
    if problems:
        raise error(where, *problems)


def fewest_kept(facts: RoutingFacts) -> int:
    """The smallest kept count that `check_routing` lets pass."""
    return max(-(-facts.top_k // facts.topk_group), facts.group_score_top) * facts.n_group


def _kept_at(request: SelectionRequest, experts: int) -> int:
    """What a ratio keeps, before any raising."""
    if request.ratio is None or request.effective_rounding is None:
        raise TypeError("there is no ratio")
    removed = removed_count(request.ratio, experts, request.effective_rounding)
    if removed == 0:
        product = f"{request.ratio} of {experts} experts is {request.ratio * experts:.3g}"
        problem = f"{product}, which removes 0 ({request.effective_rounding})"
        raise UsageError("--ratio", problem, f"the smallest step is 1 expert, {1 / experts:.4f}")
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


def _group_problem(kept: int, facts: RoutingFacts) -> tuple[str, str]:
    below = kept // facts.n_group * facts.n_group
    near = [count for count in (below, below + facts.n_group) if 0 < count < facts.num_experts]
    problem = f"{kept} kept experts do not divide into the {facts.n_group} groups of the router"
    return problem, f"keep {' or '.join(map(str, near))}" if near else ""


def _routing_problem(kept: int, facts: RoutingFacts) -> tuple[str, str] | None:
    """(problem, remedy) where the router could not choose from `kept` experts."""
    if kept < facts.top_k:
        problem = f"{kept} kept experts are fewer than the {facts.top_k} each token is sent to"
        return problem, f"keep at least {facts.top_k}"
    per_group = kept // facts.n_group
    reachable = facts.topk_group * per_group
    if reachable < facts.top_k:
        groups = f"{facts.topk_group} of {facts.n_group} groups with {per_group} experts each"
        need = -(-facts.top_k // facts.topk_group) * facts.n_group
        problem = f"a token may use {groups}, {reachable} in all, and needs {facts.top_k}"
        return problem, f"keep at least {need}"
    if per_group < facts.group_score_top:
        problem = f"{per_group} experts per group, and the router scores a group by its best"
        need = facts.group_score_top * facts.n_group
        return f"{problem} {facts.group_score_top}", f"keep at least {need}"
    return None


def _size(nbytes: int) -> str:
    return f"{format_size(nbytes)} ({nbytes:,} bytes)"


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
