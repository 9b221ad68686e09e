"""What the engine adds up for each dataset of a mix, and that the sums of all stay what they were.

Expected are the sums of the whole model in memory, over the samples of one dataset at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.experts import Recorder, Routing, TokenParts
from shardsurgeon.layerwise.forward import Batch
from shardsurgeon.layerwise.samples import Sample
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory
from tests.layerwise.streaming import Sink, stream, token_ids

SOURCES = ("code.jsonl@sha256:aa", "org/chat(train)", "code.jsonl@sha256:aa", "org/chat(train)")
LENGTHS = (90, 70, 33, 1)
# Experts of one layer in one product, one by one for each chunk, and all batches by themselves.
WAYS: list[dict[str, Any]] = [
    {"batch_size": 3},
    {"batch_size": 2, "chunk_tokens": 64},
    {"batch_size": 1},
    {"batch_size": 3, "grouped": True},
]


def samples(sources: Sequence[str]) -> list[Sample]:
    return [
        Sample(ids, source, number)
        for number, (ids, source) in enumerate(zip(token_ids(LENGTHS), sources, strict=True))
    ]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second one has an MTP layer, and a sample of one token that has no pair for it."""
    return written(fixture(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.oracle
@pytest.mark.parametrize("how", WAYS)
def test_each_part_has_the_sums_of_its_own_samples(
    folder: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    sink = Sink()
    mix = stream(folder, samples(SOURCES), tmp_path / "mix", sink=sink, **how)
    alike = stream(folder, samples([SOURCES[0]] * 4), tmp_path / "alike", **how)
    model = in_memory.load(folder.name, folder, tmp_path)
    main = {layer: sums for layer, sums in mix.items() if layer not in sink.mtp}
    for identity, source in (("@sha256:aa", SOURCES[0]), (SOURCES[1], SOURCES[1])):
        own = [ids for ids, its in zip(token_ids(LENGTHS), SOURCES, strict=True) if its == source]
        found = {layer: (sums.parts or {})[identity] for layer, sums in main.items()}
        in_memory.assert_equal(found, in_memory.sums(model, own))
    for layer, sums in mix.items():
        for name, array in sums.arrays().items():
            assert array.tobytes() == alike[layer].arrays()[name].tobytes(), (layer, name)
        assert (sums.parts or {}).keys() == {"@sha256:aa", SOURCES[1]}
        assert (alike[layer].parts or {}).keys() == {"@sha256:aa"}
        parts = [*(sums.parts or {}).values()]
        total = Accumulators.zeros(sums.num_experts)
        for part in parts:
            total.add(part)
        for name, array in sums.arrays().items():
            exact = name in ("total_tokens", "counts", "max_activation")
            # Rows are rounded as they are added, in another order.
            rtol = 0 if exact else 1e-12
            np.testing.assert_allclose(total.arrays()[name], array, rtol=rtol, err_msg=name)


@pytest.mark.torch
def test_a_row_that_is_of_no_part_or_not_counted_changes_no_other() -> None:
    outputs = torch.tensor([[3.0, 4.0], [torch.inf, 0.0], [6.0, -8.0], [0.0, 1.0]])
    counted = torch.tensor([True, False, True, True])
    numbers = torch.tensor([0, 1, 1, 0])
    routing = Routing(
        layer=0,
        inputs=outputs,
        index=torch.zeros(4, 1, dtype=torch.int64),
        weights=torch.ones(4, 1),
        real=None,
        counted=counted,
        num_counted=3,
        parts=TokenParts(numbers, {0: 2, 1: 1}),
    )
    recorder = Recorder("layer 0", 2, "cpu", ["a", "b"])
    recorder.add_tokens([routing])
    # The last row is of the second expert.
    recorder.add(
        0, outputs, torch.tensor([0.5, 1, 0.25, 2]), counted, numbers, torch.tensor([3, 4])
    )
    found = recorder.result().parts or {}
    expected = {
        "a": Accumulators(
            2,
            *(np.array(row) for row in ([1, 1], [0.5, 2.0], [5.0, 1.0], [2.5, 2.0], [4.0, 1.0])),
            norm_square_sum=np.array([25.0, 1.0]),
        ),
        "b": Accumulators(
            1,
            *(np.array(row) for row in ([1, 0], [0.25, 0], [10.0, 0], [2.5, 0], [6.0, 0])),
            norm_square_sum=np.array([100.0, 0]),
        ),
    }
    for part, sums in expected.items():
        for name, array in sums.arrays().items():
            np.testing.assert_array_equal(found[part].arrays()[name], array, err_msg=name)


@pytest.mark.torch
def test_a_batch_knows_how_many_tokens_of_each_part_count() -> None:
    ids = token_ids((3, 1, 2))
    counted = [np.array([True, False, True]), None, np.array([False, True])]
    parts = Batch.of(ids, "cpu", counted, parts=[1, 0, 1]).parts
    assert parts is not None
    # Each sample is padded to 3 tokens.
    assert parts.numbers.tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert parts.counted == {0: 1, 1: 3}
    assert Batch.of(ids, "cpu", counted).parts is None


def sums(tokens: int, *counts: int) -> Accumulators:
    of = [np.array(counts, float) for _ in range(5)]
    return Accumulators(tokens, np.array(counts), *of)


def test_sums_add_up_part_by_part_as_long_as_both_know_theirs() -> None:
    one, other = sums(4, 1, 3).of_one("a"), sums(6, 5, 1).of_one("b")
    total = Accumulators.zeros(2)
    for each in (one, other, one):
        total.add(each)
    assert {part: (of.total_tokens, of.counts.tolist()) for part, of in (total.parts or {}).items()}
    assert (total.parts or {})["a"].counts.tolist() == [2, 6]
    assert (total.parts or {})["b"].counts.tolist() == [5, 1]
    assert one.counts.tolist() == (one.parts or {})["a"].counts.tolist() == [1, 3]
    total.add(replace(one, parts=None))
    assert total.parts is None and total.counts.tolist() == [8, 10]
