"""gpt-oss, Llama 4, Gemma 4, ERNIE 4.5, Nemotron-H, LongCat-Flash, Step-3.x: a prune's results.

What transformers cannot read is turned into what it can by the scheme's own arithmetic, the
same way on both sides (`readable`). It has no class for Step-3.5 alone, whose text model is
compared inside Step-3.7, nor for ERNIE's remote spelling, and reads neither stacked FP8 experts
of Llama 4 nor Step-3.5's per-expert repack: those have no logits here. MTP layers it does not
read: those are compared byte by byte only.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.operations.api import verify
from tests.families.masked_router import logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("stacked_experts") | builders("odd_blocks") | builders("step3")
EXPERTS, KEPT = 8, 4

write = importlib.import_module("builders.folder").write


Logits: TypeAlias = Literal["same bits", "but for rounding"]


@dataclass(frozen=True)
class Case:
    """What is known of a fixture: names, MoE layers (MTP counted on) and how exact logits are.

    logits: what masking leaves of them, None where transformers cannot run the model.
    tail: router rows behind the experts'.
    """

    layout: Layout
    main_layers: int
    pruned: frozenset[int]
    logits: Logits | None
    tail: int = 0


GATED = r"\.(?:gate|up|down)_proj\.weight(?:_scale)?$"
GPT_OSS = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=None,
    sliced=(
        (r"mlp\.experts\.(gate_up|down)_proj(_blocks|_scales|_bias)?", 0),
        (r"mlp\.router\.(weight|bias)", 0),
    ),
    counts=(("num_local_experts",),),
)
LLAMA4 = Layout(
    layers=r"language_model\.model\.layers\.(\d+)\.",
    experts=r"feed_forward\.experts\.(\d+)" + GATED,
    sliced=(
        (r"feed_forward\.experts\.(gate_up|down)_proj(_weight_scale)?", 0),
        (r"feed_forward\.router\.weight", 0),
    ),
    counts=(("text_config", "num_local_experts"),),
)
GEMMA4 = Layout(
    layers=r"model\.language_model\.layers\.(\d+)\.",
    experts=None,
    sliced=(
        (r"experts\.(gate_up|down)_proj", 0),
        (r"router\.(proj\.weight|per_expert_scale)", 0),
    ),
    counts=(("text_config", "num_experts"),),
)
ERNIE = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)" + GATED,
    sliced=((r"mlp\.gate\.weight", 0), (r"mlp\.moe_statics\.e_score_correction_bias", 1)),
    counts=(("moe_num_experts",), *(("moe_capacity", position) for position in range(3))),
)
NEMOTRON_H = Layout(
    layers=r"backbone\.layers\.(\d+)\.",
    mtp=r"mtp\.layers\.(\d+)\.",
    experts=r"mixer\.experts\.(\d+)\.(?:up|down)_proj\.weight$",
    sliced=((r"mixer\.gate\.(weight|e_score_correction_bias)", 0),),
    counts=(("n_routed_experts",),),
)
PUZZLE_COUNTS = (
    ("block_configs", 1, "n_routed_experts"),
    ("block_configs", 3, "n_routed_experts"),
    ("mtp_n_routed_experts",),
)
LONGCAT = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)" + GATED,
    sliced=((r"mlp\.router\.(classifier\.weight|e_score_correction_bias)", 0),),
    counts=(("n_routed_experts",),),
)
STEP3 = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"moe\.experts\.(\d+)" + GATED,
    sliced=((r"moe\.(gate|up|down)_proj\.weight", 0), (r"moe\.(gate\.weight|router_bias)", 0)),
    counts=(("moe_num_experts",),),
)
STEP3P7 = replace(STEP3, counts=(("text_config", "moe_num_experts"),))
PUZZLE = replace(NEMOTRON_H, counts=PUZZLE_COUNTS)
CASES = {
    "gpt_oss": Case(GPT_OSS, 2, frozenset({0, 1}), "same bits"),
    "gpt_oss_bf16": Case(GPT_OSS, 2, frozenset({0, 1}), "same bits"),
    "llama4": Case(LLAMA4, 4, frozenset({1, 3}), "same bits"),
    "llama4_quantized": Case(LLAMA4, 4, frozenset({1, 3}), "same bits"),
    "llama4_fp8": Case(LLAMA4, 4, frozenset({1, 3}), None),
    "gemma4": Case(GEMMA4, 3, frozenset({0, 1, 2}), "but for rounding"),
    "ernie4_5_moe": Case(ERNIE, 3, frozenset({1, 2}), "but for rounding"),
    "ernie4_5_moe_remote": Case(ERNIE, 3, frozenset({1, 2}), None),
    "nemotron_h": Case(NEMOTRON_H, 4, frozenset({1, 3, 5}), "same bits"),
    "nemotron_h_latent": Case(NEMOTRON_H, 4, frozenset({1, 3, 5}), "same bits"),
    "nemotron_h_puzzle": Case(PUZZLE, 4, frozenset({1, 3, 5}), "same bits"),
    "longcat_flash": Case(LONGCAT, 2, frozenset({0, 1}), "but for rounding", tail=4),
    "longcat_flash_resaved": Case(LONGCAT, 2, frozenset({0, 1}), "but for rounding", tail=4),
    "step3p7": Case(STEP3P7, 3, frozenset({1, 2}), "same bits"),
    "step3p5": Case(STEP3, 3, frozenset({1, 2}), None),
    "step3p5_quantized": Case(STEP3, 3, frozenset({1, 2}), None),
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Filled by `pair`: every fixture is built and pruned once, whichever test needs it first."""
    return {}


