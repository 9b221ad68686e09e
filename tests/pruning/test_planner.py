"""The planner against numpy and the safetensors library: every byte of a plan is looked up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import FamilyError
from shardsurgeon.execution.plan import Literal, OutputShard
from shardsurgeon.families.schema import parse_family
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.planner import check_expert_counts, expert_id_tables, plan_shards
from shardsurgeon.storage.formats.index import HUGGING_FACE
from tests.support import tiny
from tests.support.tiny_job import tensors_of

QWEN = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "mtp_num_hidden_layers": 1,
    },
}


def stacked_tensors() -> tiny.Tensors:
    """Qwen3.5's layout: experts stacked along the first axis, an MTP layer of its own name."""
    numbers = np.random.default_rng(3)
    found: tiny.Tensors = {"model.visual.weight": numbers.standard_normal((3, 8)).astype("f4")}
    for prefix in (
        "model.language_model.layers.0",
        "model.language_model.layers.1",
        "mtp.layers.0",
    ):
        found[f"{prefix}.mlp.experts.gate_up_proj"] = numbers.standard_normal((8, 6, 4)).astype(
            "f2"
        )
        found[f"{prefix}.mlp.experts.down_proj"] = numbers.standard_normal((8, 4, 3)).astype("f2")
        found[f"{prefix}.mlp.gate.weight"] = numbers.standard_normal((8, 4)).astype("f4")
        found[f"{prefix}.mlp.shared_expert_gate.weight"] = numbers.standard_normal((1, 4)).astype(
            "f4"
        )
    found["mtp.fc.weight"] = numbers.standard_normal((4, 8)).astype("f4")
    return found


def keep(*retained: int, layers: tuple[int, ...]) -> KeepList:
    gone = tuple(sorted(set(range(8)) - set(retained)))
    return KeepList(8, {layer: LayerKeep(tuple(retained), gone) for layer in layers})


def planned(files: dict[str, bytes], keep_list: KeepList, **options) -> dict[str, bytes]:
    """The shards that a plan describes, put together byte by byte."""
    checkpoint = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    shards = plan_shards(checkpoint, read_anatomy(checkpoint), keep_list, **options)
    return {shard.file: assembled(shard, files) for shard in shards}


def assembled(shard: OutputShard, files: dict[str, bytes]) -> bytes:
    parts = [shard.header]
    for piece in shard.pieces:
        if isinstance(piece, Literal):
            parts.append(piece.data)
        else:
            parts.append(files[piece.file][piece.begin : piece.begin + piece.nbytes])
    data = b"".join(parts)
    assert len(data) == shard.nbytes
    return data


def read(shards: dict[str, bytes]) -> tiny.Tensors:
    found: tiny.Tensors = {}
    for data in shards.values():
        found.update(load(data))
    return found


def expected(weights: tiny.Tensors, retained: dict[int, tuple[int, ...]]) -> tiny.Tensors:
    """The pruned tensors, made by numpy from the names as a person reads them."""
    found: tiny.Tensors = {}
    for name, values in weights.items():
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else -1
        if layer not in retained or "mlp" not in words:
            found[name] = values
        elif "experts" in words:
            old = int(words[5])
            if old in retained[layer]:
                words[5] = str(retained[layer].index(old))
                found[".".join(words)] = values
        elif "gate" in words:
            found[name] = values[list(retained[layer])]
        else:
            found[name] = values
    return found


def assert_same(found: tiny.Tensors, wanted: tiny.Tensors) -> None:
    assert sorted(found) == sorted(wanted)
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


keep_lists = st.fixed_dictionaries(
    {
        n: st.sets(st.integers(0, 7), min_size=1, max_size=7).map(sorted).map(tuple)
        for n in (1, 2, 3)
    }
)


@settings(max_examples=40, deadline=None)
@given(keep_lists, st.sampled_from([None, 1, 300, 1000, 10**6]))
def test_survivors_are_byte_identical_and_renumbered_in_order(retained, limit) -> None:
    layers = {
        layer: LayerKeep(ids, tuple(sorted(set(range(8)) - set(ids))))
        for layer, ids in retained.items()
    }
    shards = planned(tiny.files(), KeepList(8, layers), max_shard_nbytes=limit)
    assert_same(read(shards), expected(tiny.tensors(), retained))
    if limit is not None:
        for data in shards.values():
            held = load(data)
            assert len(held) == 1 or sum(values.nbytes for values in held.values()) <= limit


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 7), min_size=1, max_size=7).map(sorted))
def test_stacked_experts_are_sliced_along_their_axis(retained) -> None:
    weights = stacked_tensors()
    files = tiny.files(QWEN, weights)
    found = read(planned(files, keep(*retained, layers=(0, 1, 2))))
    for name, values in weights.items():
        sliced = ".experts." in name or name.endswith("mlp.gate.weight")
        np.testing.assert_array_equal(found[name], values[retained] if sliced else values)


