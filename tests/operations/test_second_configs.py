"""A config beside config.json: changed as that is where it says the same, else named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.errors import ConfigError
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

FAMILY = "deepseek_v3"  # 24 experts, and an MTP layer


def model(folder: Path, **files: Any) -> Path:
    """A model with more files; each is the config with other settings, or what is given."""
    made = Path(shutil.copytree(fixture_folder(FAMILY), folder / "model"))
    config = json.loads((made / "config.json").read_text())
    for name, settings in files.items():
        path = made / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        content = settings if isinstance(settings, list) else {**config, **settings}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=2))
    return made


def prune(made: Path, out: Path, **how: Any) -> shardsurgeon.Pruning:
    plan = shardsurgeon.plan(made, scores_of(FAMILY), **{"ratio": 0.5, **how})
    shardsurgeon.apply(plan, out)
    return plan


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["config_vllm", "inference__config", "hf_config_original"])
def test_a_second_config_of_the_same_counts_is_changed_as_the_first(
    name: str, tmp_path: Path
) -> None:
    made = model(tmp_path, **{name: {"torch_dtype": "float8", "served_by": [1, 2]}})
    out = tmp_path / "out"
    plan = prune(made, out)
    file = f"{name.replace('__', '/')}.json"
    first, second, before = read(out / "config.json"), read(out / file), read(made / file)
    assert second["n_routed_experts"] == first["n_routed_experts"] == 12
    assert second == {**before, "n_routed_experts": 12}
    assert list(second) == list(before)
    assert not [note for note in plan.report.notes if file in note]
    assert shardsurgeon.verify(made, out).differences == ()
    for spoiled in (before, {**second, "served_by": [1]}, {**second, "n_routed_experts": 11}):
        (out / file).write_text(json.dumps(spoiled, indent=2))
        assert any(file in line for line in shardsurgeon.verify(made, out).differences)
    (out / file).unlink()
    assert f"{file}: is missing" in shardsurgeon.verify(made, out).differences


def test_its_mtp_count_and_its_lists_follow_too(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.{}.up_proj"
    ignored = {"quant_method": "fp8", "ignored_layers": [name.format(n) for n in range(24)]}
    made = model(tmp_path, config_vllm={"quantization_config": ignored})
    out = tmp_path / "out"
    prune(made, out, mtp="drop")
    second = read(out / "config_vllm.json")
    assert second["num_nextn_predict_layers"] == 0
    names = [name.format(n) for n in range(12)]
    assert second["quantization_config"]["ignored_layers"] == names
    assert shardsurgeon.verify(made, out).differences == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": None, "n_layers": 4},
        {"num_hidden_layers": 2},
        {"model_type": "qwen3_moe", "n_routed_experts": 24},
    ],
)
def test_a_config_of_something_else_is_copied_and_named(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    made = model(tmp_path, config_vllm=settings)
    out = tmp_path / "out"
    notes = prune(made, out).report.notes
    (note,) = (note for note in notes if "config_vllm.json" in note)
    assert "is copied as it is and says n_routed_experts 24, the number before" in note
    assert (out / "config_vllm.json").read_bytes() == (made / "config_vllm.json").read_bytes()
    assert shardsurgeon.verify(made, out).differences == ()


def test_a_config_beside_weights_of_its_own_stays_and_is_named(tmp_path: Path) -> None:
    made = model(tmp_path, draft__config={})
    shutil.copy(min(made.glob("*.safetensors")), made / "draft" / "model.safetensors")
    out = tmp_path / "out"
    notes = prune(made, out).report.notes
    assert any("draft/config.json is copied as it is" in note for note in notes)
    assert read(out / "draft" / "config.json") == read(made / "draft" / "config.json")
    assert shardsurgeon.verify(made, out).differences == ()


def test_a_count_in_it_that_no_rule_knows_is_refused_and_it_can_be_left_behind(
    tmp_path: Path,
) -> None:
    made = model(tmp_path, config_vllm={"n_experts_loaded": 24})
    with pytest.raises(ConfigError, match="n_experts_loaded is 24") as caught:
        prune(made, tmp_path / "out")
    assert caught.value.remedy == 'exclude="config_vllm.json" leaves it behind'
    prune(made, tmp_path / "out", exclude=("config_vllm.json",))
    assert not (tmp_path / "out" / "config_vllm.json").exists()


def test_a_config_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    made = model(tmp_path, config_vllm={})
    plan = shardsurgeon.plan(made, scores_of(FAMILY), ratio=0.5)
    (made / "config_vllm.json").write_text("{}")
    with pytest.raises(shardsurgeon.errors.SourceChangedError, match=r"config_vllm\.json"):
        shardsurgeon.apply(plan, tmp_path / "out")
