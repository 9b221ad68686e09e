"""Files of a calibration, read back to the last bit by us, their own libraries, and `plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from shardsurgeon.errors import OutputError, ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import find_calibration, read_calibration
from shardsurgeon.scores.files import ScoreContent, read_scores, score_output, write_scores
from tests.cli.standins import in_python
from tests.layerwise.files import calibration
from tests.support import torch_file

NAMES = [
    *(pytest.param(name, marks=pytest.mark.torch) for name in ("s.pt", "s.pth")),
    *("s.safetensors", "s.npz", "s.json"),
]


@pytest.fixture(params=NAMES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = tmp_path / request.param
    write_scores(path, calibration(3).content())
    return path


def test_accumulators_and_settings_come_back_to_the_last_bit(file: Path) -> None:
    before, after = calibration(3), read_calibration(file)
    assert after.origin == str(file)
    assert after.settings == before.settings
    assert after.samples == [("c4", 6, 60), ("c4", 7, 40)]
    assert list(after.layers) == [1, 2, 5]
    for layer, sums in before.layers.items():
        for name, array in sums.arrays().items():
            found = after.layers[layer].arrays()[name]
            assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes()), name


def test_any_reader_of_scores_takes_it_as_a_file_of_metrics(file: Path) -> None:
    scores = read_scores(file)
    assert list(scores.layers) == [1, 2, 5]
    for layer, sums in calibration(3).layers.items():
        metrics = sums.metrics()
        assert scores.layers[layer].keys() == metrics.keys()
        for name, row in metrics.items():
            assert scores.layers[layer][name].tobytes() == row.tobytes()
    assert scores.facts["total_tokens"] == 100
    assert scores.facts["format"] == "shardsurgeon scores"
    assert scores.select()[0] == "reap"


def test_the_same_calibration_gives_the_same_bytes(file: Path) -> None:
    write_scores(file.with_stem("again"), calibration(3).content())
    assert file.with_stem("again").read_bytes() == file.read_bytes()


@pytest.mark.torch
def test_a_pt_file_takes_as_many_samples_as_its_reader(tmp_path: Path) -> None:
    def of(samples: int) -> ScoreContent:
        content = calibration(3).content()
        listed = [["chats.jsonl", number, 7] for number in range(samples)]
        return replace(content, calibration={**(content.calibration or {}), "samples": listed})

    write_scores(tmp_path / "most.pt", of(100_000))
    assert len(read_calibration(tmp_path / "most.pt").samples) == 100_000
    with pytest.raises(UsageError, match=r"at most 100,000 records, these are 100,001"):
        write_scores(tmp_path / "more.pt", of(100_001))
    assert not (tmp_path / "more.pt").exists()
    write_scores(tmp_path / "more.json", of(100_001))
    assert len(read_calibration(tmp_path / "more.json").samples) == 100_001


@pytest.mark.torch
def test_torch_reads_the_tree_of_the_contract_without_running_anything(tmp_path: Path) -> None:
    import torch

    write_scores(tmp_path / "s.pt", calibration(3).content())
    tree = torch.load(tmp_path / "s.pt", weights_only=True)
    assert tree.keys() == {"format", "version", "calibration", "scores", "accumulators"}
    assert (tree["format"], tree["version"]) == ("shardsurgeon scores", 1)
    assert tree["calibration"] == calibration(3).settings
    sums = tree["accumulators"][5]
    assert {name: tensor.dtype for name, tensor in sums.items()} == {
        "total_tokens": torch.int64,
        "counts": torch.int64,
        **dict.fromkeys(("weight_sum", "norm_sum", "weighted_norm_sum"), torch.float64),
        **dict.fromkeys(("max_activation", "norm_square_sum"), torch.float64),
    }
    expected = sums["weighted_norm_sum"] / sums["counts"].clamp(min=1)
    assert torch.equal(tree["scores"][5]["reap"], expected)
    assert tree["scores"][5]["total_tokens"].item() == 100


def test_the_other_formats_are_what_their_names_say(tmp_path: Path) -> None:
    content = calibration(3).content()
    for name in ("s.safetensors", "s.npz", "s.json"):
        write_scores(tmp_path / name, content)
    tensors = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    arrays = np.load(tmp_path / "s.npz")
    document = json.loads((tmp_path / "s.json").read_text())
    counts = calibration(3).layers[5].counts.tolist()
    assert tensors["accumulators.layers.5.counts"].tolist() == counts
    assert arrays["accumulators.layers.5.counts"].tolist() == counts
    assert document["accumulators"]["5"]["counts"] == counts
    assert arrays["layers.5.reap"].tolist() == document["scores"]["5"]["reap"]
    assert document["calibration"] == calibration(3).settings
    metadata = json.loads(arrays["metadata"].tobytes())
    assert json.loads(metadata["calibration"]) == calibration(3).settings


def test_scores_without_accumulators_are_not_a_calibration(tmp_path: Path) -> None:
    torch_file.save({1: {"reap": np.ones(4)}}, tmp_path / "s.pt")
    assert find_calibration(tmp_path / "s.pt") is None
    with pytest.raises(ScoreError, match="without the accumulators") as caught:
        read_calibration(tmp_path / "s.pt")
    assert caught.value.where == str(tmp_path / "s.pt")


def document(tmp_path: Path) -> dict[str, Any]:
    write_scores(tmp_path / "whole.json", calibration(3).content())
    found: dict[str, Any] = json.loads((tmp_path / "whole.json").read_text())
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "is of version 2, this program reads 1"),
        (("format",), "other", "does not say that it is of the format"),
        (("calibration",), None, "does not say that it is of the format"),
        (("accumulators", "5"), [1, 2], "accumulators of layer 5 are none"),
        (("accumulators", "mtp.0"), {"counts": [1]}, "name 'mtp.0' a layer"),
        (("accumulators", "router"), {"counts": [1]}, "name 'router' a layer"),
        (("accumulators", "5", "counts"), "many", "holds str, not numbers"),
        (("accumulators", "5", "counts"), [1, None], "holds list, not numbers"),
        (("accumulators", "5", "counts"), [10**400], "beyond all floats"),
        (("accumulators", "5", "counts"), [0] * 70_000, "not numbers"),
        (("accumulators", "5", "counts"), [[1], [2]], "not numbers"),
        (("accumulators", "5", "norm_sum"), [1.0], r"layer 5, norm_sum has shape \[1\]"),
    ],
)
def test_a_damaged_file_is_one_clear_line(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    tree = document(tmp_path)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (tmp_path / "s.json").write_text(json.dumps(tree))
    with pytest.raises(ScoreError, match=message) as caught:
        read_calibration(tmp_path / "s.json")
    assert caught.value.where == str(tmp_path / "s.json")


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_malformed_metadata_is_refused(tmp_path: Path, text: str) -> None:
    write_scores(tmp_path / "s.safetensors", calibration(3).content())
    tensors = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    metadata = {"format": "shardsurgeon scores", "version": "1", "calibration": text}
    safetensors.numpy.save_file(tensors, tmp_path / "s.safetensors", metadata)
    with pytest.raises(ScoreError, match=r"calibration is not JSON|does not say"):
        read_calibration(tmp_path / "s.safetensors")


@pytest.mark.parametrize("samples", [None, [], "c4", [["c4", 1]], [["c4", "1", 2]], [[1, 1, 1]]])
def test_a_calibration_without_a_list_of_samples_is_refused(samples: object) -> None:
    made = calibration(3)
    made.settings["samples"] = samples
    with pytest.raises(ScoreError, match="samples"):
        _ = made.samples


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        score_output(tmp_path / "s.npz").apart_from(())


@pytest.mark.parametrize(("name", "message"), [("scores.bin", "'.bin'"), ("scores", "no ending")])
def test_other_endings_are_refused_with_those_that_work(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"\.pt, \.safetensors, \.npz or \.json") as caught:
        score_output(name)
    assert message in str(caught.value)


def test_without_torch_a_pt_is_refused_before_any_work_and_the_others_are_written(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest);"
        "from shardsurgeon.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    torch_file.save({1: np.ones(4)}, tmp_path / "in.pt")
    done = in_python(
        code, "scores", "convert", "in.pt", "-o", "s.pth", cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 2
    assert "s.pth: writing this format needs torch, which is not installed; " in done.stderr
    assert done.stderr.count("\n") == 1
    done = in_python(
        code, "scores", "convert", "in.pt", "-o", "s.npz", cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert read_scores(tmp_path / "s.npz").layers[1]["saliency"].tolist() == [1.0] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_rows_keeps_its_shape(tmp_path: Path, name: str) -> None:
    rows = {"saliency": np.arange(6.0).reshape(2, 3)}
    write_scores(tmp_path / name, ScoreContent(rows=rows, facts={"seed": 7}))
    scores = read_scores(tmp_path / name)
    assert scores.layers == {}
    assert scores.rows["saliency"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert str(scores.facts["seed"]) == "7"
