"""How the engine resumes, groups samples, refuses, and reads no more than it needs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import FamilyError, UsageError, WorkError
from shardsurgeon.layerwise import engine, model
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.engine import calibrate_layers
from shardsurgeon.layerwise.samples import PackedRecord, Sample
from shardsurgeon.layerwise.schedule import Hold
from shardsurgeon.layerwise.settings import Progress, Settings
from shardsurgeon.layerwise.tensors import TensorReader
from shardsurgeon.storage.local import LocalSource
from tests.families.specimens import fixture, written
from tests.layerwise.streaming import Sink, as_samples, stream, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v3: a dense layer, two MoE layers, an MTP layer."""
    return written(fixture("deepseek_v3"), tmp_path_factory.mktemp("engine"))


def assert_same(one: dict[int, Accumulators], other: dict[int, Accumulators]) -> None:
    """The same to the last bit."""
    assert one.keys() == other.keys()
    for layer in one:
        theirs = other[layer].arrays()
        for name, ours in one[layer].arrays().items():
            assert np.array_equal(ours, theirs[name]), (layer, name)


class Killed(BaseException):
    """Ends a run in these tests, as a signal would."""


class DyingSink(Sink):
    """Ends the run after it keeps the results of a layer or, with `first`, before."""

    def __init__(self, layer: int, *, first: bool) -> None:
        super().__init__()
        self._layer, self._first = layer, first

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        if index == self._layer and self._first:
            raise Killed
        super().finished_layer(index, is_mtp, accumulators)
        if index == self._layer:
            raise Killed


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_killed_run_resumes_to_the_same_numbers(
    folder: Path, tmp_path: Path, layer: int, first: bool, budget: int
) -> None:
    ids = token_ids()
    whole = stream(folder, ids, tmp_path / "whole", budget=budget)
    dying = DyingSink(layer, first=first)
    with pytest.raises(Killed):
        stream(folder, ids, tmp_path / "killed", budget=budget, sink=dying)
    resumed = Sink(dying.layers)
    layers = stream(folder, ids, tmp_path / "killed", budget=budget, sink=resumed)
    assert_same(layers, whole)


def test_a_finished_run_reads_no_weight_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids((9, 7))
    done = Sink(stream(folder, ids, tmp_path / "store"))
    read = LocalSource.read

    def only_headers(self: LocalSource, name: str, begin: int, end: int) -> bytes:
        assert not name.endswith(".safetensors") or begin in (0, 8)
        return read(self, name, begin, end)

    monkeypatch.setattr(LocalSource, "read", only_headers)
    stream(folder, ids, tmp_path / "store", sink=done)


