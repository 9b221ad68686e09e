"""Solar Open, A.X-K1 and K2, K-EXAONE, Laguna, Kolibri, Command A, Sarvam, Granite with windows,
OpenAI's privacy filter, Step-3 and 5, Muse Spark, Inkling, MiniMax-Text-01 and M1, Arctic, Grok and
DBRX, pruned by half.

Written from the modeling sources: which tensors have an expert axis, and where config.json says
the count. transformers runs no Sarvam, Step-3 or 5, Arctic or Grok, no embeddings of n-grams, no
MiniMax in its published spelling and no NVFP4 Inkling, and Inkling's MXFP8 experts on a GPU only:
those are compared byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import InputError
from shardsurgeon.operations.api import verify
from tests.families.masked_router import logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
)
from tests.families.specimens import written
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = pytest.mark.oracle

BUILDERS = builders("biased_routers") | builders("newer_stacks")
BUILDERS |= builders("inkling") | builders("early_mixtures")


@dataclass(frozen=True)
class Case:
    """What is known of a fixture: its experts, its names, its MoE layers (MTP counted on).

    runs: whether transformers runs the model; rounds: whether its routers take a softmax over all
    experts, whose sum has fewer terms in the pruned model. The others score each expert by itself
    or take the softmax over their choice: the pruned model must agree to the last bit.
    """

    layout: Layout
    experts: int = 8
    pruned: frozenset[int] = frozenset({1, 2})
    runs: bool = True
    rounds: bool = False


def stacked(
    experts: str, *routers: str, count: str, layers: str = r"model\.layers", **more: Any
) -> Layout:
    """All experts in these tensors, and routers with a row for each."""
    return Layout(
        layers=rf"{layers}\.(\d+)\.",
        experts=None,
        sliced=tuple((name, 0) for name in (experts, *routers)),
        counts=(tuple(count.split(".")),),
        **more,
    )


def routed(*routers: str, count: str = "num_experts", layers: str = r"model\.layers") -> Layout:
    """Experts one by one in `mlp`, and these tensors with a row for each."""
    return Layout(
        layers=rf"{layers}\.(\d+)\.",
        experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
        sliced=tuple((router, 0) for router in (r"mlp\.gate\.weight", *routers)),
        counts=(tuple(count.split(".")),),
    )


BIAS = r"mlp\.gate\.e_score_correction_bias"
V3 = routed(BIAS, count="n_routed_experts")
STEP3 = stacked(r"moe\.(gate|up|down)_proj\.weight", r"moe\.gate\.weight", count="moe_num_experts")
INKLING = stacked(
    r"mlp\.experts\.w(13|2)_weight(_scale)?",
    r"mlp\.gate\.(weight|bias)",
    count="text_config.n_routed_experts",
    layers=r"model\.llm\.layers",
)
BOTH = frozenset({0, 1})
CASES = {
    "solar_open": Case(V3, 16, frozenset({0, 1, 2})),
    "axk1": Case(V3, 16),
    "axk2": Case(V3, 16),
    "axk2_light": Case(V3),
    "exaone_moe": Case(routed(r"mlp\.e_score_correction_bias")),
    "laguna": Case(routed(r"mlp\.experts\.e_score_correction_bias")),
    "kolibri1": Case(routed(r"moe\.router\.expert_bias"), pruned=frozenset({0, 1, 2})),
    "cohere2_moe": Case(routed()),
    "cohere2_moe_vision": Case(
        routed(count="text_config.num_experts", layers=r"model\.language_model\.layers")
    ),
    "sarvam_moe": Case(routed(r"mlp\.gate\.expert_bias"), 32, runs=False),
    "sarvam_mla": Case(routed(BIAS), runs=False),
    "granitemoe_swa": Case(
        stacked(
            r"block_sparse_moe\.experts\.(gate_up|down)_proj",
            r"block_sparse_moe\.router\.weight",
            count="num_local_experts",
        ),
        pruned=BOTH,
    ),
    "openai_privacy_filter": Case(
        stacked(
            r"mlp\.experts\.(gate_up|down)_proj(_bias)?",
            r"mlp\.router\.(weight|bias)",
            count="num_local_experts",
        ),
        pruned=BOTH,
    ),
    "longcat_flash_ngram": Case(
        replace(
            routed(count="n_routed_experts"),
            sliced=((r"mlp\.router\.(classifier\.weight|e_score_correction_bias)", 0),),
            tail=(r"mlp\.router\..*", 4),
        ),
        pruned=BOTH,
        runs=False,
    ),
    "step3_text": Case(STEP3, runs=False),
    "step3_vl": Case(replace(STEP3, counts=(("text_config", "moe_num_experts"),)), runs=False),
    "step5": Case(
        stacked(
            r"moe\.(gate|up|down)_proj\.weight",
            r"moe\.(gate\.weight|router_bias)",
            count="text_config.moe_num_experts",
        ),
        runs=False,
    ),
    "muse_spark": Case(
        stacked(
            r"mlp\.experts\.(gate_up|down)_proj",
            r"mlp\.gate\.(weight|e_score_correction_bias)",
            count="text_config.num_local_experts",
            layers=r"model\.language_model\.layers",
        )
    ),
    "inkling": Case(replace(INKLING, tail=(r"mlp\.gate\.weight", 2))),
    "inkling_nvfp4": Case(
        replace(
            INKLING,
            sliced=((r"mlp\.experts\.w(13|2)_weight(\.scale2?)?", 0), *INKLING.sliced[1:]),
            tail=(r"mlp\.gate\.weight", 2),
            counted=r"mlp\.experts\.w(13|2)_weight\.original_shape",
        ),
        runs=False,
    ),
    "inkling2": Case(INKLING, pruned=BOTH),
    "inkling2_mxfp8": Case(INKLING, pruned=BOTH, runs=False),
}
MIXTRAL = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"block_sparse_moe\.experts\.(\d+)\.w[123]\.weight$",
    sliced=((r"block_sparse_moe\.gate\.weight", 0),),
    counts=(("num_local_experts",),),
)
CASES |= {
    "minimax": Case(MIXTRAL, pruned=BOTH, rounds=True),
    "minimax_m1": Case(MIXTRAL, pruned=BOTH, runs=False),
    "arctic": Case(MIXTRAL, pruned=frozenset({1, 3}), runs=False),
    "grok1": Case(
        replace(
            MIXTRAL,
            experts=r"moe_block\.experts\.(\d+)\.linear(_v|_1)?\.weight$",
            sliced=((r"moe_block\.gate\.weight", 0),),
            counts=(("num_experts",),),
        ),
        pruned=BOTH,
        runs=False,
    ),
    "grok2": Case(MIXTRAL, pruned=BOTH, runs=False),
    "mistral_native": Case(
        replace(
            MIXTRAL,
            layers=r"layers\.(\d+)\.",
            experts=r"experts\.(\d+)\.w[123]\.(qscale_)?weight$",
            sliced=((r"gate\.weight", 0),),
            counts=(("moe", "num_experts"),),
        ),
        pruned=frozenset({1, 2}),
        runs=False,
    ),
    "dbrx": Case(
        stacked(
            r"ffn\.experts\.mlp\.(w1|v1|w2)",
            r"ffn\.router\.layer\.weight",
            count="ffn_config.moe_num_experts",
            layers=r"transformer\.blocks",
            flat=(r"ffn\.experts\.mlp\..*", 24),
        ),
        pruned=BOTH,
        rounds=True,
    ),
}

MAIN_LAYERS = 3

Pairs = Callable[[str], Pair]
each_fixture = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Each fixture by name, built and pruned once."""

    @cache
    def pair(name: str) -> Pair:
        return build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))

    return pair


