"""The CPU implementation: int4.c, compiled once per process by the machine's C compiler.

Compiling takes a fraction of a second and is for exactly this processor, so nothing is cached
and nothing outdated can be loaded. Without a compiler, `available` is False, `reason` says why,
and the dispatch chooses the eager implementation.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from shardsurgeon_kernels import eager, wide
from shardsurgeon_kernels.eager import unpack
from shardsurgeon_kernels.stack import PackedInt4Stack, expert_by_expert
from shardsurgeon_kernels.weight import PackedInt4

__all__ = ["NAME", "available", "dequantize", "grouped_linear", "linear", "reason", "unpack"]

NAME = "native"
# How int4.c numbers what it writes: by dtype, and by the dtype that float32 values are rounded to.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDE_KINDS = {torch.bfloat16: 3, torch.float16: 4}
BASE = ["-O3", "-std=gnu11", "-fPIC", "-shared"]
# Tried in this order: some compilers have no OpenMP, or do not know `native`.
FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], [])
COMPILE_SECONDS = 60
# A block of the dequantized weight: 8 MB of bfloat16. Smaller ones make the matmul slow.
BLOCK_ELEMENTS = 1 << 22
FEW_TOKENS = 256
# With fewer elements, starting a thread costs more than it saves.
ELEMENTS_PER_THREAD = 1 << 16


@dataclass(frozen=True)
class Build:
    """The loaded library. reason: the command that compiled it, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


def available() -> bool:
    """Whether int4.c could be compiled and loaded here."""
    return build().library is not None


def reason() -> str:
    """The compiler and flags in use, or why there is no native implementation."""
    return build().reason


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`(q - zero_point) * scale` as [out, in] of `dtype`, equal to the reference in every bit."""
    rows = _rows_of(weight, dtype)
    if rows is None:
        return eager.dequantize(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    rows.write(0, out, KINDS[dtype])
    return out


def linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: [.., in] -> [.., out], with W dequantized to x's dtype.

    Where the processor has no unit for x's dtype, in float32. Elsewhere, for few tokens, W is
    dequantized one block of rows at a time into one buffer, which is still in the cache when it
    is multiplied, and costs no page faults when it is used again. For many tokens most of the
    time goes into the matmul, which is fastest over the whole weight.
    """
    rows = _rows_of(weight, x.dtype)
    if rows is None:
        return eager.linear(x, weight, bias)
    if wide.pays(x.dtype):
        kind = WIDE_KINDS[x.dtype]
        return wide.linear(x, weight.shape, bias, lambda begin, to: rows.write(begin, to, kind))
    out_features, in_features = weight.shape
    step = max(1, BLOCK_ELEMENTS // max(1, in_features))
    if out_features <= step or x.numel() > FEW_TOKENS * in_features:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    tokens = x.reshape(-1, in_features)
    y = torch.empty(tokens.shape[0], out_features, dtype=x.dtype)
    buffer = torch.empty(step, in_features, dtype=x.dtype)
    for begin in range(0, out_features, step):
        here = slice(begin, min(begin + step, out_features))
        block = buffer[: here.stop - begin]
        rows.write(begin, block, KINDS[x.dtype])
        y[:, here] = torch.nn.functional.linear(tokens, block, None if bias is None else bias[here])
    return y.view(*x.shape[:-1], out_features)


def grouped_linear(x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]:ends[e]` of x times expert e's weight, one expert after the other."""
    return expert_by_expert(linear, x, weights, ends)


@dataclass(frozen=True)
class _Rows:
    """A weight's tensors as int4.c needs them: contiguous, scales in float32."""

    function: Callable[..., int]
    weight: PackedInt4
    packed: Tensor
    scale: Tensor
    zeros: Tensor | None

    def write(self, begin: int, out: Tensor, kind: int) -> None:
        """Fill `out`, contiguous [rows, in], with the rows from `begin` on, in int4.c's `kind`."""
        rows, columns = out.shape
        groups, row_nbytes = self.weight.groups, 4 * self.packed.shape[1]
        zeros = None if self.zeros is None else self.zeros.data_ptr() + begin * groups
        self.function(
            self.packed.data_ptr() + begin * row_nbytes,
            row_nbytes,
            self.scale.data_ptr() + 4 * begin * groups,
            zeros,
            rows,
            columns,
            groups,
            self.weight.columns_per_scale,
            kind,
            out.data_ptr(),
            max(1, min(torch.get_num_threads(), rows * columns // ELEMENTS_PER_THREAD)),
        )


def _rows_of(weight: PackedInt4, dtype: torch.dtype) -> _Rows | None:
    """None where int4.c cannot do it: no compiler, another dtype, groups that begin mid-byte."""
    library = build().library
    if library is None or dtype not in KINDS or not weight.groups_begin_on_bytes:
        return None
    if dtype is torch.float16 and not library.shardsurgeon_has_float16():
        return None
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    scale = weight.scale.to(torch.float32).contiguous()
    function = library.shardsurgeon_dequantize
    return _Rows(function, weight, weight.packed.contiguous(), scale, zeros)


@cache
def build() -> Build:
    """Compile and load int4.c with the first compiler and flags that work."""
    if sys.byteorder == "big":
        return Build(None, "int4.c reads bytes in little-endian order")
    problem = "no C compiler found (looked for $CC, cc, gcc, clang)"
    source = files(__package__).joinpath("int4.c").read_bytes()
    for compiler in _compilers():
        for flags in FLAGS:
            command = [*compiler, *BASE, *flags]
            try:
                return Build(_compile(command, source), shlex.join(command))
            except (OSError, AttributeError, subprocess.SubprocessError) as error:
                problem = f"{shlex.join(command)}: {_first_line(error)}"
    return Build(None, problem)


def _compilers() -> Iterator[list[str]]:
    named = shlex.split(os.environ.get("CC", ""))
    for compiler in (named, ["cc"], ["gcc"], ["clang"]):
        if compiler and shutil.which(compiler[0]):
            yield compiler


def _compile(command: list[str], source: bytes) -> ctypes.CDLL:
    # The file may be deleted once it is loaded; where the system forbids that, it is left.
    with tempfile.TemporaryDirectory(prefix="shardsurgeon-", ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "int4.so"
        subprocess.run(
            [*command, "-x", "c", "-", "-o", str(target)],
            input=source,
            capture_output=True,
            check=True,
            timeout=COMPILE_SECONDS,
        )
        library = ctypes.CDLL(str(target))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function = library.shardsurgeon_dequantize
    function.argtypes = [pointer, number, pointer, pointer, *[number] * 4, ctypes.c_int, pointer]
    function.argtypes += [ctypes.c_int]
    function.restype = None
    library.shardsurgeon_has_float16.restype = ctypes.c_int
    return library


def _first_line(error: Exception) -> str:
    stderr = getattr(error, "stderr", None)
    text = stderr.decode(errors="replace") if stderr else str(error)
    return text.strip().partition("\n")[0]
