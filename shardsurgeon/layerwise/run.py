"""`calibrate` from its request to its report: samples, checks, layers, score file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import config_section
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.open import files_read, open_model
from shardsurgeon.errors import ScoreError, SourceChangedError, UsageError
from shardsurgeon.execution.journal import Run
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.calibration_file import (
    COUNTED,
    WINDOWS,
    Calibration,
    find_calibration,
    merge,
    read_calibration,
    require_alike,
)
from shardsurgeon.layerwise.channels import Channel, met, this_rank
from shardsurgeon.layerwise.datasets import DEFAULT_SAMPLES, parse_spec, without_folders
from shardsurgeon.layerwise.estimate import CalibrationEstimate, Wishes, estimates
from shardsurgeon.layerwise.memory import model_size
from shardsurgeon.layerwise.processes import calibrate_apart, devices, lead
from shardsurgeon.layerwise.request import CalibrationReport, CalibrationRequest
from shardsurgeon.layerwise.resume import FinishedLayers, PartialCalibration, partial_calibration
from shardsurgeon.layerwise.samples import (
    Drawn,
    Sample,
    SamplingOptions,
    counted_tokens,
    draw_samples,
    open_datasets,
    samples_sha256,
    total_tokens,
)
from shardsurgeon.layerwise.settings import (
    DTYPES,
    Listener,
    Progress,
    load_packages,
    missing_packages,
    refuse_missing_gpu,
    require_packages,
    versions,
)
from shardsurgeon.layerwise.tokenizer import Tokenizer, tokenizer_folder
from shardsurgeon.layerwise.worker import Job, follow
from shardsurgeon.scores.files import check_samples, score_output, write_scores
from shardsurgeon.storage.files import Output, reading
from shardsurgeon.storage.formats.index import CONFIG_NAME
from shardsurgeon.storage.open import address_of
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import require_unchanged
from shardsurgeon.units import counted

DEFAULT_MAX_LENGTH = 2048

_POSITIONS = ("max_position_embeddings", "model_max_length", "max_sequence_length", "seq_length")
_DTYPE = ("dtype", "torch_dtype")
_FALLBACK_DTYPE = "bfloat16"
# Counted up where the same request would give other numbers: a partial result then starts over.
_RESULTS = 2
# Samples of which less than this share is tokens are worth a note.
_FULL = 0.5
# Of the records that were left out, so many are named in a note; the score file lists more.
_MOST_NAMED = 5
# The setting that tells one run, its request and its source, from any other.
_RUN = "run"


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
    _check_share(request)
    require_packages()
    refuse_missing_gpu(request.settings.device)
    checkpoint = open_model(model, family, follow_links=True)
    output = output.apart_from(files_read(checkpoint, family))
    anatomy = read_anatomy(checkpoint)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    request = _with_defaults(request, checkpoint, anatomy)
    earlier = _earlier(request, checkpoint)
    drawn = _drawn(request, checkpoint, earlier)
    samples = drawn.samples
    entries = earlier.samples if earlier else []
    entries += [entry for sample in samples for entry in sample.entries]
    check_samples(out, entries)
    _check_vocabulary(checkpoint, anatomy, samples)
    used = devices(request.settings)[: len(samples)]
    run = replace(_run_identity(request, checkpoint, samples, used), command=command)
    settings = _calibration_settings(request, checkpoint, drawn, run)
    done = _done(output, settings, len(entries))
    layers = len(anatomy.layers)
    with partial_calibration(Path(out), run, layers, restart=restart) as partial:
        resumed = len(done.layers if done else partial.layers.done_layers())
        if not done:
            # At the commit that it was opened at.
            where = address_of(checkpoint.source) if checkpoint.source.revision else model
            folder, budget = partial.activations, _budget(request)
            job = Job(where, family, samples, request.settings, folder, budget)
            _run_layers(checkpoint, job, used, ranks, partial.layers, progress)
            found = Calibration(str(out), partial.layers.layers, settings)
            _require_unchanged(checkpoint, run, partial)
            done = merge([earlier, found], str(out)) if earlier else found
            write_scores(output, done.content())
        partial.clear()
    seconds = time.monotonic() - begin
    report = _report(request, checkpoint, anatomy, done, drawn, resumed, seconds)
    return replace(report, device=", ".join(used)) if len(used) > 1 else report


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
    _check_share(request)
    checkpoint = open_model(model, family, follow_links=True)
    if output is not None:
        output = output.apart_from(files_read(checkpoint, family))
    anatomy = read_anatomy(checkpoint)
    require_complete(anatomy.incomplete, None, checkpoint.location)
    asked, request = request.settings.dtype, _with_defaults(request, checkpoint, anatomy)
    earlier = _earlier(request, checkpoint)
    samples = None
    if request.dataset and ready:
        samples = _samples(request, checkpoint, earlier)
        _check_vocabulary(checkpoint, anatomy, samples)
    lengths = _longest(request) if samples is None else [each.num_tokens for each in samples]
    if output is not None:
        entries = len(lengths) + (len(earlier.samples) if earlier else 0)
        check_samples(output.path, entries)
        if output.path.is_file():
            run = _run_identity(request, checkpoint, samples or ())
            _done(output, _calibration_settings(request, checkpoint, samples or (), run), entries)
    wishes = Wishes(
        own_dtype=str(request.settings.dtype),
        dtype=asked,
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
        drawn=samples is not None,
        notes=(*checkpoint.notes, *found.notes),
    )


def _longest(request: CalibrationRequest) -> list[int]:
    """Tokens of each sample, where each is as long as it may be."""
    assert request.max_length is not None
    count = request.samples or DEFAULT_SAMPLES
    if request.dataset:
        count = sum(part.count or 0 for part in parse_spec(request.dataset, request.samples))
    k, n = request.share or (1, 1)
    return [request.max_length] * len(range(k - 1, count, n))


def _output(out: str | os.PathLike[str], request: CalibrationRequest, force: bool) -> Output:
    """Where the scores go, which is none of the files that the request names."""
    output = replace(score_output(out, force=force, extra="calibrate"), folder_is_made=True)
    return output.apart_from(_files_named(request))


def _files_named(request: CalibrationRequest) -> Iterator[Path]:
    """What a request names besides the model, as far as it is on this machine."""
    if request.extend is not None:
        yield Path(request.extend)
    for part in parse_spec(request.dataset, request.samples) if request.dataset else ():
        place = Path(part.name).expanduser()
        yield from place.rglob("*") if place.is_dir() else [place]


def _done(output: Output, settings: Mapping[str, object], samples: int) -> Calibration | None:
    """What the file holds, where that is what this very run gives; None where there is none.

    settings: of the run; samples: how many the file must have. Raises OutputError for any other
    file, unless it is to be replaced.
    """
    if not output.path.is_file():
        return None
    found = None
    with suppress(ScoreError):
        found = find_calibration(output.path)
    if found is not None and len(found.samples) == samples:
        parts = found.settings.get("parts")
        runs = [part.get(_RUN) for part in (parts if isinstance(parts, list) else [found.settings])]
        if settings[_RUN] in runs:
            return found
    if not output.force:
        output.refuse()
    return None


def _with_defaults(
    request: CalibrationRequest, checkpoint: Checkpoint, anatomy: Anatomy
) -> CalibrationRequest:
    """The request with values for what it leaves to the model."""
    settings = request.settings
    return replace(
        request,
        max_length=_sample_length(checkpoint, anatomy, request.max_length),
        settings=replace(settings, dtype=settings.dtype or _own_dtype(checkpoint, anatomy)),
    )


def _sample_length(checkpoint: Checkpoint, anatomy: Anatomy, asked: int | None) -> int:
    """Tokens that a sample is cut to. Raises UsageError where the model allows fewer."""
    allowed = next(_numbers(checkpoint, anatomy, _POSITIONS), None)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, allowed or DEFAULT_MAX_LENGTH)
    if allowed is not None and asked > allowed:
        problem = f"samples of {asked:,} tokens are longer than the {allowed:,} that "
        problem += f"{checkpoint.source.name} allows"
        raise UsageError("--max-length", problem, f"give {allowed} or less")
    return asked


def _own_dtype(checkpoint: Checkpoint, anatomy: Anatomy) -> str:
    """The dtype that the config names, or bfloat16 where it is none of DTYPES."""
    named = (value for value in _values(checkpoint, anatomy, _DTYPE) if value in DTYPES)
    return str(next(named, _FALLBACK_DTYPE))


def _earlier(request: CalibrationRequest, checkpoint: Checkpoint) -> Calibration | None:
    """The calibration to extend, if any. Raises ScoreError where it is of another model."""
    if request.extend is None:
        return None
    earlier = read_calibration(request.extend)
    made = earlier.settings.get("config_sha256")
    if made != checkpoint.config_sha256:
        problem = f"was made for {earlier.settings.get('model')}, config {str(made)[:12]}; "
        problem += f"{checkpoint.location} has config {checkpoint.config_sha256[:12]}"
        raise ScoreError(request.extend, problem, "extend with the model that it was made for")
    # What the merge at the end would refuse, after hours.
    here = {"model": checkpoint.source.name, "revision": checkpoint.source.revision}
    for key, now in here.items():
        before = earlier.settings.get(key)
        if before != now and (key == "model" or None not in (before, now)):
            problem = f"was made with {key} {before}, this one is {now}"
            add_up = "`scores merge --same-model`" if key == "model" else "`scores merge`"
            raise ScoreError(request.extend, problem, f"calibrate anew, then {add_up} adds them up")
    try:
        require_alike(earlier, {COUNTED: request.tokens})
    except ScoreError as error:
        add_up = "calibrate anew, then `scores merge --mixed` adds them up"
        raise ScoreError(error.where, error.problem, add_up) from error
    return earlier


def _drawn(
    request: CalibrationRequest, checkpoint: Checkpoint, earlier: Calibration | None
) -> Drawn:
    """The samples of this run; of a share, those of the share alone."""
    assert request.max_length is not None
    parts = parse_spec(request.dataset, request.samples)
    taken = frozenset(sample[:2] for sample in earlier.samples) if earlier else frozenset()
    options = SamplingOptions(
        request.settings.seed,
        request.max_length,
        request.field,
        taken,
        request.skip_invalid,
        request.tokens,
        request.pack,
    )
    with phase("opening the dataset"):
        datasets = open_datasets(parts, options)
    # From here on it takes long, whatever else may be wrong with the request.
    load_packages()
    from shardsurgeon.layerwise.devices import require_device

    require_device(request.settings.device)
    drawn = draw_samples(datasets, _tokenizer(request, checkpoint), options)
    if request.share is None:
        return drawn
    k, n = request.share
    return replace(drawn, samples=drawn.samples[k - 1 :: n])


def _check_share(request: CalibrationRequest) -> None:
    """Raise UsageError where some shares of the samples would be empty."""
    if request.share is None:
        return
    k, n = request.share
    samples = len(_longest(replace(request, share=None, max_length=1)))
    if samples < n:
        problem = f"{k}/{n} of {samples:,} samples leaves some shares empty"
        raise UsageError("--share", problem, "make fewer shares")


def _tokenizer(request: CalibrationRequest, checkpoint: Checkpoint) -> Tokenizer:
    trust = request.trust_remote_code
    if request.tokenizer:
        return Tokenizer(request.tokenizer, trust_remote_code=trust)
    with tokenizer_folder(checkpoint.source) as folder:
        return Tokenizer(folder, name=checkpoint.location, trust_remote_code=trust)


def _check_vocabulary(checkpoint: Checkpoint, anatomy: Anatomy, samples: Sequence[Sample]) -> None:
    """Raise UsageError where a sample has a token outside the model's vocabulary."""
    size = next(_numbers(checkpoint, anatomy, ("vocab_size",)), None)
    for sample in samples:
        highest = int(sample.ids.max())
        if size is not None and highest >= size:
            problem = f"gives token {highest:,} in {sample.source}, record {sample.index:,}, and "
            problem += f"the model has {size:,}"
            raise UsageError("--tokenizer", problem, "give the tokenizer of this model")


