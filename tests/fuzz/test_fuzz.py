"""Past findings, and damaged files for every reader by the loop; `long.py` tries a million."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import safetensors

from shardsurgeon.errors import ConfigError, HeaderError, ScoreError
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.safetensors import header_length, parse_header
from shardsurgeon.storage.formats.torch_file import read_torch_file
from tests.fuzz.guard import Guard
from tests.fuzz.targets import TARGETS, Target, load_all, zipped

NAMES = {target.name for target in TARGETS}
# Those of a target that needs a library which is not there are left out with it.
FINDINGS = [
    path
    for path in sorted(Path(__file__).with_name("findings").glob("*/*"))
    if path.parent.name in NAMES
]
TRIES = {"quick": 40, "full": 150, "long": 3000}


def damaged(data: bytes, words: tuple[bytes, ...], numbers: random.Random) -> bytes:
    """The data with a few bytes changed, cut out, doubled, or a word of the format put in."""
    raw = bytearray(data)
    for _ in range(numbers.randint(1, 4)):
        begin = numbers.randrange(len(raw) + 1)
        end = min(len(raw), begin + numbers.randint(1, 8))
        match numbers.randrange(5):
            case 0:
                raw[begin:end] = numbers.randbytes(end - begin)
            case 1:
                del raw[begin:end]
            case 2:
                raw[begin:begin] = raw[begin:end] * numbers.randint(1, 3)
            case 3 if words:
                raw[begin:end] = numbers.choice(words)
            case _:
                raw[begin : begin + 1] = bytes([numbers.choice(b'\x00\xff\x1c0-[]{}:,"eN')])
    return bytes(raw)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_break_no_promise(target: Target, tmp_path: Path, loop: str) -> None:
    numbers = random.Random(target.name)
    guard = Guard(target.run, tmp_path)
    for number, seed in enumerate(target.seeds()):
        guard(seed)
        if number == 0:
            guard.measured(seed)
    seeds = target.seeds()
    for _ in range(TRIES[loop]):
        data = damaged(numbers.choice(seeds), target.words, numbers)
        try:
            guard(data)
        except BaseException as error:
            error.add_note(f"input: {data!r}")
            raise


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_stays_fixed(finding: Path, tmp_path: Path) -> None:
    target = next(one for one in TARGETS if one.name == finding.parent.name)
    guard = Guard(target.run, tmp_path)
    guard(finding.read_bytes())
    guard.measured(finding.read_bytes())


def peak_of(pickled: bytes, tmp_path: Path) -> int:
    """Bytes of memory that reading a .pt with this pickle takes at most."""
    path = tmp_path / "scores.pt"
    path.write_bytes(zipped({"a/data.pkl": pickled, "a/data/0": bytes(4)}))
    tracemalloc.start()
    try:
        load_all(read_torch_file(path, "scores.pt"))
    except ScoreError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("nbytes", [100_000_000, 100_000_001])
def test_the_longest_header_is_the_librarys(nbytes: int) -> None:
    file = nbytes.to_bytes(8, "little") + b"{}" + b" " * (nbytes - 2)
    try:
        safetensors.deserialize(file)  # type: ignore[no-untyped-call]
        library = True
    except safetensors.SafetensorError:
        library = False
    try:
        parse_header(file[8 : 8 + header_length(file[:8], len(file), "a")], len(file), "a")
        ours = True
    except HeaderError:
        ours = False
    assert (library, ours) == (nbytes == 100_000_000,) * 2


KEYS = b"".join(b"J" + number.to_bytes(4, "little") + b"N" for number in range(5000))
PUTS = b"".join(b"r" + number.to_bytes(4, "little") for number in range(80_000))
HUNGRY = {
    "empty sets": b"](" + b"\x8f" * 400_000 + b"e.",
    "empty lists": b"](" + b"]" * 400_000 + b"e.",
    "empty dicts": b"](" + b"}" * 400_000 + b"e.",
    "dicts of one": b"](" + b"}NNs" * 100_000 + b"e.",
    "tuples": b"](" + b")\x85" * 200_000 + b"e.",
    "marks": b"(" * 400_000 + b".",
    "stored values": b"N" + PUTS + b".",
    "a dict that is copied": b"](}(" + KEYS + b"uq\x00ccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00\x85R" * 5000 + b"e.",
    "a string that is encoded": b"](c_codecs\nencode\nq\x01X" + (100_000).to_bytes(4, "little")
    + b"a" * 100_000 + b"q\x00X\x06\x00\x00\x00latin1q\x02" + b"h\x01h\x00h\x02\x86R" * 20_000
    + b"e.",
}  # fmt: skip


def test_a_document_beyond_any_model_is_refused_before_it_is_taken_apart() -> None:
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"has 16,777,217 bytes, at most 16,777,216 are read"):
        Document.parse(b"[" * (16 * 2**20 + 1), "config.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


JSON = {
    "lists": b'{"a":[' + b"[]," * 50_000 + b"1]}",
    "objects": b'{"a":[' + b'{"b":1},' * 20_000 + b"1]}",
    "keys": b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b"}",
}
JSON_READERS = ["index", "provenance", "keep-list", "scores-json"]


@pytest.mark.slow
@pytest.mark.parametrize("reader", JSON_READERS)
@pytest.mark.parametrize("text", JSON.values(), ids=JSON.keys())
def test_json_takes_a_small_multiple_of_its_size(reader: str, text: bytes, tmp_path: Path) -> None:
    target = next(one for one in TARGETS if one.name == reader)
    tracemalloc.start()
    target.run(text, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * len(text) + (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("pickled", HUNGRY.values(), ids=HUNGRY.keys())
def test_no_pickle_takes_more_memory_than_a_small_multiple_of_its_size(
    pickled: bytes, tmp_path: Path
) -> None:
    assert peak_of(pickled, tmp_path) < 64 * len(pickled) + (8 << 20)


def test_a_keep_list_is_read_without_setting_its_limit_aside(tmp_path: Path) -> None:
    path = tmp_path / "keep.json"
    path.write_text('{"kept": {"0": [1]}}')
    tracemalloc.start()
    read_keeplist(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
