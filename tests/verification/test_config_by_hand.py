"""Configs of results made by hand: counts and quantization lists, as they must be and spoiled.

Source and result are both built here, so no planner has a say in what is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.verification.verify import verify_checkpoint
from tests.support.handmade import (
    ALL,
    DEEPSEEK,
    METADATA,
    QWEN,
    Keeps,
    Layout,
    Tensors,
    record,
    rows,
    values,
    write,
)

PER_LAYER = "num_routed_experts_per_layer"
OVERRIDES = "per_layer_config"
# Layer 3 and 2 are the MTP layers.
OF_DEEPSEEK = {1: (1, 3, 4, 6), 2: (0, 2, 5, 7), 3: (0, 1, 6, 7)}
OF_QWEN = {0: (2, 4, 7), 1: (1, 3, 6), 2: (0, 5, 7)}
Config = Mapping[str, Any]


def differences(
    folder: Path,
    layout: Layout,
    keeps: Keeps,
    before: Config,
    after: Config,
    everyone: Keeps | None = None,
) -> str:
    """What is wrong with a prune of a model to these lists.

    before, after: what the configs say besides, at the top or in `text_config`; None is left out.
    everyone: the lists of the source, if it has layers that are gone.
    """
    source = write(folder / "source", layout, everyone or dict.fromkeys(keeps, ALL), 1)
    out = write(folder / "out", layout, keeps, 1)
    for place, changes in ((source, before), (out, after)):
        _configure(place / "config.json", changes)
    counts = [len(ids) for ids in keeps.values()]
    record(out, keeps, [(source, len(ALL), max(counts))])
    metadata = json.loads((out / METADATA).read_text())
    metadata["format"] = 1 if len(set(counts)) == 1 else 2
    (out / METADATA).write_text(json.dumps(metadata))
    return "\n".join(verify_checkpoint(source, out).differences)


def overrides(*counts: int, name: str = "num_experts") -> Config:
    """transformers' overrides of the counts of layers 0, 1, ..."""
    return {OVERRIDES: {str(layer): {name: count} for layer, count in enumerate(counts)}}


def _configure(path: Path, changes: Config) -> None:
    config = json.loads(path.read_text())
    for section, said in ((config, changes), (config.get("text_config"), changes)):
        nested = said.get("text_config", {}) if section is not config else said
        for key, value in nested.items():
            if key != "text_config":
                section[key] = value
    path.write_text(json.dumps(config, indent=2))


# Quantization lists whose entries name an expert of several layers


def quark(*entries: str) -> Config:
    return {"quantization_config": {"quant_method": "quark", "exclude": list(entries)}}


def modelopt(*entries: str) -> Config:
    return {"quantization_config": {"quant_method": "modelopt", "exclude_modules": list(entries)}}


def mapped(*entries: str) -> Config:
    said = {entry: {"bits": 8} for entry in entries}
    return {"quantization_config": {"quant_method": "quark", "layer_quant_config": said}}


ANY_LAYER = [f"*.mlp.experts.{expert}.up_proj" for expert in ALL]


@pytest.mark.parametrize("kind", [quark, modelopt, mapped])
@pytest.mark.parametrize(
    ("left", "holds"), [(4, True), (3, False), (5, False), (8, False), (0, False)]
)
def test_entries_for_every_expert_become_entries_for_every_expert_left(
    tmp_path: Path, kind: Any, left: int, holds: bool
) -> None:
    before, after = kind("lm_head", *ANY_LAYER), kind("lm_head", *ANY_LAYER[:left])
    found = differences(tmp_path, DEEPSEEK, OF_DEEPSEEK, before, after)
    assert (found == "") == holds, found


def test_where_layers_keep_different_numbers_those_of_the_largest_are_left(
    tmp_path: Path,
) -> None:
    keeps = {**OF_QWEN, 1: (1, 3, 4, 6, 7), 2: (0, 2, 4, 5, 7)}
    counts = {"text_config": {"num_experts": 5, PER_LAYER: [3, 5, 5], **overrides(3, 5)}}
    for left, holds in ((5, True), (4, False), (3, False)):
        after = {**counts, **modelopt(*ANY_LAYER[:left])}
        found = differences(tmp_path / str(left), QWEN, keeps, modelopt(*ANY_LAYER), after)
        assert (found == "") == holds, found