def test_every_fixture_has_a_case() -> None:
    assert BUILDERS.keys() == CASES.keys()


@each_fixture
def test_every_tensor_is_the_sources_renumbered_or_sliced(name: str, pairs: Pairs) -> None:
    case, pair = CASES[name], pairs(name)
    assert pair.retained.keys() == case.pruned
    assert_tensors_follow(pair, case.layout, MAIN_LAYERS)


@each_fixture
def test_the_config_has_the_new_count_and_not_one_other_change(name: str, pairs: Pairs) -> None:
    assert_config_follows(pairs(name), CASES[name].layout)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.runs])
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pairs: Pairs
) -> None:
    pair, experts = pairs(name), CASES[name].experts
    result = logits(pair.folder, experts // 2)
    masked = logits(pair.source, experts, pair.retained)
    if CASES[name].rounds:
        assert_equal_but_for_rounding(result, masked, pair.source)
    else:
        assert torch.equal(result, masked)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(pair.source, experts)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "prefix", "count"),
    [
        ("exaone_moe", "mtp.", "num_nextn_predict_layers"),
        ("inkling", "model.mtp.", "mtp_config.num_nextn_predict_layers"),
        ("step5", "model.layers.3.", "text_config.num_nextn_predict_layers"),
    ],
)
def test_dropping_a_dense_mtp_layer_takes_all_its_tensors_and_its_count(
    name: str, prefix: str, count: str, tmp_path: Path
) -> None:
    options = ("--ratio", "0.5", "--mtp", "drop")
    pair = build_and_prune(name, BUILDERS[name], tmp_path, *options)
    assert any(tensor.startswith(prefix) for tensor in read_tensors(pair.source))
    assert not any(tensor.startswith(prefix) for tensor in read_tensors(pair.folder))
    found: Any = read_config(pair.folder)
    for key in count.split("."):
        found = found[key]
    assert found == 0


