"""Quantized tensors as the weights they stand for: names and shapes in, names and shapes out.

First step of the check of an architecture. Pure. An engine's model knows `down_proj.weight
[o, n]`; a file may hold it as `weight_packed [o, n / 8]` with a scale, or as `qweight` and
`qzeros`. Each scheme is read from its names, dtypes and shapes, and its companions (scales,
zero points, permutations) must have the sizes that the weight and the config give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardsurgeon.checkpoint.grain import WORD, Grain, Shape, packed_words
from shardsurgeon.storage.formats.safetensors import TensorRecord

_MXFP4_COLUMNS = 32  # weights in one block of gpt-oss' `_blocks`
_FP6_BYTES = 24  # for the 32 weights of one scale
# Stored narrower than any engine computes: meaningless without a scale.
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U8", "I8", "F4")


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
    return _Reader(records, Grain.of(config)).read()


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

    def __init__(self, records: dict[str, TensorRecord], grain: Grain) -> None:
        self._records = records
        self._grain = grain
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
