"""DeepSeek-V2, V3.2 and V4, GLM-4.5 to 5, dots.llm1, MiMo-V2, Ling and Kimi-K3, pruned by half.

Routers here score each expert by itself (sigmoid, or sqrtsoftplus in V4): the pruned model must
agree to the last bit with the original whose router cannot choose the pruned experts. The
exception is DeepSeek-V2, a softmax over all experts that is not renormalised: removing experts
makes it a softmax over the survivors, which is the original with their logits at -inf.

V4's first layer does not choose at all: there the original gets the token table that the
documented rule for tokens of pruned experts gives, in old ids.

Not run by transformers, so compared byte by byte and by router logits only: Kimi-K3 (vLLM only),
Ling 1 (a softmax router without bias, remote code), V4's FP4 vision checkpoint, the wrappers of
MiMo and Ling 3. Ling 2 runs as GLM-4.5, which has the same router and attention.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from shardsurgeon.errors import UsageError
from shardsurgeon.operations import api
from tests.families.masked_model import Kept, load, logits
from tests.families.pruned_pair import (
    Layout,
    Pair,
    assert_config_follows,
    assert_tensors_follow,
    build_and_prune,
    builders,
    renumbered_table,
)
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.oracle.closeness import assert_equal_but_for_rounding

pytestmark = [
    pytest.mark.oracle,
    # A published key that transformers reads but calls old.
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

BUILDERS = {
    **builders("deepseek_like"),
    **builders("deepseek_v4"),
    **builders("bailing"),
    **builders("kimi_k3"),
}

V2 = Layout(
    layers=r"model\.layers\.(\d+)\.",
    experts=r"mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$",
    sliced=((r"mlp\.gate\.weight", 0),),
    counts=(("n_routed_experts",),),
)
V3 = replace(V2, sliced=(*V2.sliced, (r"mlp\.gate\.e_score_correction_bias", 0)))
V4 = Layout(
    layers=r"layers\.(\d+)\.",
    mtp=r"mtp\.(\d+)\.",
    experts=r"ffn\.experts\.(\d+)\.w[123]\.(?:weight|scale)$",
    sliced=((r"ffn\.gate\.(weight|bias|bias_vl)", 0),),
    counts=(("n_routed_experts",),),
    tables=(r"ffn\.gate\.tid2eid",),
)
LING = replace(V2, counts=(("num_experts",),))
LING2 = replace(LING, sliced=((r"mlp\.gate\.(weight|expert_bias)", 0),))
LAYOUTS = {
    "deepseek_v2": V2,
    "deepseek_v2_lite": V2,
    "deepseek_v32": replace(V3, counts=(("n_routed_experts",), ("num_local_experts",))),
    "deepseek_v4": V4,
    "deepseek_v4_vision": V4,
    "dots1": V3,
    "glm4_moe": V3,
    "glm4_moe_lite": V3,
    "glm_moe_dsa": V3,
    "mimo_v2_flash": V3,
    "mimo_v2_omni": V3,
    "bailing_hybrid": LING2,
    "bailing_hybrid_vision": replace(LING2, counts=(("text_config", "num_experts"),)),
    "bailing_moe": LING,
    "bailing_moe_v2": LING2,
    "kimi_k3": Layout(
        layers=r"language_model\.model\.layers\.(\d+)\.",
        experts=r"block_sparse_moe\.experts\.(\d+)\.w[123]\.weight_(?:packed|scale)$",
        sliced=((r"block_sparse_moe\.gate\.(weight|e_score_correction_bias)", 0),),
        counts=(("text_config", "num_experts"),),
    ),
}
MAIN_LAYERS = 3
# Layer 0 is dense but in these; layer 3 is the MTP layer.
FIRST_SPARSE = {"deepseek_v4": 0, "deepseek_v4_vision": 0, "bailing_moe": 0}
WITH_MTP = {
    "deepseek_v32",
    "deepseek_v4",
    "deepseek_v4_vision",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "bailing_hybrid",
    "bailing_hybrid_vision",
    "kimi_k3",
}
# What transformers drops: MTP layers.
UNREAD = r"mtp\.|model\.mtp\.|model\.layers\.3\."
SIGMOID = [
    "deepseek_v32",
    "dots1",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mimo_v2_flash",
    "bailing_hybrid",
]

Pairs = Callable[[str], Pair]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Each family by name, built and pruned once."""
    built: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in built:
            built[name] = build_and_prune(name, BUILDERS[name], tmp_path_factory.mktemp(name))
        return built[name]

    return pair


every_family = pytest.mark.parametrize("name", list(BUILDERS))


