"""However an evaluation is scheduled, cut, killed or shared, its numbers are the same."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.layerwise import experts, saving
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.damage import LayerSums, Predictions
from shardsurgeon.layerwise.forward import LayerRunner
from shardsurgeon.layerwise.schedule import Hold, Place
from shardsurgeon.layerwise.tensors import TensorReader
from tests.families.specimens import fixture, written
from tests.layerwise.evaluating import Kept, Sink, evaluated, every_other
from tests.layerwise.fake_devices import LazyGpu
from tests.layerwise.streaming import Ids, token_ids

Found = tuple[list[Predictions], dict[int, LayerSums]]

EXPERT = re.compile(r"\.experts\.\d+\.")
LENGTHS = (40, 33, 40, 12, 2, 27)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen3_moe in bfloat16; deepseek_v3, in FP8; kimi_k25, whose experts are INT4."""
    place = tmp_path_factory.mktemp("models")
    return {
        name: written(fixture(name), place) for name in ("qwen3_moe", "deepseek_v3", "kimi_k25")
    }


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["qwen3_moe"]


def two(folder: Path) -> list[Kept]:
    """Half of the experts, and another half."""
    return [every_other(folder, 8), every_other(folder, 8, first=1)]


def assert_close(one: Found, other: Found, rtol: float = 1e-6) -> None:
    """Numbers that are equal but for how their terms were grouped: float32 rounds states."""
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert np.exp(ours.nll.mean()) == pytest.approx(np.exp(theirs.nll.mean()), rel=rtol)
        np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-4, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for layer, ours in one[1].items():
        theirs = other[1][layer]
        np.testing.assert_allclose(ours.compared, theirs.compared, rtol=1e-5, atol=1e-5)
        assert (ours.gates is None) == (theirs.gates is None)
        if ours.gates is not None and theirs.gates is not None:
            np.testing.assert_allclose(ours.gates, theirs.gates, rtol=1e-5)


def assert_same(one: Found, other: Found) -> None:
    """To the last bit."""
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert_same_predictions(ours, theirs)
    assert one[1].keys() == other[1].keys()
    for layer, sums in one[1].items():
        assert np.array_equal(sums.compared, other[1][layer].compared)
        assert np.array_equal(sums.gates, other[1][layer].gates)  # type: ignore[arg-type]


def assert_same_predictions(one: Predictions, other: Predictions) -> None:
    for name in ("nll", "kl", "agrees", "hits"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


SCHEDULES: list[dict[str, Any]] = [
    {"hold": Hold.LAYER, "batch_size": 1},
    {"hold": Hold.LAYER, "grouped": True, "batch_size": 6},
    {"hold": Hold.LAYER, "grouped": True, "group": 5, "rows": 64},
    {"hold": Hold.STORED, "batch_size": 3},
    {"hold": Hold.STORED, "grouped": True, "group": 5, "rows": 64},
    # The lanes of a batch are in one chunk, in two, and each in a chunk of its own.
    {"hold": Hold.GROUPS, "chunk": 10_000},
    {"hold": Hold.GROUPS, "chunk": 170},
    {"hold": Hold.GROUPS, "chunk": 1, "batch_size": 1},
    {"hold": Hold.GROUPS, "chunk": 170, "grouped": True, "group": 5},
]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "kimi_k25"])
def test_every_schedule_finds_the_same_numbers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, ids = folders[name], token_ids(LENGTHS)
    plain = evaluated(folder, two(folder), ids, tmp_path / "plain", hold=Hold.LAYER)
    assert min(found.kl.mean() for found in plain[0][1:]) > 1e-4
    assert (plain[0][0].kl == 0).all() and plain[0][0].agrees.all()
    for number, schedule in enumerate(SCHEDULES):
        other = evaluated(folder, two(folder), ids, tmp_path / str(number), **schedule)
        assert_close(other, plain)


@pytest.mark.parametrize("hold", list(Hold))
def test_states_in_files_are_those_in_memory(folder: Path, tmp_path: Path, hold: Hold) -> None:
    ids, policy = token_ids(LENGTHS), {"hold": hold, "chunk": 100}
    in_memory = evaluated(folder, two(folder), ids, tmp_path / "memory", **policy)
    assert_same(
        evaluated(folder, two(folder), ids, tmp_path / "files", budget=0, **policy), in_memory
    )
    assert (tmp_path / "files" / "activations.1").stat().st_size > 0


@pytest.mark.parametrize("place", [Place.HOST, Place.FILE, Place.DEVICE])
@pytest.mark.parametrize("hold", list(Hold))
def test_everything_that_a_gpu_copies_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold, place: Place
) -> None:
    monkeypatch.setattr(saving, "SAVE_SECONDS", 0)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)
    ids = token_ids(LENGTHS)
    plain = evaluated(folder, two(folder), ids, tmp_path / "plain")
    policy = {"hold": hold, "states": place, "grouped": True, "group": 5, "chunk": 100}
    policy["ahead"] = hold is not Hold.GROUPS
    late = evaluated(folder, two(folder), ids, tmp_path / "lazy", device=LazyGpu(), **policy)
    assert_close(late, plain)


