"""What is read of files that hold no weights, and how much memory their JSON may take.

All of these come from strangers. A file is refused, by name, before it is read if it is larger than
any honest one of its kind, and before it is parsed if parsing would take more memory than the
largest model's takes: `[],` is three bytes of text and a hundred of memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.errors import InputError
from shardsurgeon.storage.pipes import read_once

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limit:
    """Of one kind of file. nbytes: its size; memory: bytes that its values may take when parsed.

    placed: whether the parser remembers where each value stands, which takes more.
    """

    nbytes: int
    memory: int
    placed: bool = False


# A trillion-parameter model has 0.2 million tensors: 25 MB of index, as much in all its headers.
CONFIG = Limit(16 * MIB, 320 * MIB, placed=True)
INDEX = Limit(128 * MIB, 384 * MIB)
HEADER = Limit(100_000_000, 416 * MIB)  # the safetensors library reads no longer one
METADATA = Limit(64 * MIB, 320 * MIB)
VIEW_LINE = Limit(128 * MIB, 416 * MIB)  # of a manifest: a shard's header and its ranges
KEEP_LIST = Limit(64 * MIB, 384 * MIB)
SCORES_JSON = Limit(128 * MIB, 448 * MIB)
EVALUATION = Limit(64 * MIB, 320 * MIB)
CALIBRATION_JSON = Limit(64 * MIB, 320 * MIB)  # within a score file
FAMILY = Limit(64 * 2**10, 16 * MIB)
RECIPE = Limit(64 * 2**10, 16 * MIB)
LISTING = Limit(12 * MIB, 320 * MIB)  # of a repository: 150,000 files
JOURNAL = Limit(256 * MIB, 256 * MIB)
# Of files that only a note, or the choice of what is copied, depends on: others are passed over.
TOKENIZER_CONFIG = Limit(16 * MIB, 320 * MIB)
OTHER_JSON = Limit(MIB, 64 * MIB)

# Text with metadata at its beginning, in YAML, which takes a second for each 100 kB.
CARD = Limit(4 * MIB, 64 * MIB)
MAX_CARD_METADATA = 200_000
TOKENIZER_FILE = Limit(256 * MIB, 256 * MIB)  # that is copied to be read by its own reader

# Of tensors whose family is guessed, in a time that grows with its square. None is half as long.
MAX_NAME = 500
# Of all shards of a model together.
MAX_TENSORS = 1_500_000
MAX_HEADERS_NBYTES = 256 * MIB
# Of a view: its manifest, packed (0.2 million tensors are 4 MB), what its shards are made of (a
# stacked tensor's survivors are one for each), and values of its own (a table of expert ids is 6 MB
# a layer, and few layers have one).
MAX_MANIFEST_NBYTES = 64 * MIB
MAX_RANGES = 4_000_000
MAX_OWN_NBYTES = 256 * MIB
# Levels of a config; more than that, and functions that call themselves come to an end.
MAX_DEPTH = 100

# Of a model, however many its config, a plan or scores say. No model has a tenth of these.
MAX_LAYERS = 4096
MAX_EXPERTS = 65_536  # of a layer
MAX_EXPERTS_IN_ALL = 2**20

# Of the zip archives that `.pt` and `.npz` files are.
MAX_ENTRIES = 100_000
MAX_DIRECTORY_NBYTES = 64 * MIB
# Of one tensor of scores: numbers of 64 bits, as many as all scores of a file may be.
MAX_NUMBERS = 2**24
MAX_MEMBER_NBYTES = 8 * MAX_NUMBERS + MIB
# Of the pickle in a `.pt`.
MAX_PICKLE_NBYTES = 16 * MIB

# Bytes of memory for each of these in a text, measured with CPython 3.11 to 3.13: that of a value
# and its place, a string's object, a list, an object, a member of one.
_PER_VALUE, _PER_QUOTE, _PER_LIST, _PER_OBJECT, _PER_MEMBER = 40, 16, 96, 80, 112
_PER_PLACE = 350
_NO_SUCH_FILE = "no file of its kind needs so much: fetch it again"


def require_size(
    nbytes: int, limit: Limit, where: str, error: type[InputError], remedy: str = ""
) -> None:
    """Raise `error`, naming `where`, for a file of more bytes than one of its kind may have."""
    if nbytes > limit.nbytes:
        raise error(where, _too_large(nbytes, limit), remedy or _NO_SUCH_FILE)


def require_json(
    raw: bytes, limit: Limit, where: str, error: type[InputError], remedy: str = ""
) -> None:
    """Raise `error`, naming `where`, for a text whose values would take too much memory.

    What they take is estimated, at worst, by the characters that JSON consists of.
    """
    if problem := json_problem(raw, limit):
        raise error(where, problem, remedy or _NO_SUCH_FILE)


def json_problem(raw: bytes, limit: Limit) -> str | None:
    """Why a JSON text is not read, in numbers; None where it is."""
    if len(raw) > limit.nbytes:
        return _too_large(len(raw), limit)
    needed = json_memory(raw, placed=limit.placed)
    if needed <= limit.memory:
        return None
    return f"its JSON could take {_mb(needed)} of memory, at most {_mb(limit.memory)} are used"


def json_memory(raw: bytes, *, placed: bool = False) -> int:
    """Bytes of memory, at most, that parsing a JSON text takes, the text and its copies included.

    placed: as in Limit. Characters within strings count as well.
    """
    # One wide character makes every character of its string four bytes wide.
    width = 1 if raw.isascii() and b"\\u" not in raw else 4
    values, lists, objects = raw.count(b","), raw.count(b"["), raw.count(b"{")
    return (
        len(raw) * (1 + 2 * width)
        + _PER_VALUE * values
        + _PER_QUOTE * raw.count(b'"')
        + _PER_LIST * lists
        + _PER_OBJECT * objects
        + _PER_MEMBER * raw.count(b":")
        + (_PER_PLACE * (values + lists + objects) if placed else 0)
    )


def read_limited(
    path: str | os.PathLike[str], limit: Limit, error: type[InputError], remedy: str = ""
) -> bytes:
    """The bytes of a file that the user named, or of a pipe.

    Raises `error` where it cannot be read or is larger than its kind may be.
    """
    where = str(path)
    try:
        if Path(path).is_file():
            require_size(Path(path).stat().st_size, limit, where, error, remedy)
        raw = read_once(path, limit.nbytes + 1)
    except OSError as cause:
        raise error(where, f"cannot be read ({cause.strerror or cause})") from cause
    require_size(len(raw), limit, where, error, remedy)
    return raw


def _too_large(nbytes: int, limit: Limit) -> str:
    return f"has {nbytes:,} bytes, at most {limit.nbytes:,} are read"


def _mb(nbytes: int) -> str:
    return f"{nbytes // 10**6:,} MB"


@contextmanager
def uncollected() -> Iterator[None]:
    """Have Python not look for cycles among the objects made here: none of those of a header, an
    index or a plan is in one, and looking takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
