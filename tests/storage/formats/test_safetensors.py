"""Safetensors headers: the safetensors library is the judge of what is well formed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import HeaderError
from shardsurgeon.storage.formats.safetensors import (
    DTYPE_BITS,
    Header,
    build_header,
    header_length,
    parse_header,
    tensor_nbytes,
)
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.limits import HEADER, Limit

# Bits of each dtype, from the table in the format's README and its later additions.
PUBLISHED_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def parse(text: str | bytes, data_nbytes: int) -> Header:
    raw = text if isinstance(text, bytes) else text.encode()
    return parse_header(raw, 8 + len(raw) + data_nbytes, "model.safetensors")


def parse_or_refusal(raw: bytes, data_nbytes: int) -> Header | str:
    try:
        return parse(raw, data_nbytes)
    except HeaderError as error:
        return str(error)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(HeaderError) as caught:
        call()
    line = str(caught.value)
    assert line.startswith("model.safetensors: ")
    assert "\n" not in line
    assert len(line) < 600
    return line


def library_reads(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library makes of a file; None where it refuses it."""
    try:
        tensors = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in tensors
    }


def entry(dtype: str = "U8", shape: object = (2,), offsets: object = (0, 2)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.mark.torch
def test_what_the_library_writes_is_read() -> None:
    import torch
    from safetensors.torch import save

    file = save(
        {
            "layers.0.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
            "layers.0.scale": torch.ones((), dtype=torch.float32),
            "empty": torch.zeros(0, 7),
        },
        metadata={"format": "pt"},
    )
    length = header_length(file[:8], len(file), "model.safetensors")
    header = parse_header(file[8 : 8 + length], len(file), "model.safetensors")
    assert header.metadata == {"format": "pt"}
    assert header.data_begin == len(file) - 4 - 30
    assert {(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors} == {
        ("layers.0.weight", "BF16", (3, 5), 30),
        ("layers.0.scale", "F32", (), 4),
        ("empty", "F32", (0, 7), 0),
    }
    library = library_reads(file)
    assert library is not None
    for record in header.tensors:
        begin = header.data_begin + record.begin
        assert file[begin : begin + record.nbytes] == library[record.name][2]


def test_tensors_come_in_offset_order_and_empty_ones_keep_the_files_order() -> None:
    text = "".join([
        '{"late":', entry(offsets=(2, 4)), ',"z":', entry(shape=[0], offsets=(2, 2)),
        ',"early":', entry(), ',"a":', entry(shape=[0], offsets=(2, 2)), "}",
    ])  # fmt: skip
    assert [t.name for t in parse(text, 4).tensors] == ["early", "z", "a", "late"]


@pytest.mark.parametrize("text", ["{}", "{}   ", "{ \n\t\r}", '{"__metadata__":{}}'])
def test_a_header_without_tensors_is_valid(text: str) -> None:
    assert parse(text, 0).tensors == ()


def test_no_metadata_and_empty_metadata_are_told_apart() -> None:
    assert parse("{}", 0).metadata is None
    assert parse('{"__metadata__":null}', 0).metadata is None
    assert parse('{"__metadata__":{}}', 0).metadata == {}


def test_every_dtype_of_the_library_is_known_with_its_width() -> None:
    assert DTYPE_BITS == PUBLISHED_BITS
    for dtype, bits in PUBLISHED_BITS.items():
        text = '{"t":' + entry(dtype, [8], (0, bits)) + "}"
        assert parse(text, bits).tensors == (TensorRecord("t", dtype, (8,), 0, bits),)
        assert library_reads(struct.pack("<Q", len(text)) + text.encode() + bytes(bits))


def test_equal_shapes_and_dtypes_are_one_object() -> None:
    text = '{"a":' + entry() + ',"b":' + entry(offsets=(2, 4)) + "}"
    first, second = parse(text, 4).tensors
    assert first.shape is second.shape
    assert first.dtype is second.dtype


# The length prefix.


def test_a_header_longer_than_its_file_is_refused_before_allocating() -> None:
    line = refusal(lambda: header_length(struct.pack("<Q", 993), 1000, "model.safetensors"))
    assert "993 bytes" in line
    assert "1,000" in line
    assert "fetch this shard again" in line
    assert header_length(struct.pack("<Q", 992), 1000, "model.safetensors") == 992


@pytest.mark.parametrize("length", [HEADER.nbytes + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(length: int) -> None:
    prefix = struct.pack("<Q", length)
    line = refusal(lambda: header_length(prefix, 2**62, "model.safetensors"))
    assert f"{length:,}" in line
    assert "100,000,000" in line


@pytest.mark.parametrize("prefix", [b"", b"\x02", b"1234567"])
def test_a_file_shorter_than_its_prefix_is_refused(prefix: bytes) -> None:
    line = refusal(lambda: header_length(prefix, len(prefix), "model.safetensors"))
    assert f"{len(prefix)} bytes" in line


def test_a_git_lfs_pointer_is_called_by_its_name() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    assert "Git LFS" in refusal(lambda: header_length(pointer[:8], 134, "model.safetensors"))


# Defects: header text, bytes of data, what the message must say.

DEFECTS: dict[str, tuple[str | bytes, int, str]] = {
    "empty": ("", 0, "empty"),
    "not JSON": ("{nonsense}", 0, "not JSON"),
    "cut off": ('{"a":', 0, "not JSON"),
    "trailing comma": ('{"a":' + entry() + ",}", 2, "not JSON"),
    "trailing text": ("{} x", 0, "not JSON"),
    "trailing NUL": ("{}\0", 0, "not JSON"),
    "control character": ('{"a\n":' + entry() + "}", 2, "not JSON"),
    "too many digits": ('{"a":' + entry(shape=[]).replace("[]", "9" * 5000) + "}", 2, "not JSON"),
    "not UTF-8": (b'{"\xff":1}', 0, "not UTF-8 at byte 2"),
    "encoded surrogate": (b'{"\xed\xa0\x80":1}', 0, "not UTF-8"),
    "byte order mark": ("\ufeff{}", 0, "begins with"),
    "leading space": (" {}", 0, "begins with"),
    "an array": ("[]", 0, "begins with"),
    "nested deeply": ('{"a":' * 20_000 + "1" + "}" * 20_000, 0, "nested too deeply"),
    "nested arrays": ('{"a":' + "[" * 20_000 + "]" * 20_000 + "}", 0, "nested too deeply"),
    "repeated tensor": ('{"a":' + entry() + ',"a":' + entry() + "}", 2, "'a' twice"),
    "repeated key": ('{"a":{"dtype":"U8","dtype":"U8"}}', 2, "tensor 'a': its entry names 'dtype'"),
    "repeated metadata": ('{"__metadata__":{"x":"1","x":"2"}}', 0, "'x' twice"),
    "metadata a list": ('{"__metadata__":[]}', 0, "not a map of strings"),
    "metadata a number": ('{"__metadata__":{"x":1}}', 0, "maps 'x' to 1"),
    "metadata a surrogate": ('{"__metadata__":{"x":"\\ud800"}}', 0, "maps 'x'"),
    "entry null": ('{"a":null}', 0, "tensor 'a': its entry is None"),
    "entry a list": ('{"a":["U8",[2],[0,2]]}', 2, "not an object"),
    "missing key": ('{"a":{"dtype":"U8","shape":[2]}}', 2, "lacks data_offsets"),
    "unknown key": (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"stride":1}}',
        2,
        "unknown key 'stride'",
    ),
    "surrogate name": ('{"\\ud83d":' + entry() + "}", 2, "surrogate"),
    "unknown dtype": ('{"a":' + entry("F7") + "}", 2, "unknown dtype 'F7'; supported are F4"),
    "lower-case dtype": ('{"a":' + entry("u8") + "}", 2, "unknown dtype 'u8'"),
    "dtype a list": ('{"a":' + entry().replace('"U8"', "[]") + "}", 2, "unknown dtype []"),
    "negative dimension": ('{"a":' + entry(shape=[-2]) + "}", 2, "shape is [-2]"),
    "minus zero": ('{"a":' + entry(shape=[1]).replace("[1]", "[-0]") + "}", 2, "shape is"),
    "float dimension": ('{"a":' + entry(shape=[2.0]) + "}", 2, "shape is [2.0]"),
    "boolean dimension": ('{"a":' + entry(shape=[True, 2]) + "}", 2, "shape is [True, 2]"),
    "NaN dimension": ('{"a":' + entry(shape=[float("nan")]) + "}", 2, "shape is [nan]"),
    "infinite dimension": ('{"a":' + entry(shape=[float("inf")]) + "}", 2, "shape is [inf]"),
    "text dimension": ('{"a":' + entry(shape=["2"]) + "}", 2, "shape is ['2']"),
    "shape a number": ('{"a":' + entry(shape=2) + "}", 2, "shape is 2"),
    "huge dimension": ('{"a":' + entry(shape=[2**63]) + "}", 2, "below 2^63"),
    "overflow": ('{"a":' + entry(shape=[2**40, 2**40]) + "}", 2, "overflows 64 bits"),
    "overflow before a zero": (
        '{"a":' + entry(shape=[2**62, 2**62, 0], offsets=(0, 0)) + "}",
        0,
        "overflows 64 bits",
    ),
    "one offset": ('{"a":' + entry(offsets=[2]) + "}", 2, "data_offsets are [2]"),
    "three offsets": ('{"a":' + entry(offsets=[0, 2, 2]) + "}", 2, "data_offsets are"),
    "float offset": ('{"a":' + entry(offsets=[0, 2.0]) + "}", 2, "data_offsets are"),
    "negative offset": ('{"a":' + entry(offsets=[-2, 0]) + "}", 2, "data_offsets are"),
    "reversed": ('{"a":' + entry(offsets=[2, 0]) + "}", 2, "ends at byte 0, before its begin at 2"),
    "size": ('{"a":' + entry("F32", [3], (0, 10)) + "}", 10, "10 bytes, F32 [3] takes 12"),
    "half bytes": ('{"a":' + entry("F4", [3], (0, 2)) + "}", 2, "F4 [3] takes 12 bits"),
    "six bits": ('{"a":' + entry("F6_E2M3", [2], (0, 2)) + "}", 2, "takes 12 bits"),
    "late begin": ('{"a":' + entry(offsets=[1, 3]) + "}", 3, "hole of 1 bytes"),
    "hole": (
        '{"a":' + entry() + ',"b":' + entry(offsets=(5, 7)) + "}",
        7,
        "tensor 'b': begins at byte 5 but tensor 'a' ends at 2: hole of 3 bytes",
    ),
    "overlap": (
        '{"a":' + entry() + ',"b":' + entry(offsets=(1, 3)) + "}",
        3,
        "tensor 'b': begins at byte 1 but tensor 'a' ends at 2: overlap of 1 bytes",
    ),
    "empty tensor inside another": (
        '{"a":' + entry() + ',"b":' + entry(shape=[0], offsets=(1, 1)) + "}",
        2,
        "overlap",
    ),
    "truncated": (
        '{"a":' + entry() + "}",
        1,
        "truncated: tensor 'a' ends at byte 2 of the data, the file has 1; fetch this shard again",
    ),
    "surplus": ('{"a":' + entry() + "}", 5, "3 surplus bytes"),
    "surplus without tensors": ("{}", 4, "4 surplus bytes"),
}

# What the library lets pass and we do not, because its meaning is in doubt.
DELIBERATE = re.compile(
    r"twice|unknown key|begins with|not an object|unknown dtype \{|below 2\^63|overflows"
)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_with_its_place_and_numbers(defect: str) -> None:
    text, data_nbytes, message = DEFECTS[defect]
    line = refusal(lambda: parse(text, data_nbytes))
    assert message in line
    raw = text if isinstance(text, bytes) else text.encode()
    if library_reads(struct.pack("<Q", len(raw)) + raw + bytes(data_nbytes)) is not None:
        assert DELIBERATE.search(line)


def test_a_raw_header_that_does_not_fit_its_file_is_refused() -> None:
    assert "truncated" in refusal(lambda: parse_header(b"{}", 9, "model.safetensors"))


# Random headers, mostly valid, some broken token by token.

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["model.layers.0.mlp.experts.0.up_proj.weight", "\u00e9", "\U0001f600", '"', "\\", "\x00"]
)
dtypes = st.sampled_from(sorted(PUBLISHED_BITS))
# A last dimension of 4 makes whole bytes of every dtype.
shapes = st.lists(st.integers(0, 3), max_size=3).map(lambda dims: (*dims, 4))
tensor_lists = st.lists(
    st.tuples(names.filter(lambda name: name != "__metadata__"), dtypes, shapes),
    max_size=5,
    unique_by=lambda tensor: tensor[0],
)
metadata_maps = st.none() | st.dictionaries(names, names, max_size=3)


def expected_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count * PUBLISHED_BITS[dtype] // 8


NASTY = [
    "-0", "-1", "1.0", "1e0", "01", "NaN", "-Infinity", "true", "null", "[]", "{}", '""', "0", "1",
    "18446744073709551616", "9223372036854775808", '"U8"', '"F4"', '"\\ud800"', '"\\udc00\\ud800"',
    '"__metadata__"', '"dtype"', '"shape"', '{"U8":null}', '["U8",[1],[0,1]]', ",", ":", "}", "]",
    " ", "\x0b", "\u00a0", '"\\x"', '"\t"', '"unfinished', "//", "'a'",
]  # fmt: skip
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9]+|[a-z]+|[][{}:,]', re.DOTALL)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, int]:
    """Header text and the bytes of data behind it; valid or with a few tokens changed."""
    entries: dict[str, object] = {}
    begin = 0
    for name, dtype, shape in draw(tensor_lists):
        end = begin + expected_nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    metadata = draw(metadata_maps)
    if metadata is not None:
        entries["__metadata__"] = metadata
    order = draw(st.permutations(list(entries)))
    text = json.dumps({name: entries[name] for name in order}, ensure_ascii=draw(st.booleans()))
    tokens = TOKEN.findall(text)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(tokens) - 1))
        match draw(st.sampled_from(["replace", "insert", "copy", "drop"])):
            case "replace":
                tokens[place] = draw(st.sampled_from(NASTY))
            case "insert":
                tokens.insert(place, draw(st.sampled_from(NASTY)))
            case "copy":
                tokens.insert(place, tokens[draw(st.integers(0, len(tokens) - 1))])
            case _ if len(tokens) > 1:
                del tokens[place]
    return "".join(tokens).encode(), max(0, begin + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


@settings(max_examples=200, deadline=None)
@given(files())
def test_nothing_is_accepted_that_the_library_refuses(file: tuple[bytes, int]) -> None:
    raw, data_nbytes = file
    data = bytes(index % 251 for index in range(data_nbytes))
    library = library_reads(struct.pack("<Q", len(raw)) + raw + data)
    header = parse_or_refusal(raw, data_nbytes)
    if isinstance(header, str):
        assert library is None or DELIBERATE.search(header), (raw, header)
        return
    assert library == {t.name: (t.dtype, t.shape, data[t.begin : t.end]) for t in header.tensors}
    assert [t.begin for t in header.tensors] == sorted(t.begin for t in header.tensors)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100))