@every_family
def test_every_tensor_is_the_sources_renumbered_or_sliced(name: str, pairs: Pairs) -> None:
    assert_tensors_follow(pairs(name), LAYOUTS[name], MAIN_LAYERS)


@every_family
def test_every_layer_with_experts_is_pruned_mtp_layers_too(name: str, pairs: Pairs) -> None:
    layers = range(FIRST_SPARSE.get(name, 1), MAIN_LAYERS + (name in WITH_MTP))
    assert list(pairs(name).retained) == list(layers)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "deepseek_v4_vision"])
def test_the_count_is_rewritten_and_nothing_else_in_the_config(name: str, pairs: Pairs) -> None:
    assert_config_follows(pairs(name), LAYOUTS[name])


def test_lists_that_name_experts_of_a_numbered_mtp_layer_follow_them(pairs: Pairs) -> None:
    pair = pairs("deepseek_v4_vision")
    expected = read_config(pair.source) | {"n_routed_experts": 4}
    # Expert 6 of the MTP layer (layer 3) and expert 1 of layer 2, where they survived.
    expected["quantization_config"]["modules_to_not_convert"] = [
        f"{stem}.ffn.experts.{pair.retained[layer].index(old)}.{projection}"
        for stem, layer, old, projection in (("mtp.0", 3, 6, "w1"), ("layers.2", 2, 1, "w2"))
        if old in pair.retained[layer]
    ]
    assert read_config(pair.folder) == expected


@every_family
def test_survivors_keep_their_router_logits(name: str, pairs: Pairs) -> None:
    pair, layout = pairs(name), LAYOUTS[name]
    before, after = read_tensors(pair.source), read_tensors(pair.folder)
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(3))
    routers = [tensor for tensor in before if re.search(r"(mlp|ffn|moe)\.gate\.weight$", tensor)]
    assert len(routers) == len(pair.retained)
    for router in routers:
        own = layout.mtp and re.match(layout.mtp, router)
        match = own or re.match(layout.layers, router)
        assert match
        keep = pair.retained[int(match[1]) + (MAIN_LAYERS if own else 0)]
        old, new = (
            torch.stack([row.float() @ hidden for row in model[router]])
            for model in (before, after)
        )
        assert torch.equal(new, old[keep])


@pytest.mark.parametrize("name", SIGMOID)
def test_a_pruned_model_is_the_original_that_cannot_choose_the_pruned_experts(
    name: str, pairs: Pairs
) -> None:
    pair = pairs(name)
    assert_same_answers(pair.source, pair.folder, pair.retained, exact=True)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite"])
def test_a_softmax_that_is_not_renormalised_becomes_one_over_the_survivors(
    name: str, pairs: Pairs
) -> None:
    pair = pairs(name)
    assert_same_answers(pair.source, pair.folder, pair.retained, exact=False)


def test_without_renormalising_a_survivors_weight_grows_by_the_share_of_the_pruned(
    pairs: Pairs,
) -> None:
    pair = pairs("deepseek_v2_lite")
    result = logits(load(pair.folder))
    grown = logits(load(pair.source), pair.retained, relation=True)
    assert_equal_but_for_rounding(result, grown, pair.source)


