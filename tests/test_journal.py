"""The journal: what it remembers, what it refuses, and what a torn line costs."""

import json
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError
from shardsurgeon.journal import Journal, Run, read_journal, require_same
from shardsurgeon.sources.base import SourceFile
from shardsurgeon.system import native

FILES = (SourceFile("a.safetensors", 10, "t1"), SourceFile("b.safetensors", 20, "t2"))
RUN = Run("1" * 64, "2" * 64, FILES)


def begun(path: Path) -> Path:
    with Journal(path, RUN, None, native()) as journal:
        journal.add("one.safetensors", 100)
        journal.add("sub/zwei ü.safetensors", 200)
    return path


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    record = read_journal(begun(tmp_path / "journal"))
    assert record is not None
    assert record.run == RUN
    assert record.finished == {"one.safetensors": 100, "sub/zwei ü.safetensors": 200}


def test_no_journal_is_no_record(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal") is None


@pytest.mark.parametrize(
    "torn", [b'{"finished": "thr', b"\0" * 50, b'{"finished": "x", "nbytes": 1}']
)
def test_a_torn_last_line_is_forgotten_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = begun(tmp_path / "journal")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    record = read_journal(path)
    assert record is not None
    assert set(record.finished) == {"one.safetensors", "sub/zwei ü.safetensors"}
    with Journal(path, RUN, record, native()) as journal:
        journal.add("three", 3)
    assert path.read_bytes() == whole + b'{"finished": "three", "nbytes": 3}\n'


def test_a_new_journal_forgets_the_old_one(tmp_path: Path) -> None:
    path = begun(tmp_path / "journal")
    other = Run("3" * 64, "4" * 64, ())
    with Journal(path, other, None, native()) as journal:
        assert journal.finished == {}
    record = read_journal(path)
    assert record is not None
    assert (record.run, record.finished) == (other, {})


HEAD = {
    "format": "shardsurgeon journal",
    "version": 1,
    "request": "1",
    "source": "2",
    "source_files": [["a", 1, "t"]],
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no newline at all",
        b"not json\n",
        b"\xff\xfe\n",
        b"[]\n",
        json.dumps({**HEAD, "format": "other"}).encode() + b"\n",
        json.dumps({**HEAD, "request": 1}).encode() + b"\n",
        json.dumps({**HEAD, "source_files": [["a", "1", "t"]]}).encode() + b"\n",
        json.dumps(HEAD).encode() + b'\nnot json\n{"finished": "x", "nbytes": 1}\n',
        json.dumps(HEAD).encode() + b'\n{"finished": "x"}\n',
        json.dumps(HEAD).encode() + b'\n{"finished": 1, "nbytes": 1}\n',
    ],
)
def test_a_garbled_journal_is_refused_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(OutputError, match=r"not a journal .*--restart starts over"):
        read_journal(tmp_path / "journal")


def test_another_version_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(json.dumps({**HEAD, "version": 2}) + "\n")
    with pytest.raises(OutputError, match=r"journal version 2, this one writes 1.*--restart"):
        read_journal(tmp_path / "journal")


def test_the_same_run_is_let_through(tmp_path: Path) -> None:
    require_same(RUN, Run("1" * 64, "2" * 64, FILES), tmp_path)


def test_a_different_command_is_told_before_a_different_source(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"different command \(request 111111111111, .*--restart"):
        require_same(RUN, Run("9" * 64, "8" * 64, ()), tmp_path)


A, B = FILES


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((A,), "b.safetensors is gone"),
        ((A, B, SourceFile("c", 1, "t")), "c is new"),
        ((A, SourceFile("b.safetensors", 21, "t2")), "b.safetensors had 20 bytes, it has 21"),
        ((A, SourceFile("b.safetensors", 20, "t3")), "b.safetensors was written to"),
        ((A, B), "its headers differ"),
    ],
)
def test_a_changed_source_is_told_by_its_first_changed_file(
    tmp_path: Path, files: tuple[SourceFile, ...], said: str
) -> None:
    with pytest.raises(OutputError) as caught:
        require_same(RUN, Run("1" * 64, "8" * 64, files), tmp_path)
    assert f"the source changed since the interrupted run: {said}; --restart" in str(caught.value)
