"""config.json after a prune: the counts are new, quantization lists follow, the rest stays."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import ConfigError
from shardsurgeon.families.schema import parse_family
from shardsurgeon.pruning.config_edits import (
    pruned_config,
    quantization_name,
    side_file_quantization,
    stale_counts,
)
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from tests.support import tiny

# Layer 1 keeps 0, 2, 5; layer 2 keeps 1, 2, 3; the MTP layer 3 keeps 5, 6, 7.
RETAINED = {1: (0, 2, 5), 2: (1, 2, 3), 3: (5, 6, 7)}
KEEP = KeepList(
    8,
    {
        layer: LayerKeep(ids, tuple(sorted(set(range(8)) - set(ids))))
        for layer, ids in RETAINED.items()
    },
)
EXPERT = "model.layers.{}.mlp.experts.{}.up_proj"


def pruned(text: str, drop_mtp: bool = False) -> str:
    files = {**tiny.files(), "config.json": text.encode()}
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    anatomy = read_anatomy(checkpoint)
    return pruned_config(checkpoint, anatomy, KEEP, drop_mtp=drop_mtp).decode()


def quantized(entries: object) -> object:
    section = {"quant_method": "compressed-tensors", "ignore": entries}
    text = json.dumps(tiny.config(quantization_config=section))
    return json.loads(pruned(text))["quantization_config"]["ignore"]


def test_every_spelling_of_the_count_is_rewritten_and_no_other_byte() -> None:
    text = json.dumps(tiny.config(num_local_experts=8, rms_norm_eps=0.5, vocab_size=8), indent=4)
    text = text.replace("0.5", "1.0e-06") + "\n\n"
    wanted = text.replace('"n_routed_experts": 8', '"n_routed_experts": 3')
    wanted = wanted.replace('"num_local_experts": 8', '"num_local_experts": 3')
    assert pruned(text) == wanted
    assert "1.0e-06" in wanted and '"vocab_size": 8' in wanted


def test_the_mtp_count_goes_to_zero_only_when_the_layers_go() -> None:
    text = json.dumps(tiny.config())
    assert json.loads(pruned(text))["num_nextn_predict_layers"] == 1
    assert json.loads(pruned(text, drop_mtp=True))["num_nextn_predict_layers"] == 0


def test_entries_of_survivors_are_renumbered_and_those_of_the_pruned_dropped() -> None:
    entries = ["lm_head", EXPERT.format(1, 5), EXPERT.format(1, 1), EXPERT.format(2, 1)]
    assert quantized(entries) == ["lm_head", EXPERT.format(1, 2), EXPERT.format(2, 0)]


def test_patterns_that_name_an_expert_are_renumbered_and_wildcards_stay() -> None:
    entries = [
        r"re:model\.layers\.1\.mlp\.experts\.5\..*",
        r"re:.*mlp\.experts\.\d+\.up_proj",
        r"re:.*mlp\.experts\.[0-9]+\.up_proj",
        "re:.*self_attn.*",
        "model.layers.*.mlp.experts.*",
    ]
    assert quantized(entries) == [r"re:model\.layers\.1\.mlp\.experts\.2\..*", *entries[1:]]


def test_a_count_that_no_rule_knows_is_refused_with_its_path() -> None:
    text = json.dumps(tiny.config(router={"experts_in_router": 8}))
    with pytest.raises(ConfigError, match=r"router\.experts_in_router is 8"):
        pruned(text)


def test_a_count_inside_a_list_is_not_forgotten_either() -> None:
    text = json.dumps(tiny.config(blocks=[{"kind": "dense"}, {"experts_in_block": 8}]))
    with pytest.raises(ConfigError, match=r"blocks\.1\.experts_in_block is 8"):
        pruned(text)


def test_sizes_that_happen_to_equal_the_count_stay() -> None:
    text = json.dumps(tiny.config(moe_intermediate_size=8, shared_expert_intermediate_size=8))
    assert json.loads(pruned(text))["moe_intermediate_size"] == 8


def test_the_quantization_is_named_in_a_few_words() -> None:
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert quantization_name({"text_config": {"quantization_config": section}}) == (
        "compressed-tensors pack-quantized"
    )
    assert quantization_name({"quantization_config": {"quant_method": "fp8"}}) == "fp8"
    assert quantization_name({"quantization_config": {"bits": 4}}) == "unnamed"
    assert quantization_name({"quantization": {"bits": 4, "group_size": 64}}) == "mlx"
    assert quantization_name({"quantization": {"bits": 4, "mode": "mxfp4"}}) == "mlx mxfp4"
    assert quantization_name({"model_type": "x"}) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
            "modelopt NVFP4",
        ),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt FP8"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": None}}, None),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq 4 bits"),
        ("quant_config.json", {"zero_point": True, "w_bit": 4, "q_group_size": 128}, "awq 4 bits"),
        (
            "quantization_config.json",
            {"quant_method": "auto-round", "bits": 4},
            "auto-round 4 bits",
        ),
        ("quantization_config.json", {"quant_method": "fp8"}, "fp8"),
        ("quant_config.json", {"x": 1}, None),
        ("quant_config.json", [1], None),
        ("hf_quant_config.json", {"quantization": "none"}, None),
    ],
)
def test_the_quantization_is_named_from_a_side_file(
    name: str, content: object, said: str | None
) -> None:
    assert side_file_quantization(name, content) == said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("inference/config.json", '{"n_routed_experts": 8}', "n_routed_experts 8, the number"),
        ("a/b/params.json", '{"moe": [{"num_experts": 8}]}', "moe.0.num_experts 8, the number"),
        ("inference/config.json", '{"n_routed_experts": 9, "n_layers": 8}', ""),
        ("inference/config.json", '{"n_routed_experts": "8", "expert_dim": 8}', ""),
        ("inference/config.json", "{oops", ""),
        ("inference/readme.json", '{"n_routed_experts": 8}', ""),
        ("other.json", '{"n_routed_experts": 8}', ""),
        # Too large for a config.
        ("inference/config.json", '{"n_routed_experts": 8}' + " " * (1 << 20), ""),
    ],
)
def test_a_config_of_another_program_that_keeps_the_old_count_is_told_of(
    name: str, content: str, said: str
) -> None:
    files = {**tiny.files(), name: content.encode()}
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    notes = stale_counts(checkpoint, read_anatomy(checkpoint), [name])
    assert [note.startswith(f"{name} is copied as it is and says {said}") for note in notes] == (
        [True] if said else []
    )


@pytest.mark.parametrize(
    ("before", "mtp", "after"), [(0, 5, 0), (0, 3, 3), (8, 5, 5), (8, 3, 3), (8, None, 8)]
)
def test_an_mtp_count_of_its_own_says_what_is_left_and_0_as_many_as_the_largest_layer(
    before: int, mtp: int | None, after: int
) -> None:
    text = 'like = "deepseek_v3"\n[config]\nmtp_num_experts = ["n_mtp_experts"]\n'
    content = tiny.config(n_mtp_experts=before)
    source = tiny.MemorySource(tiny.files(content), name="tiny")
    checkpoint = replace(open_checkpoint(source), family=parse_family(text, "own.toml"))
    counts = {1: 3, 2: 5} | ({} if mtp is None else {3: mtp})
    keep = {
        layer: LayerKeep(tuple(range(count)), tuple(range(count, 8)))
        for layer, count in counts.items()
    }
    anatomy = read_anatomy(checkpoint)
    raw = pruned_config(checkpoint, anatomy, KeepList(8, keep), drop_mtp=mtp is None)
    assert json.loads(raw)["n_mtp_experts"] == after
