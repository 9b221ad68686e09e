"""Parameters are counted as the unquantized model has them, however the weights are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch

from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from tests.families.pruned_pair import builders

BUILDERS = builders("schemes")
schemes = import_module("builders.schemes")
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Listed:
    name: str
    dtype: str
    shape: tuple[int, ...]


def listed(tensors: Mapping[str, torch.Tensor]) -> list[Listed]:
    return [Listed(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]


def table(tensors: Iterable[Listed]) -> TensorTable:
    return TensorTable.of(TensorRecord(t.name, t.dtype, t.shape, 0, 0) for t in tensors)


def count(config: Mapping[str, Any], **tensors: tuple[str, tuple[int, ...]]) -> int | None:
    """Names are keyword arguments with `__` for a dot."""
    found = [Listed(n.replace("__", "."), dtype, shape) for n, (dtype, shape) in tensors.items()]
    return count_parameters([table(found)], {"quantization_config": config})


@pytest.mark.parametrize("name", BUILDERS)
def test_every_scheme_has_as_many_as_the_model_without_it(name: str) -> None:
    built = BUILDERS[name]()
    plain = schemes.PLAIN.get(name, schemes.plain)()
    wanted = sum(tensor.numel() for tensor in plain.tensors.values())
    assert count_parameters([table(listed(built.tensors))], built.config) == wanted


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_fp8", "llama4_quantized"])
def test_published_stacked_layouts_have_as_many_as_their_plain_forms(name: str) -> None:
    family = builders("stacked_experts")
    plain = family["gpt_oss_bf16" if name == "gpt_oss" else "llama4"]()
    built = family[name]()
    wanted = sum(tensor.numel() for tensor in plain.tensors.values())
    assert count_parameters([table(listed(built.tensors))], built.config) == wanted


@pytest.mark.parametrize(("bits", "inputs"), [(2, 64), (3, 64), (4, 40), (5, 32), (6, 96), (8, 36)])
def test_packed_rows_of_any_width_are_counted_by_the_scheme_that_fits(
    bits: int, inputs: int
) -> None:
    words = -(-inputs * bits // 32)
    scheme = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "group_size": 4}}}}
    packed = ("I32", (7, words))
    assert count(scheme, x__weight_packed=packed, x__weight_scale=("F16", (7, inputs // 4))) == (
        7 * inputs
    )


def test_with_two_widths_the_scales_say_which_one_it_is() -> None:
    groups = {
        "group_0": {"weights": {"num_bits": 4, "group_size": 32}},
        "group_1": {"weights": {"num_bits": 8, "group_size": 32}},
    }
    config = {"config_groups": groups}
    four = {"a__weight_packed": ("I32", (2, 8)), "a__weight_scale": ("F16", (2, 2))}
    eight = {"b__weight_packed": ("I32", (2, 16)), "b__weight_scale": ("F16", (2, 2))}
    assert count(config, **four, **eight) == 2 * 64 + 2 * 64


def test_what_packing_hides_is_not_guessed() -> None:
    channel = {"num_bits": 4, "strategy": "channel"}, {"num_bits": 8, "strategy": "channel"}
    config = {"config_groups": {str(n): {"weights": w} for n, w in enumerate(channel)}}
    packed = {"a__weight_packed": ("I32", (2, 8)), "a__weight_scale": ("F16", (2, 1))}
    assert count(config, **packed) is None
    assert count({}, **packed) is None
    assert count({}, a__qweight=("I32", (8, 8))) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_counted_by_their_zero_points_or_their_group_indices(bits: int) -> None:
    inputs, outputs = 64, 96
    words = ("I32", (inputs * bits // 32, outputs))
    scales, order = ("F16", (2, outputs)), ("I32", (inputs,))
    zeros = ("I32", (2, outputs * bits // 32))
    # Layers of another width than the config's, as `dynamic` and `extra_config` make them.
    config = {"bits": 4 if bits == 8 else 8}
    wanted = inputs * outputs
    assert count(config, x__qweight=words, x__scales=scales, x__qzeros=zeros) == wanted
    assert count(config, x__qweight=words, x__scales=scales, x__g_idx=order) == wanted
    assert count({"bits": bits}, x__qweight=words, x__scales=scales) == wanted


def test_deepseek_v4s_fp4_bytes_hold_two_weights_and_int8_bytes_one() -> None:
    fp4 = {"w1__weight": ("I8", (64, 32)), "w1__scale": ("F8_E8M0", (64, 2))}
    fp8 = {"w2__weight": ("F8_E4M3", (64, 32)), "w2__scale": ("F8_E8M0", (1, 1))}
    int8 = {"w3__weight": ("I8", (64, 32)), "w3__weight_scale": ("F32", (64, 1))}
    assert count({}, **fp4) == 64 * 64
    assert count({}, **fp8) == count({}, **int8) == 64 * 32


def test_scales_that_a_router_or_an_expert_has_of_its_own_are_parameters() -> None:
    own = {"router__scale": ("BF16", (64,)), "router__per_expert_scale": ("BF16", (8,))}
    assert count({}, **own, router__proj__weight=("BF16", (8, 64))) == 64 + 8 + 8 * 64


def test_tables_of_ids_and_scalars_of_few_bits_are_no_trouble() -> None:
    found = count(
        {"bits": 4},
        gate__tid2eid=("I32", (100, 6)),
        x__weight=("U8", ()),
        x__weight_scale=("F8_E4M3", ()),
        y__qweight=("I32", (4,)),
        z__weight_packed=("I32", ()),
    )
    assert found == 2


def test_a_last_group_that_is_not_full_hides_no_fp4_pairs() -> None:
    assert count({}, w__weight=("I8", (64, 12)), w__scale=("F8_E8M0", (64, 1))) == 64 * 24
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
    packed = {"x__weight_packed": ("I32", (7, 5)), "x__weight_scale": ("F16", (7, 2))}
    assert count(config, **packed) == 7 * 40
