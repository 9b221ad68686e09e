"""Files that the index does not list: which of them are parts of the model, and which are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import CheckpointError, SourceReadError
from shardsurgeon.storage.source import MemorySource
from tests.support import tiny

INDEX = "model.safetensors.index.json"
HEAD = "mtp.safetensors"
FIRST = "model-00001-of-00002.safetensors"


def apart(weights: tiny.Tensors, part: str, config: dict[str, object]) -> dict[str, bytes]:
    """A model whose index does not know the tensors with `part` in their names; these lie in
    HEAD."""
    listed = {name: tensor for name, tensor in weights.items() if part not in name}
    head = {name: tensor for name, tensor in weights.items() if part in name}
    return {**tiny.files(config, listed), HEAD: save(head)}


def qwen3_next() -> tuple[tiny.Tensors, dict[str, object]]:
    """Names and counts as that family has them; its config does not count the MTP layer."""
    weights = {
        n.replace("model.layers.3.eh_proj", "mtp.fc").replace("model.layers.3", "mtp.layers.0"): w
        for n, w in tiny.tensors().items()
        if "bias" not in n and "shared" not in n
    }
    return weights, {
        "model_type": "qwen3_next",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
    }


def deepseek_like(model_type: str) -> tuple[tiny.Tensors, dict[str, object]]:
    return tiny.tensors(), tiny.config(model_type=model_type)


def qwen3_5() -> tuple[tiny.Tensors, dict[str, object]]:
    weights, text = qwen3_next()
    weights = {
        n.replace("model.layers", "model.language_model.layers"): t for n, t in weights.items()
    }
    text |= {"model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 1}
    return weights, {"model_type": "qwen3_5_moe", "text_config": text}


MODELS = {
    "deepseek_v3": (*deepseek_like("deepseek_v3"), "layers.3."),
    "glm4_moe": (*deepseek_like("glm4_moe"), "layers.3."),
    "qwen3_next": (*qwen3_next(), "mtp."),
    "qwen3_5_moe": (*qwen3_5(), "mtp."),
}


def opened(files: dict[str, bytes]) -> Checkpoint:
    return open_checkpoint(MemorySource(files, name="tiny"))


@pytest.mark.parametrize("family", MODELS)
def test_a_head_that_the_index_forgot_is_taken_in_and_said(family: str) -> None:
    weights, config, part = MODELS[family]
    checkpoint = opened(apart(weights, part, config))
    assert {record.name for record in checkpoint.records} == set(weights)
    assert [shard.file for shard in checkpoint.shards][-1] == HEAD
    assert checkpoint.unindexed == ()
    assert set(checkpoint.unlisted) == {name for name in weights if part in name}
    (note,) = [note for note in checkpoint.notes if HEAD in note]
    assert f"is taken in: its {len(checkpoint.unlisted)} tensors" in note
    anatomy = read_anatomy(checkpoint)
    assert [layer.index for layer in anatomy.mtp_layers] == [3]
    assert anatomy.absent_mtp_layers == 0


def test_the_count_that_is_read_is_the_one_that_decides() -> None:
    """A wrapper's config says 0 where only the text model's count is read."""
    weights, config, part = MODELS["qwen3_5_moe"]
    files = apart(weights, part, {**config, "mtp_num_hidden_layers": 0})
    assert {record.name for record in opened(files).records} == set(weights)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("half", ["experts", "gate.weight"])
def test_so_is_half_a_head_whose_other_half_is_listed(family: str, half: str) -> None:
    weights, config, part = MODELS[family]
    listed = {name: t for name, t in weights.items() if part not in name or half not in name}
    rest = {name: t for name, t in weights.items() if name not in listed}
    checkpoint = opened({**tiny.files(config, listed), HEAD: save(rest)})
    assert {record.name for record in checkpoint.records} == set(weights)


@pytest.mark.parametrize("part", ["layers.2.", "layers.1.self_attn", "layers.2.mlp.experts.5."])
def test_so_are_decoder_layers_and_parts_of_them(part: str) -> None:
    weights, config, _ = MODELS["deepseek_v3"]
    files = apart(weights, part, config)
    assert {record.name for record in opened(files).records} == set(weights)


def test_so_is_a_head_beside_a_single_file_without_an_index() -> None:
    weights, config, part = MODELS["qwen3_next"]
    files = apart(weights, part, config)
    alone = {"config.json": files["config.json"], HEAD: files[HEAD]}
    listed = {name: t for name, t in weights.items() if part not in name}
    checkpoint = opened({**alone, "model.safetensors": save(listed)})
    assert {record.name for record in checkpoint.records} == set(weights)
    assert checkpoint.index_metadata is None
    assert checkpoint.unlisted == ()


def test_a_family_of_the_users_own_knows_its_head(tmp_path) -> None:
    weights, config, part = MODELS["qwen3_next"]
    files = apart(weights, part, {**config, "model_type": "mine"})
    assert opened(files).unindexed == (HEAD,)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    declaration = tmp_path / "mine.toml"
    declaration.write_text(
        'like = "qwen3_next"\nfacts = "a test"\nmodel_types = ["mine"]\narchitectures = []\n'
    )
    checkpoint = open_model(tmp_path, str(declaration))
    assert checkpoint.unindexed == ()
    assert [layer.index for layer in read_anatomy(checkpoint).mtp_layers] == [3]


def test_a_family_read_off_the_model_knows_its_head(tmp_path) -> None:
    weights, _, part = MODELS["deepseek_v3"]
    for name, data in apart(weights, part, tiny.config(model_type="odd", architectures=[])).items():
        (tmp_path / name).write_bytes(data)
    checkpoint = open_model(tmp_path, "auto")
    assert {record.name for record in checkpoint.records} == set(weights)
    assert any("is taken in" in note for note in checkpoint.notes)
    assert any("--family auto" in note for note in checkpoint.notes)


def test_what_the_index_lists_is_not_taken_a_second_time() -> None:
    """The head's file has a copy of the embeddings, which engines that read it alone want."""
    weights, config, part = MODELS["deepseek_v3"]
    files = apart(weights, part, config)
    shared = "model.embed_tokens.weight"
    files[HEAD] = save({**load(files[HEAD]), shared: weights[shared] * 2})
    checkpoint = opened(files)
    assert checkpoint.num_tensors == len(weights)
    assert checkpoint.superseded == ((HEAD, shared),)


