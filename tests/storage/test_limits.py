"""What holds no weights has a limit before it is read, and JSON one before it is parsed."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.guess import guess_family
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, is_foreign, parse_provenance
from shardsurgeon.checkpoint.shards import open_shards
from shardsurgeon.errors import (
    CheckpointError,
    ConfigError,
    FamilyError,
    HeaderError,
    IndexFileError,
    InputError,
    KeepListError,
    OutputError,
    ScoreError,
)
from shardsurgeon.execution.journal import read_journal
from shardsurgeon.families.schema import read_family
from shardsurgeon.operations.card_data import metadata_of
from shardsurgeon.pruning.keep_list_files import is_plan, read_keeplist
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage import limits
from shardsurgeon.storage.formats.index import INDEX_NAME, parse_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.safetensors import parse_header
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint, read_object, read_records
from shardsurgeon.storage.limits import OTHER_JSON, SCORES_JSON, json_memory, read_limited
from shardsurgeon.storage.source import MemorySource, SourceFile
from tests.support import tiny

MIB = 2**20


def repeated(piece: bytes, nbytes: int) -> bytes:
    return b'{"a":[' + piece * (nbytes // len(piece)) + b"1]}"


# Text that is small for what it becomes.
DENSE = {
    "lists": b"[],",
    "objects": b"{},",
    "lists in lists": b"[" * 40 + b"]" * 40 + b",",
    "objects in objects": b'{"":' * 40 + b"1" + b"}" * 40 + b",",
    "members": b'{"a":1},',
    "numbers": b"1.5,",
    "large numbers": b"99999,",
    "texts": b'"ab",',
    "wide texts": b'"\\ud83d\\ude00' + b"a" * 80 + b'",',
    "wide text": '"\U0001f600aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",'.encode(),
    "keys twice": b'{"a":1,"a":1},',
}


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    kept = call()  # so that what it returns counts
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return most


@pytest.mark.parametrize("piece", DENSE.values(), ids=DENSE.keys())
def test_parsing_takes_no_more_memory_than_it_was_estimated_to(piece: bytes) -> None:
    raw = repeated(piece, 20_000)
    read = lambda: read_object(raw, "f", "it", ScoreError, "", SCORES_JSON)  # noqa: E731
    assert peak(read) <= json_memory(raw) - len(raw) + 20_000
    if piece != DENSE["keys twice"]:
        assert peak(lambda: Document.parse(raw, "f")) <= json_memory(raw, placed=True) + 20_000


def test_json_lines_take_no_more_memory_than_they_were_estimated_to() -> None:
    raw = b'{"layer":3,"kept":[1]}\n' + b"{}\n" * 5_000 + b"\n" * 5_000
    read = lambda: read_records(raw, "f", "it", ScoreError, "", SCORES_JSON)  # noqa: E731
    assert peak(read) <= json_memory(raw) + 20_000


# The largest of their kinds that are published, and larger: read.


def test_the_index_of_a_trillion_parameters_is_far_within_its_limit() -> None:
    names = (
        f"language_model.model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight_{kind}"
        for layer in range(60)
        for expert in range(384)
        for part in ("gate", "up", "down")
        for kind in ("packed", "scale", "shape")
    )
    weight_map = dict.fromkeys(names, "model-00001-of-00064.safetensors")
    raw = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2).encode()
    assert len(weight_map) > 200_000
    assert json_memory(raw) < limits.INDEX.memory // 2
    assert len(parse_index(raw, INDEX_NAME).weight_map) == len(weight_map)


def test_a_config_that_names_every_expert_of_such_a_model_is_within_its_limit() -> None:
    named = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj": {"bits": 4, "data_type": "int"}
        for layer in range(60)
        for expert in range(384)
        for part in ("gate", "up", "down")
    }
    raw = json.dumps({"quantization_config": {"extra_config": named}}).encode()
    assert json_memory(raw, placed=True) < limits.CONFIG.memory


def test_scores_of_such_a_model_with_twenty_metrics_are_within_their_limit() -> None:
    row = [0.12345678901234567] * 384
    table = {layer: {f"metric_{n}": row for n in range(20)} for layer in range(60)}
    assert json_memory(json.dumps(table).encode()) < SCORES_JSON.memory // 4


# Beyond them: refused with the file's name


REFUSALS: dict[str, tuple[type[InputError], Callable[[Path], object]]] = {
    "config": (ConfigError, lambda path: Document.parse(path.read_bytes(), str(path))),
    "index": (IndexFileError, lambda path: parse_index(path.read_bytes(), str(path))),
    "header": (
        HeaderError,
        lambda path: parse_header(path.read_bytes(), path.stat().st_size + 8, str(path)),
    ),
    "metadata": (CheckpointError, lambda path: parse_provenance(path.read_bytes(), str(path))),
    "keep-list": (KeepListError, read_keeplist),
    "scores": (ScoreError, read_scores),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_json_that_would_take_too_much_memory_is_refused_unparsed(
    kind: str, tmp_path: Path
) -> None:
    error, read = REFUSALS[kind]
    path = tmp_path / "hostile.json"
    raw = repeated(b"[],", 12 * MIB)
    path.write_bytes(raw)

    def refused() -> str:
        with pytest.raises(error) as caught:
            read(path)
        return str(caught.value)

    assert refused().startswith(f"{path}: its JSON could take ")
    assert peak(refused) < 4 * len(raw)


def test_a_hint_is_not_taken_from_what_would_take_too_much_memory(tmp_path: Path) -> None:
    raw = repeated(b"[],", MIB)
    assert parse_for_a_hint(raw, OTHER_JSON) is None
    assert parse_for_a_hint(b"[" * 101 + b"]" * 101, OTHER_JSON) is None
    assert parse_for_a_hint(b"[" * 100 + b"]" * 100, OTHER_JSON) is not None
    dense = repeated(b"[],", 12 * MIB)
    (tmp_path / "dense.json").write_bytes(dense)
    assert not is_foreign(dense) and not is_plan(tmp_path / "dense.json")


class Claiming(MemorySource):
    """A source that lists one file as larger than it is, and fails where that is read."""

    def __init__(self, name: str, nbytes: int) -> None:
        super().__init__({**tiny.files(), name: b"{}"})
        self._large, self._nbytes = name, nbytes

    def list(self) -> tuple[SourceFile, ...]:
        files = {file.name: file for file in super().list()}
        files[self._large] = SourceFile(self._large, self._nbytes, "")
        return tuple(files.values())

    def read(self, name: str, begin: int, end: int) -> bytes:
        assert name != self._large, "it was read"
        return super().read(name, begin, end)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, PROVENANCE_NAME])
def test_a_file_that_is_too_large_is_refused_unread(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: has 3,000,000,000 bytes, at most"):
        open_checkpoint(Claiming(name, 3_000_000_000))


@pytest.mark.parametrize("most", ["MAX_TENSORS", "MAX_HEADERS_NBYTES"])
@pytest.mark.parametrize("remote", [False, True])
def test_all_headers_together_have_a_limit(
    most: str, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MemorySource(tiny.files(), remote=remote)
    shards = [file for file in source.list() if file.name.endswith(".safetensors")]
    opened = open_shards(source, shards)
    tensors = sum(len(shard.header.tensors) for shard in opened)
    nbytes = sum(shard.header.data_begin - 8 for shard in opened)
    found = {"MAX_TENSORS": tensors, "MAX_HEADERS_NBYTES": nbytes}[most]
    monkeypatch.setattr(f"shardsurgeon.checkpoint.shards.{most}", found)
    assert len(open_shards(source, shards)) == 2
    monkeypatch.setattr(f"shardsurgeon.checkpoint.shards.{most}", found - 1)
    with pytest.raises(HeaderError, match=rf"safetensors: with this file .* {found:,} "):
        open_shards(source, shards)


def test_no_family_is_guessed_by_names_without_an_end() -> None:
    """Patterns are run on them; a family that is declared has no trouble with such a name."""
    weights = tiny.tensors() | {"a1." * 400: np.zeros(1, np.float32)}
    config = tiny.config(model_type="unheard_of", architectures=None)
    checkpoint = open_checkpoint(MemorySource(tiny.files(config, weights)))
    with pytest.raises(FamilyError, match=r"has a name of 1,200 characters, a family is guessed"):
        guess_family(checkpoint)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
@pytest.mark.parametrize("suffix", [".pt", ".json", ".npz", ".safetensors", ""])
def test_a_pipe_is_no_score_file_and_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores{suffix}"
    os.mkfifo(path)
    with pytest.raises(ScoreError, match="it is a pipe or a device; save it to a file first"):
        read_scores(path)


def test_a_card_whose_metadata_takes_minutes_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\n" + "a: 1\n" * 50_000 + "---\n")
    assert metadata_of(path.read_text()) == {}
    path.write_text("---\nlicense: mit\n---\n" + "a" * 300_000)
    assert metadata_of(path.read_text()) == {"license": "mit"}


def test_a_journal_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("wb") as file:
        file.truncate(300 * MIB)
    with pytest.raises(OutputError, match=r"journal: has 314,572,800 bytes.*--restart"):
        read_journal(path)


def test_an_archive_of_more_members_than_it_announces_is_refused_at_the_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "scores.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.npy", b"")
    raw = bytearray(path.read_bytes())
    raw[-14:-10] = (2).to_bytes(2, "little") * 2  # members on this disk, and in all
    path.write_bytes(raw)
    with pytest.raises(ScoreError, match="a zip directory of more members announces 2"):
        read_scores(path)


def test_metadata_and_storages_of_scores_that_inflate_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    np.savez_compressed(path, metadata=np.zeros(65 * MIB, np.uint8), a=np.ones((2, 2)))
    with pytest.raises(ScoreError, match=r"scores.npz, metadata: has 68,157,440 bytes"):
        read_scores(path)


HOSTILE_TOML = {
    "nested": ("a = " + "[" * 20_000 + "]" * 20_000, "break its lists into lines"),
    "nested lines": ("a = " + "[\n" * 10_000 + "]\n" * 10_000, "nested too deeply|not TOML"),
    "long key": ("a." * 15_000 + "b = 1", "has a line of 30,005 characters, at most 16,000"),
    "digits": ("a = " + "1" * 10_000, "not TOML: Exceeds the limit"),
    "large": ("#" * 70_000, "has 70,000 bytes, at most 65,536 are read; no declaration"),
}


@pytest.mark.parametrize(("text", "says"), HOSTILE_TOML.values(), ids=HOSTILE_TOML.keys())
def test_a_declaration_that_takes_too_much_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "family.toml"
    path.write_text(text)
    with pytest.raises(FamilyError, match=says):
        read_family(str(path))


def test_a_file_without_an_end_is_read_up_to_its_limit() -> None:
    with pytest.raises(FamilyError, match=r"^/dev/zero: has 65,537 bytes, at most 65,536 are read"):
        read_family("/dev/zero")
    with pytest.raises(KeepListError, match=r"^/dev/zero: has .* no keep-list is so large"):
        read_keeplist("/dev/zero")
    with pytest.raises(ScoreError, match="nowhere: cannot be read"):
        read_limited("nowhere", OTHER_JSON, ScoreError)
