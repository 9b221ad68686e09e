"""Compile the Triton kernels for an NVIDIA architecture (80, 90, ..); no GPU is needed.

Prints a line for each: its name, the registers of a thread, the bytes that a thread keeps in
memory for want of registers, and the bytes of shared memory that a block asks for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardsurgeon_kernels import gpu, triton_kernels

POINTERS = {
    "ends_ptr": "*i32",
    "packed_ptr": "*i32",
    "scale_ptr": "*bf16",
    "zero_ptr": "*i8",
    "partial_ptr": "*fp32",
}
# Kimi K2.5's sizes divide by sixteen, which lets loads be wide; these may not.
ANY_SIZE = {"tokens", "first", "experts", "words_per_group"}


def launches() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Every kernel as gpu.py launches it: name, function, constants, options."""
    for tokens in (16, 32, 64):
        for has_zeros in (False, True):
            tiles = gpu.tiles_for(tokens, 2048, 896)
            constants = {"has_zeros": has_zeros, **blocks(tiles)}
            name = f"matmul-{tokens}-{has_zeros}"
            yield name, triton_kernels.matmul_kernel, constants, options(tiles)
    for tokens in (16, 32, 64):
        for has_zeros in (False, True):
            tiles = gpu.grouped_tiles(384 * tokens, 384, torch.bfloat16, packed=True)
            constants = {"packed": True, "has_zeros": has_zeros, "block_experts": 512}
            name = f"grouped-{tokens}-{has_zeros}"
            yield name, triton_kernels.grouped_kernel, constants | blocks(tiles), options(tiles)
    for dtype in (torch.bfloat16, torch.float32):
        tiles = gpu.grouped_tiles(384 * 1000, 384, dtype, packed=False)
        constants = {"packed": False, "has_zeros": False, "block_experts": 32, "dtype": dtype}
        name = f"grouped-plain-{str(dtype).removeprefix('torch.')}"
        yield name, triton_kernels.grouped_kernel, constants | blocks(tiles), options(tiles)
    constants = {"has_zeros": True, "block_rows": 8, "block_words": 64}
    yield "dequantize", triton_kernels.dequantize_kernel, constants, {}
    constants = {"splits": 8, "has_bias": True, "block": 1024}
    yield "reduce", triton_kernels.reduce_kernel, constants, {}


def blocks(tiles: gpu.Tiles) -> dict[str, Any]:
    sizes = {"tokens": tiles.tokens, "rows": tiles.rows, "words": tiles.words}
    return {"in_float32": False} | {f"block_{name}": size for name, size in sizes.items()}


def options(tiles: gpu.Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    """The kernel for arguments as they are in practice: floats of 16 bits, sizes that divide."""
    plain = "*fp32" if constants.pop("dtype", None) is torch.float32 else "*bf16"
    signature, aligned = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, plain) if name.endswith("_ptr") else "i32"
        if name == "weight_ptr" and constants["packed"]:
            signature[name] = "*i32"
        if name not in ANY_SIZE:
            aligned[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, aligned)


def usage(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it keeps in memory instead."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for name, kernel, constants, chosen in launches():
        compiled = triton.compile(source(kernel, constants), target=target, options=chosen)
        print(name, *usage(compiled.asm["cubin"]), compiled.metadata.shared, flush=True)


if __name__ == "__main__":
    main()
