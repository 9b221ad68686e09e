"""Quantized tensors as the weights they stand for, from names, dtypes and shapes alone. Pure.

A model knows `down_proj.weight [o, n]`; a file may hold it as `weight_packed [o, n / 8]` with a
scale, or as `qweight` and `qzeros`. Each scheme is recognised by its names, dtypes and shapes,
and its companions (scales, zero points, permutations) must have the sizes that the weight and
the config give them. The number of parameters follows from the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shardsurgeon.storage.formats.safetensors import TensorRecord

_MXFP4_COLUMNS = 32  # weights in one block of gpt-oss' `_blocks`
_FP6_BYTES = 24  # for the 32 weights of one scale
# Stored narrower than any engine computes: meaningless without a scale.
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U8", "I8", "F4")

Shape = tuple[int, ...]

WORD = 32  # bits of the integers that weights are packed into
_SECTIONS = ("quantization_config", "compression_config")
_FP4_GROUPS = (16, 32)  # weights per scale of NVFP4, and of MXFP4, MXFP6 and MXFP8
_FP8_BLOCK = (128, 128)
_NO_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")

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
_WIDE = ("F64", "F32", "F16", "BF16", "C64")
_INTEGER_DTYPES = ("I64", "U64", "BOOL")
_FP6_BYTES_PER_SCALE = 24


@dataclass
class Weights:
    """The weights a checkpoint stands for.

    shapes: name → shape as an engine sees it; problems: name of a tensor → what is wrong with
    how it is stored.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def read_weights(tensors: Iterable[TensorRecord], config: Mapping[str, Any]) -> Weights:
    """What the tensors stand for; config: the settings that go with them."""
    records = {record.name: record for record in tensors}
    return _Reader(records, QuantizationSchemes.of(config)).read()


@dataclass(frozen=True, slots=True)
class _Names:
    """Where the companions of a weight may stand.

    `down_proj.weight` has them beside it (`weight_scale`) and in its module (`input_scale`);
    the stacked `down_proj` under either spelling (`down_proj_scale`, `down_proj_weight_scale`).
    """

    weight: str

    @property
    def scales(self) -> list[str]:
        """One value per tile, whichever of them there is."""
        return [f"{stem}_scale{end}" for stem in self._stems for end in ("", "_inv")] + [
            f"{stem}scale" for stem in self._modules
        ]

    @property
    def constants(self) -> list[str]:
        """One value for a whole tensor, or one per expert of a stacked one."""
        return [f"{stem}_{end}" for stem in self._stems for end in ("scale_2", "global_scale")] + [
            f"{stem or self.weight + '_'}input{end}"
            for stem in self._modules or [""]
            for end in ("_scale", "_global_scale", "_zero_point")
        ]

    @property
    def _stems(self) -> list[str]:
        return [self.weight] if self._modules else [self.weight, f"{self.weight}_weight"]

    @property
    def _modules(self) -> list[str]:
        return [self.weight.removesuffix("weight")] if self.weight.endswith(".weight") else []


