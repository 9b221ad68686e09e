"""Odd places and words: a sentence, status 2, before any work; and names that are no text work."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.errors import OutputError, UsageError
from shardsurgeon.execution import workdir
from shardsurgeon.operations.request import Destination
from shardsurgeon.storage.open import open_source
from shardsurgeon.storage.system import mount_of
from tests.cli.standins import FakeOperations, in_python
from tests.cli.test_refusals import ROOT, digest

MODEL = ROOT / "fixtures" / "qwen3_moe"
SCORES = str(MODEL / "scores.pt")
POSIX = pytest.mark.skipif(os.name != "posix", reason="folders go away on POSIX")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="file systems that take any bytes")

COMMANDS = [
    ("inspect", "model"),
    ("plan", "s.pt", "--ratio", "0.5", "-o", "p.json"),
    ("apply", "s.pt", "--ratio", "0.5", "-o", "out"),
    ("verify", "a", "b"),
    ("materialize", "small-view", "-o", "out"),
    ("push", "out", "me/pruned"),
    ("scores", "show", "s.pt"),
    ("scores", "random", "model", "-o", "r.npz"),
    ("calibrate", "model", "--dataset", "c.jsonl", "-o", "s.npz"),
]


def line_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(words) == 2
    ended = capsys.readouterr()
    assert ended.err.count("\n") == 1 and not ended.out
    assert "bug" not in ended.err
    return ended.err


# Empty words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_empty_word_is_refused_wherever_it_stands(
    words: tuple[str, ...], fake: FakeOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    for at in range(1, len(words)):
        if not words[at].startswith("-") and words[at] not in ("show", "random"):
            line = line_of(capsys, *words[:at], "", *words[at + 1 :])
            named = words[at - 1] if words[at - 1].startswith("-") else "an argument"
            assert f"error: {named}: is given an empty word" in line
    for option in ("--model", "--family", "--plan", "--metric", "--revision", "--card", "--field"):
        assert f"{option}: is given an empty word" in line_of(capsys, *words, f"{option}=")
        assert f"{option}: is given an empty word" in line_of(capsys, *words, option, "")
    assert not fake.calls


def test_an_empty_name_is_refused_from_python_too() -> None:
    import shardsurgeon

    for call in (
        lambda: shardsurgeon.inspect(""),
        lambda: shardsurgeon.plan(MODEL, SCORES, keep=8, out=""),
        lambda: shardsurgeon.plan(MODEL, SCORES, keep=8).write_plan(""),
    ):
        with pytest.raises((UsageError, OutputError), match="is an empty name"):
            call()


# Revisions

NO_REVISIONS = [
    *(
        "",
        " ",
        "a\nb",
        "a\tb",
        "a b",
        "main ",
        "a\x1bb",
        "a\x9db",
        "\udcff",
        "..",
        "a/../b",
        "a..b",
    ),
    *(
        "-x",
        "/a",
        "a/",
        ".",
        ".a",
        "a/.b",
        "a//b",
        "a~1",
        "a^",
        "a:b",
        "a?",
        "*",
        "[a",
        "a\\b",
        "a..b",
    ),
    *("@{u}", "a.lock", "a" * 256, "a\N{NO-BREAK SPACE}"),
]
REVISIONS = [
    "main",
    "refs/heads/main",
    "refs/pr/1",
    "v1.0",
    "65pct",
    "über",
    "a@b",
    "f" * 40,
    "x_y-z",
]


@pytest.mark.parametrize("revision", NO_REVISIONS, ids=ascii)
def test_what_can_be_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(UsageError, match=r"--revision: .* is no name of a revision"):
        Destination("me/pruned", revision=revision)
    # Behind hf:// a slash begins a folder; in a revision it is written %2F.
    for model in (f"org/name@{revision}", f"hf://org/name@{revision.replace('/', '%2F')}"):
        with pytest.raises(UsageError, match="is no name of a revision"):
            open_source(model)


@pytest.mark.parametrize("revision", REVISIONS)
def test_what_can_be_a_revision_is_taken_as_it_is(revision: str) -> None:
    assert Destination("me/pruned", revision=revision).revision == revision


# The current folder


@POSIX
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_current_folder_that_is_gone_is_named(
    words: tuple[str, ...],
    tmp_path: Path,
    fake: FakeOperations,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "gone").mkdir()
    with contextlib.chdir(tmp_path / "gone"):
        (tmp_path / "gone").rmdir()
        assert "the current folder: cannot be used (No such file" in line_of(capsys, *words)
    assert not fake.calls


# Files where folders are needed, and the other way round


def test_a_file_named_as_a_folder_of_the_result_is_found_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "calibration").write_text("notes")
    words = [str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5"]
    before = digest(tmp_path)
    for command in (["plan", *words], ["apply", *words, "-o", str(tmp_path / "out")]):
        line = line_of(capsys, *command)
        assert "calibration: is a file, and calibration/" in line
        assert "leave it behind with --exclude calibration" in line
    assert digest(tmp_path) == before and not (tmp_path / "out.partial").exists()
    out = str(tmp_path / "out")
    assert main(["apply", *words, "-o", out, "--exclude", "calibration"]) == 0
    assert main(["verify", str(model), out]) == 0


def test_an_output_inside_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["apply", SCORES, "--model", str(MODEL), "--ratio", "0.5"]
    line = line_of(capsys, *words, "-o", str(tmp_path / "file" / "out"))
    assert "file/out: would be inside a file" in line


# Mounts


def test_work_that_is_mounted_from_elsewhere_is_found_before_any_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["apply", SCORES, "--model", str(MODEL), "--ratio", "0.5", "-o", str(out)]
    for place in ("out.partial", "out.partial/files", "out.partial/writing"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.partial/shardsurgeon.journal").touch()

        def mounted(path: Path, place: str = place) -> tuple[int, str]:
            return (1, "elsewhere" if path == tmp_path / place else "here")

        with monkeypatch.context() as patched:
            patched.setattr(workdir, "mount_of", mounted)
            line = line_of(capsys, *words)
        assert f"{place}: is mounted from elsewhere, and could not become out" in line
        shutil.rmtree(tmp_path / "out.partial")
    assert main(words) == 0


def test_folders_of_one_mount_are_told_from_others(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    assert mount_of(tmp_path) == mount_of(tmp_path / "inside")
    if sys.platform == "linux":
        assert mount_of(tmp_path) != mount_of(Path("/proc"))


# Names of bytes that are no text


@LINUX
def test_names_that_are_no_text_go_through_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "m\udcff\udcfe"
    shutil.copytree(MODEL, name)
    scores = f"{name}/scores.pt"
    plan = ["--model", name, "--ratio", "0.5"]
    for words in (
        ["inspect", name, "--json"],
        ["plan", scores, *plan, "-o", f"{name}.json"],
        ["plan", "--plan", f"{name}.json", "--model", name],
        ["apply", scores, *plan, "-o", f"out{name}"],
        ["apply", scores, *plan, "-o", f"out{name}"],
        ["verify", name, f"out{name}"],
        ["scores", "show", scores, "--model", name, "--json"],
        *(["scores", "random", name, "-o", f"r{name}{end}"] for end in (".npz", ".json")),
        ["scores", "random", name, "-o", f"r{name}.safetensors"],
        ["scores", "convert", f"r{name}.safetensors", "-o", f"c{name}.json"],
        ["scores", "compare", f"r{name}.npz", f"r{name}.json"],
    ):
        assert main(words) == 0, words
        assert not capsys.readouterr().err
    for words in (
        ["inspect", f"org/{name}"],
        ["inspect", f"https://host/{name}"],
        ["inspect", f"s3://bucket/{name}"],
        ["inspect", name, "--family", f"{name}.toml"],
        ["plan", scores, "--model", name, "--ratio", name],
        ["plan", scores, *plan, "--metric", name],
        [name],
    ):
        line_of(capsys, *words)


# Too little memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
@pytest.mark.parametrize("megabytes", [60, 170])
def test_too_little_address_space_is_a_sentence(megabytes: int, tmp_path: Path) -> None:
    code = (
        f"import resource, sys; limits = ({megabytes} << 20, {megabytes} << 20);"
        "resource.setrlimit(resource.RLIMIT_AS, limits);"
        "from shardsurgeon.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["apply", SCORES, "--model", str(MODEL), "--ratio", "0.5", "-o", "out"]
    done = in_python(code, *words, cwd=tmp_path, capture_output=True, timeout=60)
    assert "Traceback" not in done.stderr and "bug" not in done.stderr
    # OpenBLAS ends the process with a sentence of its own.
    assert done.returncode == 0 or done.stderr.count("\n") == 1, done.stderr
    assert (done.returncode == 0) == (tmp_path / "out").exists()


def test_threads_and_libraries_that_the_machine_refuses_are_named(
    fake: FakeOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, told in (
        (RuntimeError("can't start new thread"), "the system starts no more threads"),
        (ImportError("libx.so: failed to map segment"), "a library cannot be loaded (libx.so"),
    ):
        fake.apply = error
        assert main(["apply", "s.pt", "--ratio", "0.5"]) == 1
        line = capsys.readouterr().err
        assert told in line and "bug" not in line and line.count("\n") == 1


# Pipes in place of inputs


@POSIX
@pytest.mark.parametrize(
    "words",
    [
        ("plan", "PIPE", "--model", str(MODEL), "--ratio", "0.5"),
        ("plan", "--plan", "PIPE", "--model", str(MODEL)),
        ("plan", SCORES, "--model", str(MODEL), "--ratio", "0.5", "--family", "PIPE"),
        ("scores", "show", "PIPE"),
        ("scores", "convert", "PIPE", "-o", "x.npz"),
        ("scores", "merge", "PIPE", "PIPE", "-o", "x.npz"),
        ("inspect", "PIPE"),
        ("verify", "PIPE", "PIPE"),
        ("materialize", "PIPE", "-o", "x"),
        ("push", "PIPE", "me/x"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("end", ["", ".pt", ".npz", ".json", ".safetensors"])
def test_a_pipe_that_nobody_writes_into_is_waited_for_by_no_command(
    words: tuple[str, ...],
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shardsurgeon.storage.pipes.PATIENCE_SECONDS", 0.0)
    os.mkfifo(f"pipe{end}")
    line_of(capsys, *(word.replace("PIPE", f"pipe{end}") for word in words))


@POSIX
@pytest.mark.parametrize("how", ["<(cat plan.json)", "/dev/stdin", "<(sleep 1; cat plan.json)"])
def test_a_keep_list_comes_through_a_pipe(how: str, tmp_path: Path) -> None:
    plan = ["plan", SCORES, "--model", str(MODEL), "--keep", "8", "-o", str(tmp_path / "plan.json")]
    assert main(plan) == 0
    command = f"cat plan.json | {sys.executable} -m shardsurgeon apply --plan {how} -o out"
    done = subprocess.run(
        ["bash", "-c", f"{command} --model {MODEL}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_dir()
