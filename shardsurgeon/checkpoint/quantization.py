"""Quantized tensors as the weights they stand for, from names, dtypes and shapes alone. Pure.

A model knows `down_proj.weight [o, n]`; a file may hold it as `weight_packed [o, n / 8]` with a
scale, or as `qweight` and `qzeros`. Each scheme is recognised by its names, dtypes and shapes.

Two questions are answered from the one reading. `read_weights` is strict: it names companions
(scales, zero points, permutations) that are missing or have another size than the weight and the
config give them. `count_parameters` is lenient: it counts damaged and unknown forms as well as
their dtypes allow, leaves tables of ids out, and gives up only where packing hides the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from shardsurgeon.checkpoint.quantization_schemes import (
    WORD,
    QuantizationSchemes,
    Shape,
    packed_words,
)
from shardsurgeon.storage.formats.tensor_table import TensorTable, condensed

_MXFP4_COLUMNS = 32  # weights in one block of gpt-oss' `_blocks`
_FP6_BYTES = 24  # for the 32 weights of one scale
# Stored narrower than any engine computes: meaningless without a scale.
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U8", "I8", "F4")
_WIDE = ("F64", "F32", "F16", "BF16", "C64")
_INTEGERS = ("I64", "U64", "BOOL")

# Names of tensors that describe weights and are never counted, with a weight beside them or not.
_COMPANIONS = (
    "weight_scale", "weight_scale_2", "_scale_inv", "_global_scale", "weight_shape",
    "weight_zero_point", "_g_idx", "input_scale", "input_zero_point", "output_scale",
    "q_scale", "k_scale", "v_scale", ".scales", ".qzeros", ".g_idx", "_shape",
    # bitsandbytes
    ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB", ".weight_format",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
)  # fmt: skip
# Companions where one of these weights is stored in few bits beside them, parameters otherwise:
# some routers and experts have a learned scale of their own.
_BESIDE = {
    ".scale": (".weight",),
    ".biases": (".weight",),
    "_scales": ("_blocks",),
    "_scale": ("", "_packed"),
}
_ALL_COMPANIONS = (*_COMPANIONS, *_BESIDE)


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


@dataclass
class Weights:
    """The weights a checkpoint stands for.

    shapes: name → shape as an engine sees it; problems: name of a tensor → what is wrong with
    how it is stored.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def read_weights(tensors: Iterable[_Tensor], config: Mapping[str, Any]) -> Weights:
    """What the tensors stand for, and which of them do not fit the weight they belong to.

    config: config.json, whose quantization sections say how finely scales lie. A companion
    without its weight is in the result under its own name, for the engine to refuse.
    """
    records = {tensor.name: tensor for tensor in tensors}
    schemes = QuantizationSchemes.of(config)
    reader, companions = _Reader(records, schemes), _Companions(records, schemes)
    found, bare = Weights(problems=companions.problems), {}
    for record in records.values():
        weight = reader.weight(record)
        found.shapes[weight.name] = weight.shape
        if weight.lacks:
            # A problem, unless the tensor turns out to be a scale itself.
            stored = f"{record.dtype} {list(record.shape)}"
            bare[record.name] = f"is stored as {stored} and has no {weight.lacks} that fits"
        else:
            companions.check(weight)
    for name in companions.taken & found.shapes.keys():
        del found.shapes[name]
    for name in bare.keys() - companions.taken:
        found.problems.setdefault(name, bare[name])
    return found


def count_parameters(tables: Iterable[TensorTable], config: Mapping[str, Any]) -> int | None:
    """Parameters of the unquantized model, or None where packing hides their number.

    config: as for `read_weights`. Companions and tables of ids are not counted.
    """
    companions: dict[str, _Tensor] = {}
    few_bits: dict[str, _Tensor] = {}
    times: dict[str, int] = {}
    total = 0
    for tensor, count in condensed(tables):
        times[tensor.name] = count
        if tensor.name.endswith(_ALL_COMPANIONS):
            companions[tensor.name] = tensor
        elif tensor.dtype in _WIDE:
            total += count * math.prod(tensor.shape)
        elif tensor.dtype not in _INTEGERS:
            few_bits[tensor.name] = tensor
    reader = _Reader(companions, QuantizationSchemes.of(config))
    for name, narrow in few_bits.items():
        number = _parameters(narrow, reader)
        if number is None:
            return None
        total += times[name] * number
    return total + sum(
        times[name] * math.prod(tensor.shape)
        for name, tensor in companions.items()
        if not _is_companion(name, few_bits)
    )


