"""What a config says of how its weights are quantized: widths, groups and blocks. Pure.

`quantization` holds it against the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.config import quantization_sections

Shape = tuple[int, ...]

WORD = 32  # bits of the integers that weights are packed into
_FP4_GROUPS = (16, 32)  # weights per scale of NVFP4, and of MXFP4, MXFP6 and MXFP8
_FP8_BLOCK = (128, 128)  # of DeepSeek-V3 and those after it, some of which do not say it
# Parts of a quantization section that are about activations.
_NO_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")


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
            groups.add(group)
            blocks.add(_block(scheme))
            if 0 < bits <= WORD and scheme.get("type") != "float":
                packings.add((bits, group))
        tiles = [(1, 0), (0, 0), *((1, group) for group in sorted(groups - {0}))]
        tiles += sorted(block for block in blocks if block) or [_FP8_BLOCK]
        return cls(tuple(tiles), tuple(sorted(packings)) or ((4, 0), (8, 0)))

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
        return any(scale in grid_shapes(tuple(lead), *grid) for grid in grids)

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


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as the first scheme with blocks says; None without."""
    return next(filter(None, map(_block, _schemes(config))), None)


def packed_words(weights: int, bits: int) -> int:
    """How many words a row of weights takes."""
    return -(-weights * bits // WORD)


def grid_shapes(lead: Shape, rows: int, columns: int) -> list[Shape]:
    """Shapes in which a grid of scales may be written: axes of size 1 may be left out.

    lead: the axes before, those of stacked experts.
    """
    found: list[Shape] = [(*lead, rows, columns)]
    if columns == 1:
        found.append((*lead, rows))
    if rows == 1 and lead:
        found.append((*lead, columns))
    if rows == columns == 1 and lead:
        found.append(lead)
    return found


def _schemes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every object in the quantization sections of a config that is not about activations."""
    for _, section in quantization_sections(config):
        yield from _for_weights(section)


def _for_weights(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for key, value in node.items():
        if key not in _NO_WEIGHTS and isinstance(value, Mapping):
            yield from _for_weights(value)


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """`[128, 128]`, or `128x128` as older files write it."""
    value = scheme.get("weight_block_size", scheme.get("block_structure"))
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
