"""What `--json` prints, of every command and of its failures, is what the published schema says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest

import shardsurgeon
from shardsurgeon.cli.main import cli, main
from tests.cli.report_schema import COMMANDS, SCHEMA_FILE, as_file, require_valid
from tests.cli.test_refusals import ROOT
from tests.layerwise.files import calibration
from tests.support.completions import ScriptedServer

TAKE = ("scores.pt", "--model", "model")
# Of every command that reads no weights of a running model and needs no Hub, several ways.
SESSIONS = {
    "inspect": [("model",), ("pruned",), ("small-view",)],
    "fit": [("model",), ("model", "scores.pt", "--gpus", "1x24GB,8x80GB", "--context", "4096")],
    "plan": [
        (*TAKE, "--ratio", "0.5"),
        (*TAKE, "--ratio", "0.25,0.5"),
        (*TAKE, "--keep", "8", "-o", "keep.json"),
        (*TAKE, "--ratio", "0.5", "--allocate", "global"),
    ],
    "apply": [
        (*TAKE, "--ratio", "0.5", "-o", "half", "--dry-run"),
        (*TAKE, "--ratio", "0.5", "-o", "half"),
        (*TAKE, "--ratio", "0.5", "-o", "half"),
        (*TAKE, "--ratio", "0.5", "-o", "bare", "--no-verify"),
    ],
    "materialize": [
        ("small-view", "-o", "made", "--dry-run"),
        ("small-view", "-o", "made"),
        ("small-view", "-o", "bare", "--no-verify"),
    ],
    "verify": [("model", "pruned"), ("model", "pruned", "--sample", "1"), ("other", "pruned")],
    "scores show": [("scores.pt",), ("scores.pt", "--model", "model"), ("one.npz",)],
    "scores compare": [("scores.pt", "scores.pt"), ("one.npz", "two.npz", "--ratio", "0.5")],
    "scores convert": [("scores.pt", "-o", "scores.npz"), ("one.npz", "-o", "one.json")],
    "scores merge": [("one.npz", "two.npz", "-o", "both.npz")],
    "scores blend": [
        ("one.npz", "two.npz", "--weights", "one=2,two=1", "-o", "blend.npz"),
        ("one.npz", "two.npz", "--objective", "max-min", "--keep", "3", "-o", "best.npz"),
    ],
    "scores from-router": [("model", "-o", "router.npz")],
    "scores from-weights": [("model", "-o", "weights.npz")],
    "scores random": [("model", "-o", "random.npz")],
    "report": [("pruned", "-o", "report.html"), ("pruned", "-o", "report.html")],
    "calibrate --dry-run": [("model",), ("model", "--device", "cpu", "--memory", "1MB")],
    "probe": [
        ("SERVER", "--prompts", "chats.txt", "--samples", "3", "-o", "probe.json"),
        (
            *("SERVER", "--prompts", "chats.txt", "--samples", "3", "-o", "second.json"),
            *("--against", "probe.json", "--sampling", "min_p=0.1"),
        ),
        (
            *("SERVER", "--prompts", "chats.txt", "--samples", "3", "-o", "third.json"),
            *("--against", "probe.json", "--detect", "0.9"),
        ),
    ],
    "run": [("recipe.toml",)],
    "families": [()],
    "env": [()],
}
# By a signal, at once, a command fails as any other: tests/cli/test_errors.py.
FAILURES = {
    "no model": ("inspect", "nowhere"),
    "no scores": ("plan", "nowhere.pt", "--model", "model", "--ratio", "0.5"),
    "no option": ("plan", "--shrink"),
    "no number": ("apply", *TAKE, "--keep", "many"),
    "no argument": ("verify", "model"),
    "a folder in the way": ("apply", *TAKE, "--keep", "8", "-o", "other"),
    "no format": ("scores", "convert", "scores.pt", "-o", "scores.xyz"),
    "no command": ("scores", "mix"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from shardsurgeon.scores.files import write_scores

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", "model")
    shutil.copytree(ROOT / "fixtures" / "kimi_k2", "other")
    shutil.copy("model/scores.pt", "scores.pt")
    Path("chats.txt").write_text("How are you?\nWhat is a shard?\n")
    Path("recipe.toml").write_text(
        'model = "model"\n[plan]\nscores = "scores.pt"\nratio = [0.25, 0.5]\n'
        '[apply]\nscores = "scores.pt"\nratio = 0.5\nout = "by-recipe"\n'
    )
    plan = shardsurgeon.plan("model", "scores.pt", keep=8)
    shardsurgeon.apply(plan, "pruned", verify=False)
    shardsurgeon.apply(plan, "small-view", view=True, verify=False)
    for number, name in enumerate(("one.npz", "two.npz"), start=1):
        write_scores(name, calibration(number).content())
    return tmp_path


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda question: "Fine.") as found:
        yield found


def commands(group: click.Group, path: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{path}{name} ")
        else:
            found[f"{path}{name}"] = command
    return found


def test_the_published_schema_is_that_of_the_reports() -> None:
    written = SCHEMA_FILE.read_text(encoding="utf-8")
    assert written == as_file(), "python -m tests.cli.report_schema --write, and look at the diff"


def test_every_command_with_json_has_a_schema() -> None:
    with_json = {
        name
        for name, command in commands(cli).items()
        if any("--json" in option.opts for option in command.params)
    }
    assert with_json == COMMANDS.keys() - {"calibrate --dry-run"}
    assert SESSIONS.keys() == COMMANDS.keys() - {"push", "calibrate", "evaluate", "scores plot"}


@pytest.mark.parametrize("name", SESSIONS)
def test_what_a_command_prints_is_as_the_schema_says(
    name: str, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in SESSIONS[name]:
        capsys.readouterr()
        given = (word.replace("SERVER", server.url) for word in words)
        status = main([*name.split(), *given, "--json"])
        document = json.loads(capsys.readouterr().out)
        require_valid(document, name)
        assert ("error" in document) == (status != 0)
        assert document["version"] == shardsurgeon.__version__


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_as_the_schema_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main([*FAILURES[name], "--json"])
    said = capsys.readouterr()
    document = json.loads(said.out)
    require_valid(document, "failure")
    assert document["error"]["status"] == status != 0
    assert said.err.count("\n") == 1


def test_a_report_of_python_is_the_document_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def printed(*words: str) -> Any:
        capsys.readouterr()
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    planned, printed_plan = (
        shardsurgeon.plan("model", "scores.pt", ratio=0.5).report.to_dict(),
        printed("plan", *TAKE, "--ratio", "0.5"),
    )
    # The disk is another one a moment later.
    for document in (planned, printed_plan):
        assert document["plans"][0].pop("space_free") > 0
    assert printed_plan == planned
    assert printed("inspect", "model") == shardsurgeon.inspect("model").to_dict()
    assert printed("verify", "model", "pruned") == shardsurgeon.verify("model", "pruned").to_dict()
    shown = shardsurgeon.show_scores("scores.pt", "model")
    assert printed("scores", "show", "scores.pt", "--model", "model") == shown.to_dict()


def test_the_schema_refuses_what_is_no_document() -> None:
    report = shardsurgeon.inspect("model").to_dict()
    for wrong in ({}, {"plans": 3}, {**report, "shards": "5"}, {**report, "schema": 0}):
        with pytest.raises(jsonschema.ValidationError):
            require_valid(wrong, "inspect")
    lacking = {key: item for key, item in report.items() if key != "num_experts"}
    with pytest.raises(jsonschema.ValidationError):
        require_valid(lacking, "inspect")
