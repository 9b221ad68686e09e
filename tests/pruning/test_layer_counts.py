"""Counts per layer in config.json: those of other tools, and the overrides that stop engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint, with_family
from shardsurgeon.errors import ConfigError, FamilyError, KeepListError, UsageError
from shardsurgeon.families.schema import parse_family
from shardsurgeon.operations import inspect, prune, verify
from shardsurgeon.operations.apply import apply
from shardsurgeon.pruning.config_edits import pruned_config
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.layer_counts import engines_on_unequal, without_overrides
from shardsurgeon.pruning.request import Allocation, MtpPolicy, SelectionRequest
from tests.support import tiny

# The tiny model: layer 0 is dense, 1 and 2 have eight experts, 3 is the MTP layer.
UNEQUAL, EQUAL = {1: 3, 2: 5, 3: 5}, {1: 4, 2: 4, 3: 4}
STOP = (
    "stock transformers and vLLM would refuse to load it (from transformers 5.14 on, older ones "
    "load it wrong without a word)"
)
LISTS = {"1": {"kept": [0, 2, 5]}, "2": {"kept": [1, 3, 4, 6, 7]}}
LIST, OVERRIDES = "num_routed_experts_per_layer", "per_layer_config"


def left(counts: dict[int, int], experts: int = 8) -> KeepList:
    """Keep-lists by which the first experts stay."""
    keeps = {n: LayerKeep(tuple(range(k)), tuple(range(k, experts))) for n, k in counts.items()}
    return KeepList(experts, keeps)


def edited(counts: dict[int, int], *, drop_mtp: bool = False, **said: Any) -> dict[str, Any]:
    """config.json of the tiny model after a prune; said: what it has besides."""
    checkpoint = open_checkpoint(tiny.source(content={**tiny.config(), **said}))
    keep = left({n: k for n, k in counts.items() if n < 3 or not drop_mtp})
    raw = pruned_config(checkpoint, read_anatomy(checkpoint), keep, drop_mtp=drop_mtp)
    config: dict[str, Any] = json.loads(raw)
    return config


def of_count(*counts: tuple[int | str, int]) -> dict[str, Any]:
    return {str(layer): {"n_routed_experts": count} for layer, count in counts}


def test_unequal_counts_are_written_where_transformers_looks_for_them() -> None:
    config = edited(UNEQUAL)
    assert config["n_routed_experts"] == 5
    assert list(config)[-2:] == [LIST, OVERRIDES]
    # Neither the dense layer nor the MTP layer: transformers knows no override there.
    assert config[OVERRIDES] == of_count((1, 3), (2, 5))
    assert edited(UNEQUAL, drop_mtp=True)[OVERRIDES] == of_count((1, 3), (2, 5))


def test_equal_counts_add_nothing() -> None:
    config = edited(EQUAL)
    assert not {LIST, OVERRIDES} & config.keys()
    others = {"0": {"head_dim": 4}, "1": {}}
    assert edited(EQUAL, per_layer_config=others)[OVERRIDES] == others


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, of_count((1, 3), (2, 5))),
        ({}, of_count((1, 3), (2, 5))),
        (
            {"0": {"head_dim": 4}, "02": {"head_dim": 8}},
            {
                "0": {"head_dim": 4},
                "02": {"head_dim": 8, "n_routed_experts": 5},
                **of_count((1, 3)),
            },
        ),
        # Of two keys for one layer transformers takes the last; what is no object is none.
        (
            {"1": {"head_dim": 4}, "01": {"head_dim": 8}, "2": 5},
            {
                "1": {"head_dim": 4},
                "01": {"head_dim": 8, "n_routed_experts": 3},
                "2": {"n_routed_experts": 5},
            },
        ),
        # A name that transformers ignores, and a count of a layer without experts.
        (
            {"2": {"num_experts": 8}, "0": {"n_routed_experts": 7}},
            {
                "2": {"num_experts": 5, "n_routed_experts": 5},
                "0": {"n_routed_experts": 7},
                **of_count((1, 3)),
            },
        ),
    ],
)
def test_overrides_that_are_there_are_completed(
    tmp_path: Path, before: Any, after: dict[str, Any]
) -> None:
    source = written(tmp_path / "m", per_layer_config=before)
    out = pruned(source, LISTS, tmp_path / "out", allow_nonuniform=True)
    assert config_of(out)[OVERRIDES] == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (of_count((1, 8), (2, 8)), None),
        ({"1": {"num_experts": 8}}, None),
        ({**of_count((1, 8)), "0": {}}, None),
        ({"1": {"head_dim": 4, "n_routed_experts": 8}, "2": {}}, {"1": {"head_dim": 4}}),
    ],
)
def test_overrides_of_counts_go_where_all_are_equal_again(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    source = written(tmp_path / "m", per_layer_config=before)
    lists = {layer: {"kept": [0, 1, 4, 6]} for layer in ("1", "2")}
    assert config_of(pruned(source, lists, tmp_path / "out")).get(OVERRIDES) == after


def test_a_model_that_was_unequal_is_pruned_to_equal_counts(tmp_path: Path) -> None:
    source = written(tmp_path / "m")
    first = pruned(source, LISTS, tmp_path / "first", allow_nonuniform=True)
    assert config_of(first)[OVERRIDES] == of_count((1, 3), (2, 5))
    two = {"1": {"kept": [0, 1]}, "2": {"kept": [2, 4]}}
    again = pruned(first, two, tmp_path / "again")
    assert OVERRIDES not in config_of(again)
    assert (config_of(again)["n_routed_experts"], config_of(again)[LIST]) == (2, [0, 2, 2, 2])


# Lists that other tools publish


PUBLISHED = [
    ("per_layer_num_experts", [0, 8, 8], [0, 3, 5]),
    # What some write of a layer without experts is the model's own number.
    ("per_layer_num_experts", [8, 8, 8], [5, 3, 5]),
    ("per_layer_num_experts", [None, 8, 8], [None, 3, 5]),
    ("per_layer_num_experts", {"1": 8, "2": 8}, {"1": 3, "2": 5}),
    ("num_experts_per_layer", [0, 8, 8, 8], [0, 3, 5, 5]),
    ("n_routed_experts_per_layer", [0, 8, 8], [0, 3, 5]),
]


@pytest.mark.parametrize(("key", "before", "after"), PUBLISHED)
def test_a_published_list_is_rewritten_and_no_second_one_added(
    tmp_path: Path, key: str, before: Any, after: Any
) -> None:
    source = written(tmp_path / "m", **{key: before})
    (note,) = [note for note in inspect.inspect(str(source)).notes if key in note]
    assert note == (
        f"config.json says each layer's experts in {key}, which is read; stock engines ignore it"
    )
    out = pruned(source, LISTS, tmp_path / "out", allow_nonuniform=True)
    config = config_of(out)
    assert config[key] == after and LIST not in config
    assert config[OVERRIDES] == of_count((1, 3), (2, 5))
    assert inspect.inspect(str(out)).num_experts_per_layer == {1: 3, 2: 5, 3: 5}


def test_a_published_list_loses_the_dropped_mtp_layer() -> None:
    for before, after in (
        ([0, 8, 8, 8], [0, 3, 5]),
        ({"1": 8, "2": 8, "3": 8}, {"1": 3, "2": 5}),
    ):
        config = edited(UNEQUAL, drop_mtp=True, per_layer_num_experts=before)
        assert config["per_layer_num_experts"] == after


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ([0, 8, 7], "has 8 experts in dimension 0, expected 7"),
        ([0, 8, "8"], "per_layer_num_experts.2 is '8', expected a whole number for each layer"),
        ({"one": 8}, "per_layer_num_experts.one is 8, expected a whole number for each layer"),
        ({"9" * 40: 8}, "expected a whole number for each layer"),
        ([0, 8, -1], "per_layer_num_experts.2 is -1"),
    ],
)
def test_a_published_list_that_contradicts_the_model_is_refused(said: Any, says: str) -> None:
    source = tiny.source(content=tiny.config(per_layer_num_experts=said))
    with pytest.raises((ConfigError, FamilyError)) as caught:
        read_anatomy(open_checkpoint(source))
    assert says in str(caught.value)


def test_overrides_are_held_against_the_shards_as_lists_are() -> None:
    source = tiny.source(content=tiny.config(per_layer_config=of_count(("01", 7))))
    with pytest.raises((ConfigError, FamilyError), match="has 8 experts in dimension 0, expect"):
        read_anatomy(open_checkpoint(source))
    both = tiny.config(per_layer_config=of_count((1, 7)), per_layer_num_experts=[0, 8, 8])
    with pytest.raises(ConfigError, match="says 8 and 7 experts for layer 1"):
        read_anatomy(open_checkpoint(tiny.source(content=both)))


def test_beside_a_published_list_the_one_count_may_be_that_of_the_first_model(
    tmp_path: Path,
) -> None:
    """Some tools leave it as it was before their prune."""
    stale = {"per_layer_num_experts": [12, 8, 8, 8], "n_routed_experts": 12}
    source = written(tmp_path / "m", **stale)
    assert inspect.inspect(str(source)).num_experts == 8
    out = pruned(source, LISTS, tmp_path / "out", allow_nonuniform=True)
    assert config_of(out)["n_routed_experts"] == 5
    assert config_of(out)["per_layer_num_experts"] == [5, 3, 5, 5]
    alone = tiny.source(content=tiny.config(n_routed_experts=12))
    with pytest.raises((ConfigError, FamilyError)):
        read_anatomy(open_checkpoint(alone))


# What is said of engines


def test_the_refusal_says_that_stock_engines_stop(tmp_path: Path) -> None:
    scores = tmp_path / "s.json"
    scores.write_text(
        json.dumps({"1": [9.0, 0, 0, 0, 0, 0, 0, 0], "2": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]})
    )
    request = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL)
    source = written(tmp_path / "m")
    with pytest.raises(UsageError) as caught:
        apply(prune.plan(str(source), str(scores), request, out=tmp_path / "out"))
    assert f"experts, and {STOP}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_keep_list_is_refused_with_what_engines_do(tmp_path: Path) -> None:
    with pytest.raises(KeepListError) as caught:
        pruned(written(tmp_path / "m"), LISTS, tmp_path / "out")
    assert f"layer 1 keeps 3 experts, layer 2 5: {STOP}" in str(caught.value)


def test_nothing_is_said_of_engines_for_a_declaration_of_ones_own() -> None:
    family = parse_family('like = "deepseek_v3"\n', "own.toml")
    checkpoint = with_family(open_checkpoint(tiny.source()), family)
    said = engines_on_unequal(checkpoint.settings, read_anatomy(checkpoint))
    assert said == "stock engines read one count for all layers"


def test_an_engine_of_which_nothing_is_known_is_refused_in_a_declaration() -> None:
    text = 'like = "deepseek_v3"\n[config]\nmisread_by = ["sglang"]\n'
    with pytest.raises(FamilyError, match=r"misread_by names 'sglang'; one of transformers, vLLM"):
        parse_family(text, "own.toml")


def test_a_config_without_overrides_says_one_count() -> None:
    checkpoint = open_checkpoint(tiny.source(content=tiny.config(**{OVERRIDES: of_count((1, 8))})))
    keys = read_anatomy(checkpoint).family.config
    assert OVERRIDES not in without_overrides(checkpoint.settings, keys)
    assert OVERRIDES in checkpoint.settings


def written(folder: Path, **said: Any) -> Path:
    """The tiny model on disk."""
    folder.mkdir()
    for name, content in tiny.files(content={**tiny.config(), **said}).items():
        (folder / name).write_bytes(content)
    return folder


def pruned(source: Path, lists: dict[str, Any], out: Path, **words: Any) -> Path:
    plan = source.parent / f"{out.name}.json"
    plan.write_text(json.dumps(lists))
    request = SelectionRequest(plan_file=plan, mtp=MtpPolicy.LAST, **words)
    report = apply(prune.plan(str(source), None, request, out=out))
    assert report.verification is not None and report.verification.holds
    assert verify.verify(str(source), str(out)).holds
    return out


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
