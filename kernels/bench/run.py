"""The benchmark of the INT4 kernels: `python kernels/bench/run.py`. Prints Markdown tables.

One table for the CPU and one for the first GPU, if there is one. Columns:
  library   compressed-tensors' decompression, then a bfloat16 matmul: what is replaced
  ours / library     how many times faster than that
  at most   how many times faster a dequantization that costs nothing would be
  plain     a bfloat16 matmul with a weight that was never packed: the limit for many tokens
  of bandwidth       what must be read and written at least, as a share of what a copy moves in
            that time: the limit for few tokens
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from contenders import Expert, make_expert, methods
from timing import bandwidth, side_by_side

from shardsurgeon_kernels import implementation_name, native

SHAPES = ("2048x7168", "7168x2048")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
HEADER = (
    "| out x in | tokens | ours ms | library ms | ours / library | at most "
    "| plain ms | ours / plain | of bandwidth |"
)
NO_GPU = "No GPU was found: the Triton kernels were not timed."


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Benchmark of the INT4 kernels.")
    parser.add_argument("--shape", action="append", metavar="OUTxIN", help="default: K2.5's two")
    parser.add_argument("--tokens", type=int, action="append", metavar="M")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each method (15)")
    words = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in words.shape or SHAPES]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    with torch.inference_mode():
        for device in devices:
            for line in table(device, shapes, words.tokens or list(TOKENS), words.rounds):
                print(line, flush=True)
    if len(devices) == 1:
        print(f"\n{NO_GPU}")


def table(
    device: torch.device, shapes: list[tuple[int, ...]], tokens: list[int], rounds: int
) -> Iterator[str]:
    """The lines of one device's table, each as soon as it is measured."""
    copied = bandwidth(device, rounds)
    yield f"\n{describe(device)}; a copy moves {copied / 1e9:.0f} GB/s.\n"
    yield HEADER
    yield "|---|" + "---:|" * (HEADER.count("|") - 2)
    for out_features, in_features in shapes:
        expert = make_expert(out_features, in_features, device)
        for count in tokens:
            yield f"| {out_features} x {in_features} {row(expert, count, copied, rounds)}"


def row(expert: Expert, tokens: int, copied: float, rounds: int) -> str:
    """Measure one number of tokens. `copied`: bytes in a second."""
    out_features, in_features = expert.packed[0].shape
    device = expert.packed[0].packed.device
    x = torch.randn(tokens, in_features).bfloat16().to(device)
    seconds = side_by_side(methods(expert, x), device, rounds)
    ours, library, plain = seconds["ours"], seconds["library"], seconds["plain"]
    moved = expert.nbytes + x.nbytes + tokens * out_features * x.element_size()
    return (
        f"| {tokens} | {ours * 1e3:.3g} | {library * 1e3:.3g} | **{library / ours:.1f} ×** "
        f"| {library / plain:.1f} × | {plain * 1e3:.3g} | {plain / ours:.2f} "
        f"| {moved / ours / copied:.0%} |"
    )


def describe(device: torch.device) -> str:
    """The machine, the software and the path that was taken."""
    path = implementation_name(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, path: {path}"
    if path == native.NAME:
        path = f"{path} ({native.reason()})"
    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{processor()}, {cores}, torch {torch.__version__}, path: {path}"


def processor() -> str:
    """The processor's name, as well as the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
