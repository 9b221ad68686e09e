"""Compile the Triton kernels for an NVIDIA architecture (80, 90, ..); no GPU is needed.

Prints a line for each: its name, and the bytes of shared memory that a block asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardsurgeon_kernels import gpu, triton_kernels

POINTERS = {
    "x_ptr": "*bf16",
    "packed_ptr": "*i32",
    "scale_ptr": "*bf16",
    "zero_ptr": "*i8",
    "partial_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "y_ptr": "*bf16",
}


def launches() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Every kernel as gpu.py launches it: name, function, constants, options."""
    for tokens in (16, 32, 64):
        for has_zeros in (False, True):
            tiles = gpu.tiles_for(tokens, 2048, 896)
            constants = {
                "has_zeros": has_zeros,
                "in_float32": False,
                "block_tokens": tiles.tokens,
                "block_rows": tiles.rows,
                "block_words": tiles.words,
            }
            options = {"num_warps": 4, "num_stages": tiles.stages}
            name = f"matmul-{tokens}-{has_zeros}"
            yield name, triton_kernels.matmul_kernel, constants, options
    constants = {"has_zeros": True, "block_rows": 8, "block_words": 64}
    yield "dequantize", triton_kernels.dequantize_kernel, constants, {}
    constants = {"splits": 8, "has_bias": True, "block": 1024}
    yield "reduce", triton_kernels.reduce_kernel, constants, {}


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for name, kernel, constants, options in launches():
        signature = {
            parameter.name: "constexpr"
            if parameter.name in constants
            else POINTERS.get(parameter.name, "i32")
            for parameter in kernel.params
        }
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=target, options=options)
        print(name, compiled.metadata.shared)


if __name__ == "__main__":
    main()
