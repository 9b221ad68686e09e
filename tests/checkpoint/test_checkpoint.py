"""Opening a checkpoint: what belongs to it, and what is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import CheckpointError, ConfigError, IndexFileError
from shardsurgeon.storage.source import MemorySource
from tests.support import tiny

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def opened(files: dict[str, bytes]):
    return open_checkpoint(MemorySource(files, name="tiny"))


def with_index(files: dict[str, bytes], change) -> dict[str, bytes]:
    index = json.loads(files[INDEX])
    change(index["weight_map"])
    return {**files, INDEX: json.dumps(index).encode()}


def test_a_sharded_checkpoint_is_opened_with_all_its_tensors() -> None:
    checkpoint = open_checkpoint(tiny.source())
    assert [shard.file for shard in checkpoint.shards] == [FIRST, SECOND]
    assert checkpoint.num_tensors == len(tiny.tensors())
    assert checkpoint.total_size == sum(t.nbytes for t in tiny.tensors().values())
    assert checkpoint.notes == ()


def test_a_single_file_needs_no_index() -> None:
    files = tiny.files(shard_of=lambda name: 1)
    alone = {"config.json": files["config.json"], "model.safetensors": files[FIRST]}
    assert opened(alone).num_tensors == len(tiny.tensors())


def test_a_complete_numbered_set_needs_no_index() -> None:
    files = tiny.files()
    del files[INDEX]
    assert [shard.file for shard in opened(files).shards] == [FIRST, SECOND]


def test_shards_are_taken_in_order_of_their_numbers() -> None:
    files = tiny.files()
    renamed = {"model-10-of-10.safetensors": FIRST, "model-2-of-10.safetensors": SECOND}
    back = {old: new for new, old in renamed.items()}
    index = json.loads(files[INDEX])
    index["weight_map"] = {name: back[file] for name, file in index["weight_map"].items()}
    moved = {back.get(name, name): data for name, data in files.items()}
    checkpoint = opened({**moved, INDEX: json.dumps(index).encode()})
    assert [shard.file for shard in checkpoint.shards] == [
        "model-2-of-10.safetensors",
        "model-10-of-10.safetensors",
    ]


def test_a_safetensors_file_outside_the_index_is_left_out_and_said() -> None:
    files = tiny.files()
    checkpoint = opened({**files, "adapter.safetensors": files[FIRST]})
    assert checkpoint.unindexed == ("adapter.safetensors",)
    assert "adapter.safetensors is not in the index" in checkpoint.notes[0]


def test_a_tensor_that_the_index_forgot_is_part_of_the_model() -> None:
    files = with_index(tiny.files(), lambda names: names.pop("model.norm.weight"))
    checkpoint = opened(files)
    assert checkpoint.num_tensors == len(tiny.tensors())
    assert "1 tensors that the index does not list" in checkpoint.notes[0]


def test_where_there_is_no_index_nothing_is_said_of_what_it_lists() -> None:
    files = tiny.files()
    index = "model.safetensors.index.json"
    single = {"model.safetensors": tiny.files()[FIRST]}
    alone = {name: raw for name, raw in files.items() if not name.endswith(".safetensors")}
    del alone[index]
    checkpoint = opened({**alone, **single})
    assert checkpoint.notes == ()


def test_a_record_of_another_tool_is_no_lineage_and_is_said() -> None:
    foreign = {"calibration/reap_pruning_metadata.json": b'{"prune_method": "reap"}'}
    checkpoint = opened({**tiny.files(), **foreign})
    assert checkpoint.provenance is None
    assert "written by another tool" in checkpoint.notes[0]


def without(name: str) -> dict[str, bytes]:
    return {file: data for file, data in tiny.files().items() if file != name}


def without_index_and(name: str) -> dict[str, bytes]:
    return {file: data for file, data in without(name).items() if file != INDEX}


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        (without("config.json"), ConfigError, "config.json: no such file"),
        (without(FIRST), IndexFileError, f"names the shard {FIRST}, which is not there"),
        ({"config.json": b"{}"}, CheckpointError, "holds no .safetensors file"),
        ({**tiny.files(), "config.json": b"[1]"}, ConfigError, "no JSON object"),
        (without_index_and(FIRST), CheckpointError, ""),
        (
            {**without_index_and(FIRST), "other.safetensors": tiny.files()[FIRST]},
            CheckpointError,
            "has 1 of the 2 shards of model and no model.safetensors.index.json",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"model.norm.weight": SECOND})),
            IndexFileError,
            f"says {SECOND} holds tensor model.norm.weight, but it does not: {FIRST} does",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"ghost": FIRST})),
            IndexFileError,
            f"says {FIRST} holds tensor ghost, but it does not; fetch",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"x": "../x.safetensors"})),
            IndexFileError,
            "not a plain path inside the folder",
        ),
        (
            {"consolidated.safetensors": tiny.files()[FIRST]},
            ConfigError,
            "params.json: no such file",
        ),
        (
            {"config.json": b"{}", "consolidated-00001-of-00001.safetensors": b""},
            CheckpointError,
            "has config.json, and weights in Mistral's own format alone",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(files, error, says) -> None:
    if says == "":
        # One shard of two, without an index: its number says that the other is missing.
        files = {**files, "model-00002-of-00003.safetensors": files[SECOND]}
        says = "has 2 of the"
        with pytest.raises(error):
            opened(files)
        return
    with pytest.raises(error) as caught:
        opened(files)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


GATE = "model.layers.2.mlp.gate.weight"


def overlaid() -> tuple[dict[str, bytes], np.ndarray]:
    """The checkpoint with a stale copy of GATE in the first shard; and what the index means."""
    files = tiny.files()
    held = load(files[FIRST])
    files[FIRST] = save({**held, GATE: np.full((8, 6), -1, np.float32)}, {"format": "pt"})
    return files, tiny.tensors()[GATE]


def test_of_two_tensors_of_one_name_the_index_decides() -> None:
    files, meant = overlaid()
    checkpoint = opened(files)
    assert checkpoint.num_tensors == len(tiny.tensors())
    assert checkpoint.total_size == sum(t.nbytes for t in tiny.tensors().values())
    ((shard, record),) = [
        (shard, record)
        for shard in checkpoint.shards
        for record in shard.header.tensors
        if record.name == GATE
    ]
    begin = shard.header.data_begin + record.begin
    assert shard.file == SECOND
    assert files[SECOND][begin : begin + record.nbytes] == meant.tobytes()
    assert checkpoint.superseded == ((FIRST, GATE),)
    assert f"tensor {GATE} of {FIRST} left out" in checkpoint.notes[0]


def test_a_superseded_tensor_does_not_move_its_neighbours() -> None:
    files, _ = overlaid()
    shard = opened(files).shards[0]
    stored = load(files[FIRST])
    for record in shard.header.tensors:
        begin = shard.header.data_begin + record.begin
        assert files[FIRST][begin : begin + record.nbytes] == stored[record.name].tobytes()


@pytest.mark.parametrize("how", ["no index", "an index that lists neither"])
def test_two_tensors_of_one_name_are_refused_where_no_index_decides(how: str) -> None:
    files, _ = overlaid()
    if how == "no index":
        del files[INDEX]
    else:
        files = with_index(files, lambda names: names.pop(GATE))
    with pytest.raises(CheckpointError) as caught:
        opened(files)
    assert f"{SECOND}: holds tensor {GATE}, which {FIRST} holds too" in str(caught.value)


def test_a_wrong_index_is_told_by_every_tensor_and_by_the_shard_that_has_it() -> None:
    moved = [f"model.layers.2.mlp.experts.{n}.up_proj.weight" for n in range(5)]
    files = with_index(tiny.files(), lambda names: names.update(dict.fromkeys(moved, FIRST)))
    with pytest.raises(IndexFileError) as caught:
        opened(files)
    named = f"says {FIRST} holds tensors {', '.join(moved[:3])} and 2 more, but it does not"
    assert f"{named}: {SECOND} does" in str(caught.value)


def test_without_an_index_files_of_any_names_are_the_model_where_each_tensor_occurs_once() -> None:
    files = without(INDEX)
    files["trunk.safetensors"], files["rest.safetensors"] = files.pop(FIRST), files.pop(SECOND)
    files["scores.safetensors"] = save({"model.layers.1.mlp": np.ones(8, np.float32)})
    files["adapters.safetensors"] = save({"model.layers.1.q.lora_a": np.ones((2, 8), np.float32)})
    checkpoint = opened(files)
    assert [shard.file for shard in checkpoint.shards] == ["rest.safetensors", "trunk.safetensors"]
    assert {record.name for record in checkpoint.records} == set(tiny.tensors())
    assert checkpoint.unindexed == ("adapters.safetensors", "scores.safetensors")
    (note,) = [note for note in checkpoint.notes if "there is no index" in note]
    assert "rest.safetensors, trunk.safetensors together are taken for the model" in note


def test_a_numbered_set_beside_another_file_is_the_model_together_with_it() -> None:
    files = without(INDEX)
    files["vision.safetensors"] = save({"visual.patch.weight": np.ones((2, 2), np.float32)})
    assert opened(files).num_tensors == len(tiny.tensors()) + 1


@pytest.mark.parametrize("index", [b"\xef\xbb\xbf%s", b"%s"])
def test_a_byte_order_mark_and_a_null_for_metadata_change_nothing(index: bytes) -> None:
    files = tiny.files()
    content = json.loads(files[INDEX])
    content["metadata"] = None
    checkpoint = opened({**files, INDEX: index % json.dumps(content).encode()})
    assert checkpoint.num_tensors == len(tiny.tensors())
    assert checkpoint.index_metadata == {}


@pytest.mark.parametrize(
    "name", ["model.layers.{}.mlp.gate.weight", "model.layers.1.mlp.experts.{}.up_proj.weight"]
)
def test_a_name_with_a_number_of_thousands_of_digits_is_a_name(name: str) -> None:
    """In a shard, and in a file that no index lists."""
    odd = {name.format("9" * 5000): np.ones((2, 3), np.float32)}
    assert opened(tiny.files(weights={**tiny.tensors(), **odd})).num_tensors == 1 + len(
        tiny.tensors()
    )
    beside = {**tiny.files(), "beside.safetensors": save(odd)}
    assert opened(beside).unindexed == ("beside.safetensors",)


def test_a_shard_of_a_billion_says_that_the_others_are_missing() -> None:
    files = without(INDEX)
    files["model-1-of-999999999.safetensors"] = files.pop(FIRST)
    with pytest.raises(CheckpointError, match="has 1 of the "):
        opened(files)
