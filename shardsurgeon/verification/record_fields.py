"""What the record of a prune says besides its keep-lists: its fields, and the saliencies in it.

A record that was read is written anew, and every field must be the one that is there: those that
nothing reads (the method, the extremes, what repeats the last step) as well. Its saliencies must
justify the choice of experts, and be those of the score file or plan that is kept beside it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER, EVALUATION_NAME, RECIPE_NAME
from shardsurgeon.checkpoint.layer_names import layer_number
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, LayerRecord, Provenance
from shardsurgeon.errors import InputError
from shardsurgeon.storage.formats.strict_json import as_number, brief, parse_json
from shardsurgeon.storage.limits import KEEP_LIST, METADATA, read_limited
from shardsurgeon.verification.files import carried_files
from shardsurgeon.verification.findings import Findings

_LEAST = "min_retained_saliency"
_MOST = "max_pruned_saliency"
_SELECTIONS = ("ratio", "keep", "target-size", "plan")
_ROUNDINGS = ("floor", "nearest", "ceil")
_POLICIES = ("scores", "plan")
_MTP_POLICIES = (*_POLICIES, "router-norm", "last", "keep")
# Types whose values are equal where `==` says so; it says so of 1 and true.
_PLAIN = {int, float, str, type(None)}
_OF_OTHERS = f"{CALIBRATION_FOLDER}reap_pruning_metadata.source"
# Of these, and with a number behind their names where an earlier prune left some.
_NO_SCORES = (_OF_OTHERS, RECIPE_NAME.removesuffix(".toml"), EVALUATION_NAME.removesuffix(".json"))


def check_fields(anatomy: Anatomy, pruned: Checkpoint, findings: Findings) -> None:
    """Every field of the record is there, of its type, and true of the others."""
    record = pruned.provenance
    if record is None:
        return
    found = parse_json(pruned.read_file(PROVENANCE_NAME, METADATA), METADATA)
    # Earlier versions, and records made by hand, leave out what can be done without.
    is_old = record.sha256 is None
    groups = record.n_group if is_old else anatomy.n_group
    expected = parse_json(replace(record, n_group=groups).to_bytes(), METADATA)
    for key in ("ratio", "source") if is_old else ():
        del expected[key]
    if found.get("ratio") == record.steps[-1].ratio:
        # Earlier versions wrote the ratio asked for, whatever was removed.
        expected["ratio"] = found["ratio"]
    for path, problem in _differences("", expected, found, is_old):
        findings.add(f"{PROVENANCE_NAME} {path}", problem)
    for number, step in enumerate(record.steps):
        place = f"{PROVENANCE_NAME} steps.{number}"
        if step.selection not in _SELECTIONS:
            findings.add(place, f"selection is {brief(step.selection)}, known are {_SELECTIONS}")
        elif (step.metric is None) != (step.selection == "plan"):
            findings.add(place, f"metric {step.metric} does not go with a {step.selection}")
        if (step.rounding in _ROUNDINGS) != (step.selection == "ratio") and not is_old:
            findings.add(place, f"rounding {step.rounding} does not go with a {step.selection}")
        if not 0 <= step.ratio < 1:
            findings.add(place, f"ratio is {step.ratio}, expected 0 to 1")
    for key, fields in found["layers"].items():
        place, groups = f"{PROVENANCE_NAME} layers.{key}", fields.get("groups")
        policy = record.layers[int(key)].policy
        if policy not in (_POLICIES if int(key) < anatomy.num_layers else _MTP_POLICIES):
            findings.add(place, f"policy is {brief(policy)}, which decides no such layer")
        # Only within a group is the order promised.
        for number, group in enumerate(groups or [fields]):
            _check_order(f"{place}.groups[{number}]" if groups else place, group, findings)


def _differences(path: str, expected: Any, found: Any, is_old: bool) -> Iterator[tuple[str, str]]:
    """(place, what is wrong there) of a JSON value that is not the expected one."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if not is_old:
            yield from ((f"{path}{key}", "is missing") for key in expected if key not in found)
            extra = (key for key in found if key not in expected)
            yield from ((f"{path}{key}", "is no field of a record") for key in extra)
        for key in [key for key in expected if key in found]:
            yield from _differences(f"{path}{key}.", expected[key], found[key], is_old)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        # Of saliencies there are as many as experts.
        if expected == found and _PLAIN.issuperset(map(type, chain(expected, found))):
            return
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{path}{number}.", *pair, is_old)
    elif isinstance(expected, bool) != isinstance(found, bool) or expected != found:
        unknown = is_old and expected is None and as_number(found) is not None
        if not unknown:
            yield path.rstrip("."), f"is {brief(found)}, expected {brief(expected)}"


