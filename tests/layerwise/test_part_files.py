"""The sums by part in score files: read back to the last bit, merged by dataset, never guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.calibration_file import Calibration, merge, read_calibration
from shardsurgeon.layerwise.parts import short_names
from shardsurgeon.operations.scores import convert_scores
from shardsurgeon.scores.files import read_scores, write_scores
from tests.layerwise.chats import assert_same
from tests.layerwise.files import EXPERTS, calibration, mixed
from tests.layerwise.files import sums as made_up

CODE, CHAT = "code.jsonl@sha256:bb0000000000", "org/chat(train)"
COPY = "again.jsonl@sha256:bb0000000000"
NAMES = ["s.safetensors", "s.npz", "s.json"]


def without_parts(whole: Calibration) -> Calibration:
    """As an earlier version wrote it."""
    layers = {layer: replace(sums, parts=None) for layer, sums in whole.layers.items()}
    return replace(whole, layers=layers)


@pytest.mark.parametrize("name", [pytest.param("s.pt", marks=pytest.mark.torch), *NAMES])
def test_parts_come_back_to_the_last_bit_and_are_no_scores(tmp_path: Path, name: str) -> None:
    before = mixed(3, CODE, CHAT)
    write_scores(tmp_path / name, before.content())
    after = read_calibration(tmp_path / name)
    assert [*after.mix] == ["@sha256:bb0000000000", CHAT]
    assert_same(after.layers, before.layers, rtol=0)
    assert [(part.name, part.records, part.tokens) for part in after.parts] == [
        ("code", 2, 100),
        ("chat", 2, 100),
    ]
    plain = tmp_path / f"plain-{name}"
    write_scores(plain, without_parts(before).content())
    with_them, without = read_scores(tmp_path / name), read_scores(plain)
    assert with_them.facts == without.facts and with_them.tokens == without.tokens
    for layer, metrics in without.layers.items():
        assert metrics.keys() == with_them.layers[layer].keys()
        assert all(np.array_equal(row, with_them.layers[layer][m]) for m, row in metrics.items())


def test_conversion_keeps_parts(tmp_path: Path) -> None:
    for one, other in zip(NAMES, [*NAMES[1:], "again.safetensors"], strict=True):
        if one == NAMES[0]:
            write_scores(tmp_path / one, mixed(3, CODE, CHAT).content())
        convert_scores(tmp_path / one, tmp_path / other)
    first, last = ((tmp_path / name).read_bytes() for name in (NAMES[0], "again.safetensors"))
    assert first == last


def test_a_file_has_one_array_for_all_parts_in_the_order_of_identities(tmp_path: Path) -> None:
    whole = mixed(3, CODE, CHAT)
    write_scores(tmp_path / "s.safetensors", whole.content())
    tensors = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    own = {name for name in tensors if name.startswith("parts.")}
    sums = [*whole.layers[1].arrays()]
    assert own == {f"parts.layers.{layer}.{name}" for layer in (1, 2, 5) for name in sums}
    found = tensors["parts.layers.2.norm_sum"]
    assert found.shape == (2, EXPERTS)
    np.testing.assert_array_equal(found[0], made_up(302).norm_sum)
    np.testing.assert_array_equal(found[1], made_up(312).norm_sum)
    assert tensors["parts.layers.2.total_tokens"].tolist() == [100, 100]


def test_a_file_over_one_dataset_is_what_it_was_before(tmp_path: Path) -> None:
    for name in NAMES:
        alone = mixed(3, CODE)
        write_scores(tmp_path / name, alone.content())
        write_scores(tmp_path / f"old-{name}", without_parts(alone).content())
        assert (tmp_path / name).read_bytes() == (tmp_path / f"old-{name}").read_bytes()
        again = read_calibration(tmp_path / name)
        assert [*again.mix] == ["@sha256:bb0000000000"] and again.parts == ()


def row(whole: Any, layer: str, name: str) -> Any:
    return whole["parts"][layer][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["parts"].pop("5"), "has parts of 2 layers, and sums of 3"),
        (lambda tree: tree["parts"].update({"5": 1}), "its parts of layer 5 are none"),
        (lambda tree: tree["parts"].update(router={"counts": [1]}), "its parts name 'router' a la"),
        (lambda tree: tree["parts"]["5"].pop("counts"), "has no accumulator 'counts'"),
        (lambda tree: row(tree, "5", "counts").pop(), r"counts, are not numbers of shape \[2, 6\]"),
        (lambda tree: row(tree, "5", "counts")[1].pop(), r"are not numbers of shape \[2, 6\]"),
        (lambda tree: row(tree, "5", "counts")[0].__setitem__(0, None), "are not numbers of shape"),
        (lambda tree: row(tree, "5", "counts")[0].__setitem__(0, 1), "counts than those of all"),
        (lambda tree: row(tree, "5", "norm_sum")[0].__setitem__(0, 10**400), "beyond all floats"),
        (lambda tree: row(tree, "5", "norm_sum")[0].__setitem__(0, -1), "5 of part 0, norm_sum ho"),
        (
            lambda tree: (
                tree["calibration"]["samples"].pop(2) and tree["calibration"]["samples"].pop()
            ),
            r"total_tokens, are not numbers of shape \[1\]",
        ),
        (lambda tree: tree["calibration"].pop("samples"), "does not say which samples"),
    ],
)
def test_damaged_parts_are_one_clear_line(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    write_scores(tmp_path / "s.json", mixed(3, CODE, CHAT).content())
    tree = json.loads((tmp_path / "s.json").read_text())
    change(tree)
    (tmp_path / "s.json").write_text(json.dumps(tree))
    with pytest.raises(ScoreError, match=message) as caught:
        read_calibration(tmp_path / "s.json")
    assert caught.value.where == str(tmp_path / "s.json")


def test_more_parts_than_any_mix_has_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mixed(3, CODE, CHAT)
    write_scores(tmp_path / "s.npz", whole.content())
    monkeypatch.setattr("shardsurgeon.layerwise.parts.MAX_NUMBERS", 2 * 3 * 7 * EXPERTS - 1)
    with pytest.raises(ScoreError, match="holds 2 parts, more than any mix has"):
        read_calibration(tmp_path / "s.npz")
    assert not whole.content().parts
    assert "sums of its 2 datasets apart: they are more than a file" in whole.lacks_parts


def test_parts_of_one_dataset_add_up_under_whatever_name_it_has() -> None:
    first, second, third = mixed(1, CODE, CHAT), mixed(2, COPY), mixed(3, CHAT, "org/math(train)")
    merged = merge([third, first, second], "merged.pt")
    assert [part.name for part in merged.parts] == ["again", "chat", "math"]
    for layer, sums in merged.layers.items():
        parts = sums.parts or {}
        for part, own in (
            ("@sha256:bb0000000000", (100 + layer, 200 + layer)),
            (CHAT, (110 + layer, 300 + layer)),
            ("org/math(train)", (310 + layer,)),
        ):
            expected = Accumulators.zeros(EXPERTS)
            for seed in own:
                expected.add(made_up(seed))
            assert_same({layer: parts[part]}, {layer: replace(expected, parts=None)}, rtol=1e-15)
    backwards = merge([second, first, third], "merged.pt")
    assert_same(merged.layers, backwards.layers, rtol=0)


def test_two_files_of_one_dataset_each_make_a_mix() -> None:
    merged = merge([without_parts(mixed(1, CODE)), calibration(2)], "merged.pt")
    assert [*merged.mix] == ["@sha256:bb0000000000", "c4"]
    assert_same(merged.mix["c4"], calibration(2).layers, rtol=0)
    assert not merged.lacks_parts


def test_a_mix_that_an_earlier_version_measured_leaves_the_merge_without_parts() -> None:
    old = without_parts(mixed(1, CODE, CHAT))
    assert old.mix == {} and old.parts == ()
    merged = merge([old, mixed(2, CODE, CHAT)], "merged.pt")
    assert merged.mix == {} and not merged.content().parts
    said = "does not keep the sums of its 2 datasets apart: an earlier version"
    assert merged.lacks_parts.startswith(said)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["code.jsonl@sha256:aa", "org/chat(train)"], ["code", "chat"]),
        (["a.b.jsonl@sha256:aa", "chats@sha256:bb"], ["a.b", "chats"]),
        (
            ["org/code[python](train)", "org/code[java](train)"],
            ["code[java](train)", "code[python](train)"],
        ),
        (
            ["one/code(train)", "two/code(train)", "c4"],
            ["c4", "one/code(train)", "two/code(train)"],
        ),
        (["code.jsonl@sha256:aa", "code.txt@sha256:bb"], ["code.jsonl", "code.txt"]),
        (
            ["code.jsonl@sha256:aa", "code.jsonl@sha256:bb"],
            ["code.jsonl@sha256:aa", "code.jsonl@sha256:bb"],
        ),
        (["code.jsonl@sha256:aa", "copy.jsonl@sha256:aa"], ["code"]),
        (
            ["org/code@v1(train)", "org/code@v2(train)"],
            ["org/code@v1(train)", "org/code@v2(train)"],
        ),
    ],
)
def test_parts_have_short_names_no_two_alike(sources: list[str], names: list[str]) -> None:
    assert [*short_names(sources).values()] == names


PIECES = st.sampled_from(
    ["a", "b", "a/b", "a.jsonl@sha256:a", "b@sha256:a", "a[b]", "b(a)", "x/a@b"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=6))
def test_no_two_datasets_have_one_name_whatever_a_file_calls_them(sources: list[str]) -> None:
    names = short_names(sources)
    assert [*names] == sorted(names)
    assert len({*names.values()}) == len(names)
