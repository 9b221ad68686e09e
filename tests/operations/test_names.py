"""Files of odd names, wherever a model lies: each is carried, left behind by name, or refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.cli.main import main
from shardsurgeon.errors import OutputError
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.operations import api
from shardsurgeon.storage.local import LocalSource
from tests.operations.workbench import Shell, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub
from tests.support.tiny_job import Job, content, make_job

FAMILY = "qwen3_moe"
FOLDER = fixture_folder(FAMILY)
FILES = {p.relative_to(FOLDER).as_posix(): p.read_bytes() for p in FOLDER.rglob("*") if p.is_file()}
DATA = b"odd\0"
INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="names as POSIX has them")

# Name -> None where it is carried, why it is left behind, or the line of a refusal.
FILE_NAMES: dict[str, str | None] = {
    "C:\\evil": None,
    "\\\\srv\\x": None,
    "a:b": None,
    "x ": None,
    "x.": None,
    " ": None,
    "-rf": None,
    "%2e%2e/x": None,
    "e\x1b[31mvil": None,
    "a\nb": None,
    "a\u202eb": None,
    "n" * 255: None,
    "readme.md": None,
    "files": None,
    "writing/x": None,
    "README.source.md": None,
    "shardsurgeon.journal": "partial work",
    "sub/shardsurgeon.lock": "partial work",
    "x.writing": "partial work",
    "calibration": "calibration: is a file, and calibration/",
}
SOME = ["C:\\evil", "a:b", "x ", "e\x1b[31mvil", "a\nb", "x.writing", "calibration"]
# Names that no folder has, but a store or a repository may.
FAR_NAMES: dict[str, str | None] = {
    "a//b": "name that is no plain path",
    "./README.md": "name that is no plain path",
    "sub/./x": "name that is no plain path",
    "a/../b": "file name 'a/../b' leads out of the",
    "../b": "file name '../b' leads out of the",
    "LICENSE\0x": "leads out of the",
    "n" * 256: "name that is too long",
    "sub/" + "n" * 256: "name that is too long",
    "x" + "/d" * 600: "name that is too long",
    "config.json/x": "config.json: is a file, and config.json/x needs a folder of that name",
    "calibration/scores.pt/x": "calibration/scores.pt: is a file, and calibration/",
}


def lay_local(name: str, folder: Path) -> str:
    model = folder / "model"
    shutil.copytree(FOLDER, model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(DATA)
    return str(model)


@pytest.fixture
def lay_in_store() -> Iterator[Callable[[str, Path], str]]:
    store = fsspec.filesystem("memory")

    def lay(name: str, folder: Path) -> str:
        for each, data in {**FILES, name: DATA}.items():
            # Not `pipe_file`, which mends a path.
            path = f"/models/tiny/{each}"
            store.store[path] = MemoryFile(store, path, data)
        return "memory://models/tiny"

    yield lay
    for path in [path for path in store.store if path.startswith("/models/tiny/")]:
        del store.store[path]


def require_as_told(
    model: str, name: str, told: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prune the model, and see that the odd file goes where it should."""
    out = folder / "out"
    words = ["apply", str(scores_of(FAMILY)), "--keep", "8", "--model", model, "-o", str(out)]
    status = main([*words, "--json"])
    said = capsys.readouterr()
    if status:
        assert status == 2
        # With a journal in it, the whole folder is such work.
        told = "the unfinished work of an apply" if name == "shardsurgeon.journal" else told
        assert told is not None and told.replace("\0", "\\x00") in said.err
        assert said.err.count("\n") == 1 and "bug" not in said.err
        assert not out.exists() and not out.with_name("out.partial").exists()
        return
    plan = json.loads(said.out)["plan"]
    assert plan["left_behind"].get(name) == told
    assert (name in plan["carried_along"]) == (told is None)
    if told is None:
        assert (out / name).read_bytes() == DATA
    assert main(["verify", model, str(out)]) == 0


@pytest.mark.parametrize("name", [*FILE_NAMES, "x\udcff"], ids=ascii)
def test_of_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lay_local(name, tmp_path)
    require_as_told(model, name, FILE_NAMES.get(name), tmp_path, capsys)