def test_a_candidates_numbers_do_not_depend_on_what_is_measured_beside_it(
    folder: Path, tmp_path: Path
) -> None:
    ids, keeps = token_ids(LENGTHS), [*two(folder), every_other(folder, 4)]
    together, layers = evaluated(folder, keeps, ids, tmp_path / "all", hold=Hold.LAYER)
    for number, keep in enumerate(keeps):
        alone = evaluated(folder, [keep], ids, tmp_path / str(number), hold=Hold.LAYER)
        assert_same_predictions(alone[0][0], together[0])
        assert_same_predictions(alone[0][1], together[number + 1])
        for layer, sums in alone[1].items():
            assert np.array_equal(sums.compared[0], layers[layer].compared[number])


def test_the_same_candidate_twice_gives_the_same_numbers_twice(
    folder: Path, tmp_path: Path
) -> None:
    keep = every_other(folder, 4)
    found, layers = evaluated(folder, [keep, keep], token_ids(LENGTHS), tmp_path / "s")
    assert_same_predictions(found[1], found[2])
    assert all(np.array_equal(*sums.compared) for sums in layers.values())


def test_a_candidate_that_keeps_everything_is_the_whole_model(folder: Path, tmp_path: Path) -> None:
    found, layers = evaluated(folder, [{}], token_ids(LENGTHS), tmp_path / "s")
    assert_same_predictions(found[0], found[1])
    for sums in layers.values():
        error, cosine = sums.compared[0, :, 0] / len(found[0].nll)
        assert error == 0
        assert cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("hold", [Hold.LAYER, Hold.STORED])
def test_ten_candidates_read_hardly_more_than_one_and_compute_ten_times_as_much(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    sizes = {record.name: record.nbytes for record in open_checkpoint(folder).records}
    read, counted, rows = TensorReader.read, Counter[str](), Counter[int]()
    compute = experts.StreamedExperts.compute

    def noted(self: Any, name: str, row: int | None = None) -> torch.Tensor:
        counted[name] += 1
        return read(self, name, row)

    def computing(self: Any, routings: list[Any]) -> Any:
        for routing in routings:
            rows[routing.lane] += routing.index.numel()
        return compute(self, routings)

    monkeypatch.setattr(TensorReader, "read", noted)
    monkeypatch.setattr(experts.StreamedExperts, "compute", computing)
    nbytes, computed = [], []
    for number in (1, 10):
        counted.clear(), rows.clear()
        keeps = [every_other(folder, 8, first=first) for first in range(number)]
        evaluated(folder, keeps, token_ids((20,) * 3), tmp_path / str(number), hold=hold)
        of_experts = {count for name, count in counted.items() if EXPERT.search(name)}
        assert of_experts == {1}
        nbytes.append(sum(count * sizes[name] for name, count in counted.items()))
        computed.append(rows.copy())
    assert nbytes[1] < 1.5 * nbytes[0]
    assert {*computed[1].values()} == {*computed[0].values()} == {computed[0][0]}
    assert len(computed[1]) == 11


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

    for name in ("keep", "send", "advance"):
        wrap(ActivationStore, name)
    wrap(Sink, "finished_layer")
    wrap(experts.StreamedExperts, "compute")
    wrap(LayerRunner, "logits")
    return count


@pytest.mark.parametrize(
    ("hold", "place", "saved"),
    [
        (Hold.LAYER, Place.HOST, "sometimes"),
        (Hold.GROUPS, Place.HOST, "never"),
        (Hold.LAYER, Place.FILE, "always"),
        (Hold.GROUPS, Place.HOST, "always"),
    ],
)
def test_a_run_that_is_killed_anywhere_has_the_bits_of_one_that_is_not(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold: Hold,
    place: Place,
    saved: str,
    loop: str,
) -> None:
    seconds = {"always": 0, "sometimes": 7, "never": 1 << 40}[saved]
    monkeypatch.setattr(saving, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)
    ids: Sequence[Ids] = token_ids((20, 13, 9, 2))
    policy = {"hold": hold, "states": place, "chunk": 60}

    def run(scratch: Path, sink: Sink) -> Found:
        ticks = iter(range(1 << 30))
        clock = ticks.__next__
        return evaluated(folder, two(folder), ids, scratch, sink=sink, clock=clock, **policy)

    with monkeypatch.context() as patched:
        total = moments(patched, -1)
        whole = run(tmp_path / "whole", Sink())
        number = next(total) - 1
    drawn = random.Random(f"{hold} {place} {saved}")
    # In the layers, and where the head predicts.
    fatal = [*drawn.sample(range(1, number), 40 if loop == "long" else 1), number]
    for moment in fatal:
        scratch, sink = tmp_path / f"killed{moment}", Sink()
        with monkeypatch.context() as patched:
            moments(patched, moment)
            with pytest.raises(Killed):
                run(scratch, sink)
        assert_same(run(scratch, sink), whole)
