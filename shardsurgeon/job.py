"""What all rooms of `execution` share while one run lasts."""

from __future__ import annotations

from dataclasses import dataclass

from shardsurgeon.journal import Journal
from shardsurgeon.progress import Meter
from shardsurgeon.sources.base import Source
from shardsurgeon.surgeryplan import SurgeryPlan
from shardsurgeon.workplace import Workplace


@dataclass(frozen=True, slots=True)
class Job:
    """A plan to carry out: from where, to which place, who notes and who counts what is done."""

    plan: SurgeryPlan
    source: Source
    place: Workplace
    journal: Journal
    meter: Meter
