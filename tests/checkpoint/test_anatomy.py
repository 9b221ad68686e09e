"""Layers, experts and routers are found; a tensor that no rule claims is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced
from shardsurgeon.errors import ConfigError, FamilyError, InputError
from shardsurgeon.families.schema import parse_family
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from tests.support import tiny


def anatomy(**arguments) -> Anatomy:
    return read_anatomy(open_checkpoint(tiny.source(**arguments)))


def with_tensor(name: str, *shape: int) -> dict:
    return {"weights": {**tiny.tensors(), name: np.zeros(shape, np.float32)}}


def without_tensor(name: str) -> dict:
    return {"weights": {key: value for key, value in tiny.tensors().items() if key != name}}


def test_layers_and_sizes_are_read_from_headers_and_config() -> None:
    found = anatomy()
    assert [layer.index for layer in found.main_layers] == [1, 2]
    assert [layer.index for layer in found.mtp_layers] == [3]
    assert (found.num_experts, found.top_k, found.num_layers) == (8, 2, 3)
    # Two matrices of 4 x 6, a router row of 6 and one bias, four bytes each.
    each = 4 * (2 * 4 * 6 + 6 + 1)
    assert found.expert_nbytes == (each, each)
    whole = sum(values.nbytes for values in tiny.tensors().values())
    assert found.total_nbytes(8) == whole
    assert found.total_nbytes(5) == whole - 3 * 3 * each
    assert found.total_nbytes(8, drop_mtp=True) == sum(
        values.nbytes for name, values in tiny.tensors().items() if "layers.3" not in name
    )


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.2.mlp.experts.7.up_proj.weight", ExpertTensor(2, 7, 27, 28)),
        ("model.layers.1.mlp.gate.weight", Sliced(1, 0, 0, True)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Sliced(3, 0, 0, True)),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", Carried()),
        ("model.layers.0.mlp.up_proj.weight", Carried()),
        ("model.layers.3.eh_proj.weight", Carried(mtp=True)),
        ("lm_head.weight", Carried()),
    ],
)
def test_each_tensor_has_its_role(name: str, role: object) -> None:
    assert anatomy().role(TensorRecord(name, "F32", (8, 6), 0, 192)) == role


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.07.up_proj.weight",
        "model.layers.2.mlp.experts..up_proj.weight",
        "model.layers.2.mlp.experts.\u0667.up_proj.weight",
    ],
)
def test_a_name_that_is_almost_an_experts_is_refused_also_right_behind_one(name: str) -> None:
    found = anatomy()
    shape = "F32", (4, 6), 0, 96
    assert found.role(TensorRecord("model.layers.2.mlp.experts.6.up_proj.weight", *shape))
    with pytest.raises(FamilyError, match="no rule"):
        found.role(TensorRecord(name, *shape))


def test_the_order_in_which_tensors_are_asked_for_does_not_change_their_roles() -> None:
    names = [name for name in tiny.tensors() if "experts." in name]
    shape = "F32", (8, 6), 0, 192
    alone = {name: anatomy().role(TensorRecord(name, *shape)) for name in names}
    together = anatomy()
    for order in (names, names[::-1], sorted(names, key=lambda name: name[::-1])):
        assert {name: together.role(TensorRecord(name, *shape)) for name in order} == alone


def test_an_expert_of_two_digits_is_renamed_in_its_own_place_only() -> None:
    name = "model.layers.12.mlp.experts.12.up_proj.weight_12"
    role = ExpertTensor(12, 12, 28, 30)
    assert role.renamed(name, 3) == "model.layers.12.mlp.experts.3.up_proj.weight_12"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"content": tiny.config(n_routed_experts=None)}, ConfigError, "no expert count"),
        ({"content": tiny.config(num_hidden_layers=None)}, ConfigError, "num_hidden_layers"),
        ({"content": tiny.config(n_routed_experts="8")}, ConfigError, "'8', expected a whole"),
        ({"content": tiny.config(n_routed_experts=9)}, FamilyError, "expected 9"),
        ({"content": tiny.config(num_experts=16)}, ConfigError, "says 8 and 16 experts"),
        (
            {"content": tiny.config(num_hidden_layers=2)},
            ConfigError,
            "says 2 layers and 1 MTP layers, the shards have a layer 3",
        ),
        ({"content": tiny.config(model_type="llama", architectures=["L"])}, FamilyError, "llama"),
        (without_tensor("model.layers.2.mlp.gate.weight"), FamilyError, "no router weight"),
        (
            with_tensor("model.layers.1.mlp.experts.8.up_proj.weight", 4, 6),
            FamilyError,
            "has an expert 8",
        ),
        (
            with_tensor("model.layers.1.mlp.experts.03.up_proj.weight", 4, 6),
            FamilyError,
            "model.layers.1.mlp.experts.03.up_proj.weight",
        ),
        (
            with_tensor("model.layers.2.mlp.expert_scale", 8),
            FamilyError,
            "model.layers.2.mlp.expert_scale: shape [8] has 8 in dimension 0",
        ),
        (
            with_tensor("model.layers.2.mlp.oddity", 3),
            FamilyError,
            "model.layers.2.mlp.oddity: shape [3] is in an MoE block",
        ),
        (
            with_tensor("model.layers.2.per_expert_scale", 8),
            FamilyError,
            "model.layers.2.per_expert_scale",
        ),
        (
            with_tensor("talker.layers.0.mlp.experts.0.up_proj.weight", 4, 6),
            FamilyError,
            "talker.layers.0.mlp.experts.0.up_proj.weight",
        ),
    ],
)
def test_what_is_missing_or_claimed_by_no_rule_is_refused_by_name(arguments, error, says) -> None:
    with pytest.raises(error) as caught:
        anatomy(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize("count", [0, 1])
def test_a_dense_model_of_a_known_family_is_refused(count: int) -> None:
    dense = {name: v for name, v in tiny.tensors().items() if "layers.0" in name}
    content = tiny.config(n_routed_experts=count)
    with pytest.raises(FamilyError, match="a dense model has none to prune"):
        anatomy(content=content, weights=dense, shard_of=lambda name: 1)


@pytest.mark.parametrize("odd", ["model.layers.1.moe.w13", "transformer.blocks.1.switch.up"])
def test_experts_that_no_rule_finds_are_not_called_a_dense_model(odd: str) -> None:
    weights = {name: v for name, v in tiny.tensors().items() if "layers.0" in name}
    weights[odd] = np.zeros((8, 4, 6), np.float32)
    with pytest.raises(FamilyError) as caught:
        anatomy(weights=weights, shard_of=lambda name: 1)
    for words in ("none of its 4 tensors", "8 experts per layer", odd, "--family FILE"):
        assert words in str(caught.value)
    assert "dense" not in str(caught.value)


def test_an_expert_count_in_another_place_is_not_called_a_dense_model() -> None:
    content = tiny.config(n_routed_experts=None, text_config={"num_experts": 8})
    with pytest.raises(ConfigError, match=r"says text_config.num_experts 8; .*--family FILE") as it:
        anatomy(content=content)
    assert "dense" not in str(it.value)


def test_an_unknown_model_type_is_told_what_is_supported_and_how_to_add_a_family() -> None:
    with pytest.raises(InputError) as caught:
        anatomy(content=tiny.config(model_type="kimi_k52", architectures=[]))
    for words in (
        "`shardsurgeon families`",
        "did you mean kimi_k2?",
        "--family FILE",
        "CONTRIBUTING.md",
    ):
        assert words in str(caught.value)


GLM = tiny.config(model_type="glm4_moe_lit", architectures=[])
TEXT = {key: GLM[key] for key in ("n_routed_experts", "num_experts_per_tok", "num_hidden_layers")}


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ({"content": GLM}, "glm4_moe_lite"),
        # No family near in name has its counts there.
        ({"content": {"model_type": "glm4_moe_lit", "text": TEXT}}, None),
        ({"content": {**TEXT, "model_type": "kimi_k25_", "num_hidden_layers": None}}, None),
        # The next in name takes its counts from a section of the config.
        ({"content": {"model_type": "kimi_k2_", "text_config": TEXT}}, None),
        # The counts fit, and the tensors have other names.
        ({"content": GLM, "weights": {"blocks.1.ffn.e.0.w": np.zeros((8, 2), "f4")}}, None),
        # It would fit by name, if it could be pruned.
        ({"content": tiny.config(model_type="ernie4_5_moe_v", architectures=[])}, "none by far"),
    ],
)
def test_a_family_is_suggested_only_where_it_would_fit(arguments, suggestion) -> None:
    with pytest.raises(FamilyError) as caught:
        anatomy(**arguments)
    said = str(caught.value)
    if suggestion == "none by far":
        assert "ernie" not in said.partition("did you mean")[2]
    elif suggestion is None:
        assert "did you mean" not in said
    else:
        assert f"did you mean {suggestion}?" in said


def test_a_dimension_that_happens_to_equal_the_expert_count_does_no_harm_beside_the_block() -> None:
    assert (
        anatomy().role(
            TensorRecord("model.layers.1.self_attn.o_proj.weight", "F32", (6, 8), 0, 192)
        )
        == Carried()
    )


def test_every_spelling_of_the_count_may_be_present() -> None:
    assert anatomy(content=tiny.config(num_local_experts=8)).num_experts == 8
    assert json.loads(tiny.files()["config.json"])["n_routed_experts"] == 8


OWN = """
facts = "made up"
model_types = ["novel"]
architectures = []
config = { num_experts = ["num_experts"], top_k = ["top_k"] }
[tensors]
layers = ["layers.{layer}"]
blocks = ["moe"]
experts = ["moe.experts.{expert}.{part}"]
routers = ["moe.gate.weight"]
"""


@pytest.mark.parametrize("written", ["moe", "mlp"])
def test_a_dense_mlp_beside_the_experts_is_theirs_only_where_it_holds_experts(written: str) -> None:
    """A save by transformers calls the block `mlp`; elsewhere that is another part of the layer."""
    shapes = {f"{written}.gate.weight": (4, 6), f"{written}.experts.gate_up_proj": (4, 10, 6)}
    shapes |= {"mlp.up_proj.weight": (5, 6)}
    weights = {
        f"layers.{n}.{name}": np.zeros(s, "f4") for n in (0, 1) for name, s in shapes.items()
    }
    content = {"model_type": "novel", "num_experts": 4, "top_k": 1, "num_hidden_layers": 2}
    source = tiny.source(content=content, weights=weights)
    checkpoint = replace(open_checkpoint(source), family=parse_family(OWN, "novel"))
    if written == "moe":
        assert read_anatomy(checkpoint).num_experts == 4
        return
    with pytest.raises(
        FamilyError, match=r"mlp\.up_proj\.weight: .* is in an MoE block and no rule"
    ):
        read_anatomy(checkpoint)
