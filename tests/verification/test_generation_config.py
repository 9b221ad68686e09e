"""generation_config.json with sampling settings in it: what the record names, and no other edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import CheckpointError
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support import tiny

NAME = "generation_config.json"
ROWS = {layer: [expert + 0.5 for expert in range(8)] for layer in (1, 2, 3)}
WRITTEN = b'{\n  "eos_token_id": 7,\n  "min_p": 0.05,\n  "do_sample": true\n}\n'
Record = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    for name, content in tiny.files().items():
        (folder / name).write_bytes(content)
    (folder / NAME).write_bytes(b'{\n  "eos_token_id": 7\n}\n')
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.with_name("out")
    plan = shardsurgeon.plan(source, ROWS, keep=4, sampling={"min_p": 0.05})
    shardsurgeon.apply(plan, out)
    assert (out / NAME).read_bytes() == WRITTEN
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def with_record(out: Path, edit: Callable[[Record], None]) -> None:
    record = json.loads((out / PROVENANCE_NAME).read_bytes())
    edit(record)
    (out / PROVENANCE_NAME).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (WRITTEN.replace(b"0.05", b"0.06"), "min_p is 0.06, expected 0.05"),
        (WRITTEN.replace(b"7", b"8"), "eos_token_id is 8, expected 7"),
        (WRITTEN.replace(b"true", b"1"), "do_sample is 1, expected true"),
        (WRITTEN.replace(b'  "min_p": 0.05,\n', b""), "min_p is missing"),
        (WRITTEN.replace(b"{", b'{"top_k": 3,'), "top_k was added"),
        (b'{"do_sample": true, "min_p": 0.05, "eos_token_id": 7}', "the keys of the top are in"),
        (WRITTEN.replace(b"0.05", b"5e-2"), "is not the source's with the recorded settings"),
        (WRITTEN + b"\n", "is not the source's with the recorded settings, byte for byte"),
        (b"{", "is not valid JSON"),
        (b"[" * 5000, "is not valid JSON"),
        (b"[" + b" " * (1 << 26) + b"]", "cannot be compared"),
        (None, "is missing"),
    ],
)
def test_whatever_else_is_different_is_named(
    source: Path, out: Path, content: bytes | None, told: str
) -> None:
    if content is None:
        (out / NAME).unlink()
    else:
        (out / NAME).write_bytes(content)
    found = [line for line in verify_checkpoint(source, out).differences if line.startswith(NAME)]
    assert found and found[0].startswith(f"{NAME}: {told}"), found


def test_an_edit_that_the_record_names_otherwise_or_not_at_all_is_named(
    source: Path, out: Path
) -> None:
    with_record(out, lambda record: record["steps"][0]["sampling"].update(min_p=0.1))
    told = verify_checkpoint(source, out).differences
    assert f"{NAME}: min_p is 0.05, expected 0.1" in told
    with_record(out, lambda record: record["steps"][0].pop("sampling"))
    told = verify_checkpoint(source, out).differences
    assert any(line.startswith(f"{NAME}: has {len(WRITTEN)} bytes") for line in told)


@pytest.mark.parametrize(
    "said",
    [
        *({}, [], "min_p", None, 3, {"do_sample": True}, {"min_p": 0.05, "do_sample": 1}),
        *({"min_p": 2}, {"min_p": True}, {"min_p": None}, {"min_p": 10**400}, {"min_p": "0.05"}),
        *({"eos_token_id": 3}, {"max_tokens": 3}, {"top_k": -1}, {"top_k": 2.0}, {"top_k": 0.0}),
        *({"min_p": {"a": [1]}}, {"": 1}, {"temperature": -0.5}, {"min_p": 0}),
    ],
)
def test_a_record_of_what_nothing_writes_is_refused(source: Path, out: Path, said: object) -> None:
    with_record(out, lambda record: record["steps"][0].update(sampling=said))
    (line,) = verify_checkpoint(source, out).differences
    assert "steps[0].sampling" in line and len(line) < 300
    with pytest.raises(CheckpointError, match="sampling"):
        shardsurgeon.open_checkpoint(out)


def test_settings_said_of_a_source_whose_file_takes_none_are_named(
    source: Path, out: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    (broken / NAME).write_bytes(b"[1]")
    found = verify_checkpoint(broken, out).differences
    assert any(line.startswith(f"{NAME}: cannot be compared") for line in found)
    (broken / NAME).unlink()
    assert f"{NAME}: eos_token_id was added" in verify_checkpoint(broken, out).differences
