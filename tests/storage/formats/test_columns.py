"""Headers and indexes read into columns: whatever is read so, strict readers read the same."""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from shardsurgeon.errors import HeaderError, IndexFileError
from shardsurgeon.storage.formats import columns, index, safetensors
from shardsurgeon.storage.formats.index import parse_index
from shardsurgeon.storage.formats.safetensors import Header, parse_header
from shardsurgeon.storage.formats.tensor_table import (
    Series,
    Stems,
    TensorRecord,
    TensorTable,
    condensed,
    split_name,
)
from shardsurgeon.storage.limits import Limit

parts = st.sampled_from(
    ["layers", "experts", "w", "0", "7", "10", "007", "1234567890", "gate_proj", "weight", "é", ""]
)
names = st.lists(parts, min_size=1, max_size=6).map(".".join)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(names)
def test_a_name_is_put_together_as_it_was_taken_apart(name: str) -> None:
    head, number, tail = split_name(name)
    assert Series(head, tail, "U8", (), 1).name(number) == name
    # By hand: the last part that a person would write as a number, if any part stands before it.
    words = name.split(".")
    last = [
        place
        for place, word in enumerate(words)
        if place and word.isdecimal() and word == str(int(word)) and len(word) < 10
    ]
    assert number == (int(words[last[-1]]) if last else -1)
    assert head == (".".join(words[: last[-1]]) + "." if last else "")


@given(st.lists(names, unique=True))
def test_two_names_never_have_the_same_key(unique: list[str]) -> None:
    table = TensorTable.of(TensorRecord(name, "U8", (1,), 0, 1) for name in unique)
    keys = Stems().keys(table)
    assert len(set(keys.tolist())) == len(unique)
    assert list(table.names()) == unique == [record.name for record in table]


def strictly(raw: bytes, nbytes: int) -> Header | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "read_columns", lambda *_: None)
        try:
            return parse_header(raw, nbytes, "x")
        except HeaderError:
            return None


def quickly(raw: bytes, nbytes: int) -> Header | None:
    try:
        return parse_header(raw, nbytes, "x")
    except HeaderError:
        return None


