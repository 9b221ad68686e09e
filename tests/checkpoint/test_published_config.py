"""How a family's `[transformers]` table changes a published config.json."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from shardsurgeon.checkpoint.transformers_model import as_transformers_reads, name_in_transformers
from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import TransformersView, parse_family

KNOWN = {"deepseek_v3", "llava", "step3p7", "step3p5"}
FAMILY = """
model_types = ["it"]
architectures = []
facts = "made up"
config = { num_experts = ["e"], top_k = ["k"] }
tensors = { layers = ["l.{layer}"], blocks = ["m"], routers = ["m.g"], experts = ["m.{expert}"] }
"""


def known(model_type: object) -> bool:
    return model_type in KNOWN


def read(config: dict[str, Any], view: TransformersView) -> dict[str, Any] | None:
    before = deepcopy(config)
    result = as_transformers_reads(config, view, known)
    assert config == before
    return result


def test_a_config_that_transformers_knows_stays_as_it_is() -> None:
    config = {"model_type": "deepseek_v3", "hidden_size": 64}
    assert read(config, TransformersView()) == config


def test_a_model_type_it_lacks_is_replaced_wherever_it_stands() -> None:
    view = TransformersView(model_types=(("kimi_k2", "deepseek_v3"),))
    config = {"model_type": "llava", "text_config": {"model_type": "kimi_k2"}}
    expected = {"model_type": "llava", "text_config": {"model_type": "deepseek_v3"}}
    assert read(config, view) == expected


def test_a_model_type_it_has_meanwhile_learned_is_not_replaced() -> None:
    view = TransformersView(model_types=(("step3p5", "deepseek_v3"),))
    assert read({"model_type": "step3p5"}, view) == {"model_type": "step3p5"}


def test_a_value_is_given_where_transformers_looks_for_it() -> None:
    view = TransformersView(config_keys=(("vision.vt_size", "vision.size"), ("absent", "there")))
    config = {"model_type": "llava", "vision": {"vt_size": 3}}
    expected = {"model_type": "llava", "vision": {"vt_size": 3, "size": 3}}
    assert read(config, view) == expected


def test_the_text_model_of_an_unknown_wrapper_is_read_alone() -> None:
    view = TransformersView(text="text_config")
    text = {"model_type": "deepseek_v3"}
    assert read({"model_type": "new_vl", "text_config": text}, view) == text
    whole = {"model_type": "llava", "text_config": text}
    assert read(whole, view) == whole


def test_a_model_that_is_built_inside_of_a_wrapper_only_is_wrapped() -> None:
    view = TransformersView(within="step3p7")
    text = {"model_type": "step3p5"}
    whole = {"model_type": "step3p7", "text_config": text}
    assert read(text, view) == whole
    assert read(whole, view) == whole


@pytest.mark.parametrize("config", [{}, {"model_type": "kimi_k2"}, {"model_type": None}])
def test_an_unknown_model_is_no_config(config: dict[str, Any]) -> None:
    assert read(config, TransformersView()) is None


def test_parts_of_tensor_names_are_spelt_as_transformers_does() -> None:
    view = TransformersView(tensor_names=((".moe.", ".mlp."),))
    assert name_in_transformers("layers.1.moe.gate.weight", view) == "layers.1.mlp.gate.weight"


def test_a_family_file_says_it_in_one_table() -> None:
    table = '[transformers]\nmodel_types = { it = "deepseek_v3" }\nunknown = "why"\n'
    view = parse_family(FAMILY + table, "it.toml").transformers
    assert view == TransformersView(model_types=(("it", "deepseek_v3"),), unknown="why")


def test_a_table_of_another_kind_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"\[transformers\] model_types: "):
        parse_family(f'{FAMILY}[transformers]\nmodel_types = ["it"]\n', "it.toml")