@pytest.mark.parametrize(
    ("name", "prefix", "alone"),
    [("inkling2", "model.llm.", "model.llm."), ("muse_spark", "model.language_model.", "")],
)
def test_a_text_model_saved_alone_is_pruned(
    name: str, prefix: str, alone: str, tmp_path: Path
) -> None:
    """With the text model's config and names only, as transformers saves it by itself."""
    whole = BUILDERS[name]()
    tensors = {
        alone + tensor.removeprefix(prefix): values
        for tensor, values in whole.tensors.items()
        if tensor.startswith(prefix)
    }
    config = {**whole.config["text_config"], "model_type": f"{name}_text"}
    text = replace(whole, config=config, tensors=tensors)
    pair = build_and_prune(name, lambda: text, tmp_path)
    layout = CASES[name].layout
    assert_tensors_follow(
        pair,
        replace(layout, layers=layout.layers.replace(re.escape(prefix), re.escape(alone))),
        MAIN_LAYERS,
    )
    assert pair.retained.keys() == CASES[name].pruned


def test_a_layer_in_bf16_among_packed_ones_is_pruned_with_them(tmp_path: Path) -> None:
    packed, plain = BUILDERS["inkling_nvfp4"](), BUILDERS["inkling"]()
    first = "model.llm.layers.1.mlp.experts."
    tensors = {name: t for name, t in packed.tensors.items() if not name.startswith(first)}
    tensors |= {name: t for name, t in plain.tensors.items() if name.startswith(first)}
    mixed = replace(packed, tensors=tensors)
    pair = build_and_prune("inkling_nvfp4", lambda: mixed, tmp_path)
    assert_tensors_follow(pair, CASES["inkling_nvfp4"].layout, MAIN_LAYERS)


def test_the_verifier_compares_every_row_of_an_expert_that_has_several(pairs: Pairs) -> None:
    pair = pairs("dbrx")
    assert verify(pair.source, pair.folder).differences == ()
    name = "transformer.blocks.1.ffn.experts.mlp.v1"
    shard = next(f for f in pair.folder.glob("*.safetensors") if name in load_file(f))
    whole = shard.read_bytes()
    tensors = load_file(shard)
    # The last row of the second survivor: row 47 of 96.
    tensors[name][47].neg_()
    save_file(tensors, shard, metadata={"format": "pt"})
    told = str(verify(pair.source, pair.folder).differences)
    shard.write_bytes(whole)
    assert name in told


def test_rows_that_do_not_belong_to_whole_experts_are_refused(tmp_path: Path) -> None:
    fixture = BUILDERS["dbrx"]()
    name = "transformer.blocks.0.ffn.experts.mlp.w2"
    tensors = {**fixture.tensors, name: fixture.tensors[name][1:]}
    folder = written(replace(fixture, tensors=tensors), tmp_path)
    with pytest.raises(
        InputError, match=rf"{name}: shape \[191, 64\] has 191 rows .* multiple of 8"
    ):
        read_anatomy(open_checkpoint(folder))


def test_experts_cut_by_tensor_parallel_rank_are_refused(tmp_path: Path) -> None:
    """As Grok-2 is published: the same names in one file per rank, and no index."""
    folder = written(BUILDERS["grok2"](), tmp_path)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    cut = {name: t for name, t in tensors.items() if name.endswith(".w1.weight")}
    others = {name: t for name, t in tensors.items() if name not in cut}
    save_file(others, folder / "pytorch_model-00000-TP-common.safetensors")
    for rank in range(2):
        part = {name: t.chunk(2)[rank].contiguous() for name, t in cut.items()}
        save_file(part, folder / f"pytorch_model-00006-TP-00{rank}.safetensors")
    with pytest.raises(InputError):
        read_anatomy(open_checkpoint(folder))
