"""The layer stream, counted: what is read, what is moved, in which order, and what is alive."""

from __future__ import annotations

import random
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise import activations, experts, saving
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.loading import ExpertRecipe
from shardsurgeon.layerwise.memory import ModelSize, model_size
from shardsurgeon.layerwise.model import Model
from shardsurgeon.layerwise.schedule import Hold, Limits, Place, chunks, costs, make_schedule
from shardsurgeon.layerwise.settings import Settings
from shardsurgeon.layerwise.tensors import TensorReader
from tests.families.specimens import fixture, written
from tests.layerwise.fake_devices import LazyGpu, Recording
from tests.layerwise.streaming import Sink, stream, token_ids

EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v3: a dense layer, two MoE layers, an MTP layer."""
    return written(fixture("deepseek_v3"), tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def without_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(fixture("qwen3_moe"), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tensor → how often it was read from the file."""
    counted: Counter[str] = Counter()
    read = TensorReader.read

    def noted(self: Any, name: str, row: int | None = None) -> torch.Tensor:
        counted[name] += 1
        return read(self, name, row)

    monkeypatch.setattr(TensorReader, "read", noted)
    return counted


def assert_close(one: dict[int, Accumulators], other: dict[int, Accumulators]) -> None:
    assert one.keys() == other.keys()
    for layer in one:
        theirs = other[layer].arrays()
        for name, ours in one[layer].arrays().items():
            np.testing.assert_allclose(ours, theirs[name], rtol=2e-6, err_msg=f"{layer} {name}")


def assert_same(one: dict[int, Accumulators], other: dict[int, Accumulators]) -> None:
    for layer in one:
        theirs = other[layer].arrays()
        for name, ours in one[layer].arrays().items():
            assert np.array_equal(ours, theirs[name]), (layer, name)


def sizes(folder: Path) -> ModelSize:
    checkpoint = open_checkpoint(folder)
    return model_size(checkpoint, read_anatomy(checkpoint))


def test_readers_make_the_same_experts_side_by_side_as_one_after_another(folder: Path) -> None:
    checkpoint, settings = open_checkpoint(folder), Settings(dtype="float32")
    model = Model(checkpoint, read_anatomy(checkpoint), settings, Device("cpu"))
    _, make = model.experts(1)
    wanted = list(range(24)) * 8
    before = sys.getswitchinterval()
    with ThreadPoolExecutor(8) as readers:
        sys.setswitchinterval(1e-6)
        together = list(readers.map(make, wanted))
        sys.setswitchinterval(before)
    for expert, made in zip(wanted, together, strict=True):
        for name, value in make(expert).items():
            assert isinstance(value, torch.Tensor)
            assert torch.equal(made[name], value)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("hold", list(Hold))
def test_every_policy_finds_the_same_sums(
    folder: Path, tmp_path: Path, hold: Hold, grouped: bool
) -> None:
    ids = token_ids()
    plain = stream(folder, ids, tmp_path / "plain")
    # Groups of 5 do not divide the experts, rows of 64 cut through them.
    other = stream(folder, ids, tmp_path / "other", hold=hold, grouped=grouped, group=5, rows=64)
    assert_close(other, plain)


@pytest.mark.parametrize("hold", [Hold.LAYER, Hold.STORED])
def test_where_a_layer_stays_each_expert_is_read_once_whatever_the_number_of_batches(
    folder: Path, tmp_path: Path, readings: Counter[str], hold: Hold
) -> None:
    stream(folder, token_ids((20,) * 12), tmp_path / "store", batch_size=1, hold=hold)
    counts = {name: count for name, count in readings.items() if EXPERT.search(name)}
    tensors = {r.name for r in open_checkpoint(folder).records if EXPERT.search(r.name)}
    assert counts == dict.fromkeys(tensors, 1)


