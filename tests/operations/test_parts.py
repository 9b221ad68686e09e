"""`scores show`, `compare` and `merge` of a calibration over several datasets, part by part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.operations.scores import compare_scores, merge_scores, show_scores
from shardsurgeon.scores.files import ScoreContent, write_scores
from tests.layerwise.files import EXPERTS, mixed, sums

LAYERS = (1, 2, 5)
CODE, CHAT = "code.jsonl@sha256:aa", "org/chat(train)"
# Layer n of the p-th dataset of `mixed(m, …)` has the seed 100 m + 10 p + n.


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_scores("mix.npz", mixed(3, "z@sha256:zz", CHAT).content())
    write_scores("other.npz", mixed(4, "z@sha256:zz", "org/math(train)").content())
    write_scores("one.npz", mixed(5, "org/math(train)").content())
    return tmp_path


def reap(seed: int) -> np.ndarray:
    of = sums(seed)
    return of.weighted_norm_sum / np.maximum(of.counts, 1)


def best(values: np.ndarray, kept: int) -> set[int]:
    return set(sorted(range(EXPERTS), key=lambda e: (-values[e], e))[:kept])


def test_show_says_what_each_part_retains_where_the_whole_file_chooses() -> None:
    report = show_scores("mix.npz")
    assert [(part.name, part.source, part.records, part.tokens) for part in report.parts] == [
        ("z", "z@sha256:zz", 2, 100),
        ("chat", CHAT, 2, 100),
    ]
    for place, part in enumerate(report.parts):
        # A quarter of 6 experts is 1, half are 3.
        for ratio, kept in (("0.25", 5), ("0.5", 3)):
            shares = []
            for layer in LAYERS:
                total = sums(300 + layer)
                total.add(sums(310 + layer))
                whole = total.weighted_norm_sum / np.maximum(total.counts, 1)
                own = reap(300 + 10 * place + layer)
                shares.append(own[sorted(best(whole, kept))].sum() / own.sum())
            assert part.retained[ratio] == pytest.approx(np.mean(shares), rel=1e-12)


def test_show_says_of_no_part_what_its_scores_do_not_say() -> None:
    assert show_scores("one.npz").parts == ()
    whole = mixed(3, "z@sha256:zz", CHAT)
    for of in whole.layers.values():
        of.weighted_norm_sum = -of.weighted_norm_sum
        for part in (of.parts or {}).values():
            part.weighted_norm_sum = -part.weighted_norm_sum
    write_scores("below.npz", whole.content())
    shown = show_scores("below.npz").parts
    assert {share for part in shown for share in part.retained.values()} == {None}


def test_a_file_beside_itself_is_every_two_of_its_parts() -> None:
    (pair,) = compare_scores("mix.npz", "mix.npz", ratios=(0.5,)).parts
    assert (pair.a, pair.b) == ("z", "chat")
    common = [len(best(reap(300 + n), 3) & best(reap(310 + n), 3)) for n in LAYERS]
    assert pair.overlaps["0.5"].share == pytest.approx(sum(common) / 9)
    assert pair.overlaps["0.5"].jaccard == pytest.approx(np.mean([n / (6 - n) for n in common]))
    ranks = [[np.argsort(np.argsort(reap(seed + n))) for seed in (300, 310)] for n in LAYERS]
    rho = [np.corrcoef(one, other)[0, 1] for one, other in ranks]
    assert pair.spearman == pytest.approx(np.mean(rho))


def test_the_parts_of_two_files_are_set_beside_each_other() -> None:
    report = compare_scores("mix.npz", "other.npz", ratios=(0.5,))
    assert [(pair.a, pair.b) for pair in report.parts] == [
        ("z", "z"),
        ("z", "math"),
        ("chat", "z"),
        ("chat", "math"),
    ]
    common = sum(len(best(reap(310 + n), 3) & best(reap(400 + n), 3)) for n in LAYERS)
    assert report.parts[2].overlaps["0.5"].share == pytest.approx(common / 9)
    whole = compare_scores("mix.npz", "one.npz", ratios=(0.5,)).parts
    assert [(pair.a, pair.b) for pair in whole] == [("z", "all"), ("chat", "all")]
    common = sum(len(best(reap(300 + n), 3) & best(reap(500 + n), 3)) for n in LAYERS)
    assert whole[0].overlaps["0.5"].share == pytest.approx(common / 9)
    assert compare_scores("one.npz", "one.npz").parts == ()
    other = {n: {"router_l2": reap(n)} for n in LAYERS}
    write_scores("router.npz", ScoreContent(layers=dict(other)))
    metrics = ("ean_mean", "router_l2")
    beside = compare_scores("mix.npz", "router.npz", metrics=metrics).parts
    assert [(pair.a, pair.b) for pair in beside] == [("z", "all"), ("chat", "all")]


def test_a_merge_says_which_parts_it_keeps_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    report = merge_scores(["mix.npz", "other.npz", "one.npz"], "merged.npz")
    assert [(part.name, part.records) for part in report.parts] == [
        ("z", 4),
        ("chat", 2),
        ("math", 4),
    ]
    assert report.notes == ()
    old = mixed(6, CODE, CHAT)
    layers = {layer: replace(of, parts=None) for layer, of in old.layers.items()}
    write_scores("old.npz", replace(old, layers=layers).content())
    assert main(["scores", "merge", "old.npz", "mix.npz", "-o", "both.npz"]) == 0
    lines = " ".join(capsys.readouterr().out.split())
    assert "note both.npz does not keep the sums of its 3 datasets apart: an earlier" in lines
    assert "parts" not in lines


def test_people_and_programs_read_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scores", "show", "mix.npz"]) == 0
    shown = capsys.readouterr().out
    assert "share of their own reap that stays where this file chooses:" in shown
    assert "  chat        2     100" in shown
    assert main(["scores", "merge", "mix.npz", "one.npz", "-o", "merged.npz"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "parts z (2 records, 100 tokens), chat (2 records, 100 tokens), math (2" in words
    assert main(["scores", "compare", "mix.npz", "mix.npz"]) == 0
    compared = capsys.readouterr().out
    assert "z, chat" in compared and "layer  Spearman" not in compared
    assert main(["scores", "compare", "mix.npz", "one.npz", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["parts"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("z", "all"), ("chat", "all")]
