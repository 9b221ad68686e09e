"""`families`: the model families whose declarations are shipped."""

from __future__ import annotations

from dataclasses import dataclass

from shardsurgeon.families.schema import all_families
from shardsurgeon.reports import Report
from shardsurgeon.units import counted


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """One family. model_types, architectures: what a config.json calls its models; refusal: why
    they cannot be pruned, None where they can.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    refusal: str | None


@dataclass(frozen=True, slots=True, repr=False)
class FamiliesReport(Report):
    """Every family, by name; supported: how many model types can be pruned."""

    families: tuple[FamilyReport, ...]
    supported: int

    @property
    def title(self) -> str:
        """`81 families of 107 model types can be pruned`."""
        able = sum(each.refusal is None for each in self.families)
        return f"{able} families of {counted(self.supported, 'model type')} can be pruned"


def list_families() -> FamiliesReport:
    """The families that are declared here. Reads no model."""
    families = tuple(
        FamilyReport(each.name, each.model_types, each.architectures, each.refusal or None)
        for each in all_families()
    )
    types = {name for each in families if each.refusal is None for name in each.model_types}
    return FamiliesReport(families, len(types))
