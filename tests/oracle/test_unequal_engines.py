"""A model whose layers keep different numbers of experts stops transformers, family by family.

Each family's published config is pruned to unequal counts and the model built from the result on
the meta device, by transformers alone. It must refuse, because it would build every layer with the
largest count, or the family's declaration names it among those that misread such models.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.transformers_model import (
    MetaModel,
    as_transformers_reads,
    is_known,
    silence_hub,
)
from shardsurgeon.errors import UsageError
from shardsurgeon.families.schema import all_families
from shardsurgeon.pruning.layer_counts import engines_on_unequal
from tests.families.specimens import builders, specimen
from tests.families.unequal import pruned_config_of

pytestmark = pytest.mark.oracle

NAMES = sorted(builders())
# Published configs that transformers reads only with code of the model's own, or not at all.
UNREAD = [
    *("arctic", "bailing_hybrid_vision", "bailing_moe", "bailing_moe_v2", "deepseek_ocr"),
    *("deepseek_v41", "deepseek_v41_even", "deepseek_vl2", "ernie4_5_moe_remote", "grok1"),
    *("hunyuan_v1_moe_lists", "interns1", "internvl_gpt_oss", "internvl_qwen3_moe", "kimi_k2"),
    *("kimi_k3", "kimi_vl", "longcat_flash_ngram", "mimo_v2_omni", "minimax_m1"),
    *("mistral_native", "nemotron_h_puzzle", "ovis2_6_moe", "sarvam_mla", "sarvam_moe"),
    *("stacked_nvfp4", "step3_text", "step3_vl", "step3p5", "step3p5_quantized", "step5"),
]
READ = [name for name in NAMES if name not in UNREAD]
# Their configs check their layers, and refuse what differs before any count is read.
EARLIER = {
    "dots3_note_text": "is not homogeneous across layers",
    "hunyuan_v1_moe_lists": "expected int, got list",
    "mimo_v2_flash": "mutually exclusive `sliding_window` and `attention_chunk_size`",
    "mimo_v2_omni": "mutually exclusive `sliding_window` and `attention_chunk_size`",
}
STOPS = "AmbiguousGlobalPerLayerAttributeError"


def built(config: dict[str, Any], folder: Path) -> str:
    """What transformers makes of a folder with this config: a class, or its error."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with silence_hub(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            # transformers' own code is asked, and how weights are stored does not matter here.
            for key in ("auto_map", "quantization_config"):
                settings.__dict__.pop(key, None)
            with torch.device("meta"):
                return type(_model(settings)).__name__
        except Exception as error:  # of any kind: it stops the engine
            return f"error: {type(error).__name__}: {error}"


def _model(settings: Any) -> Any:
    """The model of the class that the config names, else of the one for its type."""
    named = getattr(transformers, (settings.architectures or [""])[0], None)
    if getattr(named, "config_class", None) is type(settings):
        assert named is not None
        return named(settings)
    try:
        return transformers.AutoModelForCausalLM.from_config(settings)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return transformers.AutoModelForImageTextToText.from_config(settings)


def sections(config: dict[str, Any], anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    """The parts of a pruned config that have overrides."""
    for at in anatomy.family.config.at:
        node: Any = config
        for key in filter(None, at.split(".")):
            node = node.get(key, {})
        if "per_layer_config" in node:
            yield node


def test_every_family_that_is_pruned_is_looked_at() -> None:
    looked_at = {read_anatomy(specimen(name).checkpoint()).family.name for name in NAMES}
    assert looked_at == {family.name for family in all_families() if not family.refusal}


@pytest.mark.parametrize("name", READ)
def test_unequal_counts_stop_transformers(name: str, tmp_path: Path) -> None:
    anatomy = read_anatomy(specimen(name).checkpoint())
    before = built(specimen(name).config, tmp_path / "source")
    assert not before.startswith("error"), before
    after = built(pruned_config_of(name, unequal=True), tmp_path / "unequal")
    if "transformers" in anatomy.family.config.misread_by:
        assert after == before
    elif name in EARLIER:
        assert after.startswith("error") and EARLIER[name] in after
    else:
        names = {dotted.split(".")[0] for dotted in anatomy.family.config.overrides}
        assert any(after.startswith(f"error: {STOPS}: '{each}'") for each in names), after


@pytest.mark.parametrize("name", READ)
def test_equal_counts_are_built_as_the_source_is(name: str, tmp_path: Path) -> None:
    before = built(specimen(name).config, tmp_path / "source")
    assert built(pruned_config_of(name, unequal=False), tmp_path / "equal") == before


@pytest.mark.parametrize("name", [name for name in READ if name not in EARLIER])
def test_no_other_spelling_stops_transformers(name: str, tmp_path: Path) -> None:
    """The config class looks at the name that it stores, and at that alone."""
    anatomy = read_anatomy(specimen(name).checkpoint())
    keys = anatomy.family.config
    stop = set()
    for dotted in {*keys.num_experts, *keys.overrides}:
        config = deepcopy(pruned_config_of(name, unequal=True))
        for section in sections(config, anatomy):
            *outer, last = dotted.split(".")
            for layer, override in section["per_layer_config"].items():
                place = override
                for key in keys.overrides[0].split("."):
                    place = place[key]
                alone: dict[str, Any] = {last: place}
                for key in reversed(outer):
                    alone = {key: alone}
                section["per_layer_config"][layer] = alone
        if STOPS in built(config, tmp_path / "config"):
            stop.add(dotted)
    silent = "transformers" in keys.misread_by
    assert stop <= set(keys.overrides) and bool(stop) != silent


@pytest.mark.parametrize("name", UNREAD)
def test_what_transformers_does_not_read_it_refuses(name: str, tmp_path: Path) -> None:
    """Where it has the same model under another type, the name is the one that stops it there."""
    assert built(pruned_config_of(name, unequal=True), tmp_path / "unequal").startswith("error")
    assert built(specimen(name).config, tmp_path / "source").startswith("error")
    anatomy = read_anatomy(specimen(name).checkpoint())
    view = anatomy.family.transformers
    if as_transformers_reads(specimen(name).config, view, is_known) is None:
        return
    read = as_transformers_reads(pruned_config_of(name, unequal=True), view, is_known)
    assert read is not None
    with pytest.raises(UsageError) as caught:
        MetaModel(read, name)
    assert EARLIER.get(name, STOPS) in str(caught.value)


SINCE = "(from transformers 5.14 on, older ones load it wrong without a word)"


@pytest.mark.parametrize(
    ("fixture", "says"),
    [
        ("deepseek_v3", f"stock transformers and vLLM would refuse to load it {SINCE}"),
        (
            "deepseek_v41",
            "stock vLLM would load it wrong without a word, stock transformers would refuse to "
            f"load it {SINCE}",
        ),
        (
            "grok2",
            "stock transformers would load it wrong without a word, stock vLLM would refuse to "
            f"load it {SINCE}",
        ),
        ("nemotron_h_puzzle", "of stock engines only vLLM reads a count per layer"),
    ],
)
def test_an_engine_that_misreads_unequal_counts_is_named(fixture: str, says: str) -> None:
    checkpoint = specimen(fixture).checkpoint()
    assert engines_on_unequal(checkpoint.settings, read_anatomy(checkpoint)) == says