def test_shards_are_aligned_with_wider_types_first_and_source_order_within() -> None:
    weights = stacked_tensors()
    shards = planned(tiny.files(QWEN, weights), keep(1, 6, layers=(0, 1, 2)))
    (data,) = shards.values()
    header_nbytes = int.from_bytes(data[:8], "little")
    assert (8 + header_nbytes) % 8 == 0
    names = list(load(data))
    source = tiny.files(QWEN, weights)["model-00001-of-00002.safetensors"]
    source_order = sorted(weights, key=lambda name: _begin(source, name))
    wide = [name for name in source_order if weights[name].itemsize == 4]
    narrow = [name for name in source_order if weights[name].itemsize == 2]
    offsets = sorted(names, key=lambda name: _begin(data, name))
    assert offsets == wide + narrow


def _begin(data: bytes, name: str) -> int:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header[name]["data_offsets"][0]


def test_dropped_mtp_layers_leave_no_tensors_behind() -> None:
    found = read(planned(tiny.files(), keep(0, 1, layers=(1, 2)), drop_mtp=True))
    assert not [name for name in found if "layers.3" in name]
    weights = stacked_tensors()
    found = read(planned(tiny.files(QWEN, weights), keep(0, 1, layers=(0, 1)), drop_mtp=True))
    assert not [name for name in found if name.startswith("mtp.")]


def test_a_shard_that_holds_nothing_any_more_is_not_written() -> None:
    files = tiny.files(shard_of=lambda name: 2 if "experts.7." in name else 1)
    shards = planned(files, keep(0, 1, layers=(1, 2, 3)))
    assert list(shards) == ["model.safetensors"]


def test_the_metadata_of_the_source_shard_is_kept() -> None:
    shards = planned(tiny.files(), keep(0, 1, layers=(1, 2, 3)))
    for data in shards.values():
        assert b'"__metadata__":{"format":"pt"}' in data[:100]


def test_consecutive_rows_are_one_segment() -> None:
    checkpoint = open_checkpoint(tiny.MemorySource(tiny.files(QWEN, stacked_tensors())))
    shards = plan_shards(
        checkpoint, read_anatomy(checkpoint), keep(0, 1, 2, 5, 7, layers=(0, 1, 2))
    )
    pieces = {t.name: t.pieces for shard in shards for t in tensors_of(shard)}
    assert len(pieces["mtp.layers.0.mlp.experts.down_proj"]) == 3


@pytest.mark.parametrize(
    ("number", "total", "name"),
    [(1, 1, "model.safetensors"), (3, 64, "model-00003-of-00064.safetensors")],
)
def test_shards_are_named_as_the_hub_names_them(number: int, total: int, name: str) -> None:
    assert HUGGING_FACE.shard(number, total) == name


