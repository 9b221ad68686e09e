"""Layers that keep different numbers of experts: chosen, written, read again, and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import ConfigError, KeepListError, UsageError
from shardsurgeon.operations import inspect, prune, verify
from shardsurgeon.operations.apply import apply
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.pruning.planner import SizeEstimate
from shardsurgeon.pruning.request import Allocation, MtpPolicy, SelectionRequest
from shardsurgeon.storage.source import MemorySource
from tests.support import tiny

KEPT = {1: [0, 2, 5], 2: [1, 3, 4, 6, 7]}


def model(folder: Path, **arguments: Any) -> Path:
    """The tiny checkpoint on disk."""
    folder.mkdir()
    for name, content in tiny.files(**arguments).items():
        (folder / name).write_bytes(content)
    return folder


def keep_list(path: Path, kept: dict[int, list[int]]) -> Path:
    path.write_text(
        json.dumps({str(n): {"kept": ids, "keep": len(ids)} for n, ids in kept.items()})
    )
    return path


def scores(path: Path, values: dict[int, list[float]]) -> Path:
    path.write_text(json.dumps({str(layer): row for layer, row in values.items()}))
    return path


# Layer 1 has two experts that matter, layer 2 eight that matter alike.
PEAKED = {
    1: [0.0, 50.0, 0.1, 0.0, 49.0, 0.2, 0.1, 0.3],
    2: [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
}


def applied(source: Path, out: Path, request: SelectionRequest, table: Path | None = None) -> Path:
    report = apply(prune.plan(source, table, request, out=out))
    assert report.verification is not None and report.verification.holds
    return out


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_keep_list_with_different_counts_per_layer_must_be_allowed(tmp_path: Path) -> None:
    source, plan = model(tmp_path / "m"), keep_list(tmp_path / "keep.json", KEPT)
    with pytest.raises(KeepListError) as caught:
        prune.plan(str(source), None, SelectionRequest(plan_file=plan))
    assert "layer 1 keeps 3 experts, layer 2 5" in str(caught.value)
    assert "--allow-nonuniform" in str(caught.value)


def test_every_layer_ends_with_its_own_experts_and_the_config_says_how_many(
    tmp_path: Path,
) -> None:
    source, plan = model(tmp_path / "m"), keep_list(tmp_path / "keep.json", KEPT)
    request = SelectionRequest(plan_file=plan, allow_nonuniform=True, mtp=MtpPolicy.LAST)
    out = applied(source, tmp_path / "out", request)
    before, after = tensors_of(source), tensors_of(out)
    # The MTP layer follows the last layer, which keeps the most.
    for layer, ids in {**KEPT, 3: KEPT[2]}.items():
        prefix = f"model.layers.{layer}.mlp"
        names = {name for name in after if name.startswith(f"{prefix}.experts.")}
        assert len(names) == 2 * len(ids)
        for new, old in enumerate(ids):
            there = after[f"{prefix}.experts.{new}.up_proj.weight"]
            assert np.array_equal(there, before[f"{prefix}.experts.{old}.up_proj.weight"])
        for part in ("gate.weight", "gate.e_score_correction_bias"):
            assert np.array_equal(after[f"{prefix}.{part}"], before[f"{prefix}.{part}"][ids])
    text = (source / "config.json").read_text().replace('_experts": 8', '_experts": 5')
    added = """,
  "num_routed_experts_per_layer": [
    0,
    3,
    5,
    5
  ],
  "per_layer_config": {
    "1": {
      "n_routed_experts": 3
    },
    "2": {
      "n_routed_experts": 5
    }
  }
}"""
    assert (out / "config.json").read_text() == text.removesuffix("\n}") + added
    metadata = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    assert (metadata["format"], metadata["num_experts_after"]) == (2, 5)
    assert metadata["ratio"] == 11 / 24


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            lambda config: config["num_routed_experts_per_layer"].__setitem__(1, 4),
            "per_layer.1 is 4",
        ),
        (lambda config: config.pop("num_routed_experts_per_layer"), "per_layer is missing"),
        (lambda config: config.update(n_routed_experts=3), "n_routed_experts is 3, expected 5"),
    ],
)
def test_verification_finds_a_count_that_is_not_its_layers_own(
    tmp_path: Path, spoil: Any, found: str
) -> None:
    source, plan = model(tmp_path / "m"), keep_list(tmp_path / "keep.json", KEPT)
    request = SelectionRequest(plan_file=plan, allow_nonuniform=True, mtp=MtpPolicy.LAST)
    out = applied(source, tmp_path / "out", request)
    config = config_of(out)
    spoil(config)
    (out / "config.json").write_text(json.dumps(config))
    report = verify.verify(str(source), str(out))
    assert any(found in difference for difference in report.differences)


def test_the_report_says_which_engines_misread_the_model(tmp_path: Path) -> None:
    source, plan = model(tmp_path / "m"), keep_list(tmp_path / "keep.json", KEPT)
    request = SelectionRequest(plan_file=plan, allow_nonuniform=True)
    pruning = prune.plan(str(source), None, request)
    (note,) = [note for note in pruning.report.notes if "num_routed_experts_per_layer" in note]
    assert note.startswith("layers keep 3 to 5 experts")
    assert "which no stock engine reads, and per_layer_config says it again, to stop them: " in note
    assert "stock transformers and vLLM would refuse to load it" in note
    assert "nemotron_h_puzzle (block_configs)" in note
    assert pruning.out.name == "m-REAP-4e-nonuniform"


def test_mtp_layers_end_with_the_count_that_the_config_says(tmp_path: Path) -> None:
    source = model(tmp_path / "m")

    def planned(kept: dict[int, list[int]], mtp: MtpPolicy) -> Pruning:
        plan = keep_list(tmp_path / "keep.json", kept)
        request = SelectionRequest(plan_file=plan, allow_nonuniform=True, mtp=mtp)
        return prune.plan(str(source), None, request)

    by_norm = planned(KEPT, MtpPolicy.ROUTER_NORM).decision
    assert [len(layer.retained) for layer in by_norm.keep.layers.values()] == [3, 5, 5]
    swapped = {1: KEPT[2], 2: KEPT[1]}
    with pytest.raises(UsageError, match=r"layer 3 keeps 5 of 8 experts, the last main layer 3"):
        planned(swapped, MtpPolicy.LAST)
    with pytest.raises(KeepListError, match=r"MTP layer 3 keeps 3 experts, the largest layer 5: "):
        planned({**KEPT, 3: [0, 1, 2]}, MtpPolicy.ROUTER_NORM)
    dropped = planned(KEPT, MtpPolicy.DROP)
    config = json.loads(dict(dropped.plan.generated_files)["config.json"])
    assert config["num_routed_experts_per_layer"] == [0, 3, 5]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_full_mtp_layer_is_refused_where_it_would_share_the_count(
    tmp_path: Path, allowed: bool
) -> None:
    source = model(tmp_path / "m")
    plan = keep_list(tmp_path / "keep.json", {1: KEPT[1], 2: KEPT[1], 3: [*range(8)]})
    request = SelectionRequest(plan_file=plan, allow_nonuniform=allowed)
    with pytest.raises(KeepListError, match=r"MTP layer 3 keeps 8 experts, the others 3: .* one"):
        prune.plan(str(source), None, request)
    table = scores(tmp_path / "s.json", PEAKED)
    with pytest.raises(UsageError, match=r"--mtp: keep leaves MTP layer 3 its 8 .* others keep 4"):
        prune.plan(str(source), str(table), SelectionRequest(keep=4, mtp=MtpPolicy.KEEP))


def test_verification_finds_an_mtp_count_that_stands_for_the_main_layers(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    plan = keep_list(tmp_path / "keep.json", {layer: [0, 2, 5] for layer in (1, 2, 3)})
    out = applied(source, tmp_path / "out", SelectionRequest(plan_file=plan))
    path = out / "calibration" / "reap_pruning_metadata.json"
    record = json.loads(path.read_text())
    mtp = record["layers"]["3"]
    mtp["retained"], mtp["pruned"] = [*range(8)], []
    record |= {"format": 2, "num_experts_after": 8}
    record["steps"][0]["num_experts_after"] = 8
    path.write_text(json.dumps(record))
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    found = verify.verify(str(source), str(out)).differences
    assert any("n_routed_experts is 8, expected 3" in difference for difference in found)
    assert any("8 experts are left in MTP layer 3" in difference for difference in found)


def test_a_global_allocation_gives_the_budget_to_the_layers_that_need_it(tmp_path: Path) -> None:
    source, table = model(tmp_path / "m"), scores(tmp_path / "s.json", PEAKED)
    request = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL)
    pruning = prune.plan(str(source), str(table), request)
    layers = {layer.layer: layer for layer in pruning.report.layers}
    # Top-k is 2, the budget 8: every further expert of layer 1 carries less than one of layer 2.
    assert [layers[n].kept for n in (1, 2, 3)] == [2, 6, 6]
    assert layers[1].saliency_dropped == pytest.approx(0.7 / 99.7)
    assert layers[1].saliency_dropped_uniform == pytest.approx(0.2 / 99.7)
    assert layers[2].saliency_dropped == pytest.approx(2.1 / 10.8)
    assert layers[2].saliency_dropped_uniform == pytest.approx(4.6 / 10.8)
    assert layers[3].saliency_dropped_uniform is None
    assert pruning.report.allocate == "global"
    assert "8 experts kept in 2 layers together" in pruning.report.notes


def test_a_global_allocation_is_written_only_when_allowed_and_the_same_from_its_plan(
    tmp_path: Path,
) -> None:
    source, table = model(tmp_path / "m"), scores(tmp_path / "s.json", PEAKED)
    request = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL)
    pruning = prune.plan(str(source), str(table), request, out=tmp_path / "no")
    with pytest.raises(UsageError, match=r"--allow-nonuniform: is needed: layers keep 2 to 6"):
        apply(pruning)
    assert not (tmp_path / "no").exists()
    pruning.write_plan(tmp_path / "plan.json")
    allowed = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL, allow_nonuniform=True)
    first = applied(source, tmp_path / "first", allowed, table)
    again = SelectionRequest(plan_file=tmp_path / "plan.json", allow_nonuniform=True)
    second = applied(source, tmp_path / "second", again)
    assert config_of(first) == config_of(second)
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_global_allocation_that_comes_out_uniform_needs_no_permission(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    same = {layer: [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0] for layer in (1, 2)}
    table = scores(tmp_path / "s.json", same)
    request = SelectionRequest(keep=4, allocate=Allocation.GLOBAL)
    out = applied(source, tmp_path / "out", request, table)
    assert "num_routed_experts_per_layer" not in config_of(out)


def test_the_choice_of_the_last_layer_is_widened_by_its_scores_for_mtp_layers(
    tmp_path: Path,
) -> None:
    source = model(tmp_path / "m")
    table = scores(tmp_path / "s.json", {1: PEAKED[2], 2: PEAKED[1]})
    request = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL, mtp=MtpPolicy.LAST)
    keep = prune.plan(str(source), str(table), request).decision.keep
    assert keep.layers[2].retained == (1, 4)
    assert keep.layers[3].retained == (1, 2, 4, 5, 6, 7)


@pytest.mark.parametrize("spare", [0, 1, 300])
def test_a_target_size_is_kept_to_by_a_global_allocation(tmp_path: Path, spare: int) -> None:
    source, table = model(tmp_path / "m"), scores(tmp_path / "s.json", PEAKED)

    def planned(**words: Any) -> Pruning:
        return prune.plan(str(source), str(table), SelectionRequest(**words))

    def weight_files(pruning: Pruning) -> int:
        return sum(shard.nbytes for shard in pruning.plan.shards)

    # As large as a uniform four of eight may get at most, and a little more.
    four = SizeEstimate(
        (checkpoint := open_checkpoint(source)), read_anatomy(checkpoint), MtpPolicy.ROUTER_NORM
    ).nbytes(4)
    fitting = planned(target_size=four + spare, allocate=Allocation.GLOBAL)
    assert weight_files(fitting) <= four + spare
    kept = sum(len(fitting.decision.keep.layers[n].retained) for n in (1, 2))
    # The MTP layer follows the largest layer, which takes from the budget.
    assert 4 < kept < 8
    ids = SelectionRequest(keep=4, allocate=Allocation.GLOBAL)
    assert weight_files(prune.plan(str(source), str(table), ids)) > four


def test_a_model_whose_layers_differ_is_pruned_again(tmp_path: Path) -> None:
    source, plan = model(tmp_path / "m"), keep_list(tmp_path / "keep.json", KEPT)
    request = SelectionRequest(plan_file=plan, allow_nonuniform=True, mtp=MtpPolicy.LAST)
    first = applied(source, tmp_path / "first", request)
    report = inspect.inspect(str(first))
    assert (report.num_experts, report.num_experts_per_layer) == (5, {1: 3, 2: 5, 3: 5})
    # Scores of the original: of layer 1's 0, 2, 5 the best two, of layer 2's 1, 3, 4, 6, 7.
    table = scores(tmp_path / "s.json", PEAKED)
    same = SelectionRequest(keep=2, mtp=MtpPolicy.LAST)
    second = applied(first, tmp_path / "second", same, table)
    assert config_of(second)["num_routed_experts_per_layer"] == [0, 2, 2, 2]
    assert config_of(second)["n_routed_experts"] == 2
    metadata = json.loads((second / "calibration" / "reap_pruning_metadata.json").read_text())
    assert metadata["format"] == 1
    assert metadata["layers"]["1"]["retained"] == [2, 5]
    assert metadata["layers"]["2"]["retained"] == [6, 7]
    assert [step["num_experts_after"] for step in metadata["steps"]] == [5, 2]
    # A ratio is of each layer's own: one of three, two of five.
    own = SelectionRequest(ratio=0.4, allow_nonuniform=True, mtp=MtpPolicy.DROP)
    third = applied(first, tmp_path / "third", own, table)
    assert config_of(third)["num_routed_experts_per_layer"] == [0, 2, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_routed_experts_per_layer": [0, 8, 7, 8]},
            "has 8 experts in dimension 0, expected 7",
        ),
        ({"num_routed_experts_per_layer": 8}, "num_routed_experts_per_layer is not a list"),
        ({"num_routed_experts_per_layer": [0, "8"]}, "expected a whole number for each layer"),
        (
            {"num_routed_experts_per_layer": [0, 8, 8, 8], "n_routed_experts": 9},
            "says 9 experts, the largest",
        ),
        ({"num_routed_experts_per_layer": {"1": 8}}, "is not a list"),
    ],
)
def test_a_list_that_contradicts_the_model_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(shardsurgeon.InputError) as caught:
        read_anatomy(open_checkpoint(tiny.source(content=tiny.config(**changes))))
    assert says in str(caught.value)


def test_counts_per_layer_are_written_beside_the_count_they_refine() -> None:
    source = Path(__file__).parents[2] / "fixtures" / "kimi_k25"
    request = SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL, allow_nonuniform=True)
    pruning = prune.plan(str(source), str(source / "scores.pt"), request)
    config = json.loads(dict(pruning.plan.generated_files)["config.json"])
    kept = [len(layer.retained) for layer in pruning.decision.keep.layers.values()]
    assert len(set(kept)) > 1
    expected = config_of(source)
    expected["text_config"]["n_routed_experts"] = max(kept)
    expected["text_config"]["num_routed_experts_per_layer"] = [0, *kept]
    expected["text_config"]["per_layer_config"] = {
        str(layer): {"n_routed_experts": count} for layer, count in enumerate(kept, start=1)
    }
    assert config == expected


# A Puzzle model: Mamba, MoE blocks of six and four experts, an MTP step with four.


def puzzle_config(**changes: Any) -> dict[str, Any]:
    moe = {"block_type": "moe", "num_experts_per_tok": 1}
    return {
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "block_configs": [
            {"block_type": "mamba"},
            {**moe, "n_routed_experts": 6, "num_experts_per_tok": 2},
            {**moe, "n_routed_experts": 4},
        ],
        "model_type": "nemotron_h_puzzle",
        "mtp_block_configs": [{"block_type": "attention"}, {**moe, "n_routed_experts": 4}],
        "mtp_n_routed_experts": 4,
        "n_groups": 4,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        **changes,
    }


def puzzle(others: Mapping[str, int] = MappingProxyType({}), **changes: Any) -> MemorySource:
    """The model; others: layers with another number of experts, which `changes` must say too."""
    numbers = np.random.default_rng(1)
    found: tiny.Tensors = {"backbone.layers.0.mixer.D": np.ones(6, np.float32)}
    found["mtp.layers.0.mixer.q_proj.weight"] = np.ones((6, 6), np.float32)
    blocks = {"backbone.layers.1": 6, "backbone.layers.2": 4, "mtp.layers.1": 4, **others}
    for prefix, experts in blocks.items():
        for expert in range(experts):
            for part in ("up_proj", "down_proj"):
                name = f"{prefix}.mixer.experts.{expert}.{part}.weight"
                found[name] = numbers.standard_normal((3, 3)).astype(np.float32)
        for part in ("gate.weight", "gate.e_score_correction_bias"):
            shape = (experts, 5) if part == "gate.weight" else (experts,)
            found[f"{prefix}.mixer.{part}"] = numbers.standard_normal(shape).astype(np.float32)
    files = {
        "config.json": json.dumps(puzzle_config(**changes), indent=2).encode(),
        "model.safetensors": save(found, {"format": "pt"}),
    }
    return MemorySource(files, name="puzzle")


def test_each_block_of_a_puzzle_model_has_its_own_number_of_experts() -> None:
    anatomy = read_anatomy(open_checkpoint(puzzle()))
    assert anatomy.experts_per_layer == {1: 6, 2: 4, 4: 4}
    assert (anatomy.num_experts, anatomy.top_k, anatomy.own_mtp_count) == (6, 2, True)
    # Without blocks of their own, MTP layers take their one count.
    alone = puzzle(mtp_block_configs=None)
    assert read_anatomy(open_checkpoint(alone)).experts_per_layer[4] == 4
    with pytest.raises(ConfigError, match="says 5 and 4 experts for layer 2"):
        read_anatomy(open_checkpoint(puzzle(num_routed_experts_per_layer=[0, 6, 5, 0, 4])))


def test_counts_of_a_puzzle_model_are_written_where_its_engine_reads_them(tmp_path: Path) -> None:
    table = {1: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2: [1.0, 2.0, 3.0, 4.0]}
    for word, kept in (({"ratio": 0.5}, (3, 2, 2)), ({"keep": 5}, (5, 4, 4))):
        request = SelectionRequest(allow_nonuniform=True, **word)
        pruning = prune.plan(
            open_checkpoint(puzzle()), str(scores(tmp_path / "s.json", table)), request
        )
        config = json.loads(dict(pruning.plan.generated_files)["config.json"])
        expected = puzzle_config(mtp_n_routed_experts=kept[2])
        for block, count in zip(expected["block_configs"][1:], kept, strict=False):
            block["n_routed_experts"] = count
        expected["mtp_block_configs"][1]["n_routed_experts"] = kept[2]
        assert config == expected
        assert any("block_configs.*.n_routed_experts" in note for note in pruning.report.notes)
        out = tmp_path / str(kept[0])
        apply(
            shardsurgeon.plan(
                open_checkpoint(puzzle()),
                tmp_path / "s.json",
                allow_nonuniform=True,
                out=out,
                **word,
            )
        )
        names = tensors_of(out)
        for prefix, count in zip(("backbone.layers.1", "backbone.layers.2"), kept, strict=False):
            assert names[f"{prefix}.mixer.gate.weight"].shape == (count, 5)
            assert f"{prefix}.mixer.experts.{count}.up_proj.weight" not in names


# An MTP layer that stays whole beside a pruned trunk, where the config has a count for it.


def like_layers() -> dict[str, Any]:
    """A puzzle config whose main layers and MTP layer begin with six experts each."""
    config = puzzle_config()
    for block in (config["block_configs"][2], config["mtp_block_configs"][1]):
        block["n_routed_experts"] = 6
    return config | {"mtp_n_routed_experts": 6}


def alike(**changes: Any) -> MemorySource:
    config = like_layers() | changes
    return puzzle({"backbone.layers.2": 6, "mtp.layers.1": 6}, **config)


SIX = {1: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2: [1.0, 2.0, 3.0, 4.0, 6.0, 5.0]}


@pytest.mark.parametrize("by", ["policy", "keep-list", "mtp.0", "policy over scores"])
def test_an_mtp_layer_stays_whole_where_the_config_counts_it_apart(tmp_path: Path, by: str) -> None:
    source, table = alike(), scores(tmp_path / "s.json", SIX)
    request = SelectionRequest(keep=2, mtp=MtpPolicy.KEEP)
    kept: dict[Any, list[int]] = {1: [0, 1], 2: [4, 5]}
    if by == "policy over scores":
        scores(table, SIX | {4: SIX[1]})
    elif by != "policy":
        listed = kept | {4 if by == "keep-list" else "mtp.0": [*range(6)]}
        request = SelectionRequest(plan_file=keep_list(tmp_path / "keep.json", listed))
    plan = prune.plan(open_checkpoint(source), str(table), request, out=tmp_path / "out")
    assert {n: keep.retained for n, keep in plan.decision.keep.layers.items()} == {
        1: (0, 1),
        2: (4, 5),
        4: (0, 1, 2, 3, 4, 5),
    }
    report = apply(plan)
    assert report.plan.num_experts_after == 2 and report.plan.stock_engines
    expected = like_layers()
    for block in expected["block_configs"][1:]:
        block["n_routed_experts"] = 2
    assert config_of(tmp_path / "out") == expected
    assert verify.verify(source, tmp_path / "out").holds
    nbytes = next(file.nbytes for file in source.list() if file.name == "model.safetensors")
    before, after = load(source.read("model.safetensors", 0, nbytes)), tensors_of(tmp_path / "out")
    mtp = {name for name in before if name.startswith("mtp.")}
    assert mtp == {name for name in after if name.startswith("mtp.")}
    assert all(np.array_equal(before[name], after[name]) for name in mtp)


def test_a_target_size_counts_an_mtp_layer_that_stays_whole(tmp_path: Path) -> None:
    checkpoint, table = open_checkpoint(alike()), scores(tmp_path / "s.json", SIX)
    anatomy = read_anatomy(checkpoint)

    def size(kept: int, mtp: MtpPolicy) -> int:
        return SizeEstimate(checkpoint, anatomy, mtp).nbytes(kept)

    assert size(4, MtpPolicy.ROUTER_NORM) < size(4, MtpPolicy.KEEP) < size(5, MtpPolicy.KEEP)
    limit = size(4, MtpPolicy.KEEP)
    request = SelectionRequest(target_size=limit, mtp=MtpPolicy.KEEP)
    plan = prune.plan(checkpoint, str(table), request)
    assert sum(shard.nbytes for shard in plan.plan.shards) <= limit
    assert [len(keep.retained) for keep in plan.decision.keep.layers.values()] == [4, 4, 6]


def test_a_count_of_0_for_mtp_layers_means_that_of_the_others(tmp_path: Path) -> None:
    source = alike(mtp_n_routed_experts=0, mtp_block_configs=None)
    assert read_anatomy(open_checkpoint(source)).experts_per_layer == {1: 6, 2: 6, 4: 6}
    table = scores(tmp_path / "s.json", SIX)
    plan = prune.plan(open_checkpoint(source), str(table), SelectionRequest(keep=2))
    config = json.loads(dict(plan.plan.generated_files)["config.json"])
    assert config["mtp_n_routed_experts"] == 0
    whole = SelectionRequest(keep=2, mtp=MtpPolicy.KEEP)
    apply(prune.plan(open_checkpoint(source), str(table), whole, out=tmp_path / "out"))
    assert config_of(tmp_path / "out")["mtp_n_routed_experts"] == 6
    assert verify.verify(source, tmp_path / "out").holds
