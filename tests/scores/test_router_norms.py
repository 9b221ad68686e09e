"""Router magnitudes against torch, from a file in memory and by the command's operation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import CheckpointError, FamilyError, OutputError, UsageError
from shardsurgeon.operations import prune, scores
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.scores.files import read_scores
from shardsurgeon.scores.router_norms import RouterNorm, router_scores
from shardsurgeon.storage.source import MemorySource
from tests.cli.standins import in_python
from tests.support import tiny

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROUTER = "model.layers.2.mlp.gate.weight"


def checkpoint(
    routers: dict[int, Any],
    convert: Callable[[np.ndarray], Any] = np.asarray,
    save: Callable[[Any], bytes] = safetensors.numpy.save,
) -> Checkpoint:
    """The tiny checkpoint in one shard, with the routers of some layers given."""
    weights = {name: convert(values) for name, values in tiny.tensors().items()}
    weights |= {f"model.layers.{n}.mlp.gate.weight": value for n, value in routers.items()}
    files = tiny.files()
    shards = {"model.safetensors": save(weights), "config.json": files["config.json"]}
    return open_checkpoint(MemorySource(shards, name="tiny"))


def torch_checkpoint(routers: dict[int, Any]) -> Checkpoint:
    """The same, with routers of torch's types."""
    import safetensors.torch
    import torch

    return checkpoint(routers, torch.from_numpy, safetensors.torch.save)


def scored(model: Checkpoint, norm: RouterNorm = RouterNorm.L2) -> dict[int, np.ndarray]:
    return router_scores(model, read_anatomy(model).layers, norm)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("order", [1, 2])
def test_norms_of_every_layer_agree_with_torch(dtype: str, order: int) -> None:
    import torch

    router = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    router = router.to(getattr(torch, dtype))
    found = scored(torch_checkpoint({1: router, 3: -router}), RouterNorm(f"l{order}"))
    assert list(found) == [1, 2, 3]  # the MTP layer too
    expected = torch.linalg.vector_norm(router.double(), order, dim=1).numpy()
    np.testing.assert_allclose(found[1], expected, rtol=1e-14)
    np.testing.assert_array_equal(found[3], found[1])


def test_the_two_norms_rank_differently_and_are_not_mixed_up() -> None:
    model = checkpoint({2: np.float32([[3, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]] * 4)})
    assert scored(model)[2].tolist() == [3.0, 2.0] * 4
    assert scored(model, RouterNorm.L1)[2].tolist() == [3.0, 4.0] * 4


@pytest.mark.torch
def test_a_router_that_is_stored_without_its_scale_is_refused_by_name() -> None:
    import torch

    router = torch.ones(8, 6).to(torch.float8_e4m3fn)
    with pytest.raises(FamilyError, match="F8_E4M3") as caught:
        scored(torch_checkpoint({2: router}))
    assert caught.value.where == ROUTER


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_by_name(value: float) -> None:
    router = np.ones((8, 6), np.float32)
    router[5, 2] = value
    with pytest.raises(CheckpointError, match="row 5") as caught:
        scored(checkpoint({2: router}))
    assert caught.value.where == ROUTER


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_score_file_from_the_router_prunes_the_model_it_came_from(
    tmp_path: Path, ending: str
) -> None:
    model, out = str(FIXTURES / "deepseek_v3"), tmp_path / f"scores.{ending}"
    report = scores.scores_from_router(model, out, norm="l1")
    assert [(layer.layer, layer.is_mtp) for layer in report.layers] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    read = read_scores(out)
    assert read.facts == {"method": "router-magnitude", "model": "deepseek_v3", "norm": "l1"}
    first = read.layers[1]["router_l1"]
    assert (report.layers[0].min, report.layers[0].max) == (first.min(), first.max())
    pruning = prune.plan(model, read, SelectionRequest(ratio=0.5))
    assert pruning.report.metric == "router_l1"
    assert {layer.policy for layer in pruning.report.layers} == {"scores"}
    # The rule for an MTP layer without scores is the same norm, l2.
    other = scores.scores_from_router(model, tmp_path / f"l2.{ending}")
    by_norm = prune.plan(model, read_scores(other.out), SelectionRequest(ratio=0.5))
    by_policy = prune.plan(
        model, FIXTURES / "deepseek_v3" / "scores.pt", SelectionRequest(ratio=0.5)
    )
    kept = [p.decision.keep.layers[3].retained for p in (by_norm, by_policy)]
    assert kept[0] == kept[1]


def test_the_command_does_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from shardsurgeon.cli.main import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    words = ("scores", "from-router", str(FIXTURES / "kimi_k25"), "-o", "scores.json")
    done = in_python(code, *words, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["scores.json"]
    assert done.stdout.endswith("Scores saved in scores.json.\n")


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        scores.scores_from_router(str(FIXTURES / "qwen3_moe"), out)
    assert out.read_bytes() == b"mine"


def test_an_ending_that_cannot_be_written_is_refused_before_the_model_is_opened(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=r"'\.bin'"):
        scores.scores_from_router(str(tmp_path / "no such model"), tmp_path / "scores.bin")
    assert os.listdir(tmp_path) == []
