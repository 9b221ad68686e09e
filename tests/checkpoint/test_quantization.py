"""Quantized tensors as weights: each scheme's shapes worked out by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shardsurgeon.checkpoint.quantization import Weights, read_weights
from shardsurgeon.storage.formats.tensor_table import TensorRecord

INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group"}
W = "up_proj.weight"
STACKED = "experts.down_proj"

Tensors = dict[str, tuple[str, list[int]]]


def packed(weights: dict[str, Any]) -> dict[str, Any]:
    group = {"group_0": {"weights": weights, "input_activations": {"group_size": 7}}}
    return {"text_config": {"quantization_config": {"config_groups": group}}}


def read(tensors: Tensors, config: dict[str, Any]) -> Weights:
    records = [TensorRecord(n, dtype, tuple(shape), 0, 0) for n, (dtype, shape) in tensors.items()]
    return read_weights(records, config)


# A weight [48, 64], or eight of them stacked, in every scheme: config and tensors.
SCHEMES: dict[str, tuple[dict[str, Any], Tensors, str, list[int]]] = {
    "plain": ({}, {W: ("BF16", [48, 64])}, W, [48, 64]),
    "int4": (
        packed(INT4),
        {
            f"{W}_packed": ("I32", [48, 8]),
            f"{W}_scale": ("BF16", [48, 2]),
            f"{W}_zero_point": ("I32", [6, 2]),
            f"{W}_g_idx": ("I32", [64]),
            f"{W}_shape": ("I64", [2]),
        },
        W,
        [48, 64],
    ),
    "int4, one scale a row": (
        packed({"num_bits": 4, "strategy": "channel"}),
        {f"{W}_packed": ("I32", [48, 8]), f"{W}_scale": ("BF16", [48, 1])},
        W,
        [48, 64],
    ),
    "int4, a last word not full": (
        packed({"num_bits": 4, "group_size": 12}),
        {f"{W}_packed": ("I32", [48, 5]), f"{W}_scale": ("BF16", [48, 3])},
        W,
        [48, 36],
    ),
    "int8 in words": (
        packed({"num_bits": 8, "group_size": 32}),
        {f"{W}_packed": ("I32", [48, 16]), f"{W}_scale": ("BF16", [48, 2])},
        W,
        [48, 64],
    ),
    "int8": (
        packed({"num_bits": 8}),
        {W: ("I8", [48, 64]), f"{W}_scale": ("F32", [48, 1])},
        W,
        [48, 64],
    ),
    "fp8, static": (
        packed({"num_bits": 8}),
        {
            W: ("F8_E4M3", [48, 64]),
            f"{W}_scale": ("F32", [1]),
            "up_proj.input_scale": ("F32", [1]),
        },
        W,
        [48, 64],
    ),
    "fp8 blocks": (
        {"quantization_config": {"weight_block_size": [32, 48]}},
        {W: ("F8_E4M3", [48, 64]), f"{W}_scale_inv": ("F32", [2, 2])},
        W,
        [48, 64],
    ),
    "fp8 blocks of 128": (
        {"quantization_config": {"quant_method": "fp8"}},
        {W: ("F8_E4M3", [144, 256]), "up_proj.scale": ("F8_E8M0", [2, 2])},
        W,
        [144, 256],
    ),
    "nvfp4": (
        packed({"num_bits": 4, "group_size": 16, "type": "float"}),
        {
            f"{W}_packed": ("U8", [48, 32]),
            f"{W}_scale": ("F8_E4M3", [48, 4]),
            f"{W}_global_scale": ("F32", [1]),
            "up_proj.input_global_scale": ("F32", [1]),
        },
        W,
        [48, 64],
    ),
    "nvfp4 of ModelOpt": (
        {"quantization_config": {"quant_algo": "NVFP4"}},
        {
            W: ("U8", [48, 32]),
            f"{W}_scale": ("F8_E4M3", [48, 4]),
            f"{W}_scale_2": ("F32", []),
            "up_proj.input_scale": ("F32", []),
        },
        W,
        [48, 64],
    ),
    "mxfp4": (
        {},
        {f"{W}_packed": ("U8", [48, 32]), f"{W}_scale": ("U8", [48, 2])},
        W,
        [48, 64],
    ),
    "mxfp6": (
        {},
        {f"{W}_packed": ("U8", [48, 48]), f"{W}_scale": ("U8", [48, 2])},
        W,
        [48, 64],
    ),
    "mxfp8": ({}, {W: ("F8_E4M3", [48, 64]), f"{W}_scale": ("U8", [48, 2])}, W, [48, 64]),
    "fp4 of DeepSeek-V4": (
        {},
        {W: ("I8", [48, 32]), "up_proj.scale": ("F8_E8M0", [48, 2])},
        W,
        [48, 64],
    ),
    "awq": (
        {"quantization_config": {"bits": 4, "group_size": 32}},
        {
            "up_proj.qweight": ("I32", [64, 6]),
            "up_proj.qzeros": ("I32", [2, 6]),
            "up_proj.scales": ("F16", [2, 48]),
        },
        W,
        [48, 64],
    ),
    "gptq": (
        {"quantization_config": {"bits": 4, "group_size": 32}},
        {
            "up_proj.qweight": ("I32", [8, 48]),
            "up_proj.qzeros": ("I32", [2, 6]),
            "up_proj.scales": ("F16", [2, 48]),
            "up_proj.g_idx": ("I32", [64]),
        },
        W,
        [48, 64],
    ),
    "gptq without order": (
        {"quantization_config": {"bits": 8, "group_size": -1}},
        {
            "up_proj.qweight": ("I32", [16, 48]),
            "up_proj.qzeros": ("I32", [1, 12]),
            "up_proj.scales": ("F16", [1, 48]),
        },
        W,
        [48, 64],
    ),
    "stacked int4": (
        packed(INT4),
        {
            f"{STACKED}.weight_packed": ("I32", [8, 48, 8]),
            f"{STACKED}.weight_scale": ("BF16", [8, 48, 2]),
            f"{STACKED}.weight_shape": ("I64", [3]),
        },
        f"{STACKED}.weight",
        [8, 48, 64],
    ),
    "stacked fp8, input by output": (
        {},
        {
            STACKED: ("F8_E4M3", [8, 64, 48]),
            f"{STACKED}_weight_scale": ("F32", [8, 1, 48]),
            f"{STACKED}_input_scale": ("F32", []),
        },
        STACKED,
        [8, 64, 48],
    ),
    "stacked fp8 blocks": (
        {},
        {STACKED: ("F8_E4M3", [8, 144, 256]), f"{STACKED}_scale_inv": ("F32", [8, 2, 2])},
        STACKED,
        [8, 144, 256],
    ),
    "mxfp4 of gpt-oss": (
        {},
        {
            f"{STACKED}_blocks": ("U8", [8, 48, 2, 16]),
            f"{STACKED}_scales": ("U8", [8, 48, 2]),
        },
        STACKED,
        [8, 64, 48],
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_told_from_how_it_is_stored(scheme: str) -> None:
    config, tensors, name, shape = SCHEMES[scheme]
    assert read(tensors, config) == Weights({name: tuple(shape)}, {})


@pytest.mark.parametrize(
    ("scheme", "name", "shape", "problem"),
    [
        ("int4", f"{W}_scale", [48, 3], "shape [48, 3] does not fit a weight [48, 64]"),
        ("int4", f"{W}_zero_point", [7, 2], "shape [7, 2] does not fit a weight [48, 64]"),
        ("int4", f"{W}_g_idx", [48], "shape [48] does not fit a weight [48, 64], expected [64]"),
        ("int8", f"{W}_scale", [47, 1], "shape [47, 1] does not fit a weight [48, 64]"),
        ("fp8 blocks", f"{W}_scale_inv", [2, 1], "shape [2, 1] does not fit a weight [48, 64]"),
        ("nvfp4", f"{W}_global_scale", [2], "shape [2] does not fit a weight [48, 64]"),
        ("awq", "up_proj.scales", [3, 48], "shape [3, 48] does not fit a weight [48, 64]"),
        (
            "gptq",
            "up_proj.qzeros",
            [2, 5],
            "shape [2, 5] does not fit a weight [48, 64], expected [2, 6]",
        ),
        (
            "stacked int4",
            f"{STACKED}.weight_scale",
            [7, 48, 2],
            "shape [7, 48, 2] does not fit a weight [8, 48, 64]",
        ),
        (
            "stacked fp8, input by output",
            f"{STACKED}_weight_scale",
            [7, 1, 48],
            "shape [7, 1, 48] does not fit a weight [8, 64, 48]",
        ),
        (
            "mxfp4 of gpt-oss",
            f"{STACKED}_scales",
            [7, 48, 2],
            "shape [7, 48, 2] does not fit a weight [8, 64, 48], expected [8, 48, 2]",
        ),
    ],
)
def test_a_companion_of_another_size_is_named(
    scheme: str, name: str, shape: list[int], problem: str
) -> None:
    config, tensors, weight, _ = SCHEMES[scheme]
    found = read({**tensors, name: (tensors[name][0], shape)}, config)
    assert found.problems[name] == problem
    assert list(found.shapes) == [weight]


@pytest.mark.parametrize(
    ("scheme", "scale"),
    [
        ("int4", f"{W}_scale"),
        ("fp8 blocks", f"{W}_scale_inv"),
        ("nvfp4 of ModelOpt", f"{W}_scale"),
        ("awq", "up_proj.scales"),
        ("mxfp4 of gpt-oss", f"{STACKED}_scales"),
    ],
)
def test_a_weight_without_its_scale_is_named(scheme: str, scale: str) -> None:
    config, tensors, _, _ = SCHEMES[scheme]
    found = read({name: kind for name, kind in tensors.items() if name != scale}, config)
    (problem,) = found.problems.values()
    assert "has no scale" in problem


def test_a_scale_without_its_weight_is_left_for_the_engine_to_refuse() -> None:
    assert read({f"{W}_scale": ("F32", [48, 1])}, {}).shapes == {f"{W}_scale": (48, 1)}


def test_a_vector_called_scale_is_a_weight_of_its_own() -> None:
    tensors: Tensors = {"router.weight": ("BF16", [8, 64]), "router.scale": ("BF16", [64])}
    assert read(tensors, {}).shapes == {"router.weight": (8, 64), "router.scale": (64,)}
