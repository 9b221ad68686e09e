"""What all rooms of `execution` share while one run lasts."""

from __future__ import annotations

from dataclasses import dataclass

from shardsurgeon.execution.journal import Journal
from shardsurgeon.execution.progress import Meter
from shardsurgeon.execution.surgeryplan import SurgeryPlan
from shardsurgeon.execution.workplace import Workplace
from shardsurgeon.storage.base import Source


@dataclass(frozen=True, slots=True)
class Job:
    """A plan to carry out: from where, to which place, who notes and who counts what is done."""

    plan: SurgeryPlan
    source: Source
    place: Workplace
    journal: Journal
    meter: Meter
