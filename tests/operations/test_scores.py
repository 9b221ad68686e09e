"""The commands of `scores` on real files: fixtures, torch's own files, generated calibrations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from shardsurgeon.cli.main import main
from shardsurgeon.errors import OutputError, ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import read_calibration
from shardsurgeon.operations import prune, scores
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.scores.files import read_scores, write_scores
from tests.layerwise.files import calibration
from tests.support import torch_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
K25, V3 = FIXTURES / "kimi_k25", FIXTURES / "deepseek_v3"
NAN, INF = float("nan"), float("inf")


def pt(path: Path, value: object) -> Path:
    return torch_file.save(value, path)


def uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[-1]).random(shape, np.float32)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# show


@pytest.mark.torch
def test_show_says_of_each_layer_what_torch_finds_in_the_file() -> None:
    import torch

    report = scores.show_scores(K25 / "scores.pt")
    table = torch.load(K25 / "scores.pt", weights_only=True)
    assert (report.metric, report.num_experts, report.model) == ("reap", 32, None)
    assert [layer.layer for layer in report.layers] == sorted(table)
    for layer in report.layers:
        row = table[layer.layer]["reap"].double()
        assert (layer.min, layer.max) == (row.min().item(), row.max().item())
        assert layer.median == row.quantile(0.5).item()
        unrouted = (table[layer.layer]["expert_frequency"] == 0).nonzero().flatten().tolist()
        assert list(layer.never_routed) == unrouted
        lost = row.sort().values.cumsum(0) / row.sum()
        assert layer.removable == {
            str(limit): int((lost <= limit).sum()) for limit in (0.01, 0.05, 0.1, 0.25)
        }
    assert report.super_experts_known
    assert report.calibration is None


def test_a_suggested_cut_costs_what_plan_says_of_its_ratio() -> None:
    report = scores.show_scores(V3 / "scores.pt", V3)
    assert report.model == "deepseek_v3"
    assert [layer.is_mtp for layer in report.layers] == [False, False]
    cut = report.cuts[-1]
    plan = prune.plan(V3, V3 / "scores.pt", SelectionRequest(ratio=cut.ratio)).report
    assert plan.num_experts_after == cut.kept
    dropped = {layer.layer: layer.saliency_dropped or 0 for layer in plan.layers[:2]}
    assert cut.mean_lost == pytest.approx(sum(dropped.values()) / 2)
    assert (cut.worst_lost, cut.worst_layer) == (
        pytest.approx(max(dropped.values())),
        max(dropped, key=lambda layer: dropped[layer]),
    )


def test_super_and_preserved_experts_are_told_apart(tmp_path: Path) -> None:
    reap = uniform(40)
    reap[3], reap[5] = INF, NAN
    layers = {n: {"reap": reap, "max_activations": ones(40)} for n in (1, 2, 3, 4)}
    layers[2]["max_activations"][7] = 100.0
    report = scores.show_scores(pt(tmp_path / "s.pt", layers))
    assert [layer.super_experts for layer in report.layers] == [(), (7,), (), ()]
    assert {layer.preserved for layer in report.layers} == {(3,)}
    assert {layer.never_routed for layer in report.layers} == {(5,)}


def test_without_activations_super_experts_are_unknown(tmp_path: Path) -> None:
    report = scores.show_scores(pt(tmp_path / "s.pt", {1: uniform(4)}))
    assert not report.super_experts_known


def test_activations_that_are_not_finite_are_refused_with_their_layer(tmp_path: Path) -> None:
    layers = {n: {"reap": ones(2), "max_activations": ones(2)} for n in (3, 9)}
    layers[9]["max_activations"][1] = NAN
    with pytest.raises(ScoreError, match="layer 9: max_activations of expert 1 is nan"):
        scores.show_scores(pt(tmp_path / "s.pt", layers))


def test_rows_are_shown_as_rows_and_with_a_model_as_its_layers(tmp_path: Path) -> None:
    file = pt(tmp_path / "s.pt", uniform(3, 32))
    assert [n.layer for n in scores.show_scores(file).layers] == [
        "row 0",
        "row 1",
        "row 2",
    ]
    assert [n.layer for n in scores.show_scores(file, K25).layers] == [1, 2, 3]


def test_scores_of_another_model_are_refused_when_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="layer 1 has 32 scores, the model has 24 experts"):
        scores.show_scores(K25 / "scores.pt", V3)
    with pytest.raises(ScoreError, match="no metric 'ean'; choose with --metric: ean_mean, "):
        scores.show_scores(K25 / "scores.pt", metric="ean")


def test_a_calibration_is_told_without_its_list_of_samples(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.npz", calibration(1).content())
    told = scores.show_scores(tmp_path / "s.npz").calibration
    assert told is not None
    assert (told["samples"], told["tokens"], told["model"]) == (2, 100, "Tiny")


# convert


@pytest.mark.parametrize(
    "ending", [pytest.param("pt", marks=pytest.mark.torch), "safetensors", "npz", "json"]
)
def test_a_converted_file_prunes_as_the_first_did(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"s.{ending}"
    report = scores.convert_scores(K25 / "scores.pt", out)
    before, after = read_scores(K25 / "scores.pt"), read_scores(out)
    assert (report.layers, report.metrics, report.samples) == (3, before.metrics, None)
    assert {
        layer: {n: row.tolist() for n, row in m.items()} for layer, m in after.layers.items()
    } == {layer: {n: row.tolist() for n, row in m.items()} for layer, m in before.layers.items()}
    request = SelectionRequest(ratio=0.65)
    plans = [prune.plan(K25, file, request) for file in (K25 / "scores.pt", out)]
    assert plans[0].decision.keep == plans[1].decision.keep
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.torch
def test_marks_survive_every_format(tmp_path: Path) -> None:
    file = pt(tmp_path / "s.pt", {3: {"reap": np.array([NAN, INF, 5e-324])}})
    for ending in ("safetensors", "npz", "json", "pth"):
        scores.convert_scores(file, tmp_path / f"a.{ending}")
        row = read_scores(tmp_path / f"a.{ending}").layers[3]["reap"]
        np.testing.assert_array_equal(row, read_scores(file).layers[3]["reap"])


@pytest.mark.torch
def test_a_converted_calibration_is_one_still(tmp_path: Path) -> None:
    write_scores(tmp_path / "a.json", calibration(1).content())
    for source, out in (("a.json", "b.npz"), ("b.npz", "c.pt"), ("c.pt", "d.json")):
        report = scores.convert_scores(tmp_path / source, tmp_path / out)
        assert (report.samples, report.tokens) == (2, 100)
    assert (tmp_path / "d.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_rows_become_layers_where_a_model_names_them(tmp_path: Path) -> None:
    file = pt(tmp_path / "s.pt", {"reap": ones(3, 32), "ean": ones(3, 32)})
    with pytest.raises(UsageError, match="name the layers with --model"):
        scores.convert_scores(file, tmp_path / "a.json")
    scores.convert_scores(file, tmp_path / "a.json", model=K25)
    assert list(json.loads((tmp_path / "a.json").read_text())["scores"]) == ["1", "2", "3"]
    with pytest.raises(ScoreError, match="has 3 rows, the model has 2 MoE layers"):
        scores.convert_scores(file, tmp_path / "b.json", model=V3)


# merge


@pytest.mark.torch
def test_merged_files_are_a_score_file_of_the_sum(tmp_path: Path) -> None:
    for number, name in ((1, "a.pt"), (2, "b.safetensors"), (3, "c.json")):
        write_scores(tmp_path / name, calibration(number).content())
    files = [tmp_path / name for name in ("c.json", "a.pt", "b.safetensors")]
    report = scores.merge_scores(files, tmp_path / "all.pt")
    assert (report.samples, report.tokens, report.layers) == (6, 300, 3)
    merged = read_calibration(tmp_path / "all.pt")
    counts = sum(calibration(n).layers[2].counts for n in (1, 2, 3))
    np.testing.assert_array_equal(merged.layers[2].counts, counts)
    read = read_scores(tmp_path / "all.pt")
    np.testing.assert_array_equal(read.layers[2]["reap"], merged.layers[2].metrics()["reap"])
    scores.merge_scores(files[::-1], tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "all.pt").read_bytes()


@pytest.mark.torch
def test_what_cannot_be_merged_leaves_no_file(tmp_path: Path) -> None:
    write_scores(tmp_path / "a.pt", calibration(1).content())
    for other in (K25 / "scores.pt", tmp_path / "a.pt"):
        with pytest.raises(ScoreError):
            scores.merge_scores([tmp_path / "a.pt", other], tmp_path / "all.pt")
    with pytest.raises(OutputError, match="is read by this command"):
        scores.merge_scores([tmp_path / "a.pt"] * 2, tmp_path / "a.pt", force=True)
    assert os.listdir(tmp_path) == ["a.pt"]


def observed(path: Path, seed: int, **spoil: object) -> Path:
    """A file as REAP's observer writes it: 2 layers of 8 experts, of which 3 is never reached."""
    rng = np.random.default_rng(seed)
    layers: dict[int, dict[str, object]] = {}
    for layer in (1, 2):
        counts = rng.integers(1, 50, 8)
        counts[3] = 0
        sums = {name: rng.random(8) * counts for name in ("ean_sum", "weighted_ean_sum")}
        with np.errstate(invalid="ignore"):
            means = {
                "ean_mean": sums["ean_sum"] / counts,
                "reap": sums["weighted_ean_sum"] / counts,
            }
        layers[layer] = {
            "total_tokens": np.array(100 + seed),
            "expert_frequency": counts,
            "pairwise_expert_frequency": np.ones((8, 8), np.int64),
            **{name: values.astype(np.float32) for name, values in {**sums, **means}.items()},
            "max_activations": rng.random(8).astype(np.float32),
            "routed_characteristic_activation": np.ones((8, 4), np.float32),
        }
    layers[2] |= spoil
    return pt(path, layers)


