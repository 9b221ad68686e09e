"""The zip container of `.pt` and `.npz` files, read with every check and no extraction.

The standard library's reader believes the sizes that a file claims and reads its whole directory
first. Score files come from strangers: here the directory is bounded before it is read,
entries may not overlap, and nothing is inflated past the size that was announced.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.limits import MAX_DIRECTORY_NBYTES, MAX_ENTRIES, MAX_MEMBER_NBYTES
from shardsurgeon.storage.pipes import open_file

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_DAMAGED = "the file is damaged or incomplete: fetch it again"


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One member: where its local header begins, and where the member must end at the latest.

    packed: bytes in the file; nbytes: bytes when unpacked; crc: 0 where the writer left it out
    (torch.save can be told to).
    """

    name: str
    deflated: bool
    packed: int
    nbytes: int
    crc: int
    begin: int
    end: int


class ZipReader:
    """The members of a zip file. Opens the file for each read and keeps no handle."""

    def __init__(self, path: Path, where: str) -> None:
        """Read the directory. Raises ScoreError where it is broken or contradicts the file."""
        self.path = path
        self.where = where
        self.file_nbytes = file_nbytes(path, where)
        self.entries = self._read_directory()

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The content of a member, or its first `limit` bytes.

        A whole member is compared with its checksum. Raises ScoreError.
        """
        entry = self.entries[name]
        packed = self._read_packed(entry, entry.packed if limit is None else limit)
        wanted = entry.nbytes if limit is None else min(limit, entry.nbytes)
        content = self._inflate(entry, packed, wanted) if entry.deflated else packed[:wanted]
        if len(content) != wanted:
            raise self._fault(f"member {name} holds {len(content):,} of {wanted:,} bytes")
        if limit is None and entry.crc and zlib.crc32(content) != entry.crc:
            raise self._fault(f"member {name} does not match its checksum")
        return content

    def _read_packed(self, entry: ZipEntry, nbytes: int) -> bytes:
        local = read_range(self.path, entry.begin, _LOCAL.size, self.where)
        if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
            raise self._fault(f"member {entry.name} has no header at byte {entry.begin:,}")
        name_nbytes, extra_nbytes = _LOCAL.unpack(local)[9:]
        begin = entry.begin + _LOCAL.size + name_nbytes + extra_nbytes
        if begin + entry.packed > entry.end:
            raise self._fault(
                f"member {entry.name} ends at byte {begin + entry.packed:,}, "
                f"the next begins at {entry.end:,}"
            )
        return read_range(self.path, begin, min(nbytes, entry.packed), self.where)

    def _inflate(self, entry: ZipEntry, packed: bytes, wanted: int) -> bytes:
        if entry.nbytes > MAX_MEMBER_NBYTES:
            raise self._fault(
                f"compressed member {entry.name} claims {entry.nbytes:,} bytes, "
                f"more than {MAX_MEMBER_NBYTES:,}",
                "save it uncompressed (np.savez, torch.save)",
            )
        try:
            # One byte more than announced shows a member that is larger than it says.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, wanted + 1)
        except zlib.error as error:
            raise self._fault(f"member {entry.name} cannot be inflated ({error})") from error
        if wanted == entry.nbytes and len(content) > wanted:
            raise self._fault(f"member {entry.name} is larger than the {wanted:,} bytes it claims")
        return content[:wanted]

    def _read_directory(self) -> dict[str, ZipEntry]:
        count, nbytes, begin = self._find_directory()
        if count > MAX_ENTRIES or nbytes > MAX_DIRECTORY_NBYTES:
            raise self._fault(
                f"a zip directory of {count:,} members and {nbytes:,} bytes",
                f"no score file needs more than {MAX_ENTRIES:,} members",
            )
        raw = read_range(self.path, begin, nbytes, self.where)
        entries: list[ZipEntry] = []
        at = 0
        while at < len(raw) and len(entries) <= count:
            entry, at = self._parse_record(raw, at)
            entries.append(entry)
        if len(entries) != count:
            found = "more" if len(entries) > count else f"{len(entries):,}"
            raise self._fault(f"a zip directory of {found} members announces {count:,}")
        return self._bounded(entries, begin)

    def _find_directory(self) -> tuple[int, int, int]:
        """Number of members, size and place of the directory, by the record at the file's end."""
        tail_begin = max(0, self.file_nbytes - _END.size - 0xFFFF)
        tail = read_range(self.path, tail_begin, self.file_nbytes - tail_begin, self.where)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise self._fault("no zip directory at its end")
        _, disk, _, _, count, nbytes, begin, comment = _END.unpack_from(tail, at)
        end = tail_begin + at
        if disk not in (0, 0xFFFF) or at + _END.size + comment != len(tail):
            raise self._fault("the record at its end is not that of a whole zip file")
        place_at = at - _END64_PLACE.size
        if place_at >= 0 and tail[place_at : place_at + 4] == b"PK\x06\x07":
            end = _END64_PLACE.unpack_from(tail, place_at)[2]
            record = read_range(self.path, end, _END64.size, self.where)
            if len(record) < _END64.size or not record.startswith(b"PK\x06\x06"):
                raise self._fault(f"no zip64 record at byte {end:,}")
            count, nbytes, begin = _END64.unpack(record)[7:]
        if begin + nbytes != end:
            raise self._fault(
                f"its zip directory should end at byte {end:,} and ends at {begin + nbytes:,}"
            )
        return count, nbytes, begin

    def _parse_record(self, raw: bytes, at: int) -> tuple[ZipEntry, int]:
        if at + _RECORD.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            raise self._fault(f"its zip directory breaks off after {at:,} bytes")
        fields = _RECORD.unpack_from(raw, at)
        flags, method = fields[3:5]
        crc, packed, nbytes, name_nbytes, extra_nbytes, comment_nbytes = fields[7:13]
        name_end = at + _RECORD.size + name_nbytes
        extra = raw[name_end : name_end + extra_nbytes]
        end = name_end + extra_nbytes + comment_nbytes
        if end > len(raw):
            raise self._fault(f"its zip directory breaks off after {at:,} bytes")
        name = self._checked_name(raw[at + _RECORD.size : name_end])
        if flags & 1 or method not in (_STORED, _DEFLATED):
            raise self._fault(
                f"member {name} is encrypted or of compression method {method}",
                "save it again with torch.save or np.savez",
            )
        wide = _zip64_values(extra, (nbytes, packed, fields[16]))
        if wide is None:
            raise self._fault(f"member {name} lacks its zip64 sizes")
        nbytes, packed, begin = wide
        if method == _STORED and packed != nbytes:
            raise self._fault(f"stored member {name} has {packed:,} bytes and claims {nbytes:,}")
        return ZipEntry(name, method == _DEFLATED, packed, nbytes, crc, begin, 0), end

    def _checked_name(self, raw: bytes) -> str:
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise self._fault("a member's name is not UTF-8") from error
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ":" in name or ".." in parts or not parts[0]:
            raise self._fault(
                f"member name {ascii(name)[:80]} leaves the archive",
                "no tool writes such score files: do not trust this one",
            )
        return name

    def _bounded(self, entries: Sequence[ZipEntry], directory: int) -> dict[str, ZipEntry]:
        """The members by name, each ending before the next begins, in file order."""
        bounded: dict[str, ZipEntry] = {}
        end = directory
        for entry in sorted(entries, key=lambda one: one.begin, reverse=True):
            if entry.begin + _LOCAL.size + entry.packed > end:
                raise self._fault(f"member {entry.name} overlaps what follows it at byte {end:,}")
            if entry.name in bounded:
                raise self._fault(f"two members are named {entry.name}")
            bounded[entry.name] = ZipEntry(
                entry.name, entry.deflated, entry.packed, entry.nbytes, entry.crc, entry.begin, end
            )
            end = entry.begin
        return dict(reversed(bounded.items()))

    def _fault(self, problem: str, remedy: str = _DAMAGED) -> ScoreError:
        return ScoreError(self.where, problem, remedy)


