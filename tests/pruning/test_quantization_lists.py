"""Quantization lists after a prune, as each tool writes them, and for lists drawn at random."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.config_edits import (
    QuantizationLists,
    pruned_config,
    pruned_quantization_file,
)
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.storage.formats.json_edit import Document
from tests.support import tiny

EXPERTS = 14
# Layer 0 is dense; layer 3 is the MTP layer.
RETAINED: dict[int, tuple[int, ...]] = {1: (0, 1, 5, 12), 2: (1, 2, 3, 13), 3: (4, 5, 6, 7)}
NAME = "model.layers.{}.mlp.experts.{}.{}"


def keep_list(retained: dict[int, tuple[int, ...]]) -> KeepList:
    everyone = set(range(EXPERTS))
    return KeepList(
        EXPERTS,
        {n: LayerKeep(ids, tuple(sorted(everyone - set(ids)))) for n, ids in retained.items()},
    )


def weights() -> tiny.Tensors:
    """DeepSeek-V3's names with more experts than digits, each a number or two."""
    found: tiny.Tensors = {"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2), "f4")}
    for layer in (1, 2, 3):
        prefix = f"model.layers.{layer}.mlp"
        found[f"{prefix}.gate.weight"] = np.zeros((EXPERTS, 2), "f4")
        found[f"{prefix}.gate.e_score_correction_bias"] = np.zeros(EXPERTS, "f4")
        for expert in range(EXPERTS):
            found[f"{prefix}.experts.{expert}.up_proj.weight"] = np.zeros((1, 2), "f4")
    return found


def config_of(section: object, **more: object) -> dict[str, object]:
    return tiny.config(n_routed_experts=EXPERTS, quantization_config=section, **more)


FILES = tiny.files(config_of({}), weights())


def anatomy_of(files: dict[str, bytes]) -> Anatomy:
    return read_anatomy(open_checkpoint(tiny.MemorySource(files, name="tiny")))


def pruned(
    section: object, retained: dict[int, tuple[int, ...]] = RETAINED, drop_mtp: bool = False
) -> Any:
    """The quantization section after a prune."""
    files = {**FILES, "config.json": json.dumps(config_of(section)).encode()}
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    keep = keep_list({n: ids for n, ids in retained.items() if n != 3 or not drop_mtp})
    result = pruned_config(checkpoint, read_anatomy(checkpoint), keep, drop_mtp=drop_mtp)
    return json.loads(result)["quantization_config"]


def test_compressed_tensors_ignore_and_targets_follow() -> None:
    section = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear", NAME.format(1, 12, "up_proj"), NAME.format(1, 2, "up_proj")],
                "weights": {"num_bits": 4, "group_size": 14},
            }
        },
        "ignore": ["lm_head", r"re:model\.layers\.2\.mlp\.experts\.13\..*", "re:.*experts.*gate"],
        "quant_method": "compressed-tensors",
    }
    after = pruned(section)
    assert after["config_groups"]["group_0"] == {
        "targets": ["Linear", NAME.format(1, 3, "up_proj")],
        "weights": {"num_bits": 4, "group_size": 14},
    }
    assert after["ignore"] == [
        "lm_head",
        r"re:model\.layers\.2\.mlp\.experts\.3\..*",
        "re:.*experts.*gate",
    ]


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_fp8_exclusions_follow_and_block_sizes_stay(key: str) -> None:
    entries = [NAME.format(2, expert, "down_proj") for expert in range(EXPERTS)]
    section = {key: ["lm_head", *entries], "quant_method": "fp8", "weight_block_size": [14, 14]}
    assert pruned(section) == {
        key: ["lm_head", *(NAME.format(2, new, "down_proj") for new in range(4))],
        "quant_method": "fp8",
        "weight_block_size": [14, 14],
    }


