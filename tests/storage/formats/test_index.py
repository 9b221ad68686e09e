"""The index: expected values by hand and by transformers' own spelling."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import IndexFileError
from shardsurgeon.storage.formats.index import INDEX_NAME, Index, build_index, parse_index
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable


def refusal(text: str | bytes) -> str:
    raw = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(IndexFileError) as caught:
        parse_index(raw, INDEX_NAME)
    line = str(caught.value)
    assert line.startswith("model.safetensors.index.json: ")
    assert "\n" not in line
    assert len(line) < 600
    return line


def table(names: Iterable[str]) -> TensorTable:
    return TensorTable.of(TensorRecord(name, "U8", (1,), 0, 1) for name in names)


def test_an_index_is_read() -> None:
    raw = b"""{"metadata": {"total_size": 12, "total_parameters": 6.0, "by": ["x"]},
      "weight_map": {"b": "model-00001-of-00002.safetensors", "a": "part/x.safetensors"}}"""
    index = parse_index(raw, INDEX_NAME)
    assert index.weight_map == {
        "b": "model-00001-of-00002.safetensors",
        "a": "part/x.safetensors",
    }
    assert index.metadata == {"total_size": 12, "total_parameters": 6.0, "by": ["x"]}


def test_an_index_may_have_no_metadata() -> None:
    assert parse_index(b'{"weight_map":{"a":"m.safetensors"}}', INDEX_NAME).metadata == {}


def test_metadata_may_be_null_and_a_byte_order_mark_stands_before_it() -> None:
    raw = b'\xef\xbb\xbf{"metadata": null, "weight_map":{"a":"m.safetensors"}}'
    index = parse_index(raw, INDEX_NAME)
    assert (index.weight_map, index.metadata) == ({"a": "m.safetensors"}, {})


def test_shards_are_listed_in_the_order_of_their_numbers() -> None:
    huge = f"m-{'9' * 5000}.safetensors"
    names = ["m-10.safetensors", huge, "m-002.safetensors", "²1.safetensors", "m.safetensors"]
    index = Index({str(n): name for n, name in enumerate([*names, names[0]])}, {})
    assert index.shards == [names[2], names[0], huge, names[4], names[3]]


def test_tensors_of_one_shard_share_its_name() -> None:
    raw = b'{"weight_map":{"a":"m.safetensors","b":"m.safetensors"}}'
    first, second = parse_index(raw, INDEX_NAME).weight_map.values()
    assert first is second


DEFECTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not JSON"),
    "not JSON": ("weights", "not JSON"),
    "an array": ("[]", "is [], not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8 at byte 2"),
    "deep": ('{"a":' + "[" * 20_000 + "]" * 20_000 + "}", "nested too deeply"),
    "no weight_map": ('{"metadata": {}}', "weight_map is missing or empty"),
    "empty weight_map": ('{"weight_map": {}}', "weight_map is missing or empty"),
    "weight_map a list": ('{"weight_map": ["a"]}', "weight_map is ['a'], not an object"),
    "repeated weight_map": ('{"weight_map": {}, "weight_map": {}}', "'weight_map' twice"),
    "repeated tensor": (
        '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}',
        "weight_map names 'a' twice",
    ),
    "shard a number": ('{"weight_map": {"a": 1}}', "weight_map maps 'a' to 1"),
    "shard null": ('{"weight_map": {"a": null}}', "weight_map maps 'a' to None"),
    "shard an object": ('{"weight_map": {"a": {"b": 1, "b": 1}}}', "weight_map maps 'a' to"),
    "surrogate name": ('{"weight_map": {"\\ud800": "m.safetensors"}}', "weight_map maps"),
    "metadata a list": (
        '{"metadata": [], "weight_map": {"a": "m.safetensors"}}',
        "metadata is [], not an object",
    ),
    "metadata repeats": (
        '{"metadata": {"x": [{"y": 1, "y": 2}]}, "weight_map": {"a": "m.safetensors"}}',
        "metadata names a key twice",
    ),
    "deep metadata": (
        '{"metadata": {"x":' + "[" * 60 + "]" * 60 + '}, "weight_map": {"a": "m.safetensors"}}',
        "nested deeper than 50",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_index_is_refused(defect: str) -> None:
    text, message = DEFECTS[defect]
    assert message in refusal(text)


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/model.safetensors",
        "//host/share/model.safetensors",
        "../model.safetensors",
        "a/../../model.safetensors",
        "a/..",
        "./model.safetensors",
        "a//model.safetensors",
        "a/",
        "",
        "C:model.safetensors",
        "c:/model.safetensors",
        "model.safetensors:stream",
        "..\\model.safetensors",
        "a\\model.safetensors",
        "\\\\host\\model.safetensors",
        "model.safetensors\0",
        "a\n.safetensors",
        "\ud800.safetensors",
        "model.bin",
        "config.json",
        "model.safetensors.index.json",
        "model.SAFETENSORS",
    ],
)
def test_a_shard_outside_the_folder_or_of_another_kind_is_refused(shard: str) -> None:
    line = refusal(json.dumps({"weight_map": {"layers.0.w": shard}}))
    assert "tensor 'layers.0.w'" in line


def test_an_index_is_written_as_transformers_writes_it() -> None:
    shard = "model-00001-of-00001.safetensors"
    weight_map = {"layers.10.w": shard, "layers.2.w": shard, "\u00e9": shard}
    metadata = {"total_size": 24, "total_parameters": 12}
    raw = build_index({shard: table(weight_map)}, metadata)
    assert raw == (
        b"{\n"
        b'  "metadata": {\n'
        b'    "total_parameters": 12,\n'
        b'    "total_size": 24\n'
        b"  },\n"
        b'  "weight_map": {\n'
        b'    "layers.10.w": "model-00001-of-00001.safetensors",\n'
        b'    "layers.2.w": "model-00001-of-00001.safetensors",\n'
        b'    "\\u00e9": "model-00001-of-00001.safetensors"\n'
        b"  }\n"
        b"}\n"
    )
    assert json.loads(raw) == {"metadata": metadata, "weight_map": weight_map}


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_raise_only_index_errors(raw: bytes) -> None:
    for text in (raw, b'{"weight_map":' + raw + b"}", b'{"weight_map":{"a":"' + raw + b'"}}'):
        try:
            index = parse_index(text, INDEX_NAME)
        except IndexFileError:
            continue
        assert index.weight_map
        build_index({"m.safetensors": table(index.weight_map)}, index.metadata)
