"""The record of a prune, field by field, and its saliencies against the scores kept beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import CheckpointError
from shardsurgeon.operations import api
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.record import check_layers, read_keeps
from shardsurgeon.verification.record_fields import check_fields, check_saliencies
from shardsurgeon.verification.strays import check_recorded
from shardsurgeon.verification.verify import verify_checkpoint

FIXTURES = Path(__file__).parents[2] / "fixtures"
GROUPED = FIXTURES / "deepseek_v3"
HUGE = 10**400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prune of a model with router groups and an MTP layer. Not to be changed."""
    out = tmp_path_factory.mktemp("fields") / "out"
    api.apply(api.plan(GROUPED, GROUPED / "scores.pt", ratio=0.5), out)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def content(out: Path) -> Any:
    return json.loads((out / PROVENANCE_NAME).read_bytes())


def spoiled(out: Path, record: Any) -> tuple[str, ...]:
    (out / PROVENANCE_NAME).write_text(json.dumps(record))
    return verify_checkpoint(GROUPED, out, sample=1).differences


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every member of every object of a record, and the first item of every list."""
    members = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
    for key, inner in members:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def short(record: Any) -> list[tuple[Any, ...]]:
    """Places of a record without those that repeat others: one layer, one file."""
    files = next(iter(record["files"]))
    return [
        path
        for path in places(record)
        if not (path[0] in ("files", "sha256") and len(path) > 1 and path[1] != files)
        and not (path[0] == "layers" and len(path) > 1 and path[1] != "1")
    ]


def told(out: Path, record: Any) -> bool:
    """Whether the record is refused, or a difference found in it, without a look at the weights."""
    (out / PROVENANCE_NAME).write_text(json.dumps(record))
    findings = Findings()
    try:
        source, pruned = open_checkpoint(GROUPED), open_checkpoint(out)
    except CheckpointError:
        return True
    anatomy = read_anatomy(source)
    keeps = read_keeps(source, anatomy, pruned, findings)
    if keeps is not None:
        check_layers(anatomy, pruned, keeps, False, findings)
    check_fields(anatomy, pruned, findings)
    check_saliencies(source, anatomy, pruned, findings)
    check_recorded(pruned, findings, complete=False)
    return findings.count > 0


def test_no_field_can_be_missing(made: Path, copy: Path) -> None:
    """By hand: each field of a record that holds is taken out in turn."""
    for path in short(content(made)):
        record = content(made)
        parent = at(record, path[:-1])
        # Without a list of files it is a record of an earlier version.
        if isinstance(parent, dict) and path not in (("sha256",), ("files",)):
            del parent[path[-1]]
            assert told(copy, record), path


@pytest.mark.parametrize(
    "value", [True, None, "x", -1, HUGE, [], {"x": HUGE}], ids=lambda value: str(value)[:9]
)
def test_no_field_can_be_of_another_type_or_value(made: Path, copy: Path, value: object) -> None:
    for path in short(content(made)):
        record = content(made)
        if at(record, path) == value and type(at(record, path)) is type(value):
            continue
        at(record, path[:-1])[path[-1]] = value
        assert told(copy, record), path


@pytest.mark.parametrize("where", [(), ("layers", "1"), ("steps", 0), ("steps", 0, "source")])
def test_a_field_that_no_record_has_is_named(
    made: Path, copy: Path, where: tuple[Any, ...]
) -> None:
    record = content(made)
    at(record, where)["oddity"] = 1
    (line,) = spoiled(copy, record)
    assert line.startswith(PROVENANCE_NAME) and line.endswith("oddity: is no field of a record")


def test_numbers_that_no_list_can_be_as_long_as_are_told_in_a_line(made: Path, copy: Path) -> None:
    """Format 2 allows any count up to the one before."""
    record = content(made)
    record.update(format=2, num_experts_before=HUGE, num_experts_after=HUGE)
    record["steps"][0].update(num_experts_before=HUGE, num_experts_after=HUGE)
    (line,) = spoiled(copy, record)
    assert line.startswith(str(copy / PROVENANCE_NAME))


def test_a_record_of_an_earlier_version_may_leave_out_what_can_be_done_without(
    made: Path, copy: Path
) -> None:
    record = content(made)
    for key in ("sha256", "files", "steps", "method", "rounding"):
        del record[key]
    for layer in record["layers"].values():
        for key in ("policy", "min_retained_saliency", "groups", "preserved"):
            layer.pop(key)
    assert spoiled(copy, record) == ()
    record["layers"]["1"]["max_pruned_saliency"] = "much"
    assert "max_pruned_saliency: is 'much', expected" in spoiled(copy, record)[0]


# Saliencies


def _more(record: Any) -> None:
    """Expert 0's saliency is another one, and the extremes are true of it."""
    layer = record["layers"]["1"]
    layer["saliency"][layer["pruned"][0]] = -5.0


def test_saliencies_are_those_of_the_scores_beside_them(made: Path, copy: Path) -> None:
    record = content(made)
    _more(record)
    (line,) = spoiled(copy, record)
    assert line.startswith(f"{PROVENANCE_NAME} layers.1: saliency ")
    assert "is -5.0, it is " in line and line.endswith("in calibration/scores.pt")


def test_a_saliency_that_is_unknown_and_one_that_was_made_up_are_found(
    made: Path, copy: Path
) -> None:
    record = content(made)
    ids = record["layers"]["2"]["pruned"]
    record["layers"]["2"]["saliency"][ids[0]] = None
    assert any("is null, it is 0." in line for line in spoiled(copy, record))