def test_modelopts_lists_follow_in_both_files() -> None:
    excluded = ["model.layers.1*", NAME.format(3, 7, "*"), NAME.format(3, 0, "*"), "lm_head"]
    followed = ["model.layers.1*", NAME.format(3, 3, "*"), "lm_head"]
    layers = {NAME.format(1, 5, "up_proj"): {"quant_algo": "NVFP4"}}
    assert pruned({"ignore": excluded, "quant_method": "modelopt"})["ignore"] == followed
    document = {
        "producer": {"name": "modelopt"},
        "quantization": {"exclude_modules": excluded, "quantized_layers": layers},
    }
    raw = json.dumps(document, indent=4).encode()
    checkpoint = open_checkpoint(tiny.MemorySource(FILES, name="tiny"))
    result = pruned_quantization_file(
        "hf_quant_config.json",
        Document.parse(raw, "f"),
        checkpoint,
        read_anatomy(checkpoint),
        keep_list(RETAINED),
        drop_mtp=False,
    )
    assert json.loads(result)["quantization"] == {
        "exclude_modules": followed,
        "quantized_layers": {NAME.format(1, 2, "up_proj"): {"quant_algo": "NVFP4"}},
    }


def test_awqs_names_without_a_trailing_dot_follow() -> None:
    section = {
        "modules_to_not_convert": [
            "model.layers.1.mlp.experts.1",
            "model.layers.1.mlp.experts.12",
            "model.layers.1.mlp.experts.2",
            "gate",
        ],
        "quant_method": "awq",
    }
    assert pruned(section)["modules_to_not_convert"] == [
        "model.layers.1.mlp.experts.1",
        "model.layers.1.mlp.experts.3",
        "gate",
    ]


def test_gptqs_patterns_keep_their_order_marks_and_values() -> None:
    section = {
        "bits": 4,
        "dynamic": {
            r"+:model\.layers\.1\.mlp\.experts\.12\..*": {"bits": 8},
            r"-:model\.layers\.1\.mlp\.experts\.5\.": {},
            r"-:model\.layers\.1\.mlp\.experts\.2\.": {},
            r"+:model\.layers\.2\.mlp\.experts\.2$": {"bits": 3},
            r"-:.*experts\.\d+\.up_proj": {},
            r"+:.*\.(?:1[0-5])\.self_attn\..*": {"bits": 6},
        },
        "quant_method": "gptq",
    }
    assert list(pruned(section)["dynamic"].items()) == [
        (r"+:model\.layers\.1\.mlp\.experts\.3\..*", {"bits": 8}),
        (r"-:model\.layers\.1\.mlp\.experts\.2\.", {}),
        (r"+:model\.layers\.2\.mlp\.experts\.1$", {"bits": 3}),
        (r"-:.*experts\.\d+\.up_proj", {}),
        (r"+:.*\.(?:1[0-5])\.self_attn\..*", {"bits": 6}),
    ]


def test_autorounds_keys_move_onto_one_another_without_colliding() -> None:
    overrides = {NAME.format(2, expert, "up_proj"): {"bits": expert} for expert in range(EXPERTS)}
    section = {
        "extra_config": {**overrides, ".*gate.*": {"bits": 16}},
        "quant_method": "auto-round",
    }
    assert list(pruned(section)["extra_config"].items()) == [
        (NAME.format(2, 0, "up_proj"), {"bits": 1}),
        (NAME.format(2, 1, "up_proj"), {"bits": 2}),
        (NAME.format(2, 2, "up_proj"), {"bits": 3}),
        (NAME.format(2, 3, "up_proj"), {"bits": 13}),
        (".*gate.*", {"bits": 16}),
    ]


def test_lists_inside_lists_and_objects_follow() -> None:
    section = {"a": [[NAME.format(1, 5, "w1"), ["x", NAME.format(1, 4, "w1")]], {"b": {"c": []}}]}
    assert pruned(section) == {"a": [[NAME.format(1, 2, "w1"), ["x"]], {"b": {"c": []}}]}


def test_other_prefixes_than_the_tensors_mean_the_same_layers() -> None:
    entries = [
        "language_model.model.layers.1.mlp.experts.5.up_proj",
        "layers.1.mlp.experts.5.up_proj",
        "model.language_model.layers.1.mlp.experts.3.up_proj",
    ]
    assert pruned({"ignore": entries})["ignore"] == [
        "language_model.model.layers.1.mlp.experts.2.up_proj",
        "layers.1.mlp.experts.2.up_proj",
    ]


