"""The GPU implementation: which Triton kernel runs, over which tiles. Imports Triton.

Few tokens: one fused kernel reads every packed word once and never writes the dequantized
matrix; its sum is split along the input so that all processors are busy. Many tokens: arithmetic
is the limit, so the weight is dequantized once and the vendor's matrix product multiplies.
Results do not depend on timing: no atomic additions, and tiles depend on shapes alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from shardsurgeon_kernels import eager
from shardsurgeon_kernels.eager import unpack
from shardsurgeon_kernels.triton_kernels import dequantize_kernel, matmul_kernel, reduce_kernel
from shardsurgeon_kernels.weight import NIBBLES, PackedInt4

__all__ = ["NAME", "dequantize", "linear", "unpack"]

NAME = "triton"
HALVES = (torch.float16, torch.bfloat16)
# For more tokens, the vendor's faster product makes up for a separate dequantization.
FUSED_TOKENS = 128
# Fills a large GPU about three times; more splits only make the final sum longer.
PROGRAMS_WANTED = 400
MOST_SPLITS = 16
REDUCE_BLOCK = 1024


# Triton's interpreter, which tests use, cannot multiply bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tiles:
    """The shape of one launch of the fused kernel.

    tokens, rows, words: of one block; splits: parts of the sum along the input;
    words_per_split: a multiple of `words`; stages: of Triton's software pipeline.
    """

    tokens: int
    rows: int
    words: int
    splits: int
    words_per_split: int
    stages: int


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
            num_warps=4,
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


def _device_of(tensor: Tensor) -> torch.cuda.device:
    # Triton launches on the current device; -1 changes nothing, for CPU tensors (interpreter).
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
