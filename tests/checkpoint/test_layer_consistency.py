"""MoE layers of one model compared: a tensor that one lacks is named, unless it may differ."""

from __future__ import annotations

import re

import pytest

from shardsurgeon.checkpoint.layer_consistency import LayerTensors, check_layers_consistent
from shardsurgeon.errors import FamilyError

PLAIN = {"experts.{}.up.weight": "BF16", "experts.{}.down.weight": "BF16", "shared.up": "BF16"}
PACKED = {"experts.{}.up.weight": "F8_E4M3", "experts.{}.up.weight_scale": "BF16"}


def check(
    *layers: tuple[set[str], dict[str, str]], mtp: int | None = None, varies: str = "(?!)"
) -> None:
    blocks = {n: LayerTensors(f"layers.{n}.", set(r), dict(w)) for n, (r, w) in enumerate(layers)}
    check_layers_consistent(
        blocks, lambda n: n != mtp, lambda rest: re.match(varies, rest) is not None, "here"
    )


def test_layers_that_are_alike_pass() -> None:
    check(({"gate", "bias"}, PLAIN), ({"gate", "bias"}, PLAIN))
    check(({"gate"}, PLAIN))


@pytest.mark.parametrize("mtp", [None, 1])
def test_a_router_bias_that_one_layer_lacks_is_named(mtp: int | None) -> None:
    with pytest.raises(FamilyError, match=r"^here: tensor layers\.1\.bias is missing: layer 0"):
        check(({"gate", "bias"}, PLAIN), ({"gate"}, PACKED), mtp=mtp)


@pytest.mark.parametrize(
    ("lost", "named"), [("experts.{}.up.weight", "experts.0.up.weight"), ("shared.up",) * 2]
)
@pytest.mark.parametrize("mtp", [None, 1])
def test_a_weight_that_one_layer_lacks_is_named(lost: str, named: str, mtp: int | None) -> None:
    fewer = {name: dtype for name, dtype in PLAIN.items() if name != lost}
    with pytest.raises(FamilyError, match=rf"layers\.1\.{re.escape(named)} is missing"):
        check(({"gate"}, PLAIN), ({"gate"}, fewer), mtp=mtp)


def test_another_quantization_is_no_loss() -> None:
    check(({"gate"}, PLAIN), ({"gate"}, PACKED))
    unpacked = dict.fromkeys(PACKED, "BF16")
    del unpacked["experts.{}.up.weight_scale"]
    check(({"gate"}, PACKED), ({"gate"}, unpacked))


def test_a_renamed_weight_is_told_apart_from_another_quantization() -> None:
    renamed = {name.replace("shared", "spared"): dtype for name, dtype in PLAIN.items()}
    told = r"layer 0 has layers\.0\.shared\.up where layer 1 has layers\.1\.spared\.up"
    with pytest.raises(FamilyError, match=told):
        check(({"gate"}, PLAIN), ({"gate"}, renamed))
    check(({"gate"}, PLAIN), ({"gate"}, renamed), mtp=1)


def test_layers_may_choose_experts_in_different_ways() -> None:
    check(({"gate", "table"}, PLAIN), ({"gate", "bias"}, PLAIN))
    with pytest.raises(FamilyError, match="table is missing"):
        check(({"gate", "table", "bias"}, PLAIN), ({"gate", "bias"}, PLAIN))
    check(({"gate", "table", "bias"}, PLAIN), ({"gate", "bias"}, PLAIN), varies="table")
