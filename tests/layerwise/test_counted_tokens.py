"""Which tokens a layer adds up: those that count, of all that pass through the model.

Expected are the sums of the whole model in memory, each sample alone, over the tokens that count;
the gaps of packed windows are masked, as the REAP reference masks them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import pytest
import torch

from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.samples import Sample, counted_tokens, windows
from tests.families.specimens import fixture, written
from tests.layerwise import in_memory, streaming
from tests.layerwise.streaming import token_ids

pytestmark = pytest.mark.oracle

Layers: TypeAlias = dict[int, Accumulators]
# Batches of several samples, chunks of several batches, experts that are read for each chunk.
WAYS: list[dict[str, Any]] = [{"batch_size": 2}, {"batch_size": 3, "chunk_tokens": 64}]
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss"]


def masked(lengths: Sequence[int], seed: int = 3) -> list[Sample]:
    """Samples of which about a third of the tokens counts, and one of which all do."""
    generator = np.random.default_rng(seed)
    made = []
    for index, ids in enumerate(token_ids(lengths)):
        counted = generator.random(len(ids)) < 0.3
        counted[-1] = True
        made.append(Sample(ids + 1, "drawn", index, None if index == 1 else counted))
    return made


def run(folder: Path, samples: Sequence[Sample], scratch: Path, **how: Any) -> Layers:
    """Layer → what the engine adds up, main layers alone."""
    sink = streaming.Sink()
    with mock.patch.object(streaming, "as_samples", lambda ids: samples):
        streaming.stream(folder, [sample.ids for sample in samples], scratch, sink=sink, **how)
    return {layer: sums for layer, sums in sink.layers.items() if layer not in sink.mtp}


def whole(model: Any, samples: Sequence[Sample]) -> dict[int, in_memory.Sums]:
    """Layer → the numbers of the tokens that count."""
    found: dict[int, in_memory.Sums] = defaultdict(in_memory.Sums)
    keep: list[Any] = [None]
    hooks = []
    for name, module in model.named_modules():
        place = re.search(r"\.layers\.(\d+)\.\w+\.experts$", name)
        if place is not None:
            add = in_memory.on_experts(found[int(place[1])])

            def hook(module: Any, given: tuple[Any, ...], add: Any = add) -> None:
                add(module, tuple(each[keep[0]] for each in given))

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.inference_mode():
        for sample in samples:
            counted, gaps = sample.counted, sample.gaps
            keep[0] = slice(None) if counted is None else torch.from_numpy(counted)
            seen = None if gaps is None else torch.from_numpy(~gaps).long()[None]
            model(
                input_ids=torch.from_numpy(sample.ids)[None], attention_mask=seen, use_cache=False
            )
    for each in hooks:
        each.remove()
    return dict(found)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_tokens_that_count_are_added_up(
    name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    folder = written(fixture(name), tmp_path)
    samples = masked((40, 33, 40, 12, 1, 27))
    streamed = run(folder, samples, tmp_path / "store", **how)
    assert {sums.total_tokens for sums in streamed.values()} == {counted_tokens(samples)}
    model = in_memory.load(name, folder, tmp_path)
    in_memory.assert_equal(streamed, whole(model, samples))


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_attends_to_the_gaps_of_a_packed_window(
    name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    folder = written(fixture(name), tmp_path)
    samples = list(windows(masked((9, 14, 6, 11, 8, 13, 5)), 24))
    assert len(samples) > 2 and all(sample.gaps is not None for sample in samples)
    streamed = run(folder, samples, tmp_path / "store", **how)
    model = in_memory.load(name, folder, tmp_path)
    in_memory.assert_equal(streamed, whole(model, samples))


def test_tokens_that_do_not_count_pass_through_the_experts_all_the_same(tmp_path: Path) -> None:
    """Counting every token of a sample, half at a time, adds up to counting them at once."""
    folder = written(fixture("qwen3_moe"), tmp_path)
    ids = token_ids((30, 21))
    halves = [np.arange(len(each)) % 2 == 0 for each in ids]
    parts = [
        [
            Sample(each, "drawn", n, half ^ turned)
            for n, (each, half) in enumerate(zip(ids, halves, strict=True))
        ]
        for turned in (False, True)
    ]
    one, other = (run(folder, part, tmp_path / f"s{n}") for n, part in enumerate(parts))
    at_once = run(folder, [Sample(each, "drawn", n) for n, each in enumerate(ids)], tmp_path / "s")
    for layer, sums in at_once.items():
        one[layer].add(other[layer])
        assert one[layer].total_tokens == sums.total_tokens == 51
        for name, array in one[layer].arrays().items():
            np.testing.assert_allclose(array, sums.arrays()[name], rtol=1e-6, err_msg=name)
