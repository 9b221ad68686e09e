"""Every tensor of a pruned checkpoint, bit by bit, against torch and the safetensors library."""

from __future__ import annotations

import json

import pytest

from tests.oracle.byte_oracle import expected_tensors, read_tensors, same_bits, text_config
from tests.oracle.pruning import Pruned

pytestmark = pytest.mark.oracle


def test_every_tensor_is_the_sources_renumbered_or_sliced(pruned: Pruned) -> None:
    result = read_tensors(pruned.folder)
    expected = expected_tensors(pruned.source, pruned.retained)
    assert result.keys() == expected.keys()
    assert [name for name in expected if not same_bits(result[name], expected[name])] == []


def test_every_layer_with_experts_is_pruned_mtp_layers_too(pruned: Pruned) -> None:
    layers = text_config(pruned.source)["num_hidden_layers"]
    with_router = {
        int(name.split("layers.")[1].split(".")[0]) + layers * name.startswith("mtp.")
        for name in read_tensors(pruned.source)
        if name.endswith("gate.weight")
    }
    assert set(pruned.retained) == with_router


def test_the_index_counts_the_bytes_of_the_tensors(pruned: Pruned) -> None:
    index = json.loads((pruned.folder / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in read_tensors(pruned.folder).values())
    assert index["metadata"]["total_size"] == total