def packed(weights: tiny.Tensors) -> tiny.Tensors:
    """Expert weights as a quantization names them."""
    return {
        name.replace(".weight", ".weight_packed") if ".experts." in name else name: t.astype("i1")
        for name, t in weights.items()
    }


def listed_without_head(weights: tiny.Tensors) -> tiny.Tensors:
    return {name: t for name, t in weights.items() if "layers.3." not in name}


WEIGHTS = tiny.tensors()
HALF = {
    name: t[:4] if "gate." in name else t
    for name, t in WEIGHTS.items()
    if not any(f"experts.{n}." in name for n in range(4, 8))
}
BESIDE: dict[str, tuple[tiny.Tensors, tiny.Tensors, dict[str, object]]] = {
    "all of it in another shard": (WEIGHTS, WEIGHTS, tiny.config()),
    "the unpruned model": (HALF, WEIGHTS, tiny.config(n_routed_experts=4)),
    "experts of the unpruned model": (
        HALF,
        {n: t for n, t in WEIGHTS.items() if "experts.6." in n},
        tiny.config(n_routed_experts=4),
    ),
    "the model before it was quantized": (packed(WEIGHTS), WEIGHTS, tiny.config()),
    "a layer before it was quantized, and a head": (
        packed(listed_without_head(WEIGHTS)),
        {n: t for n, t in WEIGHTS.items() if "layers.2." in n or "layers.3." in n},
        tiny.config(),
    ),
    "a deeper model": (
        WEIGHTS,
        {n.replace("layers.2.", "layers.7."): t for n, t in WEIGHTS.items() if "layers.2." in n},
        tiny.config(),
    ),
    "a head that the config says is gone": (
        listed_without_head(WEIGHTS),
        {n: t for n, t in WEIGHTS.items() if "layers.3." in n},
        tiny.config(num_nextn_predict_layers=0),
    ),
    "an adapter of PEFT": (
        WEIGHTS,
        {"base_model.model.model.layers.3.q.lora_A.weight": np.ones((2, 6), np.float32)},
        tiny.config(),
    ),
    "an adapter of MLX": (
        WEIGHTS,
        {"model.layers.1.self_attn.o_proj.lora_a": np.ones((2, 6), np.float32)},
        tiny.config(),
    ),
    "scores by module": (
        listed_without_head(WEIGHTS),
        {f"model.layers.{n}.mlp": np.ones(8, np.float32) for n in (1, 2, 3)},
        tiny.config(),
    ),
    "scores of the head": (
        listed_without_head(WEIGHTS),
        {"model.layers.3.mlp": np.ones(8, np.float32)},
        tiny.config(),
    ),
    "what is of no layer": (
        WEIGHTS,
        {"control.vector": np.ones((4, 6), np.float32)},
        tiny.config(),
    ),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_only_lies_beside_the_model_is_left_out_and_said(what: str) -> None:
    listed, beside, config = BESIDE[what]
    checkpoint = opened({**tiny.files(config, listed), "beside.safetensors": save(beside)})
    assert {record.name for record in checkpoint.records} == set(listed)
    assert checkpoint.unindexed == ("beside.safetensors",)
    assert "beside.safetensors is not in the index and is left out" in checkpoint.notes


@pytest.mark.parametrize(
    "damage", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"12345678"]
)
def test_a_file_that_cannot_be_read_does_not_hinder_the_others(damage: bytes) -> None:
    weights, config, part = MODELS["deepseek_v3"]
    files = apart(weights, part, config)
    checkpoint = opened({**files, "also.safetensors": damage})
    assert checkpoint.num_tensors == len(weights)
    assert checkpoint.unindexed == ("also.safetensors",)
    assert any(
        "also.safetensors is not in the index, is not a whole" in n for n in checkpoint.notes
    )


