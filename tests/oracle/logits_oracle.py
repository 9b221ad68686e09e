"""The logits of a checkpoint, by transformers in float32, with or without some experts masked.

The masked model is the original: its own router code runs, but cannot choose a pruned expert.
Two freedoms that torch leaves open are closed the same way in every model compared: the order
in which an unsorted top-k returns its choice (it decides in which order weights are summed)
and the summation order of the router's matrix product (BLAS picks it by the number of rows,
which is the number of experts).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor  # type: ignore[import-untyped]
from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.oracle.byte_oracle import read_config, read_tensors, text_config

FP8_BLOCK = 128

Tensors: TypeAlias = dict[str, torch.Tensor]

_topk = torch.topk


def logits(
    folder: Path, scratch: Path, retained: dict[int, list[int]] | None = None
) -> torch.Tensor:
    """float32 logits `[2, 48, vocab]` of the checkpoint in `folder` for fixed token ids.

    scratch: a folder for a copy that transformers can read, where it cannot read `folder`.
    retained: layer → the only experts its router may choose; None leaves the router alone.
    """
    model = _load(folder, scratch)
    tokens = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode(), _routers(model, retained):
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


def router_is_sigmoid(folder: Path) -> bool:
    """Whether the checkpoint's routers score every expert by itself."""
    return any(name.endswith("e_score_correction_bias") for name in read_tensors(folder))


def _load(folder: Path, scratch: Path) -> Any:
    folder = _readable(folder, scratch)
    nested = "text_config" in read_config(folder)
    auto_class: Any = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model, report = auto_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    unread = _unread(text_config(folder)["num_hidden_layers"])
    assert [name for name in report["unexpected_keys"] if not unread.match(name)] == []
    return model.eval()


def _unread(layers: int) -> re.Pattern[str]:
    """Published tensors that no transformers class reads: MTP layers and rotary frequencies."""
    return re.compile(rf"mtp\.|model\.layers\.{layers}\.|.*rotary_emb\.inv_freq$")


def _readable(folder: Path, scratch: Path) -> Path:
    """The folder itself, or a copy in `scratch` as transformers can read it: not quantized.

    transformers knows no model type kimi_k2 (it is DeepSeek-V3's architecture, which is how
    vLLM loads it) and has other keys than the published ones in Kimi-K2.5's vision config.
    """
    config = read_config(folder)
    text = config.get("text_config", config)
    if text["model_type"] != "kimi_k2":
        return folder
    quantization = text.pop("quantization_config")
    text["model_type"] = "deepseek_v3"
    if "vision_config" in config:
        vision = config["vision_config"]
        config["projection_hidden_size"] = vision["mm_hidden_size"]
        for key in list(vision):
            vision[re.sub(r"^(vt|init)_", "", key)] = vision.pop(key)
    unpack = {"fp8": _unpack_fp8, "compressed-tensors": _unpack_int4}
    tensors = unpack[quantization["quant_method"]](read_tensors(folder), quantization)
    copy = Path(tempfile.mkdtemp(dir=scratch))
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _unpack_int4(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    """Decompress every packed matrix with compressed-tensors."""
    scheme = QuantizationScheme.model_validate(quantization["config_groups"]["group_0"])
    out = {}
    for name, tensor in tensors.items():
        stem = re.sub(r"_(packed|scale|shape)$", "", name)
        if stem == name:
            out[name] = tensor
        elif name.endswith("_packed"):
            packed = {
                f"weight_{key}": tensors[f"{stem}_{key}"] for key in ("packed", "scale", "shape")
            }
            out[stem] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return out


def _unpack_fp8(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    """Multiply every FP8 matrix by the scales of its 128 x 128 blocks."""
    assert quantization["weight_block_size"] == [FP8_BLOCK, FP8_BLOCK]
    out = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            wide = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            out[name] = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            out[name] = tensor
    return out


@contextmanager
def _routers(model: Any, retained: dict[int, list[int]] | None) -> Iterator[None]:
    """Run every router with its free orders fixed and, if asked, its pruned experts masked."""
    found = {
        int(name.split("layers.")[1].split(".")[0]): module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("TopkRouter", "TopKRouter"))
    }
    assert found
    if retained is not None:
        assert found.keys() <= retained.keys()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for layer, router in found.items():
        pruned = torch.zeros(router.num_experts, dtype=torch.bool)
        if retained is not None:
            pruned[:] = True
            pruned[retained[layer]] = False
        router.forward = _masked(router, pruned)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _masked(router: Any, pruned: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The router's own forward, unable to choose the experts that `pruned` marks.

    A sigmoid router adds its bias for the choice alone: -inf there removes an expert from
    its group's score and from the choice, and leaves every weight as it was. A softmax router
    chooses by probability: a pruned expert's is -inf when the top-k is taken.
    """
    forward = router.forward
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.masked_fill_(pruned, float("-inf"))

    def topk(scores: torch.Tensor, k: int, dim: int = -1, sorted: bool = True) -> Any:
        if bias is None:
            scores = scores.masked_fill(pruned, float("-inf"))
        return _topk(scores, k, dim=dim, sorted=True)

    def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.mv(hidden, row) for row in weight], dim=-1)

    def masked_forward(hidden: torch.Tensor) -> Any:
        with (
            mock.patch.object(functional, "linear", linear),
            mock.patch.object(torch, "topk", topk),
        ):
            return forward(hidden)

    return masked_forward
