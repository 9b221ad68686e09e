"""The manifest of a view: what its description promises, and what strangers put into it."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable
from copy import deepcopy
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from shardsurgeon.errors import CheckpointError, HeaderError, InputError
from shardsurgeon.execution.plan import Literal, Pieces, Segment
from shardsurgeon.storage.formats.gzip_lines import lines_of
from shardsurgeon.storage.formats.safetensors import Header
from shardsurgeon.storage.formats.tensor_table import TensorTable
from shardsurgeon.storage.formats.view import (
    DATA_NAME,
    VIEW_NAME,
    Manifest,
    ManifestWriter,
    ViewShard,
    read_manifest,
)
from shardsurgeon.storage.source import SourceFile
from tests.fuzz.edits import ODD, places_in, put
from tests.support import handmade_view as handmade
from tests.support.handmade_view import Lines, entry, packed, shard

Change = Callable[[Lines], object]
MB = 10**6


def read(lines: Lines) -> Manifest:
    return read_manifest(packed(lines), VIEW_NAME)


def refused(raw: bytes) -> str:
    with pytest.raises((CheckpointError, HeaderError)) as caught:
        read_manifest(raw, VIEW_NAME)
    error = caught.value
    assert error.exit_status == 2 and error.remedy
    said = str(error)
    assert said.startswith(VIEW_NAME) and "\n" not in said and len(said) < 1000
    return said


def used(shard: ViewShard) -> list[str]:
    """The files that a shard takes bytes from, each once, sorted."""
    return sorted({file for file, _, _ in shard.ranges(0, shard.nbytes - len(shard.head))})


def everything(manifest: Manifest) -> object:
    """All that counts of a manifest."""
    return (
        manifest.source,
        manifest.files,
        manifest.data,
        [
            (
                *(each.file, each.nbytes, each.head, each.header, each.header.metadata),
                used(each),
                *(list(each.ranges(record.begin, record.end)) for record in each.header.tensors),
            )
            for each in manifest.shards
        ],
    )


def test_the_names_are_those_of_the_description() -> None:
    assert (VIEW_NAME, DATA_NAME) == (handmade.MANIFEST, handmade.OWN)


def test_a_manifest_made_from_the_description_alone_is_read() -> None:
    found = read(handmade.in_memory())
    assert found.source == "../source"
    assert [file.name for file in found.files] == ["a.safetensors", "b.safetensors"]
    one, two = found.shards
    assert [record.name for record in one.header.tensors] == ["x", "counts", "y"]
    assert used(one) == ["a.safetensors", handmade.OWN] and used(two) == ["b.safetensors"]
    assert two.header.metadata == {"format": "pt"}
    expected = handmade.EXPECTED
    arrays = {name: expected[name] for name in ("zé", "none")}
    assert two.head == save(arrays, {"format": "pt"})[: len(two.head)]


@pytest.mark.parametrize(
    "text",
    [
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw[:-1],
        lambda raw: re.sub(rb'"(file|nbytes|begin|version|files)":', rb' "\1" :\t', raw),
        lambda raw: raw.replace(b'"two.', b'"\\u0074wo.').replace(b'"begin"', b'"b\\u0065gin"'),
    ],
    ids=[
        "lines that end as on Windows", "a byte order mark", "no end of the last line",
        "white space", "escapes",
    ],
)  # fmt: skip
def test_white_space_and_escapes_around_headers_change_nothing(
    text: Callable[[bytes], bytes],
) -> None:
    lines = handmade.in_memory()
    raw = text(handmade.text_of(lines))
    assert raw != handmade.text_of(lines)
    found = read_manifest(gzip.compress(raw), VIEW_NAME)
    assert everything(found) == everything(read(lines))


# Headers in the ways in which they may be spelled

MARKS = ',"header":{ ,"ranges":{"file":[0]} ,"header":"'
SPELLED: dict[str, Callable[[dict[str, Any]], str]] = {
    "as libraries do": lambda header: json.dumps(header, separators=(",", ":")),
    "with spaces": json.dumps,
    "with escapes": lambda header: re.sub(
        r"[a-z]", lambda letter: f"\\u{ord(letter[0]):04x}", json.dumps(header), count=3
    ),
    "with ends of lines": lambda header: json.dumps(header, indent=1),
    "with returns": lambda header: json.dumps(header).replace(" ", "\r"),
    "with tabs behind": lambda header: json.dumps(header) + "\t\t",
    "beyond ASCII": lambda header: json.dumps(header | {"__metadata__": {"é\u2028": "𝄞\x85"}},
                                              ensure_ascii=False),
    "with what stands around it": lambda header: json.dumps(
        {MARKS: header.pop("y"), "header": header.pop("x"), **header, "__metadata__": {"a": MARKS}},
        separators=(",", ":"),
    ),
}  # fmt: skip


def with_text(text: bytes, padding: int = 0, said: str | None = None) -> bytes:
    """The manifest's text, its first header that text and so many spaces.

    said: how it stands there; None for the text itself."""
    lines = handmade.in_memory()
    head = (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
    data = sum(lines[1]["ranges"]["nbytes"])
    lines[1] |= {
        "nbytes": len(head) + data,
        "header_nbytes": len(head),
        "header_sha256": hashlib.sha256(head).hexdigest(),
        "header": "here",
    }
    there = text if said is None else said.encode()
    return handmade.text_of(lines).replace(b'"here"', there)


@pytest.mark.parametrize("padding", [0, 1, 4095, 70_000])
@pytest.mark.parametrize("spell", SPELLED.values(), ids=SPELLED.keys())
def test_a_header_is_read_as_it_is_spelled_and_made_of_spaces_behind(
    spell: Callable[[dict[str, Any]], str], padding: int
) -> None:
    text = spell(handmade.in_memory()[1]["header"])
    forms = [None] if "\n" not in text else []
    for said in (*forms, json.dumps(text), json.dumps(text, ensure_ascii=False)):
        found = read_manifest(gzip.compress(with_text(text.encode(), padding, said)), VIEW_NAME)
        head = found.shards[0].head
        assert head[8:] == text.encode() + b" " * padding
        assert int.from_bytes(head[:8], "little") == len(head) - 8
        expected = {
            name: tuple(entry["data_offsets"])
            for name, entry in json.loads(text).items()
            if name != "__metadata__"
        }
        records = found.shards[0].header.tensors
        assert {record.name: (record.begin, record.end) for record in records} == expected
        assert found.shards[0].header.metadata == json.loads(text).get("__metadata__")


HEADER = handmade.spelled(handmade.in_memory()[1]["header"])
RANGES = b',"ranges":{"file":[],"begin":[],"nbytes":[]}'
CHEATS: dict[str, tuple[bytes, str | None, str]] = {
    "nothing": (b"", None, "begins with"),
    "spaces": (b"   ", None, "begins with"),
    "a space before it": (b" " + HEADER, None, "begins with"),
    "a byte order mark before it": (b"\xef\xbb\xbf" + HEADER, None, "begins with"),
    "a number": (b"7", None, "begins with"),
    "null": (b"null", None, "begins with"),
    "a list": (b"[" + HEADER + b"]", None, "begins with"),
    "a list that ends early": (b"{}],[" + HEADER, None, "is not JSON"),
    "two": (HEADER + b"," + HEADER, None, "is not JSON"),
    "two with a key": (HEADER + b',"header":' + HEADER, None, "is not JSON"),
    "one and ranges": (HEADER + RANGES, None, "is not JSON"),
    "one and another member": (HEADER + b',"more":1', None, "is not JSON"),
    "one that is not closed": (HEADER[:-1], None, "is not JSON"),
    "one that is closed twice": (HEADER + b"}", None, "is not JSON"),
    "one and a NUL": (HEADER + b"\0", None, "is not JSON"),
    "a name twice": (HEADER[:-1] + b"," + HEADER[1:], None, "twice"),
    "a name twice, once escaped": (
        HEADER[:-1] + b',"\\u0079":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', None,
        "names 'y' twice",
    ),
    "a number in a string": (b"7", '"7"', "begins with"),
    "a string in a string": (HEADER, json.dumps(json.dumps(HEADER.decode())), "begins with"),
    "a string that is not closed": (HEADER, '"{}', "is not JSON"),
    "a string and another": (HEADER, f"{json.dumps(HEADER.decode())},{RANGES[1:].decode()}",
                             "unknown key 'ranges'"),
    "a string and a brace": (HEADER, json.dumps(HEADER.decode()) + "}", "is not JSON"),
    "a string of half a character": (HEADER, '"\\ud800"', "UTF-8"),
    "a string with a bare tab": (HEADER + b"\t", '"{}\t"', "is not JSON"),
    "another text in the string": (HEADER, json.dumps(HEADER.decode() + "\t"), "is not the one"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said", "why"), CHEATS.values(), ids=CHEATS.keys())
def test_what_is_no_single_header_is_refused_whatever_its_digest(
    text: bytes, said: str | None, why: str
) -> None:
    found = refused(gzip.compress(with_text(text, 8, said)))
    assert why in found, found


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b',"header":', b', "header":', "has no ,"),
        (b',"header":', b',"header" :', "has no ,"),
        (b',"header":', b',"h\\u0065ader":', "has no ,"),
        (b',"ranges":', b', "ranges":', "has no ,"),
        (b',"ranges":{', b',"ranges": {', "has no ,"),
        (b',"ranges":{', b',"rang\\u0065s":{', "has no ,"),
        (b',"header":', b',"header":{},"header":', "is not JSON"),
        (b'{"file":"one', b'{"header":{},"file":"one', "names 'header' twice"),
        (b'{"file":"one', b'{"header" : {"a":1},"file":"one', "names 'header' twice"),
        (b'{"file":"one', b'{"ranges":[],"file":"one', "names 'ranges' twice"),
        (b',"header":', b',"x":[1,"header":', "is not JSON"),
        (b',"header":', b',"x":{"y":1,"header":', "is not JSON"),
        (b'"file":"one', b'"file":",\\"header\\":one', "a plain path"),
    ],
)  # fmt: skip
def test_a_header_and_ranges_are_members_of_the_line_in_this_order(
    old: bytes, new: bytes, why: str
) -> None:
    text = handmade.text_of(handmade.in_memory())
    changed = text.replace(old, new, 1)
    assert changed != text
    assert why in refused(gzip.compress(changed))


@pytest.mark.parametrize("place", ["nbytes", "header_sha256", "ranges"])
def test_a_header_within_another_member_is_none(place: str) -> None:
    """In the line as JSON parsers read it, the header is empty, and another one deeper in it."""
    lines = handmade.in_memory()
    line = lines[1]
    inner = {"x": 1, "header": line["header"], "ranges": line["ranges"]}
    others = {**line, "header": {}, place: inner}
    order = [key for key in ("header", "ranges") if key != place] + [place]
    others = {key: others[key] for key in (*(others.keys() - set(order)), *order)}
    spelled = {key: handmade.spelled(value) for key, value in others.items()}
    # With spaces, so that the inner ones are those that are found.
    text = b"{%b}" % b",".join(b'"%b" : %b' % (key.encode(), each) for key, each in spelled.items())
    assert json.loads(text)["header"] == {}
    first, _, last = handmade.text_of(lines).splitlines()
    refused(gzip.compress(b"\n".join([first, text, last])))


def test_a_header_that_comes_behind_the_ranges_is_refused() -> None:
    lines = handmade.in_memory()
    lines[1]["header"] = lines[1].pop("header")
    assert "has no ," in refused(packed(lines))


def test_the_bytes_of_headers_are_bounded_whatever_their_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Spaces make gigabytes of a text of two bytes."""
    lines = handmade.in_memory()
    nbytes = sum(line["header_nbytes"] for line in lines[1:])
    monkeypatch.setattr("shardsurgeon.storage.formats.view.MAX_HEADERS_NBYTES", nbytes)
    read(lines)
    monkeypatch.setattr("shardsurgeon.storage.formats.view.MAX_HEADERS_NBYTES", nbytes - 1)
    assert f"has headers of more than {nbytes - 1:,} bytes" in refused(packed(lines))


