"""Rankings, records and JSON lines that tools have published are read as what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import ScoreError
from shardsurgeon.scores.files import read_scores
from tests.support import torch_file

FIXTURE = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"
RANKING = {0: [2, 0, 3, 1], 1: [1, 3, 0, 2]}
# Place in the ranking as saliency: 1 for the first of four, then 0.75, 0.5, 0.25.
SALIENCY = {0: [0.75, 0.25, 1.0, 0.5], 1: [0.5, 1.0, 0.25, 0.75]}
REAP = {0: [0.5, 2.5, 1.5, 0.25], 1: [4.0, 1.0, 3.0, 2.0]}


def saved(tmp_path: Path, value: object, name: str = "scores.json") -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def lines(values: list[object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


RANKINGS = {
    "ranking": {"ranking": RANKING},
    "expert_ranking": {"expert_ranking": RANKING, "dataset": "c4"},
    "ranked_experts, best first": {"ranked_experts": RANKING, "order": "best_first"},
    "worst first": {
        "ranking": {layer: ids[::-1] for layer, ids in RANKING.items()},
        "order": "worst-first",
    },
    "per layer": {n: {"ranking": ids} for n, ids in RANKING.items()},
    "below layers, beside what is kept": {
        "layers": {
            n: {"kept_experts": ids[:2], "ranked_experts": ids} for n, ids in RANKING.items()
        }
    },
    "below keep_maps": {
        "keep_maps": {
            "keep_by_layer": {n: ids[:2] for n, ids in RANKING.items()},
            "ranked_by_layer": RANKING,
        }
    },
    "JSON lines": lines([{"layer": n, "ranking": ids} for n, ids in RANKING.items()]),
    "records of a layer": {"ranking": [{"layer": n, "ranking": i} for n, i in RANKING.items()]},
    "records of an expert": {
        "experts": [
            {"layer": n, "expert": e, "rank": place}
            for n, ids in RANKING.items()
            for place, e in enumerate(ids, start=1)
        ]
    },
}


@pytest.mark.parametrize("spelling", RANKINGS)
@pytest.mark.parametrize("name", ["scores.json", "scores.jsonl", "scores"])
def test_a_ranking_that_says_so_is_read_as_places(tmp_path: Path, spelling: str, name: str) -> None:
    scores = read_scores(saved(tmp_path, RANKINGS[spelling], name))
    metric, layers = scores.select()
    assert metric == "saliency"
    assert {layer: row.tolist() for layer, row in layers.items()} == SALIENCY
    assert scores.ranking == ("worst-first" if spelling == "worst first" else "best-first")


def test_rows_of_a_ranking_are_the_models_layers(tmp_path: Path) -> None:
    for path in (
        saved(tmp_path, {"ranking": [*RANKING.values()]}),
        torch_file.save({"ranking": np.array([*RANKING.values()])}, tmp_path / "scores.pt"),
    ):
        scores = read_scores(path).assign_rows([0, 1])
        assert {n: row.tolist() for n, row in scores.select()[1].items()} == SALIENCY


def test_one_layer_may_be_all_that_json_lines_hold(tmp_path: Path) -> None:
    scores = read_scores(saved(tmp_path, lines([{"layer": 0, "ranking": RANKING[0]}])))
    assert scores.select()[1][0].tolist() == SALIENCY[0]


def test_scores_beside_a_ranking_decide(tmp_path: Path) -> None:
    table = {n: {"reap": REAP[n], "ranking": RANKING[n]} for n in REAP}
    scores = read_scores(saved(tmp_path, table))
    assert (scores.ranking, scores.metrics) == ("", ("reap",))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"ranking": {0: [1, 0, 1]}}, "layer 0 ranks 3 experts, and not each of 0 to 2 once"),
        ({"ranking": {0: [2, 5]}}, "layer 0 ranks 2 experts, and not each of 0 to 1 once"),
        ({"ranking": {0: [1, 0]}, "order": "random"}, "ranks experts in the order 'random'"),
        ({"ranking": "c4"}, "no key names a layer"),
        ({"keep_by_layer": {0: [1]}}, "lists experts under 'keep_by_layer' and holds no scores"),
        ({0: {"kept": [1], "keep": 1}}, "layer 0 holds 'kept' and no scores"),
    ],
)
def test_what_is_no_ranking_is_refused(tmp_path: Path, value: object, problem: str) -> None:
    with pytest.raises(ScoreError) as caught:
        read_scores(saved(tmp_path, value))
    assert problem in caught.value.problem


def telemetry(**more: object) -> dict[str, object]:
    """As reap-mlx's collector writes it."""
    experts = [
        {
            "layer": layer,
            "expert": expert,
            "activeTokenCount": 4,
            "tokenCount": 4,
            "averageGateValue": 0.25,
            "frequency": 4,
            "eanSum": 4 * value,
            "eanMean": value,
            "weightedEanSum": 2 * value,
            "reap": value,
            "maxActivation": 2.5,
            **more,
        }
        for layer, row in REAP.items()
        for expert, value in enumerate(row)
    ]
    return {"modelName": "Qwen", "experts": experts, "metadata": {"topK": 2}}


