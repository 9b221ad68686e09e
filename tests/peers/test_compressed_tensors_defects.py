"""Where compressed-tensors' expert pruner writes a model that is wrong, and ours is not.

Each test runs both on one checkpoint. It shows the defect in theirs, so that it falls when a
later version mends it, and the right result in ours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import shardsurgeon
from shardsurgeon.errors import KeepListError
from tests.families.specimens import fixture, written
from tests.oracle.byte_oracle import read_config, read_tensors, same_bits
from tests.peers.magnitude_pruner import (
    GEMMA,
    HUNYUAN,
    MIXER,
    MLP,
    ROUTER,
    SPARSE,
    STEP,
    Patterns,
    differing,
    groups_of,
    layer_numbers,
    ours,
    pruner,
    report,
    scored,
    theirs,
    told_of,
)

pytestmark = pytest.mark.oracle

# Per-expert vectors that its default pattern does not find, by the end of their names.
LEFT_WHOLE = {
    "kimi_linear": (SPARSE, "gate.e_score_correction_bias"),
    "kimi_k3": (SPARSE, "gate.e_score_correction_bias"),
    "minimax_m2": (SPARSE, "block_sparse_moe.e_score_correction_bias"),
    "minimax_m3": (SPARSE, "block_sparse_moe.e_score_correction_bias"),
    "ernie4_5_moe": (MLP, "moe_statics.e_score_correction_bias"),
    "gemma4": (GEMMA, "router.per_expert_scale"),
    "step3p5": (STEP, "moe.router_bias"),
}


@pytest.mark.parametrize("name", LEFT_WHOLE)
def test_it_leaves_vectors_whole_that_its_pattern_does_not_find(name: str, tmp_path: Path) -> None:
    patterns, ending = LEFT_WHOLE[name]
    source = written(fixture(name), tmp_path)
    their = pruner(source, patterns)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    before, left, cut = read_tensors(source), read_tensors(other), read_tensors(mine)
    wrong = differing(mine, other)
    assert wrong == sorted(tensor for tensor in before if tensor.endswith(ending)) != []
    for tensor in wrong:
        assert same_bits(left[tensor], before[tensor])
        assert cut[tensor].numel() == before[tensor].numel() // 2


def test_it_cannot_slice_a_bias_whose_experts_are_in_dimension_1(tmp_path: Path) -> None:
    source = written(fixture("ernie4_5_moe"), tmp_path)
    their = pruner(source, told_of(MLP, r"moe_statics\.e_score_correction_bias$"))
    with pytest.raises((IndexError, ValueError)):
        theirs(source, their)
    before, cut = read_tensors(source), read_tensors(ours(source, their.retained_experts))
    for router, ids in their.retained_experts.items():
        bias = router.replace("gate.weight", "moe_statics.e_score_correction_bias")
        assert same_bits(cut[bias], before[bias][:, ids])


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("deepseek_v3", MLP),
        ("deepseek_v2", MLP),
        ("bailing_moe_v2", told_of(MLP, r"expert_bias$")),
        ("nemotron_h", told_of(MIXER, r"e_score_correction_bias$")),
    ],
)
def test_it_prunes_groups_unequally(name: str, patterns: Patterns, tmp_path: Path) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, patterns)
    groups, numbers = groups_of(source), layer_numbers(source)
    experts = 2 * len(next(iter(their.retained_experts.values())))

    def per_group(ids: list[int]) -> set[int]:
        size = experts // groups
        return {sum(expert // size == group for expert in ids) for group in range(groups)}

    assert any(len(per_group(ids)) > 1 for ids in their.retained_experts.values())
    theirs(source, their)  # and nothing stops it
    mine = scored(source)
    assert {numbers[router] for router in their.retained_experts} == mine.keys()
    assert all(per_group(ids) == {experts // groups // 2} for ids in mine.values())
    with pytest.raises(KeepListError, match="of group"):
        shardsurgeon.plan(source, plan_file=report(their.retained_experts, tmp_path))


def test_it_deletes_the_quantization_of_fp8_checkpoints(tmp_path: Path) -> None:
    source = written(fixture("kimi_k2"), tmp_path)
    their = pruner(source, MLP)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in read_tensors(other).values()}
    assert "quantization_config" not in read_config(other)
    before = read_config(source)["quantization_config"]
    assert before["quant_method"] == "fp8"
    assert read_config(mine)["quantization_config"] == before


def test_it_deletes_the_quantization_of_mxfp4_checkpoints(tmp_path: Path) -> None:
    source = written(fixture("gpt_oss"), tmp_path)
    # It looks at the first expert tensor of the index only, which is a bias [E, hidden] here.
    with pytest.raises(ValueError, match="down_proj_bias appears to be 2D"):
        pruner(source, ROUTER)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shapes = {name: len(tensor.shape) for name, tensor in read_tensors(source).items()}
    deepest_first = sorted(content["weight_map"], key=lambda name: -shapes[name])
    content["weight_map"] = {name: content["weight_map"][name] for name in deepest_first}
    index.write_text(json.dumps(content))
    their = pruner(source, ROUTER)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert differing(mine, other) == []
    assert "quantization_config" not in read_config(other)
    before = read_config(source)["quantization_config"]
    assert before["quant_method"] == "mxfp4"
    assert read_config(mine)["quantization_config"] == before


def test_it_leaves_quantization_lists_that_name_experts_by_number(tmp_path: Path) -> None:
    source = written(fixture("step3p5_quantized"), tmp_path)
    their = pruner(source, told_of(STEP, r"moe\.router_bias$"))
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    stem = "model.layers.2.moe.experts."
    kept = their.retained_experts["model.layers.2.moe.gate.weight"]
    numbered = [
        [entry for entry in read_config(folder)["quantization_config"]["ignore"] if stem in entry]
        for folder in (source, other, mine)
    ]
    assert numbered[0] == numbered[1] == [f"{stem}7.up_proj"]
    assert numbered[2] == ([f"{stem}{kept.index(7)}.up_proj"] if 7 in kept else [])
    assert numbered[2] != numbered[1]


def test_it_slices_the_rows_of_mtp_experts_where_the_others_are_stacked(tmp_path: Path) -> None:
    """The published Qwen3.5: stacked experts, and an MTP layer with a tensor for each."""
    source = written(fixture("qwen3_5_moe"), tmp_path)
    their = pruner(source, MLP)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    before, wrong, cut = read_tensors(source), read_tensors(other), read_tensors(mine)
    kept = their.retained_experts["mtp.layers.0.mlp.gate.weight"]
    stem = "mtp.layers.0.mlp.experts."
    assert differing(mine, other) == sorted(name for name in before if name.startswith(stem))
    assert wrong[f"{stem}0.down_proj.weight"].shape[0] == len(kept)
    assert f"{stem}15.down_proj.weight" in wrong
    for new, old in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{stem}{new}.{part}.weight"
            assert same_bits(cut[name], before[f"{stem}{old}.{part}.weight"])
    assert f"{stem}{len(kept)}.up_proj.weight" not in cut


def test_it_leaves_tables_of_expert_ids_as_they_are(tmp_path: Path) -> None:
    source = written(fixture("deepseek_v4"), tmp_path)
    their = pruner(source, Patterns(r"ffn\.gate\.weight$", r"ffn\.experts\."))
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    table = "layers.0.ffn.gate.tid2eid"
    assert differing(mine, other) == [table]
    left = len(their.retained_experts["layers.0.ffn.gate.weight"])
    assert read_tensors(other)[table].max() >= left  # ids that no expert has any more
    assert read_tensors(mine)[table].max() < left


def test_it_takes_the_rows_of_identity_experts_for_experts(tmp_path: Path) -> None:
    source = written(fixture("longcat_flash"), tmp_path)
    their = pruner(source, Patterns(r"router\.classifier\.weight$", r"\.mlp\.experts\."))
    config = read_config(source)
    experts, identity = config["n_routed_experts"], config["zero_expert_num"]
    assert any(max(ids) >= experts for ids in their.retained_experts.values())
    with pytest.raises(KeepListError, match=f"the model has {experts}"):
        ours(source, their.retained_experts)
    count = {len(ids) for ids in their.retained_experts.values()}
    assert count == {(experts + identity) // 2}
    assert read_config(theirs(source, their))["n_routed_experts"] == count.pop()
    assert all(max(ids) < experts for ids in scored(source).values())


def test_it_rewrites_one_spelling_of_the_count(tmp_path: Path) -> None:
    plain = fixture("qwen3_moe")
    made = replace(plain, config={**plain.config, "num_local_experts": 16})
    source = written(made, tmp_path)
    their = pruner(source, MLP)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    counts = [
        (config["num_experts"], config["num_local_experts"])
        for config in map(read_config, (other, mine))
    ]
    assert counts == [(8, 16), (8, 8)]


@pytest.mark.parametrize(
    ("name", "patterns", "key"),
    [
        ("hunyuan_v1_moe_lists", HUNYUAN, "num_experts"),
        ("ernie4_5_moe_remote", MLP, "moe_capacity"),
    ],
)
def test_it_leaves_lists_of_counts_or_makes_numbers_of_them(
    name: str, patterns: Patterns, key: str, tmp_path: Path
) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, patterns)
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    before, wrong, right = (read_config(folder)[key] for folder in (source, other, mine))
    assert wrong in (before, before[0] // 2)
    assert right == [before[0] // 2] * len(before)


def test_it_does_not_find_counts_that_lie_deeper(tmp_path: Path) -> None:
    source = written(fixture("qwen3_omni_moe"), tmp_path)
    patterns = Patterns(r"^thinker\..*\.mlp\.gate\.weight$", r"^thinker\..*\.mlp\.experts\.")
    with pytest.raises(ValueError, match="Could not find any of"):
        pruner(source, patterns)
    their = pruner(source, patterns, key="num_experts")
    mine, other = ours(source, their.retained_experts), theirs(source, their)
    assert differing(mine, other) == []
    experts = [
        config["thinker_config"]["text_config"]["num_experts"]
        for config in map(read_config, (source, other, mine))
    ]
    assert experts[0] == experts[1] == 2 * experts[2]


@pytest.mark.parametrize(
    ("name", "patterns", "error"),
    [
        # One-byte scales of powers of two, and scales that are one number for all experts.
        ("deepseek_v4_vision", Patterns(r"ffn\.gate\.weight$", r"ffn\.experts\."), KeyError),
        ("llama4_fp8", ROUTER, IndexError),
    ],
)
def test_it_stops_at_layouts_that_it_does_not_know(
    name: str, patterns: Patterns, error: type[Exception], tmp_path: Path
) -> None:
    source = written(fixture(name), tmp_path)
    their = pruner(source, patterns)
    with pytest.raises(error):
        theirs(source, their)
    numbers, before = layer_numbers(source), read_tensors(source)
    cut = read_tensors(ours(source, their.retained_experts))
    for router, ids in their.retained_experts.items():
        assert router in numbers
        assert same_bits(cut[router], before[router][ids])


def test_it_loses_the_metadata_of_the_shards(tmp_path: Path) -> None:
    """`format`, which tells loaders what library the tensors are for."""
    source = written(fixture("qwen3_moe"), tmp_path)
    their = pruner(source, MLP)
    said = []
    for folder in (theirs(source, their), ours(source, their.retained_experts)):
        found = []
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as shard:
                found.append(shard.metadata())
        said.append(found)
    assert said == [[None] * 3, [{"format": "pt"}] * 3]
