"""`materialize`: a view becomes a folder with real shards, byte for byte what `apply` writes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CARD_NAME
from shardsurgeon.checkpoint.open import open_model, require_finished
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import CheckpointError, ShardSurgeonError, UsageError
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.plan import Plan
from shardsurgeon.execution.run import rehearse
from shardsurgeon.execution.space import require_space
from shardsurgeon.execution.view import plan_shards_of
from shardsurgeon.operations.carry_out import Run
from shardsurgeon.operations.places import default_place, require_apart
from shardsurgeon.operations.reports import Refusal
from shardsurgeon.operations.request import RunOptions
from shardsurgeon.operations.serving import not_for_stock_engines, serve_words, serving_of
from shardsurgeon.operations.verify import SelfCheck
from shardsurgeon.operations.written import complete_prune, not_comparable, require_as_written
from shardsurgeon.reports import Report
from shardsurgeon.storage.files import output_path
from shardsurgeon.storage.formats.view import VIEW_NAME
from shardsurgeon.storage.open import address_of
from shardsurgeon.storage.view import ViewSource
from shardsurgeon.verification.findings import VerifyReport

_DEFAULTS = RunOptions()
# What `apply --view` ends the name of a folder in that the user did not name.
_ENDING = "-view"
_RESTORE = "restore it, or make the view again; change files in the folder that is made of it"


@dataclass(frozen=True, slots=True, repr=False)
class MaterializeReport(Report):
    """What materialize did. Sizes in bytes.

    out: the finished folder, or the one that a dry run names; source: the model that the view is
    of, as it can be named again; files, nbytes: of the folder; bytes_copied: moved by this run;
    bytes_shared: what it did not move, because the disk has it once for the source and the result;
    bytes_resumed: found finished from an interrupted one; bytes_downloaded: what came over the
    network; verification: None without a check; left: files of the view's folder that `apply` did
    not write, and that stay there; family: what --family said; serve: the words of the command that
    serves the folder, None where no engine is known to. Of a dry run: space_needed, space_free: the
    disk that is still needed, and free; refusal: what the run would stop at, None where nothing
    stands in its way.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> written = shardsurgeon.apply(plan, "small-view", view=True)
    >>> report = shardsurgeon.materialize("small-view", "small", verify=False)
    >>> report.files, report.bytes_copied + report.bytes_shared, report.verification
    (22, 592821, None)
    """

    view: str
    out: str
    source: str
    files: int
    nbytes: int
    bytes_copied: int
    bytes_resumed: int
    seconds: float
    verification: VerifyReport | None
    bytes_downloaded: int = 0
    left: tuple[str, ...] = ()
    family: str | None = None
    serve: tuple[str, ...] | None = None
    dry_run: bool = False
    space_needed: int | None = None
    space_free: int | None = None
    refusal: Refusal | None = None
    bytes_shared: int = 0

    figures: ClassVar[tuple[str, ...]] = ("bytes_per_second",)

    @property
    def title(self) -> str:
        """`Kimi-K2.5-REAP-65pct-view -> Kimi-K2.5-REAP-65pct`."""
        return f"{self.view} -> {self.out}"

    @property
    def bytes_per_second(self) -> int:
        """How fast this run copied and shared, 0 where it had nothing to do."""
        return int((self.bytes_copied + self.bytes_shared) / max(self.seconds, 0.001))


def materialize(
    view: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: RunOptions = _DEFAULTS,
    *,
    allow_nonuniform: bool = False,
    family: str | None = None,
    follow_links: bool = False,
) -> MaterializeReport:
    """Make the shards of a view, check the folder, and only then give it its name.

    view: the folder that `apply --view` wrote; out: None for its name without `-view`;
    allow_nonuniform, family, follow_links: as for `plan`. A dry run raises nothing but what is
    wrong with the view and the place: its report says what the run would have raised before its
    first byte.

    Raises CheckpointError and its children where the view, or its source, cannot be used,
    UsageError where `out` is needed or where layers that keep different numbers of experts are not
    allowed, OutputError where OUT holds anything else, WorkError and its
    children where the work fails or the check finds a difference. What was finished is kept for a
    rerun.
    """
    place = None if out is None else output_path(out)
    opened = _open(view, family, follow_links)
    if not allow_nonuniform:
        opened.require_one_count()
    place = _default_out(opened.source) if place is None else place
    require_apart(opened.source, place)
    plan = opened.plan(options.checksums)
    report = _planned(opened, plan, place, family)
    if options.dry_run:
        return _rehearsed(report, plan, opened, place, options)
    check = opened.check(plan, place, family) if options.verify else None
    run, serve = Run(plan, opened.source.origin, place, check), opened.serve(place)
    # Their memory is needed for the check at the end.
    del plan, opened
    done = run.carry_out(options)
    return replace(
        report,
        bytes_copied=done.bytes_copied,
        bytes_resumed=done.bytes_resumed,
        seconds=done.seconds,
        verification=None if check is None else check.report,
        bytes_downloaded=done.bytes_downloaded,
        bytes_shared=done.bytes_shared,
        serve=serve,
    )


@dataclass(frozen=True, slots=True)
class _OpenedView:
    """A view that is as `apply` wrote it.

    source, pruned: as a source, and as the model that it is; beside: the files of its folder that
    belong to that; edited: those of them that are meant to be other ones than `apply` wrote; left:
    the files that do not belong to it.
    """

    source: ViewSource
    pruned: Checkpoint
    beside: tuple[str, ...]
    edited: tuple[str, ...]
    left: tuple[str, ...]

    def plan(self, checksums: bool) -> Plan:
        """The bytes to move. checksums: whether to record those of shards."""
        record = PROVENANCE_NAME if checksums else ""
        return replace(plan_shards_of(self.source, self.beside, record), checksums=checksums)

    def check(self, plan: Plan, out: Path, family: str | None) -> SelfCheck:
        """What compares the result with the view's source."""
        before = open_model(self.source.origin, family)
        edited = {*self.edited, *not_comparable(before, self.pruned)}
        return SelfCheck(before, plan, out, edited=edited)

    def require_one_count(self) -> None:
        """Raise UsageError where layers keep different numbers of experts."""
        kept, anatomy = self._kept, read_anatomy(self.pruned)
        if not anatomy.is_uniform(kept):
            remedy = "give it for an engine that reads a count per layer, or leave it a view"
            raise not_for_stock_engines(self.pruned, anatomy, kept.values(), remedy)

    @property
    def _kept(self) -> dict[int, int]:
        """Layer → how many experts it keeps."""
        record = self.pruned.provenance
        assert record is not None
        return {layer: len(found.retained) for layer, found in record.layers.items()}

    def serve(self, out: Path) -> tuple[str, ...] | None:
        """The command that serves the result, None where no engine is known to."""
        serving = serving_of(self.pruned, read_anatomy(self.pruned), self._kept)
        return serve_words(str(out), None, serving) if serving.by_vllm else None


