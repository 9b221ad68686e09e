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

`file` is the shard's name, `nbytes` the size of the whole file. `header` is its safetensors header,
letter for letter: the text between the first `,"header":` of the line and the last `,"ranges":{`,
so that those two members stand in this order with no white space around their names. A text that
has an end of line in it stands there as a JSON string. The file begins with `header_nbytes` bytes
whose SHA-256, in hex, is `header_sha256`: the length of what follows in 8 bytes, little-endian, the
header's text in UTF-8, and spaces. `ranges`, three columns of equal length, follow one another
through the data section behind it: number in `files`, first byte there, how many. None is empty,
and none goes beyond the tensor that it begins in, so that a tensor's ranges are those within its
`data_offsets`.

Values that no source has, expert counts and tables of expert ids, lie in the view's own
`shardsurgeon_view.data`, which `files` then lists last, with its SHA-256 in hex as the stamp.

`read_manifest` checks all of that, `storage.view` that the source is what it was, and
`shardsurgeon inspect VIEW` runs both: one line and exit status 2 where something does not hold.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, NoReturn, Protocol

import numpy as np

from shardsurgeon.errors import CheckpointError, HeaderError
from shardsurgeon.storage.formats.gzip_lines import lines_of
from shardsurgeon.storage.formats.index import shard_name_problem
from shardsurgeon.storage.formats.safetensors import PREFIX_NBYTES, Header, parse_header
from shardsurgeon.storage.formats.strict_json import brief, is_text, is_whole_number, read_object
from shardsurgeon.storage.formats.tensor_table import Column, Stems
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
# What stands around a header in its line.
_BEFORE, _BEHIND = b',"header":', b',"ranges":{'
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
        files: Sequence[str],
        ranges: Sequence[Column],
    ) -> None:
        """files: what the first column of `ranges` counts; ranges: the three columns."""
        self.file, self.nbytes, self.header, self.head = file, nbytes, header, head
        self._files = files
        self._file, self._begin, sizes = ranges
        # One past the last byte of each range, in the data section, and the first.
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def ranges(self, begin: int, end: int) -> Iterator[Range]:
        """Where the bytes [begin, end) of the data section lie, in order."""
        if begin >= end:
            return
        inside = slice(
            int(self._ends.searchsorted(begin, "right")), int(self._ends.searchsorted(end)) + 1
        )
        columns = (self._file, self._begin, self._starts, self._ends)
        rows = zip(*(column[inside].tolist() for column in columns), strict=True)
        for file, at, first, last in rows:
            skipped = max(begin - first, 0)
            yield self._files[file], at + skipped, min(last, end) - first - skipped

    def columns(self, begin: Column, end: Column) -> tuple[Column, Column, Column, Column]:
        """Where many stretches [begin, end) of the data section lie, as columns: of each range in
        which stretch it is, the number of its file, its first byte there, how many.

        The ranges of a stretch stand together and in order.
        """
        first = self._ends.searchsorted(begin, "right")
        counts = np.where(begin < end, self._ends.searchsorted(end) + 1 - first, 0)
        which = np.repeat(np.arange(len(begin)), counts)
        place = np.arange(len(which)) + (first - np.cumsum(counts) + counts)[which]
        at = np.maximum(begin[which], self._starts[place])
        nbytes = np.minimum(end[which], self._ends[place]) - at
        return which, self._file[place], self._begin[place] + at - self._starts[place], nbytes


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


class Parts(Protocol):
    """What a shard's data is joined of, in order, as the columns of `execution.plan.Pieces`."""

    @property
    def files(self) -> Sequence[str]:
        """The files that bytes come from."""

    @property
    def file(self) -> Column:
        """The place in `files`, -1 for bytes of the view's own."""

    @property
    def begin(self) -> Column:
        """The first byte in that file, or the place in `literals`."""

    @property
    def nbytes(self) -> Column:
        """How many bytes."""

    @property
    def literals(self) -> Sequence[bytes]:
        """Bytes of the view's own."""


