"""The GPU implementation: which Triton kernel runs, over which tiles. Imports Triton.

Few tokens: one fused kernel reads every packed word once and never writes the dequantized
matrix; its sum is split along the input so that all processors are busy. Many tokens: arithmetic
is the limit, so the weight is dequantized once and the vendor's matrix product multiplies.
Rows sorted by expert go the same two ways, with a kernel of ours for both: the vendor's would have
to know on the host where experts begin. Results do not depend on timing: no atomic additions, and
tiles depend on shapes alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from shardsurgeon_kernels import eager
from shardsurgeon_kernels.eager import unpack
from shardsurgeon_kernels.stack import PackedInt4Stack
from shardsurgeon_kernels.triton_kernels import (
    dequantize_kernel,
    grouped_kernel,
    matmul_kernel,
    reduce_kernel,
)
from shardsurgeon_kernels.weight import NIBBLES, PackedInt4

__all__ = ["NAME", "dequantize", "grouped_linear", "linear", "unpack"]

NAME = "triton"
HALVES = (torch.float16, torch.bfloat16)
# For more tokens, the vendor's faster product makes up for a separate dequantization.
FUSED_TOKENS = 128
# Fills a large GPU about three times; more splits only make the final sum longer.
PROGRAMS_WANTED = 400
MOST_SPLITS = 16
REDUCE_BLOCK = 1024
# Of grouped products: as many as one processor may have room for. More would wait their turn.
PROGRAMS_PER_PROCESSOR = 4
# Holds the dequantized weights of some experts at a time: eighteen of Kimi K2.5's projections.
SCRATCH_NBYTES = 512 << 20


# Triton's interpreter, which tests use, cannot multiply bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tiles:
    """The shape of one launch of a product.

    tokens, rows, words: of one block; stages: of Triton's software pipeline; splits: parts of the
    sum along the input, of which each has `words_per_split`, a multiple of `words`, or all.
    """

    tokens: int
    rows: int
    words: int
    stages: int
    warps: int = 4
    splits: int = 1
    words_per_split: int | None = None


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`(q - zero_point) * scale` as [out, in] of `dtype`, equal to the reference in every bit."""
    if not _consists_of_words(weight) or dtype is torch.float64:
        return eager.dequantize(weight, dtype)
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.packed.device)
    block_rows, block_words = 8, 64
    words = weight.packed.shape[1]
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(words, block_words))
    with _device_of(weight.packed):
        dequantize_kernel[grid](
            *_pointers(weight),
            out,
            rows,
            columns,
            words,
            weight.groups,
            _words_per_group(weight),
            has_zeros=weight.zeros is not None,
            block_rows=block_rows,
            block_words=block_words,
        )
    return out


def linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: [.., in] -> [.., out], with W dequantized to x's dtype."""
    tokens = x.numel() // max(1, x.shape[-1])
    fused = x.dtype in HALVES and 0 < tokens <= FUSED_TOKENS and _consists_of_words(weight)
    if not fused:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    y = _fused(x.reshape(tokens, -1).contiguous(), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def tiles_for(tokens: int, rows: int, words: int) -> Tiles:
    """Tiles for x [tokens, 8 * words] by a weight [rows, words].

    Stages of 64 rows by 128 columns, with their share of x, fill at most 66 KB of shared memory.
    """
    block_tokens = max(16, min(64, triton.next_power_of_2(tokens)))
    block_rows, block_words = 64, 16
    planes = triton.cdiv(rows, block_rows) * triton.cdiv(tokens, block_tokens)
    blocks = triton.cdiv(words, block_words)
    splits = max(1, min(MOST_SPLITS, PROGRAMS_WANTED // planes, blocks))
    blocks_per_split = triton.cdiv(blocks, splits)
    return Tiles(
        tokens=block_tokens,
        rows=block_rows,
        words=block_words,
        splits=triton.cdiv(blocks, blocks_per_split),
        words_per_split=blocks_per_split * block_words,
        stages=3 if block_tokens > 32 else 4,
    )


def grouped_linear(x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]:ends[e]` of x times expert e's weight, without a word with the host.

    Up to FUSED_TOKENS rows for an expert on average: one kernel that reads packed words. More:
    some experts at a time are dequantized into a scratch and multiplied from there.
    """
    (tokens, _), (experts, rows, columns) = x.shape, weights.shape
    if x.dtype is torch.float64:
        return eager.grouped_linear(x, weights, ends)
    y = x.new_zeros(tokens, rows)
    if not y.numel() or not columns:
        return y
    x, ends = x.contiguous(), ends.contiguous()
    whole = weights.flat(0, experts)
    if x.dtype in HALVES and tokens <= FUSED_TOKENS * experts and _consists_of_words(whole):
        _grouped(x, whole, ends, y, first=0, experts=experts)
        return y
    step = max(1, SCRATCH_NBYTES // (rows * columns * x.element_size()))
    for first in range(0, experts, step):
        last = min(first + step, experts)
        # Not kept in a variable: the next scratch takes the place of this one.
        _grouped(x, dequantize(weights.flat(first, last), x.dtype), ends, y, first, last - first)
    return y


def grouped_tiles(tokens: int, experts: int, dtype: torch.dtype, *, packed: bool) -> Tiles:
    """Tiles for x [tokens, in] of `dtype`, sorted by expert: at most 99 KB of shared memory.

    Where weights are packed, the fewer tokens an expert has, the smaller the block of them.
    """
    if packed:
        block_tokens = max(16, min(64, triton.next_power_of_2(triton.cdiv(tokens, experts))))
        return Tiles(block_tokens, rows=64, words=16, stages=3 if block_tokens > 32 else 4)
    if dtype in HALVES:
        return Tiles(tokens=128, rows=128, words=8, stages=3, warps=8)
    return Tiles(tokens=64, rows=64, words=4, stages=3)


def _grouped(
    x: Tensor, weight: PackedInt4 | Tensor, ends: Tensor, y: Tensor, first: int, experts: int
) -> None:
    """Fill the rows of y that belong to experts from `first` on, of which `weight` is."""
    tokens, rows = y.shape
    packed = isinstance(weight, PackedInt4)
    columns = x.shape[1]
    tiles = grouped_tiles(tokens, ends.shape[0], x.dtype, packed=packed)
    # At most: every expert's last block of tokens is as good as empty.
    most = triton.cdiv(rows, tiles.rows) * (tokens // tiles.tokens + min(experts, tokens))
    grid = (min(most, PROGRAMS_PER_PROCESSOR * _processors(x.device)),)
    with _device_of(x):
        grouped_kernel[grid](
            x,
            ends,
            *(_pointers(weight) if packed else (weight, weight, weight)),
            y,
            tokens,
            first,
            experts,
            rows,
            columns,
            triton.cdiv(columns, NIBBLES),
            weight.groups if packed else 1,
            _words_per_group(weight) if packed else 1,
            packed=packed,
            has_zeros=packed and weight.zeros is not None,
            in_float32=INTERPRETED,
            block_tokens=tiles.tokens,
            block_rows=tiles.rows,
            block_words=tiles.words,
            block_experts=triton.next_power_of_2(experts),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _fused(x: Tensor, weight: PackedInt4, bias: Tensor | None) -> Tensor:
    """x: contiguous [tokens, in] of 16-bit floats -> [tokens, out]."""
    tokens, (rows, columns), words = x.shape[0], weight.shape, weight.packed.shape[1]
    tiles = tiles_for(tokens, rows, words)
    partial = torch.empty(tiles.splits, tokens, rows, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(tokens, tiles.tokens), tiles.splits)
    with _device_of(x):
        matmul_kernel[grid](
            x,
            *_pointers(weight),
            partial,
            tokens,
            rows,
            columns,
            words,
            weight.groups,
            _words_per_group(weight),
            tiles.words_per_split,
            has_zeros=weight.zeros is not None,
            in_float32=INTERPRETED,
            block_tokens=tiles.tokens,
            block_rows=tiles.rows,
            block_words=tiles.words,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        reduce_kernel[(triton.cdiv(y.numel(), REDUCE_BLOCK),)](
            partial,
            y if bias is None else bias.contiguous(),
            y,
            y.numel(),
            rows,
            splits=tiles.splits,
            has_bias=bias is not None,
            block=REDUCE_BLOCK,
        )
    return y


def _consists_of_words(weight: PackedInt4) -> bool:
    whole = weight.columns_per_scale % NIBBLES == 0 or weight.groups == 1
    return whole and weight.shape[0] * weight.shape[1] > 0


def _words_per_group(weight: PackedInt4) -> int:
    return -(-weight.columns_per_scale // NIBBLES)


def _pointers(weight: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """Packed words, scales and zero points; without these the scales again, which is not read."""
    scale = weight.scale.contiguous()
    zeros = scale if weight.zeros is None else weight.zeros.contiguous()
    return weight.packed.contiguous(), scale, zeros


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # of the interpreter, which has one, so that tests see several programs
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _device_of(tensor: Tensor) -> torch.cuda.device:
    # Triton launches on the current device; -1 changes nothing, for CPU tensors (interpreter).
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