def test_files_of_reaps_observer_add_up(tmp_path: Path) -> None:
    parts = [read_scores(observed(tmp_path / f"{n}.pt", n)) for n in (1, 2, 3)]
    out = tmp_path / "all.safetensors"
    report = scores.merge_scores([part.origin for part in parts], out)
    assert (report.layers, report.samples) == (2, None)
    merged = read_scores(out)
    for layer in (1, 2):
        held = {m: [part.layers[layer][m] for part in parts] for m in parts[0].metrics}
        got = merged.layers[layer]
        for metric in ("expert_frequency", "ean_sum", "weighted_ean_sum"):
            np.testing.assert_array_equal(got[metric], np.add.reduce(held[metric]))
        np.testing.assert_array_equal(got["max_activations"], np.max(held["max_activations"], 0))
        counts = np.where(got["expert_frequency"] > 0, got["expert_frequency"], 1)
        np.testing.assert_array_equal(got["reap"], got["weighted_ean_sum"] / counts)
        np.testing.assert_array_equal(got["ean_mean"], got["ean_sum"] / counts)
        assert got["expert_frequency"][3] == 0
        assert merged.tokens[layer] == 306


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ({"ean_sum": [1, INF, 1, 0, 1, 1, 1, 1]}, "layer 2, ean_sum of expert 1 is inf, and does"),
        ({"reap": [INF] * 8}, "layer 2, reap of expert 0 is inf"),
        ({"max_activations": [NAN] * 8}, "layer 2, max_activations of expert 0 is nan"),
        ({"reap": [7.0] * 8}, "layer 2, expert 0: reap is 7, not weighted_ean_sum / expert_freq"),
    ],
)
def test_sums_that_do_not_add_up_are_refused(
    tmp_path: Path, spoil: dict[str, list[float]], problem: str
) -> None:
    odd = {metric: np.array(row, np.float32) for metric, row in spoil.items()}
    files = [observed(tmp_path / "a.pt", 1), observed(tmp_path / "b.pt", 2, **odd)]
    with pytest.raises(ScoreError) as caught:
        scores.merge_scores(files, tmp_path / "all.json")
    assert problem in caught.value.problem
    assert caught.value.where == str(files[1])
    assert not (tmp_path / "all.json").exists()


