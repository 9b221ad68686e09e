"""The metadata file: what it says, byte for byte, and what is refused when it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.provenance import (
    LayerRecord,
    Provenance,
    SourceIdentity,
    Step,
    parse_provenance,
)
from shardsurgeon.errors import CheckpointError

SOURCE = SourceIdentity("tiny", None, "ab" * 32)


def single(n_group: int = 1) -> Provenance:
    record = LayerRecord(
        retained=(0, 2, 3),
        pruned=(1,),
        preserved=(3,),
        saliency=(0.5, 0.1, 1e-300, None),
        policy="scores",
    )
    return Provenance(
        4, 3, n_group, {1: record}, (Step(4, 3, 0.3, "floor", "reap", "ratio", SOURCE),)
    )


def document() -> dict[str, Any]:
    """A two-step record of six experts in two groups, as plain JSON values."""
    layer = {
        "retained": [1, 4],
        "pruned": [0, 2, 3, 5],
        "preserved": [4],
        "min_retained_saliency": 3.0,
        "max_pruned_saliency": 2.0,
        "policy": "scores",
        "groups": [
            {"min_retained_saliency": 3.0, "max_pruned_saliency": 1.0},
            {"min_retained_saliency": None, "max_pruned_saliency": 2.0},
        ],
        "saliency": [1.0, 3.0, None, 0.5, 0.25, 2.0],
    }
    source = {"name": "tiny", "revision": "main", "config_sha256": "cd" * 32}
    step = {"rounding": None, "metric": "reap", "selection": "keep", "source": source}
    first = {"num_experts_before": 6, "num_experts_after": 4, "ratio": 1 / 3, **step}
    last = {"num_experts_before": 4, "num_experts_after": 2, "ratio": 0.5, **step}
    return {
        "format": 1,
        "method": "reap",
        "metric": "reap",
        "ratio": 2 / 3,
        "rounding": None,
        "num_experts_before": 6,
        "num_experts_after": 2,
        "source": source,
        "steps": [first, last],
        "layers": {"10": layer, "2": layer},
    }


def test_the_file_says_what_the_contract_promises() -> None:
    assert single().to_bytes().decode() == (
        "{\n"
        '  "format": 1,\n'
        '  "method": "reap",\n'
        '  "metric": "reap",\n'
        '  "ratio": 0.3,\n'
        '  "rounding": "floor",\n'
        '  "num_experts_before": 4,\n'
        '  "num_experts_after": 3,\n'
        '  "source": {"name": "tiny", "revision": null, "config_sha256": "' + "ab" * 32 + '"},\n'
        '  "steps": [\n'
        '    {"num_experts_before": 4, "num_experts_after": 3, "ratio": 0.3, '
        '"rounding": "floor", "metric": "reap", "selection": "ratio", '
        '"source": {"name": "tiny", "revision": null, "config_sha256": "' + "ab" * 32 + '"}}\n'
        "  ],\n"
        '  "layers": {\n'
        '    "1": {"retained": [0, 2, 3], "pruned": [1], "preserved": [3], '
        '"min_retained_saliency": 1e-300, "max_pruned_saliency": 0.1, '
        '"policy": "scores", "saliency": [0.5, 0.1, 1e-300, null]}\n'
        "  }\n"
        "}\n"
    )


def test_a_cut_with_nothing_known_on_a_side_is_null() -> None:
    record = LayerRecord((0, 1), (2, 3), (0,), (5.0, None, None, None))
    assert record.cut(range(4)) == {"min_retained_saliency": None, "max_pruned_saliency": None}


def test_group_limited_routing_records_the_cut_of_every_group() -> None:
    record = LayerRecord((0, 3), (1, 2), (), (9.0, 8.0, 1.0, 2.0))
    steps = (Step(4, 2, 0.5, "floor", "reap", "ratio", SOURCE),)
    layer = json.loads(Provenance(4, 2, 2, {1: record}, steps).to_bytes())["layers"]["1"]
    assert layer["groups"] == [
        {"min_retained_saliency": 9.0, "max_pruned_saliency": 8.0},
        {"min_retained_saliency": 2.0, "max_pruned_saliency": 1.0},
    ]
    assert (layer["min_retained_saliency"], layer["max_pruned_saliency"]) == (2.0, 8.0)


def test_the_files_of_a_prune_and_its_globs_are_listed_and_read_back() -> None:
    files = {"b.json": 7, "a\udcff": 0, "sub/c.txt": 2**40}
    written = replace(single(), files=files, include=("eval/*",), exclude=("*.pdf", "x"))
    said = json.loads(written.to_bytes())
    assert list(said["files"].items()) == sorted(files.items())
    assert (said["include"], said["exclude"]) == (["eval/*"], ["*.pdf", "x"])
    assert parse_provenance(written.to_bytes(), "metadata") == written
    assert parse_provenance(single().to_bytes(), "metadata").files is None
    digests = {"b.json": "ab" * 32, "a\udcff": "cd" * 32}
    written = replace(written, sha256=digests)
    said = json.loads(written.to_bytes())
    assert list(said["sha256"].items()) == sorted(digests.items()) and list(said)[-1] == "sha256"
    assert parse_provenance(written.to_bytes(), "metadata") == written


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": ["a.json"]}, "files: found list, expected an object"),
        ({"files": {"a.json": "7"}}, "files: a.json is not given a size in bytes"),
        ({"files": {"a.json": True}}, "files: a.json is not given a size in bytes"),
        ({"files": {"a.json": -1}}, "files: a.json is not given a size in bytes"),
        ({"files": {"a.json": 10**400}}, "files: a.json is not given a size in bytes"),
        ({"files": {"a": 1}, "sha256": []}, "sha256: found list, expected an object"),
        ({"files": {"a": 1}, "sha256": {"a": 1}}, "sha256: a is not given a SHA-256"),
        ({"files": {"a": 1}, "sha256": {"a": "AB" * 32}}, "sha256: a is not given a SHA-256"),
        ({"files": {"a": 1}, "sha256": {"a": "ab" * 31}}, "sha256: a is not given a SHA-256"),
        ({"files": {"a": 1}, "sha256": {"b": "ab" * 32}}, "sha256: b is none of the files"),
        ({"include": "a*"}, "include: not a list of globs"),
        ({"exclude": [1]}, "exclude: not a list of globs"),
    ],
)
def test_a_list_of_files_that_is_none_is_refused(changes: dict[str, Any], says: str) -> None:
    raw = json.dumps({**document(), **changes}).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_provenance(raw, "metadata")
    assert says in str(caught.value)


def unequal(**changes: Any) -> bytes:
    """Two layers of six and four experts that keep three and four of them."""
    source = {"name": "tiny", "revision": None, "config_sha256": None}
    rest = {"ratio": 0.3, "rounding": None, "metric": None, "selection": "plan", "source": source}
    step = {"num_experts_before": 6, "num_experts_after": 4, **rest}
    layers: dict[str, dict[str, Any]] = {
        "1": {"retained": [0, 2, 5], "pruned": [1, 3, 4]},
        "2": {"num_experts_before": 4, "retained": [0, 1, 2, 3], "pruned": []},
    }
    layers["1"].update(changes.pop("first", {}))
    layers["2"].update(changes.pop("second", {}))
    return json.dumps({"format": 2, **step, "steps": [step], "layers": layers, **changes}).encode()


def test_layers_with_different_numbers_of_experts_make_a_file_of_format_2() -> None:
    provenance = parse_provenance(unequal(), "metadata")
    counts = {n: (r.num_experts, len(r.retained)) for n, r in provenance.layers.items()}
    assert counts == {1: (6, 3), 2: (4, 4)}
    assert (provenance.num_experts_before, provenance.num_experts_after) == (6, 4)
    assert provenance.ratio == 3 / 10
    written = json.loads(provenance.to_bytes())
    assert written["format"] == 2
    assert "num_experts_before" not in written["layers"]["1"]
    assert written["layers"]["2"]["num_experts_before"] == 4
    assert parse_provenance(provenance.to_bytes(), "metadata") == provenance


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 1}, "layers.1: 3 retained and 3 pruned experts, expected 4 and 2"),
        ({"second": {"num_experts_before": 7}}, "layers.2: 7 experts before, no layer had more"),
        ({"second": {"num_experts_before": True}}, "layers.2.num_experts_before: not a positive"),
        ({"second": {"retained": [0, 1, 2]}}, "layers.2: 3 retained and 0 pruned experts"),
        ({"first": {"retained": [], "pruned": [0, 1, 2, 3, 4, 5]}}, "layers.1: 0 retained"),
        (
            {"first": {"retained": [0, 1, 2, 3, 4], "pruned": [5]}},
            "layers.1: 5 retained and 1 pruned experts, expected at most 4 and 2",
        ),
        ({"num_experts_after": 5}, "steps: 6 to 4 do not lead from 6 to 5 experts"),
        ({"num_experts_before": 60_000}, "3 retained and 3 pruned experts, expected at most 4"),
    ],
)
def test_layers_that_differ_are_still_held_against_the_head(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_provenance(unequal(**changes), "metadata")
    assert says in str(caught.value)


def test_reading_and_writing_agree_on_a_chain_with_groups() -> None:
    raw = json.dumps(document()).encode()
    provenance = parse_provenance(raw, "metadata")
    assert (provenance.num_experts_before, provenance.num_experts_after) == (6, 2)
    assert provenance.n_group == 2
    assert sorted(provenance.layers) == [2, 10]
    assert provenance.layers[2].preserved == (4,)
    written = json.loads(provenance.to_bytes())
    assert written == document()
    assert list(written["layers"]) == ["2", "10"]
    assert parse_provenance(provenance.to_bytes(), "again") == provenance


def test_without_a_ratio_asked_for_the_ratio_is_the_fraction_of_the_original_that_is_gone() -> None:
    provenance = parse_provenance(json.dumps(document()).encode(), "metadata")
    assert provenance.ratio == 4 / 6
    assert single().ratio == 0.3


def test_a_file_with_only_the_contracts_keys_is_read() -> None:
    minimal = document()
    del minimal["steps"]
    for layer in minimal["layers"].values():
        for key in ("policy", "groups", "saliency", "preserved"):
            layer.pop(key, None)
    provenance = parse_provenance(json.dumps(minimal).encode(), "metadata")
    assert provenance.layers[2] == LayerRecord((1, 4), (0, 2, 3, 5), (), (None,) * 6, "scores")
    (step,) = provenance.steps
    assert (step.num_experts_before, step.num_experts_after, step.metric) == (6, 2, "reap")


def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """An edit of the document: the value at `path` becomes `to`."""

    def edit(top: Any) -> None:
        for key in path[:-1]:
            top = top[key]
        top[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change("format", to=3), "format is 3, known are 1 and 2"),
        (change("format", to=None), "format is null, known are 1 and 2"),
        (change("format", to=True), "format is true, known are 1 and 2"),
        (change("num_experts_before", to="6"), "num_experts_before: not a positive whole number"),
        (change("num_experts_before", to=60_000), "expected 2 and 59998"),
        (change("num_experts_after", to=6), "6 of 6 experts are left"),
        (change("layers", to=[]), "layers: found list, expected an object"),
        (change("layers", to={}), "holds 0 layers"),
        (change("layers", "x", to={}), "layers.x: not a layer number"),
        (change("layers", "02", to={}), "layers.02: not a layer number"),
        (change("layers", "²", to={}), "not a layer number"),
        (change("layers", "3", to=None), "layers.3: found NoneType, expected an object"),
        (change("layers", "2", "retained", to=[4, 1]), "layers.2.retained: 2 ids that do not"),
        (change("layers", "2", "retained", to=[1, 5]), "are not the ids 0 to 5, each once"),
        (change("layers", "2", "retained", to=[1]), "1 retained and 4 pruned"),
        (change("layers", "2", "retained", to=[True, 4]), "not a list of expert ids"),
        (change("layers", "2", "pruned", to=7), "layers.2.pruned: not a list of expert ids"),
        (change("layers", "2", "preserved", to=[0]), "preserved experts (0,) are not all"),
        (change("layers", "2", "saliency", to=[1.0]), "1 values, expected 6"),
        (change("layers", "2", "saliency", to="x"), "str, expected 6"),
        (
            change("layers", "2", "saliency", 3, to="x"),
            "layers.2.saliency[3]: found str, expected a",
        ),
        (change("layers", "2", "saliency", 3, to=10**400), "saliency[3]: too large a number"),
        (change("layers", "2", "policy", to=3), "layers.2.policy: found int, expected text"),
        (change("layers", "2", "groups", to={}), "layers.2.groups: not a list of groups"),
        (change("layers", "2", "groups", to=None), "[1, 2] groups do not fit"),
        (change("steps", to=[]), "steps: not a list of prunes"),
        (change("steps", 1, to=3), "steps[1]: found int, expected an object"),
        (change("steps", 0, "num_experts_after", to=5), "6 to 5, 4 to 2 do not lead from 6 to 2"),
        (change("steps", 1, "num_experts_after", to=3), "do not lead from 6 to 2 experts"),
        (change("steps", 0, "ratio", to="half"), "steps[0].ratio: found str, expected a number"),
        (
            change("steps", 0, "source", to=None),
            "steps[0].source: found NoneType, expected an object",
        ),
        (
            change("steps", 0, "source", "name", to=1),
            "steps[0].source.name: found int, expected text",
        ),
    ],
)
def test_a_record_that_is_not_whole_is_refused_with_its_place(
    edit: Callable[[dict[str, Any]], None], says: str
) -> None:
    broken = document()
    broken["layers"]["2"] = dict(broken["layers"]["2"], saliency=[1.0] * 6)
    broken["steps"][0]["source"] = dict(broken["steps"][0]["source"])
    edit(broken)
    with pytest.raises(CheckpointError) as caught:
        parse_provenance(json.dumps(broken).encode(), "m/reap.json")
    assert str(caught.value).startswith("m/reap.json: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b'{"format": 1, "format": 1}', "the key 'format' stands there twice"),
        (b'{"format": 1, "ratio": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "the document: found list, expected an object"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_bytes_that_are_no_record_are_refused(raw: bytes, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_provenance(raw, "m/reap.json")
    assert says in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_are_read_or_refused_but_never_crash(data: st.DataObject) -> None:
    raw = bytearray(json.dumps(document()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 4))] = data.draw(
            st.sampled_from([b"", b"0", b"-", b"9e999", b"[", b'"', b"null", b"\x00", b"{}"])
        )
    try:
        parse_provenance(bytes(raw), "m/reap.json")
    except CheckpointError as error:
        assert error.where == "m/reap.json"
