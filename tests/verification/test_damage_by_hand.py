"""Damage done by hand to id tables, count tensors, headers and layer counts: each is found.

Source and result are both built here, so no planner has a say in what is right.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.operations import api
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.verification import byte_comparison
from shardsurgeon.verification.verify import verify_checkpoint
from tests.support.handmade import (
    ALL,
    DEEPSEEK,
    INDEX,
    METADATA,
    QWEN,
    Keeps,
    Layout,
    Tensors,
    record,
    rows,
    stacked,
    values,
    write,
)

FEWER = {1: (1, 3, 6), 2: (0, 5, 7), 0: (2, 4, 7)}
HALF = {1: (1, 3, 4, 6), 2: (0, 2, 5, 7), 3: (0, 1, 6, 7)}


def differences(source: Path, pruned: Path) -> str:
    return "\n".join(verify_checkpoint(source, pruned).differences)


def both(folder: Path, layout: Layout, keeps: Keeps) -> tuple[Path, Path]:
    """(original, pruned), in one shard each."""
    source = write(folder / "source", layout, dict.fromkeys(keeps, ALL), 1)
    out = write(folder / "out", layout, keeps, 1)
    return source, record(out, keeps, [(source, len(ALL), len(next(iter(keeps.values()))))])


def edit(out: Path, name: str, at: int, value: int, dtype: str) -> None:
    """Overwrite one element of a tensor in place."""
    shard = out / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    held = json.loads(raw[8:begin])[name]
    width = np.dtype(dtype).itemsize
    place = begin + held["data_offsets"][0] + at * width
    raw[place : place + width] = np.array(value, dtype).tobytes()
    shard.write_bytes(raw)


# Tables of expert ids

TABLE = "layers.0.ffn.gate.tid2eid"
# Two experts per token, among them repeated and pruned ones.
OLD = [[2, 4], [7, 2], [4, 4], [0, 1], [1, 2], [3, 6], [5, 7]]
# Kept are 2, 4 and 7, now 0, 1 and 2; for the others any will do, once per row.
NEW = [[0, 1], [2, 0], [1, 1], [0, 1], [1, 0], [2, 0], [1, 2]]


def with_table(dtype: str) -> Layout:
    """DeepSeek-V4: layer 0 chooses experts by token, from a table of ids."""

    def tensors_of(keeps: Keeps) -> Tensors:
        made: Tensors = {"embed.weight": values("embed", 16, 6)}
        for layer in (0, 1):
            block, ids = f"layers.{layer}.ffn", keeps[layer]
            made[f"{block}.gate.weight"] = rows(f"{layer} gate", ids, 6)
            for new_id, old_id in enumerate(ids):
                made[f"{block}.experts.{new_id}.w1.weight"] = values(f"{layer} {old_id}", 4, 6)
        made[TABLE] = np.array(OLD if len(keeps[0]) == len(ALL) else NEW, dtype)
        return made

    def config_of(experts: int, mtp: int, names: object) -> str:
        counts = {"n_routed_experts": experts, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        return json.dumps({"model_type": "deepseek_v4", **counts}, indent=2)

    return tensors_of, config_of, 2


TABLES = pytest.mark.parametrize("dtype", ["<i4", "<i8"])
KEPT = {0: (2, 4, 7), 1: (1, 3, 6)}
DAMAGED: dict[str, tuple[int, int, str]] = {
    "a survivor by another number": (0, 1, "row 0 is [1, 1], made of [2, 4]"),
    "a survivor by its old number": (3, 2, "row 1 is [2, 2], made of [7, 2]"),
    "a survivor in a row that repeats": (5, 0, "row 2 is [1, 0], made of [4, 4]"),
    "one too many": (7, 3, "row 3 is [0, 3], made of [0, 1]"),
    "one too few": (6, -1, "row 3 is [-1, 1], made of [0, 1]"),
    "a row that repeats": (10, 0, "row 5 repeats: [0, 0]"),
    "a row that repeats a survivor": (12, 2, "row 6 repeats: [2, 2]"),
    "the last survivor": (13, 1, "row 6 is [1, 1], made of [5, 7]"),
    "the last of the ids": (13, 3, "row 6 is [1, 3], made of [5, 7]"),
}


@TABLES
def test_a_table_with_the_new_numbers_holds(tmp_path: Path, dtype: str) -> None:
    assert differences(*both(tmp_path, with_table(dtype), KEPT)) == ""


@TABLES
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("block", [1, 1 << 20], ids=["row by row", "at once"])
def test_a_damaged_table_is_found_by_its_row(
    tmp_path: Path, dtype: str, damage: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_comparison, "BLOCK_NBYTES", block)
    source, out = both(tmp_path, with_table(dtype), KEPT)
    at, value, says = DAMAGED[damage]
    edit(out, TABLE, at, value, dtype)
    assert differences(source, out) == f"model.safetensors {TABLE}: {says}"


def test_high_bytes_of_an_id_count(tmp_path: Path) -> None:
    source, out = both(tmp_path, with_table("<i8"), KEPT)
    edit(out, TABLE, 1, 1 + (1 << 32), "<i8")
    assert "row 0 is [0, 4294967297]" in differences(source, out)


def test_of_a_table_that_comes_over_a_network_every_row_is_compared(tmp_path: Path) -> None:
    """Whatever part of other tensors is."""
    source, out = both(tmp_path, with_table("<i8"), KEPT)

    def problems() -> tuple[str, ...]:
        before, after = (MemorySource(files_of(folder)) for folder in (source, out))
        return verify_checkpoint(open_checkpoint(before), after, sample_nbytes=8).differences

    assert problems() == ()
    edit(out, TABLE, 13, 3, "<i8")
    assert problems() == (f"model.safetensors {TABLE}: {DAMAGED['the last of the ids'][2]}",)


class Noting(MemorySource):
    """A source that notes how many bytes of the weights are asked for at once."""

    asked: ClassVar[list[int]] = []

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        if name.endswith(".safetensors"):
            self.asked.append(end - begin)
        return super().stream(name, begin, end)


def test_of_sampled_tensors_no_more_comes_over_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = both(tmp_path, with_table("<i8"), KEPT)
    monkeypatch.setattr(Noting, "asked", [])
    before, after = (Noting(files_of(folder)) for folder in (source, out))
    assert verify_checkpoint(open_checkpoint(before), after, sample_nbytes=8).holds
    *others, first, second = sorted(Noting.asked)
    # The table comes as a whole; neighbouring samples may come together.
    assert first == second == 8 * np.size(OLD) and max(others) <= 16


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Tensors whose first number is how many experts there are

SHAPE = "model.language_model.layers.1.mlp.experts.gate_up_proj_shape"


def with_counts(dtype: str) -> Layout:
    def tensors_of(keeps: Keeps) -> Tensors:
        made = stacked(keeps)
        for layer in (0, 1):
            counted: NDArray[np.generic] = np.array([len(keeps[layer]), 8, 6], dtype)
            made[SHAPE.replace("layers.1", f"layers.{layer}")] = counted
        return made

    return tensors_of, *QWEN[1:]


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, 8, "says 8 experts, 3 were kept"),
        (0, 2, "says 2 experts, 3 were kept"),
        (0, 0, "says 0 experts, 3 were kept"),
        (1, 9, "differs from model.safetensors"),
        (2, 0, "differs from model.safetensors"),
    ],
)
def test_a_damaged_count_is_found(
    tmp_path: Path, dtype: str, at: int, value: int, says: str
) -> None:
    source, out = both(tmp_path, with_counts(dtype), FEWER)
    assert differences(source, out) == ""
    edit(out, SHAPE, at, value, dtype)
    assert f"model.safetensors {SHAPE}: {says}" in differences(source, out)


def test_high_bytes_of_a_count_count(tmp_path: Path) -> None:
    source, out = both(tmp_path, with_counts("<i8"), FEWER)
    edit(out, SHAPE, 0, 3 + (1 << 40), "<i8")
    assert f"says {3 + (1 << 40)} experts, 3 were kept" in differences(source, out)


# Headers


def reheaded(out: Path, change: Callable[[bytes], bytes], file: str = "model.safetensors") -> None:
    """Another text for the header, with its length before it."""
    shard = out / file
    raw = shard.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    text = change(raw[8:begin])
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[begin:])


@pytest.mark.parametrize("more", range(1, 17))
def test_data_begins_at_a_multiple_of_8(tmp_path: Path, more: int) -> None:
    source, out = both(tmp_path, QWEN, FEWER)
    reheaded(out, lambda text: text + b" " * more)
    found = differences(source, out)
    assert ("no multiple of 8" in found) == bool(more % 8)
    assert ("no multiple of its 4-byte elements" in found) == bool(more % 4)
    assert ("no multiple of its 2-byte elements" in found) == bool(more % 2)


def divided(folder: Path, first: Callable[[str], bool]) -> None:
    """Have a model's tensors in two shards, in the first one those that are to be there, with a
    header that ends three bytes behind a multiple of 8."""
    made = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, wanted in ((1, True), (2, False)):
        held = {name: tensor for name, tensor in made.items() if first(name) is wanted}
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
        if number == 1:
            reheaded(folder, lambda text: text + b" " * 3, file)
    totals = {
        "total_parameters": sum(tensor.size for tensor in made.values()),
        "total_size": sum(tensor.nbytes for tensor in made.values()),
    }
    index = {"metadata": totals, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


FIRST = re.compile(r"model\.layers\.1\.mlp\.experts\.[0-3]\..*|model\.embed_tokens\.weight")
# Layer 1 keeps the experts of the first shard, or others of which there then are as many.
SAME = {1: (0, 1, 2, 3), 2: HALF[2], 3: HALF[3]}
OTHERS = {1: (4, 5, 6, 7), 2: HALF[2], 3: HALF[3]}


def test_a_file_of_the_source_is_laid_out_as_its_author_did(tmp_path: Path) -> None:
    source, out = both(tmp_path, DEEPSEEK, SAME)
    for folder in (source, out):
        divided(folder, lambda name: FIRST.fullmatch(name) is not None)
    file = "model-00001-of-00002.safetensors"
    assert (source / file).read_bytes() == (out / file).read_bytes()
    found = differences(source, out)
    assert "no multiple of" not in found and file not in found


def test_a_shard_that_only_begins_like_a_file_of_the_source_is_laid_out_as_any(
    tmp_path: Path,
) -> None:
    source, out = both(tmp_path, DEEPSEEK, OTHERS)
    for folder in (source, out):
        divided(folder, lambda name: FIRST.fullmatch(name) is not None)
    found = differences(source, out)
    assert "model-00001-of-00002.safetensors: its header ends at byte" in found
    assert "no multiple of its 4-byte elements" in found


def test_bytes_of_a_file_that_is_taken_whole_are_compared(tmp_path: Path) -> None:
    source, out = both(tmp_path, DEEPSEEK, SAME)
    for folder in (source, out):
        divided(folder, lambda name: FIRST.fullmatch(name) is not None)
    shard = out / "model-00001-of-00002.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "differs from model-00001-of-00002.safetensors" in differences(source, out)


@pytest.mark.parametrize("said", [{}, {"format": "np"}, {"format": "pt", "more": "x"}, None])
def test_header_metadata_is_the_sources(tmp_path: Path, said: object) -> None:
    source, out = both(tmp_path, QWEN, FEWER)

    def change(text: bytes) -> bytes:
        header = json.loads(text)
        header["__metadata__"] = said
        if said is None:
            del header["__metadata__"]
        new = json.dumps(header).encode()
        return new + b" " * (-len(new) % 8)

    reheaded(out, change)
    assert "__metadata__" in differences(source, out)


# Counts of the layers


def respoken(out: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((out / METADATA).read_text())
    change(content)
    (out / METADATA).write_text(json.dumps(content))


def uneven(tmp_path: Path, keeps: Keeps) -> tuple[Path, Path]:
    """A prune whose layers keep different numbers, which format 2 records."""
    source = write(tmp_path / "source", DEEPSEEK, dict.fromkeys(keeps, ALL))
    out = record(write(tmp_path / "out", DEEPSEEK, keeps), keeps, [(source, 8, 4)])
    respoken(out, lambda c: c.update(format=2))
    return source, out


def test_a_layer_that_keeps_fewer_than_the_router_chooses_is_found(tmp_path: Path) -> None:
    source, out = uneven(tmp_path, {**HALF, 2: (5,)})
    expected = "1 experts are left in layer 2, the router chooses 2 for each token"
    assert expected in differences(source, out)


def test_as_many_as_the_router_chooses_are_enough(tmp_path: Path) -> None:
    keeps = {1: (1, 6), 2: (0, 5), 3: (2, 7)}
    source = write(tmp_path / "source", DEEPSEEK, dict.fromkeys(keeps, ALL))
    out = record(write(tmp_path / "out", DEEPSEEK, keeps), keeps, [(source, 8, 2)])
    assert differences(source, out) == ""


def test_an_mtp_layer_with_another_count_than_the_others_is_found(tmp_path: Path) -> None:
    source, out = uneven(tmp_path, {**HALF, 3: (0, 7)})
    expected = "2 experts are left in MTP layer 3, the config says 4"
    assert expected in differences(source, out)


def test_layers_are_the_models_no_more_and_no_fewer(tmp_path: Path) -> None:
    source, out = uneven(tmp_path, HALF)
    respoken(out, lambda c: c["layers"].update({"0": c["layers"]["1"]}))
    assert "has an entry for layer 0, which has no experts" in differences(source, out)
    respoken(out, lambda c: [c["layers"].pop(key) for key in ("0", "1")])
    assert "has no entry for MoE layer 1" in differences(source, out)


def test_layers_without_a_keep_list_are_named_in_order(tmp_path: Path) -> None:
    def config_of(experts: int, mtp: int, ignored: Sequence[str]) -> str:
        config = json.loads(DEEPSEEK[1](experts, mtp, ignored))
        return json.dumps({**config, "num_hidden_layers": 9, "num_nextn_predict_layers": 0})

    layout = (DEEPSEEK[0], config_of, 9)
    source, out = both(tmp_path, layout, dict.fromkeys((1, 2, 8), HALF[1]))
    respoken(out, lambda c: [c["layers"].pop(key) for key in ("1", "8")])
    lines = [line for line in differences(source, out).splitlines() if "has no entry" in line]
    assert [line.rpartition(" ")[2] for line in lines] == ["1", "8"]


def test_counts_of_another_model_are_found(tmp_path: Path) -> None:
    source, out = uneven(tmp_path, HALF)

    def another(content: dict) -> None:
        """A layer of one expert fewer than the source's has."""
        content["layers"]["2"]["pruned"].remove(6)
        content["layers"]["2"].update(num_experts_before=7, retained=[0, 2, 5, 6])
        content["layers"]["2"]["pruned"] = [1, 3, 4]

    respoken(out, another)
    assert "layers.2: speaks of 7 experts, there were 8" in differences(source, out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["steps"][0].update(num_experts_before=9), "do not lead from 8 to 4"),
        (lambda c: c["steps"][0].update(num_experts_after=5), "do not lead from 8 to 4"),
        (lambda c: c.update(num_experts_after=3), "expected at most 3 and"),
        (lambda c: c.update(steps=[]), "not a list of prunes"),
        (lambda c: c["steps"].append(c["steps"][0]), "do not lead from 8 to 4"),
    ],
)
def test_steps_that_lead_elsewhere_are_found(
    tmp_path: Path, change: Callable[[dict], object], says: str
) -> None:
    source, out = uneven(tmp_path, HALF)
    respoken(out, change)
    assert says in differences(source, out)


