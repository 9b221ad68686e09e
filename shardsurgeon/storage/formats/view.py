"""The manifest of a view: which byte ranges of a source the shards of a pruned model are made of.

A view is a folder with all files of a pruned model but its shards. In their place it has
`shardsurgeon_view.jsonl.gz`: gzip, one member and nothing behind it, and in it JSON objects in
UTF-8, one a line, with these members and no others. The first is the head:

    {"format": "shardsurgeon view", "version": 1, "source": "../Kimi-K2.5",
     "files": [["model-00001-of-00064.safetensors", 9980000000, "1721910000000000000:4711"], ...],
     "shards": 22, "tensors": 75041}

`source` is a folder, absolute or relative to the view's own, or a commit of a repository of the
Hugging Face Hub, `hf://org/name@<40 hex digits>`, or a folder in one, `hf://org/name@<...>/folder`.
`files` are those of its `.safetensors` files that the shards are made of, each with its size in
bytes and its stamp, as the place has it (of a folder: the time of its last writing in nanoseconds,
a colon, its inode; of the Hub: its SHA-256): a file whose size or stamp is another one now is not
what was planned with. `shards` and `tensors` say how many there are in all. Then comes one line for
each shard:

    {"file": "model-00001-of-00022.safetensors", "nbytes": 9970000000,
     "header_nbytes": 412344, "header_sha256": "...",
     "header": {"__metadata__": {...}, "<tensor>": {"dtype": ..., "shape": ...,
                "data_offsets": ...}, ...},
     "ranges": {"file": [0, 0, ...], "begin": [412352, ...], "nbytes": [14680064, ...]}}

`file` is the shard's name, `nbytes` the size of the whole file. `header` is what its safetensors
header says. The file begins with `header_nbytes` bytes whose SHA-256, in hex, is `header_sha256`:
the length of what follows in 8 bytes, little-endian, and `header` as it stands there, with the same
order of members, but without white space, with characters beyond ASCII as they are in UTF-8, and
with spaces behind the last brace up to a multiple of 8. `ranges`, three columns of equal length,
follow one another through the data section behind it: number in `files`, first byte there, how
many. None is empty, and none goes beyond the tensor that it begins in, so that a tensor's ranges
are those within its `data_offsets`.

Values that no source has, expert counts and tables of expert ids, lie in the view's own
`shardsurgeon_view.data`, which `files` then lists last, with its SHA-256 in hex as the stamp.

`read_manifest` checks all of that, `storage.view` that the source is what it was, and
`shardsurgeon inspect VIEW` runs both: one line and exit status 2 where something does not hold.
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from typing import Any, NoReturn

from shardsurgeon.errors import CheckpointError, HeaderError
from shardsurgeon.storage.formats.gzip_lines import lines_of
from shardsurgeon.storage.formats.index import shard_name_problem
from shardsurgeon.storage.formats.safetensors import (
    PREFIX_NBYTES,
    Header,
    header_of,
)
from shardsurgeon.storage.formats.strict_json import (
    Repeated,
    brief,
    is_text,
    is_whole_number,
    read_object,
)
from shardsurgeon.storage.limits import (
    HEADER,
    MAX_HEADERS_NBYTES,
    MAX_OWN_NBYTES,
    MAX_RANGES,
    MAX_TENSORS,
    VIEW_LINE,
)
from shardsurgeon.storage.source import SourceFile, leads_out, unusual

VIEW_NAME = "shardsurgeon_view.jsonl.gz"
DATA_NAME = "shardsurgeon_view.data"
VERSION = 1

_FORMAT = "shardsurgeon view"
_MAKE_AGAIN = "make the view again with `apply --view`"
_HEAD_KEYS = ("format", "version", "source", "files", "shards", "tensors")
_SHARD_KEYS = ("file", "nbytes", "header_nbytes", "header_sha256", "header", "ranges")
_COLUMNS = ("file", "begin", "nbytes")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bytes of a manifest when unpacked: its headers, and as much again for the ranges.
_MAX_NBYTES = 2 * MAX_HEADERS_NBYTES
_MAX_INT = 2**63 - 1

# Bytes of a file: its name, the first, how many.
Range = tuple[str, int, int]


class ViewShard:
    """One shard of a view: what its header says, and where every byte of its data lies.

    file: its name; nbytes: the size of the whole file; header: what its header says; head: the
    header's bytes, length before them.
    """

    def __init__(
        self,
        file: str,
        nbytes: int,
        header: Header,
        head: bytes,
        files: Sequence[SourceFile],
        ranges: Sequence[array[int]],
    ) -> None:
        """files: what the first column of `ranges` counts; ranges: the three columns."""
        self.file, self.nbytes, self.header, self.head = file, nbytes, header, head
        self._files = files
        self._file, self._begin, sizes = ranges
        # One past the last byte of each range, in the data section.
        self._ends = array("q", accumulate(sizes))

    def ranges(self, begin: int, end: int) -> Iterator[Range]:
        """Where the bytes [begin, end) of the data section lie, in order."""
        number = bisect_right(self._ends, begin)
        while begin < end:
            upto = min(self._ends[number], end)
            first = self._ends[number - 1] if number else 0
            at = self._begin[number] + begin - first
            yield self._files[self._file[number]].name, at, upto - begin
            begin, number = upto, number + 1


class Manifest:
    """What a manifest says.

    source: the place, as it stands there; files: those of the place that the shards are made of;
    data: the view's own file of values, None where it has none; shards: in order.
    """

    def __init__(
        self, source: str, listed: Sequence[SourceFile], shards: Sequence[ViewShard]
    ) -> None:
        """listed: the files of the place, and the view's own among them."""
        self.source, self.shards = source, tuple(shards)
        self.files = tuple(file for file in listed if file.name != DATA_NAME)
        self.data = next((file for file in listed if file.name == DATA_NAME), None)


