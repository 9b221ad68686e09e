"""The journal: what it remembers, what it refuses, and what a torn line costs."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from shardsurgeon import errors
from shardsurgeon.errors import OutputError
from shardsurgeon.execution.journal import (
    Journal,
    JournalState,
    Run,
    read_journal,
    require_same,
)
from shardsurgeon.storage.source import SourceFile
from shardsurgeon.storage.system import native

FILES = (SourceFile("a.safetensors", 10, "t1"), SourceFile("b.safetensors", 20, "t2"))
ASKED = {"selection": "ratio 0.5", "MTP": "dropped"}
RUN = Run("1" * 64, "2" * 64, FILES, "hf://org/name@abc", ASKED)


def begun(path: Path) -> Path:
    with Journal(path, RUN, None, native()) as journal:
        journal.finish("one.safetensors", 100)
        journal.finish("sub/zwei ü.safetensors", 200)
    return path


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    record = read_journal(begun(tmp_path / "journal"))
    assert record is not None
    assert record.run == RUN
    assert record.done.finished == {"one.safetensors": 100, "sub/zwei ü.safetensors": 200}


def test_no_journal_is_no_record(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal") is None


def test_a_file_is_begun_filled_finished_and_sent(tmp_path: Path) -> None:
    seen = []
    with Journal(tmp_path / "journal", RUN, None, native()) as journal:
        journal.begin("a")
        journal.fill("a", [(0, 5), (90, 100)])
        journal.begin("b")
        journal.fill("a", [(5, 7)])
        seen.append(deepcopy(journal.done))
        journal.finish("a", 100)
        journal.finish("b", 50)
        seen.append(deepcopy(journal.done))
        journal.send("a", "there", "receipt of a")
        seen.append(deepcopy(journal.done))
    part = [(0, 5), (90, 100), (5, 7)]
    assert seen == [
        JournalState(parts={"a": part, "b": []}),
        JournalState(finished={"a": 100, "b": 50}),
        JournalState(finished={"b": 50}, sent={"a": "receipt of a"}, address="there"),
    ]
    record = read_journal(tmp_path / "journal")
    assert record is not None
    assert record.done == seen[-1]


@pytest.mark.parametrize("before", ["fill", "finish", "send"])
def test_a_file_that_is_begun_again_has_nothing_of_the_old_one(tmp_path: Path, before: str) -> None:
    with Journal(tmp_path / "journal", RUN, None, native()) as journal:
        journal.begin("a")
        steps = {
            "fill": lambda: journal.fill("a", [(0, 5)]),
            "finish": lambda: journal.finish("a", 5),
            "send": lambda: journal.send("a", "there", ""),
        }
        steps[before]()
        journal.begin("a")
        assert journal.done.parts == {"a": []}
        assert not journal.done.finished and not journal.done.sent


def test_many_threads_may_write_lines(tmp_path: Path) -> None:
    def work(name: str) -> None:
        journal.begin(name)
        for at in range(20):
            journal.fill(name, [(at, at + 1)])

    with (
        Journal(tmp_path / "journal", RUN, None, native()) as journal,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(work, "abcd"))
    record = read_journal(tmp_path / "journal")
    assert record is not None
    assert record.done.parts == {name: [(n, n + 1) for n in range(20)] for name in "abcd"}


@pytest.mark.parametrize(
    "torn", [b'{"finished": "thr', b"\0" * 50, b'{"finished": "x", "nbytes": 1}']
)
def test_a_torn_last_line_is_forgotten_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = begun(tmp_path / "journal")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    record = read_journal(path)
    assert record is not None
    assert set(record.done.finished) == {"one.safetensors", "sub/zwei ü.safetensors"}
    with Journal(path, RUN, record, native()) as journal:
        journal.finish("three", 3)
    assert path.read_bytes() == whole + b'{"finished": "three", "nbytes": 3}\n'


def test_a_new_journal_forgets_the_old_one(tmp_path: Path) -> None:
    path = begun(tmp_path / "journal")
    other = Run("3" * 64, "4" * 64, ())
    with Journal(path, other, None, native()) as journal:
        assert journal.done == JournalState()
    record = read_journal(path)
    assert record is not None
    assert (record.run, record.done) == (other, JournalState())


HEAD = {
    "format": "shardsurgeon journal",
    "version": 3,
    "result": "1",
    "asked": {},
    "program": "0.1",
    "source": "2",
    "origin": "",
    "source_files": [["a", 1, "t"]],
}
BEGUN = b'\n{"begun": "a"}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no newline at all",
        b"not json\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        json.dumps(HEAD).encode() + b"\n" + b'{"a":' * 100_000 + b"\n",
        json.dumps({**HEAD, "format": "other"}).encode() + b"\n",
        json.dumps({**HEAD, "result": 1}).encode() + b"\n",
        json.dumps({**HEAD, "asked": {"selection": 1}}).encode() + b"\n",
        json.dumps({**HEAD, "origin": None}).encode() + b"\n",
        json.dumps({**HEAD, "source_files": [["a", "1", "t"]]}).encode() + b"\n",
        json.dumps(HEAD).encode() + b'\nnot json\n{"finished": "x", "nbytes": 1}\n',
        json.dumps(HEAD).encode() + b'\n{"finished": "x"}\n',
        json.dumps(HEAD).encode() + b'\n{"finished": 1, "nbytes": 1}\n',
        json.dumps(HEAD).encode() + b'\n{"filled": "not begun", "ranges": []}\n',
        json.dumps(HEAD).encode() + BEGUN + b'{"filled": "a", "ranges": [[0, 1], [2]]}\n',
        json.dumps(HEAD).encode() + BEGUN + b'{"filled": "a", "ranges": [[5, 5]]}\n',
        json.dumps(HEAD).encode() + BEGUN + b'{"filled": "a", "ranges": [["0", 1]]}\n',
        json.dumps(HEAD).encode() + b'\n{"sent": "a", "receipt": "r"}\n',
    ],
)
def test_a_garbled_journal_is_refused_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(OutputError, match=r"not a journal .*--restart starts over"):
        read_journal(tmp_path / "journal")


def test_another_version_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(json.dumps({**HEAD, "version": 1}) + "\n")
    with pytest.raises(OutputError, match=r"journal version 1, this one writes 3.*--restart"):
        read_journal(tmp_path / "journal")


def test_the_same_run_is_let_through(tmp_path: Path) -> None:
    require_same(RUN, Run("1" * 64, "2" * 64, FILES), tmp_path)


def test_the_same_run_of_another_version_is_let_through(tmp_path: Path) -> None:
    newer = Run("1" * 64, "2" * 64, FILES, asked={"other words": "for it"}, program="99.0")
    require_same(RUN, newer, tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ASKED | {"selection": "keep"}, r"\(selection: ratio 0\.5, this one keep\)"),
        (ASKED | {"shards": "5GB"}, r"\(shards: unsaid, this one 5GB\)"),
        ({"selection": "ratio 0.5"}, r"\(MTP: dropped, this one unsaid\)"),
    ],
)
def test_a_different_command_is_told_before_a_different_source(
    tmp_path: Path, asked: dict[str, str], said: str
) -> None:
    with pytest.raises(OutputError, match=rf"different command {said}.*--restart"):
        require_same(RUN, Run("9" * 64, "8" * 64, (), asked=asked), tmp_path)


def test_a_version_that_would_write_other_bytes_is_told(tmp_path: Path) -> None:
    newer = Run("9" * 64, "2" * 64, FILES, asked=ASKED, program="99.0")
    with pytest.raises(OutputError, match=r"begun by shardsurgeon .*, and this one, 99\.0, would"):
        require_same(RUN, newer, tmp_path)


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
        require_same(RUN, Run("1" * 64, "8" * 64, files, RUN.origin, ASKED), tmp_path)
    assert f"the source changed since the interrupted run: {said}; --restart" in str(caught.value)


def test_a_commit_that_was_pruned_is_named_where_another_is_there_now(tmp_path: Path) -> None:
    now = Run("1" * 64, "8" * 64, (A,), "hf://org/name@def", ASKED)
    said = r"gone; --model hf://org/name@abc goes on with it, --restart starts over$"
    with pytest.raises(OutputError, match=said):
        require_same(RUN, now, tmp_path)


# What people are told of a run that they find.

COMMAND = "shardsurgeon apply scores.pt --ratio 0.5"
OTHER = Run("9" * 64, "8" * 64, (), asked=ASKED | {"MTP": "kept"})


def found(path: Path, run: Run) -> str:
    """What the command OTHER is told that meets this run, which has finished two shards."""
    with Journal(path, run, None, native()) as journal:
        journal.begin("c")
        journal.finish("a", 100)
        journal.finish("b", 200)
        journal.send("b", "there", "receipt")
    record = read_journal(path)
    assert record is not None
    with pytest.raises(OutputError) as caught:
        require_same(record.run, OTHER, path.parent, record.done)
    return str(caught.value)


def test_a_run_is_known_by_its_command_its_date_and_how_far_it_came(tmp_path: Path) -> None:
    before = datetime.now().replace(second=0, microsecond=0)
    said = found(tmp_path / "journal", replace(RUN, command=COMMAND, shards=12))
    told = re.search(rf"was made on (.*) by `{COMMAND}`, 2 of 12 shards done; this is a diff", said)
    assert told and before <= datetime.strptime(told[1], "%Y-%m-%d %H:%M") <= datetime.now()
    assert "different command (MTP: dropped, this one kept); repeat that command, " in said


def test_a_journal_of_an_earlier_version_says_what_it_can(tmp_path: Path) -> None:
    head = {**HEAD, "result": RUN.result, "asked": ASKED}
    (tmp_path / "journal").write_text(json.dumps(head) + "\n")
    record = read_journal(tmp_path / "journal")
    assert record is not None and record.run.command == ""
    said = r"belongs to an interrupted run of a different command \(MTP: dropped, this one kept\)"
    with pytest.raises(OutputError, match=said):
        require_same(record.run, OTHER, tmp_path, record.done)


@pytest.mark.parametrize("begun", ["", "yesterday", "9" * 40, "0001-01-01T00:00:00+14:00"])
def test_a_date_that_is_none_is_left_out(tmp_path: Path, begun: str) -> None:
    with pytest.raises(OutputError, match=rf"was made by `{COMMAND}`; this is a different"):
        require_same(replace(RUN, command=COMMAND, begun=begun), OTHER, tmp_path)


def test_of_what_only_a_machine_can_compare_the_name_is_told(tmp_path: Path) -> None:
    asked = {"calibration/scores.pt": "SHA-256 0123456789ab", "keep-lists": "0123456789ab"}
    for name, digest in asked.items():
        here = replace(RUN, asked={name: digest})
        other = Run("9" * 64, "2" * 64, FILES, asked={name: digest[:-1] + "c"})
        with pytest.raises(OutputError, match=rf"different command \(it differs in {name}\)"):
            require_same(here, other, tmp_path)


def test_no_secret_gets_into_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_IN_USE", set())
    errors.keep_secret("correct-horse")
    told = (
        "--model s3://me:correct-horse@b/m https://h/m?X-Amz-Signature=0a1b2c hf_0123456789abcdefgh"
    )
    found(tmp_path / "journal", replace(RUN, command=told))
    raw = (tmp_path / "journal").read_text()
    assert "s3://me:***@b/m" in raw
    assert not [secret for secret in ("horse", "0a1b2c", "0123456789ab") if secret in raw]


def test_what_was_done_is_counted_in_bytes_whatever_became_of_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", RUN, None, native()) as journal:
        journal.finish("a", 100)
        journal.send("a", "there", "receipt")
        journal.begin("b")
        journal.fill("b", [(0, 5), (7, 9)])
        assert (journal.done.nbytes, journal.done.shards) == (107, 1)
        journal.finish("b", 50)
        assert (journal.done.nbytes, journal.done.shards) == (150, 2)
        journal.begin("b")
        assert (journal.done.nbytes, journal.done.shards) == (100, 1)
