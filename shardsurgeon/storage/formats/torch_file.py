"""torch.save's files (`.pt`, `.pth`), read without torch and without running anything in them.

The container is a zip archive: `data.pkl` describes the value, every storage is a member beside
it.
"""

from __future__ import annotations

from pathlib import Path

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.pickle_reader import interpret
from shardsurgeon.storage.formats.torch_objects import CONVERT, TorchObjects
from shardsurgeon.storage.formats.zip_reader import ZipReader, read_range
from shardsurgeon.storage.limits import MAX_PICKLE_NBYTES


def read_torch_file(path: Path, where: str) -> object:
    """The value that torch.save put into `path`, every tensor as an unread StoredArray.

    Dicts of any kind come as dict, torch.Size as tuple, dtypes and devices as their names
    (`torch.float32`, `cuda:0`), numpy scalars as Python's. Raises ScoreError for the formats
    of torch before 1.6, for every name that is not understood, and for whatever is broken.
    """
    _refuse_other_formats(read_range(path, 0, 512, where), where)
    archive = ZipReader(path, where)
    root = _root(archive)
    order = archive.read(f"{root}/byteorder", 16) if f"{root}/byteorder" in archive.entries else b""
    if order not in (b"", b"little"):
        raise ScoreError(
            where,
            f"its numbers are in byte order {order!r}, only little-endian files are read",
            "load it with torch on a little-endian machine and torch.save it again",
        )
    # One byte past the limit lets the interpreter see that there is too much.
    pickle = archive.read(f"{root}/data.pkl", _limit(archive, f"{root}/data.pkl"))
    return interpret(pickle, TorchObjects(archive, root), where)


def _limit(archive: ZipReader, member: str) -> int | None:
    too_large = archive.entries[member].nbytes > MAX_PICKLE_NBYTES
    return MAX_PICKLE_NBYTES + 1 if too_large else None


def _refuse_other_formats(head: bytes, where: str) -> None:
    if head.startswith(b"PK"):
        return
    if not head:
        problem = "the file is empty"
    elif head.startswith(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"):
        problem = "this is torch.save's old format, not the zip archive it writes since torch 1.6"
    elif head[257:262] == b"ustar":
        problem = "this is the tar format of torch before 0.2"
    elif head[0] == 0x80:
        problem = "this is a plain pickle, not a file of torch.save"
    else:
        problem = "this is not a file of torch.save: no zip archive"
    raise ScoreError(where, problem, CONVERT if head else "fetch it again")


def _root(archive: ZipReader) -> str:
    """The folder inside the archive that holds everything."""
    roots = [
        name.removesuffix("/data.pkl")
        for name in archive.entries
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(roots) != 1:
        problem = f"a zip archive with {len(roots)} members named data.pkl, torch.save writes one"
        raise ScoreError(archive.where, problem, CONVERT)
    if f"{roots[0]}/constants.pkl" in archive.entries:
        raise ScoreError(archive.where, "this is a TorchScript program, not saved scores", CONVERT)
    for entry in archive.entries.values():
        if entry.deflated:
            problem = f"member {entry.name} is compressed, torch.save stores its members"
            raise ScoreError(archive.where, problem, CONVERT)
    return roots[0]
