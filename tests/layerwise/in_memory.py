"""The sums that a calibration must find, from the whole model in memory and hooks on it.

Knows nothing of the engine: transformers loads the checkpoint by `from_pretrained`, samples run
one by one, and for every token x that chose expert j the formulas are followed to the letter:
|X_j|, Σ g_j(x), Σ ‖f_j(x)‖₂, Σ g_j(x)·‖f_j(x)‖₂ and the largest component of f_j(x).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
    unpack_from_int32,
)
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    MiniMaxM3VLForCausalLM,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from shardsurgeon.layerwise.accumulators import Accumulators
from tests.families.test_odd_blocks import readable
from tests.oracle import logits_oracle
from tests.oracle.byte_oracle import read_config, read_tensors
from tests.quantization.decoding import decoded

CLASSES: dict[str, Any] = {
    "minimax_m3_text": MiniMaxM3VLForCausalLM,
    "openai_privacy_filter": AutoModelForTokenClassification,
    "qwen3_omni_moe": Qwen3OmniMoeThinkerForConditionalGeneration,
    "qwen3_omni_moe_thinker": Qwen3OmniMoeThinkerForConditionalGeneration,
}
Ids = NDArray[np.int64]


@dataclass
class Sums:
    """The numbers of one layer, as a list over the tokens of each expert."""

    tokens: int = 0
    gates: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    norms: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    largest: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, expert: int, outputs: torch.Tensor, gates: torch.Tensor) -> None:
        self.gates[expert] += gates.double().tolist()
        self.norms[expert] += outputs.double().square().sum(-1).sqrt().tolist()
        self.largest[expert] = max(self.largest[expert], float(outputs.max()))

    def arrays(self, experts: int) -> dict[str, NDArray[np.float64]]:
        """By the names of the accumulators."""
        rows = range(experts)
        gates, norms = self.gates, self.norms
        products = {j: np.multiply(gates[j], norms[j]) for j in rows}
        return {
            "counts": np.array([len(gates[j]) for j in rows], np.float64),
            "weight_sum": np.array([np.sum(gates[j]) for j in rows]),
            "norm_sum": np.array([np.sum(norms[j]) for j in rows]),
            "weighted_norm_sum": np.array([np.sum(products[j]) for j in rows]),
            "norm_square_sum": np.array([np.sum(np.square(norms[j])) for j in rows]),
            "max_activation": np.array([self.largest[j] for j in rows]),
        }


def load(name: str, folder: Path, scratch: Path) -> Any:
    """The whole model in float32, by transformers."""
    folder = _readable(name, folder, scratch)
    nested = any(key in read_config(folder) for key in ("text_config", "vision_config"))
    default = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model, report = CLASSES.get(name, default).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def _readable(name: str, folder: Path, scratch: Path) -> Path:
    """The folder, or a copy that `from_pretrained` can read, quantized weights decoded."""
    if name in ("kimi_k2", "kimi_k25"):
        with mock.patch.object(logits_oracle, "_unpack_int4", _unpack_int4):
            return logits_oracle._readable(folder, scratch)
    if name == "llama4_fp8":
        config, tensors = read_config(folder), read_tensors(folder)
        del config["quantization_config"]
        scaled = {
            n: t.float() * tensors[f"{n}_weight_scale"] if f"{n}_weight_scale" in tensors else t
            for n, t in tensors.items()
            if not n.endswith("_scale")
        }
        return save(config, scaled, scratch / "scaled")
    if "quantization_config" in read_config(folder) or name == "longcat_flash":
        return readable(folder, scratch / "readable")
    return folder


def _unpack_int4(tensors: dict[str, torch.Tensor], section: dict[str, Any]) -> Any:
    """Every packed matrix times its scales in float32: q · scale, 8 values a word."""
    group = section["config_groups"]["group_0"]["weights"]["group_size"]
    out = {n: t for n, t in tensors.items() if "_proj.weight_" not in n}
    for name, words in tensors.items():
        stem = name.removesuffix("_packed")
        if stem != name:
            values = unpack_from_int32(words, 4, torch.Size(tensors[f"{stem}_shape"].tolist()))
            scale = tensors[f"{stem}_scale"].float().repeat_interleave(group, 1)
            out[stem] = values.float() * scale[:, : values.shape[1]]
    return out


def without_quantization(folder: Path, scheme: str, scratch: Path) -> Path:
    """A copy whose experts are decoded by the scheme's own library, in float32."""
    config, tensors = read_config(folder), read_tensors(folder)
    del config["quantization_config"]
    plain = {n: t for n, t in tensors.items() if not re.search(r"\.experts\.\d+\.", n)}
    plain |= {f"{stem}.weight": weight for stem, weight in decoded(folder, scheme).items()}
    return save(config, plain, scratch / "decoded")


