"""What transformers itself saves of every family, experts stacked and under its own names.

`save_pretrained(save_original_format=False)` leaves the published names behind. Each family's
model is built small from its fixture's config, saved so, pruned, and loaded again by transformers:
its logits are those of the original whose routers cannot choose the pruned experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shardsurgeon import apply, open_checkpoint, plan, verify
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.transformers_model import (
    MetaModel,
    as_transformers_reads,
    is_known,
    silence_hub,
)
from shardsurgeon.families.schema import Family, all_families, family_for
from shardsurgeon.verification.architecture import check_architecture
from tests.families.masked_router import logits
from tests.families.specimens import builders, specimen
from tests.oracle.byte_oracle import same_bits
from tests.oracle.closeness import assert_equal_but_for_rounding

# Of these the fixtures have no vision config, and transformers would fill in a large one.
WITHOUT_VISION = ["diffusion_gemma"]
FAMILIES = [
    family.name
    for family in all_families()
    if not family.refusal and not family.transformers.unknown and family.name not in WITHOUT_VISION
]
# Further forms of a family, which transformers saves in another way.
FORMS = ["minimax_m3_text", "nemotron_h_latent", "qwen3_omni_moe_thinker"]
# Fixtures that stand for a family whose first one transformers does not build.
STAND_INS = {
    "aria": "aria_text",
    "deepseek_vl_v2": "deepseek_ocr2",
    "dots3_note": "dots3_note_text",
    "inkling": "inkling_text",
    "step3p5": "step3p7",
}
# Inside the first the automatic classes find no causal language model; the second's first layers
# choose by a table of ids, which pruning rewrites; the third classifies tokens.
WITHOUT_LOGITS = ["qwen3_omni_moe", "deepseek_v4"]


def fixture_of(name: str) -> str:
    """A fixture of that name, or of the family of that name."""
    name = STAND_INS.get(name, name)
    if name in builders():
        return name
    return next(f for f in builders() if family_for(specimen(f).config, f).name == name)


def without_mtp(node: Any, keys: tuple[str, ...]) -> Any:
    """The config without MTP layers, which transformers neither builds nor saves."""
    if not isinstance(node, Mapping):
        return node
    read = {k: 0 if k in keys and v else without_mtp(v, keys) for k, v in node.items()}
    if "layer_types" in read and "num_hidden_layers" in read:
        read["layer_types"] = read["layer_types"][: read["num_hidden_layers"]]
    return read


def resaved(name: str, folder: Path) -> tuple[Path, Family]:
    """A tiny model of the fixture's config with random weights, as transformers saves it."""
    config = specimen(fixture_of(name)).config
    family = family_for(config, name)
    config = without_mtp(deepcopy(config), family.config.mtp_layers)
    read = as_transformers_reads(config, family.transformers, is_known)
    assert read is not None
    empty = MetaModel(read, name, attention=None).model
    torch.manual_seed(0)
    with silence_hub():
        model = type(empty)(empty.config)
        for parameter in model.parameters():
            # Spread wider than a fresh model's, so that another choice of experts shows.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder, save_original_format=False)
    return folder, family


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_what_transformers_saves_is_pruned_and_loads(name: str, tmp_path: Path) -> None:
    source, family = resaved(name, tmp_path / "model")
    checkpoint = open_checkpoint(source)
    anatomy = read_anatomy(checkpoint)
    assert anatomy.family.tensors == family.tensors
    assert all(layer.stacked for layer in anatomy.layers)
    draw = np.random.default_rng(0)
    scores = tmp_path / "scores.json"
    table = {layer.index: draw.random(layer.num_experts).tolist() for layer in anatomy.layers}
    scores.write_text(json.dumps(table))
    made = plan(source, scores, ratio=0.5)
    out = tmp_path / "out"
    apply(made, out)
    assert verify(source, out).holds
    keep = {layer: list(kept.retained) for layer, kept in made.decision.keep.layers.items()}
    assert_rows_follow(source, out, keep, anatomy.num_experts)
    architecture = check_architecture(source, out)
    assert architecture.differences == ()
    assert architecture.unchecked == ()
    if name not in WITHOUT_LOGITS:
        kept = len(next(iter(keep.values())))
        result, masked = logits(out, kept), logits(source, anatomy.num_experts, keep)
        assert_equal_but_for_rounding(result, masked, source)
        assert (result - logits(source, anatomy.num_experts)).abs().max() > 1e-3


def assert_rows_follow(source: Path, out: Path, keep: dict[int, list[int]], experts: int) -> None:
    """Every tensor is the source's, or its kept rows in the one dimension that shrank."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    cut = set()
    for name, tensor in before.items():
        result = after[name]
        axes = [n for n, size in enumerate(tensor.shape) if result.shape[n] != size]
        if axes:
            layer = int(re.split(r"\b(?:layers|blocks)\.", name)[1].split(".")[0])
            whole, left = tensor.shape[axes[0]], result.shape[axes[0]]
            # Rows of one expert: several where experts lie one under the other.
            each = (whole - left) // (experts - len(keep[layer]))
            rows = [expert * each + row for expert in keep[layer] for row in range(each)]
            rows += range(experts * each, whole)
            tensor = tensor.index_select(axes[0], torch.tensor(rows))
            cut.add(layer)
        assert same_bits(result, tensor), name
    assert cut == keep.keys()
