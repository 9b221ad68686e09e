"""Output shards: what of them can be shared, which are joined, which are the source's files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.execution.plan import OutputShard, Segment
from shardsurgeon.operations import prune
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.planner import SizeEstimate, plan_shards
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from shardsurgeon.units import BLOCK_NBYTES
from tests.support import tiny
from tests.support.hub.models import fixture_folder

FAMILIES = ["qwen3_moe", "kimi_k25", "deepseek_v3", "qwen3_5_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prune_is_larger_than_its_estimate(family: str) -> None:
    model = fixture_folder(family)
    checkpoint = open_checkpoint(model)
    anatomy = read_anatomy(checkpoint)
    estimate = SizeEstimate(checkpoint, anatomy, MtpPolicy.ROUTER_NORM)
    step = max(anatomy.n_group, 1)
    counts = range(step * -(-2 * anatomy.top_k // step), anatomy.num_experts, step)
    assert len(counts) > 1
    for kept in {counts[0], counts[len(counts) // 2], counts[-1]}:
        made = prune.plan(checkpoint, model / "scores.pt", SelectionRequest(keep=kept), out="x")
        nbytes = sum(shard.nbytes for shard in made.plan.shards)
        assert nbytes <= estimate.nbytes(kept) < nbytes + 5 * BLOCK_NBYTES * len(checkpoint.shards)


EXPERTS, WIDTH = 512, 32
MOE = [1, 2]


def large() -> tiny.Tensors:
    """DeepSeek's names; each expert has 12 KB of packed weights and, as INT4 has, a tiny shape."""
    numbers = np.random.default_rng(1)
    found = {n: t for n, t in tiny.tensors().items() if ".experts." not in n and ".3." not in n}
    for layer in MOE:
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            found[f"{name}_packed"] = numbers.integers(-(2**31), 2**31, (96, WIDTH), dtype="i4")
            found[f"{name}_shape"] = np.array([96, 8 * WIDTH], "i4")
        for end, width in (("weight", tiny.HIDDEN), ("e_score_correction_bias", 1)):
            gate = numbers.standard_normal((EXPERTS, width)).astype("f4")
            found[f"model.layers.{layer}.mlp.gate.{end}"] = gate if width > 1 else gate[:, 0]
    return found


def config() -> dict[str, object]:
    return tiny.config(n_routed_experts=EXPERTS, num_nextn_predict_layers=0)


def model(**shards: tiny.Tensors) -> dict[str, bytes]:
    """The files of a model whose shards hold these tensors."""
    number = {name: n for n, held in enumerate(shards.values(), 1) for name in held}
    weights = {name: value for held in shards.values() for name, value in held.items()}
    return tiny.files(config(), weights, shard_of=number.__getitem__)


def planned(files: dict[str, bytes], kept: range, **options: int) -> tuple[OutputShard, ...]:
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    anatomy = read_anatomy(checkpoint)
    gone = tuple(sorted({*range(anatomy.num_experts)} - {*kept}))
    keep = KeepList(anatomy.num_experts, dict.fromkeys(MOE, LayerKeep(tuple(kept), gone)))
    return plan_shards(checkpoint, anatomy, keep, **options)


def bytes_of(shard: OutputShard, files: dict[str, bytes]) -> bytes:
    data = shard.header
    for piece in shard.pieces:
        assert isinstance(piece, Segment)
        data += files[piece.file][piece.begin : piece.begin + piece.nbytes]
    return data