class ManifestWriter:
    """Makes a manifest, shard by shard, and the file of values that goes with it."""

    def __init__(self, source: str, files: Sequence[SourceFile]) -> None:
        """source: the place, as it is to stand there; files: what shards may take bytes of."""
        self._source, self._files = source, list(files)
        self._numbers = {file.name: number for number, file in enumerate(files)}
        self._data = bytearray()
        self._lines: list[bytes] = []
        self._tensors = 0

    def add(self, file: str, head: bytes, tensors: int, parts: Parts) -> None:
        """Add a shard. head: its header's bytes, length before them; tensors: how many it has;
        parts: what its data is joined of, none of them in two tensors."""
        begins = parts.begin.copy()
        for place in np.flatnonzero(parts.file < 0).tolist():
            literal = parts.literals[begins[place]]
            begins[place] = len(self._data)
            self._data += literal
        # The last is what -1 finds, the view's own.
        known = [self._numbers.get(name, -1) for name in parts.files]
        numbers = np.array([*known, len(self._files)], np.int64)[parts.file]
        columns = (column[parts.nbytes > 0] for column in (numbers, begins, parts.nbytes))
        said = {
            "file": file,
            "nbytes": len(head) + int(parts.nbytes.sum()),
            "header_nbytes": len(head),
            "header_sha256": hashlib.sha256(head).hexdigest(),
        }
        ranges = {name: column.tolist() for name, column in zip(_COLUMNS, columns, strict=True)}
        # The header stands there already as JSON: making it again would take as long as the rest.
        header = head[PREFIX_NBYTES:].rstrip(b" ")
        if b"\n" in header or b"\r" in header:
            header = _json(header.decode())
        line = (_json(said)[:-1], _BEFORE, header, _BEHIND, _json(ranges)[1:], b"}\n")
        self._lines.append(b"".join(line))
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


def read_manifest(raw: bytes, where: str) -> Manifest:
    """Turn the bytes of a manifest into what it says, with every check that needs no source.

    where: the file, as messages name it. Raises CheckpointError, or HeaderError, for whatever
    breaks the format: ranges outside of their file or across tensors, a tensor that is there twice,
    names that are no plain paths, sizes that do not add up.
    """
    return _ManifestReader(where).read(raw)


