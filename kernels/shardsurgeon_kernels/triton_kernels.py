"""The device code of the GPU implementation: three Triton kernels, launched by gpu.py.

All work on whole words: a tile of int32 words is loaded once, coalesced, and each word is spread
to its eight values by three interleavings, which stay in registers. A scale is loaded per word,
never per value; gpu.py sends only weights whose groups consist of whole words.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _spread(tile):
    """[n, words] -> [n, 8 * words], every element eight times."""
    tile = tl.interleave(tile, tile)
    tile = tl.interleave(tile, tile)
    return tl.interleave(tile, tile)


@triton.jit
def _load_weights(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    row,
    word,
    rows,
    words,
    end,
    groups,
    words_per_group,
    has_zeros: tl.constexpr,
    block_words: tl.constexpr,
    dtype: tl.constexpr,
):
    """The dequantized values [rows, 8 * words] of `dtype`; zeros past word `end`."""
    inside = (row < rows)[:, None] & (word < end)[None, :]
    packed = tl.load(packed_ptr + row[:, None] * words + word[None, :], mask=inside, other=0)
    at_scale = row[:, None] * groups + (word // words_per_group)[None, :]
    scale = tl.load(scale_ptr + at_scale, mask=inside, other=0.0).to(tl.float32)
    shift = (tl.arange(0, 8 * block_words) % 8) * 4
    value = ((_spread(packed) >> shift[None, :]) & 15) - 8
    if has_zeros:
        zero = tl.load(zero_ptr + at_scale, mask=inside, other=0).to(tl.int32)
        value -= _spread(zero)
    return (value.to(tl.float32) * _spread(scale)).to(dtype)


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    columns,
    words,
    groups,
    words_per_group,
    has_zeros: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
):
    """One tile of the dequantized matrix. Grid: (row blocks, word blocks)."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    word = tl.program_id(1) * block_words + tl.arange(0, block_words)
    column = tl.program_id(1) * block_words * 8 + tl.arange(0, 8 * block_words)
    value = _load_weights(
        packed_ptr,
        scale_ptr,
        zero_ptr,
        row,
        word,
        rows,
        words,
        words,
        groups,
        words_per_group,
        has_zeros,
        block_words,
        out_ptr.dtype.element_ty,
    )
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], value, mask=inside)


@triton.jit
def matmul_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
    tokens,
    rows,
    columns,
    words,
    groups,
    words_per_group,
    words_per_split,
    has_zeros: tl.constexpr,
    in_float32: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
):
    """A share of the sum for one tile of y. Grid: (row blocks, token blocks, splits).

    x: [tokens, columns]; partial: float32 [splits, tokens, rows]. Each split sums its own words
    and writes its own plane, so that the result does not depend on their order. The weight is the
    left operand, because it has enough rows for wide matrix instructions when tokens are few.
    """
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    token = tl.program_id(1).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    begin = tl.program_id(2) * words_per_split
    end = tl.minimum(begin + words_per_split, words)
    total = tl.zeros((block_rows, block_tokens), dtype=tl.float32)
    for first in range(begin, end, block_words):
        word = first + tl.arange(0, block_words)
        column = first * 8 + tl.arange(0, 8 * block_words)
        weight = _load_weights(
            packed_ptr,
            scale_ptr,
            zero_ptr,
            row,
            word,
            rows,
            words,
            end,
            groups,
            words_per_group,
            has_zeros,
            block_words,
            x_ptr.dtype.element_ty,
        )
        x = tl.load(
            x_ptr + token[:, None] * columns + column[None, :],
            mask=(token < tokens)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if in_float32:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, tl.trans(x), acc=total, input_precision="ieee")
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    plane = tl.program_id(2).to(tl.int64) * tokens * rows
    tl.store(partial_ptr + plane + token[None, :] * rows + row[:, None], total, mask=inside)


@triton.jit
def reduce_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    elements,
    rows,
    splits: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
):
    """Add the planes of `partial` in order, then the bias; round once. Grid: (blocks of y,)."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < elements
    total = tl.zeros((block,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * elements + at, mask=inside, other=0.0)
    if has_bias:
        total += tl.load(bias_ptr + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
