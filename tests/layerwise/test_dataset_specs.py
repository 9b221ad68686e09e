"""What --dataset may name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.datasets import DatasetPart, parse_spec


def counts(text: str, samples: int | None = None) -> list[int | None]:
    return [part.count for part in parse_spec(text, samples)]


def test_a_composite_spec_names_subsets_splits_revisions_and_counts() -> None:
    assert parse_spec("org/a:4, org/b[code]:5,org/c(tool):6,d@v1[x](train[:50%]):7") == (
        DatasetPart("org/a", count=4),
        DatasetPart("org/b", subset="code", count=5),
        DatasetPart("org/c", split="tool", count=6),
        DatasetPart("d", subset="x", split="train[:50%]", revision="v1", count=7),
    )


def test_the_name_of_a_part_is_the_spec_without_its_number() -> None:
    assert parse_spec("d@v1[x](t):7")[0].words == "d@v1[x](t)"


def test_parts_without_a_number_share_what_is_left() -> None:
    assert counts("a", 10) == [10]
    assert counts("a,b:4,c", 11) == [4, 4, 3]
    assert counts("a") == [512]
    assert counts("a:3,b:4") == [3, 4]
    assert counts("a:3,b:4", 7) == [3, 4]


@pytest.mark.parametrize(
    ("text", "samples", "says"),
    [
        ("", None, "'' is not a dataset"),
        ("a,,b", None, "'' is not a dataset"),
        ("a,", None, "'' is not a dataset"),
        ("a[x", None, "'a[x' is not a dataset"),
        ("a(x)[y]", None, "'a(x)[y]' is not a dataset"),
        ("a:0", None, "asks for no sample"),
        ("a:1,a:2", None, "names a 2 times"),
        ("a:3,b:4", 8, "7 samples together, --samples for 8"),
        ("a:8,b", 8, "0 are left for 1"),
    ],
)
def test_a_malformed_spec_is_refused(text: str, samples: int | None, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_spec(text, samples)
    assert says in str(raised.value)


def test_an_existing_path_is_a_name_whatever_its_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd(1)[2]@3.jsonl").write_text("{}")
    assert parse_spec("odd(1)[2]@3.jsonl:5") == (DatasetPart("odd(1)[2]@3.jsonl", count=5),)


def test_a_drive_letter_is_not_a_count() -> None:
    assert parse_spec(r"C:\data\chats.jsonl:5")[0] == DatasetPart(r"C:\data\chats.jsonl", count=5)


@given(st.text("ab[](),:@0123 ", max_size=20), st.none() | st.integers(1, 9))
def test_any_text_is_a_spec_or_refused(text: str, samples: int | None) -> None:
    try:
        parts = parse_spec(text, samples)
    except UsageError:
        return
    assert all(part.count and part.count > 0 for part in parts)
    if samples is not None:
        assert sum(part.count or 0 for part in parts) == samples