def test_records_of_experts_become_a_table(tmp_path: Path) -> None:
    for value in (telemetry(), telemetry()["experts"], lines(telemetry()["experts"])):  # type: ignore[arg-type]
        scores = read_scores(saved(tmp_path, value))
        assert {n: row.tolist() for n, row in scores.select()[1].items()} == REAP
        assert scores.select("ean_sum")[1][0].tolist() == [2.0, 10.0, 6.0, 1.0]
        assert scores.select("weighted_ean_sum")[1][0].tolist() == [1.0, 5.0, 3.0, 0.5]
        assert scores.select("max_activations")[1][1].tolist() == [2.5] * 4
        assert scores.frequencies()[1].tolist() == [4] * 4


def test_records_may_come_in_any_order(tmp_path: Path) -> None:
    experts = telemetry()["experts"]
    assert isinstance(experts, list)
    scores = read_scores(saved(tmp_path, {"experts": experts[::-1]}))
    assert {n: row.tolist() for n, row in scores.select()[1].items()} == REAP


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda r: r.pop(2), "layer 0 has 3 records up to expert 3 and none of expert 2"),
        (lambda r: r.append(r[0]), "layer 0 has two records of expert 0"),
        (lambda r: r[1].update(expert="one"), "record 1 names 'one' an expert"),
        (lambda r: r[1].update(expert=-1), "record 1 names '-1' an expert"),
        (lambda r: r.append({"layer": 1, "reap": [1, 2]}), "layer 1 has records of its experts"),
        (lambda r: [one.pop("reap") for one in r[:1]], "has no metric 'reap'"),
    ],
)
def test_records_that_leave_doubts_are_refused(tmp_path: Path, spoil: object, problem: str) -> None:
    value = telemetry()
    spoil(value["experts"])  # type: ignore[operator]
    with pytest.raises(ScoreError) as caught:
        read_scores(saved(tmp_path, value)).select("reap")
    assert problem in caught.value.problem


def test_a_rank_is_no_saliency(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = {n: {"rank": (rng.permutation(16) + 1).tolist()} for n in range(3)}
    with pytest.raises(ScoreError, match="the numbers 1 to 16, each once, which is a ranking"):
        shardsurgeon.plan(FIXTURE, saved(tmp_path, table), keep=8)


def test_a_ranking_prunes_from_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    ranking = {n: rng.permutation(16).tolist() for n in range(3)}
    path = saved(tmp_path, {"expert_ranking": ranking})
    pruning = shardsurgeon.plan(FIXTURE, path, keep=8)
    for layer, keep in pruning.decision.keep.layers.items():
        assert sorted(ranking[layer][:8]) == list(keep.retained)
    assert f"{path} is read as a ranking, best-first" in pruning.report.notes
    words = ["plan", str(path), "--model", str(FIXTURE), "--keep", "8", "--lists"]
    assert main([*words, "best-first"]) == 0
    assert main([*words, "worst-first"]) == 2
    assert "says that it ranks experts best-first" in capsys.readouterr().err
    # Written in another format it is saliencies, and prunes alike.
    out = tmp_path / "converted.safetensors"
    assert main(["scores", "convert", str(path), "-o", str(out)]) == 0
    assert shardsurgeon.plan(FIXTURE, out, keep=8).decision.keep == pruning.decision.keep


def test_a_file_of_nan_and_infinity_in_json_lines(tmp_path: Path) -> None:
    text = '{"layer": 0, "reap": [0.5, NaN, Infinity]}\n{"layer": 1, "reap": [1, 2, 3]}\n'
    row = read_scores(saved(tmp_path, text)).select()[1][0]
    assert (row[0], math.isnan(row[1]), row[2]) == (0.5, True, math.inf)