def save(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write a checkpoint of one shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def sums(model: Any, samples: Sequence[Ids]) -> dict[int, Sums]:
    """Layer → its numbers over all samples."""
    found: dict[int, Sums] = defaultdict(Sums)
    hooks = []
    for name, module in model.named_modules():
        place = re.search(r"(?<!talker)\.layers\.(\d+)\.", name)
        if place is None or name.startswith("talker"):
            continue
        layer = found[int(place[1])] if _has_experts(name, module) else None
        if layer is not None and _scales_inputs(module):
            hooks.append(module.register_forward_pre_hook(_on_input_scaling_block(layer)))
        elif layer is not None:
            hooks.append(module.register_forward_pre_hook(on_experts(layer)))
    with torch.inference_mode():
        for ids in samples:
            model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return dict(found)


def _has_experts(name: str, module: Any) -> bool:
    last = name.rpartition(".")[2]
    return _scales_inputs(module) or (
        last == "experts" and "Llama4" not in type(module).__name__ and hasattr(module, "down_proj")
    )


def _scales_inputs(module: Any) -> bool:
    return type(module).__name__ == "Llama4TextMoe"


def on_experts(layer: Sums) -> Any:
    def hook(module: Any, given: tuple[Any, ...]) -> None:
        hidden, chosen, gates = given
        layer.tokens += len(hidden)
        experts = module.down_proj.shape[0]
        for expert in range(experts):
            rows, places = torch.where(chosen == expert)
            if len(rows):
                layer.add(expert, _output(module, expert, hidden[rows]), gates[rows, places])

    return hook


def _output(module: Any, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """The module's own output where every token chooses one expert with weight 1."""
    chosen = torch.full((len(inputs), 1), expert)
    weights = torch.ones(len(inputs), 1)
    if hasattr(module, "zero_expert_num"):
        # Its code needs two choices: the other one is an identity expert of weight 0.
        chosen = torch.cat([chosen, torch.full_like(chosen, module.num_routed_experts)], dim=1)
        weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
    output: torch.Tensor = type(module).forward(module, inputs, chosen, weights)
    return output


def _on_input_scaling_block(layer: Sums) -> Any:
    """Llama 4 multiplies inputs by gate weights: f_j is taken of the input as it is."""

    def hook(module: Any, given: tuple[Any, ...]) -> None:
        hidden = given[0].reshape(-1, given[0].shape[-1])
        layer.tokens += len(hidden)
        logits = functional.linear(hidden, module.router.weight)
        gates = torch.sigmoid(logits)
        chosen = logits.topk(module.top_k, dim=-1).indices
        for expert in range(module.num_experts):
            rows = torch.where((chosen == expert).any(-1))[0]
            if len(rows):
                gate, up = (hidden[rows] @ module.experts.gate_up_proj[expert]).chunk(2, dim=-1)
                output = (up * functional.silu(gate)) @ module.experts.down_proj[expert]
                layer.add(expert, output, gates[rows, expert])

    return hook


def assert_equal(streamed: Mapping[int, Accumulators], expected: Mapping[int, Sums]) -> None:
    """Counts equal, sums to 1e-6 relative, that of squares to 5e-6.

    A square doubles the relative error of a norm, and the tokens of the largest norms outweigh
    those over which the errors of a sum of norms even out: 2.3e-6 was seen (bailing_hybrid).
    The largest component is one number of float32 in a vector: its rounding is measured by the
    largest of the layer.
    """
    assert streamed.keys() == expected.keys()
    for layer, sums in expected.items():
        ours = streamed[layer]
        assert ours.total_tokens == sums.tokens
        for name, values in sums.arrays(ours.num_experts).items():
            slack = 1e-6 * values.max() if name == "max_activation" else 0
            tolerance = {"counts": 0, "norm_square_sum": 5e-6}.get(name, 1e-6)
            np.testing.assert_allclose(
                getattr(ours, name), values, rtol=tolerance, atol=slack, err_msg=f"{layer} {name}"
            )