class _Reader:
    """One reading of a checkpoint's names. Companions are taken off as their weight is read."""

    def __init__(self, records: dict[str, TensorRecord], schemes: QuantizationSchemes) -> None:
        self._records = records
        self._grain = schemes
        self._taken: set[str] = set()
        self._bare: dict[str, str] = {}
        self._weights = Weights()

    def read(self) -> Weights:
        for name, record in self._records.items():
            if name.endswith("_packed"):
                self._packed(record, name.removesuffix("_packed"))
            elif name.endswith(".qweight"):
                self._words(record, name.removesuffix("qweight"))
            elif name.endswith("_blocks") and len(record.shape) == 4:
                self._blocks(record, name.removesuffix("_blocks"))
            else:
                self._plain(record)
        for name in self._taken & self._weights.shapes.keys():
            del self._weights.shapes[name]
        for name in self._bare.keys() - self._taken:
            self._problem(name, self._bare[name])
        return self._weights

    def _plain(self, record: TensorRecord) -> None:
        """A tensor under its own name, be it in FP8, INT8 or FP4."""
        name, shape = record.name, record.shape
        if record.dtype not in _NARROW or len(shape) < 2:
            self._weights.shapes[name] = shape
            return
        scales = [scale for scale in _Names(name).scales if scale in self._records]
        if not scales:
            self._has_no(record, "scale")
            return
        # One power of two for 32 weights means bytes of FP4 pairs, where INT8 would have 32.
        in_pairs = record.dtype == "U8" or (
            record.dtype == "I8"
            and any(
                self._records[scale].dtype == "F8_E8M0"
                and self._records[scale].shape[-1:] == (-(-shape[-1] // 16),)
                for scale in scales
            )
        )
        self._weights.shapes[name] = logical = (*shape[:-1], 2 * shape[-1]) if in_pairs else shape
        self._companions(name, logical)

    def _packed(self, record: TensorRecord, name: str) -> None:
        """compressed-tensors: words of several integers, or bytes of small floats."""
        scale = self._records.get(f"{name}_scale")
        if len(record.shape) < 2 or scale is None:
            self._has_no(record, "scale")
            return
        *rows, columns = record.shape
        width, bits = 2 * columns, 4
        if record.dtype == "I32":
            readings = self._grain.widths(columns, scale.shape[-1] if scale.shape else 1)
            fallback = self._grain.packings[0][0]
            width, bits = next(readings, (columns * WORD // fallback, fallback))
        elif scale.shape[-1:] == (columns // _FP6_BYTES,) and columns % _FP6_BYTES == 0:
            width = columns * 4 // 3
        logical = (*rows, width)
        self._weights.shapes[name] = logical
        self._zero_point(name, logical, bits)
        self._companions(name, logical)

    def _words(self, record: TensorRecord, stem: str) -> None:
        """AWQ `[n, o / 8]` and GPTQ `[n / 8, o]`, whose scales are `[n / group, o]`."""
        scales = self._records.get(f"{stem}scales")
        if len(record.shape) != 2 or scales is None or len(scales.shape) != 2:
            self._has_no(record, "scales")
            return
        (rows, columns), (groups, outputs) = record.shape, scales.shape
        inputs, bits = rows, WORD * columns // max(outputs, 1)
        if columns == outputs:
            order = self._records.get(f"{stem}g_idx")
            fallback = self._grain.packings[0][0]
            inputs, bits = next(
                self._grain.widths(rows, groups), (rows * WORD // fallback, fallback)
            )
            if order is not None and order.shape:
                inputs = order.shape[0]
                bits = WORD * rows // max(inputs, 1)
        logical = (outputs, inputs)
        self._weights.shapes[f"{stem}weight"] = logical
        self._taken.add(scales.name)
        if not self._grain.fits((outputs, groups), logical):
            self._misfit(scales, logical)
        self._expect(f"{stem}qzeros", (groups, packed_words(outputs, bits)), logical)
        self._expect(f"{stem}g_idx", (inputs,), logical)

    def _blocks(self, record: TensorRecord, name: str) -> None:
        """gpt-oss: `[E, rows, blocks, 16]`, which engines turn into `[E, columns, rows]`."""
        if f"{name}_scales" not in self._records:
            self._has_no(record, "scales")
            return
        experts, rows, blocks, _ = record.shape
        logical = (experts, blocks * _MXFP4_COLUMNS, rows)
        self._weights.shapes[name] = logical
        self._expect(f"{name}_scales", (experts, rows, blocks), logical)

    def _companions(self, name: str, weight: Shape) -> None:
        """Take off what belongs to a weight, and say what of it has another size."""
        names = _Names(name)
        for record in self._there(names.scales):
            if not self._grain.fits(record.shape, weight):
                self._misfit(record, weight)
        for record in self._there(names.constants):
            if not _is_constant(record.shape, weight):
                self._misfit(record, weight)
        self._zero_point(name, weight, bits=8)
        self._expect(f"{name}_g_idx", weight[-1:], weight)
        self._expect(f"{name}_shape", (len(weight),), weight)

    def _zero_point(self, name: str, weight: Shape, bits: int) -> None:
        """Shaped as the scale is; packed along the rows where the weight is packed."""
        scale = self._records.get(f"{name}_scale")
        if scale is None or len(scale.shape) < 2 or f"{name}_zero_point" in self._taken:
            return
        *lead, rows, groups = scale.shape
        for zeros in self._there([f"{name}_zero_point"]):
            if zeros.shape not in (scale.shape, (*lead, packed_words(rows, bits), groups)):
                self._misfit(zeros, weight)

    def _there(self, names: Iterable[str]) -> list[TensorRecord]:
        """Those of the names that the checkpoint has. They are no weights of their own."""
        found = [self._records[name] for name in names if name in self._records]
        self._taken.update(record.name for record in found)
        return found

    def _expect(self, name: str, shape: Shape, weight: Shape) -> None:
        for record in self._there([name]):
            if record.shape != shape:
                self._misfit(record, weight, f", expected {list(shape)}")

    def _has_no(self, record: TensorRecord, what: str) -> None:
        """Note that a weight's scale is not there, unless the tensor turns out to be one."""
        self._weights.shapes[record.name] = record.shape
        stored = f"{record.dtype} {list(record.shape)}"
        self._bare[record.name] = f"is stored as {stored} and has no {what} that fits"

    def _misfit(self, record: TensorRecord, weight: Shape, expected: str = "") -> None:
        text = f"shape {list(record.shape)} does not fit a weight {list(weight)}{expected}"
        self._problem(record.name, text)

    def _problem(self, name: str, text: str) -> None:
        self._weights.problems.setdefault(name, text)


def _is_constant(shape: Shape, weight: Shape) -> bool:
    """One value, or one per expert (two for gate and up) of a stacked weight."""
    values = math.prod(shape)
    return values == 1 or (len(weight) > 2 and values in (weight[0], 2 * weight[0]))


@dataclass(frozen=True, slots=True)
class QuantizationSchemes:
    """The schemes of one config.

    tiles: (rows, columns) that share a scale, 0 standing for all of them; packings: (bits,
    group size) of integers packed into words, the size 0 where a row has one scale.
    """

    tiles: tuple[tuple[int, int], ...]
    packings: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QuantizationSchemes:
        """Every scheme for weights that a quantization section of the config names."""
        blocks, packings, groups = set(), set(), {*_FP4_GROUPS}
        for scheme in _schemes(config):
            group = _count(scheme.get("group_size", scheme.get("q_group_size")))
            bits = _count(scheme.get("num_bits", scheme.get("bits", scheme.get("w_bit"))))
            block = _block(scheme.get("weight_block_size", scheme.get("block_structure")))
            groups.add(group)
            packings.add((bits, group))
            blocks.add(block)
        tiles = [(1, 0), (0, 0), *((1, group) for group in sorted(groups - {0}))]
        tiles += sorted(block for block in blocks if block) or [_FP8_BLOCK]
        return cls(tuple(tiles), tuple(sorted(p for p in packings if p[0])) or ((4, 0), (8, 0)))

    def fits(self, scale: Shape, weight: Shape) -> bool:
        """Whether a scale has one value per tile of a weight `[..., out, in]`."""
        if math.prod(scale) == 1:
            return True
        *lead, rows, columns = weight
        grids = [
            (-(-rows // (tall or rows or 1)), -(-columns // (wide or columns or 1)))
            for tall, wide in self.tiles
        ]
        if lead:
            # Stacked weights may be input by output; then a scale per output is one per column.
            grids.append((1, columns))
        return any(scale in _spellings(tuple(lead), *grid) for grid in grids)

    def widths(self, words: int, groups: int) -> Iterator[tuple[int, int]]:
        """(weights, bits) that a row of packed words may hold which has so many scales."""
        for bits, group in self.packings:
            # The last word of a row may be partly used: then the scales say how many there are.
            for width in (groups * group, words * WORD // bits):
                whole = group == 0 and groups == 1
                if packed_words(width, bits) == words and (
                    whole or (group and -(-width // group) == groups)
                ):
                    yield width, bits


def packed_words(weights: int, bits: int) -> int:
    """How many words a row of weights takes."""
    return -(-weights * bits // WORD)


def _spellings(lead: Shape, rows: int, columns: int) -> list[Shape]:
    """Shapes in which a grid of scales may be written: axes of size 1 may be left out."""
    found: list[Shape] = [(*lead, rows, columns)]
    if columns == 1:
        found.append((*lead, rows))
    if rows == 1 and lead:
        found.append((*lead, columns))
    if rows == columns == 1 and lead:
        found.append(lead)
    return found


def _schemes(node: object, inside: bool = False) -> Iterator[Mapping[str, Any]]:
    """Every object in the quantization sections of a config that is not about activations."""
    if isinstance(node, Mapping):
        if inside:
            yield node
        for key, value in node.items():
            if key not in _NO_WEIGHTS:
                yield from _schemes(value, inside or key in _SECTIONS)


def _block(value: object) -> tuple[int, int] | None:
    """`[128, 128]`, or `128x128` as older files write it."""
    parts: Sequence[object] = ()
    if isinstance(value, str):
        parts = [int(part) for part in value.split("x") if part.isdigit()]
    elif isinstance(value, Sequence):
        parts = value
    sizes = [part for part in parts if _count(part)]
    return (_count(sizes[0]), _count(sizes[1])) if len(sizes) == len(parts) == 2 else None


def _count(value: object) -> int:
    """A positive number of a config, 0 for anything else (-1 and None mean one group)."""
    return value if type(value) is int and value > 0 else 0


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
            elif tensor.dtype not in _INTEGER_DTYPES:
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
