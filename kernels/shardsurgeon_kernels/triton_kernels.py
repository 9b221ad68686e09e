"""The device code of the GPU implementation: four Triton kernels, launched by gpu.py.

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
    row_end,
    words,
    word_end,
    groups,
    words_per_group,
    has_zeros: tl.constexpr,
    block_words: tl.constexpr,
    dtype: tl.constexpr,
):
    """The dequantized values [rows, 8 * words] of `dtype`; zeros past `row_end`, `word_end`."""
    inside = (row < row_end)[:, None] & (word < word_end)[None, :]
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


@triton.jit
def _rows_of_experts(
    ends_ptr,
    tokens,
    first,
    experts,
    block_tokens: tl.constexpr,
    block_experts: tl.constexpr,
):
    """Of experts from `first` on: where their rows begin and end, and the blocks they fill."""
    expert = tl.arange(0, block_experts)
    known = expert < experts
    end = tl.load(ends_ptr + first + expert, mask=known, other=0)
    begin = tl.load(ends_ptr + first + expert - 1, mask=known & (first + expert > 0), other=0)
    # Values that do not ascend, or pass the end of x, must not lead out of it.
    end = tl.minimum(end, tokens)
    begin = tl.maximum(tl.minimum(begin, end), 0)
    return begin, end, (end - begin + block_tokens - 1) // block_tokens


@triton.jit(do_not_specialize=["tokens", "first", "experts"])
def grouped_kernel(
    x_ptr,
    ends_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    tokens,
    first,
    experts,
    rows,
    columns,
    words,
    groups,
    words_per_group,
    packed: tl.constexpr,
    has_zeros: tl.constexpr,
    in_float32: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
    block_experts: tl.constexpr,
):
    """Rows of x, sorted by expert, times the weights of experts first to first + experts - 1.

    x: [tokens, columns]; ends: of all experts; y: [tokens, rows], written where an expert has
    rows. weight: of these experts, packed words [experts * rows, words] with their scales and zero
    points, or, unless `packed`, values [experts * rows, columns] of x's dtype.

    How many rows an expert has is known here only. So a fixed number of programs share the tiles
    that there are: those of one expert lie together, and all row blocks of some tokens, so that
    programs at work at the same time find weights and tokens in the cache. A tile is summed by one
    program, in order.
    """
    row_blocks = tl.cdiv(rows, block_rows)
    _, _, token_blocks = _rows_of_experts(
        ends_ptr, tokens, first, experts, block_tokens, block_experts
    )
    tiles = tl.sum(token_blocks, 0) * row_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # Looked up again for each tile: keeping it would cost registers that the product needs.
        begin, end, token_blocks = _rows_of_experts(
            ends_ptr, tokens, first, experts, block_tokens, block_experts
        )
        block = tile // row_blocks
        earlier = tl.cumsum(token_blocks, 0) <= block
        mine = tl.sum(earlier.to(tl.int32), 0)
        here = tl.arange(0, block_experts) == mine
        block -= tl.sum(tl.where(earlier, token_blocks, 0), 0)
        token_end = tl.sum(tl.where(here, end, 0), 0)
        token_begin = tl.sum(tl.where(here, begin, 0), 0) + block * block_tokens
        token = token_begin.to(tl.int64) + tl.arange(0, block_tokens)
        row = (tile % row_blocks) * block_rows + tl.arange(0, block_rows)
        row_begin = mine.to(tl.int64) * rows
        total = tl.zeros((block_rows, block_tokens), dtype=tl.float32)
        for at in range(0, words, block_words):
            column = at * 8 + tl.arange(0, 8 * block_words)
            if packed:
                weight = _load_weights(
                    weight_ptr,
                    scale_ptr,
                    zero_ptr,
                    row_begin + row,
                    at + tl.arange(0, block_words),
                    row_begin + rows,
                    words,
                    words,
                    groups,
                    words_per_group,
                    has_zeros,
                    block_words,
                    x_ptr.dtype.element_ty,
                )
            else:
                weight = tl.load(
                    weight_ptr + (row_begin + row)[:, None] * columns + column[None, :],
                    mask=(row < rows)[:, None] & (column < columns)[None, :],
                    other=0.0,
                )
            x = tl.load(
                x_ptr + token[:, None] * columns + column[None, :],
                mask=(token < token_end)[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            if in_float32:
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            total = tl.dot(weight, tl.trans(x), acc=total, input_precision="ieee")
        inside = (row < rows)[:, None] & (token < token_end)[None, :]
        y = y_ptr + token[None, :] * rows + row[:, None]
        tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)
