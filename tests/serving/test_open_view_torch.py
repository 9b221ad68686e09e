"""As test_open_view, in torch: the types that numpy lacks, and models behind a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import shardsurgeon
from tests.oracle.byte_oracle import read_tensors, same_bits
from tests.serving.test_open_view import ROUTER, SLICES, Pruned, digests
from tests.support.every_dtype import BITS, name_of, write_model
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    folder = tmp_path_factory.mktemp("every_dtype")
    return Pruned(write_model(folder / "model"), folder)


def takes(index: Any) -> bool:
    """Whether torch has such an index: it knows no negative step."""
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts)


def test_every_tensor_is_the_librarys_bit_for_bit(pruned: Pruned) -> None:
    compared = set()
    with shardsurgeon.open_view(pruned.view) as tensors:
        for path in pruned.shards():
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                    expected, found = shard.get_tensor(name), tensors.get_tensor(name)
                    assert same_bits(found, expected), name
                    assert same_bits(tensors.get_slice(name)[...], expected), name
                    compared.add(shard.get_slice(name).get_dtype())
    assert compared == BITS.keys()


@pytest.mark.parametrize("index", [each for each in SLICES if takes(each)], ids=repr)
def test_a_slice_is_what_torch_makes_of_the_whole(pruned: Pruned, index: Any) -> None:
    with shardsurgeon.open_view(pruned.view) as tensors:
        for name in (ROUTER, *(name_of(dtype, "matrix") for dtype in ("BF16", "F8_E4M3", "U8"))):
            whole = tensors.get_tensor(name)
            assert same_bits(tensors.get_slice(name)[index], whole[index])


def test_writing_to_a_mapped_tensor_changes_no_file(tmp_path: Path) -> None:
    # Whole tensors of a model that starts its data where numbers may: these are mapped.
    aligned = Pruned(fixture_folder("qwen3_moe"), tmp_path)
    before = digests(aligned.source) | digests(aligned.view)
    with shardsurgeon.open_view(aligned.view) as tensors:
        for name in tensors:
            tensors.get_tensor(name).zero_()
            assert tensors.get_tensor(name).isfinite().all()
    again = shardsurgeon.open_view(aligned.view)
    assert any(again.get_tensor(name).any() for name in again)
    assert digests(aligned.source) | digests(aligned.view) == before


def test_of_a_repository_of_the_hub_only_what_is_asked_for_is_read(
    online: LocalHub, tmp_path: Path
) -> None:
    online.add_model("org/Tiny", fixture_folder("qwen3_moe"))
    scores = fixture_folder("qwen3_moe") / "scores.pt"
    plan = shardsurgeon.plan("org/Tiny", scores, keep=8)
    view = shardsurgeon.apply(plan, tmp_path / "view", view=True).out
    near = shardsurgeon.plan(fixture_folder("qwen3_moe"), scores, keep=8)
    folder = Path(shardsurgeon.apply(near, tmp_path / "folder").out)
    tensors = shardsurgeon.open_view(view, "pt")
    online.reset_counts()
    found = tensors.get_tensor(ROUTER)
    row = tensors.get_slice(ROUTER)[3]
    sent = online.sent("safetensors")
    expected = read_tensors(folder)[ROUTER]
    assert same_bits(found, expected) and same_bits(row, expected[3])
    assert found.nbytes < sent <= 2 * found.nbytes + 2 * row.nbytes