def test_what_only_looks_like_an_entry_stays(tmp_path: Path) -> None:
    """No engine reads names of modules below the name of a module."""
    said = {"quant_method": "quark", "lm_head.x": {ANY_LAYER[7]: 1, "bits": 8}}
    config = {"quantization_config": said}
    assert differences(tmp_path, DEEPSEEK, OF_DEEPSEEK, config, config) == ""


def up_proj(layer: int, expert: int, stem: str = "model") -> str:
    return f"{stem}.layers.{layer}.mlp.experts.{expert}.up_proj"


# Expert 1 of the source is number 0 of layer 1 and 1 of the MTP layer, 7 is 3 of layers 2 and 3.
SPELLED_OUT = {1: [up_proj(1, 0), up_proj(3, 1)], 7: [up_proj(2, 3), up_proj(3, 3)]}


@pytest.mark.parametrize("expert", SPELLED_OUT)
@pytest.mark.parametrize("others", [[], ["lm_head"]])
def test_names_stand_in_place_of_an_entry_whose_expert_has_several_new_numbers(
    tmp_path: Path, expert: int, others: list[str]
) -> None:
    """Whether or not there still is an expert of the old number."""
    before = modelopt(*others, ANY_LAYER[expert])
    after = modelopt(*others, *SPELLED_OUT[expert])
    assert differences(tmp_path / "right", DEEPSEEK, OF_DEEPSEEK, before, after) == ""
    for number, wrong in enumerate(
        [
            [],
            [ANY_LAYER[expert]],
            SPELLED_OUT[expert][:1],
            SPELLED_OUT[expert][1:],
            [*SPELLED_OUT[expert], up_proj(1, 3)],
            [*SPELLED_OUT[expert], up_proj(1, 7)],
        ]
    ):
        after = modelopt(*others, *wrong)
        place = tmp_path / str(number)
        assert differences(place, DEEPSEEK, OF_DEEPSEEK, before, after) != "", wrong


# Layers that an entry means: numbers of MTP layers begin at 0 in one family and go on in the other

TEXT = "model.language_model"
TWO_MTP = {**OF_DEEPSEEK, 4: (2, 3, 6, 7)}


@pytest.mark.parametrize(
    ("layout", "keeps", "entry", "renumbered"),
    [
        # Its layer 0 keeps 4 as number 1, that of the MTP part does not keep it.
        (QWEN, OF_QWEN, up_proj(0, 4, TEXT), up_proj(0, 1, TEXT)),
        (QWEN, OF_QWEN, up_proj(0, 5, "mtp"), up_proj(0, 1, "mtp")),
        # 7 is number 2 of both.
        (QWEN, OF_QWEN, "*layers.0.mlp.experts.7.up_proj", "*layers.0.mlp.experts.2.up_proj"),
        # Layer 1 keeps 6 as number 3, layer 4, the second MTP layer, as number 2.
        (DEEPSEEK, TWO_MTP, "*layers.1.mlp.experts.6.up_proj", "*layers.1.mlp.experts.3.up_proj"),
        (DEEPSEEK, TWO_MTP, "*layers.4.mlp.experts.6.up_proj", "*layers.4.mlp.experts.2.up_proj"),
    ],
)
def test_an_entry_for_one_layer_gets_the_number_of_that_layer(
    tmp_path: Path, layout: Layout, keeps: Keeps, entry: str, renumbered: str
) -> None:
    mtp = {"num_nextn_predict_layers": 2} if 4 in keeps else {}
    before = {**mtp, **modelopt("lm_head", entry)}
    for number, (entries, holds) in enumerate(
        [([renumbered], True), ([entry], False), ([], False)]
    ):
        after = {**mtp, **modelopt("lm_head", *entries)}
        found = differences(tmp_path / str(number), layout, keeps, before, after)
        assert (found == "") == holds, (entries, found)


