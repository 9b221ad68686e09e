"""Datasets opened: local files, folders, and errors of the datasets library."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from shardsurgeon.errors import DatasetError, SourceReadError
from shardsurgeon.layerwise.datasets import (
    OpenDataset,
    folder_content_name,
    identity,
    open_dataset,
    parse_spec,
)

RECORDS = [{"text": f"text {n}", "number": n} for n in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def opened(spec: str) -> OpenDataset:
    (part,) = parse_spec(spec)
    return open_dataset(part)


def texts(dataset: OpenDataset) -> list[object]:
    records = [dataset.records[index] for index in range(len(dataset.records))]
    return [record["text"] if isinstance(record, dict) else record for record in records]


def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(RECORDS)


def in_a_folder() -> str:
    Path("folder").mkdir()
    table().to_parquet("folder/train.parquet")
    return "folder"


def with_two_splits() -> str:
    datasets.DatasetDict({"train": table().select([0]), "tool": table()}).save_to_disk("saved")
    return "saved(tool)"


def saved_alone() -> str:
    table().save_to_disk("alone")
    return "alone"


def jsonl() -> str:
    text = "\n\n".join(map(json.dumps, RECORDS)) + "\r\n"
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return "a.jsonl"


def parquet() -> str:
    table().to_parquet("a.parquet")
    return "a.parquet"


def json_file() -> str:
    Path("a.json").write_text(json.dumps(RECORDS))
    return "a.json"


def txt() -> str:
    Path("a.txt").write_text("text 0\ntext 1\n\n   \ntext 2\r\ntext 3\ntext 4")
    return "a.txt"


@pytest.mark.parametrize(
    "make", [jsonl, json_file, txt, parquet, in_a_folder, with_two_splits, saved_alone]
)
def test_every_kind_of_local_dataset_gives_its_records(make: Callable[[], str]) -> None:
    assert texts(opened(make())) == [f"text {n}" for n in range(5)]


def test_a_file_is_named_by_its_content_in_any_folder(tmp_path: Path) -> None:
    first = opened(jsonl()).source
    assert first.startswith("a.jsonl@sha256:")
    (tmp_path / "elsewhere").mkdir()
    Path("a.jsonl").rename("elsewhere/a.jsonl")
    assert opened("elsewhere/a.jsonl").source == first
    with Path("elsewhere/a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert opened("elsewhere/a.jsonl").source != first


def test_the_split_is_named_even_where_the_spec_does_not() -> None:
    name, mark, content = opened(in_a_folder()).source.partition("@sha256:")
    assert (name, mark, content[12:]) == ("folder", "@sha256:", "(train)")


@pytest.mark.parametrize("make", [in_a_folder, saved_alone, with_two_splits])
def test_a_folder_is_known_by_its_content_under_every_path(
    make: Callable[[], str], tmp_path: Path
) -> None:
    spec = make()
    name, bracket, split = spec.partition("(")
    first = opened(spec).source
    copy = shutil.copytree(name, tmp_path / "mount" / name)
    assert opened(f"{copy}{bracket}{split}").source == first
    renamed = shutil.copytree(name, tmp_path / "other")
    other = opened(f"{renamed}{bracket}{split}").source
    assert other != first and identity(other) == identity(first)
    assert texts(opened(spec)) == [f"text {n}" for n in range(5)]


def test_what_the_library_and_people_add_to_a_folder_is_no_data(tmp_path: Path) -> None:
    first = opened(saved_alone()).source
    folder = Path("alone")
    (folder / "README.md").write_text("about")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "cache-1f0c.arrow").write_bytes(b"x")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_fingerprint": "other"}))
    assert opened("alone").source == first


def test_another_name_or_another_byte_of_its_files_is_another_folder() -> None:
    first = opened(in_a_folder()).source
    Path("folder/train.parquet").rename("folder/train-0.parquet")
    renamed = opened("folder").source
    Path("folder/train-0.parquet").unlink()
    datasets.Dataset.from_list([{"text": "other"}]).to_parquet("folder/train.parquet")
    assert len({first, renamed, opened("folder").source}) == 3


def test_the_content_of_a_folder_is_worked_out_by_hand() -> None:
    folder = Path("data")
    (folder / "b").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(b"1")
    (folder / "b" / "c.jsonl").write_bytes(b"2")
    (folder / "notes.md").write_bytes(b"3")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"1", b"2"))
    text = f"a.jsonl\n{one}\nb/c.jsonl\n{two}\n"
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert folder_content_name(folder) == f"data@sha256:{expected}"


@pytest.mark.parametrize(
    ("source", "known_as"),
    [
        ("chats.jsonl@sha256:1f0c9ad2b4e6", "@sha256:1f0c9ad2b4e6"),
        ("my@data@sha256:1f0c9ad2b4e6[x](train)", "@sha256:1f0c9ad2b4e6[x](train)"),
        ("org/name@main(train)", "org/name@main(train)"),
        ("/mnt/a/folder(train)", "/mnt/a/folder(train)"),
    ],
)
def test_the_identity_of_a_source_is_its_content_where_it_says_it(
    source: str, known_as: str
) -> None:
    assert identity(source) == known_as


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "none.jsonl: there is no such file"),
        ("none.parquet", None, "none.parquet: there is no such file"),
        ("a.csv", b"x", "'.csv' is not read"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: is empty"),
        ("a.json", b"[]", "a.json: is empty"),
        ("a.json", b"{}", "holds no JSON list of records"),
        ("a.json", b"nothing", "is not JSON"),
        ("a.parquet", b"not parquet", "a.parquet: cannot be opened: "),
    ],
)
def test_missing_empty_and_broken_files_are_refused(
    name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        opened(name)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [(b"{", "is not JSON"), (b"[1]", "is not a JSON object"), (b"\xff", "is not UTF-8")],
)
def test_a_broken_line_is_named_by_its_number(line: bytes, says: str) -> None:
    Path("a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line)
    records = opened("a.jsonl").records
    with pytest.raises(DatasetError) as raised:
        records[1]
    assert str(raised.value).startswith("a.jsonl, line 3: ")
    assert says in str(raised.value)


def test_an_entry_of_a_list_that_is_no_record_is_named_when_it_is_drawn() -> None:
    Path("a.json").write_text('[{"text": "x"}, 1]')
    records = opened("a.json").records
    assert records[0] == {"text": "x"}
    with pytest.raises(DatasetError, match=r"a\.json: record 1 is neither an object nor a text"):
        records[1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nobody/nothing", "nobody/nothing: cannot be opened: "),
        ("saved(tools)", "has no split 'tools', it has train, tool"),
        ("folder(tools)", "folder(tools): cannot be opened: "),
        ("alone(train)", "is one saved dataset, without subsets and splits"),
        ("a.jsonl(train)", "is a file, and files have no subset, split or revision"),
    ],
)
def test_a_missing_dataset_is_one_line(spec: str, says: str) -> None:
    with_two_splits(), in_a_folder(), saved_alone(), jsonl()
    with pytest.raises(DatasetError) as raised:
        opened(spec)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_folder_is_refused() -> None:
    Path("void").mkdir()
    with pytest.raises(DatasetError, match="void: cannot be opened"):
        opened("void")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by path")
@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl", "pipe.json", "pipe.txt", "pipe.parquet"])
def test_a_pipe_is_no_dataset_and_is_not_waited_for(name: str) -> None:
    os.mkfifo(name)
    with pytest.raises(DatasetError, match="is a pipe or a device; save it to a file first"):
        opened(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by path")
def test_a_pipe_in_a_folder_of_data_is_not_waited_for() -> None:
    place = Path(in_a_folder())
    os.mkfifo(place / "pipe.parquet")
    with pytest.raises(SourceReadError, match="it is a pipe or a device; save it to a file first"):
        folder_content_name(place)