def _run_identity(
    request: CalibrationRequest,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    used: Sequence[str],
) -> Run:
    """What a partial result belongs to: digests of the request and of the source's state.

    used: the devices; on another number of them, sums are rounded otherwise.
    """
    settings = asdict(request.settings)
    asked = {
        "results": _RESULTS,
        "dataset": without_folders(request.dataset),
        "samples": samples_sha256(samples),
        "settings": settings,
        "max_length": request.max_length,
        "tokens": request.tokens,
        "pack": request.pack,
        "extend": None if request.extend is None else _sha256(Path(request.extend)),
    }
    if len(used) > 1:
        asked["devices"] = len(used)
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    shards = {shard.file for shard in checkpoint.shards} | {CONFIG_NAME}
    files = tuple(file for file in checkpoint.files if file.name in shards)
    source = [[(file.name, file.nbytes, file.stamp) for file in files], headers]
    digests = [hashlib.sha256(json.dumps(what).encode()).hexdigest() for what in (asked, source)]
    words = {f"--{name.replace('_', '-')}": str(value) for name, value in settings.items()}
    words |= {"--dataset": str(asked["dataset"]), "--max-length": str(asked["max_length"])}
    words |= {"--tokens": request.tokens, "--pack": str(request.pack)}
    words |= {"--extend": str(asked["extend"]), "samples": str(asked["samples"])[:12]}
    words["devices"] = str(len(used))
    return Run(digests[0], digests[1], files, asked=words)


