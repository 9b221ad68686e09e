"""Scores that could only prune by chance are told apart from measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.scores.checks import doubts
from shardsurgeon.scores.table import Scores

ROOT = Path(__file__).parents[2]

MODEL = ROOT / "fixtures" / "qwen3_moe"
LAYERS = (0, 1, 2)
EXPERTS = 16

Row = list[float] | np.ndarray


def measured() -> dict[int, np.ndarray]:
    """Saliencies of the fixture's layers, drawn anew for each."""
    return {layer: np.random.default_rng(layer).random(EXPERTS) for layer in LAYERS}


def saved(tmp_path: Path, table: object, name: str = "scores.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(table, default=lambda array: array.tolist()))
    return path


def refused(tmp_path: Path, table: object, **options: object) -> str:
    with pytest.raises(ScoreError) as caught:
        plan(tmp_path, table, **options)
    assert caught.value.where == str(tmp_path / "scores.json")
    assert caught.value.remedy
    return caught.value.problem


def plan(tmp_path: Path, table: object, **options: object) -> shardsurgeon.Pruning:
    given = {"keep": 8, **options}
    return shardsurgeon.plan(MODEL, saved(tmp_path, table), out=tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.0] * EXPERTS, "every score is 0"),
        ([-0.0] * EXPERTS, "every score is 0"),
        ([0.25] * EXPERTS, "all 16 experts have the score 0.25"),
        ([-3.0] * EXPERTS, "all 16 experts have the score -3"),
    ],
)
def test_a_layer_without_a_difference_is_refused(tmp_path: Path, row: Row, says: str) -> None:
    problem = refused(tmp_path, {**measured(), 1: row})
    assert problem == f"layer 1: {says}, which is no measurement"


def test_zeros_beside_experts_that_no_token_reached_are_refused(tmp_path: Path) -> None:
    frequency = [0] * 8 + [1] * 8
    table = {
        layer: {"reap": list(row), "expert_frequency": frequency}
        for layer, row in measured().items()
    }
    table[2]["reap"] = [math.nan] * 8 + [0.0] * 8
    assert "layer 2: every score that is a number is 0" in refused(tmp_path, table)


@pytest.mark.parametrize("metric", ["reap", "ean_mean", "weighted_ean_sum", "expert_frequency"])
def test_a_layer_that_no_token_went_through_is_refused(tmp_path: Path, metric: str) -> None:
    table = {n: {metric: list(row), "total_tokens": 9} for n, row in measured().items()}
    table[1]["total_tokens"] = 0
    problem = refused(tmp_path, table, metric=metric)
    assert problem == (f"layer 1: no token went through it, and {metric} is measured over tokens")
    everywhere = {"total_tokens": 0, "scores": {n: {metric: row} for n, row in measured().items()}}
    assert "layer 0 and 2 more: no token" in refused(tmp_path, everywhere, metric=metric)


def test_a_layer_whose_experts_were_all_counted_zero_times_is_refused(tmp_path: Path) -> None:
    table = {n: {"reap": row, "expert_frequency": [1] * 16} for n, row in measured().items()}
    table[2]["expert_frequency"] = [0] * 16
    assert "layer 2: no token went through it" in refused(tmp_path, table)


def test_scores_of_the_weights_need_no_token(tmp_path: Path) -> None:
    table = {n: {"weight_norm": row, "total_tokens": 0} for n, row in measured().items()}
    assert plan(tmp_path, table).decision.metric == "weight_norm"
    plan(tmp_path, {"total_tokens": 0, "saliency": measured()})


def permutations(count: type) -> dict[int, list[float]]:
    return {
        layer: [count(e) for e in np.random.default_rng(layer).permutation(EXPERTS)]
        for layer in LAYERS
    }


@pytest.mark.parametrize("number", [int, float])
def test_a_ranking_is_not_read_as_saliencies(tmp_path: Path, number: type) -> None:
    problem = refused(tmp_path, permutations(number))
    assert problem == (
        "layer 0 and 2 more: its scores are the numbers 0 to 15, each once, which is a ranking "
        "of the experts and no saliency"
    )
    rows = list(permutations(number).values())
    assert "which is a ranking" in refused(tmp_path, rows)
    one = {**measured(), 2: permutations(number)[2]}
    assert "layer 2: its scores are the numbers 0 to 15" in refused(tmp_path, one)


def test_few_experts_may_have_such_counts_by_chance() -> None:
    counts = {0: np.array([2.0, 0, 3, 1]), 1: np.array([5.0, 1, 0, 2])}
    table = Scores("s.pt", {n: {"expert_frequency": row} for n, row in counts.items()})
    assert [*doubts(table, "expert_frequency", [0, 1])] == []
    assert len([*doubts(table, "expert_frequency", [0])]) == 1


@pytest.mark.parametrize(
    ("lists", "best"), [("best-first", slice(0, 8)), ("worst-first", slice(8, 16))]
)
def test_a_ranking_prunes_by_its_order_where_the_user_says_which(
    tmp_path: Path, lists: str, best: slice
) -> None:
    ranking = permutations(int)
    pruning = plan(tmp_path, ranking, lists=lists)
    for layer, keep in pruning.decision.keep.layers.items():
        assert keep.retained == tuple(sorted(ranking[layer][best]))
    assert f"{tmp_path / 'scores.json'} is read as a ranking, {lists}" in pruning.report.notes


