"""A checkpoint of every quantization scheme, pruned by the real command: survivors decode alike.

Each side is decoded by the scheme's own library (see `decoding`), the pruned one under its own
config.json, and compared number by number; then every tensor is compared bit by bit.
"""

from __future__ import annotations

import json
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch

from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.byte_oracle import read_config
from tests.quantization.decoding import decoded

pytestmark = pytest.mark.oracle

BUILDERS = builders("schemes")
schemes = import_module("builders.schemes")
LAYOUT = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.\w+$",
    sliced=((r"mlp\.gate\.weight", 0),),
    counts=(("num_experts",),),
)
# How far a weight may be from the one that was quantized, relative to the whole matrix.
COARSE = {"int4", "nvfp4", "mxfp4", "modelopt_nvfp4", "awq", "gptq", "autoround"}


@pytest.fixture(scope="module", params=schemes.SCHEMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    scheme = request.param
    folder = tmp_path_factory.mktemp(scheme)
    return build_and_prune(scheme, BUILDERS[scheme], folder, "--keep", "5")


def test_survivors_decode_to_the_numbers_they_had(pair: Pair) -> None:
    before, after = decoded(pair.source, pair.name), decoded(pair.folder, pair.name)
    expected = {
        _name(layer, new, part): before[_name(layer, old, part)]
        for layer, retained in pair.retained.items()
        for new, old in enumerate(retained)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert after.keys() == expected.keys()
    assert [name for name in after if not torch.equal(after[name], expected[name])] == []


def test_the_decoder_gives_the_weights_that_were_quantized(pair: Pair) -> None:
    # Or equality of what it gives would say nothing.
    plain = schemes.plain().tensors
    most = 0.2 if any(pair.name.startswith(name) for name in COARSE) else 0.05
    for name, weight in decoded(pair.source, pair.name).items():
        original = plain[f"{name}.weight"].float()
        assert (weight - original).norm() < most * original.norm(), name


def test_every_tensor_is_the_sources_renumbered_or_sliced(pair: Pair) -> None:
    assert_tensors_follow(pair, LAYOUT, main_layers=schemes.LAYERS)


def test_the_config_changes_in_the_count_and_the_named_experts_alone(pair: Pair) -> None:
    expected = deepcopy(read_config(pair.source))
    expected["num_experts"] = 5
    section = expected["quantization_config"]
    if pair.name == "autoround":
        section["extra_config"] = _followed(section["extra_config"], pair.retained[0])
    assert _text(read_config(pair.folder)) == _text(expected)
    for name in schemes.SCHEMES[pair.name].side_files:
        content = json.loads((pair.folder / name).read_text())
        if name == "hf_quant_config.json":
            assert _text(content) == _text(json.loads((pair.source / name).read_text()))
        else:
            assert _text(content) == _text(section)


def test_the_index_counts_the_parameters_of_the_unquantized_model(pair: Pair) -> None:
    index = json.loads((pair.folder / "model.safetensors.index.json").read_text())
    whole = sum(tensor.numel() for tensor in schemes.plain().tensors.values())
    each = 3 * schemes.HIDDEN * schemes.INNER + schemes.HIDDEN
    removed = (schemes.EXPERTS - 5) * schemes.LAYERS * each
    assert index["metadata"]["total_parameters"] == whole - removed


def _name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}"


def _followed(overrides: dict[str, Any], retained: list[int]) -> dict[str, Any]:
    """The entries of layer 0's survivors under their new numbers; the others as they are."""
    stem = "model.layers.0.mlp.experts."
    found = {}
    for key, value in overrides.items():
        if not key.startswith(stem):
            found[key] = value
            continue
        expert, _, part = key.removeprefix(stem).partition(".")
        if int(expert) in retained:
            found[f"{stem}{retained.index(int(expert))}.{part}"] = value
    return found


def _text(value: object) -> str:
    """JSON text, so that the order of keys counts."""
    return json.dumps(value)