def test_experts_whose_rows_are_not_whole_bytes_are_refused_by_name() -> None:
    weights = stacked_tensors()
    files = tiny.files(QWEN, weights, shard_of=lambda name: 1)
    (shard,) = (name for name in files if name.endswith(".safetensors"))
    raw = files[shard]
    begin = 8 + int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8:begin]), len(raw) - begin
    # numpy has no F4: 8 experts of 3 numbers, 12 bits each, are added by hand.
    names = [f"{n.rsplit('.', 1)[0]}.down_proj_packed" for n in weights if "down_proj" in n]
    for number, name in enumerate(names):
        offsets = [end + 12 * number, end + 12 * (number + 1)]
        header[name] = {"dtype": "F4", "shape": [8, 3], "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = raw[begin:] + bytes(12 * len(names))
    files[shard] = len(text).to_bytes(8, "little") + text + data
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"] |= dict.fromkeys(names, shard)
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(FamilyError, match=r"down_proj_packed: an expert's row takes 12 bits"):
        planned(files, keep(0, 1, 2, 5, layers=(0, 1, 2)))


def with_metadata(files: dict[str, bytes], metadata: dict[int, dict[str, str]]) -> None:
    """Give shards, by number, metadata of their own."""
    for number, words in metadata.items():
        name = f"model-0000{number}-of-00002.safetensors"
        files[name] = save(load(files[name]), words)


def metadata_of(shard: bytes) -> object:
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    return header.get("__metadata__")


def test_a_repacked_shard_has_the_metadata_of_those_it_was_filled_from() -> None:
    files = tiny.files(shard_of=lambda name: 1 if "layers.1" in name else 2)
    with_metadata(files, {1: {"format": "pt", "of": "one"}, 2: {"of": "two", "by": "me"}})
    one = sum(v.nbytes for name, v in tiny.tensors().items() if "layers.1" in name) // 2
    shards = planned(files, keep(0, 1, 2, 3, layers=(1, 2, 3)), max_shard_nbytes=one)
    found = {name: metadata_of(data) for data in shards.values() for name in load(data)}
    assert found["model.layers.1.input_layernorm.weight"] == {"format": "pt", "of": "one"}
    assert found["model.norm.weight"] == {"of": "two", "by": "me"}
    # A shard with tensors of both has what both say, of one name what the first says.
    (both,) = planned(files, keep(0, 1, layers=(1, 2, 3)), max_shard_nbytes=10**6).values()
    assert metadata_of(both) == {"format": "pt", "of": "one", "by": "me"}


@pytest.mark.parametrize("said", [8, 9])
def test_a_declared_count_must_be_the_number_of_experts_where_none_is_stacked(said: int) -> None:
    weights = tiny.tensors()
    for layer in (1, 2, 3):
        weights[f"model.layers.{layer}.mlp.counts"] = np.array([said if layer == 2 else 8, 5, 7])
    family = parse_family('like = "deepseek_v3"\n[tensors]\nexpert_counts = ["mlp.counts"]\n', "x")
    opened = open_checkpoint(tiny.MemorySource(tiny.files(weights=weights), name="tiny"))
    checkpoint = replace(opened, family=family)
    anatomy = read_anatomy(checkpoint)
    if said == 8:
        check_expert_counts(checkpoint, anatomy)
        return
    with pytest.raises(FamilyError, match=r"layers\.2\.mlp\.counts: begins with 9, .* experts, 8"):
        check_expert_counts(checkpoint, anatomy)


def test_tables_of_expert_ids_name_the_survivors_by_their_new_numbers() -> None:
    weights, name = tiny.tensors(), "model.layers.{}.mlp.tid2eid"
    tables = {layer: np.array([[0, 7], [5, 1], [7, 5]], "i8") for layer in (1, 2, 3)}
    weights |= {name.format(layer): table for layer, table in tables.items()}
    files = tiny.files(weights=weights)
    family = parse_family('like = "deepseek_v3"\n[tensors]\nexpert_ids = ["mlp.tid2eid"]\n', "x")
    opened = open_checkpoint(tiny.MemorySource(files, name="tiny"))
    checkpoint = replace(opened, family=family)
    anatomy = read_anatomy(checkpoint)
    keep_list = keep(0, 1, 5, 7, layers=(1, 2))
    made = expert_id_tables(checkpoint, anatomy, keep_list)
    assert set(made) == {name.format(1), name.format(2)}
    shards = plan_shards(checkpoint, anatomy, keep_list, tables=made, drop_mtp=True)
    found = read({shard.file: assembled(shard, files) for shard in shards})
    for layer in (1, 2):
        assert found[name.format(layer)].tolist() == [[0, 3], [2, 1], [3, 2]]


def test_identity_experts_move_up_behind_the_survivors_and_keep_their_router_rows() -> None:
    config = {
        "model_type": "longcat_flash",
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 2,
    }
    weights: tiny.Tensors = {}
    for layer in (0, 1):
        block = f"model.layers.{layer}.mlp"
        weights[f"{block}.router.classifier.weight"] = np.arange(30, dtype="f4").reshape(10, 3)
        # As transformers saves it again: weights of the experts that have none, too.
        for expert in range(10):
            weights[f"{block}.experts.{expert}.up_proj.weight"] = np.full((2, 3), expert, "f4")
    retained = (0, 3, 4, 7)
    found = read(planned(tiny.files(config, weights), keep(*retained, layers=(0, 1))))
    for layer in (0, 1):
        block, rows = f"model.layers.{layer}.mlp", [*retained, 8, 9]
        experts = [found[f"{block}.experts.{n}.up_proj.weight"][0, 0] for n in range(6)]
        assert experts == rows and f"{block}.experts.6.up_proj.weight" not in found
        router = f"{block}.router.classifier.weight"
        np.testing.assert_array_equal(found[router], weights[router][rows])