def _sha256(path: Path) -> str:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


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

    with phase("calibrating", unit="tok") as at:

        def report(now: Progress) -> None:
            at.detail = f"layer {now.layer}, {now.layers_done}/{now.layers_total} done"
            if not at.total:  # what an earlier run did says nothing of the speed of this one
                at.total, at.resumed = now.tokens_total, now.tokens_done
            at.advance(now.tokens_done - at.done)
            if progress is not None:
                progress(now)

        if len(used) > 1:
            calibrate_apart(job, used, ranks, layers, report)
            return
        lengths = [sample.num_tokens for sample in job.samples]
        with ActivationStore(job.folder, lengths, job.budget) as store:
            calibrate_layers(
                checkpoint, job.samples, job.settings, store, layers, report, memory=request.memory
            )


def _budget(request: CalibrationRequest) -> int:
    """Bytes of memory for hidden states, of all devices together."""
    from shardsurgeon.layerwise.memory import free_memory

    asked = request.activation_budget
    return free_memory("cpu") // 2 if asked is None else asked


def _require_unchanged(checkpoint: Checkpoint, run: Run, partial: PartialCalibration) -> None:
    """Raise SourceChangedError where the weights are not what they were at the beginning."""
    try:
        require_unchanged(checkpoint.source, run.source_files)
    except SourceChangedError:
        if checkpoint.source.touched:
            partial.clear()  # a rerun could not tell that these layers are of other weights
        raise


