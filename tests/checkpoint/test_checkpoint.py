"""Opening a checkpoint: what belongs to it, and what is refused by name."""

from __future__ import annotations

import json

import pytest

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
            "no model.safetensors.index.json to say which of them belong",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"model.norm.weight": SECOND})),
            IndexFileError,
            f"says {SECOND} holds model.norm.weight, but it does not",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"ghost": FIRST})),
            IndexFileError,
            f"says {FIRST} holds ghost, but it does not",
        ),
        (
            with_index(tiny.files(), lambda names: names.update({"x": "../x.safetensors"})),
            IndexFileError,
            "not a plain path inside the folder",
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


def test_a_tensor_in_two_shards_is_refused() -> None:
    files = tiny.files()
    twice = tiny.files(shard_of=lambda name: 1)
    files[FIRST] = twice[FIRST]
    with pytest.raises(CheckpointError, match=f"which {FIRST} holds too"):
        opened(files)