def test_ling_2_runs_as_glm_with_the_same_router(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("bailing_moe_v2")
    source, pruned = (
        _as_glm(folder, tmp_path / folder.name) for folder in (pair.source, pair.folder)
    )
    assert_same_answers(source, pruned, pair.retained, exact=True)


def test_tokens_of_pruned_experts_go_to_the_survivors_of_the_rule(pairs: Pairs) -> None:
    pair = pairs("deepseek_v4")
    source, pruned = load(pair.source, unread=UNREAD), load(pair.folder, unread=UNREAD)
    with _fixed_hash_routers(source), _fixed_hash_routers(pruned):
        original = logits(source)
        result = logits(pruned)
        table = source.model.layers[0].mlp.gate.tid2eid
        keep = pair.retained[0]
        table.copy_(torch.tensor(keep)[renumbered_table(table, keep)])
        masked = logits(source, pair.retained)
    assert torch.equal(result, masked)
    assert (result - original).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v4_vision"])
def test_a_row_of_a_token_table_names_different_survivors(name: str, pairs: Pairs) -> None:
    pair = pairs(name)
    stem = "layers.0.ffn.gate.tid2eid"
    before, after = (read_tensors(folder)[stem] for folder in (pair.source, pair.folder))
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert all(len(set(row)) == len(row) for row in after.tolist())
    assert 0 <= int(after.min()) <= int(after.max()) < 4


def test_the_report_names_the_tables_that_change(tmp_path: Path, pairs: Pairs) -> None:
    source = pairs("deepseek_v4").source
    pruning = api.plan(source, source / "scores.pt", ratio=0.5, out=tmp_path / "out")
    notes = [note for note in pruning.report.notes if "tid2eid" in note]
    assert len(notes) == 1


@pytest.mark.parametrize("name", [*SIGMOID, "deepseek_v2", "deepseek_v4"])
def test_a_re_save_by_transformers_is_read_as_the_same_layers(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs(name)
    load(pair.source, unread=UNREAD).save_pretrained(tmp_path / "saved")
    pruning = api.plan(tmp_path / "saved", pair.source / "scores.pt", ratio=0.5)
    kept = {number: list(layer.retained) for number, layer in pruning.decision.keep.layers.items()}
    # The MTP layer is not in a re-save.
    assert kept == {number: ids for number, ids in pair.retained.items() if number < MAIN_LAYERS}


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("deepseek_v4", r"mtp\."),
        ("glm4_moe", r"model\.layers\.3\."),
        ("bailing_hybrid", r"model\.layers\.3\."),
        ("kimi_k3", r"language_model\.model\.layers\.3\."),
        ("mimo_v2_flash", r"model\.mtp\."),
    ],
)
def test_dropped_mtp_layers_leave_no_tensor_and_no_count(
    name: str, mtp: str, tmp_path: Path
) -> None:
    pair = build_and_prune(name, BUILDERS[name], tmp_path, "--ratio", "0.5", "--mtp", "drop")
    before, after = read_tensors(pair.source), read_tensors(pair.folder)
    gone = {stem for stem in before if re.match(mtp, stem)}
    assert gone
    assert not [stem for stem in after if re.match(mtp, stem)]
    beside = {stem for stem in before if ".experts." not in stem} - gone
    assert beside <= after.keys()
    config = read_config(pair.folder)
    assert not config.get("text_config", config).get("num_nextn_predict_layers")


def test_a_group_scored_by_its_best_expert_may_keep_one(pairs: Pairs, tmp_path: Path) -> None:
    pair = build_and_prune("v2", BUILDERS["deepseek_v2"], tmp_path, "--keep", "4")
    assert all([old // 4 for old in ids] == [0, 1, 2, 3] for ids in pair.retained.values())
    assert_same_answers(pair.source, pair.folder, pair.retained, exact=False)
    # V3.2 scores a group by its best two.
    source = pairs("deepseek_v32").source
    with pytest.raises(UsageError, match="scores a group by its best 2"):
        api.plan(source, source / "scores.pt", keep=4)


def assert_same_answers(source: Path, pruned: Path, retained: Kept, *, exact: bool) -> None:
    """The pruned model answers as the original whose routers cannot choose pruned experts."""
    original = load(source, unread=UNREAD)
    result = logits(load(pruned, unread=UNREAD))
    masked = logits(original, retained)
    if exact:
        assert torch.equal(result, masked)
    else:
        assert_equal_but_for_rounding(result, masked, source)
    # Without the mask they must differ, or the equality above proves nothing.
    assert (result - logits(original)).abs().max() > 1e-2


@contextmanager
def _fixed_hash_routers(model: Any) -> Iterator[None]:
    """V4's table routers with the summation order of their product fixed, row by row."""

    def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.mv(hidden, row) for row in weight], dim=-1)

    def fixed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with mock.patch.object(functional, "linear", linear):
                return forward(*arguments)

        return run

    found = [m for m in model.modules() if type(m).__name__ == "DeepseekV4HashRouter"]
    assert len(found) == 1
    for router in found:
        router.forward = fixed(router.forward)
    yield
    for router in found:
        del router.forward


def _as_glm(folder: Path, copy: Path) -> Path:
    """Ling 2 under the names and keys of GLM-4.5, whose arithmetic it shares."""
    config = read_config(folder) | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_shared_experts": 1,
    }
    config["n_routed_experts"] = config.pop("num_experts")
    q, kv = (config[key] * 16 for key in ("num_attention_heads", "num_key_value_heads"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(folder).items():
        name = name.replace("word_embeddings", "embed_tokens").replace("attention.", "self_attn.")
        name = name.replace("post_self_attn.", "post_attention.").replace(".dense.", ".o_proj.")
        name = re.sub(r"(query|key)_layernorm", lambda found: f"{found[1][0]}_norm", name)
        name = name.replace("gate.expert_bias", "gate.e_score_correction_bias")
        if "query_key_value" in name:
            for letter, part in zip("qkv", torch.split(tensor, [q, kv, kv]), strict=True):
                tensors[name.replace("query_key_value", f"{letter}_proj")] = part.contiguous()
        else:
            tensors[name] = tensor
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