def test_the_same_run_or_another_model_is_not_added(tmp_path: Path) -> None:
    first, again = observed(tmp_path / "a.pt", 1), observed(tmp_path / "copy.pt", 1)
    with pytest.raises(ScoreError, match=r"holds the same counts and sums as .*a\.pt"):
        scores.merge_scores([first, again], tmp_path / "all.json")
    fewer = {1: {m: np.ones(4) for m in ("expert_frequency", "ean_sum", "weighted_ean_sum")}}
    with pytest.raises(ScoreError, match=r"has 4 experts in layer 1, .* has 8 experts"):
        scores.merge_scores([first, pt(tmp_path / "b.pt", fewer)], tmp_path / "all.json")


# compare


def test_a_file_agrees_with_itself_and_with_its_monotone_image(tmp_path: Path) -> None:
    layers = read_scores(K25 / "scores.pt").layers
    other = pt(tmp_path / "b.pt", {n: {"log": np.log1p(m["reap"])} for n, m in layers.items()})
    report = scores.compare_scores(K25 / "scores.pt", other, ratios=(0.25, 0.65))
    assert (report.metric_a, report.metric_b) == ("reap", "log")
    assert [layer.layer for layer in report.layers] == [1, 2, 3]
    for layer in (*report.layers, report.mean):
        assert layer.spearman == pytest.approx(1)
        assert layer.kendall == pytest.approx(1)
        assert {both.share for both in layer.overlaps.values()} == {1.0}
    assert {ratio: both.kept for ratio, both in report.mean.overlaps.items()} == {
        "0.25": 24,
        "0.65": 12,
    }


