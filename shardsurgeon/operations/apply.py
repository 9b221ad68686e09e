"""`apply`: carry out a plan, check the result, and push it where that was asked for."""

from __future__ import annotations

from dataclasses import replace

from shardsurgeon.errors import ShardSurgeonError, UsageError
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.run import rehearse
from shardsurgeon.execution.space import require_space
from shardsurgeon.operations.carry_out import DestinationMaker, Run, unchecked
from shardsurgeon.operations.prune import Pruning, require_ready
from shardsurgeon.operations.reports import ApplyReport, Refusal
from shardsurgeon.operations.request import Destination, RunOptions
from shardsurgeon.operations.serving import serve_words
from shardsurgeon.operations.verify import SelfCheck
from shardsurgeon.storage.open import address_of

_DEFAULTS = RunOptions()


def apply(
    pruning: Pruning,
    options: RunOptions = _DEFAULTS,
    destination: Destination | None = None,
) -> ApplyReport:
    """Move the bytes of a plan, check the result, and only then give it its name.

    destination: a repository to push the result to, None for no push. With `stream` nothing
    stays here and there is no OUT. A dry run raises nothing: its report says what the run would
    have raised before its first byte.

    Raises UsageError where layers keep different numbers and the request does not allow it, or
    where the Hub refuses; OutputError where OUT holds anything else; WorkError and its children
    where the work fails or the check finds a difference. What was finished is kept for a rerun.
    """
    if options.dry_run:
        return _rehearsed(pruning, options, destination)
    _require_view_alone(pruning, options, destination)
    require_ready(pruning, stays=destination is None or not destination.stream)
    if destination is None:
        run = _Apply(pruning, by_shard=False, verify=options.verify)
        del pruning
        return run.carry_out(options)
    from shardsurgeon.operations.push import Shipment
    from shardsurgeon.storage.hub.upload import silence_hub

    with silence_hub() as notes:
        shipment = Shipment(pruning, destination)
        run = _Apply(pruning, by_shard=destination.stream, verify=options.verify)
        del pruning
        if destination.stream:
            report = run.carry_out(options, shipment.shard_destination, shipment.disk_budget)
        else:
            report = run.carry_out(options)
            shipment.push()
    pushed = shipment.report(notes)
    return replace(report, push=pushed, serve=pushed.serve)


def _rehearsed(
    pruning: Pruning, options: RunOptions, destination: Destination | None
) -> ApplyReport:
    """What a run would do, or what it would stop at; found by the checks that the run begins with.

    Nothing is written here, and nothing made or sent elsewhere.
    """
    report, target, refusal, stream = pruning.report, None, None, None
    budget: int | None = None
    try:
        _require_view_alone(pruning, options, destination)
        plan = replace(pruning.written, checksums=options.checksums)
        require_ready(pruning, stays=destination is None or not destination.stream)
        if destination is not None:
            from shardsurgeon.operations.push import Shipment
            from shardsurgeon.storage.hub.upload import silence_hub

            with silence_hub():
                shipment = Shipment(pruning, destination, dry_run=True)
            target = shipment.target
            if destination.stream:
                report = replace(report, out=target.repo_id)
                stream, budget = shipment.shard_destination(unchecked), shipment.disk_budget
        space = rehearse(
            plan,
            pruning.checkpoint.source,
            pruning.out,
            restart=options.restart,
            destination=stream,
            disk_budget=budget,
        )
        report = replace(report, space_needed=space.needed, space_free=space.free)
        require_space(space, pruning.out)
    except ShardSurgeonError as error:
        refusal = Refusal(error.where, error.problem, error.remedy, error.exit_status)
    return ApplyReport(report, True, None, 0, 0, 0, 0.0, None, target=target, refusal=refusal)


def _require_view_alone(
    pruning: Pruning, options: RunOptions, destination: Destination | None
) -> None:
    """Raise UsageError for what is about shards, of a run that writes none."""
    if not pruning.view:
        return
    if destination is not None:
        remedy = "make the view, then `shardsurgeon push VIEW REPO_ID`"
        raise UsageError("--view", "writes no shards that could be pushed", remedy)
    if options.checksums:
        problem = "is about shards, and a view has none"
        raise UsageError("--checksums", problem, "give it to `materialize`")


class _Apply:
    """A prune on its way to the executor, and what the report says of it.

    It holds no plan, nor should its caller: the check of the result needs that memory.
    """

    def __init__(self, pruning: Pruning, *, by_shard: bool, verify: bool) -> None:
        """by_shard: whether shards leave the disk, and each is checked alone."""
        plan, source = pruning.written, pruning.checkpoint.source
        check = SelfCheck(
            pruning.checkpoint, pruning.plan, pruning.out, by_shard=by_shard, view=pruning.view
        )
        self._files = len(output_sizes(plan))
        self._view = pruning.view
        self._report, self._out = pruning.report, pruning.out
        self._source = source
        self._family = pruning.declared
        self._serving = pruning.serving
        self._check = check
        self._run = Run(plan, source, pruning.out, check if verify else None)

    def carry_out(
        self,
        options: RunOptions,
        shard_destination: DestinationMaker | None = None,
        disk_budget: int | None = None,
    ) -> ApplyReport:
        """As `Run.carry_out`."""
        done = self._run.carry_out(options, shard_destination, disk_budget)
        stays = shard_destination is None
        return ApplyReport(
            plan=self._report,
            dry_run=False,
            out=str(self._out) if stays else None,
            files=self._files,
            bytes_copied=done.bytes_copied,
            bytes_resumed=done.bytes_resumed,
            seconds=done.seconds,
            verification=self._check.report,
            bytes_downloaded=done.bytes_downloaded,
            bytes_shared=done.bytes_shared,
            source=address_of(self._source),
            family=self._family,
            serve=self._serve() if stays else None,
            view=self._view,
        )

    def _serve(self) -> tuple[str, ...] | None:
        """The command that serves the finished folder."""
        words = serve_words(str(self._out), None, self._serving, view=self._view)
        return words if self._serving.by_vllm else None