def count_stored_elements(tables: Iterable[TensorTable]) -> int:
    """Elements as stored, packed or not: what some writers of an index call parameters."""
    return sum(
        int(table.by_series([math.prod(each.shape) for each in table.series]).sum())
        for table in tables
    )


def _parameters(tensor: _Tensor, reader: _Reader) -> int | None:
    """Parameters in a tensor of few bits; None where its form does not tell."""
    packed = tensor.name.endswith((".qweight", "_packed")) and len(tensor.shape) > 1
    if tensor.dtype == "I32" and not packed:
        return 0  # ids and counts
    weight = reader.weight(tensor)
    if tensor.dtype in ("I32", "U32") and (weight.lacks or weight.is_guess):
        return None
    if tensor.dtype == "U8" and (weight.lacks or not weight.form):
        # bitsandbytes keeps the scale of its pairs under names of its own.
        return 2 * math.prod(tensor.shape)
    return math.prod(weight.shape)


def _is_companion(name: str, few_bits: Mapping[str, _Tensor]) -> bool:
    """Whether a tensor that is named as companions are belongs to a weight stored in few bits."""
    if name.endswith(_COMPANIONS):
        return True
    suffix = next(suffix for suffix in _BESIDE if name.endswith(suffix))
    stem = name.removesuffix(suffix)
    return any(stem + weight in few_bits for weight in _BESIDE[suffix])


@dataclass(frozen=True, slots=True)
class CompanionNames:
    """Where the companions of a weight may stand. weight: its name, as an engine has it.

    `down_proj.weight` has them beside it (`weight_scale`) and in its module (`input_scale`);
    the stacked `down_proj` under either spelling (`down_proj_scale`, `down_proj_weight_scale`).
    """

    weight: str

    @property
    def scales(self) -> list[str]:
        """Of the tensor with one value per tile; a checkpoint has at most one of them."""
        return [f"{stem}_scale{end}" for stem in self.stems for end in ("", "_inv")] + [
            f"{stem}scale" for stem in self._modules
        ]

    @property
    def constants(self) -> list[str]:
        """Of tensors with one value, or with one per expert of a stacked weight."""
        return [f"{stem}_{end}" for stem in self.stems for end in ("scale_2", "global_scale")] + [
            f"{stem or self.weight + '_'}input{end}"
            for stem in self._modules or [""]
            for end in ("_scale", "_global_scale", "_zero_point")
        ]

    @property
    def stems(self) -> list[str]:
        """What their names begin with."""
        return [self.weight] if self._modules else [self.weight, f"{self.weight}_weight"]

    @property
    def _modules(self) -> list[str]:
        return [self.weight.removesuffix("weight")] if self.weight.endswith(".weight") else []


class _Weight(NamedTuple):
    """What one tensor of a checkpoint stands for.

    name, shape: the weight's, as an engine has it. form: how it is stored, `scaled` (in its own
    name), `packed`, `words`, `mlx` or `blocks`; "" for one that needs no companions. bits: of a
    packed integer. lacks: the companion without which the shape is not known (then it is the
    stored one). is_guess: whether companions and config leave more than one shape open.
    """

    name: str
    shape: Shape
    form: str = ""
    bits: int = 8
    lacks: str = ""
    is_guess: bool = False