def setting(line: int, *place: str | int) -> Callable[[object], Change]:
    return lambda value: lambda lines: put(lines[line], place, value)


COLUMN = [setting(1, "ranges", name, 0) for name in ("file", "begin", "nbytes")]
NO_NUMBERS = [-1, 2**63, 10**400, True, 1.0, -0.0, float("nan"), float("inf"), None, "0", [], {}]
NO_NAMES = [
    "", ".", "..", "../a.safetensors", "/a.safetensors", "a//b.safetensors", "./a.safetensors",
    "c:\\a.safetensors", "a\\b.safetensors", "c:a.safetensors", "a\0.safetensors",
    "a\n.safetensors", "\x1b]0;t\x07.safetensors", "\ud800.safetensors", "config.json",
    "a.safetensors/", "~",
    "x" * 255 + ".safetensors", 7, None, ["a.safetensors"], {"a": 1},
]  # fmt: skip


def removing(*place: str | int) -> Change:
    def change(lines: Lines) -> None:
        holder: Any = lines
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]

    return change


def other_header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Another header, with the size and the digest that it has."""

    def put_in(lines: Lines) -> None:
        header = lines[1]["header"]
        change(header)
        ranges = lines[1]["ranges"]
        columns = zip(ranges["file"], ranges["begin"], ranges["nbytes"], strict=True)
        lines[1] = shard(lines[1]["file"], header, list(columns))

    return put_in


BROKEN: dict[str, tuple[Change, str]] = {
    "another format": (setting(0, "format")("zip"), "does not say that this is the manifest"),
    "a newer version": (setting(0, "version")(2), "has version 2, .*; use the version .* newer"),
    "version True": (setting(0, "version")(True), "has version True"),
    "version 1.0": (setting(0, "version")(1.0), "has version 1.0"),
    "no source": (setting(0, "source")(""), "its source is ''"),
    "a source that is no text": (setting(0, "source")(["x"]), r"its source is \['x'\]"),
    "a source with a surrogate": (setting(0, "source")("\ud800"), "its source is"),
    "a source with a NUL": (setting(0, "source")("a\0b"), "its source is"),
    "an unknown key in the head": (setting(0, "then")(1), "unknown key 'then'"),
    "an unknown key in a line": (setting(1, "then")(1), "unknown key 'then'"),
    "a missing key in the head": (removing(0, "shards"), "lacks shards"),
    "a missing key in a line": (removing(1, "header_sha256"), "lacks header_sha256"),
    "files that are no list": (setting(0, "files")({"a": 1}), "is not a list"),
    "a file without a stamp": (setting(0, "files", 0)(["a.safetensors", 1]), "is not a name, a"),
    "an empty stamp": (setting(0, "files", 0, 2)(""), "stamp ''"),
    "a stamp that is no text": (setting(0, "files", 0, 2)(5), "stamp 5"),
    "a file twice": (lambda ls: ls[0]["files"].insert(0, ls[0]["files"][0]), "lists a file twice"),
    "the own file not last": (lambda ls: ls[0]["files"].reverse(), "its own before others"),
    "an own file that is not known by its SHA-256": (setting(0, "files", 2, 2)("0"), "SHA-256"),
    "an own file beyond any": (setting(0, "files", 2, 1)(2**40), "at most 268,435,456 are read"),
    "fewer shards than it says": (lambda ls: ls.pop(), r"announces 2 shards .*, has 1 of 3"),
    "no shards": (lambda ls: ls.__delitem__(slice(1, None)), "has 0 of 0"),
    "more tensors than there are": (setting(0, "tensors")(6), "of 6 tensors, has 2 of 5"),
    "counts that are true": (setting(0, "shards")(True), "announces True"),
    "a shard in a folder": (setting(1, "file")("a/b.safetensors"), "view's own folder"),
    "a shard twice": (setting(2, "file")("ONE.safetensors"), "lists a shard twice"),
    "a tensor in two shards": (
        lambda ls: ls.__setitem__(2, shard("two.safetensors", {"x": entry("F16", [5], 0)},
                                           [(1, ls[2]["ranges"]["begin"][0], 10)])),
        "tensor 'x' is in two shards",
    ),
    "a header that is longer": (setting(1, "header_nbytes")(10**12), "a header of"),
    "a header that is cut": (setting(1, "header_nbytes")(7), "are no sizes"),
    "a header of another length": (
        lambda ls: ls[1].update({key: ls[1][key] + 8 for key in ("nbytes", "header_nbytes")}),
        "its header is not the one",
    ),
    "a digest of another header": (setting(1, "header_sha256")("0" * 64), "not the one"),
    "a digest that is none": (setting(1, "header_sha256")(5), "not the one"),
    "a header that is a list": (setting(1, "header")([1]), "begins with"),
    "a header that is text": (setting(1, "header")("x"), "begins with"),
    "another name in the header": (
        lambda ls: ls[1]["header"].update(w=ls[1]["header"].pop("y")), "not the one",
    ),
    "a shape that does not fit": (other_header(lambda h: h["x"].update(shape=[3, 3])), "takes 36"),
    "a dtype that does not exist": (
        other_header(lambda h: h["x"].update(dtype="F7")),
        "unknown dtype",
    ),
    "a hole in the data": (
        other_header(lambda h: h["y"].update(data_offsets=[34, 46])),
        "hole of 2",
    ),
    "data that overlaps": (other_header(lambda h: h["y"].update(data_offsets=[30, 42])), "overlap"),
    "metadata of numbers": (
        other_header(lambda h: h.update(__metadata__={"a": 1})),
        "not to a string",
    ),
    "a name with a surrogate": (
        lambda ls: ls[1]["header"].update({"\ud800": ls[1]["header"].pop("y")}), "surrogate",
    ),
    "a file that is smaller": (setting(1, "nbytes")(1), "a header of"),
    "a file that is larger": (setting(1, "nbytes")(10**6), "surplus bytes"),
    "ranges that are a list": (setting(1, "ranges")([]), "has no ,"),
    "a fourth column": (setting(1, "ranges", "more")([]), "are not the columns"),
    "columns of two lengths": (lambda ls: ls[1]["ranges"]["begin"].pop(), "differ in length"),
    "a range of a file that is not listed": (COLUMN[0](3), "of file 3 do not exist"),
    "a range beyond its file": (COLUMN[1](10**6), "of a.safetensors do not exist"),
    "a range beyond 64 bits": (COLUMN[1](2**63 - 1), "do not exist"),
    "an empty range": (COLUMN[2](0), "do not exist"),
    "a range that goes into the next tensor": (
        lambda ls: ls[1]["ranges"].update(file=[0, 2, 0], begin=[0, 0, 0], nbytes=[26, 6, 12]),
        "goes on behind byte 24",
    ),
    "a range too few": (
        lambda ls: [column.pop() for column in ls[1]["ranges"].values()],
        "its ranges are 32 bytes, its tensors 44",
    ),
    "a range too many": (
        lambda ls: [column.append(column[-1]) for column in ls[1]["ranges"].values()],
        "its ranges are 56 bytes, its tensors 44",
    ),
    "ranges that are as many bytes modulo 2^64": (
        lambda ls: (
            ls[0]["files"][0].__setitem__(1, 2**63 - 1),
            ls[1].update(ranges={"file": [0, 0, 0], "begin": [0, 0, 0],
                                 "nbytes": [2**63 - 1, 2**63 - 1, 46]}),
        ),
        "its ranges are 18,446,744,073,709,551,660 bytes, its tensors 44",
    ),
    **{
        f"{column} {number!r:.20}": (change(number), f"ranges.{column} has|do not exist")
        for column, change in zip(("file", "begin", "nbytes"), COLUMN, strict=True)
        for number in NO_NUMBERS
    },
    **{
        f"{key} {number!r:.20}": (setting(1, key)(number), "are no sizes|a header of|surplus|trunc")
        for key in ("nbytes", "header_nbytes")
        for number in NO_NUMBERS
    },
    **{
        f"size {number!r:.20}": (setting(0, "files", 0, 1)(number), "has the size|do not exist")
        for number in NO_NUMBERS
    },
    **{f"shard {name!r:.20}": (setting(1, "file")(name), "line 2: .* is ") for name in NO_NAMES},
    **{f"file {name!r:.20}": (setting(0, "files", 0, 0)(name), "files: ") for name in NO_NAMES},
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_format_is_refused_in_one_line(change: Change, said: str) -> None:
    lines = handmade.in_memory()
    change(lines)
    found = refused(packed(lines))
    assert re.search(said, found), found


def once(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(old, new, 1)


TEXTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda raw: b"", "line 1 is not JSON"),
    "a blank line": (once(b"\n", b"\n\n"), "line 2 is not JSON"),
    "a blank line at the end": (lambda raw: raw + b"\n", "line 4 is not JSON"),
    "a list": (lambda raw: b"[]\n" + raw, "not a JSON object"),
    "a key twice in the head": (once(b'"version"', b'"version": 2, "version"'), "'version' twice"),
    "a key twice in a line": (once(b'"nbytes"', b'"nbytes": 1, "nbytes"'), "names 'nbytes' twice"),
    "a tensor twice": (once(b'"header":{', b'"header":{"y":1,'), "header names 'y' twice"),
    "a key of a tensor twice": (once(b'"dtype"', b'"dtype": "F32", "dtype"'), "'dtype' twice"),
    "a column twice": (once(b'"ranges":{', b'"ranges":{"file":[1],'), "are not the columns"),
    "a minus zero": (once(b'"begin":[', b'"begin":[-0,'), "ranges.begin has -0.0"),
    "no UTF-8": (once(b"source", b"sourc\xff"), "is not UTF-8"),
    "lists in lists": (lambda raw: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    "5,000 digits": (once(b'"version":1', b'"version":' + b"1" * 5000), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_no_manifest_is_refused(change: Callable[[bytes], bytes], said: str) -> None:
    text = handmade.text_of(handmade.in_memory())
    changed = change(text)
    assert changed != text
    found = refused(gzip.compress(changed))
    assert re.search(said, found), found


def stored(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


PACKED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not packed": (lambda text: text, "cannot be unpacked"),
    "nothing at all": (lambda text: b"", "is cut short"),
    "cut": (lambda text: stored(text)[:-20], "is cut short"),
    "without the last byte": (lambda text: stored(text)[:-1], "is cut short"),
    "another checksum": (lambda text: stored(text)[:-8] + bytes(8), "cannot be unpacked"),
    "another length": (lambda text: stored(text)[:-4] + bytes(4), "cannot be unpacked"),
    "zeros behind it": (lambda text: stored(text) + bytes(8), "more bytes behind its end"),
    "far behind it": (lambda text: stored(text) + bytes(10**6), "more bytes behind its end"),
    "two members": (lambda text: stored(text) + stored(text[:0]), "more bytes behind its end"),
    "a member for each line": (
        lambda text: b"".join(stored(line + b"\n") for line in text.splitlines()),
        "more bytes behind its end",
    ),
    "zlib": (lambda text: zlib.compress(text), "cannot be unpacked"),
}


@pytest.mark.parametrize(("change", "said"), PACKED.values(), ids=PACKED.keys())
def test_one_whole_member_of_gzip_is_read_and_nothing_else(
    change: Callable[[bytes], bytes], said: str
) -> None:
    found = refused(change(handmade.text_of(handmade.in_memory())))
    assert said in found, found


def bomb(piece: bytes, times: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """gzip of so many pieces, made without having them all in memory."""
    packer = zlib.compressobj(9, wbits=31)
    found = [packer.compress(before)]
    found += [packer.compress(piece) for _ in range(times)]
    return b"".join([*found, packer.compress(after), packer.flush()])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (lambda: bomb(bytes(MB), 140), "has a line of more than"),
        (lambda: bomb(b"\n" * MB, 40), "line 1 is not JSON"),
        (lambda: bomb(b"{}\n" * 100_000, 100), "does not say that this is"),
        (lambda: bomb(b"[]," * 100_000, 40, b'{"a":[', b"1]}\n"), "of memory, at most"),
        (lambda: gzip.compress(b"") * 500_000, "more bytes behind its end"),
    ],
    ids=["140 MB of zeros", "blank lines", "empty objects", "lists", "half a million members"],
)
def test_a_bomb_is_refused_in_bounded_memory_and_time(raw: Callable[[], bytes], said: str) -> None:
    data = raw()
    tracemalloc.start()
    try:
        assert said in refused(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 * MB


def test_what_is_unpacked_is_bounded_in_a_line_and_in_all() -> None:
    data = gzip.compress(b"123\n" * 1_000_000)
    assert sum(map(len, lines_of(data, 4, 4_000_000))) == 4_000_000
    with pytest.raises(ValueError, match="line of more than 3 bytes"):
        next(lines_of(data, 3, 4_000_000))
    with pytest.raises(ValueError, match="unpacks to more than 3,999,999 bytes"):
        list(lines_of(data, 4, 3_999_999))


def test_ranges_are_counted_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader takes for each of them is bounded by their number, not by the text's size."""
    monkeypatch.setattr("shardsurgeon.storage.formats.view.MAX_RANGES", 5)
    read(handmade.in_memory())
    monkeypatch.setattr("shardsurgeon.storage.formats.view.MAX_RANGES", 4)
    assert "has more than 4 ranges" in refused(packed(handmade.in_memory()))


