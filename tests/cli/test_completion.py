"""What a shell completes at Tab, and the script that asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from shardsurgeon.cli.main import cli, main
from tests.cli.standins import ROOT
from tests.cli.test_options import WITH_MODEL, commands

K25 = ROOT / "fixtures" / "kimi_k25"
METRICS = ["ean_mean", "ean_sum", "expert_frequency", "man", "max_activations"]
SHELL = "_SHARDSURGEON_COMPLETE"


def offered(*words: str) -> list[str]:
    """What is offered for the last word: values, or the kind of thing that the shell looks for."""
    items = ShellComplete(cli, {}, "shardsurgeon", SHELL).get_completions(
        list(words[:-1]), words[-1]
    )
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in items]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (("apply", ""), ["<file>"]),
        (("apply", "sc"), ["<file>"]),
        (("apply", "s.pt", "-o", ""), ["<dir>"]),
        (("plan", "s.pt", "-o", ""), ["<file>"]),
        (("apply", "--plan", ""), ["<file>"]),
        (("apply", "s.pt", "-m", "mod"), ["<dir>"]),
        (("verify", ""), ["<dir>"]),
        (("verify", "a", ""), ["<dir>"]),
        (("materialize", ""), ["<dir>"]),
        (("materialize", "v", "-o", ""), ["<dir>"]),
        (("push", ""), ["<dir>"]),
        (("scores", "merge", "a.pt", ""), ["<file>"]),
        (("scores", "convert", ""), ["<file>"]),
        (("calibrate", "--dataset", ""), ["<file>"]),
        (("evaluate", ""), ["<file>"]),
        (("evaluate", "--plan", ""), ["<file>"]),
        (("plan", "s.pt", "--evaluation", ""), ["<file>"]),
        (("evaluate", "s.pt", "-r", "0.25,0.6"), ["0.25,0.65"]),
        (("apply", "s.pt", "--ratio", "0.6"), ["0.65"]),
        (("plan", "s.pt", "-r", "0.25,0.7"), ["0.25,0.75"]),
        (("apply", "s.pt", "--mtp", "r"), ["router-norm"]),
        (("inspect", "--family", "a"), ["auto"]),
        (("inspect", "--family", ""), ["<file>"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("ver",), ["verify"]),
        (("scores", "from-"), ["from-router", "from-weights"]),
        (("plan", "--lay"), ["--layers"]),
    ],
)
def test_what_is_offered(line: tuple[str, ...], expected: list[str]) -> None:
    assert offered(*line) == expected


@pytest.mark.parametrize("words", WITH_MODEL.values())
def test_a_model_is_a_folder_in_every_command(words: tuple[str, ...]) -> None:
    start = words[: 2 if words[0] == "scores" else 1]
    assert offered(*start, "--model", "") == ["<dir>"]


def test_nothing_that_names_a_file_is_left_to_guessing() -> None:
    """Options whose value the help calls a file or a folder, on every command."""
    for words, options in commands():
        for option in sorted(options & {"--out", "--plan", "--card", "--extend", "--tokenizer"}):
            assert offered(*words, option, "") in (["<file>"], ["<dir>"]), (words, option)


@pytest.mark.parametrize(
    "words",
    [
        ("apply", str(K25 / "scores.pt"), "--metric"),
        ("plan", "--ratio", "0.5", str(K25 / "scores.pt"), "--metric"),
        ("scores", "show", str(K25 / "scores.pt"), "--metric"),
        ("scores", "compare", str(K25 / "scores.pt"), "b.pt", "--metric"),
        ("evaluate", str(K25 / "scores.pt"), "--metric"),
        ("evaluate", str(K25), str(K25 / "scores.pt"), "--ratio", "0.5", "--metric"),
    ],
)
def test_metrics_are_those_of_the_score_file(words: tuple[str, ...]) -> None:
    assert offered(*words, "")[:5] == METRICS
    assert offered(*words, "ea") == ["ean_mean", "ean_sum"]


@pytest.mark.parametrize("content", [b"", b"\x80\x02cos\nsystem\n", b"\xff" * 64, None])
def test_a_score_file_that_cannot_be_read_offers_nothing(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "scores.pt"
    if content is not None:
        file.write_bytes(content)
    assert offered("apply", str(file), "--metric", "") == []
    assert offered("apply", "--metric", "") == []


def test_names_that_a_shell_could_take_for_more_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"0": {"reap": [1, 2], "$(touch x)": [1, 2], "a\\nplain,b": [2, 1]}}')
    assert offered("apply", str(file), "--metric", "") == ["reap"]


def asked(folder: Path, words: str, number: int, **more: str) -> subprocess.CompletedProcess[str]:
    """Ask as the script for bash does, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_WORDS": f"shardsurgeon {words}"}
    environment |= {"COMP_CWORD": str(number), SHELL: "bash_complete", **more}
    command = [sys.executable, "-m", "shardsurgeon"]
    return subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True)


def test_completing_says_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "scores.pt").write_bytes(b"\x80\x02cos\nsystem\n")
    done = asked(tmp_path, "apply scores.pt --metric ", 4)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    done = asked(tmp_path, "apply --ratio 0.5,half --keep x -j many --mtp ", 9)
    assert (done.stdout.split(), done.stderr) == (
        ["plain,router-norm", "plain,last", "plain,keep", "plain,drop"],
        "",
    )
    done = asked(tmp_path, "apply 'unfinished ", 2)
    assert done.stderr == ""
    done = asked(tmp_path, "apply ", 2, **{SHELL: "nonsense"})
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("PATH", "")  # no shell is started for it
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{SHELL}={shell}_complete" in printed.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    program = tmp_path / "shardsurgeon"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m shardsurgeon "$@"\n')
    program.chmod(0o755)
    ask = (
        'eval "$(shardsurgeon completion bash)"\n'
        f"COMP_WORDS=(shardsurgeon apply {K25}/scores.pt --metric e); COMP_CWORD=4\n"
        '_shardsurgeon_completion shardsurgeon; echo "${COMPREPLY[@]}"; complete -p shardsurgeon\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(["bash", "-c", ask], env=environment, text=True, capture_output=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "ean_mean ean_sum expert_frequency"
    assert done.stdout.splitlines()[1].endswith("-F _shardsurgeon_completion shardsurgeon")