def test_a_model_of_more_experts_is_another_one(tmp_path: Path) -> None:
    source, out = both(tmp_path, QWEN, FEWER)

    def more(content: dict) -> None:
        content["num_experts_before"] = content["steps"][0]["num_experts_before"] = 9
        for layer in content["layers"].values():
            layer["pruned"].append(8)

    respoken(out, more)
    found = differences(source, out)
    assert "says it was pruned from 9 experts, the source has 8" in found
    assert "speaks of a model of 9 experts, the source goes back to one of 8" in found


# Counts per layer in the config

MODEL = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"


@pytest.fixture(scope="module")
def nonuniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nonuniform") / "out"
    lists = {str(n): {"kept": list(range(8 - n)), "keep": 8 - n} for n in range(3)}
    plan = out.parent / "list.json"
    plan.write_text(json.dumps(lists))
    made = api.plan(MODEL, plan_file=plan, allow_nonuniform=True, out=out)
    api.apply(made)
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c["num_routed_experts_per_layer"].__setitem__(0, 7),
            "num_routed_experts_per_layer.0 is 7",
        ),
        (lambda c: c["num_routed_experts_per_layer"].__setitem__(-1, 9), "is 9, expected "),
        (
            lambda c: c["num_routed_experts_per_layer"].append(8),
            "num_routed_experts_per_layer is [",
        ),
        (lambda c: c["num_routed_experts_per_layer"].pop(), "num_routed_experts_per_layer is ["),
        (
            lambda c: c["num_routed_experts_per_layer"].reverse(),
            "num_routed_experts_per_layer.0 is",
        ),
        (
            lambda c: c.pop("num_routed_experts_per_layer"),
            "num_routed_experts_per_layer is missing",
        ),
        (
            lambda c: c.update(num_routed_experts_per_layer=8),
            "num_routed_experts_per_layer is 8, expected [",
        ),
        (lambda c: c.update(num_experts=7), "num_experts is 7, expected 8"),
        (lambda c: c.pop("per_layer_config"), "per_layer_config is missing"),
        (lambda c: c["per_layer_config"].pop("2"), "per_layer_config.2 is missing"),
        (
            lambda c: c["per_layer_config"]["2"].update(num_local_experts=8),
            "per_layer_config.2.num_local_experts is 8, expected 6",
        ),
        (
            lambda c: c["per_layer_config"].update({"2": {"num_experts": 6}}),
            "per_layer_config.2.num_local_experts is missing",
        ),
    ],
)
def test_damaged_counts_per_layer_are_found(
    nonuniform: Path, tmp_path: Path, change: Callable[[dict], object], says: str
) -> None:
    copy = Path(shutil.copytree(nonuniform, tmp_path / "copy"))
    assert differences(MODEL, copy) == ""
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config, indent=2))
    assert says in differences(MODEL, copy)