def test_entries_of_a_dropped_mtp_layer_and_of_a_dense_layer_go() -> None:
    entries = [NAME.format(3, 4, "up_proj"), NAME.format(0, 1, "w1"), "model.layers.3.mlp.gate"]
    assert pruned({"ignore": entries}, drop_mtp=True)["ignore"] == []
    assert pruned({"ignore": entries})["ignore"] == [
        NAME.format(3, 0, "up_proj"),
        "model.layers.3.mlp.gate",
    ]


def test_names_inside_a_layer_stay_true_when_they_name_all_experts() -> None:
    # GPTQ's modules_in_block_to_quantize: the same for every layer, so all experts or none.
    block = [f"mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)]
    section = {"modules_in_block_to_quantize": [["self_attn.q_proj"], block]}
    assert pruned(section)["modules_in_block_to_quantize"] == [["self_attn.q_proj"], block[:4]]
    with pytest.raises(ConfigError, match="names expert 0 of no single layer"):
        pruned({"modules_in_block_to_quantize": [block[:-1]]})
    differing = {name: {"bits": 4 + (number == 3)} for number, name in enumerate(block)}
    with pytest.raises(ConfigError, match="of no single layer"):
        pruned({"extra_config": differing})


def test_names_inside_a_layer_follow_where_every_layer_keeps_the_same() -> None:
    retained = dict.fromkeys((1, 2, 3), (1, 2, 5, 9))
    after = pruned({"ignore": ["mlp.experts.5.up_proj", "mlp.experts.4.up_proj"]}, retained)
    assert after["ignore"] == ["mlp.experts.2.up_proj"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"dynamic": {r"-:model\.layers\.1\.mlp\.experts\.(5|6)\.": {}}}, "several experts"),
        ({"extra_config": {r".*\.experts\.5\..*": {"bits": 8}}}, "of no single layer"),
        ({"ignore": ["model.layers.1.mlp.experts.05.up_proj"]}, "several experts"),
        ({"only": NAME.format(1, 2, "up_proj")}, "an expert that goes"),
        ({"extra_config": {"model.layers.1.mlp.experts.5.*": {}}}, "several experts"),
    ],
)
def test_entries_that_cannot_follow_are_refused(section: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        pruned(section)


def test_a_single_name_that_survives_is_renumbered() -> None:
    assert pruned({"only": NAME.format(1, 5, "w1")}) == {"only": NAME.format(1, 2, "w1")}


def test_an_entry_that_was_left_behind_is_found_and_refused_with_its_text() -> None:
    checkpoint = open_checkpoint(tiny.MemorySource(FILES, name="tiny"))
    anatomy = read_anatomy(checkpoint)
    lists = QuantizationLists(checkpoint, anatomy, keep_list(RETAINED), "config.json")
    fine = ["lm_head", NAME.format(1, 3, "up_proj"), "re:.*experts.*", "layers.99.mlp.experts_a.9"]
    edited = {"ignore": fine, "deep": [{NAME.format(3, 0, "w1"): 14}]}
    lists.refuse_changed({}, edited)
    for left in (NAME.format(2, 4, "up_proj"), r"re:.*\.experts\.13\..*"):
        with pytest.raises(ConfigError) as caught:
            lists.refuse_changed({}, {"deep": [{"ignore": [*fine, left]}]})
        assert repr(left) in str(caught.value)


def test_an_edited_list_that_means_another_module_is_refused_with_entry_and_module() -> None:
    checkpoint = open_checkpoint(tiny.MemorySource(FILES, name="tiny"))
    lists = QuantizationLists(
        checkpoint, read_anatomy(checkpoint), keep_list(RETAINED), "config.json"
    )
    before = {"ignore": [NAME.format(1, 5, "up_proj")], "quant_method": "fp8"}
    lists.refuse_changed(before, before | {"ignore": [NAME.format(1, 2, "up_proj")]})
    for wrong in ([], [NAME.format(1, 3, "up_proj")], ["model.layers.1.mlp.experts.2"]):
        with pytest.raises(ConfigError) as caught:
            lists.refuse_changed(before, before | {"ignore": wrong})
        assert "model.layers.1.mlp.experts." in str(caught.value)
        assert "would no longer mean what it does now" in str(caught.value)


def test_mtp_layers_with_numbers_of_their_own_and_a_talkers_experts() -> None:
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 1,
            "mtp_num_hidden_layers": 1,
            "quantization_config": {
                "ignore": [
                    "mtp.layers.0.mlp.experts.3.up_proj",
                    "model.language_model.layers.0.mlp.experts.3.up_proj",
                    r"re:.*layers\.0\.mlp\.experts\.1\..*",
                ]
            },
        },
    }
    found: tiny.Tensors = {}
    for prefix in ("model.language_model.layers.0", "mtp.layers.0"):
        found[f"{prefix}.mlp.gate.weight"] = np.zeros((4, 2), "f4")
        for expert in range(4):
            found[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = np.zeros((1, 2), "f4")
    checkpoint = open_checkpoint(tiny.MemorySource(tiny.files(config, found), name="tiny"))
    anatomy = read_anatomy(checkpoint)

    def ignored(main: tuple[int, ...], mtp: tuple[int, ...]) -> list[str]:
        keep = KeepList(4, {0: LayerKeep(main, ()), 1: LayerKeep(mtp, ())})
        text = json.loads(pruned_config(checkpoint, anatomy, keep, drop_mtp=False))
        entries: list[str] = text["text_config"]["quantization_config"]["ignore"]
        return entries

    # The pattern means both layers, which is fine where expert 1 becomes the same in both.
    assert ignored((1, 3), (1, 2)) == [
        "model.language_model.layers.0.mlp.experts.1.up_proj",
        r"re:.*layers\.0\.mlp\.experts\.0\..*",
    ]
    # And written out where it becomes another in each.
    assert ignored((1, 3), (0, 1)) == [
        "model.language_model.layers.0.mlp.experts.1.up_proj",
        "model.language_model.layers.0.mlp.experts.0.up_proj",
        "mtp.layers.0.mlp.experts.1.up_proj",
    ]


def test_a_talkers_experts_and_config_stay() -> None:
    talker = {
        "num_experts": 4,  # as many as the model's own, and still others
        "quantization_config": {"ignore": ["model.layers.0.mlp.experts.3.up_proj"]},
    }
    entries = [f"{part}.model.layers.0.mlp.experts.3.up_proj" for part in ("talker", "thinker")]
    config = {
        "model_type": "qwen3_omni_moe",
        "talker_config": talker,
        "thinker_config": {
            "text_config": {"num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1}
        },
        "quantization_config": {"ignore": entries},
    }
    found: tiny.Tensors = {"thinker.model.layers.0.mlp.gate.weight": np.zeros((4, 2), "f4")}
    for expert in range(4):
        name = f"thinker.model.layers.0.mlp.experts.{expert}.up_proj.weight"
        found[name] = np.zeros((1, 2), "f4")
    checkpoint = open_checkpoint(tiny.MemorySource(tiny.files(config, found), name="tiny"))
    keep = KeepList(4, {0: LayerKeep((1, 3), (0, 2))})
    raw = pruned_config(checkpoint, read_anatomy(checkpoint), keep, drop_mtp=False)
    after = json.loads(raw)
    assert after["talker_config"] == talker
    assert after["quantization_config"]["ignore"] == [
        entries[0],
        "thinker.model.layers.0.mlp.experts.1.up_proj",
    ]


COMPRESSED = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("section", "key", "entries", "becomes"),
    [
        # Of layer 1 the experts 0, 1, 5 and 12 are left, as 0 to 3.
        (COMPRESSED, "ignore", [r"re:.*layers\.1\..*\.5\.(gate|up|down)_proj"], [(1, 2)]),
        (COMPRESSED, "ignore", [r"re:model\.layers\.1\.mlp\.e.perts\.12\..*"], [(1, 3)]),
        (COMPRESSED, "ignore", [r"re:.*layers\.1\..*exp\w+\.(5|12)\..*"], [(1, 2), (1, 3)]),
        (COMPRESSED, "ignore", [r"re:.*layers\.1\.mlp\.experts\.\d\d\..*"], [(1, 3)]),
        # From the beginning and no further: 1, and 10 to 13.
        (COMPRESSED, "ignore", [r"re:model\.layers\.1\.mlp\.experts\.1"], [(1, 1), (1, 3)]),
        # 5 is left of layers 1 and 3, and 2 of layer 2 alone.
        (COMPRESSED, "ignore", [r"re:.*\.5\.up_proj"], [(1, 2), (3, 1)]),
        (COMPRESSED, "ignore", [r"re:.*[^0-9]2\.up_proj"], [(2, 1)]),
        (COMPRESSED, "ignore", [r"re:.*\.9\.up_proj"], None),  # of no expert, before and after
        ({"quant_method": "modelopt"}, "ignore", ["*.5.*"], [(1, 2), (3, 1)]),
        ({"quant_method": "modelopt"}, "ignore", ["*layers.1.*.1[0-9]*"], [(1, 3)]),
        ({"quant_method": "modelopt"}, "exclude_modules", ["*.layers.2.*[.]13.*"], [(2, 3)]),
        ({"quant_method": "quark"}, "exclude", [r"re:.*\.layers\.2\..*[.]13\..*"], [(2, 3)]),
        ({"quant_method": "awq"}, "modules_to_not_convert", ["s.13.up_proj"], [(2, 3)]),
        ({"quant_method": "fp8"}, "ignored_layers", ["re:x", "lm_head"], None),
    ],
)
def test_entries_that_reach_an_experts_number_otherwise_are_written_out(
    section: dict[str, Any], key: str, entries: list[str], becomes: list[tuple[int, int]] | None
) -> None:
    entries = ["lm_head", *entries, "re:.*self_attn.*"]
    after = pruned(section | {key: entries})[key]
    if becomes is None:
        assert after == entries
    else:
        names = [NAME.format(layer, expert, "up_proj") for layer, expert in becomes]
        assert after == ["lm_head", *names, "re:.*self_attn.*"]


@pytest.mark.parametrize(
    ("section", "module"),
    [
        # The module of a layer with this number as well.
        ({**COMPRESSED, "ignore": [r"re:.*\.1\..*"]}, "model.layers.3.mlp.experts.5.up_proj"),
        ({"quant_method": "modelopt", "ignore": ["*.1.*"]}, "model.layers.3.mlp.experts.5.up_proj"),
        # 1 for transformers; 10 to 13 too for the engines that look for the text.
        (
            {"quant_method": "awq", "modules_to_not_convert": ["model.layers.1.mlp.experts.1"]},
            "model.layers.1.mlp.experts.1",
        ),
        # A pattern to Quark, and no module to vLLM.
        ({"quant_method": "quark", "exclude": ["*.5.*"]}, "model.layers.1.mlp.experts.5.up_proj"),
        # Keys say something each: one cannot become several.
        (
            {"quant_method": "gptq", "dynamic": {r"+:.*\.5\.up_proj": {"bits": 8}}},
            "model.layers.1.mlp.experts.5.up_proj",
        ),
        (
            {"quant_method": "auto-round", "extra_config": {r".*\.1[0-3]\.": {"bits": 8}}},
            "model.layers.1.mlp.experts.12.up_proj",
        ),
        (
            {"quant_method": "quark", "layer_quant_config": {"*.e*s.5.*": {"weight": {}}}},
            "model.layers.1.mlp.experts.5.up_proj",
        ),
        (
            {"quant_method": "gptq", "modules_in_block_to_quantize": [["ts.5.up_proj"]]},
            "model.layers.1.mlp.experts.5.up_proj",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {
                    "default": {"_data": {"module_fqn_to_config": {r"re:.*\.5\.up_proj": None}}}
                },
            },
            "model.layers.1.mlp.experts.5.up_proj",
        ),
    ],
)
def test_entries_that_would_mean_other_modules_are_refused_with_one(
    section: dict[str, Any], module: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        pruned(section)
    assert module in str(caught.value)
    assert caught.value.remedy


def test_groups_of_compressed_tensors_keep_their_modules() -> None:
    groups = {
        "group_0": {"targets": [r"re:.*\.5\.up_proj"], "weights": {"num_bits": 8}},
        "group_1": {"targets": ["Linear", NAME.format(2, 13, "up_proj")]},
    }
    after = pruned({**COMPRESSED, "config_groups": groups})["config_groups"]
    assert after["group_0"] == {
        "targets": [NAME.format(1, 2, "up_proj"), NAME.format(3, 1, "up_proj")],
        "weights": {"num_bits": 8},
    }
    assert after["group_1"]["targets"] == ["Linear", NAME.format(2, 3, "up_proj")]


def test_what_stands_behind_the_first_key_that_counts_does_not_count() -> None:
    section = {"quant_method": "gptq", "dynamic": {"-:.*": {}, r"+:.*\.5\..*": {"bits": 8}}}
    assert pruned(section) == section
    section["dynamic"] = {r"+:.*\.5\..*": {"bits": 8}, "-:.*": {}}
    with pytest.raises(ConfigError, match=r"entry '\+:\.\*"):
        pruned(section)


def test_all_experts_by_a_pattern_for_each_stay_all_experts() -> None:
    entries = [rf"re:.*\.{expert}\.up_proj" for expert in range(EXPERTS)]
    assert pruned({**COMPRESSED, "ignore": entries})["ignore"] == entries


def test_a_list_keeps_its_lines_where_an_entry_is_written_out() -> None:
    section = {**COMPRESSED, "ignore": ["lm_head", r"re:.*\.5\.up_proj"]}
    raw = json.dumps(config_of(section), indent=2).encode()
    checkpoint = open_checkpoint(tiny.MemorySource({**FILES, "config.json": raw}, name="tiny"))
    anatomy = read_anatomy(checkpoint)
    after = pruned_config(checkpoint, anatomy, keep_list(RETAINED), drop_mtp=False)
    assert json.dumps(json.loads(after), indent=2).encode() == after


@pytest.mark.parametrize("entry", ["re:*lm_head", "re:(", "re:a{99999999999}"])
def test_what_is_no_regular_expression_is_refused_with_its_text(entry: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression") as caught:
        pruned({**COMPRESSED, "ignore": ["lm_head", entry]})
    assert repr(entry) in str(caught.value)
    # An engine that looks for it as text, or passes over it, is not asked to read it.
    for key in ("modules_to_not_convert", "extra_config"):
        place: Any = [entry] if key == "modules_to_not_convert" else {entry: {}}
        assert pruned({"quant_method": "x", key: place})[key] == place


def test_entries_for_experts_that_a_checkpoint_has_stacked_are_written_out_too() -> None:
    stem = "model.language_model.layers.0.mlp"
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": {"num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1},
        "quantization_config": {**COMPRESSED, "ignore": [r"re:.*\.3\.(gate|up)_proj"]},
    }
    weights: tiny.Tensors = {
        f"{stem}.gate.weight": np.zeros((4, 2), "f4"),
        f"{stem}.experts.gate_up_proj": np.zeros((4, 6, 2), "f4"),
        f"{stem}.experts.down_proj": np.zeros((4, 2, 3), "f4"),
    }
    checkpoint = open_checkpoint(tiny.MemorySource(tiny.files(config, weights), name="tiny"))
    keep = KeepList(4, {0: LayerKeep((1, 3), (0, 2))})
    raw = pruned_config(checkpoint, read_anatomy(checkpoint), keep, drop_mtp=False)
    entries = json.loads(raw)["quantization_config"]["ignore"]
    assert entries == [f"{stem}.experts.1.gate_proj", f"{stem}.experts.1.up_proj"]