def test_two_halves_add_up_to_the_whole(folder: Path, tmp_path: Path) -> None:
    ids = token_ids()
    whole = stream(folder, ids, tmp_path / "whole")
    halves = stream(folder, ids[::2], tmp_path / "even")
    for layer, other in stream(folder, ids[1::2], tmp_path / "odd").items():
        halves[layer].add(other)
    for layer, sums in whole.items():
        assert np.array_equal(sums.counts, halves[layer].counts)
        for name in ("weight_sum", "norm_sum", "weighted_norm_sum"):
            ours, theirs = getattr(halves[layer], name), getattr(sums, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_same_batches_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    ids = token_ids()
    one = stream(folder, ids, tmp_path / "one", batch_size=2, chunk_tokens=100)
    assert_same(one, stream(folder, ids, tmp_path / "two", batch_size=2, chunk_tokens=100))


def test_only_experts_that_tokens_went_to_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    read = TensorReader.read

    def noted(self: Any, name: str, row: int | None = None) -> torch.Tensor:
        asked.add(name)
        return read(self, name, row)

    monkeypatch.setattr(TensorReader, "read", noted)
    layers = stream(folder, token_ids((2,)), tmp_path / "store")
    for layer, sums in layers.items():
        routed = set(np.flatnonzero(sums.counts).tolist())
        names = (re.search(rf"layers\.{layer}\.mlp\.experts\.(\d+)\.", name) for name in asked)
        assert {int(found[1]) for found in names if found} == routed
        assert len(routed) < sums.num_experts


def test_an_expert_is_read_once_for_all_batches_of_a_chunk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = TensorReader.read

    def noted(self: Any, name: str, row: int | None = None) -> torch.Tensor:
        asked.append(name)
        return read(self, name, row)

    monkeypatch.setattr(TensorReader, "read", noted)
    stream(folder, token_ids((20,) * 6), tmp_path / "store", batch_size=1, chunk_tokens=10_000)
    experts = [name for name in asked if re.search(r"layers\.[12]\.mlp\.experts\.\d+\.", name)]
    assert experts
    assert len(experts) == len(set(experts))


def test_progress_counts_every_token_in_every_layer(folder: Path, tmp_path: Path) -> None:
    heard: list[Progress] = []
    stream(folder, token_ids((9, 7, 5)), tmp_path / "store", listener=heard.append)
    tokens = [progress.tokens_done for progress in heard]
    assert tokens == sorted(tokens)
    last = heard[-1]
    # Three decoder layers and the MTP layer.
    assert (last.layers_done, last.layers_total) == (4, 4)
    assert last.tokens_done == last.tokens_total == 4 * 21


def test_padding_is_no_token(folder: Path, tmp_path: Path) -> None:
    ids = token_ids((30, 3))
    padded = stream(folder, ids, tmp_path / "padded", batch_size=2)
    assert all(sums.total_tokens == 33 for layer, sums in padded.items() if layer < 3)
    assert padded[3].total_tokens == 31
    top_k = 4
    assert all(sums.counts.sum() == top_k * sums.total_tokens for sums in padded.values())


@pytest.mark.parametrize("policy", [{}, {"hold": Hold.LAYER, "grouped": True}])
def test_tokens_that_do_not_count_pass_and_are_not_added_up(
    folder: Path, tmp_path: Path, policy: dict[str, Any]
) -> None:
    """The first tokens of a sample alone are what the sample cut there would give."""
    ids, firsts = token_ids((40, 33, 12)), (25, 33, 3)
    counted = [np.arange(len(each)) < first for each, first in zip(ids, firsts, strict=True)]
    masked = [Sample(each, "drawn", 0, mask) for each, mask in zip(ids, counted, strict=True)]
    ours = stream(folder, masked, tmp_path / "masked", **policy)
    cut = [each[:first] for each, first in zip(ids, firsts, strict=True)]
    expected = stream(folder, cut, tmp_path / "cut")
    for layer in (1, 2):  # the MTP layer sees the token that a cut takes away
        assert ours[layer].total_tokens == sum(firsts)
        assert np.array_equal(ours[layer].counts, expected[layer].counts)
        for name in ("weight_sum", "norm_sum", "weighted_norm_sum"):
            sums = (getattr(found[layer], name) for found in (ours, expected))
            np.testing.assert_allclose(*sums, rtol=2e-6)


def test_no_token_looks_at_the_gap_between_two_records(folder: Path, tmp_path: Path) -> None:
    found = []
    for gap, records in ((0, True), (77, True), (0, False), (77, False)):
        ids = token_ids((40,))[0]
        ids[20] = gap
        places = (PackedRecord(0, 0, 20), PackedRecord(1, 21, 40)) if records else ()
        sample = Sample(ids, "drawn", 0, np.arange(40) != 20, places)
        found.append(stream(folder, [sample, *token_ids((33,))], tmp_path / f"{len(found)}"))
    for layer in (1, 2):
        assert found[0][layer].total_tokens == 39 + 33
        assert np.array_equal(found[0][layer].norm_sum, found[1][layer].norm_sum)
        assert not np.array_equal(found[2][layer].norm_sum, found[3][layer].norm_sum)


def test_a_device_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with (
        ActivationStore(tmp_path / "store", [3], 0) as store,
        pytest.raises(UsageError, match=r"--device cuda:7: torch .* finds \d+ CUDA devices"),
    ):
        samples = as_samples(token_ids((3,)))
        settings = Settings(device="cuda:7", dtype="float32")
        calibrate_layers(
            open_checkpoint(folder), samples, settings, store, Sink(), lambda progress: None
        )


def test_a_layer_that_does_not_fit_is_refused_before_a_weight_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(model.Model, "prepare", None)
    with pytest.raises(UsageError, match=r"one layer takes [\d.]+ .B, .*100.0 kB are free"):
        stream(folder, token_ids(), tmp_path / "store")


def test_a_missing_parameter_is_refused_by_name(tmp_path: Path) -> None:
    made = fixture("qwen3_moe")
    gone = "model.layers.2.self_attn.q_norm.weight"
    tensors = {name: tensor for name, tensor in made.tensors.items() if name != gone}
    folder = written(replace(made, tensors=tensors), tmp_path)
    with pytest.raises(FamilyError, match=re.escape(f"{gone}: transformers' model needs it")):
        stream(folder, token_ids((5,)), tmp_path / "store")


def test_outputs_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    made = fixture("qwen3_moe")
    tensors = {
        name: tensor * 1e30 if re.search(r"layers\.0\.mlp\.experts\.\d+\.", name) else tensor
        for name, tensor in made.tensors.items()
    }
    folder = written(replace(made, tensors=tensors), tmp_path)
    with pytest.raises(WorkError, match=r"layer 0: expert \d+ gave numbers that are not finite"):
        stream(folder, token_ids((5,)), tmp_path / "store")


def test_bfloat16_is_close_to_float32(folder: Path, tmp_path: Path) -> None:
    ids = token_ids()
    narrow = stream(folder, ids, tmp_path / "bf16", dtype="bfloat16")
    for layer, wide in stream(folder, ids, tmp_path / "f32").items():
        ours = narrow[layer]
        assert ours.total_tokens == wide.total_tokens
        assert abs(ours.norm_sum.sum() / wide.norm_sum.sum() - 1) < 0.02
