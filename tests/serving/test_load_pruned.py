"""What `load_pruned` makes of a view is what transformers makes of the folder with its shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import shardsurgeon
from shardsurgeon.errors import CheckpointError, ConfigError, UsageError
from shardsurgeon.serving import load_pruned
from tests.families.specimens import fixture, written
from tests.oracle.byte_oracle import same_bits
from tests.serving.test_open_view import digests
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated"),
]

# Experts one by one and stacked; biases, groups, tables of expert ids, wrappers that see; and every
# quantization that transformers reads on a processor with what is installed for these tests.
MODELS = [
    "qwen3_moe",
    "deepseek_v3",
    "kimi_linear",
    "qwen3_5_moe",
    "afmoe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v4",
    "ernie4_5_moe",
    "gemma4",
    "glm4v_moe",
    "gpt_oss_bf16",
    "granitemoehybrid",
    "internvl_hf",
    "jamba",
    "llama4",
    "longcat_flash_resaved",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "fp8_channel",
    "fp8_tensor",
    "int4_act_order",
    "int4_channel",
    "int4_shape_int32",
    "int4_symmetric",
    "int8_packed",
    "llama4_quantized",
    "mxfp4",
    "nvfp4",
]


class Pruned:
    """One plan, carried out both ways, and saved."""

    def __init__(self, source: Path, folder: Path, **selection: Any) -> None:
        scores = None if "plan_file" in selection else source / "scores.pt"
        made = shardsurgeon.plan(source, scores, **(selection or {"ratio": 0.5}))
        self.source, self.plan = source, folder / "plan.json"
        made.write_plan(self.plan)
        self.folder = Path(shardsurgeon.apply(made, folder / "folder", verify=False).out)
        self.view = Path(shardsurgeon.apply(made, folder / "view", view=True, verify=False).out)


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[[str], Pruned]:
    return lambda name: Pruned(written(fixture(name), tmp_path), tmp_path)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def settings(model: Any) -> list[dict[str, Any]]:
    """Its config and its sampling settings, without the place that they were read from."""
    config = model.config.to_dict()
    config.pop("_name_or_path")
    sampling = [model.generation_config.to_dict()] if model.can_generate() else []
    return [config, *sampling]


def assert_same(result: Any, expected: Any, *, skipping: set[str] | None = None) -> None:
    """Two models of one class with the same values; skipping: parameters that no file gave."""
    assert type(result) is type(expected) and not result.training
    assert settings(result) == settings(expected)
    own, others = result.state_dict(), expected.state_dict()
    assert own.keys() == others.keys()
    skipped = skipping or set()
    assert [n for n in own if n not in skipped and not same_bits(own[n], others[n])] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_views_model_is_that_of_the_folder(name: str, pruned: Callable[[str], Pruned]) -> None:
    both = pruned(name)
    result, said = load_pruned(both.view, output_loading_info=True)
    expected, told = type(result).from_pretrained(both.folder, output_loading_info=True)
    assert {k: sorted(map(str, v)) for k, v in said.items()} == {
        k: sorted(map(str, v)) for k, v in told.items()
    }
    assert type(result).__name__ in json.loads((both.view / "config.json").read_text())[
        "architectures"
    ] + ["DbrxForCausalLM"]
    assert not told["missing_keys"]
    assert_same(result, expected)
    assert result.name_or_path == result.config.name_or_path == str(both.view)
    assert torch.equal(logits(result), logits(expected))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe", "int4_symmetric"])
def test_a_model_and_its_plan_are_the_view(name: str, pruned: Callable[[str], Pruned]) -> None:
    both = pruned(name)
    result = load_pruned((both.source, both.plan))
    assert_same(result, load_pruned(both.view))
    assert torch.equal(logits(result), logits(type(result).from_pretrained(both.folder)))
    assert result.name_or_path == str(both.source)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": None},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"torch_dtype": "float16"},
        {"attn_implementation": "eager", "experts_implementation": "eager"},
        {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        {"key_mapping": {r"^model\.": "model."}},
        {"trust_remote_code": False, "use_safetensors": True, "token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe"])
def test_keywords_mean_what_they_mean_to_from_pretrained(
    name: str, kwargs: dict[str, Any], pruned: Callable[[str], Pruned]
) -> None:
    both = pruned(name)
    result = load_pruned(both.view, **kwargs)
    expected = getattr(transformers, type(result).__name__).from_pretrained(both.folder, **kwargs)
    assert result.dtype == expected.dtype
    assert_same(result, expected)
    assert torch.equal(logits(result), logits(expected))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForCausalLM])
def test_the_class_that_is_asked_for_is_loaded(
    name: str, model_class: Any, pruned: Callable[[str], Pruned]
) -> None:
    both = pruned(name)
    result = load_pruned(both.view, model_class=model_class)
    expected = model_class.from_pretrained(both.folder)
    assert_same(result, expected)
    assert_same(load_pruned(both.view, model_class=type(expected)), expected)


CONFIG_CODE = """
from transformers import Qwen3MoeConfig

class OwnConfig(Qwen3MoeConfig):
    model_type = "its_own"
"""
MODEL_CODE = """
from transformers import Qwen3MoeForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        made.logits = made.logits * 3
        return made
