"""The dimension that a cut tensor lost experts in, and how many parameters there are, by shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shardsurgeon.errors import VerificationError
from shardsurgeon.operations import api
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.verification.parameter_count import parameter_bounds
from shardsurgeon.verification.shapes import cut_problem
from shardsurgeon.verification.verify import verify_checkpoint

EXPERTS, WIDTH, HIDDEN = 8, 8, 6

FAMILY = """
facts = "made up"
model_types = ["novel_moe"]
architectures = ["NovelForCausalLM"]
[config]
num_experts = ["num_experts"]
top_k = ["num_experts_per_tok"]
[tensors]
layers = ["model.layers.{{layer}}"]
blocks = ["mlp"]
stacked = ["mlp.experts.up_proj", {{ name = "mlp.experts.up_proj_bias", axis = {axis} }}]
routers = ["mlp.gate.weight", "mlp.gate.bias"]
"""


def model(folder: Path, axis: int) -> tuple[Path, Path]:
    """A model with a stacked weight and a bias that is as wide as there are experts, and the
    declaration of its family. Gives the folder and the declaration."""
    numbers = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": numbers.random((16, HIDDEN), np.float32)}
    for layer in (0, 1):
        block = f"model.layers.{layer}.mlp"
        tensors |= {
            f"{block}.gate.weight": numbers.random((EXPERTS, HIDDEN), np.float32),
            f"{block}.gate.bias": numbers.random(EXPERTS, np.float32),
            f"{block}.experts.up_proj": numbers.random((EXPERTS, WIDTH, HIDDEN), np.float32),
            f"{block}.experts.up_proj_bias": numbers.random((EXPERTS, WIDTH), np.float32),
        }
    source = folder / "model"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "novel_moe", "num_hidden_layers": 2, "num_experts": EXPERTS}
    (source / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    family = folder / "novel.toml"
    family.write_text(FAMILY.format(axis=axis))
    scores = {layer: [n + 0.5 for n in range(EXPERTS)] for layer in (0, 1)}
    (folder / "scores.json").write_text(json.dumps(scores))
    return source, family


def test_a_declaration_that_cuts_a_bias_along_the_right_dimension_holds(tmp_path: Path) -> None:
    source, family = model(tmp_path, axis=0)
    plan = api.plan(source, tmp_path / "scores.json", keep=4, family=family, out=tmp_path / "out")
    api.apply(plan)
    report = api.verify(source, tmp_path / "out", family=family)
    assert report.verdict == "identical"


def test_a_declaration_that_cuts_a_bias_along_another_dimension_does_not_hold(
    tmp_path: Path,
) -> None:
    source, family = model(tmp_path, axis=1)
    plan = api.plan(source, tmp_path / "scores.json", keep=4, family=family, out=tmp_path / "out")
    expected = r"up_proj_bias: \[8, 8\] became \[8, 4\]; its experts are counted in dimension 0"
    with pytest.raises(VerificationError, match=expected):
        api.apply(plan)
    api.apply(plan, verify=False)
    bias = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.0.mlp.experts.up_proj_bias"
    ]
    assert bias.shape == (8, 4)
    found = api.verify(source, tmp_path / "out", family=family).differences
    assert len(found) == 2 and all("up_proj_bias: [8, 8] became [8, 4]" in line for line in found)


Case = tuple[tuple[int, ...], tuple[int, ...], int, int]
RIGHT: dict[str, Case] = {
    "a router's rows": ((8, 6), (4, 6), 8, 4),
    "a bias": ((8,), (4,), 8, 4),
    "a correction bias in a row": ((1, 8), (1, 4), 8, 4),
    "a router with identity rows": ((10, 6), (6, 6), 10, 6),
    "stacked": ((8, 12, 6), (4, 12, 6), 8, 4),
    "stacked behind the inputs": ((16, 8, 6), (16, 4, 6), 8, 4),
    "square": ((8, 8), (4, 8), 8, 4),
    "a cube": ((8, 8, 8), (4, 8, 8), 8, 4),
    "flat rows": ((32, 6), (16, 6), 8, 4),
    "flat rows, as many columns as experts": ((32, 8), (16, 8), 8, 4),
    "nothing cut": ((8, 6), (8, 6), 8, 8),
}
WRONG: dict[str, Case] = {
    "a square along the second": ((8, 8), (8, 4), 8, 4),
    "a cube along the last": ((8, 8, 8), (8, 8, 4), 8, 4),
    "columns of a bias": ((8, 16), (8, 8), 8, 4),
    "columns that are a multiple": ((8, 6, 64), (8, 6, 32), 8, 4),
    "flat rows in the second dimension": ((16, 32), (16, 16), 8, 4),
    "two dimensions": ((8, 8), (4, 4), 8, 4),
    "too many left": ((8, 6), (5, 6), 8, 4),
    "too few left": ((8, 6), (3, 6), 8, 4),
    "nothing cut": ((8, 6), (8, 6), 8, 4),
    "a dimension less": ((8, 6), (4,), 8, 4),
    "a dimension more": ((8, 6), (4, 6, 1), 8, 4),
    "another dimension": ((8, 6), (4, 5), 8, 4),
    "no such dimension": ((7, 6), (4, 6), 8, 4),
    "cut where nothing was to be": ((8, 6), (4, 6), 8, 8),
    "flat rows that are not whole": ((32, 6), (15, 6), 8, 4),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_lost_rows_of_experts_is_right(case: str) -> None:
    assert cut_problem(*RIGHT[case]) is None


@pytest.mark.parametrize("case", WRONG)
def test_what_lost_anything_else_is_told_with_both_shapes(case: str) -> None:
    problem = cut_problem(*WRONG[case])
    assert problem is not None and str(list(WRONG[case][0])) in problem


def test_others_of_the_layer_decide_between_two_dimensions() -> None:
    assert cut_problem((8, 8, 6), (8, 4, 6), 8, 4, [1]) is None
    assert cut_problem((8, 8, 6), (4, 8, 6), 8, 4, [1]) is not None
    assert cut_problem((8, 8, 6), (4, 8, 6), 8, 4, [2]) is None


# Parameters


def record(name: str, dtype: str, *shape: int) -> TensorRecord:
    return TensorRecord(name, dtype, shape, 0, 0)  # how many bytes it has nobody asks


HELD: dict[str, tuple[list[TensorRecord], int]] = {
    "floats": ([record("a.weight", "BF16", 8, 6), record("norm.weight", "F32", 6)], 54),
    "MLX words of 4 bits": (
        [record("a.weight", "U32", 8, 16), record("a.scales", "BF16", 8, 2)],
        8 * 128,
    ),
    "MLX words of 8 bits": ([record("a.weight", "U32", 8, 16)], 8 * 64),
    "packed words of 4 bits": (
        [record("a.weight_packed", "I32", 8, 16), record("a.weight_scale", "BF16", 8, 4)],
        8 * 128,
    ),
    "GPTQ's words of 3 bits": (
        [record("a.qweight", "I32", 12, 8), record("a.g_idx", "I32", 128)],
        128 * 8,
    ),
    "FP8": ([record("a.weight", "F8_E4M3", 8, 6), record("a.weight_scale_inv", "F32", 1, 1)], 48),
    "FP4 pairs": ([record("a.weight", "U8", 8, 6), record("a.weight_scale", "F8_E4M3", 8, 1)], 96),
    "tables of ids": ([record("tid2eid", "I64", 100, 6), record("a.weight", "F16", 2)], 2),
}


@pytest.mark.parametrize("case", HELD)
def test_the_weights_are_within_the_bounds_and_the_words_are_not(case: str) -> None:
    tensors, weights = HELD[case]
    least, most = parameter_bounds([TensorTable.of(tensors)])
    assert least <= weights <= most
    words = [t for t in tensors if t.dtype in ("U32", "I32") and len(t.shape) > 1]
    stored = sum(int(np.prod(t.shape)) for t in words)
    assert not words or not least <= stored <= most


def _packed(index: dict) -> int:
    """The number of words."""
    total: int = index["metadata"]["total_parameters"]
    return total // 8


@pytest.mark.parametrize("change", [_packed, lambda index: 8 * index["metadata"]["total_size"]])
def test_an_index_that_counts_words_is_found_by_the_bytes_alone(
    tmp_path: Path, change: Callable[[dict], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the count that both sides share is wrong."""
    kimi = Path(__file__).parents[2] / "fixtures" / "kimi_k25"
    api.apply(api.plan(kimi, kimi / "scores.pt", ratio=0.5), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = index["metadata"]["total_parameters"] = change(index)
    path.write_text(json.dumps(index))
    monkeypatch.setattr("shardsurgeon.verification.files.count_parameters", lambda *_: wrong)
    found = verify_checkpoint(kimi, tmp_path / "out", sample=1).differences
    assert any(f"total_parameters is {wrong:,}, its tensors hold" in line for line in found)
