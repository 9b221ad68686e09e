"""Keep-lists of every tool mean what their own words say, or are refused."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import KeepListError
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.pruning.keep_list_shapes import KeepListFile
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep, resolve, write_plan

KEPT = {1: (0, 2), 2: (1, 3)}
DROPPED = {1: (1, 3), 2: (0, 2)}


def saved(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "list.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def read(tmp_path: Path, value: object, **options: object) -> KeepListFile:
    return read_keeplist(saved(tmp_path, value), **options)


def kept(file: KeepListFile, **options: object) -> dict[int, tuple[int, ...]]:
    resolved = resolve(file, [1, 2], 4, **options)
    assert resolved.num_experts == 4
    for layer in resolved.layers.values():
        assert sorted(layer.retained + layer.pruned) == [0, 1, 2, 3]
    return {number: layer.retained for number, layer in resolved.layers.items()}


def refused(tmp_path: Path, value: object, **options: object) -> KeepListError:
    with pytest.raises(KeepListError) as caught:
        read(tmp_path, value, **options)
    assert caught.value.where == str(tmp_path / "list.json")
    return caught.value


def by_layer(lists: dict[int, tuple[int, ...]]) -> dict[str, list[int]]:
    return {str(layer): list(ids) for layer, ids in lists.items()}


class TestShapes:
    @pytest.mark.parametrize(
        "value",
        [
            {"kept": by_layer(KEPT)},
            {"dropped": by_layer(DROPPED)},
            {str(n): {"kept": ids, "keep": 2} for n, ids in KEPT.items()},
            {str(n): {"dropped": ids} for n, ids in DROPPED.items()},
            {"n_expert": 4, "metric": "sal", "source": "x", "keep": by_layer(KEPT)},
            {f"model.layers.{n}.mlp": ids for n, ids in KEPT.items()},
            {**by_layer(DROPPED), "mtp": [0, 1]},
            {"kept": {f"layer_{n}": ids[::-1] for n, ids in KEPT.items()}},
            {"kept": {f"blk.{n}": ids for n, ids in KEPT.items()}, "num_experts": 4},
        ],
        ids=[
            "kept wrapper",
            "dropped wrapper",
            "kept per layer",
            "dropped per layer",
            "llama.cpp",
            "llm-compressor",
            "drop map with mtp",
            "unsorted",
            "gguf names",
        ],
    )
    def test_a_file_says_itself_whether_its_ids_stay_or_go(
        self, tmp_path: Path, value: object
    ) -> None:
        survivors = kept(read(tmp_path, value), mtp_layers=[3])
        assert {layer: survivors[layer] for layer in (1, 2)} == KEPT

    def test_bare_lists_are_never_guessed(self, tmp_path: Path) -> None:
        error = refused(tmp_path, by_layer(KEPT))
        assert error.problem == "its lists could be kept or dropped experts"
        assert error.remedy == "say which with --lists kept or --lists dropped"

    def test_the_caller_may_say_what_bare_lists_mean(self, tmp_path: Path) -> None:
        assert kept(read(tmp_path, by_layer(KEPT), meaning="kept")) == KEPT
        assert kept(read(tmp_path, by_layer(DROPPED), meaning="dropped")) == KEPT

    @pytest.mark.parametrize(
        "value",
        [
            {"kept": by_layer(KEPT)},
            {"keep": by_layer(KEPT)},
            {f"model.layers.{n}.mlp": ids for n, ids in KEPT.items()},
            {str(n): {"kept": ids} for n, ids in KEPT.items()},
        ],
    )
    def test_the_caller_may_not_contradict_the_file(self, tmp_path: Path, value: object) -> None:
        problem = refused(tmp_path, value, meaning="dropped").problem
        assert problem == "its lists are kept experts, not dropped"

    def test_residency_plans_are_refused_by_name(self, tmp_path: Path) -> None:
        value = {"perLayer": {"layer_1": {"numExperts": 4, "coreExperts": [1]}}}
        assert "residency plan of reap-expert-swap" in refused(tmp_path, value).problem

    def test_a_file_as_powershell_writes_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "list.json"
        path.write_bytes(b'\xef\xbb\xbf{"kept":\r\n{"1": [0, 2], "2": [1, 3]}}')
        assert kept(read_keeplist(path)) == KEPT

    def test_layers_may_keep_different_numbers(self, tmp_path: Path) -> None:
        lists = {1: (0,), 2: (1, 2, 3)}
        assert kept(read(tmp_path, {"kept": by_layer(lists)})) == lists

    def test_a_layer_may_drop_no_expert_where_others_do(self, tmp_path: Path) -> None:
        file = read(tmp_path, {"dropped": {"1": [3], "2": []}})
        assert kept(file) == {1: (0, 1, 2), 2: (0, 1, 2, 3)}


class TestMtpLayers:
    def test_names_are_numbered_behind_the_models_layers(self, tmp_path: Path) -> None:
        value = {"kept": {**by_layer(KEPT), "mtp.1": [3], "mtp.layers.0.mlp": [2]}}
        file = read(tmp_path, value)
        expected = {**KEPT, 9: (2,), 10: (3,)}
        assert kept(file, mtp_layers=[9, 10]) == expected
        assert kept(file, mtp_layers=[9, 10], num_layers=9) == expected

    def test_an_mtp_layer_without_experts_has_its_number_all_the_same(self, tmp_path: Path) -> None:
        file = read(tmp_path, {"kept": {**by_layer(KEPT), "mtp.1": [3]}})
        assert kept(file, mtp_layers=[4], num_layers=3) == {**KEPT, 4: (3,)}

    def test_a_list_may_leave_them_out(self, tmp_path: Path) -> None:
        assert kept(read(tmp_path, {"kept": by_layer(KEPT)}), mtp_layers=[3]) == KEPT

    def test_a_bare_drop_map_without_mtp_prunes_them_like_its_first_layer(
        self, tmp_path: Path
    ) -> None:
        file = read(tmp_path, by_layer(DROPPED), meaning="dropped")
        assert kept(file, mtp_layers=[3]) == {**KEPT, 3: KEPT[1]}

    def test_a_drop_map_with_mtp_says_it_itself(self, tmp_path: Path) -> None:
        file = read(tmp_path, {**by_layer(DROPPED), "mtp": [0, 1]})
        assert kept(file, mtp_layers=[3]) == {**KEPT, 3: (2, 3)}

    def test_a_list_for_layers_the_model_lacks_is_refused(self, tmp_path: Path) -> None:
        file = read(tmp_path, {**by_layer(DROPPED), "mtp": [0, 1]})
        with pytest.raises(KeepListError, match=r"lists layer mtp\.0, the model has no MTP layer"):
            kept(file)

    def test_the_same_layer_under_two_names_is_refused(self, tmp_path: Path) -> None:
        file = read(tmp_path, {"kept": {**by_layer(KEPT), "3": [1], "mtp": [1]}})
        with pytest.raises(KeepListError, match=r"lists layer 3 twice, also as mtp\.0"):
            kept(file, mtp_layers=[3])


class TestAgainstTheModel:
    @pytest.mark.parametrize(
        ("layers", "experts", "problem"),
        [
            ([1, 2, 3], 4, "has no list for MoE layer 3"),
            ([0, 1, 2, 3, 4, 5, 6, 7], 4, "has no list for MoE layer 0, 3, 4, 5, 6 and 1 more"),
            ([1], 4, "lists layer 2, which has no experts in the model"),
            ([1, 2], 3, "layer 2 lists expert 3, the model has 3 per layer"),
        ],
    )
    def test_layers_and_ids_must_fit(
        self, tmp_path: Path, layers: list[int], experts: int, problem: str
    ) -> None:
        file = read(tmp_path, {"kept": by_layer(KEPT)})
        with pytest.raises(KeepListError) as caught:
            resolve(file, layers, experts)
        assert caught.value.problem == problem

    def test_the_number_of_experts_a_file_states_must_fit(self, tmp_path: Path) -> None:
        file = read(tmp_path, {"n_expert": 4, "keep": by_layer(KEPT)})
        with pytest.raises(KeepListError, match="is for 4 experts per layer, the model has 8"):
            resolve(file, [1, 2], 8)

    def test_a_layer_must_keep_an_expert(self, tmp_path: Path) -> None:
        file = read(tmp_path, {"dropped": {"1": [0, 1, 2, 3], "2": [0]}})
        with pytest.raises(KeepListError, match="layer 1 drops all 4 experts"):
            kept(file)


class TestOurOwnFiles:
    KEEP = KeepList(
        4,
        {
            2: LayerKeep((1, 3), (0, 2), (3,), (0.5, 1.0, None, -0.0)),
            1: LayerKeep((0, 2), (1, 3)),
        },
    )

    def written(self) -> bytes:
        source = {"name": "Kimi", "config_sha256": "ab"}
        model = {"model_type": "kimi_k2", "top_k": 2}
        return write_plan(self.KEEP, selection={"keep": 2}, source=source, model=model)

    def test_a_plan_is_json_with_a_line_per_layer(self) -> None:
        assert self.written().decode() == (
            "{\n"
            '  "format": 1,\n'
            '  "kind": "shardsurgeon-plan",\n'
            '  "num_experts": 4,\n'
            '  "selection": {"keep": 2},\n'
            '  "source": {"name": "Kimi", "config_sha256": "ab"},\n'
            '  "model": {"model_type": "kimi_k2", "top_k": 2},\n'
            '  "layers": {\n'
            '    "1": {"retained": [0, 2], "pruned": [1, 3], "preserved": [], "saliency": null},\n'
            '    "2": {"retained": [1, 3], "pruned": [0, 2], "preserved": [3], '
            '"saliency": [0.5, 1.0, null, -0.0]}\n'
            "  }\n"
            "}\n"
        )

    def test_a_plan_comes_back_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_bytes(self.written())
        file = read_keeplist(path)
        assert not file.original_ids
        assert resolve(file, [1, 2], 4) == self.KEEP

    def test_a_plan_says_where_a_layer_had_fewer_experts(self, tmp_path: Path) -> None:
        keep = KeepList(4, {1: LayerKeep((0, 2), (1, 3)), 2: LayerKeep((0, 1), ())})
        plan = json.loads(write_plan(keep, selection={}, source={}, model={}))
        assert "num_experts_before" not in plan["layers"]["1"]
        assert plan["layers"]["2"]["num_experts_before"] == 2
        assert resolve(read(tmp_path, plan), [1, 2], 4, per_layer={2: 2}) == keep
        with pytest.raises(KeepListError, match="layer 2 is for 2 experts, the model has 4 there"):
            resolve(read(tmp_path, plan), [1, 2], 4)
        plan["layers"]["2"]["num_experts_before"] = 5
        assert "num_experts_before is 5, others have 4" in refused(tmp_path, plan).problem

    def test_what_json_has_no_number_for_is_written_as_null(self) -> None:
        odd = KeepList(3, {1: LayerKeep((0, 1), (2,), (0,), (math.inf, 1.0, math.nan))})
        plan = json.loads(write_plan(odd, selection={}, source={}, model={}))
        assert plan["layers"]["1"]["saliency"] == [None, 1.0, None]

    def test_the_metadata_of_a_pruned_checkpoint_is_a_keep_list_of_the_original(
        self, tmp_path: Path
    ) -> None:
        value = {
            "format": 1,
            "method": "reap",
            "metric": "reap",
            "num_experts_before": 4,
            "num_experts_after": 2,
            "layers": {
                "1": {
                    "retained": [0, 2],
                    "pruned": [1, 3],
                    "preserved": [2],
                    "min_retained_saliency": 2.0,
                    "max_pruned_saliency": 1.0,
                    "saliency": [2.0, 1.0, 0.5, 0.25],
                }
            },
        }
        file = read(tmp_path, value)
        assert file.original_ids
        assert resolve(file, [1], 4).layers == {
            1: LayerKeep((0, 2), (1, 3), (2,), (2.0, 1.0, 0.5, 0.25))
        }
        with pytest.raises(KeepListError, match="is for 4 experts per layer, the model has 2"):
            resolve(file, [1], 2)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"format": 2}, "is a plan of format 2, 1 is known"),
            ({"num_experts": "4"}, "num_experts is '4'"),
            ({"num_experts": 5}, "2 retained, 2 pruned and 0 preserved ids do not make up 5"),
            ({"num_experts": 3}, "layer 1, pruned: 3 is not an expert id between 0 and 2"),
            ({"layers": {}}, "lists no layer"),
            ({"layers": [1]}, "layers is [1], not an object"),
            ({"layers": {"1": [1]}}, "layer 1 is [1], not an object"),
            ({"layers": {"1": {"retained": [0, 1], "pruned": [1, 2]}}}, "do not make up 4"),
            ({"layers": {"1": {"retained": [0]}}}, "layer 1, pruned: None is not a list"),
        ],
    )
    def test_a_plan_that_does_not_add_up_is_refused(
        self, tmp_path: Path, change: dict[str, object], problem: str
    ) -> None:
        assert problem in refused(tmp_path, {**json.loads(self.written()), **change}).problem

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"preserved": [1]}, "do not make up 4"),
            ({"saliency": [1.0]}, "saliency is not a list of 4 numbers"),
            ({"saliency": [1.0, 2.0, True, 3.0]}, "True is not a saliency"),
            ({"saliency": [10**400, 2.0, 1.0, 3.0]}, "is not a saliency"),
        ],
    )
    def test_a_layer_of_a_plan_that_does_not_add_up_is_refused(
        self, tmp_path: Path, change: dict[str, object], problem: str
    ) -> None:
        plan = json.loads(self.written())
        plan["layers"]["1"].update(change)
        assert problem in refused(tmp_path, plan).problem


class TestRefusals:
    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            ("", "the keep-list is not JSON"),
            ("[1]", "not a JSON object"),
            ('{"kept": {"1": [0], "1": [1]}}', "the object under 'kept' names '1' twice"),
            ('{"kept": 1, "kept": 2}', "names 'kept' twice"),
            ('{"1": {"kept": [1], "kept": [2]}}', "the object under '1' names 'kept' twice"),
            ({}, "lists no layer"),
            ({"kept": {}}, "lists no layer"),
            ({"kept": {"1": [0]}, "keep": {"1": [0]}}, "says both kept and keep"),
            ({"kept": {"1": [0, 0]}}, "layer 1: expert 0 is listed twice"),
            ({"kept": {"1": [-1]}}, "layer 1: -1 is not an expert id"),
            ({"kept": {"1": [1.0]}}, "layer 1: 1.0 is not an expert id"),
            ({"kept": {"1": [True]}}, "layer 1: True is not an expert id"),
            ({"kept": {"1": ["2"]}}, "layer 1: '2' is not an expert id"),
            ({"kept": {"1": [4]}, "num_experts": 4}, "4 is not an expert id between 0 and 3"),
            ({"kept": {"1": [1]}, "num_experts": 4.0}, "num_experts is 4.0"),
            ({"kept": {"1": []}}, "layer 1: lists no expert"),
            ({"kept": {"1": 7}}, "layer 1: 7 is not a list"),
            ({"kept": {"1": None}}, "layer 1: None is not a list"),
            ({"kept": {"x": [1]}}, "key 'x' names no layer"),
            ({"kept": {"1": [1], "layer_1": [2]}}, "'1' and 'layer_1' are both layer 1"),
            ({"1": [1], "x": [2]}, "key 'x' names no layer"),
            ({"3": 116, "4": 120}, "how many experts stay but not which"),
            ({"1": {"kept": [1], "keep": 2}}, "layer 1 lists 1 experts and says 2"),
            ({"1": {"kept": [1], "dropped": [2]}}, "1 kept and 1 dropped ids do not make up 2"),
            ({"1": {"ids": [1]}}, "layer 1 lists neither kept nor dropped experts, it holds ids"),
            ({"1": {"kept": [1]}, "2": {"dropped": [1]}}, "kept experts in some layers"),
            ({"model.layers.1.mlp": [1], "2": [1]}, "could be kept or dropped"),
            ({"model.layers.1.mlp": [1], "mtp": [1]}, "could be kept or dropped"),
            ({"layers.1": [1]}, "could be kept or dropped"),
        ],
    )
    def test_lists_that_are_ambiguous_or_broken_are_refused(
        self, tmp_path: Path, value: object, problem: str
    ) -> None:
        assert problem in refused(tmp_path, value).problem

    def test_missing_files_and_folders(self, tmp_path: Path) -> None:
        for path in (tmp_path / "missing.json", tmp_path):
            with pytest.raises(KeepListError, match="cannot be read"):
                read_keeplist(path)


IDS = st.lists(st.one_of(st.integers(-1, 5), st.integers(), st.none(), st.booleans()), max_size=4)
WORDS = ["1", "2", "mtp", "kept", "dropped", "keep", "model.layers.1.mlp", "kind", "layers"]
KEYS = st.sampled_from([*WORDS, "retained", "pruned", "num_experts", "num_experts_before", "x"])
LEAVES = st.one_of(IDS, st.integers(0, 4), st.just("shardsurgeon-plan"), st.none())


def tables(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.dictionaries(KEYS, inner, max_size=4)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(KEYS, st.recursive(LEAVES, tables, max_leaves=10), max_size=4),
    st.sampled_from([None, "kept", "dropped"]),
)
def test_any_json_gives_a_keep_list_or_a_refusal(
    tmp_path: Path, value: object, meaning: str | None
) -> None:
    with contextlib.suppress(KeepListError):
        kept(read(tmp_path, value, meaning=meaning), mtp_layers=[3])
