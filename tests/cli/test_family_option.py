"""`--family`: a model of no declared family, read by a declaration of the user's or without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT

FAMILIES = ROOT / "shardsurgeon" / "families"


def undeclared(fixture: str, tmp_path: Path) -> Path:
    """A fixture under a model type that no family declares."""
    model = Path(shutil.copytree(ROOT / "fixtures" / fixture, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "novel_moe", "architectures": ["NovelForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config, indent=2))
    return model


def apply(model: Path, out: Path, *words: str) -> int:
    given = [str(model / "scores.pt"), "--model", str(model), "--ratio", "0.5", "-o", str(out)]
    return main(["apply", *given, *words])


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("fixture", ["qwen3_moe", "kimi_linear", "kimi_k25", "deepseek_v3"])
def test_auto_prunes_what_leaves_no_doubt_as_the_declared_family_does(
    fixture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = tmp_path / "declared"
    assert apply(ROOT / "fixtures" / fixture, declared) == 0
    model = undeclared(fixture, tmp_path)
    capsys.readouterr()
    assert apply(model, tmp_path / "auto", "--family", "auto") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no family is declared for this model" in said
    assert "assumed: experts" in said
    assert weights(tmp_path / "auto") == weights(declared)
    assert main(["verify", str(model), str(tmp_path / "auto"), "--family", "auto"]) == 0


def test_without_the_option_an_undeclared_model_is_refused_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(undeclared("qwen3_moe", tmp_path), tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert "'novel_moe' is not supported" in line and "--family auto" in line


def test_a_declaration_of_the_users_own_is_used(tmp_path: Path) -> None:
    model = undeclared("kimi_linear", tmp_path)
    own = tmp_path / "novel.toml"
    text = (FAMILIES / "kimi_linear.toml").read_text().replace("kimi_linear", "novel_moe")
    own.write_text(text)
    assert apply(model, tmp_path / "own", "--family", str(own)) == 0
    assert apply(ROOT / "fixtures" / "kimi_linear", tmp_path / "declared") == 0
    assert weights(tmp_path / "own") == weights(tmp_path / "declared")


def test_a_doubt_refuses_and_prints_the_skeleton_to_fill_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = undeclared("qwen3_moe", tmp_path)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"]["model.layers.0.mlp.gate.weight"]
    held = _readable(shard)
    held["model.layers.0.mlp.second_gate.weight"] = held["model.layers.0.mlp.gate.weight"].copy()
    save_file(held, shard)
    index["weight_map"]["model.layers.0.mlp.second_gate.weight"] = shard.name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert apply(model, tmp_path / "out", "--family", "auto") == 2
    captured = capsys.readouterr()
    assert "second_gate" in captured.err and captured.err.count("\n") == 1
    assert 'routers = ["mlp.gate.weight"' in captured.out
    assert "[tensors]" in captured.out


def _readable(shard: Path) -> dict:
    """BF16 as the integers that numpy has: only names and shapes matter here."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b'"BF16"', b'"U16" ')
    plain = shard.with_suffix(".plain")
    plain.write_bytes(data[:8] + text + data[8 + length :])
    found = load_file(plain)
    plain.unlink()
    return found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experts = [", "not TOML"),
        ('[config]\nexperts = ["x"]', "unknown entry 'experts'"),
        ("", "is missing"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused_in_one_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text(text)
    model = undeclared("qwen3_moe", tmp_path)
    assert apply(model, tmp_path / "out", "--family", str(own)) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1