class ManifestWriter:
    """Makes a manifest, shard by shard, and the file of values that goes with it."""

    def __init__(self, source: str, files: Sequence[SourceFile]) -> None:
        """source: the place, as it is to stand there; files: what shards may take bytes of."""
        self._source, self._files = source, list(files)
        self._numbers = {file.name: number for number, file in enumerate(files)}
        self._data = bytearray()
        self._lines: list[bytes] = []
        self._tensors = 0

    def add(self, file: str, head: bytes, tensors: int, pieces: Iterable[Range | bytes]) -> None:
        """Add a shard. head: its header's bytes, length before them, as `build_header` makes them;
        tensors: how many it has; pieces: what its data is joined of, none of them in two."""
        numbers: list[int] = []
        begins: list[int] = []
        sizes: list[int] = []
        own, known = len(self._files), self._numbers
        for piece in pieces:
            if isinstance(piece, bytes):
                number, begin, nbytes = own, len(self._data), len(piece)
                self._data += piece
            else:
                number, begin, nbytes = known[piece[0]], piece[1], piece[2]
            if nbytes:
                numbers.append(number)
                begins.append(begin)
                sizes.append(nbytes)
        said = {
            "file": file,
            "nbytes": len(head) + sum(sizes),
            "header_nbytes": len(head),
            "header_sha256": hashlib.sha256(head).hexdigest(),
        }
        ranges = dict(zip(_COLUMNS, (numbers, begins, sizes), strict=True))
        # The header stands there already as JSON: making it again would take as long as the rest.
        header = head[PREFIX_NBYTES:].rstrip(b" ")
        line = b'%b,"header":%b,"ranges":%b}\n'
        self._lines.append(line % (_json(said)[:-1], header, _json(ranges)))
        self._tensors += tensors

    def finish(self) -> dict[str, bytes]:
        """Name → content of the manifest and, where there is one, of the file of values."""
        files = [[file.name, file.nbytes, file.stamp] for file in self._files]
        made: dict[str, bytes] = {}
        if self._data:
            made[DATA_NAME] = bytes(self._data)
            digest = hashlib.sha256(self._data).hexdigest()
            files.append([DATA_NAME, len(self._data), digest])
        head = {
            "format": _FORMAT,
            "version": VERSION,
            "source": self._source,
            "files": files,
            "shards": len(self._lines),
            "tensors": self._tensors,
        }
        self._lines.insert(0, _json(head) + b"\n")
        # Without the time, so that one plan gives one manifest.
        packed = BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=3, mtime=0) as file:
            file.writelines(self._lines)
        made[VIEW_NAME] = packed.getvalue()
        return made


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _head(entries: dict[str, object]) -> bytes:
    """The bytes that a shard begins with, whose header says this."""
    text = _json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(PREFIX_NBYTES, "little") + text


