"""Quantized experts stacked in one tensor per projection, pruned by the real command.

Packed whole by compressed-tensors, whose `weight_shape` holds the expert count; ModelOpt's NVFP4
and FP8 with scales per expert and for all experts; gpt-oss's MXFP4 blocks. Decoded as in
`decoding`: by compressed-tensors and transformers, FP8 by the product with its scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.families.pruned_pair import Pair, build_and_prune, builders
from tests.oracle.byte_oracle import read_config, read_tensors, same_bits
from tests.quantization.decoding import modelopt_nvfp4

pytestmark = pytest.mark.oracle

Tensors: TypeAlias = dict[str, torch.Tensor]
Config: TypeAlias = Mapping[str, Any]

BUILDERS = builders("schemes") | builders("stacked_experts")
schemes = import_module("builders.schemes")
LAYER = re.compile(r"((?:language_model\.)?model\.(?:language_model\.)?|mtp\.)layers\.(\d+)\.")
QWEN = r"mlp\.(gate\.weight|experts\.\w+\.weight_(packed|scale|zero_point))$"
# What has an expert axis, always the first.
SLICED = {
    "stacked_int4_symmetric": QWEN,
    "stacked_int4_asymmetric": QWEN,
    # Of weight_scale_2, up_proj has one for all experts and down_proj a scalar.
    "stacked_nvfp4": (
        r"moe\.(gate\.weight|router_bias|\w+_proj\.weight(_scale)?|gate_proj\.weight_scale_2)$"
    ),
    "gpt_oss": r"mlp\.(router\.(weight|bias)|experts\.\w+_proj_(blocks|scales|bias))$",
    "llama4_fp8": r"feed_forward\.(router\.weight|experts\.\w+_proj(_weight_scale)?)$",
}


@pytest.fixture(scope="module", params=SLICED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name), "--keep", "5")


def test_survivors_decode_to_the_numbers_they_had(pair: Pair) -> None:
    decode = DECODERS[pair.name]
    before = decode(read_tensors(pair.source), read_config(pair.source))
    after = decode(read_tensors(pair.folder), read_config(pair.folder))
    assert after.keys() == before.keys()
    assert after
    for name, whole in after.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert torch.equal(whole, before[name][pair.retained[layer]]), name


def test_every_tensor_is_the_sources_sliced_or_as_it_was(pair: Pair) -> None:
    result, expected = read_tensors(pair.folder), _expected(pair)
    assert result.keys() == expected.keys()
    assert [name for name in expected if not same_bits(result[name], expected[name])] == []


def _expected(pair: Pair) -> Tensors:
    config = read_config(pair.source)
    main_layers = config.get("text_config", config)["num_hidden_layers"]
    expected = {}
    for name, tensor in read_tensors(pair.source).items():
        place = LAYER.match(name)
        layer = int(place[2]) + main_layers * (place[1] == "mtp.") if place else None
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if layer not in pair.retained:
            expected[name] = tensor
        elif expert:
            keep = pair.retained[layer]
            if int(expert[1]) in keep:
                begin, end = expert.span(1)
                expected[f"{name[:begin]}{keep.index(int(expert[1]))}{name[end:]}"] = tensor
        elif name.endswith("weight_shape"):
            # The one tensor whose values change: E of [E, out, in].
            assert tensor[0] == 16
            expected[name] = torch.tensor([5, *tensor[1:]], dtype=tensor.dtype)
        elif re.search(SLICED[pair.name], name):
            expected[name] = tensor[pair.retained[layer]]
        else:
            expected[name] = tensor
    return expected


def _int4(tensors: Tensors, config: Config) -> Tensors:
    group = config["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("packed")
            keys = [key for key in tensors if key.startswith(stem)]
            parts = {key.rpartition(".")[2]: tensors[key] for key in keys}
            found[name] = compressor.decompress(parts, scheme)["weight"]
    return found


def _nvfp4(tensors: Tensors, config: Config) -> Tensors:
    found = {}
    for name, stacked in tensors.items():
        if ".moe." not in name or not name.endswith("_proj.weight"):
            continue
        second = tensors[f"{name}_scale_2"].expand(len(stacked))
        parts = {}
        for expert, weight in enumerate(stacked):
            stem = f"experts.{expert}.proj"
            parts[f"{stem}.weight"] = weight
            parts[f"{stem}.weight_scale"] = tensors[f"{name}_scale"][expert]
            parts[f"{stem}.weight_scale_2"] = second[expert]
        found[name] = torch.stack(list(modelopt_nvfp4(parts).values()))
    return found


def _mxfp4(tensors: Tensors, config: Config) -> Tensors:
    return {
        name: convert_moe_packed_tensors(
            blocks, tensors[name.replace("_blocks", "_scales")], dtype=torch.float32
        )
        for name, blocks in tensors.items()
        if name.endswith("_blocks")
    }


def _fp8(tensors: Tensors, config: Config) -> Tensors:
    return {
        name: tensors[name].float() * tensors[f"{name}_weight_scale"]
        for name in tensors
        if name.endswith("_proj") and ".experts." in name
    }


DECODERS: dict[str, Callable[[Tensors, Config], Tensors]] = {
    "stacked_int4_symmetric": _int4,
    "stacked_int4_asymmetric": _int4,
    "stacked_nvfp4": _nvfp4,
    "gpt_oss": _mxfp4,
    "llama4_fp8": _fp8,
}


@pytest.mark.parametrize("name", schemes.STACKED)
def test_the_decoder_gives_the_weights_that_were_quantized(name: str) -> None:
    built = BUILDERS[name]()
    plain = schemes.PLAIN[name]().tensors
    for key, weight in DECODERS[name](dict(built.tensors), built.config).items():
        original = plain[key.removesuffix(".weight_packed")].float()
        assert (weight - original).norm() < 0.2 * original.norm(), key