class _ManifestReader:
    """Checks one manifest. Every refusal names the file and, where it can, the shard."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._files: list[SourceFile] = []
        self._names: list[str] = []
        self._sizes = np.zeros(0, np.int64)
        self._stems = Stems()
        self._keys: list[Column] = []
        self._tensors = 0
        self._headers_left = MAX_HEADERS_NBYTES
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
        self._names = names = [file.name for file in self._files]
        if len(set(names)) < len(names) or DATA_NAME in names[:-1]:
            self._refuse("lists a file twice, or its own before others")
        self._sizes = np.array([file.nbytes for file in self._files], np.int64)
        shards = [self._shard(line, f"line {at:,}") for at, line in enumerate(lines, start=2)]
        self._require_once(shards)
        # Counts, and so neither True nor 1.0.
        said = tuple(head[key] if is_whole_number(head[key]) else None for key in _HEAD_KEYS[-2:])
        if not shards or said != (len(shards), self._tensors):
            problem = f"announces {brief(head['shards'])} shards of {brief(head['tensors'])} "
            self._refuse(f"{problem}tensors, has {len(shards):,} of {self._tensors:,}")
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

    def _shard(self, whole: bytes, subject: str) -> ViewShard:
        line, text = self._parted(whole, subject)
        file, nbytes, begin, digest, _, columns = (line.pop(key) for key in _SHARD_KEYS)
        self._require_shard_name(file, subject)
        if "/" in file:
            self._refuse(f"{subject}: the shard {brief(file)} is not in the view's own folder")
        if not is_whole_number(nbytes) or not is_whole_number(begin, PREFIX_NBYTES):
            sizes = f"nbytes {brief(nbytes)} and header_nbytes {brief(begin)}"
            self._refuse(f"{subject}: {sizes} are no sizes")
        if begin > min(HEADER.nbytes + PREFIX_NBYTES, nbytes) or nbytes > _MAX_INT:
            self._refuse(f"{subject}: a header of {brief(begin)} bytes in {brief(nbytes)}")
        # Of a text of two bytes, spaces make a header of any size.
        self._headers_left -= begin
        if self._headers_left < 0:
            problem = f"has headers of more than {MAX_HEADERS_NBYTES:,} bytes: no model has so many"
            self._refuse(problem)
        length = begin - PREFIX_NBYTES
        text = text.ljust(length)
        try:
            header = parse_header(text, nbytes, f"{self._where}: {file}")
        except HeaderError as error:
            raise HeaderError(error.where, error.problem, _MAKE_AGAIN) from error
        head = length.to_bytes(PREFIX_NBYTES, "little") + text
        if len(head) != begin or hashlib.sha256(head).hexdigest() != digest:
            self._refuse(f"{file}: its header is not the one that the view was made with")
        self._tensors += len(header.tensors)
        if self._tensors > MAX_TENSORS:
            self._refuse(f"has more than {MAX_TENSORS:,} tensors: no model has so many")
        self._keys.append(self._stems.keys(header.tensors))
        ranges = self._ranges(columns, header, nbytes - begin, file)
        return ViewShard(file, nbytes, header, head, self._names, ranges)

    def _parted(self, line: bytes, subject: str) -> tuple[dict[str, Any], bytes]:
        """A line with an empty header in its place, and that header's text.

        Whatever the text says, the line is JSON if both are, and has no other header: what is
        around the text is a member of one object, and the rest has exactly the keys that it must.
        """
        begin, end = line.find(_BEFORE), line.rfind(_BEHIND)
        if not 0 <= begin < end:
            self._require_keys(self._object(line, subject), _SHARD_KEYS, subject)
            self._refuse(
                f"{subject}: has no {_BEFORE.decode()} with a {_BEHIND.decode()} behind it"
            )
        begin += len(_BEFORE)
        text = line[begin:end]
        rest = self._object(b"%b{}%b" % (line[:begin], line[end:]), subject)
        self._require_keys(rest, _SHARD_KEYS, subject)
        if rest["header"] != {}:
            self._refuse(f"{subject}: has two headers")
        if text.startswith(b'"'):
            said = self._object(b'{"header":%b}' % text, subject)
            self._require_keys(said, ("header",), subject)
            if not is_text(said["header"]):
                self._refuse(f"{subject}: header is {brief(said['header'])}, which UTF-8 has not")
            text = said["header"].encode()
        return rest, text

    def _require_once(self, shards: Sequence[ViewShard]) -> None:
        """Refuse a tensor that is in two shards; no header has one twice."""
        keys = np.concatenate([*self._keys, np.zeros(0, np.int64)])
        order = np.argsort(keys)
        again = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if len(again):
            place = int(again[0])
            for shard in shards:
                if place < len(shard.header.tensors):
                    name = shard.header.tensors.name(place)
                    self._refuse(f"tensor {brief(name)} is in two shards")
                place -= len(shard.header.tensors)

    def _ranges(self, value: object, header: Header, data_nbytes: int, file: str) -> list[Column]:
        if not isinstance(value, dict) or value.keys() != set(_COLUMNS):
            self._refuse(f"{file}: its ranges are not the columns {', '.join(_COLUMNS)}")
        columns = [self._column(value[name], f"{file}: ranges.{name}") for name in _COLUMNS]
        number, begin, nbytes = columns
        if len({len(column) for column in columns}) > 1:
            self._refuse(f"{file}: the columns of its ranges differ in length")
        self._ranges_left -= len(number)
        if self._ranges_left < 0:
            self._refuse(f"has more than {MAX_RANGES:,} ranges: no model has so many")
        # A file that is not listed has no bytes. Nothing is added up that may exceed 64 bits.
        sizes = np.append(self._sizes, 0)[np.minimum(number, len(self._sizes))]
        outside = np.flatnonzero((nbytes == 0) | (nbytes > sizes) | (begin > sizes - nbytes))
        if len(outside):
            which, first, count = (int(column[outside[0]]) for column in columns)
            name = self._names[which] if which < len(self._names) else f"file {which}"
            self._refuse(f"{file}: bytes {first:,} to {first + count:,} of {name} do not exist")
        if (total := sum(nbytes.tolist())) != data_nbytes:
            self._refuse(f"{file}: its ranges are {total:,} bytes, its tensors {data_nbytes:,}")
        # As both end where the data does, all is well where every tensor ends as a range does.
        ends, upto = np.cumsum(nbytes), header.tensors.end[header.tensors.nbytes > 0]
        crossed = upto[ends[ends.searchsorted(upto)] != upto]
        if len(crossed):
            problem = f"a range goes on behind byte {crossed[0]:,}, where a tensor ends"
            self._refuse(f"{file}: {problem}")
        return columns

    def _column(self, value: object, what: str) -> Column:
        """A column of whole numbers; True and 1.0 are none."""
        items = self._list(value, what)
        whole = set(map(type, items)) <= {int}
        if not whole or min(items, default=0) < 0 or max(items, default=0) > _MAX_INT:
            odd = next(item for item in items if not is_whole_number(item) or item > _MAX_INT)
            self._refuse(f"{what} has {brief(odd)}, not a whole number below 2^63")
        return np.array(items, np.int64)

    def _refuse(self, problem: str, remedy: str = _MAKE_AGAIN) -> NoReturn:
        raise CheckpointError(self._where, problem, remedy)
