"""A view's tensors are those of the shards that it stands for, as the safetensors library reads
them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

import shardsurgeon
from shardsurgeon.errors import CheckpointError, OutputError, SourceReadError, UsageError
from shardsurgeon.storage.local import LocalSource
from tests.support.every_dtype import BITS, HALVES, SHAPES, name_of, write_model

# Types that numpy lacks.
TORCH_ALONE = {"BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0"}
ROUTER = "model.layers.0.mlp.gate.weight"
SLICES: list[Any] = [
    0,
    -1,
    (slice(2, 5),),
    slice(None),
    ...,
    (),
    slice(-3, None),
    slice(1, -1, 2),
    slice(None, None, -1),
    slice(5, 2),
    slice(3, 100),
    (slice(1, 4), 2),
    (slice(1, 4), slice(0, 3)),
    (..., 1),
    (..., slice(1, 3)),
    (2, slice(None, None, 2)),
    (-2, -1),
    (slice(0, 4), ..., 0),
    (None, slice(1, 3)),
    (slice(2, 4), None),
    [1, 0, 3],
]


class Pruned:
    """One plan, carried out both ways: `folder` has shards, `view` has none."""

    def __init__(self, source: Path, folder: Path) -> None:
        plan = shardsurgeon.plan(source, source / "scores.pt", keep=8)
        self.source = source
        self.folder = Path(shardsurgeon.apply(plan, folder / "folder").out)
        self.view = Path(shardsurgeon.apply(plan, folder / "view", view=True).out)

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    folder = tmp_path_factory.mktemp("every_dtype")
    return Pruned(write_model(folder / "model"), folder)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_names_shapes_types_and_metadata_are_those_of_the_shards(pruned: Pruned) -> None:
    found = {}
    for path in pruned.shards():
        with safe_open(path, "np") as shard:
            for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                each = shard.get_slice(name)
                found[name] = each.get_dtype(), each.get_shape()
    with safe_open(pruned.shards()[0], "np") as shard:
        metadata = shard.metadata()
    with shardsurgeon.open_view(pruned.view) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors}
        assert {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()} == found
        assert sorted(tensors.keys()) == sorted(found) and len(tensors) == len(found)
        assert "no such" not in tensors and ROUTER in tensors
        assert tensors.metadata() == metadata == {"format": "pt", "of": tensors.shards()[0]}


def test_every_tensor_that_numpy_has_a_type_for_is_the_librarys(pruned: Pruned) -> None:
    compared = set()
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        for path in pruned.shards():
            with safe_open(path, "np") as shard:
                for name in shard.keys():  # noqa: SIM118
                    dtype = shard.get_slice(name).get_dtype()
                    if dtype in TORCH_ALONE:
                        continue
                    expected, found = shard.get_tensor(name), tensors.get_tensor(name)
                    assert found.dtype == expected.dtype and found.shape == expected.shape, name
                    assert found.tobytes() == expected.tobytes(), name
                    compared.add(dtype)
    assert compared == BITS.keys() - TORCH_ALONE


@pytest.mark.parametrize("index", SLICES, ids=repr)
def test_a_slice_is_what_numpy_makes_of_the_whole(pruned: Pruned, index: Any) -> None:
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        for name in (name_of("F32", "matrix"), name_of("I16", "matrix")):
            whole = tensors.get_tensor(name)
            assert whole.size == 24
            np.testing.assert_array_equal(tensors.get_slice(name)[index], whole[index])


def test_slices_of_scalars_and_of_empty_tensors_are_numpys(pruned: Pruned) -> None:
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        scalar, empty = (name_of("F64", shape) for shape in ("scalar", "empty"))
        assert tensors.get_slice(scalar)[...] == tensors.get_slice(scalar)[()]
        assert tensors.get_slice(scalar)[...].shape == ()
        assert tensors.get_slice(empty)[...].shape == (0, 3)
        assert tensors.get_slice(empty)[0:2, 1:].shape == (0, 2)
        for index in (0, (slice(None), 7)):
            with pytest.raises(IndexError):
                tensors.get_slice(empty)[index]
        with pytest.raises(IndexError):
            tensors.get_slice(scalar)[0]


@pytest.mark.parametrize("dtype", sorted(TORCH_ALONE))
def test_numpy_is_not_given_a_type_that_it_lacks(pruned: Pruned, dtype: str) -> None:
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        with pytest.raises(UsageError) as caught:
            tensors.get_tensor(name_of(dtype, "matrix"))
        for shape in SHAPES:
            with pytest.raises(UsageError):
                tensors.get_slice(name_of(dtype, shape))[...]
    said = str(caught.value)
    assert "\n" not in said and dtype in said and said.endswith("ask for framework='pt'")


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_less_than_a_byte_an_element_is_refused_by_name(framework: Any, tmp_path: Path) -> None:
    of_both = Pruned(write_model(tmp_path / "model", halves=True), tmp_path)
    ((name, (dtype, shape)),) = HALVES.items()
    with shardsurgeon.open_view(of_both.view, framework) as tensors:
        assert tensors.get_slice(name).get_shape() == shape
        with pytest.raises(UsageError, match=f"{name}: is of type {dtype}"):
            tensors.get_tensor(name)


def test_writing_to_a_tensor_changes_no_file_and_no_other_reader(pruned: Pruned) -> None:
    before = digests(pruned.source) | digests(pruned.view)
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        name = name_of("F32", "matrix")
        mine, other = tensors.get_tensor(name), shardsurgeon.open_view(pruned.view, "np")
        mine[...] = 7
        assert not (other.get_tensor(name) == 7).any()
        tensors.get_slice(ROUTER)  # a slice alone reads nothing
    assert digests(pruned.source) | digests(pruned.view) == before


def test_tensors_outlive_the_view_that_gave_them(pruned: Pruned) -> None:
    name = name_of("I64", "matrix")
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        kept = tensors.get_tensor(name)
        copy = kept.copy()
    tensors.close()
    np.testing.assert_array_equal(kept, copy)
    # And a view that was closed opens its files again.
    np.testing.assert_array_equal(tensors.get_tensor(name), copy)


def test_several_threads_read_at_once(pruned: Pruned) -> None:
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        names = [name for name in tensors if tensors.record(name).dtype not in TORCH_ALONE]
        expected = {name: tensors.get_tensor(name).tobytes() for name in names}
        with ThreadPoolExecutor(4) as threads:
            for _ in range(20):
                found = threads.map(lambda name: tensors.get_tensor(name).tobytes(), names)
                assert dict(zip(names, found, strict=True)) == expected


def test_a_name_that_is_not_there_is_a_key_error(pruned: Pruned) -> None:
    with shardsurgeon.open_view(pruned.view, "np") as tensors:
        for ask in (tensors.get_tensor, tensors.get_slice, tensors.record):
            with pytest.raises(KeyError):
                ask("no such")
        with pytest.raises(KeyError):
            tensors.save_shard("no such", pruned.view / "x")


def test_a_folder_with_shards_of_its_own_is_no_view(pruned: Pruned) -> None:
    with pytest.raises(CheckpointError, match="no view; open its shards with the safetensors"):
        shardsurgeon.open_view(pruned.folder)
    with pytest.raises(UsageError, match="give 'pt' or 'np'"):
        shardsurgeon.open_view(pruned.view, "jax")  # type: ignore[arg-type]


def test_a_shard_is_saved_as_apply_writes_it(pruned: Pruned, tmp_path: Path) -> None:
    with shardsurgeon.open_view(pruned.view) as tensors:
        assert tensors.shards() == [path.name for path in pruned.shards()]
        for path in pruned.shards():
            tensors.save_shard(path.name, tmp_path / path.name)
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
            with safe_open(tmp_path / path.name, "np") as shard:
                assert shard.keys()
        with pytest.raises(OutputError, match="exists already"):
            tensors.save_shard(path.name, tmp_path / path.name)
        with pytest.raises(OutputError, match="there is no folder"):
            tensors.save_shard(path.name, tmp_path / "none" / "x.safetensors")


def test_a_shard_that_cannot_be_read_whole_is_not_there(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalSource.stream

    def stream(self: LocalSource, name: str, begin: int, end: int) -> Any:
        if "00002" in name:
            raise SourceReadError(name, "cannot be read")
        yield from whole(self, name, begin, end)

    monkeypatch.setattr(LocalSource, "stream", stream)
    with shardsurgeon.open_view(pruned.view) as tensors, pytest.raises(SourceReadError):
        tensors.save_shard(tensors.shards()[1], tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_library_itself_refuses_what_the_hand_made_model_is_not(pruned: Pruned) -> None:
    """The shards written by hand are valid: the library opens them, and not one cut short."""
    for path in sorted(pruned.source.glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            assert shard.keys()
        cut = pruned.folder.parent / "cut.safetensors"
        cut.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(SafetensorError):
            safe_open(cut, "np").__enter__()