@pytest.mark.parametrize("remote", [False, True])
def test_neither_does_one_that_may_not_be_read(remote: bool) -> None:
    class Guarded(MemorySource):
        def read(self, name: str, begin: int, end: int) -> bytes:
            if name == "secret.safetensors":
                raise SourceReadError(name, "cannot be read")
            return super().read(name, begin, end)

    weights, config, part = MODELS["deepseek_v3"]
    files = {**apart(weights, part, config), "secret.safetensors": bytes(64)}
    checkpoint = open_checkpoint(Guarded(files, remote=remote))
    assert checkpoint.num_tensors == len(weights)
    assert checkpoint.unindexed == ("secret.safetensors",)


def test_two_heads_are_refused_by_name() -> None:
    weights, config, part = MODELS["deepseek_v3"]
    files = apart(weights, part, config)
    with pytest.raises(CheckpointError) as caught:
        opened({**files, "mtp-fp8.safetensors": files[HEAD]})
    assert "which mtp-fp8.safetensors holds too" in str(caught.value)
    assert "and 19 more" in str(caught.value)


@pytest.mark.parametrize(("promised", "absent"), [(0, 0), (1, 1), (3, 3)])
def test_mtp_layers_that_the_config_promises_and_nobody_has_are_counted(promised, absent) -> None:
    config = tiny.config(num_nextn_predict_layers=promised)
    files = tiny.files(config, listed_without_head(WEIGHTS))
    assert read_anatomy(opened(files)).absent_mtp_layers == absent


def test_an_index_of_the_first_shard_alone_does_not_lose_the_second() -> None:
    files = tiny.files()
    index = json.loads(files[INDEX])
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file == FIRST}
    checkpoint = opened({**files, INDEX: json.dumps(index).encode()})
    assert {record.name for record in checkpoint.records} == set(WEIGHTS)