# Whatever a writer is given is what a reader finds


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[SourceFile], list[tuple[str, list[Any]]]]:
    """Files of a source and shards of tensors, each of ranges and own bytes."""
    number = st.integers(1, 9)
    files = [
        SourceFile(f"{n}.safetensors", draw(st.integers(100, 10**12)), f"{n}:1")
        for n in range(draw(number))
    ]

    def piece() -> Segment | Literal:
        if draw(st.integers(0, 4)) == 0:
            return Literal(draw(st.binary(max_size=5)))
        file = draw(st.sampled_from(files))
        nbytes = draw(st.integers(0, 99))
        return Segment(file.name, draw(st.integers(0, file.nbytes - nbytes)), nbytes)

    shards = []
    for n in range(draw(number)):
        tensors = [[piece() for _ in range(draw(st.integers(0, 4)))] for _ in range(draw(number))]
        shards.append((f"model-{n}.safetensors", tensors))
    return files, shards


@given(
    plans(),
    st.text(min_size=1).filter(lambda text: "\0" not in text and text.isprintable()),
    st.sampled_from([None, 0, 1]),
    st.integers(0, 5000),
)
@settings(max_examples=60, deadline=None)
def test_any_plan_is_read_as_it_was_written(
    plan: tuple[list[SourceFile], list[tuple[str, list[Any]]]],
    source: str,
    indent: int | None,
    padding: int,
) -> None:
    files, shards = plan

    def respelled(head: bytes) -> bytes:
        text = json.dumps(json.loads(head[8:]), indent=indent).encode() + b" " * padding
        return len(text).to_bytes(8, "little") + text

    writer = ManifestWriter(source, files)
    names, heads = {}, {}
    for file, tensors in shards:
        sizes = [sum(piece.nbytes for piece in tensor) for tensor in tensors]
        named = {f"{file}.{n}é": np.zeros(size, np.uint8) for n, size in enumerate(sizes)}
        # The library sorts tensors by name; there are fewer than ten.
        written = save(named)
        head = written[: 8 + int.from_bytes(written[:8], "little")]
        names[file] = list(named)
        head = respelled(head)
        heads[file] = head
        pieces = Pieces.of(piece for tensor in tensors for piece in tensor)
        writer.add(file, head, len(tensors), pieces)
    made = writer.finish()
    found = read_manifest(made[VIEW_NAME], VIEW_NAME)
    own = made.get(DATA_NAME, b"")
    assert (found.source, list(found.files)) == (source, files)
    assert (found.data is None) == (not own)
    for each, (file, tensors) in zip(found.shards, shards, strict=True):
        assert (each.file, each.head) == (file, heads[file])
        assert [record.name for record in each.header.tensors] == names[file]
        for record, tensor in zip(each.header.tensors, tensors, strict=True):
            there = list(each.ranges(record.begin, record.end))
            read_back = [
                Literal(own[at : at + n]) if name == DATA_NAME else Segment(name, at, n)
                for name, at, n in there
            ]
            assert read_back == [piece for piece in tensor if piece.nbytes]
        whole = list(each.ranges(0, each.nbytes - len(each.head)))
        assert sum(n for *_, n in whole) == sum(p.nbytes for t in tensors for p in t)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_stretches_of_a_shard_are_those_of_a_byte_by_byte_reading(
    sizes: list[int], data: st.DataObject
) -> None:
    total = sum(sizes)
    numbers = [data.draw(st.integers(0, 2)) for _ in sizes]
    begins = [data.draw(st.integers(0, 50)) for _ in sizes]
    every = [
        (number, begin + at)
        for number, begin, nbytes in zip(numbers, begins, sizes, strict=True)
        for at in range(nbytes)
    ]
    header = Header(TensorTable.of(()), None, 8)
    columns = [np.array(column, np.int64) for column in (numbers, begins, sizes)]
    one = ViewShard("s.safetensors", 8 + total, header, bytes(8), ["a", "b", "c"], columns)
    pairs = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
    asked = data.draw(st.lists(pairs, max_size=6))
    first, last = np.array(asked, np.int64).reshape(-1, 2).T
    which, *found = (column.tolist() for column in one.columns(first, last))
    rows = list(zip(which, *found, strict=True))
    assert which == sorted(which)
    for place, (begin, end) in enumerate(asked):
        mine = [row[1:] for row in rows if row[0] == place]
        assert [(n, at + i) for n, at, count in mine for i in range(count)] == every[begin:end]
        assert all(count > 0 for *_, count in mine)
        assert list(one.ranges(begin, end)) == [("abc"[n], at, count) for n, at, count in mine]


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_is_refused_or_changes_nothing_that_counts(seed: int) -> None:
    """gzip's checksum sees to that, but for its header and the last bits of the packed data."""
    numbers = random.Random(seed)
    raw = bytearray(packed(handmade.in_memory()))
    at = numbers.randrange(len(raw))
    raw[at] ^= 1 << numbers.randrange(8)
    try:
        found = read_manifest(bytes(raw), VIEW_NAME)
    except InputError:
        return
    assert everything(found) == everything(read(handmade.in_memory()))