def test_the_keep_lists_compared_are_those_that_plan_makes(tmp_path: Path) -> None:
    scores.scores_from_weights(K25, tmp_path / "w.json")
    report = scores.compare_scores(K25 / "scores.pt", tmp_path / "w.json", ratios=(0.5,))
    request = SelectionRequest(ratio=0.5)
    keeps = [
        prune.plan(K25, file, request).decision.keep.layers
        for file in (K25 / "scores.pt", tmp_path / "w.json")
    ]
    for layer in report.layers:
        a, b = (set(keep[int(layer.layer)].retained) for keep in keeps)
        both = layer.overlaps["0.5"]
        assert (both.share, both.jaccard) == (len(a & b) / len(a), len(a & b) / len(a | b))


def test_two_metrics_of_one_file_can_be_compared() -> None:
    file = K25 / "scores.pt"
    report = scores.compare_scores(file, file, ratios=(0.5,), metrics=("reap", "expert_frequency"))
    assert (report.metric_a, report.metric_b) == ("reap", "expert_frequency")
    assert (report.mean.spearman or 0) < 1
    with pytest.raises(UsageError, match="3 metrics for two files"):
        scores.compare_scores(file, file, ratios=(0.5,), metrics=("a", "b", "c"))


def test_layers_of_one_file_alone_are_named(tmp_path: Path) -> None:
    a = pt(tmp_path / "a.pt", {1: uniform(4), 2: uniform(4)})
    b = pt(tmp_path / "b.pt", {2: uniform(4), 3: uniform(4)})
    report = scores.compare_scores(a, b, ratios=(0.5,))
    assert [layer.layer for layer in report.layers] == [2]
    assert (report.only_a, report.only_b) == ((1,), (3,))


