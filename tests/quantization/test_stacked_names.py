"""Tensors beside stacked experts: sliced with them, one value for all, or counting them."""

from __future__ import annotations

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.roles import Carried, Counted, Role, Sliced
from shardsurgeon.errors import FamilyError
from tests.support import tiny

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
