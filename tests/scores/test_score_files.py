"""Score files written: read back to the last bit by us and by the libraries of their formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from shardsurgeon.errors import UsageError
from shardsurgeon.scores.files import ScoreContent, check_score_file_name, read_scores, score_file

TABLE = {
    3: {"reap": np.array([0.1, 1 / 3, 5e-324]), "ean_sum": np.array([1.0, 2.0, 1e308])},
    61: {"reap": np.array([0.0, 7.0, 2.0**-30]), "ean_sum": np.array([1.0, 2.0, 3.0])},
}
FACTS = {"method": "by hand", "model": "Ünïcode"}
CONTENT = ScoreContent(layers=TABLE, facts=FACTS)


@pytest.mark.parametrize("name", ["s.safetensors", "s.json", "S.JSON", "s.npz"])
def test_every_number_comes_back_to_the_last_bit(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(score_file(name, CONTENT))
    scores = read_scores(tmp_path / name)
    assert scores.facts == FACTS
    assert list(scores.layers) == [3, 61]
    for layer, metrics in TABLE.items():
        assert scores.layers[layer].keys() == metrics.keys()
        for metric, row in metrics.items():
            assert scores.layers[layer][metric].tobytes() == row.tobytes()


def test_the_formats_are_what_their_names_say() -> None:
    tensors = load(score_file("a.safetensors", CONTENT))
    assert set(tensors) == {f"layers.{n}.{metric}" for n in TABLE for metric in TABLE[n]}
    assert tensors["layers.3.reap"].tolist() == [0.1, 1 / 3, 5e-324]
    document = json.loads(score_file("a.json", CONTENT))
    assert document["scores"]["61"]["reap"] == [0.0, 7.0, 2.0**-30]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_metric_that_would_read_as_another_is_refused(ending: str) -> None:
    # `gate` in a tensor's name is the module, not the metric.
    content = ScoreContent(layers={3: {"gate": np.ones(2)}})
    with pytest.raises(UsageError, match=r"metric 'gate' .*; write \.json or \.pt"):
        score_file(f"a.{ending}", content)
    assert b'"gate"' in score_file("a.json", content)


def test_json_has_no_place_for_named_rows() -> None:
    content = ScoreContent(rows={"reap": np.ones((2, 3)), "file": np.ones((2, 3))})
    with pytest.raises(UsageError, match="name the layers with --model"):
        score_file("a.json", content)


def test_rows_under_any_name_are_read_back(tmp_path: Path) -> None:
    content = ScoreContent(rows={"reap": np.ones((2, 3)), "file": np.zeros((2, 3))})
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(score_file(name, content))
        rows = read_scores(tmp_path / name).rows
        assert {metric: row.tolist() for metric, row in rows.items()} == {
            "reap": [[1.0] * 3] * 2,
            "file": [[0.0] * 3] * 2,
        }


def test_an_mtp_layer_keeps_its_name(tmp_path: Path) -> None:
    content = ScoreContent(layers={1: {"reap": np.ones(2)}, "mtp.0": {"reap": np.zeros(2)}})
    for name in ("a.npz", "a.safetensors", "a.json"):
        (tmp_path / name).write_bytes(score_file(name, content))
        assert list(read_scores(tmp_path / name).layers) == [1, "mtp.0"]


@pytest.mark.parametrize(("name", "told"), [("scores.bin", "'.bin'"), ("scores", "no ending")])
def test_other_endings_are_refused_with_those_that_work(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=r"\.pt, \.safetensors, \.npz or \.json") as caught:
        check_score_file_name(name)
    assert told in str(caught.value)
