"""What a plan is to write: the names and sizes of its files, and whether they are there already."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from shardsurgeon.errors import OutputError, OutputWriteError, SourceReadError
from shardsurgeon.execution.plan import Plan
from shardsurgeon.execution.workdir import has_file
from shardsurgeon.storage.files import reading, sha256_of
from shardsurgeon.storage.formats.checksums import begin_with_checksums, nbytes_with_checksums
from shardsurgeon.storage.source import leads_out


def output_sizes(plan: Plan) -> dict[str, int]:
    """Every output file and its size. Raises OutputError for a name that must not be written, or
    would be a file and a folder."""
    source_sizes = {file.name: file.nbytes for file in plan.source_files}
    files = [(shard.file, shard.nbytes) for shard in plan.shards]
    files += [(name, source_sizes[name]) for name in plan.copied_files]
    files += [(name, _size_on_disk(path)) for name, path, _ in plan.score_files]
    files += [(name, len(data)) for name, data in (*plan.generated_files, *plan.manifest)]
    sizes: dict[str, int] = {}
    for name, nbytes in files:
        if leads_out(name):
            raise OutputError(name, "is a file name that leads out of the output folder")
        if name in sizes:
            raise OutputError(name, "is the name of two output files")
        sizes[name] = nbytes
    _require_folders(sizes)
    if plan.record:
        left_out = {plan.record, *(name for name, _ in plan.manifest)}
        left_out |= set() if plan.checksums else {shard.file for shard in plan.shards}
        document = dict(plan.generated_files)[plan.record]
        sizes[plan.record] = nbytes_with_checksums(document, sizes.keys() - left_out)
    return sizes


def _require_folders(sizes: dict[str, int]) -> None:
    """Raise OutputError for a file whose name is that of another file's folder."""
    for name in sizes:
        for folder in map(str, PurePosixPath(name).parents):
            if folder in sizes:
                problem = f"is a file, and {name} needs a folder of that name"
                raise OutputError(folder, problem, f"leave it behind with --exclude {folder}")


def holds_result(out: Path, plan: Plan, sizes: dict[str, int]) -> bool:
    """Whether the folder `out` is what this plan gives, as far as small files and headers tell.

    sizes: of every output file. Reads no weights. Files beside those of the plan do not matter.
    """
    begins = {shard.file: shard.header for shard in plan.shards}
    begins |= dict((*plan.generated_files, *plan.manifest))
    if plan.record:
        begins[plan.record] = begin_with_checksums(begins[plan.record])
    try:
        return (
            os.path.isdir(out)  # where a name is too long, too
            and all(
                has_file(out / name, size, begins.get(name, b"")) for name, size in sizes.items()
            )
            and all(sha256_of(out / name) == sha256 for name, _, sha256 in plan.score_files)
        )
    except (OutputWriteError, SourceReadError):
        return False


def require_distinct(sizes: dict[str, int]) -> None:
    """Raise OutputError for two names that differ in case only, on a disk that has none."""
    seen: dict[str, str] = {}
    for name in sizes:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            problem = f"differs from {other} in case only, and the disk of the output keeps one"
            raise OutputError(name, problem, "leave one of the two behind with --exclude")


def _size_on_disk(path: str) -> int:
    with reading(path):
        return os.stat(path).st_size