@pytest.fixture(params=list(BUILDERS))
def pair(
    request: pytest.FixtureRequest,
    pairs: dict[str, Pair],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    name = request.param
    if name not in pairs:
        pairs[name] = build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))
    return pairs[name]


def test_every_tensor_is_the_sources_renumbered_or_sliced(pair: Pair) -> None:
    case = CASES[pair.name]
    assert pair.retained.keys() == case.pruned
    tail = list(range(EXPERTS, EXPERTS + case.tail))
    with_tail = {layer: [*ids, *tail] for layer, ids in pair.retained.items()}
    assert_tensors_follow(replace(pair, retained=with_tail), case.layout, case.main_layers)


def test_the_config_has_the_new_counts_and_not_one_other_change(pair: Pair) -> None:
    expected = read_config(pair.source)
    for path in CASES[pair.name].layout.counts:
        node: Any = expected
        for part in path[:-1]:
            node = node[part]
        assert node[path[-1]] == EXPERTS
        node[path[-1]] = KEPT
    if (ignore := expected.get("quantization_config", {}).get("ignore")) is not None:
        renamed = [renumbered(entry, pair.retained) for entry in ignore]
        expected["quantization_config"]["ignore"] = [e for e in renamed if e is not None]
    assert (pair.folder / "config.json").read_text() == json.dumps(expected, indent=2) + "\n"


def renumbered(module: str, retained: dict[int, list[int]]) -> str | None:
    """A module name with its expert's new number; None where the expert is gone."""
    found = re.fullmatch(r"(.*layers\.(\d+)\..*experts\.)(\d+)(\..*)", module)
    if found is None:
        return module
    keep = retained[int(found[2])]
    return f"{found[1]}{keep.index(int(found[3]))}{found[4]}" if int(found[3]) in keep else None


@pytest.mark.parametrize("pair", [name for name in CASES if CASES[name].logits], indirect=True)
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    pair: Pair, tmp_path: Path
) -> None:
    source, pruned = (readable(f, tmp_path / f.name) for f in (pair.source, pair.folder))
    result, masked = logits(pruned, KEPT), logits(source, EXPERTS, pair.retained)
    if CASES[pair.name].logits == "same bits":
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, pair.source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(source, EXPERTS)).abs().max() > 1e-2


def readable(folder: Path, copy: Path) -> Path:
    """The folder, or a copy that transformers can read: its scheme or spelling resolved."""
    config, tensors = read_config(folder), read_tensors(folder)
    scheme = config.pop("quantization_config", {}).get("quant_method")
    if scheme == "mxfp4":
        tensors = without_mxfp4(tensors)
    elif scheme == "compressed-tensors":
        tensors = stacked(tensors)
    elif config["model_type"] == "nemotron_h_puzzle":
        # The same model where all blocks are of one size.
        config["model_type"] = "nemotron_h"
        config["n_routed_experts"] = config["mtp_n_routed_experts"]
    elif config["model_type"] == "longcat_flash":
        # The published files lack the halves of identity experts that the class allocates.
        first = config["n_routed_experts"]
        for name in [n for n in tensors if re.search(r"experts\.0\.(gate|up)_proj", n)]:
            for zero in range(first, first + config["zero_expert_num"]):
                junk = name.replace("experts.0.", f"experts.{zero}.")
                tensors.setdefault(junk, torch.zeros_like(tensors[name]))
    else:
        return folder
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "model.safetensors")
    return copy