def test_names_stand_in_place_of_an_entry_for_a_layer_and_an_mtp_layer(tmp_path: Path) -> None:
    """Layer 0 and MTP layer 0 have one number in names, and lists of their own."""
    before = modelopt("lm_head", "*layers.0.mlp.experts.5.up_proj")
    name = up_proj(0, 1, "mtp")  # layer 0 of the main part has lost it
    assert differences(tmp_path / "a", QWEN, OF_QWEN, before, modelopt("lm_head", name)) == ""
    for number, wrong in enumerate(["*layers.0.mlp.experts.1.up_proj", up_proj(0, 1, TEXT)]):
        after = modelopt("lm_head", wrong)
        assert differences(tmp_path / str(number), QWEN, OF_QWEN, before, after) != ""


# Counts


def text(**said: object) -> Config:
    return {"text_config": said}


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([3, 3], ""),
        ([8, 8], "text_config.num_experts.0 is 8, expected 3"),
        ([3, 8], "text_config.num_experts.1 is 8, expected 3"),
        ([3], "text_config.num_experts is [3], expected [3, 3]"),
    ],
)
def test_a_count_that_stands_once_per_layer_is_new_in_each_place(
    tmp_path: Path, counts: list[int], says: str
) -> None:
    before, after = text(num_experts=[8, 8]), text(num_experts=counts)
    found = differences(tmp_path, QWEN, OF_QWEN, before, after)
    assert (found == "") == (says == "") and says in found, found


# Layers 0 and 1 keep three and four, the MTP layer five: the one count is that of the largest.
UNEVEN = {0: (2, 4, 7), 1: (1, 3, 6, 7), 2: (0, 2, 4, 5, 7)}


@pytest.mark.parametrize(
    ("count", "per_layer", "says"),
    [
        (5, [3, 4, 5], ""),
        (4, [3, 4, 5], "text_config.num_experts is 4, expected 5"),
        (5, [3, 4], "num_routed_experts_per_layer is [3, 4], expected [3, 4, 5]"),
        (5, [3, 4, 4], "num_routed_experts_per_layer.2 is 4, expected 5"),
    ],
)
def test_counts_per_layer_come_beside_the_count_and_nowhere_else(
    tmp_path: Path, count: int, per_layer: list[int], says: str
) -> None:
    after = {PER_LAYER: per_layer, **overrides(3, 4), "num_experts": count}
    found = differences(tmp_path / "a", QWEN, UNEVEN, {}, text(**after))
    assert (found == "") == (says == "") and says in found, found
    twice = {**text(**after), PER_LAYER: per_layer}
    assert f"{PER_LAYER} was added" in differences(tmp_path / "b", QWEN, UNEVEN, {}, twice)


@pytest.mark.parametrize(
    ("per_layer", "says"),
    [
        ([3, 4, 5], ""),
        ([3, 4], f"{PER_LAYER} is [3, 4], expected [3, 4, 5]"),
        ([8, 8, 8], f"{PER_LAYER}.0 is 8, expected 3"),
    ],
)
def test_counts_per_layer_that_were_there_are_new(
    tmp_path: Path, per_layer: list[int], says: str
) -> None:
    before = text(**{PER_LAYER: [8, 8, 8]})
    after = text(**{PER_LAYER: per_layer, "num_experts": 5}, **overrides(3, 4))
    found = differences(tmp_path, QWEN, UNEVEN, before, after)
    assert (found == "") == (says == "") and says in found, found


@pytest.mark.parametrize(
    ("per_layer", "says"),
    [
        ([3, 4], ""),
        ([3, 4, 8], f"{PER_LAYER} is [3, 4, 8], expected [3, 4]"),
        ([3, 4, 0], f"{PER_LAYER} is [3, 4, 0], expected [3, 4]"),
        ([3], f"{PER_LAYER} is [3], expected [3, 4]"),
    ],
)
def test_counts_of_mtp_layers_go_with_them(tmp_path: Path, per_layer: list[int], says: str) -> None:
    keeps = {layer: UNEVEN[layer] for layer in (0, 1)}
    before = text(**{PER_LAYER: [8, 8, 8]}, layer_types=["a", "b", "c"])
    after = text(
        **{PER_LAYER: per_layer, "num_experts": 4}, layer_types=["a", "b", "c"], **overrides(3, 4)
    )
    everyone = dict.fromkeys((0, 1, 2), ALL)
    found = differences(tmp_path, QWEN, keeps, before, after, everyone)
    assert (found == "") == (says == "") and says in found, found


