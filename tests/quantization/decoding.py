"""The experts of a checkpoint as numbers, by each scheme's own library where it runs on a CPU.

compressed-tensors decodes its own formats, and through its converters AutoAWQ's, ModelOpt's NVFP4
and Hugging Face's FP8 blocks; transformers decodes gpt-oss's MXFP4. ModelOpt's FP8 is
compressed-tensors' under other names. GPTQ's and the act-order formulas are written here, from
the formats: w = scale[group of the input] * (q - zero point), GPTQ's zero points stored less 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
    unpack_from_int32,
)
from compressed_tensors.entrypoints.convert.converters import (  # type: ignore[import-untyped]
    AutoAWQConverter,
    CompressedTensorsDequantizer,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]

from tests.oracle.byte_oracle import read_config, read_tensors

Tensors = dict[str, torch.Tensor]

EXPERT = re.compile(r"(.*\.experts\.\d+\.\w+)\.\w+")


def decoded(folder: Path, scheme: str) -> Tensors:
    """Module name of each expert's projection → its weight `[out, in]` in float32."""
    tensors = {n: t for n, t in read_tensors(folder).items() if EXPERT.fullmatch(n)}
    weights = DECODERS.get(scheme, _compressed_tensors)(folder, tensors)
    return {name.removesuffix(".weight"): tensor.float() for name, tensor in weights.items()}


def _compressed_tensors(folder: Path, tensors: Tensors) -> Tensors:
    converter = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    return {
        name: tensor
        for name, tensor in converter.process(tensors).items()
        if name.endswith(".weight")
    }


def _act_order(folder: Path, tensors: Tensors) -> Tensors:
    found = {}
    for stem, parts in _modules(tensors).items():
        shape = torch.Size(parts["weight_shape"].tolist())
        values = unpack_from_int32(parts["weight_packed"], 4, shape)
        scale = parts["weight_scale"].float()[:, parts["weight_g_idx"].long()]
        found[stem] = values.float() * scale
    return found


def _fp8_blocks(folder: Path, tensors: Tensors) -> Tensors:
    block = read_config(folder)["quantization_config"]["weight_block_size"]
    targets = [re.escape(stem) for stem in _modules(tensors)]
    converter = FP8BlockDequantizer(
        targets=[f"re:{stem}$" for stem in targets],
        weight_block_size=tuple(block),
        dtype=torch.float32,
    )
    converted: Tensors = converter.process(tensors)
    return converted


def modelopt_nvfp4(tensors: Tensors) -> Tensors:
    """ModelOpt's NVFP4 tensors `<module>.<part>` → module name → weight."""
    converter = ModelOptNvfp4Converter(targets=[r"re:.*experts\.\d+\..*"])
    scheme = converter._build_quant_config().config_groups["config_group_0"]
    return _decompressed(converter.process(tensors), "nvfp4-pack-quantized", scheme)


def _modelopt_fp8(folder: Path, tensors: Tensors) -> Tensors:
    weights = {"num_bits": 8, "strategy": "tensor", "type": "float"}
    scheme = QuantizationScheme.model_validate({"targets": [], "weights": weights})
    tensors = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    return _decompressed(tensors, "float-quantized", scheme)


def _awq(folder: Path, tensors: Tensors) -> Tensors:
    section = read_config(folder)["quantization_config"]
    converter = AutoAWQConverter.from_autoawq_config(section)
    scheme = converter._build_quant_config().config_groups["config_group_0"]
    return _decompressed(converter.process(tensors), "pack-quantized", scheme)


def _decompressed(tensors: Tensors, form: str, scheme: QuantizationScheme) -> Tensors:
    compressor = BaseCompressor.get_value_from_registry(form)
    return {
        stem: compressor.decompress(parts, scheme)["weight"]
        for stem, parts in _modules(tensors).items()
    }


def _gptq(folder: Path, tensors: Tensors) -> Tensors:
    found = {}
    shifts = torch.arange(0, 32, 4)
    for stem, parts in _modules(tensors).items():
        # Words [in / 8, out] and [groups, out / 8], the lowest bits first.
        values = (parts["qweight"][:, None, :] >> shifts[:, None]).flatten(0, 1) & 15
        zeros = ((parts["qzeros"][:, :, None] >> shifts).flatten(1) & 15) + 1
        groups = parts["g_idx"].long()
        scale = parts["scales"].float()[groups]
        found[stem] = (scale * (values - zeros[groups] % 16)).t()
    return found


def _modules(tensors: Tensors) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        found.setdefault(stem, {})[part] = tensor
    return found


DECODERS: dict[str, Callable[[Path, Tensors], Tensors]] = {
    "int4_act_order": _act_order,
    "fp8_block_hf": _fp8_blocks,
    "fp8_block_ue8m0": _fp8_blocks,
    "modelopt_nvfp4": lambda folder, tensors: modelopt_nvfp4(tensors),
    "modelopt_fp8": _modelopt_fp8,
    "awq": _awq,
    "gptq": _gptq,
    "autoround": _gptq,
}
