"""`calibrate` from its request to its report: samples, checks, layers, score file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.open import files_read, open_model
from shardsurgeon.errors import SourceChangedError
from shardsurgeon.execution.journal import Run
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.calibration_file import (
    Calibration,
    merge,
)
from shardsurgeon.layerwise.channels import Channel, met, this_rank
from shardsurgeon.layerwise.datasets import parse_spec
from shardsurgeon.layerwise.dtype_choice import DtypeChoice, chosen_dtype
from shardsurgeon.layerwise.estimate import CalibrationEstimate, Wishes, estimates
from shardsurgeon.layerwise.identity import (
    calibration_settings,
    computed_in,
    done_already,
    run_identity,
)
from shardsurgeon.layerwise.memory import model_size
from shardsurgeon.layerwise.preparation import (
    check_share,
    check_vocabulary,
    drawn_samples,
    dtypes_of,
    earlier_calibration,
    longest_samples,
    with_defaults,
    with_dtype,
)
from shardsurgeon.layerwise.processes import calibrate_apart, devices, lead
from shardsurgeon.layerwise.request import CalibrationReport, CalibrationRequest
from shardsurgeon.layerwise.resume import FinishedLayers, Partial, partial_calibration
from shardsurgeon.layerwise.samples import (
    Drawn,
    counted_tokens,
    total_tokens,
)
from shardsurgeon.layerwise.settings import (
    Listener,
    Progress,
    missing_packages,
    refuse_missing_gpu,
    require_packages,
)
from shardsurgeon.layerwise.worker import Job, follow
from shardsurgeon.scores.files import check_samples, score_output, write_scores
from shardsurgeon.storage.files import Output
from shardsurgeon.storage.open import address_of
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import require_unchanged
from shardsurgeon.units import counted

# Samples of which less than this share is tokens are worth a note.
_FULL = 0.5
# Of the records that were left out, so many are named in a note; the score file lists more.
_MOST_NAMED = 5


def calibrate(
    model: str | os.PathLike[str] | None,
    request: CalibrationRequest,
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    restart: bool = False,
    force: bool = False,
    progress: Listener | None = None,
    command: str = "",
) -> CalibrationReport:
    """Run samples through a model, layer by layer, and write scores of its experts.

    model: a folder or an address, None for the current folder; out: the score file, whose ending
    decides its format; family: as for `plan`; restart: discard what an earlier run left; force:
    replace another score file; command: as the user gave it, for the journal. Where `out` is what
    this very request gave, nothing is run. Raises subclasses of InputError, before the work starts,
    for a request, a model or a dataset that cannot be used, and subclasses of WorkError where the
    work fails.
    """
    rank = this_rank()
    if rank is None:
        return _calibrate(model, request, out, (), family, restart, force, progress, command)
    require_packages()
    with met(rank) as others:
        if rank.number > 0:
            return cast(CalibrationReport, follow(others[0]))
        given = (model, request, out, others, family, restart, force, progress, command)
        return lead(others, lambda: _calibrate(*given))


def _calibrate(
    model: str | os.PathLike[str] | None,
    request: CalibrationRequest,
    out: str | os.PathLike[str],
    ranks: Sequence[Channel],
    family: str | None,
    restart: bool,
    force: bool,
    progress: Listener | None,
    command: str,
) -> CalibrationReport:
    """As `calibrate`; ranks: the others, if torchrun has started any."""
    begin = time.monotonic()
    output = _output(out, request, force)
    check_share(request)
    require_packages()
    refuse_missing_gpu(request.settings.device)
    checkpoint = open_model(model, family, follow_links=True)
    output = output.apart_from(files_read(checkpoint, family))
    anatomy = read_anatomy(checkpoint)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    request = with_defaults(request, checkpoint, anatomy)
    earlier = earlier_calibration(request, checkpoint)
    possible = dtypes_of(request, checkpoint, anatomy, earlier)
    drawn = drawn_samples(request, checkpoint, earlier)
    samples = drawn.samples
    check_vocabulary(checkpoint, anatomy, samples)
    used = devices(request.settings)[: len(samples)]
    run = replace(run_identity(request, checkpoint, samples, used), command=command)
    runs = {dtype: computed_in(dtype, request, checkpoint, samples, used) for dtype in possible}
    done, dtype = done_already(output, runs, _check_entries(out, drawn, earlier))
    choice = DtypeChoice(dtype)
    layers = len(anatomy.layers)
    with partial_calibration(Path(out), run, layers, restart=restart) as partial:
        resumed = len(done.layers) if done else partial.num_resumed
        if not done:
            # At the commit that it was opened at.
            where = address_of(checkpoint.source) if checkpoint.source.revision else model
            folder, budget = partial.activations, states_budget(request)
            with chosen_dtype(possible, folder) as choice:
                settings = with_dtype(request, choice.dtype).settings
                job = Job(where, family, samples, settings, folder, budget, request.memory)
                _run_layers(checkpoint, job, used, ranks, partial.layers, progress)
            said = calibration_settings(request, checkpoint, drawn, choice.dtype, runs)
            found = Calibration(str(out), partial.layers.layers, said)
            require_unchanged_weights(checkpoint, run, partial)
            done = merge([earlier, found], str(out)) if earlier else found
            write_scores(output, done.content())
        partial.clear()
    seconds = time.monotonic() - begin
    report = _report(request, choice, checkpoint, anatomy, done, drawn, resumed, seconds)
    return replace(report, device=", ".join(used)) if len(used) > 1 else report


def _check_entries(out: str | os.PathLike[str], drawn: Drawn, earlier: Calibration | None) -> int:
    """How many samples the file will list. Raises OutputError where it cannot hold them."""
    entries = [*(earlier.samples if earlier else ())]
    entries += [entry for sample in drawn.samples for entry in sample.entries]
    check_samples(out, entries)
    return len(entries)


def rehearse(
    model: str | os.PathLike[str] | None,
    request: CalibrationRequest,
    out: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
    force: bool = False,
) -> CalibrationEstimate:
    """What a calibration would take, here and elsewhere. Reads no weights, writes nothing.

    Arguments and errors are those of `calibrate`, as far as it raises them before it computes.
    Without `out` nothing is said of a file. Where the request has no dataset, or torch and
    transformers are not there to cut its records into tokens, as many tokens are taken as there
    can be. That one layer does not fit here is not raised: the report says it.
    """
    ready = not missing_packages()
    output = _output(out, request, force) if out is not None and ready else None
    check_share(request)
    checkpoint = open_model(model, family, follow_links=True)
    if output is not None:
        output = output.apart_from(files_read(checkpoint, family))
    anatomy = read_anatomy(checkpoint)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    request = with_defaults(request, checkpoint, anatomy)
    earlier = earlier_calibration(request, checkpoint)
    possible = dtypes_of(request, checkpoint, anatomy, earlier)
    drawn = None
    if request.dataset and ready:
        drawn = drawn_samples(request, checkpoint, earlier)
        check_vocabulary(checkpoint, anatomy, drawn.samples)
        if output is not None:
            used = devices(request.settings)[: len(drawn.samples)]
            given = (request, checkpoint, drawn.samples, used)
            runs = {dtype: computed_in(dtype, *given) for dtype in possible}
            done_already(output, runs, _check_entries(output.path, drawn, earlier))
    lengths = [each.num_tokens for each in drawn.samples] if drawn else longest_samples(request)
    wishes = Wishes(
        own_dtype=possible[0],
        dtype=request.settings.dtype,
        batch_size=request.settings.batch_size,
        memory=request.memory,
        states_budget=request.activation_budget,
    )
    size = model_size(checkpoint, anatomy)
    found = estimates(size, lengths, wishes, request.settings.device)
    return replace(
        found,
        model=checkpoint.source.name,
        dataset=request.dataset,
        drawn=drawn is not None,
        notes=(*checkpoint.notes, *found.notes),
    )


def _output(out: str | os.PathLike[str], request: CalibrationRequest, force: bool) -> Output:
    """Where the scores go, which is none of the files that the request names."""
    output = replace(score_output(out, force=force, extra="calibrate"), folder_is_made=True)
    return output.apart_from(files_named(request))


def files_named(request: CalibrationRequest) -> Iterator[Path]:
    """What a request names besides the model, as far as it is on this machine."""
    if request.extend is not None:
        yield Path(request.extend)
    for part in parse_spec(request.dataset, request.samples) if request.dataset else ():
        place = Path(part.name).expanduser()
        yield from place.rglob("*") if place.is_dir() else [place]


def _run_layers(
    checkpoint: Checkpoint,
    job: Job,
    used: Sequence[str],
    ranks: Sequence[Channel],
    layers: FinishedLayers,
    progress: Listener | None,
) -> None:
    """Do the job here, or, where several devices are used, in a process for each."""
    from shardsurgeon.layerwise.engine import calibrate_layers

    with layer_progress("calibrating", progress) as report:
        if len(used) > 1:
            calibrate_apart(job, used, ranks, layers, report)
            return
        lengths = [sample.num_tokens for sample in job.samples]
        with ActivationStore(job.folder, lengths, job.budget) as store:
            calibrate_layers(
                checkpoint, job.samples, job.settings, store, layers, report, memory=job.memory
            )


@contextmanager
def layer_progress(doing: str, progress: Listener | None) -> Iterator[Listener]:
    """A phase that counts tokens, once for every layer that they pass; what to tell it with."""
    with phase(doing, unit="tok") as at:

        def report(now: Progress) -> None:
            at.detail = f"layer {now.layer}, {now.layers_done}/{now.layers_total} done"
            if not at.total:  # what an earlier run did says nothing of the speed of this one
                at.total, at.resumed = now.tokens_total, now.tokens_done
            at.advance(now.tokens_done - at.done)
            if progress is not None:
                progress(now)

        yield report


def states_budget(request: CalibrationRequest) -> int:
    """Bytes of memory for hidden states, of all devices together."""
    from shardsurgeon.layerwise.memory import free_memory

    asked = request.activation_budget
    return free_memory("cpu") // 2 if asked is None else asked


def require_unchanged_weights(checkpoint: Checkpoint, run: Run, partial: Partial[Any]) -> None:
    """Raise SourceChangedError where the weights are not what they were at the beginning."""
    try:
        require_unchanged(checkpoint.source, run.source_files)
    except SourceChangedError:
        if checkpoint.source.touched:
            partial.clear()  # a rerun could not tell that these layers are of other weights
        raise


def _report(
    request: CalibrationRequest,
    choice: DtypeChoice,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    whole: Calibration,
    drawn: Drawn,
    resumed: int,
    seconds: float,
) -> CalibrationReport:
    mtp = {layer.index for layer in anatomy.mtp_layers}
    notes = list(checkpoint.notes)
    missing = sorted({layer.index for layer in anatomy.layers} - whole.layers.keys())
    if missing:
        listed = ", ".join(map(str, missing))
        notes.append(f"layers without scores: {listed}; `apply` has --mtp for MTP layers")
    notes += _notes_on_samples(request, drawn)
    notes += [f"{whole.origin} {whole.lacks_parts}"] if whole.lacks_parts else []
    return CalibrationReport(
        model=checkpoint.source.name,
        out=whole.origin,
        dataset=request.dataset,
        samples=len(drawn.samples),
        tokens=total_tokens(drawn.samples),
        counted_tokens=counted_tokens(drawn.samples),
        total_samples=whole.num_samples,
        layers=len(whole.layers),
        mtp_layers=len(mtp & whole.layers.keys()),
        layers_resumed=resumed,
        never_routed=sum(int((sums.counts == 0).sum()) for sums in whole.layers.values()),
        dtype=choice.dtype,
        dtype_reason=choice.reason,
        device=request.settings.device,
        seconds=seconds,
        notes=tuple(notes),
        parts=whole.parts,
    )


def _notes_on_samples(request: CalibrationRequest, drawn: Drawn) -> Iterator[str]:
    assert request.max_length is not None
    samples, tokens = len(drawn.samples), total_tokens(drawn.samples)
    share = tokens / (samples * request.max_length)
    if share < _FULL and not request.pack:
        verb = "holds" if samples == 1 else "hold"
        held = f"{counted(samples, 'sample')} {verb} {counted(tokens, 'token')}, {share:.0%} of "
        yield f"{held}{samples:,} x {request.max_length:,}; --pack fills windows with records"
    if drawn.num_skipped:
        shown = "; ".join(f"{index:,} {reason}" for _, index, reason in drawn.skipped[:_MOST_NAMED])
        more = ", …" if drawn.num_skipped > _MOST_NAMED else ""
        yield f"{counted(drawn.num_skipped, 'record')} left out as invalid: {shown}{more}"
