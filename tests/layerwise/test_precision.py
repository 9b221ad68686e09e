"""What a checkpoint keeps in float32 is float32 in a run of fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.layerwise.devices import Device
from shardsurgeon.layerwise.loading import ParameterNames
from shardsurgeon.layerwise.model import Model
from shardsurgeon.layerwise.settings import Settings
from tests.families.specimens import fixture, written
from tests.layerwise.streaming import stream, token_ids
from tests.layerwise.test_engine_families import FAMILIES
from tests.oracle.byte_oracle import read_tensors

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]

# Fixture: what transformers' class would round, by the parameter's name behind its layer's.
ROUNDED_BY_TRANSFORMERS = {
    "afmoe": {"mlp.expert_bias"},
    "glm5_next": {"attn_hc.fn", "ffn_hc.fn"},
    "kimi_linear": {"self_attn.forget_gate.A_log", "self_attn.forget_gate.dt_bias"},
    "laguna": {"mlp.gate.e_score_correction_bias"},
    "longcat_flash": {"mlp.router.classifier.weight", "mlp.router.e_score_correction_bias"},
    "minimax_m2": {"mlp.gate.weight", "mlp.e_score_correction_bias"},
    "minimax_m3": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    "nemotron_h": {"mixer.A_log", "mixer.D", "mixer.dt_bias"},
    "qwen3_5_moe": {"linear_attn.A_log", "linear_attn.norm.weight"},
    "qwen3_next": {"linear_attn.A_log"},
    "step3p7": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
}
# Of these the classes say themselves that they are float32.
BY_THEIR_CLASS = ("deepseek_v3", "ernie4_5_moe", "lfm2_moe")
# Stored in F32 and not float32: tables of decays, multiplied with states of the run's dtype.
TABLES = {"diagonal_decay", "key_decay", "query_decay", "slope_rate"}


def opened(folder: Path, dtype: str) -> Model:
    checkpoint = open_checkpoint(folder)
    with silence_hub(), torch.inference_mode():
        anatomy, settings = read_anatomy(checkpoint), Settings(dtype=dtype)
        model = Model(checkpoint, anatomy, settings, Device("cpu"))
        model.prepare(token_ids((9,))[0])
    return model


def filled(model: Model) -> dict[str, Tensor]:
    """Every parameter of every layer, by the name of the weight that it is made of."""
    found: dict[str, Tensor] = {}
    for group in model.groups():
        with silence_hub(), model.filled(group):
            found |= parameters(model, model._names, [n for i in group for n in dense(model, i)])
    if mtp := model.mtp:
        with silence_hub(), model.filled_mtp(mtp):
            found |= parameters(model, mtp.names, list(mtp.dense))
    return found


def dense(model: Model, layer: int) -> list[str]:
    return list(model._layer(layer).dense)


def parameters(model: Model, names: ParameterNames, weights: list[str]) -> dict[str, Tensor]:
    values = model._text.model.state_dict()
    targets = {name: names.target(name) for name in weights}
    return {n: values[target.parameter].clone() for n, target in targets.items() if target}


def assert_kept(folder: Path) -> set[str]:
    """That F32 tensors are what is stored, to the last bit; returns their names."""
    found = filled(opened(folder, "bfloat16"))
    wide = {n: t for n, t in read_tensors(folder).items() if t.dtype == torch.float32}
    checked = {n for n in wide.keys() & found.keys() if n.split(".")[-1] not in TABLES}
    for name in checked:
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name].flatten(), wide[name].flatten()), name
    return checked


@pytest.mark.parametrize("name", [*ROUNDED_BY_TRANSFORMERS, *BY_THEIR_CLASS])
def test_what_is_stored_in_float32_is_not_rounded(name: str, tmp_path: Path) -> None:
    assert assert_kept(written(fixture(name), tmp_path))


@pytest.mark.slow
def test_no_family_has_a_float32_tensor_that_is_rounded(tmp_path: Path, loop: str) -> None:
    stride = 1 if loop == "long" else 10
    counts = [len(assert_kept(written(fixture(n), tmp_path / n))) for n in FAMILIES[::stride]]
    assert sum(count > 0 for count in counts) >= len(counts) // 3


@pytest.mark.parametrize("name", ROUNDED_BY_TRANSFORMERS)
def test_only_what_transformers_would_round_needs_the_rule(name: str, tmp_path: Path) -> None:
    model = opened(written(fixture(name), tmp_path), "bfloat16")
    behind = {kept.split("layers.")[1].partition(".")[2] for kept in model._loader.kept}
    assert behind == ROUNDED_BY_TRANSFORMERS[name]


def test_a_run_in_float32_tries_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "_kept_in_float32", lambda *given: pytest.fail("tried"))
    assert opened(written(fixture("minimax_m2"), tmp_path), "float32")._loader.kept == frozenset()


def test_a_checkpoint_in_float32_throughout_is_rounded_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    """All but what chooses experts: the router's product is of the run's dtype in this class."""
    made = fixture("laguna")
    whole = replace(made, tensors={n: t.float() for n, t in made.tensors.items()})
    found = filled(opened(written(whole, tmp_path), "bfloat16"))
    wide = {n.rpartition(".")[2] for n, t in found.items() if t.dtype == torch.float32}
    assert wide == {"e_score_correction_bias"}


BIASES = ("expert_bias", "correction_bias", "router_bias")
MTP_LAYER = "model.layers.3."
Scores = Callable[[Tensor], Tensor]


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


# Fixture: transformers' module and its router's class; what its scores are of the logits.
ROUTERS: dict[str, tuple[str, str, Scores]] = {
    "afmoe": ("afmoe", "AfmoeTokenChoiceRouter", torch.sigmoid),
    "laguna": ("laguna", "LagunaTopKRouter", torch.sigmoid),
    "longcat_flash": ("longcat_flash", "LongcatFlashTopkRouter", softmax),
    "minimax_m2": ("minimax_m2", "MiniMaxM2TopKRouter", torch.sigmoid),
    "minimax_m3": ("minimax_m3_vl", "MiniMaxM3VLTopKRouter", torch.sigmoid),
    "step3p7": ("step3p7", "Step3p7TopKRouter", torch.sigmoid),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_biases_of_7_that_differ_by_a_tenth_choose_as_in_float32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has 0.03 between two numbers at 7."""
    module, class_name, scores = ROUTERS[name]
    made = fixture(name)
    generator = torch.Generator().manual_seed(3)
    biases = {
        n: 7 + 0.1 * torch.randn(tensor.shape, generator=generator)
        for n, tensor in sorted(made.tensors.items())
        if n.endswith(BIASES) and "mtp" not in n and not n.startswith(MTP_LAYER)
    }
    router: Any = getattr(
        import_module(f"transformers.models.{module}.modeling_{module}"), class_name
    )
    own, seen = router.forward, []

    def watched(self: Any, *given: Any) -> Any:
        result = own(self, *given)
        seen.append((result[0].float(), result[2]))
        return result

    monkeypatch.setattr(router, "forward", watched)
    folder = written(replace(made, tensors=made.tensors | biases), tmp_path)
    ids = token_ids((300,))
    found = stream(folder, ids, tmp_path / "store", dtype="bfloat16")
    choices = [(logits, chosen) for logits, chosen in seen if logits.any()]
    assert len(choices) == len(biases) == len(found)
    for (logits, chosen), bias, layer in zip(choices, biases.values(), found, strict=True):
        expected = (scores(logits) + bias).topk(chosen.shape[1]).indices
        assert torch.equal(chosen.sort().values, expected.sort().values)
        counts = torch.bincount(expected.flatten(), minlength=len(bias))
        assert found[layer].counts.tolist() == counts[: found[layer].num_experts].tolist()
        rounded = (scores(logits) + bias.bfloat16()).topk(chosen.shape[1]).indices
        assert not torch.equal(expected.sort().values, rounded.sort().values)