PLACES = list(places_in(handmade.in_memory()))


@given(st.sampled_from(PLACES), st.sampled_from(ODD))
@settings(max_examples=200, deadline=None)
def test_a_changed_value_is_refused_or_is_what_is_read(
    place: tuple[str | int, ...], odd: Any
) -> None:
    """Nothing is guessed: what is accepted says what the JSON says, for an independent reading."""
    lines = put(deepcopy(handmade.in_memory()), place, deepcopy(odd))
    try:
        found = read_manifest(packed(lines), VIEW_NAME)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
        return
    except TypeError:  # no list of lines any more
        assert not place
        return
    head, *shards = lines
    assert found.source == head["source"]
    listed = [[file.name, file.nbytes, file.stamp] for file in found.files]
    assert listed == [each for each in head["files"] if each[0] != DATA_NAME]
    for each, line in zip(found.shards, shards, strict=True):
        assert each.head[8:].rstrip() == handmade.spelled(line["header"])
        assert hashlib.sha256(each.head).hexdigest() == line["header_sha256"]
        assert (each.file, each.nbytes) == (line["file"], line["nbytes"])
        columns = line["ranges"]
        begins = [0, *accumulate(columns["nbytes"])]
        for record in each.header.tensors:
            assert list(line["header"][record.name]["data_offsets"]) == [record.begin, record.end]
            inside = [
                (head["files"][number][0], begin, nbytes)
                for number, begin, nbytes, at in zip(
                    columns["file"], columns["begin"], columns["nbytes"], begins, strict=False
                )
                if record.begin <= at < record.end
            ]
            assert list(each.ranges(record.begin, record.end)) == inside