# transformers' overrides, which stop engines that know one count


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (overrides(3, 4), ""),
        ({}, "text_config.per_layer_config is missing"),
        (overrides(3, 4, 5), "text_config.per_layer_config.2 was added"),
        (overrides(3), "text_config.per_layer_config.1 is missing"),
        (overrides(3, 5), "text_config.per_layer_config.1.num_experts is 5, expected 4"),
        (overrides(3, 4, name="num_local_experts"), "per_layer_config.0.num_experts is missing"),
    ],
)
def test_the_overrides_of_layers_that_differ_are_their_counts(
    tmp_path: Path, said: Config, says: str
) -> None:
    after = text(**{PER_LAYER: [3, 4, 5]}, **said, num_experts=5)
    found = differences(tmp_path, QWEN, UNEVEN, {}, after)
    assert (found == "") == (says == "") and says in found, found


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"0": {"head_dim": 4, "num_experts": 3}, "01": {"num_experts": 4}}, ""),
        ({"0": {"num_experts": 3}, "01": {"num_experts": 4}}, "0.head_dim is missing"),
        ({"0": {"head_dim": 5, "num_experts": 3}, "01": {"num_experts": 4}}, "head_dim is 5"),
        ({"0": {"head_dim": 4}, "01": {"num_experts": 4}}, "0.num_experts is missing"),
        ({"0": {"head_dim": 4, "num_experts": 3}, "01": {"num_experts": 8}}, "is 8, expected 4"),
    ],
)
def test_overrides_of_other_things_stay_beside_those_of_counts(
    tmp_path: Path, said: Config, says: str
) -> None:
    before = text(**{OVERRIDES: {"0": {"head_dim": 4}, "01": {"num_experts": 8}}})
    after = text(**{OVERRIDES: said, PER_LAYER: [3, 4, 5]}, num_experts=5)
    found = differences(tmp_path, QWEN, UNEVEN, before, after)
    assert (found == "") == (says == "") and says in found, found


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"0": {"num_experts": 8}}, None, ""),
        ({"0": {"num_experts": 8}}, {"0": {"num_experts": 3}}, "per_layer_config was added"),
        ({"0": {"num_experts": 8}}, {}, "per_layer_config was added"),
        ({"0": {"num_experts": 8, "top": 1}, "1": {}}, {"0": {"top": 1}}, ""),
        ({"0": {"top": 1}, "1": {}}, {"0": {"top": 1}, "1": {}}, ""),
        ({"0": {"top": 1}, "1": {}}, {"0": {"top": 1}}, "per_layer_config.1 is missing"),
    ],
)
def test_no_count_is_overridden_where_layers_keep_the_same_number(
    tmp_path: Path, before: Config, after: Config | None, says: str
) -> None:
    said = {} if after is None else {OVERRIDES: after}
    found = differences(
        tmp_path, QWEN, OF_QWEN, text(**{OVERRIDES: before}), text(**said, num_experts=3)
    )
    assert (found == "") == (says == "") and says in found, found


# Counts per layer as other tools publish them


@pytest.mark.parametrize("key", ["per_layer_num_experts", "num_experts_per_layer"])
@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([8, 8], [3, 4], ""),
        ([8, 8], [8, 8], ".0 is 8, expected 3"),
        ({"0": 8, "1": 8}, {"0": 3, "1": 4}, ""),
        ({"0": 8, "1": 8}, {"0": 3}, ".1 is missing"),
        ({"0": 8, "1": 8}, [3, 4], "is [3, 4], expected {"),
    ],
)
def test_a_published_list_is_rewritten_as_it_is_spelled(
    tmp_path: Path, key: str, before: object, after: object, says: str
) -> None:
    made = text(**{key: after}, **overrides(3, 4), num_experts=5)
    found = differences(tmp_path / "a", QWEN, UNEVEN, text(**{key: before}), made)
    assert (found == "") == (says == "") and says in found, found
    both = text(**{key: after, PER_LAYER: [3, 4, 5]}, **overrides(3, 4), num_experts=5)
    again = differences(tmp_path / "b", QWEN, UNEVEN, text(**{key: before}), both)
    assert f"{PER_LAYER} was added" in again


