"""Score files written: read back to the last bit by us and by the libraries of their formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from shardsurgeon.errors import UsageError
from shardsurgeon.scorefiles import score_file
from shardsurgeon.scores import read_scores

TABLE = {
    3: {"reap": np.array([0.1, 1 / 3, 5e-324]), "ean_sum": np.array([1.0, 2.0, 1e308])},
    61: {"reap": np.array([0.0, 7.0, 2.0**-30]), "ean_sum": np.array([1.0, 2.0, 3.0])},
}
FACTS = {"method": "by hand", "model": "Ünïcode"}


@pytest.mark.parametrize("name", ["s.safetensors", "s.json", "S.JSON"])
def test_every_number_comes_back_to_the_last_bit(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(score_file(name, TABLE, FACTS))
    scores = read_scores(tmp_path / name)
    assert scores.facts == FACTS
    assert list(scores.layers) == [3, 61]
    for layer, metrics in TABLE.items():
        assert scores.layers[layer].keys() == metrics.keys()
        for metric, row in metrics.items():
            assert scores.layers[layer][metric].tobytes() == row.tobytes()


def test_the_formats_are_what_their_names_say() -> None:
    tensors = load(score_file("a.safetensors", TABLE, FACTS))
    assert set(tensors) == {f"layers.{n}.{metric}" for n in TABLE for metric in TABLE[n]}
    assert tensors["layers.3.reap"].tolist() == [0.1, 1 / 3, 5e-324]
    document = json.loads(score_file("a.json", TABLE, FACTS))
    assert document["scores"]["61"]["reap"] == [0.0, 7.0, 2.0**-30]


@pytest.mark.parametrize(("name", "told"), [("scores.pt", "'.pt'"), ("scores", "no ending")])
def test_other_endings_are_refused_with_those_that_work(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=r"\.safetensors or \.json") as caught:
        score_file(name, TABLE, FACTS)
    assert told in str(caught.value)
