"""Counts that a file only claims are compared with the shards before anything is built of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.config import PER_LAYER_KEY
from shardsurgeon.checkpoint.guess import guess_family
from shardsurgeon.checkpoint.provenance import Provenance, parse_provenance
from shardsurgeon.checkpoint.roles import ExpertCounts, NameReader
from shardsurgeon.errors import CheckpointError, InputError, KeepListError
from shardsurgeon.families.schema import family_for
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.source import MemorySource
from tests.fuzz import seeds
from tests.support import tiny

HUGE = [2**31, 2**63, 10**400]
KEYS = [
    "n_routed_experts",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
]


def refusal(files: dict[str, bytes]) -> str:
    """What the model is refused with, for little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read_anatomy(open_checkpoint(MemorySource(files)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    return str(caught.value)


@pytest.mark.parametrize("huge", HUGE, ids=["2^31", "2^63", "10^400"])
@pytest.mark.parametrize("key", KEYS[:3])
def test_a_count_beyond_every_model_is_refused(key: str, huge: int) -> None:
    said = refusal(tiny.files(content=tiny.config(**{key: huge})))
    assert "memory/config.json: says " in said and "no model has more than" in said
    assert len(said) < 400


@pytest.mark.parametrize("key", ["n_routed_experts", PER_LAYER_KEY])
def test_a_count_beyond_the_shards_is_refused(key: str) -> None:
    value = [0, 65_536, 65_536, 65_536] if key == PER_LAYER_KEY else 65_536
    said = refusal(tiny.files(content=tiny.config(**{key: value})))
    assert "8 experts" in said or "the shards hold 8" in said


@pytest.mark.parametrize(
    ("key", "name"), [("per_layer_num_experts", ""), ("per_layer_config", "n_routed_experts")]
)
@pytest.mark.parametrize("huge", HUGE, ids=["2^31", "2^63", "10^400"])
def test_a_count_of_one_layer_is_believed_no_more(key: str, name: str, huge: int) -> None:
    value: object = {name: huge} if name else huge
    said = refusal(tiny.files(content=tiny.config(**{key: {"1": value}})))
    assert "no model has more than" in said and len(said) < 400


@pytest.mark.parametrize("huge", HUGE, ids=["2^31", "2^63", "10^400"])
@pytest.mark.parametrize("key", KEYS)
def test_no_huge_count_is_believed(key: str, huge: int) -> None:
    """Those of routing may be refused later, by what prunes; they cost nothing here."""
    files = tiny.files(content=tiny.config(**{key: huge}))
    tracemalloc.start()
    try:
        read_anatomy(open_checkpoint(MemorySource(files)))
    except InputError as error:
        assert len(str(error)) < 600
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 24 << 20


def test_a_guess_believes_no_count_either() -> None:
    files = tiny.files(content=tiny.config(model_type="unheard_of", n_routed_experts=2**31))
    with pytest.raises(InputError):
        guess_family(open_checkpoint(MemorySource(files)))


def test_layers_of_many_experts_each_have_a_limit_together() -> None:
    """Stacked weights of no width take no bytes, and have as many experts as they say."""
    config = tiny.config(n_routed_experts=65_536, num_hidden_layers=20)
    entries: dict[str, Any] = {}
    for layer in range(20):
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            shape = [65_536, 0] if part == "gate.weight" else [65_536, 0, 0]
            entries[f"model.layers.{layer}.mlp.{part}"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [0, 0],
            }
    text = json.dumps(entries).encode()
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": len(text).to_bytes(8, "little") + text,
    }
    said = refusal(files)
    assert "its 20 layers with experts would have 1,310,720, no model has more than" in said


@pytest.mark.parametrize(
    "name", ["layers.{}.mlp.experts.0.up_proj.weight", "layers.1.mlp.experts.0.part{}.weight"]
)
def test_no_table_of_all_experts_is_made_for_each_tensor(name: str) -> None:
    config = tiny.config(n_routed_experts=65_536, num_hidden_layers=2_000)
    entries = {
        f"model.{name.format(n)}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
        for n in range(2_000)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": len(text).to_bytes(8, "little") + text + bytes(2_000),
    }
    assert refusal(files)


def test_names_that_change_their_layer_each_time_cost_no_table_each() -> None:
    family = family_for(tiny.config(), "config.json")
    reader = NameReader(family, 3, ExpertCounts(65_536, {}, 65_536), 0)
    records = [
        TensorRecord(f"model.layers.{1 + n % 2}.mlp.experts.{n}.up_proj.weight", "F32", (), 0, 0)
        for n in range(20_000)
    ]
    roles = [reader.role(record) for record in records]
    assert [(role.layer, role.expert) for role in roles] == [  # type: ignore[union-attr]
        (1 + n % 2, n) for n in range(20_000)
    ]


@pytest.mark.parametrize("huge", [65_537, *HUGE], ids=["65,537", "2^31", "2^63", "10^400"])
@pytest.mark.parametrize("raw", seeds.keep_lists()[:-1])
def test_the_experts_of_a_keep_list_are_counted_not_believed(
    raw: bytes, huge: int, tmp_path: Path
) -> None:
    value = json.loads(raw)
    counts = [key for key in value if "num_experts" in key or key == "original_experts"]
    for key in counts:
        path = tmp_path / "keep.json"
        path.write_text(json.dumps({**value, key: huge}))
        with pytest.raises(KeepListError) as caught:
            read_keeplist(path)
        assert key in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("huge", [65_537, *HUGE], ids=["65,537", "2^31", "2^63", "10^400"])
@pytest.mark.parametrize("place", ["top", "layer", "step"])
@pytest.mark.parametrize("key", ["num_experts_before", "num_experts_after"])
def test_the_experts_of_a_record_are_counted_not_believed(key: str, place: str, huge: int) -> None:
    record = json.loads(seeds.provenances()[0])
    record["format"] = 2
    holder = {"top": record, "layer": record["layers"]["1"], "step": record["steps"][0]}[place]
    if place == "layer" and key == "num_experts_after":
        key = "num_experts_before"
    holder[key] = huge
    with pytest.raises(CheckpointError) as caught:
        parse_provenance(json.dumps(record).encode(), "metadata.json")
    assert len(str(caught.value)) < 600


def test_a_record_within_the_limits_is_read() -> None:
    assert isinstance(parse_provenance(seeds.provenances()[0], "metadata.json"), Provenance)