def sharable(shards: tuple[OutputShard, ...]) -> float:
    """How many blocks lie as in the source, of those that are whole in a tensor there; neighbours
    in source and shard taken together."""
    shared = wanted = 0
    for shard in shards:
        at = len(shard.header)
        blocks: dict[int, set[object]] = {}
        for piece in shard.pieces:
            assert isinstance(piece, Segment)
            whole = (piece.begin + piece.nbytes) // BLOCK_NBYTES - -(-piece.begin // BLOCK_NBYTES)
            wanted += max(whole, 0)
            for block in range(at // BLOCK_NBYTES, (at + piece.nbytes - 1) // BLOCK_NBYTES + 1):
                blocks.setdefault(block, set()).add((piece.file, piece.begin - at))
            at += piece.nbytes
        for origins in blocks.values():
            (_, shift), *others = origins
            shared += not others and shift % BLOCK_NBYTES == 0
    return shared / wanted


def test_a_prune_and_a_prune_of_it_lie_in_their_blocks_as_the_source_does() -> None:
    files = model(one=large())
    for kept in (range(0, EXPERTS, 2), range(EXPERTS // 8, EXPERTS // 2)):
        shards = planned(files, kept)
        assert sharable(shards) > 0.95
        found = {shard.file: bytes_of(shard, files) for shard in shards}
        names = {name for data in found.values() for name in load(data)}
        assert len(names) == sum(len(shard.tensors) for shard in shards)
        settings = config() | {"n_routed_experts": len(kept)}
        files = found | {"config.json": json.dumps(settings).encode()}


def mixed() -> tiny.Tensors:
    """Experts of U8, F16, F32 and I64, of which most positions suit no wider dtype than F16."""
    numbers = np.random.default_rng(2)
    found = {name: value for name, value in large().items() if ".experts." not in name}
    for layer in MOE:
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            found[name] = numbers.integers(0, 256, (2, 4097), dtype="u1")
            found[f"{name}_scale"] = numbers.standard_normal(1).astype("f2")
            found[f"{name}_zero_point"] = numbers.integers(0, 256, 3, dtype="u1")
            found[f"{name}_scale_2"] = numbers.standard_normal(()).astype("f4")
            found[f"{name}_shape"] = numbers.integers(0, 256, 2, dtype="i8")
    return found


def test_every_tensor_begins_at_a_multiple_of_its_elements_size() -> None:
    weights, kept = mixed(), range(0, EXPERTS, 2)
    files = model(one=weights)
    (shard,) = planned(files, kept)
    data = bytes_of(shard, files)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    found = load(data)
    offset = {name: begin + header[name]["data_offsets"][0] for name in found}
    assert [name for name, value in found.items() if offset[name] % value.itemsize] == []
    widths = [found[name].itemsize for name in sorted(found, key=offset.__getitem__)]
    assert {*widths} == {1, 2, 4, 8}
    assert widths != sorted(widths, reverse=True)
    # The library reads this layout as any other.
    for name, value in found.items():
        old = re.sub(r"(?<=experts\.)\d+", lambda new: str(kept[int(new[0])]), name)
        whole = weights[old]
        np.testing.assert_array_equal(value, whole[kept] if ".gate." in name else whole)


def test_shards_of_which_too_little_could_be_shared_are_joined_where_that_helps() -> None:
    weights = large()
    first = {n: t for n, t in weights.items() if ".layers.1." in n}
    files = model(one=first, two={n: t for n, t in weights.items() if n not in first})
    kept = range(0, EXPERTS, 4)
    (both,) = planned(files, kept)
    apart = planned(files, kept, max_shard_nbytes=both.tensors.nbytes.sum() // 2 + 1)
    assert len(apart) == 2
    assert sharable((both,)) > sharable(apart)
    # Not where the shard would be larger than any of the source's: all but a quarter stay.
    assert len(planned(files, range(EXPERTS // 4, EXPERTS))) == 2


def test_a_shard_that_loses_nothing_is_the_sources_file() -> None:
    weights = large()
    rest = {n: t for n, t in weights.items() if ".experts." not in n and ".gate." not in n}
    experts = {n: t for n, t in weights.items() if n not in rest}
    files = model(one=rest, two=experts)
    first = "model-00001-of-00002.safetensors"
    # As no writer of ours would spell it.
    raw = files[first]
    begin = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:begin]), indent=1).encode() + b"\n" * 5001
    files[first] = len(text).to_bytes(8, "little") + text + raw[begin:]
    shards = planned(files, range(0, EXPERTS, 2))
    assert bytes_of(shards[0], files) == files[first]
    assert all(shard.header != shards[0].header for shard in shards[1:])
