"""How many parameters a list of tensors stands for, packed and quantized ones included.

Pure: names, dtypes, shapes and the quantization part of the config in, a number out. Where
weights share bytes or words, what lies beside them says how many there are: scales, zero points
and group indices have shapes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

# They describe parameters and are none, of whatever shape.
_COMPANIONS = (
    "weight_scale", "weight_scale_2", "_scale_inv", "_global_scale", "weight_shape",
    "weight_zero_point", "_g_idx", "input_scale", "input_zero_point", "output_scale",
    "q_scale", "k_scale", "v_scale", ".scales", ".qzeros", ".g_idx", "_shape",
    # bitsandbytes
    ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB", ".weight_format",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
)  # fmt: skip
# They are companions where such a weight is stored in few bits beside them, else parameters.
_BESIDE = {".scale": (".weight",), "_scales": ("_blocks",), "_scale": ("", "_packed")}
_ALL_COMPANIONS = (*_COMPANIONS, *_BESIDE)
_SECTIONS = ("quantization_config", "compression_config")
_WIDE = ("F64", "F32", "F16", "BF16", "C64")
_NO_WEIGHTS = ("I64", "U64", "BOOL")
_FP6_BYTES_PER_SCALE = 24


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def count_parameters(tensors: Iterable[_Tensor], config: Mapping[str, Any]) -> int | None:
    """Parameters of the unquantized model, or None where packing hides their number."""
    return _Count(tensors, config).total()


def count_stored_elements(tensors: Iterable[_Tensor]) -> int:
    """Elements as stored, packed or not: what some writers of an index call parameters."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


class _Count:
    """Sorts the tensors into weights, packed weights and what lies beside those."""

    def __init__(self, tensors: Iterable[_Tensor], config: Mapping[str, Any]) -> None:
        self._schemes = set(_integer_schemes(config))
        self._beside: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._few_bits: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._plain = 0
        # One pair for all tensors that are alike: there are 200,000 and few kinds of them.
        kinds: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
        for tensor in tensors:
            kind = tensor.dtype, tensor.shape
            if tensor.name.endswith(_ALL_COMPANIONS):
                self._beside[tensor.name] = kinds.setdefault(kind, kind)
            elif tensor.dtype in _WIDE:
                self._plain += math.prod(tensor.shape)
            elif tensor.dtype not in _NO_WEIGHTS:
                self._few_bits[tensor.name] = kinds.setdefault(kind, kind)

    def total(self) -> int | None:
        """All of them, None where one cannot be told."""
        counts = [self._weights(*named) for named in self._few_bits.items()]
        if None in counts:
            return None
        return self._plain + sum(filter(None, counts)) + sum(self._not_companions())

    def _not_companions(self) -> Iterator[int]:
        """Elements of tensors that are only named as companions are."""
        for name, (_, shape) in self._beside.items():
            if name.endswith(_COMPANIONS):
                continue
            suffix = next(suffix for suffix in _BESIDE if name.endswith(suffix))
            stem = name.removesuffix(suffix)
            if not any(stem + weight in self._few_bits for weight in _BESIDE[suffix]):
                yield math.prod(shape)

    def _weights(self, name: str, stored: tuple[str, tuple[int, ...]]) -> int | None:
        """How many weights a tensor of few bits per weight holds."""
        dtype, shape = stored
        elements = math.prod(shape)
        if dtype == "I32":
            if name.endswith(".qweight") and len(shape) > 1:
                return self._in_columns(name.removesuffix("qweight"), shape)
            if name.endswith("_packed") and len(shape) > 1:
                return self._in_rows(name.removesuffix("_packed"), shape)
            # Ids and counts.
            return 0
        if dtype == "U8":
            scale = self._shape(name.removesuffix("_packed") + "_scale")
            if scale and shape[-1:] == (scale[-1] * _FP6_BYTES_PER_SCALE,):
                return elements * 4 // 3
            return elements * 2
        if dtype == "I8":
            # One power of two for 32 weights: 16 bytes of FP4 each, or 32 of INT8.
            kind, scale = self._beside.get(name.removesuffix("weight") + "scale", ("", ()))
            if kind == "F8_E8M0" and scale and shape[-1:] == (scale[-1] * 16,):
                return elements * 2
        return elements

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self._beside[name][1] if name in self._beside else None

    def _in_rows(self, stem: str, shape: tuple[int, ...]) -> int | None:
        """compressed-tensors: words `[..., out, in * bits / 32]`, scales `[..., out, groups]`.

        The scheme that fits the scales says how many inputs a row has.
        """
        scale, order = self._shape(f"{stem}_scale"), self._shape(f"{stem}_g_idx")
        rows, words = math.prod(shape[:-1]), shape[-1]
        if order:
            return rows * order[-1]
        groups = scale[-1] if scale else 1
        found = set()
        for bits, group in self._schemes:
            inputs = groups * group if group > 0 else words * 32 // bits
            if -(-inputs * bits // 32) == words and (group > 0 or groups == 1):
                found.add(inputs)
        return rows * found.pop() if len(found) == 1 else None

    def _in_columns(self, stem: str, shape: tuple[int, ...]) -> int | None:
        """GPTQ words `[in * bits / 32, out]` or AWQ words `[in, out * bits / 32]`, beside scales
        `[groups, out]` and zero points `[groups, out * bits / 32]`."""
        scale, zeros = self._shape(f"{stem}scales"), self._shape(f"{stem}qzeros")
        order = self._shape(f"{stem}g_idx")
        if not scale:
            return None
        outputs = scale[-1]
        if shape[-1] != outputs:
            return shape[-2] * outputs
        if order:
            return order[-1] * outputs
        widths = {bits for bits, _ in self._schemes}
        if zeros and outputs:
            widths = {32 * zeros[-1] // outputs} - {0}
        return shape[-2] * 32 // widths.pop() * outputs if len(widths) == 1 else None


def _integer_schemes(node: object, inside: bool = False) -> Iterator[tuple[int, int]]:
    """(bits, group size) of every integer scheme for weights that the config names.

    A group size of 0 or less means one group for a whole row.
    """
    if not isinstance(node, Mapping):
        return
    bits = node.get("num_bits", node.get("bits"))
    if inside and type(bits) is int and 0 < bits <= 32 and node.get("type") != "float":
        group = node.get("group_size")
        yield bits, group if type(group) is int else 0
    for key, value in node.items():
        if key not in ("input_activations", "output_activations", "kv_cache_scheme"):
            yield from _integer_schemes(value, inside or key in _SECTIONS)