def _zip64_values(extra: bytes, fields: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Size, packed size and place, those that do not fit 32 bits taken from the extra field."""
    missing = sum(value == 0xFFFFFFFF for value in fields)
    wide: list[int] = []
    at = 0
    while missing and at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        if kind == 1 and nbytes >= 8 * missing and at + 4 + 8 * missing <= len(extra):
            wide = list(struct.unpack_from(f"<{missing}Q", extra, at + 4))
        at += 4 + nbytes
    if len(wide) != missing:
        return None
    first, second, third = (wide.pop(0) if value == 0xFFFFFFFF else value for value in fields)
    return first, second, third


@contextmanager
def _as_score_error(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ScoreError(where, f"cannot be read ({error.strerror or error})") from error


def read_range(path: Path, begin: int, nbytes: int, where: str) -> bytes:
    """Up to `nbytes` bytes of a score file from byte `begin`, fewer at its end.

    Raises ScoreError where the file cannot be read.
    """
    with _as_score_error(where), open_file(path) as file:
        held = os.fstat(file.fileno()).st_size
        file.seek(min(begin, held))
        return file.read(min(nbytes, max(0, held - begin)))


def file_nbytes(path: Path, where: str) -> int:
    """Size of a score file in bytes. Raises ScoreError where the system does not tell it."""
    with _as_score_error(where):
        return path.stat().st_size