@pytest.mark.parametrize(
    "entry",
    [
        r"re:language_model\.model\.layers\.1\..*\.5\.up_proj",
        r"re:layers\.1\..*\.5\.up_proj",
        "language_model.*.5.up_proj",
    ],
)
def test_patterns_for_names_as_other_engines_spell_them_keep_their_meaning(entry: str) -> None:
    with pytest.raises(ConfigError, match="would no longer mean what it does now"):
        pruned({"ignore": [entry]})
    assert pruned({"ignore": [entry.replace("5", "1")]}, dict.fromkeys((1, 2, 3), (0, 1, 2, 3)))


DROPPED = [
    NAME.format(3, 4, "up_proj"),
    "model.layers.3.mlp.gate",
    "model.layers.3.mlp*",
    "model.layers.3*",
    "model.layers.3.self_attn.q_proj",  # which has no tensor here
    r"re:model\.layers\.3\..*",
    r"re:.*\.layers\.3\.mlp\.(gate|experts.*)",
]


def test_every_entry_of_dropped_mtp_layers_goes_and_no_other() -> None:
    others = ["lm_head", "model.layers.1.mlp.gate", "re:.*gate", "*.gate", "re:.*vision.*"]
    section = {"quant_method": "quark", "exclude": [*DROPPED, *others]}
    assert pruned(section, drop_mtp=True)["exclude"] == others
    assert pruned(section)["exclude"] == [NAME.format(3, 0, "up_proj"), *DROPPED[1:], *others]
    settings = {
        name: {"bits": 8} for name in ("model.layers.3.mlp.gate", "model.layers.2.mlp.gate")
    }
    for key in ("quantized_layers", "extra_config"):
        kept = pruned({key: settings}, drop_mtp=True)[key]
        assert list(kept) == ["model.layers.2.mlp.gate"]


