"""Activations between layers: in memory, in files, saved by the clock, and resumed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.layerwise import saving
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.schedule import SAVE_SECONDS, Hold, Place, Schedule
from shardsurgeon.storage.system import System, native
from tests.layerwise.fake_devices import LazyGpu

LENGTHS = [3, 1, 5]
BATCHES = [[2], [0, 1]]
MUCH, LITTLE = 10**6, 0
PLACES = [Place.HOST, Place.FILE]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SCHEDULE = Schedule(Hold.GROUPS, False, 1, False, 4, 1000, 8192, Place.HOST, 0, 1, 1)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def states(generation: int, dtype: torch.dtype = torch.bfloat16, *row: int) -> list[torch.Tensor]:
    """Of each batch."""
    torch.manual_seed(generation)
    tokens = [sum(LENGTHS[sample] for sample in batch) for batch in BATCHES]
    return [torch.randn(number, *(row or (4,))).to(dtype) for number in tokens]


def opened(
    folder: Path,
    place: Place = Place.HOST,
    *,
    spare: int = MUCH,
    system: System | None = None,
    clock: Any = None,
    device: Device | None = None,
) -> ActivationStore:
    """A store whose batches are arranged. clock: None for one by which it is time to save."""
    schedule = replace(SCHEDULE, states=place)
    always = iter(range(0, 10**9, SAVE_SECONDS + 1)).__next__
    store = ActivationStore(folder, LENGTHS, MUCH, system, clock=clock or always)
    place = store.keep_schedule(schedule).states
    store.arrange(BATCHES, place, spare, device or Device("cpu"))
    return store


def fill(store: ActivationStore, values: list[torch.Tensor], layers: int = 7) -> None:
    for batch, own in enumerate(values):
        store.keep(batch, own)
    store.advance(layers)


def holds(store: ActivationStore, values: list[torch.Tensor]) -> bool:
    found = [store.send(batch)[0] for batch in range(len(BATCHES))]
    return all(
        one.dtype == other.dtype and torch.equal(one, other)
        for one, other in zip(found, values, strict=True)
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_sent_in_the_next_generation(
    tmp_path: Path, place: Place, dtype: torch.dtype
) -> None:
    with opened(tmp_path, place) as store:
        assert store.generation is None
        for generation in range(4):
            fill(store, states(generation, dtype))
            assert store.generation == generation
            assert holds(store, states(generation, dtype))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_sent_may_be_written_to(tmp_path: Path, place: Place) -> None:
    """As the code of a model may do with the input of a layer."""
    with opened(tmp_path, place) as store:
        fill(store, states(0))
        for batch in range(len(BATCHES)):
            store.send(batch)[0].zero_()
        assert holds(store, states(0))


@pytest.mark.parametrize("place", PLACES)
def test_a_generation_may_have_another_shape_and_dtype_than_the_one_before(
    tmp_path: Path, place: Place
) -> None:
    with opened(tmp_path, place) as store:
        fill(store, states(0, torch.bfloat16, 4))
        fill(store, states(1, torch.float32, 2, 6))
        fill(store, states(2, torch.float32, 2, 6))
        assert holds(store, states(2, torch.float32, 2, 6))


def test_a_view_of_a_batch_does_not_keep_the_batch(tmp_path: Path) -> None:
    whole = torch.ones(100, 4)
    with opened(tmp_path) as store:
        fill(store, [whole[:5], whole[5:9]])
        whole += 1
        kept = store.send(0)[0]
        assert kept.untyped_storage().nbytes() == 5 * 4 * 4
        assert (kept == 1).all()


@pytest.mark.parametrize("place", PLACES)
def test_the_last_saved_generation_is_resumed(tmp_path: Path, place: Place) -> None:
    with opened(tmp_path, place) as store:
        fill(store, states(0), layers=0)
        store.close() if place is Place.HOST else None
    with opened(tmp_path, place) as store:
        assert store.generation == 0
        fill(store, states(1), layers=3)
    assert saving.saved_layers(tmp_path) == 3
    with opened(tmp_path, place) as store:
        assert store.generation == 1
        assert holds(store, states(1))
        fill(store, states(2))
        assert holds(store, states(2))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_ends_within_a_generation_leaves_the_one_before(
    tmp_path: Path, place: Place
) -> None:
    store = opened(tmp_path, place)
    fill(store, states(0))
    store.keep(0, states(1)[0])  # The run ends here.
    store.close()
    with opened(tmp_path, place) as again:
        assert again.generation == 0
        assert holds(again, states(0))


def rewritten(folder: Path, **changes: object) -> None:
    path = folder / "activations.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "activations.json").unlink(),
        lambda folder: (folder / "activations.json").write_bytes(b"{"),
        lambda folder: (folder / "activations.json").write_bytes(b"[]"),
        lambda folder: rewritten(folder, dtype="Tensor"),
        lambda folder: rewritten(folder, row_shape=[5]),
        lambda folder: rewritten(folder, row_shape=["4"]),
        lambda folder: rewritten(folder, slot="../0"),
        lambda folder: (folder / "activations.0").unlink(),
        lambda folder: (folder / "activations.0").write_bytes(b"short"),
        # Without it, the order in which batches lie in the file is not known.
        lambda folder: (folder / "schedule.json").write_bytes(b"{}"),
    ],
)
def test_an_incomplete_generation_is_not_resumed(tmp_path: Path, spoil: object) -> None:
    with opened(tmp_path) as store:
        fill(store, states(0))
    with opened(tmp_path) as store:
        assert store.generation == 0
    assert callable(spoil)
    spoil(tmp_path)
    with opened(tmp_path) as store:
        assert store.generation is None


def test_a_generation_of_other_samples_is_not_resumed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store, states(0))
    assert json.loads((tmp_path / "activations.json").read_bytes())["tokens"] == 9
    assert ActivationStore(tmp_path, [3, 1, 6], LITTLE).generation is None


def test_states_are_saved_by_the_clock_and_not_by_the_layer(tmp_path: Path) -> None:
    clock, saved = Clock(), []
    with opened(tmp_path, clock=clock) as store:
        for layer in range(40):
            clock.now += SAVE_SECONDS / 10
            fill(store, states(layer), layers=layer)
            store._saver._wait()
            saved.append(saving.saved_layers(tmp_path))
    # Ten generations lie between two that are saved.
    assert sorted(set(saved)) == [0, 9, 19, 29, 39]


def test_after_a_long_save_the_next_one_comes_later(tmp_path: Path) -> None:
    clock = Clock()

    def slowly(file: Any) -> None:
        clock.now += 100
        native().sync_file(file)

    with opened(tmp_path, system=replace(native(), sync_file=slowly), clock=clock) as store:
        clock.now += SAVE_SECONDS
        fill(store, states(0), layers=1)
        store._saver._wait()
        begun = clock.now
        for layer in range(2, 99):
            clock.now = begun + 100 * (layer - 1)
            fill(store, states(layer), layers=layer)
            store._saver._wait()
            if saving.saved_layers(tmp_path) > 1:
                break
        # A save of 100 s is at most 5 % of the time until the next.
        assert 100 * (layer - 1) >= 100 / 0.05 - 100


@pytest.mark.parametrize("device", [Device, LazyGpu])
@pytest.mark.parametrize(("spare", "waits"), [(9 * 8, False), (0, True)])
def test_what_is_still_to_be_saved_is_waited_for_only_where_memory_is_short(
    tmp_path: Path, spare: int, waits: bool, device: Callable[[str], Device]
) -> None:
    may_write, writes, written = threading.Event(), threading.Event(), threading.Event()

    def held_up(folder: Path) -> int:
        if threading.current_thread() is not threading.main_thread():
            writes.set()
            may_write.wait(60)
            written.set()
        return 10**9

    system, clock, lazy = replace(native(), free_space=held_up), Clock(), device("cpu")
    with opened(tmp_path, spare=spare, system=system, clock=clock, device=lazy) as store:
        clock.now += SAVE_SECONDS  # Time for one save.
        fill(store, states(0))
        writes.wait(60)
        for batch in range(2):
            store.send(batch)[1].wait()
        if waits:
            threading.Timer(0.2, may_write.set).start()
        store.keep(0, states(1)[0])
        assert written.is_set() == waits
        may_write.set()
        store.keep(1, states(1)[1])
        store.advance(8)
        arriving = [store.send(batch) for batch in range(2)]
        for (sent, arrival), kept in zip(arriving, states(1), strict=True):
            arrival.wait()
            assert torch.equal(sent, kept)
    # What was saved is the generation before, whole.
    with opened(tmp_path) as store:
        assert store.generation == 0
        assert holds(store, states(0))


def cramped(nbytes: int) -> System:
    return replace(native(), free_space=lambda folder: nbytes)


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_without_space_is_named_with_the_numbers_before_a_layer_is_run(
    tmp_path: Path, place: Place
) -> None:
    says = "activations between two layers take 72 B, 71 B are free there"
    store = opened(tmp_path, place, system=cramped(71))
    with pytest.raises(OutputWriteError, match=says), store:
        store.keep(0, states(0)[0])
    with opened(tmp_path, place, system=cramped(72)) as store:
        fill(store, states(0))


def test_a_failure_to_save_ends_the_run(tmp_path: Path) -> None:
    calls = iter([10**9, 0])
    system = replace(native(), free_space=lambda folder: next(calls))
    with (
        pytest.raises(OutputWriteError, match="0 B are free"),
        opened(tmp_path, system=system) as store,
    ):
        fill(store, states(0))


def test_the_first_failure_is_the_one_that_is_raised(tmp_path: Path) -> None:
    store = opened(tmp_path, system=cramped(0))
    with pytest.raises(KeyError, match="first"), store:
        raise KeyError("first")


def test_the_schedule_stays_as_it_was_when_the_run_began(tmp_path: Path) -> None:
    other = replace(SCHEDULE, batch_size=2, chunk=50)
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_schedule(SCHEDULE) == SCHEDULE
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_schedule(other) == SCHEDULE
    (tmp_path / "schedule.json").write_text('{"hold": "groups"}')
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_schedule(other) == other