def test_a_table_of_rows_takes_the_layers_of_the_other(tmp_path: Path) -> None:
    rows = uniform(3, 32)
    report = scores.compare_scores(
        pt(tmp_path / "a.pt", rows),
        pt(tmp_path / "b.pt", {4: rows[0], 5: rows[1], 6: rows[2]}),
        ratios=(0.5,),
    )
    assert [(layer.layer, layer.overlaps["0.5"].share) for layer in report.layers] == [
        (4, 1.0),
        (5, 1.0),
        (6, 1.0),
    ]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({9: uniform(4)}, "has no layer in common with"),
        ({1: uniform(5)}, "layer 1 has 5 scores, in .* 4"),
    ],
)
def test_scores_of_different_models_are_not_compared(
    tmp_path: Path, other: object, told: str
) -> None:
    a, b = pt(tmp_path / "a.pt", {1: uniform(4)}), pt(tmp_path / "b.pt", other)
    with pytest.raises(ScoreError, match=told) as caught:
        scores.compare_scores(a, b, ratios=(0.5,))
    assert caught.value.where == str(b)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, NAN])
def test_a_ratio_is_between_0_and_1(ratio: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        scores.compare_scores(K25 / "scores.pt", K25 / "scores.pt", ratios=(ratio,))


# baselines


def test_random_scores_are_the_seeds_on_every_machine(tmp_path: Path) -> None:
    report = scores.scores_random(V3, tmp_path / "a.safetensors", seed=42)
    assert (report.method, report.seed) == ("random", 42)
    assert [layer.is_mtp for layer in report.layers] == [False, False, True]
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    # By the recipe: the upper 53 bits of PCG64's words, seeded with (seed, layer).
    for layer in (1, 2, 3):
        words = np.random.PCG64(np.random.SeedSequence([42, layer])).random_raw(24)
        expected = [int(word) // 2**11 / 2**53 for word in words]
        assert found[f"layers.{layer}.random"].tolist() == expected
    assert found["layers.1.random"][0] == 0.7935026873922878
    scores.scores_random(V3, tmp_path / "b.safetensors", seed=43)
    other = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert not np.intersect1d(found["layers.1.random"], other["layers.1.random"]).size


def test_a_baseline_prunes_the_model_it_came_from(tmp_path: Path) -> None:
    scores.scores_random(V3, tmp_path / "r.npz", seed=0)
    scores.scores_from_weights(V3, tmp_path / "w.safetensors")
    for name, metric in (("r.npz", "random"), ("w.safetensors", "weight_l2")):
        report = prune.plan(V3, tmp_path / name, SelectionRequest(ratio=0.5)).report
        assert report.metric == metric
        assert {layer.policy for layer in report.layers} == {"scores"}


def test_a_seed_is_not_negative(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="-1 is less than 0"):
        scores.scores_random(V3, tmp_path / "r.npz", seed=-1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("show", "none.pt"), "none.pt: there is no such file"),
        (("show", "bad.pt"), "bad.pt: this is not a file of torch.save"),
        (("convert", "s.npz", "-o", "s.npz"), "s.npz: is read by this command; choose another -o"),
        (("convert", "s.npz", "-o", "s.gguf"), "scores are not written as '.gguf'"),
        (("merge", "s.npz", "s.npz", "-o", "m.npz"), "without the accumulators"),
        (("merge", "s.npz", "-o", "m.npz"), "without the accumulators"),
        (("compare", "s.npz", "none.pt"), "none.pt: there is no such file"),
        (("compare", "s.npz", "s.npz", "--metric", "ean"), "has no metric 'ean'"),
        (("from-weights", "nowhere", "-o", "w.json"), "nowhere"),
        (("random", "-o", "w.json"), "the current folder has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "s.npz", **{"1": uniform(4)})
    (tmp_path / "bad.pt").write_bytes(b"no zip at all")
    assert main(("scores", *words)) == 2
    ended = capsys.readouterr()
    assert told in ended.err
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "s.npz"]


def test_a_family_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none is named; add --model"):
        scores.show_scores(K25 / "scores.pt", family="auto")
    with pytest.raises(UsageError, match="none is named; add --model"):
        scores.convert_scores(K25 / "scores.pt", tmp_path / "s.npz", family="auto")