def _check_order(where: str, fields: object, findings: Findings) -> None:
    least, most = _number(fields, _LEAST), _number(fields, _MOST)
    if least is not None and most is not None and least < most:
        findings.add(where, f"{_LEAST} {least} is below {_MOST} {most}")


def _number(fields: object, key: str) -> float | None:
    return as_number(fields.get(key)) if isinstance(fields, Mapping) else None


def check_saliencies(
    source: Checkpoint, anatomy: Anatomy, pruned: Checkpoint, findings: Findings
) -> None:
    """The saliencies are those of the score file, or plan, that is kept beside the record."""
    record = pruned.provenance
    if record is None or all(value is None for value in _all_saliencies(record)):
        return
    known = carried_files(source, pruned)
    kept = [
        file
        for file in pruned.files
        if file.name.startswith(CALIBRATION_FOLDER)
        and file.name not in known | {PROVENANCE_NAME}
        and not file.name.startswith(_NO_SCORES)
        and (record.files is None or file.name in record.files)
    ]
    if len(kept) != 1:
        which = "no file" if not kept else "more than one file"
        findings.note(f"{which} beside the record says where its saliencies are from")
        return
    name = kept[0].name
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pruned.source.local_path(name)
            if path is None:
                path = Path(folder, name.rpartition("/")[2])
                with path.open("wb") as copy:
                    for piece in pruned.source.stream(name, 0, kept[0].nbytes):
                        copy.write(piece)
            tables = list(_tables(path, record.steps[-1].metric, anatomy))
    except InputError as error:
        findings.add(name, f"cannot be compared with the saliencies: {error.problem}")
        return
    problems = [list(_unlike(record, source.provenance, table)) for table in tables]
    for layer, problem in min(problems, key=len, default=[]):
        findings.add(f"{PROVENANCE_NAME} layers.{layer}", f"{problem} in {name}")


def _all_saliencies(record: Provenance) -> Iterator[float | None]:
    return (value for layer in record.layers.values() for value in layer.saliency)


_Table = Mapping[int, list[float | None]]


def _tables(path: Path, metric: str | None, anatomy: Anatomy) -> Iterator[_Table]:
    """What the file says of each layer, one value per expert: once for every way to read it.

    metric: the one that decided; None where the file is a keep-list, whose own saliencies count.
    """
    if metric is None:
        yield _of_plan(path)
        return
    from shardsurgeon.scores.files import read_scores
    from shardsurgeon.scores.rankings import RankingOrder, as_ranking

    scores = read_scores(path).assign_rows([layer.index for layer in anatomy.main_layers])
    readings = [scores]
    for order in RankingOrder:
        try:
            readings.append(as_ranking(scores, metric, order))
        except InputError:
            continue
    mtp = [layer.index for layer in anatomy.mtp_layers]
    for reading in readings:
        _, table = reading.select(metric)
        yield {layer_number(n, anatomy.num_layers, mtp): row.tolist() for n, row in table.items()}


def _of_plan(path: Path) -> _Table:
    """The saliencies of a plan.json of ours; nothing of any other keep-list."""
    try:
        layers = parse_json(read_limited(path, KEEP_LIST, InputError), KEEP_LIST)["layers"]
        rows = {int(layer): fields["saliency"] for layer, fields in layers.items()}
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {layer: row for layer, row in rows.items() if isinstance(row, list)}


def _unlike(
    record: Provenance, earlier: Provenance | None, table: _Table
) -> Iterator[tuple[int, str]]:
    """(layer, what differs) of those that the table decided."""
    for number, layer in sorted(record.layers.items()):
        row = table.get(number)
        if row is None or layer.policy not in ("scores", "plan"):
            continue
        before = None if earlier is None else earlier.layers.get(number)
        there = range(layer.num_experts) if before is None else before.retained
        if len(row) == layer.num_experts:
            row = [row[old_id] for old_id in there]
        if len(row) != len(there):
            yield number, f"has {len(there)} experts, {len(row)} are scored"
            continue
        yield from ((number, text) for text in _first_unlike(layer, there, row))


def _first_unlike(
    layer: LayerRecord, there: range | tuple[int, ...], row: list[float | None]
) -> Iterator[str]:
    for old_id, value in zip(there, row, strict=True):
        said = layer.saliency[old_id]
        finite = as_number(value)
        expected = None if finite is None or finite - finite != 0 else finite
        if said != expected:
            yield f"saliency {old_id} is {json.dumps(said)}, it is {json.dumps(expected)}"
            return