@pytest.mark.parametrize(
    ("lengths", "memory", "hold"),
    [([512] * 64, 30_000_000, Hold.LAYER), ([64] * 4, 1 << 34, Hold.GROUPS)],
)
def test_the_prediction_of_the_cost_model_is_what_is_counted(
    without_mtp: Path,
    tmp_path: Path,
    readings: Counter[str],
    lengths: list[int],
    memory: int,
    hold: Hold,
) -> None:
    """64 samples of 512 tokens in little memory, and a few short ones in a lot of it."""
    ids, size, device = token_ids(lengths), sizes(without_mtp), Recording()
    limits = Limits(4, False, memory, memory, states_budget=1 << 30)
    schedule = make_schedule(size, lengths, limits)
    assert schedule.hold is Hold.LAYER
    schedule = replace(schedule, hold=hold)
    cut = chunks(lengths, schedule, mixed=True)
    expected = costs(size, lengths, schedule, 4, len(cut))
    changes = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    stream(without_mtp, ids, tmp_path / "store", device=device, **changes)
    assert set(readings.values()) == {1}
    nbytes = {record.name: record.nbytes for record in open_checkpoint(without_mtp).records}
    read = sum(count * nbytes[name] for name, count in readings.items() if EXPERT.search(name))
    assert (read, expected.readings) == (expected.experts, 1)
    assert (device.sent, device.fetched) == (expected.states_in, expected.states_out)


def test_experts_that_pass_are_read_once_for_each_chunk(
    folder: Path, tmp_path: Path, readings: Counter[str]
) -> None:
    ids, lengths = token_ids((40,) * 6), [40] * 6
    stream(folder, ids, tmp_path / "store", batch_size=1, chunk_tokens=80)
    schedule = make_schedule(
        sizes(folder), lengths, Limits(4, False, 1 << 30, 1 << 30, batch_size=1)
    )
    chunked = chunks(lengths, replace(schedule, hold=Hold.GROUPS, chunk=80), mixed=True)
    assert len(chunked) == 3
    counts = {count for name, count in readings.items() if EXPERT.search(name)}
    assert max(counts) == 3


