"""How many experts stay: the words of the command and the model's routing → one kept count.

The first half of selection, pure integers and without numpy, so that a command line can build
its request from it at no cost. Which experts stay is decided in `selection`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from os import PathLike

from shardsurgeon.errors import ConfigError, InputError, UsageError
from shardsurgeon.units import format_size


class Rounding(StrEnum):
    """How ratio × experts becomes the number of experts removed."""

    FLOOR = "floor"
    NEAREST = "nearest"
    CEIL = "ceil"


class MtpPolicy(StrEnum):
    """What happens to next-token-prediction layers that have experts and no scores."""

    ROUTER_NORM = "router-norm"
    LAST = "last"
    DROP = "drop"


class Allocation(StrEnum):
    """How the kept experts are shared out among the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """What the user asked for. Exactly one of ratio, keep, target_size (bytes), plan_file.

    rounding, multiple_of and metric are None where the user did not say; `effective_rounding`
    is what then holds. allocate: whether every layer keeps the same number or the layers share
    one budget; allow_nonuniform: whether a model whose layers keep different numbers may be
    written. Raises UsageError for values and combinations that cannot be meant.
    """

    ratio: float | None = None
    keep: int | None = None
    target_size: int | None = None
    plan_file: str | PathLike[str] | None = None
    rounding: Rounding | None = None
    multiple_of: int | None = None
    metric: str | None = None
    preserve_super_experts: bool = False
    mtp: MtpPolicy = MtpPolicy.ROUTER_NORM
    allocate: Allocation = Allocation.UNIFORM
    allow_nonuniform: bool = False

    def __post_init__(self) -> None:
        self._check_one_selection()
        self._check_values()
        self._check_modifiers()

    @property
    def selection(self) -> str:
        """Which of the four it is: `ratio`, `keep`, `target-size` or `plan`."""
        return self._given()[0].removeprefix("--")

    @property
    def effective_rounding(self) -> Rounding | None:
        """The rounding a ratio is turned into a count with; None without a ratio."""
        if self.ratio is None:
            return None
        return Rounding.FLOOR if self.rounding is None else self.rounding

    def _given(self) -> list[str]:
        choices = {
            "--ratio": self.ratio,
            "--keep": self.keep,
            "--target-size": self.target_size,
            "--plan": self.plan_file,
        }
        return [option for option, value in choices.items() if value is not None]

    def _check_one_selection(self) -> None:
        given = self._given()
        if not given:
            remedy = "give one of --ratio, --keep, --target-size, --plan"
            raise UsageError("selection", "nothing says how many experts to keep", remedy)
        if len(given) > 1:
            problem = f"{len(given)} selections at once ({', '.join(given)})"
            raise UsageError("selection", problem, "give one of them")

    def _check_values(self) -> None:
        # Written so that NaN, which compares false with everything, is refused too.
        if self.ratio is not None and not 0 < self.ratio < 1:
            problem = f"{self.ratio} is not between 0 and 1"
            remedy = "give the fraction of the experts to remove, such as 0.5"
            raise UsageError("--ratio", problem, remedy)
        for option, value in (
            ("--keep", self.keep),
            ("--target-size", self.target_size),
            ("--multiple-of", self.multiple_of),
        ):
            if value is not None and value < 1:
                raise UsageError(option, f"{value} is less than 1")

    def _check_modifiers(self) -> None:
        if self.rounding is not None and self.ratio is None:
            raise UsageError("--rounding", "rounds a ratio, and there is none", "leave it out")
        if self.plan_file is None:
            return
        for option, unwanted in (
            ("--metric", self.metric is not None),
            ("--preserve-super-experts", self.preserve_super_experts),
            ("--multiple-of", self.multiple_of is not None),
            ("--allocate", self.allocate is Allocation.GLOBAL),
        ):
            if unwanted:
                problem = "a keep-list given with --plan already says which experts stay"
                raise UsageError(option, problem, f"leave out {option}")


@dataclass(frozen=True, slots=True)
class KeptCount:
    """How many experts stay in every MoE layer.

    note: one clause where that is not what was asked for, else "".
    """

    kept: int
    note: str = ""


def removed_count(ratio: float, experts: int, rounding: Rounding = Rounding.FLOOR) -> int:
    """How many of `experts` a ratio removes.

    floor is taken of the product in floats, as the REAP reference does (0.29 of 100 is
    28.999…, which removes 28). nearest and ceil have no reference to follow and take the ratio
    as it is written in decimal (0.07 of 100 is 7, also for ceil); nearest sends a half to the
    even number.
    """
    if rounding is Rounding.FLOOR:
        return int(ratio * experts)
    mode = ROUND_CEILING if rounding is Rounding.CEIL else ROUND_HALF_EVEN
    return int((Decimal(repr(float(ratio))) * experts).to_integral_value(mode))


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