def test_one_metric_of_several_may_be_the_ranking(tmp_path: Path) -> None:
    ranking = permutations(int)
    table = {n: {"order": ids, "reap": measured()[n]} for n, ids in ranking.items()}
    pruning = plan(tmp_path, table, lists="best-first", metric="order")
    assert pruning.decision.metric == "order"
    for layer, keep in pruning.decision.keep.layers.items():
        assert keep.retained == tuple(sorted(ranking[layer][:8]))
    assert plan(tmp_path, table).decision.metric == "reap"


def test_scores_that_are_said_to_be_a_ranking_must_be_one(tmp_path: Path) -> None:
    table = {**permutations(int), 1: [0, *range(15)]}
    assert refused(tmp_path, table, lists="best-first").startswith(
        "layer 1 does not rank 16 experts"
    )


@pytest.mark.parametrize("row", [np.arange(EXPERTS) / 7, np.arange(EXPERTS)[::-1] ** 2.0])
def test_one_order_in_all_layers_is_refused(tmp_path: Path, row: Row) -> None:
    problem = refused(tmp_path, {layer: row * (1 + layer) for layer in LAYERS})
    assert "all 3 layers have their 16 experts in one and the same order" in problem


def test_a_ranking_of_one_order_in_all_layers_is_refused_too(tmp_path: Path) -> None:
    ranking = {layer: [*range(EXPERTS)] for layer in LAYERS}
    assert "one and the same order" in refused(tmp_path, ranking, lists="best-first")


def test_one_order_is_believed_where_chance_may_make_it() -> None:
    def told(experts: int, layers: int, ties: int = 1) -> bool:
        row = np.array([max(e, ties - 1) for e in range(experts)]) + 0.5
        table = Scores("s.pt", {layer: {"saliency": row} for layer in range(layers)})
        return bool([*doubts(table, "saliency", range(layers))])

    # Chance of one order in L layers: (1 / E!) ** (L - 1); 1 / 12! = 2.1e-9, 1 / 13! = 1.6e-10.
    assert [told(12, 2), told(13, 2), told(12, 3), told(12, 1)] == [False, True, True, False]
    # Ten experts alike leave 13! / 10! = 1716 orders: (1 / 1716) ** 2 = 3.4e-7, ** 3 = 2e-10.
    assert [told(13, 3, ties=10), told(13, 4, ties=10)] == [False, True]


def test_fewer_experts_reached_than_kept_is_a_note_of_plan_and_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {n: {"reap": row, "expert_frequency": [2] * 16} for n, row in measured().items()}
    table[1]["expert_frequency"] = [2] * 5 + [0] * 11
    table[1]["reap"] = [*measured()[1][:5], *[0.0] * 11]
    note = (
        "kept although no calibration token reached them: 3 of 8 in layer 1; among those the "
        "lower ids stay"
    )
    assert note in plan(tmp_path, table).report.notes
    out = tmp_path / "out"
    words = [str(tmp_path / "scores.json"), "--model", str(MODEL), "--keep", "8"]
    assert main(["apply", *words, "-o", str(out)]) == 0
    assert note in " ".join(capsys.readouterr().out.split())
    kept = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    assert kept["layers"]["1"]["retained"] == [*range(8)]
    # Eight were reached of layers that keep eight: nothing to say.
    assert not any("reached" in n for n in plan(tmp_path, {**table, 1: table[0]}).report.notes)


def test_the_refusal_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = saved(tmp_path, {**measured(), 2: [0] * EXPERTS})
    for command in ("plan", "apply"):
        words = [command, str(scores), "--model", str(MODEL), "--ratio", "0.5"]
        status = main([*words, *(["-o", str(tmp_path / "out")] if command == "apply" else [])])
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        assert captured.err == (
            f"shardsurgeon: error: {scores}: layer 2: every score is 0, which is no measurement; "
            "calibrate again with more tokens, or give scores of another kind\n"
        )
    assert [*tmp_path.iterdir()] == [scores]


def test_show_shows_such_scores_and_says_that_plan_refuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = saved(tmp_path, {**measured(), 2: [0] * EXPERTS})
    for words in ([], ["--model", str(MODEL)]):
        assert main(["scores", "show", str(scores), *words]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "note `plan` refuses these scores: layer 2: every score is 0" in text
    assert main(["scores", "show", str(saved(tmp_path, measured()))]) == 0
    assert "refuses" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lists": "kept"}, "kept is not what lists in scores can be; say best-first"),
        ({"lists": "sideways"}, "'sideways' is none of kept, dropped, best-first, worst-first"),
        ({"lists": "best-first", "keep": None, "plan_file": "p.json"}, "say kept or dropped"),
    ],
)
def test_what_lists_mean_must_fit_what_was_given(
    tmp_path: Path, options: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        plan(tmp_path, measured(), **options)


def test_scores_left_to_a_pruned_model_must_tell_its_experts_apart(tmp_path: Path) -> None:
    first = {n: np.concatenate([row[:8] + 1, np.full(8, 0.5)]) for n, row in measured().items()}
    shardsurgeon.apply(plan(tmp_path, first), tmp_path / "half")
    again = {n: np.concatenate([np.full(8, 0.5), row[8:]]) for n, row in measured().items()}
    with pytest.raises(ScoreError, match="layer 0: of the experts that are left, all 8 experts"):
        shardsurgeon.plan(tmp_path / "half", saved(tmp_path, again), keep=4)