def test_the_next_layer_arrives_while_this_one_computes(
    without_mtp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last product of a layer waits until the next layer's experts have been asked for."""
    begun: dict[int, threading.Event] = {layer: threading.Event() for layer in range(4)}
    made = ExpertRecipe.make
    seen: list[int] = []

    def noted(self: ExpertRecipe, expert: int) -> Any:
        layer = int(re.search(r"layers\.(\d+)\.", min(self.parameters))[1])  # type: ignore[index]
        begun[layer].set()
        return made(self, expert)

    compute = experts.StreamedExperts.compute

    def waiting(self: Any, routings: list[Any]) -> Any:
        layer = routings[0].layer
        if layer < 2:
            assert begun[layer + 1].wait(30)
            seen.append(layer)
        return compute(self, routings)

    monkeypatch.setattr(ExpertRecipe, "make", noted)
    monkeypatch.setattr(experts.StreamedExperts, "compute", waiting)
    stream(without_mtp, token_ids(), tmp_path / "store", hold=Hold.LAYER, ahead=True)
    assert set(seen) == {0, 1}


def test_the_next_batch_is_sent_before_this_one_computes(
    without_mtp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Recording()
    compute = experts.StreamedExperts.compute

    def noted(self: Any, routings: list[Any]) -> Any:
        device.calls.append(("compute", 0))
        return compute(self, routings)

    monkeypatch.setattr(experts.StreamedExperts, "compute", noted)
    ids = token_ids((20,) * 4)
    stream(without_mtp, ids, tmp_path / "s", batch_size=1, device=device, hold=Hold.LAYER)
    order = [what for what, _ in device.calls if what in ("send", "compute")]
    # Of each layer: one batch ahead, and none behind the last one.
    assert order == ["send", "send", "compute", "send", "compute", "send", "compute", "compute"] * 3


@pytest.mark.parametrize(
    ("hold", "most"),
    [(Hold.GROUPS, 4), (Hold.LAYER, 24)],
)
def test_no_more_experts_are_alive_than_the_policy_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold, most: int
) -> None:
    alive, peak = 0, 0
    made = ExpertRecipe.make
    counting = threading.Lock()

    def gone() -> None:
        nonlocal alive
        with counting:
            alive -= 1

    def noted(self: ExpertRecipe, expert: int) -> Any:
        nonlocal alive, peak
        parameters = made(self, expert)
        weakref.finalize(next(iter(parameters.values())), gone)
        with counting:
            alive += 1
            peak = max(peak, alive)
        return parameters

    monkeypatch.setattr(ExpertRecipe, "make", noted)
    stream(folder, token_ids((60,) * 4), tmp_path / "store", hold=hold, chunk=1 << 20)
    assert peak <= most


class Killed(BaseException):
    """Ends a run in these tests, as a signal would."""


def moments(monkeypatch: pytest.MonkeyPatch, fatal: int) -> Iterator[int]:
    """Number the moments of a run, and end it at one of them."""
    count = iter(range(1, 1 << 30))

    def wrap(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            if next(count) == fatal:
                raise Killed
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    wrap(ActivationStore, "keep")
    wrap(ActivationStore, "send")
    wrap(ActivationStore, "advance")
    wrap(Sink, "finished_layer")
    wrap(experts.StreamedExperts, "compute")
    return count


@pytest.mark.parametrize("place", [Place.HOST, Place.FILE])
@pytest.mark.parametrize("hold", list(Hold))
def test_runs_that_are_killed_at_random_moments_have_the_bytes_of_one_that_is_not(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold: Hold,
    place: Place,
    loop: str,
) -> None:
    monkeypatch.setattr(saving, "SAVE_SECONDS", 0)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)
    ids, policy = token_ids(), {"hold": hold, "states": place, "chunk": 100}
    with monkeypatch.context() as patched:
        total = moments(patched, -1)
        whole = stream(folder, ids, tmp_path / "whole", **policy)
        number = next(total) - 1
    for seed in range(10 if loop == "long" else 1):
        drawn = random.Random(f"{seed} {hold} {place}")
        sink = Sink()
        for _ in range(3):
            with monkeypatch.context() as patched:
                moments(patched, drawn.randrange(1, number + 1))
                try:
                    stream(folder, ids, tmp_path / f"killed{seed}", sink=sink, **policy)
                except Killed:
                    sink = Sink(sink.layers)
        stream(folder, ids, tmp_path / f"killed{seed}", sink=sink, **policy)
        assert sink.layers.keys() == whole.keys()
        assert_same(sink.layers, whole)


def test_saved_states_are_a_twentieth_of_what_is_moved_where_ten_layers_take_ten_minutes(
    without_mtp: Path, tmp_path: Path
) -> None:
    """K2.5's 61 layers at a minute each, as the recipe has them on one GPU: by the clock alone."""
    saved, moved, now = 0, 0, 0.0
    lengths, batches = [64] * 4, [[0, 1], [2, 3]]
    device = Recording()
    with ActivationStore(tmp_path, lengths, 1 << 30, clock=lambda: now) as store:
        store.arrange(batches, Place.HOST, 0, device)
        for _ in range(61):
            for batch in range(2):
                store.keep(batch, torch.zeros(128, 8))
            store.advance(1)
            now += 60
            store._saver._wait()
            for batch in range(2):
                store.send(batch)
        saved, moved = store._saver.saved_nbytes, device.sent + device.fetched
    assert 0 < saved <= 0.05 * moved


def test_memory_that_was_asked_for_bounds_the_schedule(without_mtp: Path) -> None:
    size, lengths = sizes(without_mtp), [2048] * 64
    for free in (1 << 34, 60_000_000, 30_000_000):
        schedule = make_schedule(size, lengths, Limits(4, False, free, free))
        assert schedule.device_nbytes <= free
    assert activations.compact(torch.zeros(4, 4)[:2]).untyped_storage().nbytes() == 32


@pytest.mark.parametrize("place", [Place.HOST, Place.FILE])
@pytest.mark.parametrize("hold", list(Hold))
def test_everything_that_a_gpu_copies_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold, place: Place
) -> None:
    monkeypatch.setattr(saving, "SAVE_SECONDS", 0)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)
    ids = token_ids((40, 33, 40, 12, 1, 27, 40, 38))
    plain = stream(folder, ids, tmp_path / "plain")
    policy = {"hold": hold, "states": place, "grouped": True, "group": 5, "chunk": 100}
    policy["ahead"] = hold is not Hold.GROUPS
    device = LazyGpu()
    assert_close(stream(folder, ids, tmp_path / "lazy", device=device, **policy), plain)
    # Embeddings, and what enters the layers of the model and its MTP layer, once each way.
    nbytes = sum(map(len, ids)) * 64 * 4
    assert (device.sent, device.fetched) == (4 * nbytes, 4 * nbytes)
    # What was saved on the way is what a resumed run goes on from.
    again = stream(folder, ids, tmp_path / "lazy", device=LazyGpu(), **policy)
    assert again
    assert_close(again, {layer: plain[layer] for layer in again})
