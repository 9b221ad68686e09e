"""generation_config.json: the source's, with the sampling settings that the record names.

Where the record names none it is a side file like others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.sampling import GENERATION_CONFIG_NAME as NAME
from shardsurgeon.checkpoint.sampling import token_ids
from shardsurgeon.errors import ConfigError, InputError
from shardsurgeon.storage.formats.json_edit import Document, Insert
from shardsurgeon.storage.formats.strict_json import parse_json
from shardsurgeon.storage.limits import CONFIG
from shardsurgeon.verification.config_check import compare_values
from shardsurgeon.verification.files import carried_files
from shardsurgeon.verification.findings import Findings


def check_generation_config(
    source: Checkpoint, pruned: Checkpoint, findings: Findings
) -> frozenset[str]:
    """Compare it, and give its name where it is no copy of the source's; else nothing."""
    record, earlier = pruned.provenance, source.provenance
    steps = () if record is None else record.steps[0 if earlier is None else len(earlier.steps) :]
    asked = [step.sampling for step in steps if step.sampling]
    if not asked:
        return frozenset()
    if NAME in {file.name for file in pruned.files}:
        _check(source, pruned, asked, findings)
    else:
        findings.add(NAME, "is missing")
    return frozenset({NAME})


def _check(
    source: Checkpoint, pruned: Checkpoint, asked: list[Mapping[str, Any]], findings: Findings
) -> None:
    """asked: what was written, prune by prune."""
    expected: bytes | None = None
    try:
        if NAME in carried_files(source, pruned):
            expected = source.read_file(NAME, CONFIG)
        for members in asked:
            expected = _with(expected, members, source)
        found = pruned.read_file(NAME, CONFIG)
    except InputError as error:
        findings.add(NAME, f"cannot be compared: that of {error.where} {error.problem}")
        return
    if found == expected:
        return
    try:
        compare_values(NAME, "", _values(expected or b""), _values(found), findings)
    except (ValueError, RecursionError) as error:
        findings.add(NAME, f"is not valid JSON ({error})")
    if not findings.tells_of(NAME):
        findings.add(NAME, "is not the source's with the recorded settings, byte for byte")


def _values(raw: bytes) -> Any:
    return parse_json(raw, CONFIG, parse_constant=str)


def _with(raw: bytes | None, members: Mapping[str, Any], source: Checkpoint) -> bytes:
    """The file with these members; where there was none, with the token ids of the config too.

    Raises ConfigError where it is no JSON object.
    """
    if raw is None:
        made = {**token_ids(source.settings), **members}
        return (json.dumps(made, indent=2) + "\n").encode()
    document = Document.parse(raw, NAME)
    if not isinstance(document.value, dict):
        raise ConfigError(NAME, "is no JSON object")
    return document.edit(
        {
            (key,): value if key in document.value else Insert(value)
            for key, value in members.items()
        }
    )