# A model whose blocks each say their count (Nemotron-H Puzzle)


def blocks(keeps: Keeps) -> Tensors:
    made: Tensors = {"backbone.layers.0.mixer.D": values("D", 6)}
    for layer, ids in keeps.items():
        block = f"backbone.layers.{layer}.mixer"
        made[f"{block}.gate.weight"] = rows(f"{layer} gate", ids, 6)
        made[f"{block}.gate.e_score_correction_bias"] = rows(f"{layer} bias", ids)
        for new_id, old_id in enumerate(ids):
            made[f"{block}.experts.{new_id}.up_proj.weight"] = values(f"{layer} {old_id}", 4, 6)
    return made


def block_config(experts: int, mtp: int, names: object) -> str:
    content = {"model_type": "nemotron_h_puzzle", "n_routed_experts": 8, "num_hidden_layers": 3}
    return json.dumps(content, indent=2)


def block_counts(most: int, *counts: int) -> Config:
    moe = {"block_type": "moe", "num_experts_per_tok": 2}
    own = [{**moe, "n_routed_experts": count} for count in counts]
    return {"n_routed_experts": most, "block_configs": [{"block_type": "mamba"}, *own]}


def test_where_blocks_say_their_counts_no_list_is_added(tmp_path: Path) -> None:
    layout: Layout = (blocks, block_config, 99)
    keeps, before = {1: (2, 4, 7), 2: (1, 3, 6, 7)}, block_counts(8, 8, 8)
    assert differences(tmp_path / "a", layout, keeps, before, block_counts(4, 3, 4)) == ""
    listed = {**block_counts(4, 3, 4), PER_LAYER: [0, 3, 4]}
    assert f"{PER_LAYER} was added" in differences(tmp_path / "b", layout, keeps, before, listed)
    found = differences(tmp_path / "c", layout, keeps, before, block_counts(4, 4, 4))
    assert "block_configs.1.n_routed_experts is 4, expected 3" in found


# A model with lists of an entry per layer, MTP layers' behind the others (Step-3.5)


def step_tensors(keeps: Keeps) -> Tensors:
    made: Tensors = {"model.embed_tokens.weight": values("embed", 16, 6)}
    for layer, ids in keeps.items():
        block = f"model.layers.{layer}.moe"
        made[f"{block}.gate.weight"] = rows(f"{layer} gate", ids, 6)
        made[f"{block}.up_proj.weight"] = rows(f"{layer} up", ids, 4, 6)
    return made


def step_config(experts: int, mtp: int, names: object) -> str:
    counts = {"moe_num_experts": experts, "moe_top_k": 2, "num_hidden_layers": 2}
    return json.dumps({"model_type": "step3p5", **counts, "num_nextn_predict_layers": mtp})


def kinds(main: int, short: int = 2, other: int = 3) -> Config:
    """Lists of so many entries: of layers with MTP, without, and of a vision tower."""
    entries = ["full", "sliding", "full"]
    return {
        "layer_types": entries[:main],
        "mlp_layer_types": entries[:short],
        "vision_config": {"layer_types": entries[:other]},
    }


STEP: Layout = (step_tensors, step_config, 2)


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (kinds(2), ""),
        (kinds(3), "layer_types is "),
        (kinds(1), "layer_types is "),
        (kinds(2, 1), "mlp_layer_types is "),
        (kinds(2, 2, 2), "vision_config.layer_types is "),
    ],
)
def test_entries_of_layers_that_are_gone_go_from_lists_that_have_them(
    tmp_path: Path, after: Config, says: str
) -> None:
    keeps, everyone = {0: (2, 4, 7), 1: (1, 3, 6)}, dict.fromkeys((0, 1, 2), ALL)
    found = differences(tmp_path, STEP, keeps, kinds(3), after, everyone)
    assert (found == "") == (says == "") and says in found, found


def test_with_the_layers_all_entries_stay(tmp_path: Path) -> None:
    keeps = {0: (2, 4, 7), 1: (1, 3, 6), 2: (0, 1, 2)}
    assert differences(tmp_path / "a", STEP, keeps, kinds(3), kinds(3)) == ""
    assert differences(tmp_path / "b", STEP, keeps, kinds(3), kinds(2)) != ""