def read_manifest(raw: bytes, where: str) -> Manifest:
    """Turn the bytes of a manifest into what it says, with every check that needs no source.

    where: the file, as messages name it. Raises CheckpointError, or HeaderError, for whatever
    breaks the format: ranges outside of their file or across tensors, a tensor that is there twice,
    names that are no plain paths, sizes that do not add up.
    """
    # None of the objects that it makes, a few for each tensor, is a part of a cycle: looking for
    # such takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _ManifestReader(where).read(raw)
    finally:
        if collecting:
            gc.enable()


class _ManifestReader:
    """Checks one manifest. Every refusal names the file and, where it can, the shard."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._files: list[SourceFile] = []
        self._seen: set[str] = set()
        self._ranges_left = MAX_RANGES

    def read(self, raw: bytes) -> Manifest:
        lines = self._lines(raw)
        head = self._object(next(lines, b""), "line 1")
        self._require_version(head)
        self._require_keys(head, _HEAD_KEYS, "line 1")
        source = head["source"]
        if not is_text(source) or not source or "\0" in source:
            self._refuse(f"its source is {brief(source)}, not a folder or a repository")
        self._files = [self._file(entry) for entry in self._list(head["files"], "files")]
        names = [file.name for file in self._files]
        if len(set(names)) < len(names) or DATA_NAME in names[:-1]:
            self._refuse("lists a file twice, or its own before others")
        shards = [
            self._shard(self._object(line, f"line {number:,}"), number)
            for number, line in enumerate(lines, start=2)
        ]
        # Counts, and so neither True nor 1.0.
        said = tuple(head[key] if is_whole_number(head[key]) else None for key in _HEAD_KEYS[-2:])
        if not shards or said != (len(shards), len(self._seen)):
            problem = f"announces {brief(head['shards'])} shards of {brief(head['tensors'])} "
            self._refuse(f"{problem}tensors, has {len(shards):,} of {len(self._seen):,}")
        # Without regard to case: not every disk tells them apart.
        if len({shard.file.casefold() for shard in shards}) < len(shards):
            self._refuse("lists a shard twice")
        return Manifest(source, self._files, shards)

    def _lines(self, raw: bytes) -> Iterator[bytes]:
        try:
            yield from lines_of(raw, VIEW_LINE.nbytes, _MAX_NBYTES)
        except ValueError as error:
            self._refuse(str(error))

    def _object(self, line: bytes, subject: str) -> dict[str, Any]:
        return read_object(line, self._where, subject, CheckpointError, _MAKE_AGAIN, VIEW_LINE)

    def _require_version(self, head: dict[str, Any]) -> None:
        if head.get("format") != _FORMAT:
            self._refuse("line 1 does not say that this is the manifest of a view")
        version = head.get("version")
        if not is_whole_number(version, 1) or version != VERSION:
            problem = f"has version {brief(version)}, this program reads {VERSION}"
            self._refuse(problem, "use the version of shardsurgeon that made it, or a newer one")

    def _require_keys(self, value: dict[str, Any], keys: tuple[str, ...], subject: str) -> None:
        if missing := sorted(set(keys) - value.keys()):
            self._refuse(f"{subject} lacks {' and '.join(missing)}")
        if unknown := value.keys() - set(keys):
            self._refuse(f"{subject} has the unknown key {brief(min(unknown))}")

    def _list(self, value: object, what: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(f"{what}: {brief(value)} is not a list")
        return value

    def _file(self, entry: object) -> SourceFile:
        if not isinstance(entry, list) or len(entry) != 3:
            self._refuse(f"files: {brief(entry)} is not a name, a size and a stamp")
        name, nbytes, stamp = entry
        if name != DATA_NAME:
            self._require_shard_name(name, "files")
        # No stamp is empty: who does not know a file's time and inode cannot have it read.
        if not is_whole_number(nbytes) or nbytes > _MAX_INT or not is_text(stamp) or not stamp:
            self._refuse(f"files: {brief(name)} has the size {brief(nbytes)}, stamp {brief(stamp)}")
        if name == DATA_NAME and not _SHA256.fullmatch(stamp):
            self._refuse(f"files: the stamp of {name} is not its SHA-256")
        if name == DATA_NAME and nbytes > MAX_OWN_NBYTES:
            self._refuse(f"files: {name} has {nbytes:,} bytes, at most {MAX_OWN_NBYTES:,} are read")
        return SourceFile(name, nbytes, stamp)

    def _require_shard_name(self, name: object, subject: str) -> None:
        if not isinstance(name, str):
            self._refuse(f"{subject}: {brief(name)} is not a file name")
        problem = shard_name_problem(name) or unusual(name)
        if problem or leads_out(name):
            self._refuse(f"{subject}: {brief(name)} is {problem or 'no name within its folder'}")

    def _shard(self, line: dict[str, Any], number: int) -> ViewShard:
        subject = f"line {number:,}"
        self._require_keys(line, _SHARD_KEYS, subject)
        file, nbytes, begin, digest, entries, columns = (line.pop(key) for key in _SHARD_KEYS)
        self._require_shard_name(file, subject)
        if "/" in file:
            self._refuse(f"{subject}: the shard {brief(file)} is not in the view's own folder")
        if not is_whole_number(nbytes) or not is_whole_number(begin, PREFIX_NBYTES):
            sizes = f"nbytes {brief(nbytes)} and header_nbytes {brief(begin)}"
            self._refuse(f"{subject}: {sizes} are no sizes")
        if begin > min(HEADER.nbytes + PREFIX_NBYTES, nbytes) or nbytes > _MAX_INT:
            self._refuse(f"{subject}: a header of {brief(begin)} bytes in {brief(nbytes)}")
        if isinstance(entries, Repeated):
            self._refuse(f"{subject}: header names {brief(entries.key)} twice")
        if not isinstance(entries, dict):
            self._refuse(f"{subject}: header is {brief(entries)}, not an object")
        try:
            header = header_of(dict(entries), begin, nbytes, f"{self._where}: {file}")
        except HeaderError as error:
            raise HeaderError(error.where, error.problem, _MAKE_AGAIN) from error
        head = _head(entries)
        if len(head) != begin or hashlib.sha256(head).hexdigest() != digest:
            self._refuse(f"{file}: its header is not the one that the view was made with")
        for record in header.tensors:
            if record.name in self._seen:
                self._refuse(f"tensor {brief(record.name)} is in two shards")
            self._seen.add(record.name)
        if len(self._seen) > MAX_TENSORS:
            self._refuse(f"has more than {MAX_TENSORS:,} tensors: no model has so many")
        ranges = self._ranges(columns, header, nbytes - begin, file)
        return ViewShard(file, nbytes, header, head, self._files, ranges)

    def _ranges(
        self, value: object, header: Header, data_nbytes: int, file: str
    ) -> list[array[int]]:
        if not isinstance(value, dict) or value.keys() != set(_COLUMNS):
            self._refuse(f"{file}: its ranges are not the columns {', '.join(_COLUMNS)}")
        columns = [self._column(value[name], f"{file}: ranges.{name}") for name in _COLUMNS]
        if len({len(column) for column in columns}) > 1:
            self._refuse(f"{file}: the columns of its ranges differ in length")
        self._ranges_left -= len(columns[0])
        if self._ranges_left < 0:
            self._refuse(f"has more than {MAX_RANGES:,} ranges: no model has so many")
        sizes, at = [source.nbytes for source in self._files], 0
        ending = (record.end for record in header.tensors if record.nbytes)
        upto = next(ending, 0)
        for number, begin, nbytes in zip(*columns, strict=True):
            if number >= len(sizes) or not nbytes or begin + nbytes > sizes[number]:
                name = self._files[number].name if number < len(sizes) else f"file {number}"
                problem = f"{file}: bytes {begin:,} to {begin + nbytes:,} of {name} do not exist"
                self._refuse(problem)
            at += nbytes
            if at > upto:
                self._refuse(f"{file}: a range goes on behind byte {upto:,}, where a tensor ends")
            if at == upto:
                upto = next(ending, upto)
        if at != data_nbytes:
            self._refuse(f"{file}: its ranges are {at:,} bytes, its tensors {data_nbytes:,}")
        return columns

    def _column(self, value: object, what: str) -> array[int]:
        """A column of whole numbers; True and 1.0 are none."""
        items = self._list(value, what)
        whole = set(map(type, items)) <= {int}
        if not whole or min(items, default=0) < 0 or max(items, default=0) > _MAX_INT:
            odd = next(item for item in items if not is_whole_number(item) or item > _MAX_INT)
            self._refuse(f"{what} has {brief(odd)}, not a whole number below 2^63")
        return array("q", items)

    def _refuse(self, problem: str, remedy: str = _MAKE_AGAIN) -> NoReturn:
        raise CheckpointError(self._where, problem, remedy)
