"""Small JSON files: what is refused, and that a refusal names the file and the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.strict_json import (
    CheckedJson,
    as_number,
    is_whole_number,
    parse_json,
    read_object,
)
from shardsurgeon.storage.limits import METADATA, SCORES_JSON


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "can't decode"),
        (b"[" * 200 + b"]" * 200, "nested deeper than 100 levels"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands there twice"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
    ],
)
def test_what_is_not_json_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text, METADATA)


def test_a_byte_order_mark_before_the_text_is_passed_over() -> None:
    marked = b'\xef\xbb\xbf{"a": 1}'
    assert parse_json(marked, METADATA) == {"a": 1}
    assert read_object(marked, "x.json", "the file", ScoreError, "", SCORES_JSON) == {"a": 1}
    with pytest.raises(ScoreError, match="not JSON"):
        read_object(b"\xef\xbb\xbf" + marked, "x.json", "the file", ScoreError, "", SCORES_JSON)


def test_numbers_are_read_as_the_caller_says() -> None:
    assert parse_json(b"[1e-6, 2]", METADATA, parse_float=str) == ["1e-6", 2]
    assert parse_json(b"[Infinity]", METADATA, parse_constant=float) == [float("inf")]


def test_true_is_not_a_whole_number_and_neither_is_a_float() -> None:
    assert [is_whole_number(value) for value in (0, -1, True, 1.0, "1", None)] == [True] + 5 * [
        False
    ]
    assert is_whole_number(1, 1)
    assert not is_whole_number(0, 1)


def test_an_integer_beyond_all_floats_is_not_a_number() -> None:
    assert [as_number(value) for value in (2, 0.5, True, "1", 10**400)] == [2, 0.5, *3 * [None]]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda json: json.as_object([], "layers"), "layers: found list, expected an object"),
        (lambda json: json.member({"a": 1}, "a", ""), "a: found int, expected an object"),
        (lambda json: json.items([], "steps", "prunes"), "steps: not a list of prunes"),
        (lambda json: json.count({"n": 0}, "n", ""), "n: not a positive whole number"),
        (lambda json: json.number(True, "a.b"), "a.b: found bool, expected a number"),
        (lambda json: json.number(1e999, "a.b"), "a.b: too large a number"),
        (lambda json: json.text({"t": 1}, "t", "a"), "a.t: found int, expected text"),
    ],
)
def test_a_refusal_names_the_file_and_the_place(
    ask: Callable[[CheckedJson], object], says: str
) -> None:
    with pytest.raises(ScoreError) as caught:
        ask(CheckedJson("file.json", ScoreError, "save it again"))
    error = caught.value
    assert (error.where, error.problem, error.remedy) == ("file.json", says, "save it again")


def test_the_wording_of_a_refusal_is_the_callers() -> None:
    json = CheckedJson("file.json", ScoreError, wording="{place} is {value}, not {expected}")
    with pytest.raises(ScoreError, match=r"layer \{0\} is '\{kind\}', not an object"):
        json.as_object("{kind}", "layer {0}")