def test_random_bytes_raise_only_header_errors(raw: bytes, data_nbytes: int) -> None:
    for text in (raw, b"{" + raw, b'{"a":' + raw + b"}"):
        try:
            parse(text, data_nbytes)
        except HeaderError:
            continue
        file = struct.pack("<Q", len(text)) + text + bytes(data_nbytes)
        assert library_reads(file) is not None


# Writing.


@settings(max_examples=150, deadline=None)
@given(tensor_lists, metadata_maps)
def test_what_is_built_reads_the_same_in_the_library(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    sized = [(*tensor, expected_nbytes(*tensor[1:])) for tensor in tensors]
    total = sum(nbytes for *_, nbytes in sized)
    data = bytes(index % 251 for index in range(total))
    start = build_header(sized, metadata)
    begin, expected = 0, {}
    for name, dtype, shape, nbytes in sized:
        expected[name] = (dtype, shape, data[begin : begin + nbytes])
        begin += nbytes
    assert library_reads(start + data) == expected
    assert len(start) % 8 == 0
    length = header_length(start[:8], len(start) + total, "model.safetensors")
    header = parse_header(start[8:], len(start) + total, "model.safetensors")
    assert length == len(start) - 8
    assert header.metadata == metadata
    # Empty tensors share their begin with a neighbour; the order given survives even there.
    assert [t.name for t in header.tensors if t.nbytes] == [t[0] for t in sized if t[3]]


def test_a_built_header_is_literally_this() -> None:
    header = build_header([("w", "BF16", (2, 3), 12), ("b", "U8", (), 1)], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    assert header == struct.pack("<Q", 144) + text.ljust(144)


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "U8", (1,), 1), ("a", "U8", (1,), 1)],
        [("a", "U8", (2,), 1)],
        [("a", "F4", (1,), 1)],
        [("__metadata__", "U8", (1,), 1)],
    ],
)
def test_building_what_no_file_can_hold_is_a_defect_of_the_caller(
    tensors: list[tuple[str, str, tuple[int, ...], int]],
) -> None:
    with pytest.raises(ValueError, match=r"tensor|whole bytes"):
        build_header(tensors, {"format": "pt"})


def test_a_header_that_readers_refuse_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsurgeon.storage.formats.safetensors.HEADER", Limit(64, 10**6))
    with pytest.raises(HeaderError, match="--max-shard-size"):
        build_header([("a" * 64, "U8", (1,), 1)], None)


def test_sizes_are_exact() -> None:
    assert tensor_nbytes("F32", ()) == 4
    assert tensor_nbytes("I32", (2048, 896)) == 7_340_032
    assert tensor_nbytes("F6_E3M2", (4,)) == 3
    assert tensor_nbytes("F4", (0, 3)) == 0
    with pytest.raises(ValueError, match="4 bits"):
        tensor_nbytes("F4", (1,))
