"""The commands that reports end with work as they are printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.cli.main import main
from shardsurgeon.families.schema import all_families
from shardsurgeon.operations.serving import serving_of
from tests.cli.standins import ROOT
from tests.cli.test_family_option import undeclared
from tests.operations.workbench import Shell

pytestmark = pytest.mark.skipif("os.name == 'nt'", reason="another shell, other quotes")


def printed(report: str) -> list[list[str]]:
    """The commands of a report, each the words that a shell makes of its line."""
    lines = [line for line in report.splitlines() if re.match(r"  (shardsurgeon|vllm) ", line)]
    return [shlex.split(line) for line in lines]


def run_all(report: str, served: str | None, remote_code: bool = False) -> int:
    """Run every command that a report prints, and say how many there are.

    served: the folder or repository that `vllm serve` is told, None where no such line may be.
    What vLLM itself makes of the line is tested in tests/serving.
    """
    commands = printed(report)
    for program, *words in commands:
        if program == "shardsurgeon":
            assert main(words) == 0, words
        else:
            assert words == ["serve", served, *["--trust-remote-code"] * remote_code]
    assert ("vllm" in {command[0] for command in commands}) == (served is not None)
    return len(commands)


@pytest.mark.parametrize("family", ["kimi_k25", "kimi_linear", "deepseek_v3", "qwen3_moe"])
def test_after_apply(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(ROOT / "fixtures" / family, tmp_path / "a model's folder")
    monkeypatch.chdir(tmp_path)
    has_code = "auto_map" in json.loads((model / "config.json").read_bytes())
    assert has_code == (family != "qwen3_moe")
    words = ["apply", f"{model.name}/scores.pt", "--model", model.name, "--keep", "8"]
    assert main([*words, "-o", "my result"]) == 0
    assert run_all(capsys.readouterr().out, "my result", has_code) == 2


def test_after_apply_in_a_models_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "Tiny MoE")
    monkeypatch.chdir(model)
    assert main(["apply", "scores.pt", "--ratio", "0.5"]) == 0
    assert run_all(capsys.readouterr().out, str(tmp_path / "Tiny MoE-REAP-50pct")) == 2


def test_after_apply_with_a_family_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = undeclared("qwen3_moe", tmp_path)
    toml = tmp_path / "my own.toml"
    shutil.copy(ROOT / "shardsurgeon" / "families" / "qwen3_moe.toml", toml)
    for number, family in enumerate(["auto", str(toml)]):
        out = str(tmp_path / f"out {number}")
        words = [str(model / "scores.pt"), "--model", str(model), "--keep", "8", "-o", out]
        assert main(["apply", *words, "--family", family]) == 0
        # Nothing is proven of a declaration that did not come with the program.
        assert run_all(capsys.readouterr().out, None) == 1


def test_after_apply_of_files_that_are_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "model")
    shutil.move(model / "README.md", tmp_path / "card.md")
    (model / "README.md").symlink_to(tmp_path / "card.md")
    out = str(tmp_path / "out")
    words = [str(model / "scores.pt"), "--model", str(model), "--keep", "8", "-o", out]
    assert main(["apply", *words, "--follow-links"]) == 0
    report = capsys.readouterr().out
    assert "--follow-links" in report
    assert run_all(report, out) == 2


def test_after_a_push(shell: Shell) -> None:
    model = str(ROOT / "fixtures" / "kimi_k25")
    words = ("apply", f"{model}/scores.pt", "--model", model, "--keep", "16")
    said = shell.here(*words, "-o", "a result", "--push-to-hub", "me/small").stdout
    assert [command[:3] for command in printed(said)][1:] == [["vllm", "serve", "me/small"]]
    said = shell.here("push", "a result", "me/other", "--revision", "v2").stdout
    serve = ["vllm", "serve", "me/other", "--revision", "v2", "--trust-remote-code"]
    assert printed(said) == [serve]
    card = shell.hub.read("me/small", "README.md").decode()
    assert "vllm serve me/small --trust-remote-code\n" in card


@pytest.mark.slow
def test_after_a_streamed_push(shell: Shell) -> None:
    model = str(ROOT / "fixtures" / "kimi_k25")
    words = ("apply", f"{model}/scores.pt", "--model", model, "--keep", "16")
    said = shell.here(*words, "--stream-push", "me/streamed").stdout
    assert printed(said) == [["vllm", "serve", "me/streamed", "--trust-remote-code"]]


@pytest.mark.torch
def test_after_calibrate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "my model")
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on a mat"}\n' * 4)
    for number, (folder, given) in enumerate([(tmp_path, [model.name]), (model, [])]):
        monkeypatch.chdir(folder)
        dataset = str(tmp_path / "texts.jsonl")
        out = str(tmp_path / f"my scores {number}.pt")
        assert main(["calibrate", *given, "--dataset", dataset, "--samples", "2", "-o", out]) == 0
        report = capsys.readouterr().out
        assert ("--model 'my model'" in report) == bool(given)
        assert run_all(report, None) == 2
        capsys.readouterr()
        shutil.rmtree(tmp_path / "my model-REAP-50pct")


def test_no_engine_is_named_where_only_bytes_are_proven() -> None:
    table = (ROOT / "shardsurgeon" / "families" / "README.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    proven = {row[1].strip(" `"): row[-2].strip() for row in rows if len(row) == 9 and row[-2]}
    for family in all_families():
        if not family.refusal:
            assert family.only_bytes == (proven[family.name] == "bytes"), family.name


def test_what_mlx_reads_is_not_served_by_vllm(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "model")
    model = open_model(folder, None)
    anatomy = read_anatomy(model)
    kept = {layer.index: 8 for layer in anatomy.layers}
    assert serving_of(model, anatomy, kept).by_vllm
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert not serving_of(open_model(folder, None), anatomy, kept).by_vllm
