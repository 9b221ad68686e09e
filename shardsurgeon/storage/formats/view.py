"""The manifest of a view: which byte ranges of a source the shards of a pruned model are made of.

A view is a folder with all files of a pruned model but its shards. In their place it has
`shardsurgeon_view.jsonl.gz`: gzip, and in it JSON objects, one a line. The first is the head:

    {"format": "shardsurgeon view", "version": 1, "source": "../Kimi-K2.5",
     "files": [["model-00001-of-00064.safetensors", 9980000000, "1721910000000000000:4711"], ...],
     "shards": 22, "tensors": 75041}

`source` is a folder, absolute or relative to the view's own, or a commit of a repository of the
Hugging Face Hub, `hf://org/name@<40 hex digits>`. `files` are those of its files that the shards
are made of, each with its size in bytes and its stamp, as the place has it: a file whose size or
stamp is another one now is not what was planned with. Then comes one line for each shard:

    {"file": "model-00001-of-00022.safetensors", "nbytes": 9970000000,
     "header_nbytes": 412344, "header_sha256": "...",
     "header": {"__metadata__": {...}, "<tensor>": {"dtype": ..., "shape": ...,
                "data_offsets": ...}, ...},
     "ranges": {"file": [0, 0, ...], "begin": [412352, ...], "nbytes": [14680064, ...]}}

`header` is what the shard's safetensors header says, in order; its bytes are what `build_header`
makes of it, `header_nbytes` with the length before it, and are known by their SHA-256. `ranges`,
three columns, follow one another through the data section: number in `files`, first byte there,
how many. None is empty, and none goes beyond the tensor that it begins in, so that a tensor's
ranges are those within its `data_offsets`.

Values that no source has, expert counts and tables of expert ids, lie in the view's own
`shardsurgeon_view.bin`, which `files` then lists, with its SHA-256 as the stamp.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from typing import Any, NoReturn

from shardsurgeon.errors import CheckpointError, HeaderError
from shardsurgeon.storage.formats.safetensors import (
    PREFIX_NBYTES,
    Header,
    build_header,
    header_of,
)
from shardsurgeon.storage.formats.strict_json import brief, is_text, is_whole_number, read_object
from shardsurgeon.storage.limits import HEADER, MAX_HEADERS_NBYTES, MAX_TENSORS, VIEW_LINE
from shardsurgeon.storage.source import SourceFile, leads_out, unusual

VIEW_NAME = "shardsurgeon_view.jsonl.gz"
DATA_NAME = "shardsurgeon_view.bin"
VERSION = 1

_FORMAT = "shardsurgeon view"
_MAKE_AGAIN = "make the view again with `apply --view`"
_COLUMNS = ("file", "begin", "nbytes")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bytes of a manifest when unpacked: its headers, and as much again for the ranges.
_MAX_NBYTES = 2 * MAX_HEADERS_NBYTES
_MAX_INT = 2**63 - 1

# Bytes of a file: its name, the first, how many.
Range = tuple[str, int, int]


class ViewShard:
    """One shard of a view: what its header says, and where every byte of its data lies.

    file: its name; nbytes: the size of the whole file; header: what its header says.
    """

    def __init__(
        self,
        file: str,
        nbytes: int,
        header: Header,
        header_sha256: str,
        files: Sequence[SourceFile],
        ranges: Sequence[array[int]],
    ) -> None:
        """files: what the first column of `ranges` counts; ranges: the three columns."""
        self.file, self.nbytes, self.header = file, nbytes, header
        self._sha256 = header_sha256
        self._files = files
        self._file, self._begin, sizes = ranges
        # One past the last byte of each range, in the data section.
        self._ends = array("q", accumulate(sizes))

    @cached_property
    def head(self) -> bytes:
        """The header's bytes, length before them. Raises HeaderError where they are not those that
        the view was made with."""
        tensors = [(r.name, r.dtype, r.shape, r.nbytes) for r in self.header.tensors]
        built = build_header(tensors, self.header.metadata)
        if hashlib.sha256(built).hexdigest() != self._sha256:
            raise HeaderError(
                self.file,
                f"its header in {VIEW_NAME} is not the one that the view was made with",
                _MAKE_AGAIN,
            )
        return built

    def ranges(self, begin: int, end: int) -> Iterator[Range]:
        """Where the bytes [begin, end) of the data section lie, in order."""
        number = bisect_right(self._ends, begin)
        while begin < end:
            upto = min(self._ends[number], end)
            first = self._ends[number - 1] if number else 0
            at = self._begin[number] + begin - first
            yield self._files[self._file[number]].name, at, upto - begin
            begin, number = upto, number + 1

    @property
    def used(self) -> list[str]:
        """The files that it takes bytes from, each once."""
        return [self._files[number].name for number in sorted(set(self._file))]


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

    def add(
        self, file: str, head: bytes, header: dict[str, object], pieces: Iterable[Range | bytes]
    ) -> None:
        """Add a shard. head: its header's bytes, length before them; header: what they say;
        pieces: what its data is joined of, none of them in two tensors."""
        columns: tuple[list[int], list[int], list[int]] = ([], [], [])
        own = len(self._files)
        for piece in pieces:
            if isinstance(piece, bytes):
                row = own, len(self._data), len(piece)
                self._data += piece
            else:
                row = self._numbers[piece[0]], piece[1], piece[2]
            if row[2]:
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        line = {
            "file": file,
            "nbytes": len(head) + sum(columns[2]),
            "header_nbytes": len(head),
            "header_sha256": hashlib.sha256(head).hexdigest(),
            "header": header,
            "ranges": dict(zip(_COLUMNS, columns, strict=True)),
        }
        self._tensors += len(header) - ("__metadata__" in header)
        self._lines.append(_line(line))

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
        text = b"".join((_line(head), *self._lines))
        # Without the time, so that one plan gives one manifest.
        made[VIEW_NAME] = gzip.compress(text, compresslevel=4, mtime=0)
        return made


def _line(value: dict[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


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
        self._seen: set[str] = set()

    def read(self, raw: bytes) -> Manifest:
        lines = self._lines(raw)
        head = self._object(next(lines, b""), "line 1")
        if head.get("format") != _FORMAT:
            self._refuse("line 1 does not say that this is the manifest of a view")
        if head.get("version") != VERSION:
            problem = f"has version {brief(head.get('version'))}, this program reads {VERSION}"
            self._refuse(problem, "use the version of shardsurgeon that made it")
        source = head.get("source")
        if not is_text(source) or not source or "\0" in str(source):
            self._refuse(f"its source is {brief(source)}, not a folder or a repository")
        self._files = [self._file(entry) for entry in self._list(head.get("files"), "files")]
        names = [file.name for file in self._files]
        if len(set(names)) < len(names) or DATA_NAME in names[:-1]:
            self._refuse("lists a file twice, or its own before others")
        shards = [
            self._shard(self._object(line, f"line {number}"), number)
            for number, line in enumerate(lines, start=2)
        ]
        said, found = head.get("shards"), len(shards)
        if not shards or said != found or head.get("tensors") != len(self._seen):
            problem = f"announces {brief(said)} shards of {brief(head.get('tensors'))} tensors, has"
            self._refuse(f"{problem} {found} of {len(self._seen):,}")
        if len({shard.file for shard in shards}) < found:
            self._refuse("lists a shard twice")
        return Manifest(str(source), self._files, shards)

    def _lines(self, raw: bytes) -> Iterator[bytes]:
        """The lines, unpacked one after the other and never more than any model needs."""
        left = _MAX_NBYTES
        with gzip.GzipFile(fileobj=BytesIO(raw)) as unpacked:
            while True:
                try:
                    line = unpacked.readline(min(VIEW_LINE.nbytes, left) + 1)
                except (OSError, EOFError, zlib.error) as error:
                    self._refuse(f"cannot be unpacked ({error})")
                left -= len(line)
                if left < 0 or len(line) > VIEW_LINE.nbytes:
                    self._refuse(f"unpacks to more than {_MAX_NBYTES:,} bytes: no model needs more")
                if not line:
                    return
                yield line

    def _object(self, line: bytes, subject: str) -> dict[str, Any]:
        return read_object(line, self._where, subject, CheckpointError, _MAKE_AGAIN, VIEW_LINE)

    def _list(self, value: object, what: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(f"{what}: {brief(value)} is not a list")
        return value

    def _file(self, entry: object) -> SourceFile:
        if not isinstance(entry, list) or len(entry) != 3:
            self._refuse(f"files: {brief(entry)} is not a name, a size and a stamp")
        name, nbytes, stamp = entry
        self._require_name(name)
        if not name.endswith(".safetensors") and name != DATA_NAME:
            self._refuse(f"files: {brief(name)} is not a .safetensors file")
        if not is_whole_number(nbytes) or nbytes > _MAX_INT or not is_text(stamp) or not stamp:
            self._refuse(f"files: {brief(name)} has the size {brief(nbytes)}, stamp {brief(stamp)}")
        if name == DATA_NAME and not _SHA256.fullmatch(stamp):
            self._refuse(f"files: the stamp of {name} is not its SHA-256")
        return SourceFile(name, nbytes, stamp)

    def _require_name(self, name: object) -> None:
        if not is_text(name) or leads_out(str(name)) or "\\" in str(name) or unusual(str(name)):
            self._refuse(f"{brief(name)} is not the name of a file inside a folder")

    def _shard(self, line: dict[str, Any], number: int) -> ViewShard:
        file, nbytes = line.get("file"), line.get("nbytes")
        self._require_name(file)
        if not str(file).endswith(".safetensors") or "/" in str(file):
            self._refuse(f"line {number}: {brief(file)} is not the name of a shard")
        begin, digest, entries = (line.get(f"header{end}") for end in ("_nbytes", "_sha256", ""))
        if not is_whole_number(nbytes) or not is_whole_number(begin, PREFIX_NBYTES):
            self._refuse(f"line {number}: nbytes and header_nbytes are no sizes")
        if begin > HEADER.nbytes + PREFIX_NBYTES or begin > nbytes or nbytes > _MAX_INT:
            self._refuse(f"line {number}: a header of {begin:,} bytes in {nbytes:,}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            self._refuse(f"line {number}: header_sha256 is {brief(digest)}")
        if not isinstance(entries, dict):
            self._refuse(f"line {number}: header is {brief(entries)}, not an object")
        header = header_of(entries, begin, nbytes, f"{self._where}: {file}")
        for record in header.tensors:
            if record.name in self._seen:
                self._refuse(f"tensor {brief(record.name)} is in two shards")
            self._seen.add(record.name)
        if len(self._seen) > MAX_TENSORS:
            self._refuse(f"has more than {MAX_TENSORS:,} tensors: no model has so many")
        ranges = self._ranges(line.get("ranges"), header, nbytes - begin, str(file))
        return ViewShard(str(file), nbytes, header, digest, self._files, ranges)

    def _ranges(
        self, value: object, header: Header, data_nbytes: int, file: str
    ) -> list[array[int]]:
        if not isinstance(value, dict) or value.keys() != set(_COLUMNS):
            self._refuse(f"{file}: its ranges are not the columns {', '.join(_COLUMNS)}")
        columns = [array("q") for _ in _COLUMNS]
        for name, column in zip(_COLUMNS, columns, strict=True):
            for item in self._list(value[name], f"{file}: ranges.{name}"):
                if type(item) is not int or not 0 <= item <= _MAX_INT:
                    self._refuse(f"{file}: ranges.{name} has {brief(item)}, not a whole number")
                column.append(item)
        if len({len(column) for column in columns}) > 1:
            self._refuse(f"{file}: the columns of its ranges differ in length")
        sizes = [source.nbytes for source in self._files]
        ends, at = [record.end for record in header.tensors if record.nbytes], 0
        ending = iter(ends)
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

    def _refuse(self, problem: str, remedy: str = _MAKE_AGAIN) -> NoReturn:
        raise CheckpointError(self._where, problem, remedy)
