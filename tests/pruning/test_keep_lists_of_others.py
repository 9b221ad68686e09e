"""Keep-lists in the spellings that tools have published are read as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.errors import KeepListError
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.pruning.keep_lists import resolve

KEPT = {0: [1, 3, 4], 1: [0, 2, 5]}
DROPPED = {0: [0, 2, 5], 1: [1, 3, 4]}
FIXTURE = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"
PUBLISHED = Path(__file__).parents[3] / "shared" / "real" / "keep-lists"


def saved(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "list.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def kept(path: Path, meaning: str | None = None, layers: int = 2, experts: int = 6) -> object:
    resolved = resolve(read_keeplist(path, meaning), range(layers), experts)
    return {layer: list(keep.retained) for layer, keep in resolved.layers.items()}


def records(lists: dict[int, list[int]], **more: object) -> list[dict[str, object]]:
    return [{"layer": n, "expert": e, **more} for n, ids in lists.items() for e in ids]


def lines(values: list[object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def shuffled(lists: dict[int, list[int]], key: str) -> list[dict[str, object]]:
    return [{"layer": layer, key: ids[::-1]} for layer, ids in lists.items()]


BY_WORD = {
    "retained": {"retained": KEPT},
    "pruned": {"pruned": DROPPED},
    "drop": {"drop": DROPPED},
    "keep_by_layer": {"keep_by_layer": KEPT, "prune_method": "reap", "compression_ratio": 0.5},
    "retained_indices_by_layer": {"retained_indices_by_layer": KEPT, "pruned_experts": 3},
    "pruned_experts": {"pruned_experts": DROPPED},
    "keptExperts": {"keptExperts": KEPT},
    "per_layer_keep and per_layer_drop": {
        "method": "expert_drop_by_contribution",
        "drop_map_file": "/tmp/x.json",
        "original_experts": 6,
        "target_experts": 3,
        "per_layer_keep": KEPT,
        "per_layer_drop": DROPPED,
    },
    "keep_maps": {
        "keep_maps": {"keep_by_layer": KEPT, "ranked_by_layer": {0: [*range(6)], 1: [*range(6)]}}
    },
    "retained per layer": {n: {"retained": ids} for n, ids in KEPT.items()},
    "pruned per layer": {n: {"pruned": ids, "num_pruned": 3} for n, ids in DROPPED.items()},
    "retained_indices per layer": {n: {"retained_indices": ids} for n, ids in KEPT.items()},
    "pruned_indices per layer": {
        "layers": {n: {"pruned_indices": ids, "scores": [1.5]} for n, ids in DROPPED.items()}
    },
    "keep_experts and pruned_experts below layers": {
        "format": "ds4_reap_prune_plan",
        "layers": {
            n: {"keep_experts": KEPT[n], "pruned_experts": DROPPED[n], "scores": [0.5] * 6}
            for n in KEPT
        },
    },
    "kept_experts and ranked_experts below layers": {
        "layers": {n: {"kept_experts": i, "ranked_experts": [*range(6)]} for n, i in KEPT.items()}
    },
    "a report of each layer": {
        "layer_reports": [
            {"layer": n, "num_experts_after": 3, "kept_experts": i, "pruned_experts": DROPPED[n]}
            for n, i in KEPT.items()
        ]
    },
    "reap-mlx's plan": {
        "modelName": "m",
        "requestedPruneCount": 6,
        "kept": records(KEPT, signal=0.5, reason="kept"),
        "pruned": records(DROPPED, signal=0.25),
    },
    "records of those that go": {"pruned": records(DROPPED)},
    "rows by position": {"kept_per_layer": 3, "original_experts": 6, "keep": [*KEPT.values()]},
    "rows below per_layer": {"original_experts": 6, "keep": {"per_layer": [*KEPT.values()]}},
    "bare L": {"kept": {f"L{n}": ids for n, ids in KEPT.items()}},
    "layer0": {f"layer{n}": {"kept": ids} for n, ids in KEPT.items()},
    "Layer 0": {"dropped": {f"Layer {n}": ids for n, ids in DROPPED.items()}},
    "JSON lines": lines(shuffled(KEPT, "kept")),
    "a list of records": shuffled(DROPPED, "pruned_experts"),
}


@pytest.mark.parametrize("spelling", BY_WORD)
def test_a_word_of_the_file_says_what_its_lists_are(tmp_path: Path, spelling: str) -> None:
    assert kept(saved(tmp_path, BY_WORD[spelling])) == KEPT


BARE = {
    "lists by layer": KEPT,
    "one set of an arm": {"armA": KEPT},
    "a count of layers": {"layers": 2, "armA": KEPT},
    "below layers": {"source_experts": 6, "retained_count": 3, "layers": KEPT},
    "bare L": {f"L{n}": ids for n, ids in KEPT.items()},
    "layer0": {f"layer{n}": ids for n, ids in KEPT.items()},
    "rows": [*KEPT.values()],
    "records of one expert": records(KEPT),
    "JSON lines of one expert": lines(records(KEPT)),
}


@pytest.mark.parametrize("spelling", BARE)
def test_without_a_word_the_user_says_it(tmp_path: Path, spelling: str) -> None:
    path = saved(tmp_path, BARE[spelling])
    assert kept(path, "kept") == KEPT
    assert kept(path, "dropped") == DROPPED
    with pytest.raises(KeepListError) as caught:
        read_keeplist(path)
    assert caught.value.problem == "its lists could be kept or dropped experts"
    assert caught.value.remedy == "say which with --lists kept or --lists dropped"


RANKING = {0: [5, 4, 3, 2, 1, 0], 1: [*range(6)]}
REFUSED = {
    "two arms": ({"armA": KEPT, "armB": DROPPED}, "holds 2 keep-lists, 'armA' and 'armB'"),
    "both that overlap": (
        {"keep": KEPT, "drop": {**DROPPED, 1: [0, 3, 4]}},
        "layer 1: 3 kept and 3 dropped ids do not make up 6 experts",
    ),
    "both with a gap": (
        {n: {"kept": KEPT[n], "pruned": DROPPED[n][:2]} for n in KEPT},
        "layer 1: 3 kept and 2 dropped ids do not make up 5 experts",
    ),
    "both for fewer than it says": (
        {"original_experts": 8, "kept": KEPT, "dropped": DROPPED},
        "is for 8 experts, its layers list 6",
    ),
    "statistics": (
        {"args": {"target": 3}, "per_layer": {n: {"n_dropped": 3, "agg_min": 0.1} for n in KEPT}},
        "layer 0 lists neither kept nor dropped experts, it holds n_dropped, agg_min",
    ),
    "a probe of routers": (
        {"prompts": [{"bench": "x"}], "by_model": {"v4": {"x/1": {"router_per_layer": {}}}}},
        "lists no experts by layer: key 'prompts', 'by_model' names no layer",
    ),
    "a ranking": ({"ranking": RANKING}, "ranks experts under ranking and says not how many stay"),
    "a ranking per layer": (
        {"layers": {n: {"ranked_experts": ids} for n, ids in RANKING.items()}},
        "layer 0 ranks experts and says not how many stay",
    ),
    "counts": ({"layers": {"0": 3, "1": 3}}, "holds how many experts stay but not which"),
    "two records of a layer": (
        shuffled(KEPT, "kept") + shuffled(KEPT, "kept")[:1],
        "has two records of layer 0",
    ),
    "an expert twice in records": (
        {"pruned": records(DROPPED) + records({0: [2]})},
        "layer 0: expert 2 is listed twice",
    ),
    "records of experts and of layers": (
        [{"layer": 0, "expert": 1}, {"layer": 1, "dropped": [2]}],
        "has records with and without an expert (layer 1)",
    ),
    "a repeated key in a record": (
        '[{"layer": 0, "kept": [1], "kept": [2]}]',
        "the object under 'layers' names 'kept' twice",
    ),
    "a broken line": ('{"layer": 0, "kept": [1]}\n{"layer": 1, kept}\n', "line 2 of the keep-list"),
    "both without names of layers": (
        {"keep": [[0], [1]], "drop": [[1], [0]]},
        "says both keep and drop, and names no layers",
    ),
    "a list of the other kind among layers": (
        {"kept": {**{str(n): ids for n, ids in KEPT.items()}, "dropped": DROPPED}},
        "key 'dropped' names no layer",
    ),
    "another number of rows": ({"keep": [[0], [1], [2]]}, "lists 3 layers without names"),
    "a number beside another list": ({"0": {"retained": [1], "kept": 2}}, "and says 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_keep_list_is_refused_for_its_own_reason(tmp_path: Path, case: str) -> None:
    value, problem = REFUSED[case]
    with pytest.raises(KeepListError) as caught:
        kept(saved(tmp_path, value))
    assert problem in caught.value.problem


def test_lists_says_it_on_the_command_line_and_in_python(tmp_path: Path) -> None:
    lists = {n: [*range(n, n + 8)] for n in range(3)}
    path = saved(tmp_path, lists)
    for word, stay in (("kept", True), ("dropped", False)):
        plan = shardsurgeon.plan(FIXTURE, plan_file=path, lists=word, out=tmp_path / "out")
        for layer, keep in plan.decision.keep.layers.items():
            assert list(keep.retained if stay else keep.pruned) == lists[layer]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not there")
@pytest.mark.parametrize(
    ("name", "meaning", "layers", "experts", "left"),
    [
        ("omni_drop_map_184e.json", None, 40, 256, 184),
        ("omni_drop_map_184e_coder.json", None, 40, 256, 184),
        ("omni_gemma4_drop_map.json", "dropped", 30, 128, 98),
        ("omni_gemma4_keep_metadata.json", None, 30, 128, 62),
    ],
)
def test_published_lists_keep_what_they_say(
    name: str, meaning: str | None, layers: int, experts: int, left: int
) -> None:
    said = json.loads((PUBLISHED / name).read_text())
    file = read_keeplist(PUBLISHED / name, meaning)
    mtp = [layers] if "mtp.0" in file.layers else []
    resolved = resolve(file, range(layers), experts, mtp, num_layers=layers)
    for layer in range(layers):
        keep = resolved.layers[layer]
        assert len(keep.retained) == left
        if "per_layer_keep" in said:
            assert list(keep.retained) == sorted(said["per_layer_keep"][str(layer)])
            assert list(keep.pruned) == sorted(said["per_layer_drop"][str(layer)])
        else:
            assert list(keep.pruned) == sorted(said[str(layer)])
