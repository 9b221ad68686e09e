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
from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS, JsonPath, quantization_sections
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.limits import CONFIG

# One argument of a command has 128 KiB at most on Linux.
_MOST_NBYTES = 120_000


@dataclass(frozen=True, slots=True)
class Overrides:
    """What an engine is told.

    values: the settings, as --hf-overrides takes them; changes: path → new value of every single
    setting that differs, None where it is gone; problem: why the values do not say it all, "" where
    they do.
    """

    values: Mapping[str, object]
    changes: Mapping[JsonPath, object]
    problem: str = ""


def engine_overrides(checkpoint: Checkpoint, generated: Mapping[str, bytes]) -> Overrides:
    """What turns a checkpoint's config.json into that of a plan's result. Raises SourceReadError.

    generated: name → content of the files that the plan makes anew.
    """
    name = checkpoint.names.config
    after: Any = Document.parse(generated[name], name).value
    before = checkpoint.settings
    changes = dict(_changes(before, after))
    # These are replaced whole.
    sections = {key for key in QUANTIZATION_KEYS & after.keys() if before.get(key) != after[key]}
    values: dict[str, Any] = {key: after[key] for key in sections}
    for path in changes:
        if path[0] not in sections:
            _take(values, after, path)
    gone = [*_gone(before, after)]
    changes |= {path: None for path in gone if path[0] in sections}
    lost = [path for path in gone if path[0] not in sections]
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


def _gone(
    before: Mapping[str, Any], after: Mapping[str, Any], path: JsonPath = ()
) -> Iterator[JsonPath]:
    """The paths that `after` has no longer."""
    for key, value in before.items():
        if key not in after:
            yield (*path, key)
        elif isinstance(value, Mapping) and isinstance(after[key], Mapping):
            yield from _gone(value, after[key], (*path, key))


def _take(values: dict[str, Any], after: Any, path: JsonPath) -> None:
    """Add the setting at a path of the config `after`."""
    *outer, last = map(str, path)
    for key in outer:
        values, after = values.setdefault(key, {}), after[key]
    values[last] = after[last]


def _stale(
    checkpoint: Checkpoint, generated: Mapping[str, bytes], changes: Mapping[JsonPath, object]
) -> str:
    """A quantization file that changes and that engines read; "" for none.

    They do where config.json says nothing of quantization, and ModelOpt's for lists of modules that
    it does not have.
    """
    if any(not QUANTIZATION_KEYS.isdisjoint(map(str, path)) for path in changes):
        return ""
    is_said = any(True for _ in quantization_sections(checkpoint.settings))
    read = QUANTIZATION_FILES if not is_said else ("hf_quant_config.json",)
    there = (name for name in read if name in generated)
    changed = (name for name in there if checkpoint.read_file(name, CONFIG) != generated[name])
    return next(changed, "")
