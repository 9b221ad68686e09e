"""Quantized experts, streamed, have the sums of the decoded weights in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import FamilyError
from shardsurgeon.layerwise.decoding import Decoder
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.tensors import TensorReader
from tests.families.specimens import builders, fixture, written
from tests.layerwise import in_memory
from tests.layerwise.streaming import stream, token_ids
from tests.quantization.decoding import decoded

pytestmark = pytest.mark.oracle

builders()  # Makes the fixtures' modules importable.
schemes: Any = import_module("builders.schemes")
# Their library decodes in bfloat16, whatever the scales are.
COARSE = {"nvfp4", "modelopt_nvfp4"}


def with_wide_scales(name: str) -> Any:
    """The fixture with float32 scales: libraries decode in the dtype of the scales."""
    made = fixture(name)
    narrow = re.compile(r"\.experts\..*scales?$")
    tensors = {
        key: tensor.float()
        if narrow.search(key) and tensor.dtype in (torch.bfloat16, torch.float16)
        else tensor
        for key, tensor in made.tensors.items()
    }
    return replace(made, tensors=tensors)


@pytest.mark.parametrize("name", sorted(schemes.SCHEMES.keys() - COARSE))
def test_a_scheme_computes_with_what_its_own_library_decodes(name: str, tmp_path: Path) -> None:
    folder, ids = written(with_wide_scales(name), tmp_path), token_ids()
    plain = in_memory.without_quantization(folder, name, tmp_path)
    expected = in_memory.sums(in_memory.load("qwen3_moe", plain, tmp_path), ids)
    in_memory.assert_equal(stream(folder, ids, tmp_path / "store"), expected)


@pytest.mark.parametrize("name", sorted(COARSE))
def test_nvfp4_decodes_as_its_library_does_in_bfloat16(name: str, tmp_path: Path) -> None:
    folder = written(fixture(name), tmp_path)
    checkpoint = open_checkpoint(folder)
    decoder = Decoder(TensorReader(checkpoint, Device("cpu")), checkpoint.settings)
    for stem, expected in decoded(folder, name).items():
        ours = decoder.weight(f"{stem}.weight", tuple(expected.shape))
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["stacked_int4_symmetric", "stacked_int4_asymmetric"])
def test_stacked_integers_are_decoded_expert_by_expert(name: str, tmp_path: Path) -> None:
    folder = written(with_wide_scales(name), tmp_path)
    plain = schemes.PLAIN[name]()
    checkpoint = open_checkpoint(folder)
    decoder = Decoder(TensorReader(checkpoint, Device("cpu")), checkpoint.settings)
    stem = "model.language_model.layers.1.mlp.experts.down_proj"
    original = plain.tensors[stem].float()
    whole = decoder.weight(f"{stem}.weight", tuple(original.shape))
    rows = [
        decoder.weight(f"{stem}.weight", tuple(original.shape), row) for row in range(len(original))
    ]
    assert torch.equal(torch.cat(rows), whole)
    # Four bits for eight values between the extremes of a group.
    steps = original.unflatten(-1, (-1, 8))
    step = (steps.amax(-1) - steps.amin(-1)).clamp(min=2 * steps.abs().amax(-1)) / 15
    assert ((whole - original).unflatten(-1, (-1, 8)).abs() <= step[..., None]).all()


def test_a_narrow_weight_without_a_scale_is_refused_by_name(tmp_path: Path) -> None:
    made = fixture("fp8_channel")
    gone = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    tensors = {name: tensor for name, tensor in made.tensors.items() if name != gone}
    folder = written(replace(made, tensors=tensors), tmp_path)
    with pytest.raises(FamilyError, match=r"3\.down_proj\.weight.* is missing|has no scale"):
        stream(folder, token_ids(), tmp_path / "store")
