"""`--family`: a model of no declared family, read by a declaration of the user's or without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
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


def stacked(folder: Path, content: dict[str, object], **tensors: tuple[int, ...]) -> Path:
    """A model of two layers in the given names (`__` for a dot), [4, ...] of all experts."""
    folder.mkdir()
    made = {"model.embed_tokens.weight": np.ones((8, HIDDEN), np.float32)}
    for layer in range(2):
        for number, (name, shape) in enumerate(sorted(tensors.items())):
            values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1000 * number
            made[f"model.layers.{layer}.{name.replace('__', '.')}"] = values + layer
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    scores = {0: [4.5, 0.5, 1.25, 3.5], 1: [0.5, 4.5, 3.5, 1.25]}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


HIDDEN = 6
NOVEL = {"model_type": "novel_moe", "num_hidden_layers": 2}
COUNTED = {**NOVEL, "num_experts": 4, "num_experts_per_tok": 2}
RESAVED: dict[str, tuple[int, ...]] = {
    "mlp__experts__gate_up_proj": (4, 10, HIDDEN),
    "mlp__experts__down_proj": (4, HIDDEN, 5),
    "mlp__gate__weight": (4, HIDDEN),
}
STACKED: dict[str, dict[str, tuple[int, ...]]] = {
    "transformers": RESAVED,
    "biases of experts": {**RESAVED, "mlp__experts__gate_up_proj_bias": (4, 10)},
    "router bias among the experts": {**RESAVED, "mlp__experts__e_score_correction_bias": (4,)},
    "shared experts": {**RESAVED, "mlp__shared_experts__up_proj__weight": (5, HIDDEN)},
    "granite": {
        "block__input_linear__weight": (4, 10, HIDDEN),
        "block__output_linear__weight": (4, HIDDEN, 5),
        "block__router__layer__weight": (4, HIDDEN),
    },
    "mlx": {
        **{f"mlp__switch_mlp__{part}__weight": (4, 5, HIDDEN) for part in ("gate_proj", "up_proj")},
        "mlp__switch_mlp__down_proj__weight": (4, HIDDEN, 5),
        "mlp__gate__weight": (4, HIDDEN),
    },
    "mlx, quantized": {
        **{
            f"mlp__switch_mlp__{part}__{kind}": (4, 5, 2)
            for part in ("gate_proj", "up_proj")
            for kind in ("weight", "scales", "biases")
        },
        **{f"mlp__gate__{kind}": (4, 2) for kind in ("weight", "scales", "biases")},
    },
}


@pytest.mark.parametrize("kind", STACKED)
def test_auto_reads_experts_stacked_beside_a_router(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = stacked(tmp_path / "m", COUNTED, **STACKED[kind]), tmp_path / "out"
    given = [str(model / "scores.json"), "--model", str(model), "--keep", "2", "-o", str(out)]
    assert main(["apply", *given, "--family", "auto"]) == 0
    assert f"verify {model} {out} --family auto\n" in capsys.readouterr().out
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    kept = {"0": [0, 3], "1": [1, 2]}
    for name, values in before.items():
        cut = len(values) == 4
        rows = values[kept[name.split(".")[2]]] if cut else values
        assert np.array_equal(after[name], rows), name


def test_auto_reads_a_routers_bias_among_numbered_experts(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {
        "mlp__gate__weight": (4, HIDDEN),
        "mlp__experts__e_score_correction_bias": (4,),
        **{f"mlp__experts__{expert}__up_proj__weight": (5, HIDDEN) for expert in range(4)},
    }
    model, out = stacked(tmp_path / "m", COUNTED, **tensors), tmp_path / "out"
    given = [str(model / "scores.json"), "--model", str(model), "--keep", "2", "-o", str(out)]
    assert main(["apply", *given, "--family", "auto"]) == 0
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    block = "model.layers.1.mlp.experts"
    bias = f"{block}.e_score_correction_bias"
    assert np.array_equal(after[bias], before[bias][[1, 2]])
    last = f"{block}.1.up_proj.weight"
    assert np.array_equal(after[last], before[f"{block}.2.up_proj.weight"])


def test_auto_takes_two_places_of_the_count_that_agree_for_one(tmp_path: Path) -> None:
    text = {key: value for key, value in COUNTED.items() if key != "model_type"}
    content = {"model_type": "novel_ocr", "num_experts": 4, "language_config": text}
    model, out = stacked(tmp_path / "m", content, **RESAVED), tmp_path / "out"
    given = [str(model / "scores.json"), "--model", str(model), "--keep", "2", "-o", str(out)]
    assert main(["apply", *given, "--family", "auto"]) == 0
    written = json.loads((out / "config.json").read_text())
    assert written == {**content, "num_experts": 2, "language_config": {**text, "num_experts": 2}}


@pytest.mark.parametrize(
    ("content", "tensors", "says"),
    [
        ({**COUNTED, "text": {"num_experts": 8}}, RESAVED, "num_experts 4 and text.num_experts 8"),
        ({**NOVEL, "num_experts_held": 4}, RESAVED, "and says num_experts_held 4"),
        (COUNTED, {**RESAVED, "other__w": (4, 3, 2), "other__x": (4, 3)}, "no router is beside"),
        (COUNTED, {"mlp__gate__weight": (4, HIDDEN)}, "stacked tensors of 4 lie nowhere"),
        (COUNTED, {**RESAVED, "mlp__w__weight": (4, HIDDEN)}, "2 tensors could be the router"),
        (COUNTED, {**RESAVED, "mlp__experts__down_proj": (4, 4, 5)}, "4 in dimensions [0, 1]"),
    ],
)
def test_auto_says_what_it_could_not_read(
    content: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = stacked(tmp_path / "m", content, **tensors)
    assert main(["inspect", str(model), "--family", "auto"]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1
