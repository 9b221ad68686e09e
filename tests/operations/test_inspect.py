"""`inspect` on folders: what a model says of itself in files beside its config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.errors import ConfigError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"


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


def test_a_broken_side_file_is_named(model: Path) -> None:
    (model / "hf_quant_config.json").write_text("{oops")
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json"):
        shardsurgeon.inspect(str(model))