def without_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks and scales decoded by transformers' own function."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            out[stem] = convert_moe_packed_tensors(tensor, tensors[f"{stem}_scales"])
        elif not name.endswith("_scales"):
            out[name] = tensor
    return out


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scaled FP8 matrices per expert, `[out, in]`, as Llama 4's stacked `[E, in, out]`."""
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    stems = {n.split(".experts.")[0] + ".experts." for n in tensors if ".experts." in n}
    for stem in stems:
        count = len({n.removeprefix(stem).split(".")[0] for n in tensors if n.startswith(stem)})

        def whole(part: str, stem: str = stem, count: int = count) -> torch.Tensor:
            names = [f"{stem}{expert}.{part}.weight" for expert in range(count)]
            each = [tensors[n].float() * tensors[f"{n}_scale"].float() for n in names]
            return torch.stack(each).transpose(1, 2)

        out[f"{stem}gate_up_proj"] = torch.cat([whole("gate_proj"), whole("up_proj")], dim=2)
        out[f"{stem}down_proj"] = whole("down_proj")
    return out


@pytest.mark.parametrize("name", ["ernie4_5_moe", "nemotron_h", "longcat_flash", "step3p5"])
def test_dropping_the_mtp_layers_takes_all_their_tensors_and_their_count(
    name: str, tmp_path: Path
) -> None:
    pair = build_and_prune(name, BUILDERS[name], tmp_path, "--keep", "4", "--mtp", "drop")
    ours = read_tensors(pair.folder).keys()
    mtp = re.compile(r"mtp\.|model\.mtp[._]|model\.layers\.3\.")
    if name == "nemotron_h":
        mtp = re.compile(r"mtp\.")
    assert any(mtp.match(tensor) for tensor in read_tensors(pair.source))
    assert not any(mtp.match(tensor) for tensor in ours)
    assert read_config(pair.folder).get("num_nextn_predict_layers", 0) == 0


def test_ernie_vl_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = changed("ernie4_5_moe", tmp_path, {"model_type": "ernie4_5_moe_vl"})
    with pytest.raises(FamilyError, match="text and for vision tokens, numbered one behind"):
        read_anatomy(open_checkpoint(folder))


def test_a_puzzle_model_whose_blocks_say_other_counts_than_its_tensors_is_refused(
    tmp_path: Path,
) -> None:
    blocks = [{"block_type": "mamba"}, {"block_type": "moe", "n_routed_experts": 8}]
    blocks += [{"block_type": "attention"}, {"block_type": "moe", "n_routed_experts": 6}]
    folder = changed("nemotron_h_puzzle", tmp_path, {"block_configs": blocks})
    with pytest.raises(FamilyError, match=r"has 8 experts in dimension 0, expected 6"):
        read_anatomy(open_checkpoint(folder))


def test_a_puzzle_model_whose_mtp_layer_has_not_its_own_count_is_refused(tmp_path: Path) -> None:
    folder = changed("nemotron_h_puzzle", tmp_path, {"mtp_n_routed_experts": 16})
    with pytest.raises(FamilyError, match=r"mtp\.layers\.1\..* has 8 experts .*, expected 16"):
        read_anatomy(open_checkpoint(folder))


def test_a_gemma_without_experts_is_a_dense_model(tmp_path: Path) -> None:
    text = read_config(changed("gemma4", tmp_path, {}))["text_config"]
    text |= {"num_experts": None, "top_k_experts": None, "enable_moe_block": False}
    folder = changed("gemma4", tmp_path, {"text_config": text})
    with pytest.raises(ConfigError, match="a dense model has no experts to prune"):
        read_anatomy(open_checkpoint(folder))


def changed(name: str, out: Path, config: dict[str, Any]) -> Path:
    """The fixture with some of its config replaced."""
    folder: Path = write(BUILDERS[name](), out)
    whole = read_config(folder) | config
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def test_the_verifier_knows_the_experts_behind_the_survivors(tmp_path: Path) -> None:
    name = "longcat_flash_resaved"
    pair = build_and_prune(name, BUILDERS[name], tmp_path, "--keep", "4")
    assert verify(pair.source, pair.folder).differences == ()
    for shard in pair.folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if (first := tensors.get("model.layers.0.mlp.experts.4.gate_proj.weight")) is not None:
            first.neg_()
            save_file(tensors, shard, metadata={"format": "pt"})
    says = "experts.4.gate_proj.weight: differs from .* model.layers.0.mlp.experts.8.gate_proj"
    assert re.search(says, str(verify(pair.source, pair.folder).differences))
