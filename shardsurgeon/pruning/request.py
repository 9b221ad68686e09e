"""What was asked for: how many experts to keep, and how to choose them.

Imported by the command line for its option lists, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from os import PathLike

from shardsurgeon.checkpoint.sampling import generation_members
from shardsurgeon.errors import UsageError
from shardsurgeon.units import require_ratios

# What an error is about that says how many selections there are.
SELECTION = "selection"


class Rounding(StrEnum):
    """How ratio × experts becomes the number of experts removed."""

    FLOOR = "floor"
    NEAREST = "nearest"
    CEIL = "ceil"


class MtpPolicy(StrEnum):
    """What happens to next-token-prediction layers that have experts and no scores."""

    ROUTER_NORM = "router-norm"
    LAST = "last"
    KEEP = "keep"
    DROP = "drop"

    @property
    def overrules(self) -> bool:
        """Whether it holds as well for MTP layers that have scores or a keep-list."""
        return self in (MtpPolicy.KEEP, MtpPolicy.DROP)


class Lists(StrEnum):
    """What lists of expert ids mean, in a file that does not say it.

    The experts that stay or go, in a keep-list; in SCORES, all of them in the order of worth.
    """

    KEPT = "kept"
    DROPPED = "dropped"
    BEST_FIRST = "best-first"
    WORST_FIRST = "worst-first"


class Allocation(StrEnum):
    """How the kept experts are shared out among the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"
    WATERFILL = "waterfill"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """What the user asked for. Exactly one of ratio, keep, target_size, plan_file.

    ratio: fraction of each layer's experts to remove, 0 < ratio < 1; keep: experts per layer;
    target_size: bytes of the result's weight files; plan_file: a keep-list. rounding,
    multiple_of and metric are None where the user did not say; `effective_rounding` is what then
    holds. mtp: for MTP layers without scores. allocate: whether every layer keeps the same
    number or the layers share one budget, `global` for the least lost in all of them together,
    `waterfill` for the least lost in the worst; allow_nonuniform: whether a model whose layers keep
    different numbers may be written; lists: what the file's lists mean, None where it says it
    itself. include, exclude: globs of files beside the weights that are copied, or left behind,
    whatever they are; sampling: settings to write into generation_config.json, by name. Raises
    UsageError for values and combinations that cannot be meant.
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
    lists: Lists | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_one_selection()
        self._check_values()
        self._check_modifiers()
        generation_members(self.sampling)

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
            raise UsageError(SELECTION, "nothing says how many experts to keep", remedy)
        if len(given) > 1:
            problem = f"{len(given)} selections at once ({', '.join(given)})"
            raise UsageError(SELECTION, problem, "give one of them")

    def _check_values(self) -> None:
        if self.ratio is not None:
            require_ratios((self.ratio,))
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
        self._check_lists()
        if self.plan_file is None:
            return
        for option, unwanted in (
            ("--metric", self.metric is not None),
            ("--preserve-super-experts", self.preserve_super_experts),
            ("--multiple-of", self.multiple_of is not None),
            ("--allocate", self.allocate is not Allocation.UNIFORM),
        ):
            if unwanted:
                problem = "a keep-list given with --plan already says which experts stay"
                raise UsageError(option, problem, f"leave out {option}")

    def _check_lists(self) -> None:
        of_keep_list = self.lists in _OF_KEEP_LISTS
        if self.lists is not None and of_keep_list != (self.plan_file is not None):
            given = "a keep-list given with --plan" if self.plan_file is not None else "SCORES"
            meant = [word for word in Lists if (word in _OF_KEEP_LISTS) != of_keep_list]
            problem = f"{self.lists} is not what lists in {given} can be"
            raise UsageError("--lists", problem, f"say {' or '.join(meant)}")


_OF_KEEP_LISTS = (Lists.KEPT, Lists.DROPPED)


def removed_count(ratio: float, experts: int, rounding: Rounding = Rounding.FLOOR) -> int:
    """How many of `experts` a ratio removes: ratio * experts, rounded.

    floor rounds the product in floats, as the REAP reference does (0.29 of 100 is 28.999…, which
    removes 28). nearest and ceil have no reference to follow and take the ratio as it is written
    in decimal (0.07 of 100 is 7, also for ceil); nearest rounds a half to the even number.
    """
    if rounding is Rounding.FLOOR:
        return int(ratio * experts)
    mode = ROUND_CEILING if rounding is Rounding.CEIL else ROUND_HALF_EVEN
    return int((Decimal(repr(float(ratio))) * experts).to_integral_value(mode))
