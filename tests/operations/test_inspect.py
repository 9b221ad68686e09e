"""`inspect` on folders: what a model says of itself in files beside its config."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import ConfigError
from shardsurgeon.operations.reports import PrunedReport
from tests.support import tiny

FIXTURES = Path(__file__).parents[2] / "fixtures"
FIXTURE = FIXTURES / "qwen3_moe"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "model"))


def test_the_quantization_is_said_where_only_a_side_file_has_it(model: Path) -> None:
    assert shardsurgeon.inspect(str(model)).quantization is None
    content = {
        "producer": {"name": "modelopt", "version": "0.31.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
    }
    (model / "hf_quant_config.json").write_text(json.dumps(content))
    assert shardsurgeon.inspect(str(model)).quantization == "modelopt NVFP4"


def test_what_the_config_says_goes_before_a_side_file(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert shardsurgeon.inspect(str(model)).quantization == "fp8"


def narrowed(layer: int, *experts: int) -> tiny.Tensors:
    """The tiny model with some experts of a layer in half precision."""
    weights = tiny.tensors()
    for expert in experts:
        for part in ("up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
            weights[name] = weights[name].astype("f2")
    return weights


# Two matrices of 4 x 6 numbers, and an expert's rows of the router and its bias, all F32.
WIDE, NARROW = 2 * 24 * 4 + 6 * 4 + 4, 2 * 24 * 2 + 6 * 4 + 4


def saved(weights: tiny.Tensors, folder: Path) -> str:
    folder.mkdir()
    for name, content in tiny.files(tiny.config(), weights).items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_one_expert_over_the_layers_is_added_up_layer_by_layer(tmp_path: Path) -> None:
    report = shardsurgeon.inspect(saved(narrowed(1, *range(8)), tmp_path / "m"))
    assert (report.smallest_expert_size, report.expert_size) == (NARROW, WIDE)
    assert report.expert_size_over_layers == NARROW + 2 * WIDE
    assert report.smallest_expert_size_over_layers == NARROW + 2 * WIDE
    assert not any("differ in size" in note for note in report.notes)


def test_where_experts_of_a_layer_differ_sizes_are_said_to_be_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(narrowed(2, 3, 5), tmp_path / "m")
    report = shardsurgeon.inspect(model)
    assert report.expert_size_over_layers == 3 * WIDE
    assert report.smallest_expert_size_over_layers == 2 * WIDE + NARROW
    (note,) = (note for note in report.notes if "differ in size" in note)
    assert note.startswith("experts of layer 2 differ in size: the tensor data left is at most")
    # What stays of the wide ones is the most that can stay.
    assert report.sizes_at["0.5"] == report.total_size - 3 * 4 * WIDE + 2 * (WIDE - NARROW)
    assert main(["inspect", model]) == 0
    line = f"one expert    {NARROW} B to {WIDE} B in a layer, {2 * WIDE + NARROW} B to {3 * WIDE} B"
    assert line in capsys.readouterr().out


def test_a_broken_side_file_is_named(model: Path) -> None:
    (model / "hf_quant_config.json").write_text("{oops")
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json"):
        shardsurgeon.inspect(str(model))


@pytest.mark.parametrize(
    ("family", "experts", "chosen"),
    [("qwen3_moe", 16, 4), ("deepseek_v3", 24, 4), ("qwen3_5_moe", 16, 4)],
)
def test_active_parameters_are_those_of_the_chosen_experts_and_of_all_else_but_mtp(
    family: str, experts: int, chosen: int
) -> None:
    """Counted from the names and shapes that the safetensors library lists."""
    mtp = ("mtp.", "model.layers.3.") if family != "qwen3_moe" else ()
    expected = 0
    for path in (FIXTURES / family).glob("*.safetensors*"):
        if path.suffix != ".json":
            with safetensors.safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    count = math.prod(file.get_slice(name).get_shape())
                    if not name.startswith(mtp):
                        expected += count * chosen // experts if ".experts." in name else count
    report = shardsurgeon.inspect(FIXTURES / family)
    assert (report.num_experts, report.top_k) == (experts, chosen)
    assert report.active_parameters == expected
    assert report.total_parameters is not None and expected < report.total_parameters
    assert sum(report.dtypes.values()) == report.total_size


def test_a_prune_of_a_prune_is_told_with_the_first_model(tmp_path: Path) -> None:
    source = FIXTURE
    assert shardsurgeon.inspect(source).pruned is None
    half = shardsurgeon.plan(source, source / "scores.pt", ratio=0.5)
    shardsurgeon.apply(half, tmp_path / "half")
    made = shardsurgeon.inspect(tmp_path / "half").pruned
    assert made == PrunedReport("qwen3_moe", 16, "qwen3_moe", "ratio", 0.5, "saliency", 1)
    quarter = shardsurgeon.plan(tmp_path / "half", source / "scores.pt", keep=4)
    shardsurgeon.apply(quarter, tmp_path / "quarter")
    made = shardsurgeon.inspect(tmp_path / "quarter").pruned
    assert made == PrunedReport("qwen3_moe", 16, "half", "keep", 0.5, "saliency", 2)