@pytest.mark.parametrize("name", [*SOME, *FAR_NAMES, "/abs", "x\ud800", "x\udcff"], ids=ascii)
def test_of_a_store(
    name: str,
    tmp_path: Path,
    lay_in_store: Callable[[str, Path], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = {"/abs": "name that is no plain path", "x\ud800": "name that is no text"}
    others["x\udcff"] = "name that is no text"
    told = {**FILE_NAMES, **FAR_NAMES, **others}[name]
    require_as_told(lay_in_store(name, tmp_path), name, told, tmp_path, capsys)


@pytest.mark.parametrize("name", [*SOME, *FAR_NAMES], ids=ascii)
def test_of_a_repository(
    name: str, tmp_path: Path, online: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    online.add_model("org/tiny", {**FILES, name: DATA})
    told = {**FILE_NAMES, **FAR_NAMES}[name]
    require_as_told("org/tiny", name, told, tmp_path, capsys)


def test_a_web_server_is_not_asked_for_what_no_file_is_called(hub: LocalHub) -> None:
    names = ["a//b", "./x.model", "x\ud800.model", "../x", "n" * 300, "", "own.model"]
    said = {f"{number}_file": name for number, name in enumerate(names)}
    code = {"AutoModel": ["own.Model", "a//b.Model", f"{'n' * 300}.Model"]}
    config = {**json.loads(FILES["config.json"]), "auto_map": code}
    files = {**FILES, "config.json": json.dumps(config).encode()}
    files |= {"tokenizer_config.json": json.dumps(said).encode(), "own.model": b"x", "own.py": b"x"}
    hub.add_model("org/web", files)
    checkpoint = api.open_checkpoint(f"{hub.endpoint}/org/web/resolve/main")
    assert {"own.model", "own.py"} < {file.name for file in checkpoint.files}


HIDDEN = {
    ".env": "secret",
    ".ssh/authorized_keys": "secret",
    ".gitattributes": "hidden",
    ".hidden/x.json": "hidden",
    "sub/.secret": "hidden",
}


@pytest.mark.parametrize("place", ["folder", "store", "repository"])
def test_what_is_hidden_stays_wherever_the_model_lies(
    place: str, tmp_path: Path, online: LocalHub
) -> None:
    files: Mapping[str, bytes] = {**FILES, **dict.fromkeys([*HIDDEN, ".git/x", ".cache/x"], DATA)}
    model, store = str(tmp_path / "model"), fsspec.filesystem("memory")
    if place == "repository":
        online.add_model(model := "org/tiny", files)
    for name, data in files.items():
        if place == "store":
            model = "memory://hidden/tiny"
            store.pipe_file(f"/hidden/tiny/{name}", data)
        elif place == "folder":
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_bytes(data)
    report = api.apply(api.plan(model, scores_of(FAMILY), ratio=0.5, out=tmp_path / "out"))
    found = {name: why for name, why in report.plan.left_behind.items() if name != "scores.pt"}
    assert found == HIDDEN
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert not [name for name in written if "/." in f"/{name}"]
    if place == "store":
        store.rm("/hidden", recursive=True)


def test_a_folder_too_deep_is_left_behind(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(FOLDER, model)
    (model / "/".join("d" * 99)).mkdir(parents=True)
    (model / "/".join("d" * 99) / "x").write_bytes(DATA)
    (model / "/".join("e" * 101)).mkdir(parents=True)
    report = api.plan(model, scores_of(FAMILY), ratio=0.5).report
    assert "/".join("d" * 99) + "/x" in report.carried_along
    assert report.left_behind["/".join("e" * 100)] == "folder that is too deep"


@pytest.mark.parametrize("mark", ["x\udcff", "a\nb", "C:\\e", "e\x1b[31m"], ids=ascii)
def test_shards_and_scores_of_odd_names(mark: str, tmp_path: Path) -> None:
    model = tmp_path / mark
    shutil.copytree(FOLDER, model)
    (model / INDEX).unlink()
    for number, shard in enumerate(sorted(model.glob("model-*"))):
        shard.rename(model / f"{mark}{number}.safetensors")
    scores = tmp_path / f"{mark}.pt"
    shutil.copy(scores_of(FAMILY), scores)
    out = tmp_path / f"{mark}-out"
    assert main(["apply", str(scores), "--keep", "8", "--model", str(model), "-o", str(out)]) == 0
    assert main(["verify", str(model), str(out)]) == 0
    assert (out / "calibration" / scores.name).read_bytes() == scores.read_bytes()


@pytest.mark.parametrize("name", ["n" * 300, "x/" * 3000])
def test_a_name_that_is_too_long_is_one_that_is_not_there(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, scores = str(FOLDER), str(scores_of(FAMILY))
    commands = [
        ["inspect", name],
        ["plan", name, "--keep", "8", "--model", model],
        ["plan", "--plan", name, "--model", model],
        ["plan", scores, "--keep", "8", "--model", name],
        ["verify", name, name],
        ["verify", model, name],
        ["push", name, "me/tiny"],
        ["scores", "show", name],
        ["inspect", model, "--family", name],
    ]
    for words in commands:
        assert main(words) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "SHARDSURGEON_DEBUG" not in line


def test_no_repository_takes_a_name_that_is_no_text(shell: Shell, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(FOLDER, model)
    (model / "x\udcff").write_bytes(DATA)
    words = ["apply", str(scores_of(FAMILY)), "--keep", "8", "--model", str(model)]
    for more in (["--stream-push", "me/a"], ["--push-to-hub", "me/b", "-o", str(out)]):
        assert "is a name that is no text" in shell.refused(*words, *more)
    assert not out.exists()
    shell.good(*words, "-o", str(out))
    assert "is a name that is no text" in shell.refused("push", str(out), "me/c")
    assert PROVENANCE_NAME in {file.name for file in LocalSource(out).list()}


def test_on_a_disk_without_case_two_names_must_differ_in_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: Job = make_job(tmp_path)
    (tmp_path / "Tiny-MoE" / "Tokenizer.JSON").write_bytes(b"x")
    source = LocalSource(tmp_path / "Tiny-MoE")
    files = tuple(file for file in source.list() if file.name == "Tokenizer.JSON")
    plan = replace(
        job.plan,
        copied_files=(*job.plan.copied_files, "Tokenizer.JSON"),
        source_files=(*job.plan.source_files, *files),
    )
    with monkeypatch.context() as disk:
        disk.setattr(WorkDir, "folds_case", True)
        with pytest.raises(OutputError, match=r"Tokenizer\.JSON: differs from tokenizer\.json in"):
            execute(plan, source, tmp_path / "OUT")
        execute(job.plan, source, tmp_path / "OUT")
    execute(plan, source, tmp_path / "BOTH")
    assert content(tmp_path / "BOTH") == {**job.expected, "Tokenizer.JSON": b"x"}