files = st.dictionaries(names, shapes.map(lambda s: np.zeros(s, "<i4")), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(files, st.sampled_from([None, {"format": "pt"}, {"a": "}{", "b": '"'}]), st.data())
def test_any_header_is_read_as_the_strict_reader_reads_it(
    tensors: dict[str, Any], metadata: dict[str, str] | None, data: st.DataObject
) -> None:
    file = save(tensors, metadata)
    length = struct.unpack("<Q", file[:8])[0]
    raw = file[8 : 8 + length]
    found = quickly(raw, len(file))
    assert found is not None and found == strictly(raw, len(file))
    assert found.metadata == metadata
    assert {t.name: t.shape for t in found.tensors} == {n: t.shape for n, t in load(file).items()}
    # The same with one byte changed, left out or doubled.
    at = data.draw(st.integers(0, length - 1))
    other = data.draw(
        st.sampled_from([b"", raw[at : at + 1] * 2, b",", b"}", b'"', b"\\", b"0", b"\0"])
    )
    changed = raw[:at] + other + raw[at + 1 :]
    nbytes = len(file) - len(raw) + len(changed)
    assert quickly(changed, nbytes) == strictly(changed, nbytes)


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_a_header_is_read_in_columns_whatever_its_pieces_are(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_PIECE", piece)
    shape = np.zeros((2, 3), "<i4")
    file = save(
        {f"layers.{n}.experts.{e}.w": shape for n in range(3) for e in range(11)}, {"f": "p"}
    )
    raw = file[8 : 8 + struct.unpack("<Q", file[:8])[0]]
    found = columns.read_columns(raw, lambda dtype, shape: 24)
    assert found is not None
    assert list(found[0]) == list(strictly(raw, len(file)).tensors)  # type: ignore[union-attr]
    assert (len(found[0].series), found[1]) == (3, b'{"f":"p"}')


DEFECTS = [
    ("}},", "} },"),
    (":{", ": {"),
    ('"I32"', '"I3\\u0032"'),
    ("[0,24]", "[0,24 ]"),
    ("[0,24]", "[00,24]"),
    ("[0,24]", "[0,24,24]"),
    ("]},", "]},,"),
    ("]},", "]}"),
    ('"a"', '"a\\n"'),
    ('"a"', '"__metadata__"'),
    ('"a"', '"b"'),
    ("[2,3]", "[2,,3]"),
    ("[2,3]", "[02,3]"),
    ("I32", "I33"),
    ("[24,48]", "[20,48]"),
]


@pytest.mark.parametrize(("old", "new"), DEFECTS)
def test_what_is_spelled_otherwise_is_left_to_the_strict_reader(old: str, new: str) -> None:
    entry = '{"dtype":"I32","shape":[2,3],"data_offsets":'
    text = f'{{"a":{entry}[0,24]}},"b":{entry}[24,48]}},"é":{entry}[48,72]}}}}'
    assert columns.read_columns(text.encode(), lambda dtype, shape: 24) is not None
    changed = text.replace(old, new, 1)
    assert changed != text or old == "}},"
    if changed != text:
        extent = safetensors._extent_or_none
        assert columns.read_columns(changed.encode(), extent) is None


weight_maps = st.dictionaries(
    st.one_of(names, st.text(max_size=5)),
    st.sampled_from(["a.safetensors", "m-2.safetensors", "é/x.safetensors"]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(weight_maps, st.sampled_from([None, 0, 2]), st.booleans(), st.data())
def test_any_index_is_read_as_the_strict_reader_reads_it(
    weight_map: dict[str, str], indent: int | None, plain: bool, data: st.DataObject
) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    text = json.dumps(content, indent=indent, ensure_ascii=plain)

    def read(raw: bytes) -> object:
        try:
            return parse_index(raw, "x")
        except IndexFileError as error:
            return str(error)

    raw = text.encode(errors="surrogatepass")
    if all(name.isascii() for name in weight_map):
        assert read(raw) == index.Index(weight_map, {"total_size": 1})
    at = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(st.sampled_from([b"", raw[at : at + 1] * 2, b",", b"}", b'"', b"\\", b"\0"]))
    for each in (raw, raw[:at] + other + raw[at + 1 :]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "find_weight_map", lambda raw: None)
            expected = read(each)
        assert read(each) == expected


@pytest.mark.parametrize("piece", [1, 40, 1 << 20])
def test_a_usual_index_is_read_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_PIECE", piece)
    weight_map = {f"layers.{n}.w": f"m-{n % 3}.safetensors" for n in range(20)}
    raw = json.dumps({"weight_map": weight_map}, indent=2).encode()
    place = columns.find_weight_map(raw)
    assert place is not None
    assert columns.read_weight_map(place) == weight_map


records = st.lists(
    st.tuples(names, st.sampled_from(["U8", "I32"]), shapes), unique_by=lambda r: r[0], max_size=30
)


@settings(max_examples=200, deadline=None)
@given(records, st.integers(1, 4))
def test_what_repeats_is_counted_and_nothing_is_lost(found: list[Any], tables: int) -> None:
    made = [
        TensorTable.of(TensorRecord(*record, 0, 1) for record in found[first::tables])
        for first in range(tables)
    ]
    alike = condensed(made)

    # Without numbers, every tensor is still there as often as before.
    def kind(name: str, dtype: str, shape: tuple[int, ...]) -> object:
        return split_name(name)[::2], dtype, shape

    counted: Counter[object] = Counter()
    for record, times in alike:
        counted[kind(*record[:3])] += times
    assert counted == Counter(kind(*record) for record in found)
    # What is shown has beside it all that it had.
    shown = {record.name for record, _ in alike}
    for name in shown:
        head, number, _ = split_name(name)
        if number >= 0:
            beside = {n for n, *_ in found if split_name(n)[:2] == (head, number)}
            assert beside <= shown


def test_experts_that_are_alike_are_shown_once() -> None:
    parts = {"w.weight": ("I32", (4, 2)), "w.scale": ("U8", (4,))}
    rows = [(f"l.{n}.e.{e}.{p}", *parts[p]) for n in (0, 1) for e in range(9) for p in parts]
    rows[3] = ("l.0.e.1.w.scale", "U8", (5,))
    alike = condensed([TensorTable.of(TensorRecord(*row, 0, 1) for row in rows)])
    shown = [(record.name, times) for record, times in alike]
    assert sorted(shown) == [
        ("l.0.e.0.w.scale", 1),
        ("l.0.e.0.w.weight", 1),
        ("l.0.e.1.w.scale", 1),
        ("l.0.e.1.w.weight", 1),
        ("l.0.e.2.w.scale", 7),
        ("l.0.e.2.w.weight", 7),
        ("l.1.e.0.w.scale", 9),
        ("l.1.e.0.w.weight", 9),
    ]


def test_what_could_take_too_much_memory_is_refused_and_not_read_quickly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read quickly")

    monkeypatch.setattr(safetensors, "_UNCOUNTED", 0)
    monkeypatch.setattr(index, "_UNCOUNTED", 0)
    monkeypatch.setattr(safetensors, "read_columns", read)
    monkeypatch.setattr(index, "find_weight_map", read)
    entries = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(9))
    monkeypatch.setattr(safetensors, "HEADER", Limit(10**6, 1000))
    with pytest.raises(HeaderError, match="its JSON could take"):
        parse_header(f"{{{entries}}}".encode(), 10**6, "x")
    monkeypatch.setattr(index, "INDEX", Limit(10**6, 100))
    with pytest.raises(IndexFileError, match="its JSON could take"):
        parse_index(b'{"weight_map":{"a":"m.safetensors"}}', "x")
