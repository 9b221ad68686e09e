"""Activations between layers: in memory, in files, and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.layerwise.resume import ActivationStore
from shardsurgeon.storage.system import System, native

LENGTHS = [3, 1, 5]
MUCH, LITTLE = 10**6, 0
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def states(generation: int, dtype: torch.dtype = torch.bfloat16, *row: int) -> list[torch.Tensor]:
    torch.manual_seed(generation)
    return [torch.randn(length, *(row or (4,))).to(dtype) for length in LENGTHS]


def fill(store: ActivationStore, values: list[torch.Tensor]) -> None:
    for sample in (2, 0, 1):
        store.write(sample, values[sample])
    store.advance()


def holds(store: ActivationStore, values: list[torch.Tensor]) -> bool:
    found = [store.read(sample) for sample in range(len(LENGTHS))]
    return all(
        one.dtype == other.dtype and torch.equal(one, other)
        for one, other in zip(found, values, strict=True)
    )


@pytest.mark.parametrize("budget", [MUCH, LITTLE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_in_the_next_generation(
    tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    with ActivationStore(tmp_path, LENGTHS, budget) as store:
        assert store.generation is None
        for generation in range(4):
            fill(store, states(generation, dtype))
            assert store.generation == generation
            assert store.in_memory == (budget == MUCH)
            store.write(0, states(9, dtype)[0])
            assert holds(store, states(generation, dtype))


@pytest.mark.parametrize("budget", [MUCH, LITTLE])
def test_a_generation_may_have_another_shape_and_dtype_than_the_one_before(
    tmp_path: Path, budget: int
) -> None:
    with ActivationStore(tmp_path, LENGTHS, budget) as store:
        fill(store, states(0, torch.bfloat16, 4))
        fill(store, states(1, torch.float32, 2, 6))
        assert holds(store, states(1, torch.float32, 2, 6))


def test_two_generations_decide_what_fits(tmp_path: Path) -> None:
    nbytes = 2 * sum(LENGTHS) * 4 * 2
    for budget in (nbytes, nbytes - 1):
        with ActivationStore(tmp_path, LENGTHS, budget) as store:
            fill(store, states(0))
            assert store.in_memory == (budget == nbytes)


def test_a_view_of_a_batch_does_not_keep_the_batch(tmp_path: Path) -> None:
    batch = torch.zeros(3, 100, 4)
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        for sample, length in enumerate(LENGTHS):
            store.write(sample, batch[sample, :length])
        store.advance()
        batch += 1
        assert store.read(0).untyped_storage().nbytes() == 3 * 4 * 4
        assert not store.read(0).any()


@pytest.mark.parametrize("before", [MUCH, LITTLE])
@pytest.mark.parametrize("after", [MUCH, LITTLE])
def test_the_last_complete_generation_is_resumed(tmp_path: Path, before: int, after: int) -> None:
    with ActivationStore(tmp_path, LENGTHS, before) as store:
        fill(store, states(0))
        fill(store, states(1))
        store.write(1, states(2)[1])
    with ActivationStore(tmp_path, LENGTHS, after) as store:
        assert store.generation == 1
        assert holds(store, states(1))
        fill(store, states(2))
        assert holds(store, states(2))


def test_a_run_that_ends_within_a_generation_leaves_the_one_before(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, LENGTHS, LITTLE)
    fill(store, states(0))
    fill(store, states(1))
    store.write(0, states(2)[0])  # Overwrites generation 0, and the run ends here.
    with ActivationStore(tmp_path, LENGTHS, LITTLE) as again:
        assert again.generation == 1
        assert holds(again, states(1))
    store.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "activations.json").unlink(),
        lambda folder: (folder / "activations.json").write_bytes(b"{"),
        lambda folder: (folder / "activations.json").write_bytes(b"[]"),
        lambda folder: (folder / "activations.0").unlink(),
        lambda folder: (folder / "activations.0").write_bytes(b"short"),
    ],
)
def test_an_incomplete_generation_is_not_resumed(tmp_path: Path, spoil: object) -> None:
    with ActivationStore(tmp_path, LENGTHS, LITTLE) as store:
        fill(store, states(0))
    assert callable(spoil)
    spoil(tmp_path)
    with ActivationStore(tmp_path, LENGTHS, LITTLE) as store:
        assert store.generation is None


def test_a_generation_of_other_samples_is_not_resumed(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, LENGTHS, LITTLE) as store:
        fill(store, states(0))
    assert json.loads((tmp_path / "activations.json").read_bytes())["tokens"] == 9
    with ActivationStore(tmp_path, [3, 1, 6], LITTLE) as store:
        assert store.generation is None


def cramped(nbytes: int) -> System:
    return replace(native(), free_space=lambda folder: nbytes)


@pytest.mark.parametrize("budget", [MUCH, LITTLE])
def test_a_disk_without_space_is_named_with_the_numbers(tmp_path: Path, budget: int) -> None:
    says = "activations between two layers take 72 B, 71 B are free there"
    store = ActivationStore(tmp_path, LENGTHS, budget, cramped(71))
    with pytest.raises(OutputWriteError, match=says), store:
        fill(store, states(0))
    with ActivationStore(tmp_path, LENGTHS, budget, cramped(72)) as store:
        fill(store, states(0))


def test_the_first_failure_is_the_one_that_is_raised(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, LENGTHS, MUCH, cramped(0))
    with pytest.raises(KeyError, match="first"), store:
        fill(store, states(0))
        raise KeyError("first")


def test_batches_stay_as_large_as_they_were_when_the_run_began(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_batch_sizes(4, 1000) == (4, 1000)
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_batch_sizes(2, 50) == (4, 1000)
    (tmp_path / "portions.json").write_text("[0]")
    with ActivationStore(tmp_path, LENGTHS, MUCH) as store:
        assert store.keep_batch_sizes(2, 50) == (2, 50)
