"""The one place where an implementation is chosen, by the device of the tensors.

cuda (also ROCm) with Triton installed: the Triton kernels. cpu with a C compiler: the native
implementation. All others: plain torch operations. The environment variable
`SHARDSURGEON_KERNELS`, read at each call, chooses one of reference, eager, native, triton instead.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from shardsurgeon_kernels import eager, native, reference
from shardsurgeon_kernels.stack import PackedInt4Stack
from shardsurgeon_kernels.weight import PackedInt4

VARIABLE = "SHARDSURGEON_KERNELS"
NAMES = ("reference", "eager", "native", "triton")


class Implementation(Protocol):
    """An implementation is a module with these names."""

    NAME: str

    def unpack(self, packed: Tensor, in_features: int) -> Tensor:
        """int32 words -> int8 values."""

    def dequantize(self, weight: PackedInt4, dtype: torch.dtype) -> Tensor:
        """The weight as a matrix of `dtype`."""

    def linear(self, x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
        """x times the weight's transpose."""

    def grouped_linear(self, x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
        """Rows of x, sorted by expert, times their experts' weights."""


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Unpack int32 [out, ceil(in / 8)] to int8 [out, in], values in -8..7.

    Raises ValueError for another dtype, or a width that does not fit `in_features`.
    """
    return choose(packed.device).unpack(packed, in_features)


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The weight as [out, in] of `dtype`: `(q - zero_point) * scale`, rounded once.

    Every implementation gives the same bits; where `dtype` is that of the scale, they are those
    of compressed-tensors' decompression. Raises ValueError for a dtype that is not a float.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"weights dequantize to a floating-point dtype, not to {dtype}")
    return choose(weight.packed.device).dequantize(weight, dtype)


def dequantize_stack(
    weights: PackedInt4Stack, dtype: torch.dtype, begin: int = 0, end: int | None = None
) -> Tensor:
    """Experts begin:end as [end - begin, out, in] of `dtype`, each as `dequantize` gives it.

    On a GPU, one launch. Raises ValueError for a dtype that is not a float, or experts that the
    stack does not have.
    """
    last = len(weights) if end is None else end
    rows = dequantize(weights.flat(begin, last), dtype)
    return rows.view(last - begin, *weights.shape[1:])


def linear(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias`: x [.., in] -> [.., out] in x's dtype, with W as `dequantize` gives it.

    bias: [out] of x's dtype, or None. For inference only: it has no gradient. Raises ValueError
    where x's last dimension is not `in`, x is not a float, or x is on another device.
    """
    if not x.dtype.is_floating_point or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        expected = f"a float tensor [.., {weight.shape[1]}]"
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the weight expects {expected}")
    if x.device != weight.packed.device:
        raise ValueError(f"x lies on {x.device}, the weight on {weight.packed.device}")
    with torch.no_grad():
        return choose(x.device).linear(x, weight, bias)


def grouped_linear(x: Tensor, weights: PackedInt4Stack, ends: Tensor) -> Tensor:
    """x [M, in], its rows sorted by expert -> [M, out] in x's dtype, each as `linear` gives it.

    ends: int32 [E] on x's device, the rows of experts 0 to e together: those of expert e are
    `ends[e - 1]:ends[e]`, which may be none. Rows past `ends[-1]` become zero. On a GPU nothing
    waits for the host, so the values of `ends` are not checked there, and results do not depend on
    timing; float64 alone goes the slow way, as on a CPU.

    For inference only: it has no gradient. Raises ValueError where shapes, dtypes or devices do
    not fit, and on a CPU also where `ends` decreases or passes M.
    """
    experts, _, in_features = weights.shape
    if not x.dtype.is_floating_point or x.ndim != 2 or x.shape[1] != in_features:
        expected = f"a float tensor [M, {in_features}]"
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the weights expect {expected}")
    if ends.dtype is not torch.int32 or tuple(ends.shape) != (experts,):
        raise ValueError(
            f"ends is {ends.dtype} {list(ends.shape)}; expected torch.int32 [{experts}]"
        )
    if x.device != weights.packed.device or x.device != ends.device:
        where = f"x lies on {x.device}, the weights on {weights.packed.device}"
        raise ValueError(f"{where}, ends on {ends.device}")
    with torch.no_grad():
        return choose(x.device).grouped_linear(x, weights, ends)


def implementation_name(device: torch.device) -> str:
    """The name of the implementation for a device, one of NAMES; for reports."""
    return choose(device).NAME


def choose(device: torch.device) -> Implementation:
    """The implementation for a device. Raises ValueError for an unknown name in the variable."""
    asked = os.environ.get(VARIABLE, "")
    if asked:
        return named(asked)
    if device.type == "cuda" and find_spec("triton") is not None:
        return named("triton")
    if device.type == "cpu" and native.available():
        return native
    return eager


def named(name: str) -> Implementation:
    """The implementation of a name. Triton is imported only when this function asks for it."""
    if name == "triton":
        from shardsurgeon_kernels import gpu

        return gpu
    plain: dict[str, Implementation] = {"reference": reference, "eager": eager, "native": native}
    if name not in plain:
        raise ValueError(f"{VARIABLE} is {name!r}; it may be one of {', '.join(NAMES)}")
    return plain[name]