def test_lists_of_more_patterns_than_can_be_tried_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shardsurgeon.pruning.module_names._MOST_TRIED", 45_000)
    section = {**COMPRESSED, "ignore": [f"re:.*l.{{{n}}}[a-z]" for n in range(100)]}
    with pytest.raises(ConfigError, match="too many quantization entries"):
        pruned(section)


FORMS = [
    "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    "language_model.model.layers.{layer}.mlp.experts.{expert}",
    r"re:model\.layers\.{layer}\.mlp\.experts\.{expert}\..*",
    r"re:^.*\.layers\.{layer}\.mlp\.experts\.{expert}\.(w1|w2)$",
    r"-:model\.layers\.{layer}\.mlp\.experts\.{expert}$",
]
OTHERS = ["lm_head", "re:.*mlp.gate$", r"re:.*experts\.\d+\.w1", "model.layers.13.self_attn"]
NAMED = re.compile(r"layers\\?\.(\d+)\\?\.mlp\\?\.experts\\?\.(\d+)")

entry = st.tuples(st.sampled_from(FORMS), st.integers(1, 3), st.integers(0, EXPERTS - 1))
four = st.sets(st.integers(0, EXPERTS - 1), min_size=4, max_size=4).map(sorted).map(tuple)


@profile(max_examples=60)
@given(
    st.lists(entry, unique=True, max_size=30),
    st.fixed_dictionaries({1: four, 2: four, 3: four}),
    st.booleans(),
)
def test_the_lists_name_the_new_ids_of_the_survivors_they_named_before(
    entries: list[tuple[str, int, int]], retained: dict[int, tuple[int, ...]], drop_mtp: bool
) -> None:
    names = [form.format(layer=layer, expert=expert) for form, layer, expert in entries]
    section = {"ignore": [*OTHERS, *names], "extra_config": dict(zip(names, entries, strict=True))}
    after = pruned(section, retained, drop_mtp)

    survivors = [
        (form, layer, retained[layer].index(expert), expert)
        for form, layer, expert in entries
        if expert in retained[layer] and not (drop_mtp and layer == 3)
    ]
    image = [form.format(layer=layer, expert=new) for form, layer, new, _ in survivors]
    assert after["ignore"] == [*OTHERS, *image]
    found = {(int(m[1]), int(m[2])) for m in map(NAMED.search, after["ignore"]) if m}
    assert found == {(layer, new) for _, layer, new, _ in survivors}
    # Every override is still the override of the expert it was made for.
    made_for = [[form, layer, old] for form, layer, _, old in survivors]
    assert after["extra_config"] == dict(zip(image, made_for, strict=True))


def test_an_entry_that_the_renumbering_forgot_is_found_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = {"ignore": [NAME.format(1, 12, "up_proj")]}
    document = Document.parse(json.dumps(section).encode(), "hf_quant_config.json")
    monkeypatch.setattr(QuantizationLists, "changes", lambda *_: {})
    with pytest.raises(ConfigError, match=r"config\.json: .*still names expert 12 of 4"):
        pruned(section)
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: .*still names expert 12 of 4"):
        checkpoint = open_checkpoint(tiny.MemorySource(FILES, name="tiny"))
        pruned_quantization_file(
            "hf_quant_config.json",
            document,
            checkpoint,
            read_anatomy(checkpoint),
            keep_list(RETAINED),
            drop_mtp=False,
        )


def test_names_inside_a_layer_reach_as_far_as_the_layer_that_keeps_the_most() -> None:
    retained = {1: (0, 1, 5), 2: (1, 2, 3, 9, 13), 3: (4, 5, 6)}
    names = [f"mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)]
    assert pruned({"ignore": names}, retained) == {"ignore": names[:5]}
