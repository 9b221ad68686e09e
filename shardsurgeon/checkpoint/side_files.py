"""What lies beside a model's weights: what a prune carries along, and what it leaves behind.

What belongs to a model, `recognition` says; `--include` and `--exclude` decide otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import is_needed
from shardsurgeon.checkpoint.recognition import named_by_configs
from shardsurgeon.errors import UsageError
from shardsurgeon.storage.source import require_plain

EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The files beside a model's weights. carried: those that belong to it, by name; left: those
    that do not → why, in a word or two."""

    carried: tuple[str, ...]
    left: Mapping[str, str]


def side_files(
    checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> SideFiles:
    """Sort the files beside a model's weights; those that a prune writes anew are in neither list.

    include, exclude: globs of paths, or folders, that decide otherwise; where both fit, the file
    is left behind. A glob that fits nothing does nothing here: `require_sound` refuses it. Raises
    CheckpointError where a file that the model needs is no plain one, such as a link out of it.
    """
    odd = checkpoint.odd
    if asked := [name for name in sorted(odd) if not matches(name, exclude)]:
        known = [file for file in checkpoint.files if file.name not in odd]
        named = named_by_configs(checkpoint.source, known, checkpoint.settings)
        needed = [name for name in asked if is_needed(name) or name in named]
        require_plain(checkpoint.source, needed)
    shards = {shard.file for shard in checkpoint.shards}
    carried, left = [], {}
    for name in sorted({*odd, *(file.name for file in checkpoint.files)}):
        if name in checkpoint.rewritten or name in shards:
            continue
        why = checkpoint.left_behind.get(name)
        if matches(name, exclude):
            left[name] = EXCLUDED
        elif name in odd:
            left[name] = odd[name]
        elif matches(name, include) or (why is None and name not in checkpoint.unindexed):
            carried.append(name)
        elif why is not None:
            left[name] = why
    return SideFiles(tuple(carried), left)


def require_sound(checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise UsageError for a glob that fits no file, or excludes what a model needs, and
    CheckpointError for one that is to include what is no plain file alone."""
    shards = {shard.file for shard in checkpoint.shards}
    beside = {*checkpoint.odd, *(file.name for file in checkpoint.files)} - shards
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            found = sorted(name for name in beside if matches(name, [glob]))
            if found and globs is include and checkpoint.odd.keys() >= set(found):
                require_plain(checkpoint.source, found)
            if not found:
                problem = f"{glob} fits none of the {len(beside)} files beside the weights"
                raise UsageError(option, problem, "globs are of paths in the model's folder")
    for glob in exclude:
        for name in (*sorted(checkpoint.rewritten.intersection(beside)), *sorted(shards)):
            if matches(name, [glob]):
                problem = f"{glob} would exclude {name}, without which this is no model"
                raise UsageError("--exclude", problem, "give a narrower one")


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a path fits a glob, whose `*` stands for `/` too, or lies in a folder so called."""
    return any(
        fnmatchcase(name, glob) or fnmatchcase(name, f"{glob.rstrip('/')}/*") for glob in globs
    )
