"""One verification from beginning to end: both models in, a report out."""

from __future__ import annotations

import os
from collections.abc import Collection
from os import PathLike, fspath

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import CheckpointError, InputError
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import Source
from shardsurgeon.verification.byte_comparison import Compared, Progress, Sampling, compare_bytes
from shardsurgeon.verification.config_check import check_settings
from shardsurgeon.verification.files import check_side_files, check_structure
from shardsurgeon.verification.findings import Findings, VerifyReport
from shardsurgeon.verification.generation_config import check_generation_config
from shardsurgeon.verification.pairing import pair_tensors
from shardsurgeon.verification.record import check_layers, read_keeps
from shardsurgeon.verification.record_fields import check_fields, check_saliencies
from shardsurgeon.verification.shapes import check_shapes
from shardsurgeon.verification.strays import check_recorded, check_strays

_MOST_WORKERS = 4


def verify_checkpoint(
    source: Checkpoint | str | PathLike[str],
    pruned: Checkpoint | str | PathLike[str] | Source,
    *,
    sample: int | None = None,
    sample_nbytes: int | None = None,
    seed: int = 0,
    workers: int = 0,
    on_progress: Progress | None = None,
    edited: Collection[str] = (),
) -> VerifyReport:
    """Compare a pruned model, in a folder or in another source, with the model it was made of.

    sample: compare the bytes of so many tensors per shard, chosen by `seed`, and of each at most
    `sample_nbytes`; None compares all. Names, shapes, headers, index, config, side files and
    metadata are always compared completely. workers: threads that read, 0 for as many as suit
    the machine. on_progress: called with the bytes compared so far and in all. edited: files beside
    the weights that are meant to differ.

    What is wrong with the pruned model is in the report. Raises CheckpointError and FamilyError
    for a source that cannot be read as a model, and where the path `pruned` is not a folder.
    """
    if isinstance(pruned, str | PathLike) and not os.path.isdir(pruned):
        raise CheckpointError(pruned, "is not a folder", "give the folder that apply wrote")
    before = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    threads = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    with phase("checking"):
        sampling = Sampling(sample, sample_nbytes, seed)
        return _report(before, pruned, sampling, threads, on_progress, Findings(edited=edited))


def _report(
    before: Checkpoint,
    pruned: Checkpoint | str | PathLike[str] | Source,
    sampling: Sampling,
    threads: int,
    on_progress: Progress | None,
    findings: Findings,
) -> VerifyReport:
    place = fspath(pruned) if isinstance(pruned, str | PathLike) else pruned.location
    anatomy = read_anatomy(before)
    tensors, compared = 0, Compared(0, 0)
    try:
        after = pruned if isinstance(pruned, Checkpoint) else open_checkpoint(pruned, before.family)
        tensors = after.num_tensors
        keeps = read_keeps(before, anatomy, after, findings)
    except InputError as error:
        # The result is what is checked: if it cannot be read, that is a finding, not bad input.
        findings.add(error.where, error.problem)
        keeps = None
    if keeps is not None:
        pairing = pair_tensors(before, anatomy, after, keeps, findings)
        check_layers(anatomy, after, keeps, pairing.mtp_dropped, findings)
        check_shapes(anatomy, keeps, pairing.pairs, findings)
        check_structure(before, after, pairing.pairs, findings)
        rewritten = {
            *check_settings(before, anatomy, after, keeps, pairing, findings),
            *check_generation_config(before, after, findings),
        }
        check_side_files(before, after, findings, rewritten)
        check_strays(before, after, findings)
        check_fields(anatomy, after, findings)
        check_saliencies(before, anatomy, after, findings)
        compared = compare_bytes(
            before, after, pairing.pairs, sampling, threads, on_progress, findings
        )
        check_recorded(after, findings, complete=compared.complete)
    return VerifyReport(
        source=before.location,
        pruned=place,
        sampled=sampling.tensors,
        tensors=tensors,
        tensors_compared=compared.tensors,
        bytes_compared=compared.nbytes,
        differences=findings.lines(),
        complete=compared.complete,
        notes=tuple(findings.notes),
    )