"""


@pytest.mark.parametrize("as_pair", [False, True])
def test_a_model_with_code_of_its_own_runs_it_where_it_is_trusted(
    as_pair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "code")
    source = tmp_path / "model"
    shutil.copytree(fixture_folder("qwen3_moe"), source)
    config = json.loads((source / "config.json").read_text())
    code = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config |= {"auto_map": code, "architectures": ["OwnForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "configuration_own.py").write_text(CONFIG_CODE)
    (source / "modeling_own.py").write_text(MODEL_CODE)
    both = Pruned(source, tmp_path)
    place: Any = (both.source, both.plan) if as_pair else both.view
    plain = load_pruned(place, trust_remote_code=False)
    own = load_pruned(place, trust_remote_code=True)
    assert type(plain).__name__ == "Qwen3MoeForCausalLM"
    assert type(own).__name__ == "OwnForCausalLM" and type(own.config).__name__ == "OwnConfig"
    expected = AutoModelForCausalLM.from_pretrained(both.folder, trust_remote_code=True)
    assert torch.equal(logits(own), logits(expected))
    assert torch.equal(logits(own), logits(plain) * 3)


def test_without_sampling_settings_in_a_file_they_are_those_of_the_folder_too(
    tmp_path: Path,
) -> None:
    source = tmp_path / "model"
    shutil.copytree(fixture_folder("qwen3_moe"), source)
    (source / "generation_config.json").unlink()
    both = Pruned(source, tmp_path)
    assert_same(load_pruned(both.view), AutoModelForCausalLM.from_pretrained(both.folder))
    given = transformers.GenerationConfig(temperature=0.25, do_sample=True)
    assert load_pruned(both.view, generation_config=given).generation_config.temperature == 0.25


def test_a_config_without_a_dtype_takes_that_of_the_first_shard(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(fixture_folder("qwen3_5_moe"), source)
    text = (source / "config.json").read_text()
    assert "dtype" not in json.loads(text) and "F32" in str(first_dtypes(source))
    both = Pruned(source, tmp_path)
    result = load_pruned(both.view)
    assert result.dtype == type(result).from_pretrained(both.folder).dtype == torch.bfloat16


def first_dtypes(folder: Path) -> set[str]:
    raw = sorted(folder.glob("*.safetensors"))[0].read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_nothing_is_written_where_a_model_is_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Pruned(written(fixture("qwen3_moe"), tmp_path), tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.chdir(scratch)
    before = digests(tmp_path)
    for model in (both.view, (both.source, both.plan)):
        loaded = load_pruned(model)
        for parameter in loaded.parameters():
            parameter.data.zero_()
    assert digests(tmp_path) == before and list(scratch.iterdir()) == []


def test_it_generates_and_is_tokenized_as_the_folder(pruned: Callable[[str], Pruned]) -> None:
    both = pruned("qwen3_moe")
    tokens = [
        AutoTokenizer.from_pretrained(place)("a view of", return_tensors="pt")
        for place in (both.view, both.folder)
    ]
    assert torch.equal(tokens[0].input_ids, tokens[1].input_ids)
    models = load_pruned(both.view), AutoModelForCausalLM.from_pretrained(both.folder)
    made = [m.generate(**tokens[0], max_new_tokens=6, do_sample=False) for m in models]
    assert torch.equal(*made)


def test_what_is_saved_of_it_is_what_is_saved_of_the_folder(
    tmp_path: Path, pruned: Callable[[str], Pruned]
) -> None:
    both = pruned("qwen3_moe")
    load_pruned(both.view).save_pretrained(tmp_path / "left")
    AutoModelForCausalLM.from_pretrained(both.folder).save_pretrained(tmp_path / "right")
    left, right = (
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()}
        for side in ("left", "right")
    )
    assert left == right and "model.safetensors" in left


def test_a_repository_of_the_hub_is_read_by_ranges(online: LocalHub, tmp_path: Path) -> None:
    online.add_model("org/Tiny", fixture_folder("qwen3_moe"))
    near = Pruned(fixture_folder("qwen3_moe"), tmp_path)
    plan = shardsurgeon.plan("org/Tiny", plan_file=near.plan)
    view = shardsurgeon.apply(plan, tmp_path / "far", view=True).out
    expected = AutoModelForCausalLM.from_pretrained(near.folder)
    online.reset_counts()
    assert_same(load_pruned(view), expected)
    whole = sum(path.stat().st_size for path in near.source.glob("*.safetensors"))
    assert online.sent("safetensors") < whole
    result = load_pruned(("org/Tiny", near.plan))
    assert_same(result, expected)
    assert result.name_or_path == "org/Tiny"


def test_what_is_no_view_is_refused(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    both = pruned("qwen3_moe")
    with pytest.raises(CheckpointError, match="no view; load it with transformers'"):
        load_pruned(both.folder)
    for name in ("state_dict", "config", "gguf_file", "subfolder"):
        with pytest.raises(UsageError, match=f"{name}: .*leave it out"):
            load_pruned(both.view, **{name: None})
    (both.view / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ConfigError, match="does not know model type 'no such'"):
        load_pruned(both.view)
    (both.view / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        load_pruned(both.view)


def test_a_class_that_is_not_the_models_is_refused(pruned: Callable[[str], Pruned]) -> None:
    other = transformers.AutoModelForSpeechSeq2Seq
    with pytest.raises(ConfigError, match="no model for AutoModelForSpeechSeq2Seq"):
        load_pruned(pruned("qwen3_moe").view, model_class=other)
