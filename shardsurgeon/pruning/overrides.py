"""What an engine has to be told of a pruned config.json where it reads the original's.

vLLM takes it as `--hf-overrides`. A value there replaces the config's; a dictionary does so too,
unless it stands for a config of its own, such as `text_config`: into that it is merged, level by
level.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS, JsonPath
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.execution.plan import Plan
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.limits import CONFIG

# One argument of a command has 128 KiB at most on Linux.
_MOST_NBYTES = 120_000


@dataclass(frozen=True, slots=True)
class Overrides:
    """What an engine is told.

    values: the settings, as --hf-overrides takes them; changes: path → new value of every setting
    that differs, single ones; problem: why the values do not say it all, "" where they do.
    """

    values: Mapping[str, object]
    changes: Mapping[JsonPath, object]
    problem: str = ""


def engine_overrides(checkpoint: Checkpoint, plan: Plan) -> Overrides:
    """What turns a checkpoint's config.json into that of a plan's result. Raises SourceReadError.

    plan: of this checkpoint.
    """
    generated = dict(plan.generated_files)
    name = checkpoint.names.config
    after: Any = Document.parse(generated[name], name).value
    before = checkpoint.settings
    changes, lost = dict(_changes(before, after)), [*_lost(before, after)]
    values: dict[str, Any] = {}
    for path in changes:
        _take(values, after, path)
    problem = ""
    if lost:
        problem = f"{'.'.join(map(str, lost[0]))} goes, which no override can say"
    elif stale := _stale(checkpoint, generated, changes):
        problem = f"{stale} changes, and engines read the one of the model"
    elif len(json.dumps(values).encode()) > _MOST_NBYTES:
        problem = "the lists of quantized modules are too long for a command"
    return Overrides(values, changes, problem)


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], path: JsonPath = ()
) -> Iterator[tuple[JsonPath, object]]:
    """(path, value) of what `after` has anew or otherwise; lists are values."""
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from _changes(old, value, (*path, key))
        elif key not in before or old != value:
            yield (*path, key), value


def _lost(
    before: Mapping[str, Any], after: Mapping[str, Any], path: JsonPath = ()
) -> Iterator[JsonPath]:
    """The paths that are gone and that nothing else replaces."""
    for key, value in before.items():
        if key not in after:
            yield (*path, key)
        elif isinstance(value, Mapping) and not _is_replaced((*path, key)):
            yield from _lost(value, after[key], (*path, key))


def _is_replaced(path: JsonPath) -> bool:
    """Whether an override replaces the dictionary at a path as a whole."""
    return len(path) == 1 and path[0] in QUANTIZATION_KEYS


def _take(values: dict[str, Any], after: Mapping[str, Any], path: JsonPath) -> None:
    """Add the setting at a path of the config `after`."""
    node: Any = after
    for depth, key in enumerate(path, start=1):
        node = node[key]
        if depth == len(path) or _is_replaced(path[:depth]):
            values[str(key)] = node
            return
        values = values.setdefault(str(key), {})


def _stale(
    checkpoint: Checkpoint, generated: Mapping[str, bytes], changes: Mapping[JsonPath, object]
) -> str:
    """A quantization file that changes where config.json does not say the same; "" for none."""
    if any(not QUANTIZATION_KEYS.isdisjoint(map(str, path)) for path in changes):
        return ""
    there = (name for name in QUANTIZATION_FILES if name in generated)
    changed = (name for name in there if checkpoint.read_file(name, CONFIG) != generated[name])
    return next(changed, "")
