"""What tells one calibration from another: for a run that resumes, and in the score file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import ScoreError
from shardsurgeon.execution.journal import Run
from shardsurgeon.layerwise.calibration_file import (
    COUNTED,
    WINDOWS,
    Calibration,
    find_calibration,
)
from shardsurgeon.layerwise.datasets import without_folders
from shardsurgeon.layerwise.parts import identities
from shardsurgeon.layerwise.preparation import with_dtype
from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.samples import Drawn, Sample, samples_sha256
from shardsurgeon.layerwise.settings import versions
from shardsurgeon.storage.files import Output, reading
from shardsurgeon.storage.formats.index import CONFIG_NAME

# Counted up where the same request would give other numbers: a partial result then starts over.
_RESULTS = 3
# The setting that tells one run, its request and its source, from any other.
_RUN = "run"


def run_identity(
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
    if len(identities(sample.source for sample in samples)) > 1:
        asked["parts"] = "apart"  # unlike in what earlier versions left of a mix
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    shards = {shard.file for shard in checkpoint.shards} | {CONFIG_NAME}
    files = tuple(file for file in checkpoint.files if file.name in shards)
    source = [[(file.name, file.nbytes, file.stamp) for file in files], headers]
    digests = [hashlib.sha256(json.dumps(what).encode()).hexdigest() for what in (asked, source)]
    said = {name: value for name, value in settings.items() if value is not None}
    words = {f"--{name.replace('_', '-')}": str(value) for name, value in said.items()}
    words |= {"--dataset": str(asked["dataset"]), "--max-length": str(asked["max_length"])}
    words |= {"--tokens": request.tokens, "--pack": str(request.pack)}
    words |= {"--extend": str(asked["extend"]), "samples": str(asked["samples"])[:12]}
    words["devices"] = str(len(used))
    return Run(digests[0], digests[1], files, asked=words)


def _sha256(path: Path) -> str:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def computed_in(
    dtype: str,
    request: CalibrationRequest,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    used: Sequence[str],
) -> str:
    """The setting that tells a request that is computed in a dtype from any other run."""
    run = run_identity(with_dtype(request, dtype), checkpoint, samples, used)
    return hashlib.sha256(f"{run.result} {run.source}".encode()).hexdigest()


def calibration_settings(
    request: CalibrationRequest,
    checkpoint: Checkpoint,
    drawn: Drawn,
    dtype: str,
    runs: Mapping[str, str],
) -> dict[str, object]:
    """The settings that the score file records. runs: dtype → as `computed_in` gives it."""
    settings: dict[str, object] = {
        _RUN: runs[dtype],
        "model": checkpoint.source.name,
        "revision": checkpoint.source.revision,
        "config_sha256": checkpoint.config_sha256,
        "dataset": without_folders(request.dataset),
        "seed": request.settings.seed,
        "max_length": request.max_length,
        COUNTED: request.tokens,
        "dtype": dtype,
        "versions": {"shardsurgeon": __version__, **versions()},
        "samples": [list(entry) for sample in drawn.samples for entry in sample.entries],
    }
    if request.pack:
        settings[WINDOWS] = len(drawn.samples)
    if drawn.num_skipped:
        listed = [list(record) for record in drawn.skipped]
        settings["skipped"] = {"count": drawn.num_skipped, "records": listed}
    return settings


def done_already(
    output: Output, runs: Mapping[str, str], samples: int
) -> tuple[Calibration | None, str]:
    """What the file holds, where that is what this very run gives, and the dtype of that.

    runs: dtype that the run may be computed in → the setting that tells it from others; samples:
    how many the file must have. None, and the first dtype, where there is no file. Raises
    OutputError for any other file, unless it is to be replaced.
    """
    first = next(iter(runs))
    if not output.path.is_file():
        return None, first
    found = None
    with suppress(ScoreError):
        found = find_calibration(output.path)
    if found is not None and len(found.samples) == samples:
        parts = found.settings.get("parts")
        made = [part.get(_RUN) for part in (parts if isinstance(parts, list) else [found.settings])]
        for dtype, run in runs.items():
            if run in made:
                return found, dtype
    if not output.force:
        output.refuse()
    return None, first