def test_scores_that_cannot_be_read_are_found(copy: Path) -> None:
    (copy / "calibration" / "scores.pt").write_bytes(b"no scores")
    found = verify_checkpoint(GROUPED, copy, sample=1).differences
    assert any("cannot be compared with the saliencies" in line for line in found)


def test_a_far_model_is_compared_as_well(made: Path) -> None:
    files = {
        path.relative_to(made).as_posix(): path.read_bytes()
        for path in made.rglob("*")
        if path.is_file()
    }
    assert verify_checkpoint(GROUPED, MemorySource(files, remote=True)).verdict == "identical"
    record = content(made)
    _more(record)
    files[PROVENANCE_NAME] = json.dumps(record).encode()
    (line,) = verify_checkpoint(GROUPED, MemorySource(files, remote=True)).differences
    assert "is -5.0" in line


Ways = dict[str, Callable[[Path], dict[str, Any]]]
QWEN = FIXTURES / "qwen3_moe"


def _scores(folder: Path) -> dict[int, list[float]]:
    _, table = read_scores(QWEN / "scores.pt").select()
    return {int(layer): row.tolist() for layer, row in table.items()}


def _with_odd_values(folder: Path) -> dict[str, Any]:
    """A never-routed expert and one that is preserved by an infinite score."""
    scores = _scores(folder)
    scores[min(scores)][0], scores[min(scores)][1] = float("nan"), float("inf")
    tables = {f"layers.{layer}": np.array(row) for layer, row in scores.items()}
    np.savez(folder / "odd.npz", **tables)
    return {"scores": folder / "odd.npz", "keep": 8}


def _in_rows(folder: Path) -> dict[str, Any]:
    np.savez(folder / "rows.npz", reap=np.array([*_scores(folder).values()]))
    return {"scores": folder / "rows.npz", "keep": 8}


def _ranked(folder: Path) -> dict[str, Any]:
    order = {layer: np.argsort(row).tolist() for layer, row in _scores(folder).items()}
    (folder / "ranked.json").write_text(json.dumps(order))
    return {"scores": folder / "ranked.json", "keep": 8, "lists": "worst-first"}


def _by_plan(folder: Path) -> dict[str, Any]:
    api.plan(QWEN, QWEN / "scores.pt", keep=8).write_plan(folder / "plan.json")
    return {"plan_file": folder / "plan.json"}


def _by_list(folder: Path) -> dict[str, Any]:
    lists = {layer: {"kept": list(range(8)), "keep": 8} for layer in _scores(folder)}
    (folder / "list.json").write_text(json.dumps(lists))
    return {"plan_file": folder / "list.json"}


WAYS: Ways = {
    "odd values": _with_odd_values,
    "rows": _in_rows,
    "a ranking": _ranked,
    "a plan": _by_plan,
    "a keep-list": _by_list,
    "another metric": lambda folder: {
        "checkpoint": GROUPED,
        "scores": GROUPED / "scores.pt",
        "keep": 8,
        "metric": "ean_mean",
    },
    "layers that differ": lambda folder: {
        "scores": QWEN / "scores.pt",
        "ratio": 0.5,
        "allocate": "global",
        "allow_nonuniform": True,
    },
    "super experts": lambda folder: {
        "checkpoint": GROUPED,
        "scores": GROUPED / "scores.pt",
        "keep": 8,
        "preserve_super_experts": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_prune_leaves_a_record_that_holds(way: str, tmp_path: Path) -> None:
    asked = {"checkpoint": QWEN, **WAYS[way](tmp_path)}
    api.apply(api.plan(**asked), tmp_path / "out")
    report = verify_checkpoint(asked["checkpoint"], tmp_path / "out")
    assert (report.verdict, report.differences, report.notes) == ("identical", (), ())


def test_a_plans_saliencies_are_compared_as_scores_are(tmp_path: Path) -> None:
    api.apply(api.plan(QWEN, **_by_plan(tmp_path)), tmp_path / "out")
    record = content(tmp_path / "out")
    layer = next(iter(record["layers"].values()))
    layer["saliency"][layer["pruned"][0]] = -5.0
    (tmp_path / "out" / PROVENANCE_NAME).write_text(json.dumps(record))
    (line,) = verify_checkpoint(QWEN, tmp_path / "out").differences
    assert "is -5.0, it is " in line and line.endswith("in calibration/plan.json")


@pytest.mark.parametrize("scored", ["for the original", "for the prune"])
def test_a_prune_of_a_prune_holds_by_either_scores(made: Path, tmp_path: Path, scored: str) -> None:
    scores: Path | Any = GROUPED / "scores.pt"
    if scored == "for the prune":
        table = {n: np.arange(12) + 0.5 for n in open_checkpoint(made).provenance.layers}  # type: ignore[union-attr]
        np.savez(tmp_path / "own.npz", **{f"layers.{n}": row for n, row in table.items()})
        scores = tmp_path / "own.npz"
    out = tmp_path / "twice"
    api.apply(api.plan(made, scores, keep=8), out)
    report = verify_checkpoint(made, out)
    assert (report.differences, report.notes) == ((), ())
    # The first model's scores are not these experts', so nothing says where they are from.
    assert verify_checkpoint(GROUPED, out).differences == ()


def test_scores_given_as_a_table_leave_nothing_to_compare_with(tmp_path: Path) -> None:
    api.apply(api.plan(QWEN, api_scores(), keep=8), tmp_path / "out")
    report = verify_checkpoint(QWEN, tmp_path / "out")
    assert report.verdict == "identical"
    assert report.notes == ("no file beside the record says where its saliencies are from",)


def api_scores() -> Any:
    return read_scores(QWEN / "scores.pt")
