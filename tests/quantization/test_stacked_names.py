"""Tensors beside stacked experts: sliced with them, one value for all, or counting them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.roles import Carried, Counted, Role, Sliced
from shardsurgeon.errors import FamilyError
from shardsurgeon.execution.plan import Literal
from shardsurgeon.families.schema import Family, parse_family
from shardsurgeon.operations.prune import Pruning, plan
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.scores.table import Scores
from tests.support import tiny
from tests.support.tiny_job import tensors_of

PREFIX = "model.layers.0.mlp."


def role_of(name: str, values: np.ndarray, experts: int = 8) -> Role:
    """What a tensor called `name` is beside the stacked experts of a Qwen3.5."""
    config = {
        "model_type": "qwen3_5_moe_text",
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
    }
    weights: tiny.Tensors = {
        f"{PREFIX}experts.gate_up_proj": np.zeros((experts, 6, 4), "u1"),
        f"{PREFIX}experts.down_proj": np.zeros((experts, 4, 3), "u1"),
        f"{PREFIX}gate.weight": np.zeros((experts, 4), "f4"),
        f"{PREFIX}experts.{name}": values,
    }
    files = tiny.files(config, weights)
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    anatomy = read_anatomy(checkpoint)
    records = (record for shard in checkpoint.shards for record in shard.header.tensors)
    return anatomy.role(next(record for record in records if record.name.endswith(name)))


@pytest.mark.parametrize("dtype", ["i4", "i8"])
@pytest.mark.parametrize("experts", [3, 8])
def test_the_shape_of_a_packed_weight_counts_the_experts(dtype: str, experts: int) -> None:
    shape = np.asarray([experts, 6, 8], dtype)
    assert role_of("gate_up_proj.weight_shape", shape, experts) == Counted(0)
    assert role_of("gate_up_proj_shape", shape, experts) == Counted(0)


def test_a_shape_that_every_expert_has_stays_and_one_for_each_is_sliced() -> None:
    assert role_of("gate_up_proj.weight_shape", np.asarray([6, 8])) == Carried()
    each = np.zeros((8, 2), "i8")
    assert role_of("gate_up_proj.weight_shape", each) == Sliced(0, 0, 0, False)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 6, 1), (1, 1, 6)])
def test_a_scale_for_all_experts_stays(shape: tuple[int, ...]) -> None:
    assert role_of("gate_up_proj.weight_scale_2", np.zeros(shape, "f4")) == Carried()


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 1, 6), (8, 6, 1), (8, 6, 2)])
def test_a_scale_for_each_expert_is_sliced(shape: tuple[int, ...]) -> None:
    assert role_of("gate_up_proj_scale", np.zeros(shape, "f4")) == Sliced(0, 0, 0, False)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gate_up_proj.weight", np.zeros((1, 6, 4), "f4")),
        ("gate_up_proj_scale", np.zeros((7, 6, 1), "f4")),
        ("gate_up_proj.weight_shape", np.zeros(3, "f4")),
    ],
)
def test_anything_else_beside_them_is_refused_by_name(name: str, values: np.ndarray) -> None:
    with pytest.raises(FamilyError) as caught:
        role_of(name, values)
    assert name in str(caught.value)


def pruned_with(weights: tiny.Tensors, declared: Family | None = None, experts: int = 8) -> Pruning:
    """The plan that keeps half of the experts of a Qwen3.5 with more tensors in its block."""
    config = {
        "model_type": "qwen3_5_moe_text",
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
    }
    stacked: tiny.Tensors = {
        f"{PREFIX}experts.gate_up_proj": np.zeros((experts, 6, 4), "u1"),
        f"{PREFIX}experts.down_proj": np.zeros((experts, 4, 3), "u1"),
        f"{PREFIX}gate.weight": np.zeros((experts, 4), "f4"),
    }
    source = tiny.MemorySource(tiny.files(config, stacked | weights), name="tiny")
    checkpoint = replace(open_checkpoint(source), family=declared)
    scores = Scores("a test", {0: {"reap": np.linspace(1.0, 2.0, experts)}})
    return plan(checkpoint, scores, SelectionRequest(keep=experts // 2))


def with_counts(name: str) -> Family:
    """The declaration of Qwen3.5 with one more tensor, said to begin with the number of experts."""
    text = f'like = "qwen3_5_moe"\n[tensors]\nexpert_counts = ["mlp.{name}"]\n'
    return parse_family(text, "own.toml")


@pytest.mark.parametrize("dtype", ["i4", "i8", "u4", "u8"])
def test_a_declared_count_is_made_new(dtype: str) -> None:
    counts = np.asarray([8, 5, 7], dtype)
    made = pruned_with({f"{PREFIX}counts": counts}, with_counts("counts"))
    (tensor,) = (
        tensor
        for shard in made.plan.shards
        for tensor in tensors_of(shard)
        if tensor.name.endswith("counts")
    )
    first, rest = tensor.pieces
    assert isinstance(first, Literal) and first.data == counts.dtype.type(4).tobytes()
    assert rest.nbytes == counts.nbytes - counts.itemsize


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i2", "?"])
def test_a_count_declared_on_what_cannot_be_one_is_refused(dtype: str) -> None:
    with pytest.raises(FamilyError, match=r"layers\.0\.mlp\.counts: is \w+, and a number of"):
        pruned_with({f"{PREFIX}counts": np.zeros(3, dtype)}, with_counts("counts"))


@pytest.mark.parametrize(
    ("name", "declared"),
    [("counts", with_counts("counts")), ("experts.gate_up_proj.weight_shape", None)],
)
def test_a_count_that_is_not_the_number_of_experts_is_not_written_over(
    name: str, declared: Family | None
) -> None:
    with pytest.raises(FamilyError, match=r"begins with 9, where the number of experts, 8"):
        pruned_with({PREFIX + name: np.asarray([9, 6, 8])}, declared)


def test_an_axis_counted_from_the_end_is_refused() -> None:
    text = 'like = "qwen3_5_moe"\n[tensors]\nrouters = [{ name = "mlp.gate.weight", axis = -1 }]\n'
    with pytest.raises(FamilyError, match=r"mlp\.gate\.weight: axis = -1: dimensions are counted"):
        parse_family(text, "own.toml")


def test_an_axis_that_a_tensor_does_not_have_is_named() -> None:
    text = 'like = "qwen3_5_moe"\n[tensors]\nstacked = [{ name = "mlp.experts.*", axis = 4 }]\n'
    with pytest.raises(FamilyError, match=r"shape \[8, \d, \d\] has no dimension 4"):
        pruned_with({}, parse_family(text, "own.toml"))
