"""What a verification found, collected while it runs, and the report that it ends in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from shardsurgeon.reports import Report
from shardsurgeon.units import counted

KEPT = 20

# What a report ends in.
IDENTICAL = "identical"
AS_FAR_AS_SAMPLED = "identical as far as sampled"
DIFFERS = "differs"


class Findings:
    """Differences in the order in which they were found, one line each, and notes beside them."""

    def __init__(self, keep: int = KEPT, edited: Collection[str] = ()) -> None:
        """keep: how many lines are kept; those that follow are only counted; edited: files that are
        meant to differ, of which nothing is noted."""
        self._keep, self._edited = keep, edited
        self._lines: list[str] = []
        self._places: set[str] = set()
        self.count = 0
        self.notes: list[str] = []

    def add(self, where: str, problem: str) -> None:
        """Note a difference. where: file, tensor or metadata entry; problem: with its numbers."""
        if any(_is_in(where, name) for name in self._edited):
            return
        self.count += 1
        self._places.add(where)
        if len(self._lines) < self._keep:
            self._lines.append(f"{where}: {problem}")

    def note(self, text: str) -> None:
        """Say what is no difference and should be known: what lies there, what was not compared."""
        self.notes.append(text)

    def tells_of(self, name: str) -> bool:
        """Whether a difference was found in a file: as a whole, or at a place in it."""
        return any(_is_in(where, name) for where in self._places)

    def lines(self) -> tuple[str, ...]:
        """The lines that were kept, and one more that says how many were not."""
        left = self.count - len(self._lines)
        if not left:
            return tuple(self._lines)
        return (*self._lines, f"and {left:,} more difference{'s' if left > 1 else ''}")


def _is_in(where: str, name: str) -> bool:
    """Whether a difference is in a file: as a whole, or at a place in it."""
    return where == name or where.startswith(f"{name} ")


@dataclass(frozen=True, slots=True, repr=False)
class ArchitectureReport(Report):
    """How a pruned checkpoint fits the model that an engine builds from its config.

    engine: name and version; model_class: what it built; parameters: how many parameters and
    buffers that expects; tensors: how many the checkpoint holds; mtp_layers: MTP layers whose
    experts were compared with a main layer's, because the engine does not read them;
    unchecked: tensors that the engine does not read, layer and expert numbers as `*`;
    differences: the first ones, one clear line each.

    >>> plan = shardsurgeon.plan("fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt", keep=8)
    >>> written = shardsurgeon.apply(plan, "half")
    >>> report = shardsurgeon.verify("fixtures/qwen3_moe", "half", architecture=True)
    >>> report.architecture.model_class, report.architecture.differences
    ('Qwen3MoeForCausalLM', ())
    """

    engine: str
    model_class: str
    parameters: int
    tensors: int
    mtp_layers: tuple[int, ...]
    unchecked: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        """`Qwen3MoeForCausalLM of transformers 5.23.0: 0 differences`."""
        found = counted(len(self.differences), "difference")
        return f"{self.model_class} of {self.engine}: {found}"


@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport(Report):
    """What a verification compared. differences: the first ones, one clear line each.

    sampled: tensors per shard whose bytes were compared, None for all of them. architecture: None
    where it was not asked for. complete: whether every byte was compared. notes: what is no
    difference and should be known: files that apply did not write, what could not be compared.
    verdict: `identical`, `identical as far as sampled` or `differs`.

    >>> report = shardsurgeon.verify("fixtures/kimi_k25", "fixtures/kimi_k2")
    >>> report.holds, report.verdict, len(report.differences) > 0
    (False, 'differs', True)
    """

    source: str
    pruned: str
    sampled: int | None
    tensors: int
    tensors_compared: int
    bytes_compared: int
    differences: tuple[str, ...]
    architecture: ArchitectureReport | None = None
    complete: bool = True
    notes: tuple[str, ...] = ()
    verdict: str = field(init=False)

    figures: ClassVar[tuple[str, ...]] = ("holds",)

    def __post_init__(self) -> None:
        found = IDENTICAL if self.complete else AS_FAR_AS_SAMPLED
        object.__setattr__(self, "verdict", found if self.holds else DIFFERS)

    @property
    def title(self) -> str:
        """The pruned model and the verdict."""
        return f"{self.pruned}: {self.verdict}"

    @property
    def all_differences(self) -> tuple[str, ...]:
        """Those from the source, then those from what the engine builds."""
        built = self.architecture.differences if self.architecture is not None else ()
        return self.differences + built

    @property
    def holds(self) -> bool:
        """Whether no difference was found, in what was compared."""
        return not self.all_differences