def _calibration_settings(
    request: CalibrationRequest, checkpoint: Checkpoint, drawn: Drawn, run: Run
) -> dict[str, object]:
    """The settings that the score file records."""
    settings: dict[str, object] = {
        _RUN: hashlib.sha256(f"{run.result} {run.source}".encode()).hexdigest(),
        "model": checkpoint.source.name,
        "revision": checkpoint.source.revision,
        "config_sha256": checkpoint.config_sha256,
        "dataset": without_folders(request.dataset),
        "seed": request.settings.seed,
        "max_length": request.max_length,
        COUNTED: request.tokens,
        "dtype": request.settings.dtype,
        "versions": {"shardsurgeon": __version__, **versions()},
        "samples": [list(entry) for sample in drawn.samples for entry in sample.entries],
    }
    if request.pack:
        settings[WINDOWS] = len(drawn.samples)
    if drawn.num_skipped:
        listed = [list(record) for record in drawn.skipped]
        settings["skipped"] = {"count": drawn.num_skipped, "records": listed}
    return settings


def _report(
    request: CalibrationRequest,
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
        dtype=str(request.settings.dtype),
        device=request.settings.device,
        seconds=seconds,
        notes=tuple(notes),
    )


def _notes_on_samples(request: CalibrationRequest, drawn: Drawn) -> Iterator[str]:
    assert request.max_length is not None
    samples, tokens = len(drawn.samples), total_tokens(drawn.samples)
    share = tokens / (samples * request.max_length)
    if share < _FULL and not request.pack:
        held = f"{counted(samples, 'sample')} hold {counted(tokens, 'token')}, {share:.0%} of "
        yield f"{held}{samples:,} x {request.max_length:,}; --pack fills windows with records"
    if drawn.num_skipped:
        shown = "; ".join(f"{index:,} {reason}" for _, index, reason in drawn.skipped[:_MOST_NAMED])
        more = ", …" if drawn.num_skipped > _MOST_NAMED else ""
        yield f"{counted(drawn.num_skipped, 'record')} left out as invalid: {shown}{more}"


def _numbers(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[int]:
    for value in _values(checkpoint, anatomy, keys):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _values(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[object]:
    """Values of the keys in the config: in the language model's sections first, then at the top."""
    for at in (*anatomy.family.config.at, ""):
        section = config_section(checkpoint.settings, at) or {}
        yield from (section[key] for key in keys if key in section)