def _open(view: str | os.PathLike[str], family: str | None, follow_links: bool) -> _OpenedView:
    folder = Path(view)
    require_finished(folder)
    if os.path.isdir(folder) and not os.path.lexists(folder / VIEW_NAME):
        problem = f"is no view: it has no {VIEW_NAME}"
        raise CheckpointError(folder, problem, "give the folder that `apply --view` wrote")
    pruned, record = complete_prune(folder, family, follow_links)
    source = pruned.source
    assert isinstance(source, ViewSource)
    edited = require_as_written(pruned, remedy=_RESTORE)
    written = {CARD_NAME, *(record.files or ()), PROVENANCE_NAME}
    there = [file.name for file in pruned.files if file.name not in source.shards]
    return _OpenedView(
        source,
        pruned,
        beside=tuple(name for name in there if name in written),
        edited=edited,
        left=tuple(sorted({*there, *pruned.odd}.difference(written))),
    )


def _default_out(view: ViewSource) -> Path:
    """The place of the result of a view whose user named none."""
    name = view.name.removesuffix(_ENDING)
    if name in ("", view.name):
        problem = f"is needed: the name of the view, {view.name}, does not end in {_ENDING}"
        raise UsageError("-o", problem, "say where to write")
    return default_place(view, name)


def _planned(view: _OpenedView, plan: Plan, out: Path, family: str | None) -> MaterializeReport:
    """What the report says before the work."""
    sizes = output_sizes(plan)
    return MaterializeReport(
        view=view.source.location,
        out=str(out),
        source=address_of(view.source.origin),
        files=len(sizes),
        nbytes=sum(sizes.values()),
        bytes_copied=0,
        bytes_resumed=0,
        seconds=0.0,
        verification=None,
        left=view.left,
        family=family,
    )


def _rehearsed(
    report: MaterializeReport, plan: Plan, view: _OpenedView, out: Path, options: RunOptions
) -> MaterializeReport:
    """What a run would do, or what it would stop at. Nothing is written."""
    report, refusal = replace(report, dry_run=True), None
    try:
        if options.verify:
            view.check(plan, out, report.family)
        space = rehearse(plan, view.source.origin, out, restart=options.restart)
        report = replace(report, space_needed=space.needed, space_free=space.free)
        require_space(space, out)
    except ShardSurgeonError as error:
        refusal = Refusal(error.where, error.problem, error.remedy, error.exit_status)
    return replace(report, refusal=refusal)