class _Reader:
    """Tells from a tensor and its companions which weight it stands for."""

    def __init__(self, records: Mapping[str, _Tensor], schemes: QuantizationSchemes) -> None:
        """records: name → tensor; only the companions are looked up."""
        self._records = records
        self._schemes = schemes
        self._rows: dict[tuple[int, int], dict[int, int]] = {}

    def weight(self, record: _Tensor) -> _Weight:
        """The weight; a companion, too, is taken for one here, under its own name."""
        name = record.name
        if name.endswith("_packed"):
            return self._packed(record, name.removesuffix("_packed"))
        if name.endswith(".qweight"):
            return self._words(record, name.removesuffix("qweight"))
        if record.dtype == "U32" and name.endswith(".weight"):
            return self._mlx(record)
        if name.endswith("_blocks") and len(record.shape) == 4:
            return self._blocks(record, name.removesuffix("_blocks"))
        return self._plain(record)

    def _plain(self, record: _Tensor) -> _Weight:
        """A tensor under its own name, be it in FP8, INT8 or FP4."""
        name, shape = record.name, record.shape
        if record.dtype not in _NARROW or len(shape) < 2:
            return _Weight(name, shape)
        names = CompanionNames(name).scales
        scales = [self._records[scale] for scale in names if scale in self._records]
        if not scales:
            return _Weight(name, shape, lacks="scale")
        if record.dtype == "U8":
            shape = (*shape[:-1], _float_width(shape[-1], scales))
        elif record.dtype == "I8" and any(
            # One power of two for 32 weights means bytes of FP4 pairs, where INT8 would have 32.
            scale.dtype == "F8_E8M0" and scale.shape[-1:] == (-(-shape[-1] // 16),)
            for scale in scales
        ):
            shape = (*shape[:-1], 2 * shape[-1])
        return _Weight(name, shape, "scaled")

    def _packed(self, record: _Tensor, name: str) -> _Weight:
        """compressed-tensors: words of several integers, or bytes of small floats."""
        scale = self._records.get(f"{name}_scale")
        if len(record.shape) < 2 or scale is None:
            return _Weight(record.name, record.shape, lacks="scale")
        *rows, columns = record.shape
        if record.dtype != "I32":
            return _Weight(name, (*rows, _float_width(columns, [scale])), "packed", 4)
        readings = self._readings(columns, scale.shape[-1] if scale.shape else 1)
        order = self._records.get(f"{name}_g_idx") if len(readings) > 1 else None
        if order is not None and order.shape:
            readings = {w: b for w, b in readings.items() if w == order.shape[-1]} or readings
        fallback = self._schemes.packings[0][0]
        width, bits = next(iter(readings.items()), (columns * WORD // fallback, fallback))
        return _Weight(name, (*rows, width), "packed", bits, is_guess=len(readings) != 1)

    def _mlx(self, record: _Tensor) -> _Weight:
        """MLX: words along the inputs, `[.., out, in / 8]`, and scales `[.., out, in / group]`."""
        scales = self._records.get(record.name.removesuffix("weight") + "scales")
        if scales is None or scales.shape[:-1] != record.shape[:-1]:
            return _Weight(record.name, record.shape, lacks="scales")
        *rows, columns = record.shape
        # Groups are always whole, so that words and groups leave few widths, mostly one.
        widths = [(scales.shape[-1] * group, bits) for bits, group in self._schemes.packings]
        fits = {width: bits for width, bits in widths if width * bits == columns * WORD}
        width, bits = next(iter(fits.items()), (columns, WORD))
        return _Weight(record.name, (*rows, width), "mlx", bits, is_guess=len(fits) != 1)

    def _words(self, record: _Tensor, stem: str) -> _Weight:
        """AWQ `[n, o / 8]` and GPTQ `[n / 8, o]`, whose scales are `[n / group, o]`."""
        scales = self._records.get(f"{stem}scales")
        if len(record.shape) != 2 or scales is None or len(scales.shape) != 2:
            return _Weight(record.name, record.shape, lacks="scales")
        (rows, columns), (groups, outputs) = record.shape, scales.shape
        inputs, bits, is_guess = rows, WORD * columns // max(outputs, 1), False
        if columns == outputs:
            inputs, bits, is_guess = self._gptq_inputs(stem, rows, (groups, outputs))
        return _Weight(f"{stem}weight", (outputs, inputs), "words", bits, is_guess=is_guess)

    def _gptq_inputs(self, stem: str, rows: int, scales: Shape) -> tuple[int, int, bool]:
        """(inputs, bits, whether that is a guess) of GPTQ's words.

        A layer may have another width than the config names first (`dynamic`, `extra_config`):
        its own order and zero points know better.
        """
        groups, outputs = scales
        order, zeros = self._records.get(f"{stem}g_idx"), self._records.get(f"{stem}qzeros")
        if order is not None and order.shape:
            inputs = order.shape[0]
            return inputs, WORD * rows // max(inputs, 1), False
        if zeros is not None and zeros.shape and outputs:
            bits = WORD * zeros.shape[-1] // outputs
            if bits and packed_words(outputs, bits) == zeros.shape[-1]:
                return rows * WORD // bits, bits, False
        for inputs, bits in self._readings(rows, groups).items():
            return inputs, bits, False
        widths = dict.fromkeys(bits for bits, _ in self._schemes.packings)
        bits = next(iter(widths))
        return rows * WORD // bits, bits, len(widths) > 1

    def _readings(self, words: int, groups: int) -> dict[int, int]:
        """Weights → bits of a row of packed words. Looked up: most weights of a model are alike."""
        found = self._rows.get((words, groups))
        if found is None:
            found = self._rows[words, groups] = dict(self._schemes.widths(words, groups))
        return found

    def _blocks(self, record: _Tensor, name: str) -> _Weight:
        """gpt-oss: `[E, rows, blocks, 16]`, which engines turn into `[E, columns, rows]`."""
        if f"{name}_scales" not in self._records:
            return _Weight(record.name, record.shape, lacks="scales")
        experts, rows, blocks, _ = record.shape
        return _Weight(name, (experts, blocks * _MXFP4_COLUMNS, rows), "blocks")


class _Companions:
    """Finds what belongs to each weight. taken: the names found; problems: what does not fit."""

    def __init__(self, records: Mapping[str, _Tensor], schemes: QuantizationSchemes) -> None:
        self._records = records
        self._schemes = schemes
        self.taken: set[str] = set()
        self.problems: dict[str, str] = {}

    def check(self, weight: _Weight) -> None:
        """Look for the companions of one weight and compare their sizes with its own."""
        name, shape = weight.name, weight.shape
        if weight.form == "words":
            self._check_words(name.removesuffix("weight"), weight)
        elif weight.form == "mlx":
            (scales,) = self._take([f"{name.removesuffix('weight')}scales"])
            self._expect(f"{name.removesuffix('weight')}biases", scales.shape, shape)
        elif weight.form == "blocks":
            experts, columns, rows = shape
            self._expect(f"{name}_scales", (experts, rows, columns // _MXFP4_COLUMNS), shape)
        elif weight.form:
            names = CompanionNames(name)
            self._zero_point(weight)
            for record in self._take(names.scales):
                if not self._schemes.fits(record.shape, shape):
                    self._misfit(record, shape)
            for record in self._take(names.constants):
                if not _is_constant(record.shape, shape):
                    self._misfit(record, shape)
            self._expect(f"{name}_g_idx", shape[-1:], shape)
            self._expect(f"{name}_shape", (len(shape),), shape)

    def _check_words(self, stem: str, weight: _Weight) -> None:
        outputs, inputs = weight.shape
        (scales,) = self._take([f"{stem}scales"])
        groups = scales.shape[0]
        if not self._schemes.fits((outputs, groups), weight.shape):
            self._misfit(scales, weight.shape)
        zeros = groups, packed_words(outputs, weight.bits)
        self._expect(f"{stem}qzeros", zeros, weight.shape)
        self._expect(f"{stem}g_idx", (inputs,), weight.shape)

    def _zero_point(self, weight: _Weight) -> None:
        """Shaped as the scale is; packed along the rows where the weight is packed."""
        scale = self._records.get(f"{weight.name}_scale")
        if scale is None or len(scale.shape) < 2:
            return
        *lead, rows, groups = scale.shape
        packed = (*lead, packed_words(rows, weight.bits), groups)
        for zeros in self._take([f"{weight.name}_zero_point"]):
            if zeros.shape not in (scale.shape, packed):
                self._misfit(zeros, weight.shape)

    def _take(self, names: Iterable[str]) -> list[_Tensor]:
        """Those of the names that the checkpoint has: they are not weights of their own."""
        found = [self._records[name] for name in names if name in self._records]
        self.taken.update(record.name for record in found)
        return found

    def _expect(self, name: str, shape: Shape, weight: Shape) -> None:
        for record in self._take([name]):
            if record.shape != shape:
                self._misfit(record, weight, f", expected {list(shape)}")

    def _misfit(self, record: _Tensor, weight: Shape, expected: str = "") -> None:
        text = f"shape {list(record.shape)} does not fit a weight {list(weight)}{expected}"
        self.problems.setdefault(record.name, text)


def _float_width(columns: int, scales: Iterable[_Tensor]) -> int:
    """Weights in a row of bytes: FP6 where a scale belongs to 24 of them, else FP4 pairs."""
    groups, rest = divmod(columns, _FP6_BYTES)
    if rest == 0 and any(scale.shape[-1:] == (groups,) for scale in scales):
        return columns * 4 // 3
    return 2 * columns


def _is_constant(shape: Shape, weight: Shape) -> bool:
    """One value, or one per expert (two for gate and up) of a stacked weight."""
    values = math.prod(shape)
    return values == 1 or (len(weight) > 2 and values in (weight[0], 2 * weight[0]))
