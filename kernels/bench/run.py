"""The benchmark of the INT4 kernels: `python kernels/bench/run.py`. Prints Markdown tables.

Two tables for the CPU and two for the first GPU, if there is one: one projection, and the same
projection of some experts with rows sorted by expert (tokens: of each). Columns:
  library   compressed-tensors' decompression, then a matmul: what is replaced
  ours / library     how many times faster than that
  at most   how many times faster a dequantization that costs nothing would be
  plain     a matmul with a weight that was never packed: the limit for many tokens
  of bandwidth       what must be read and written at least, as a share of what a copy moves in
            that time: the limit for few tokens

`--avx2` takes AVX-512 and AMX away from torch, its libraries and int4.c: what a processor
without units for 16-bit floats does, on one that has them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from contenders import Expert, Experts, grouped_methods, make_expert, make_experts, methods
from timing import Clock, bandwidth, side_by_side

from shardsurgeon_kernels import implementation_name, native, wide

SHAPES = ("2048x7168", "7168x2048")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TOKENS_EACH = (1, 8, 32, 64, 128)
HEADER = (
    "| out x in | tokens | ours ms | library ms | ours / library | at most "
    "| plain ms | ours / plain | of bandwidth |"
)
NO_GPU = "No GPU was found: the Triton kernels were not timed."
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
# Last, as it replaces the -march=native of before.
AVX2_COMPILER = '#!/bin/sh\nexec cc "$@" -march=haswell\n'


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Benchmark of the INT4 kernels.")
    parser.add_argument("--shape", action="append", metavar="OUTxIN", help="default: K2.5's two")
    parser.add_argument("--tokens", type=int, action="append", metavar="M", help="of each expert")
    parser.add_argument("--experts", type=int, default=4, help="in the second table (4)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each method (15)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread, on a machine that others use as well; not the clock's",
    )
    parser.add_argument("--avx2", action="store_true", help="as on a processor with AVX2 only")
    words = parser.parse_args()
    if words.avx2:
        restart_with_avx2()
    if words.processor_time:
        torch.set_num_threads(1)  # others would be counted while they wait
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    with torch.inference_mode():
        for device in devices:
            for line in tables(device, words):
                print(line, flush=True)
    if len(devices) == 1:
        print(f"\n{NO_GPU}")


def tables(device: torch.device, words: argparse.Namespace) -> Iterator[str]:
    """The lines of one device's tables, each as soon as it is measured."""
    shapes = [tuple(map(int, text.split("x"))) for text in words.shape or SHAPES]
    dtype = getattr(torch, words.dtype)
    clock = time.process_time if words.processor_time else time.perf_counter
    copied = bandwidth(device, words.rounds, clock)
    yield f"\n{describe(device, dtype)}; a copy moves {copied / 1e9:.0f} GB/s."
    for experts, tokens in ((1, TOKENS), (words.experts, TOKENS_EACH)):
        yield f"\n{f'{experts} experts' if experts > 1 else 'One projection'}:\n"
        yield HEADER
        yield "|---|" + "---:|" * (HEADER.count("|") - 2)
        for out_features, in_features in shapes:
            expert = make_expert(out_features, in_features, dtype, device)
            stacks = make_experts(experts, expert) if experts > 1 else None
            for count in words.tokens or tokens:
                line = row(expert, stacks, count, copied, words.rounds, clock)
                yield f"| {out_features} x {in_features} {line}"


def row(
    expert: Expert,
    stacks: Experts | None,
    tokens: int,
    copied: float,
    rounds: int,
    clock: Clock,
) -> str:
    """Measure one number of tokens. `copied`: bytes in a second."""
    one = expert.packed[0]
    out_features, in_features = one.shape
    device, dtype = one.packed.device, one.scale.dtype
    experts = 1 if stacks is None else len(stacks.packed[0])
    x = torch.randn(tokens * experts, in_features).to(device, dtype)
    ways = methods(expert, x) if stacks is None else grouped_methods(stacks, x, tokens)
    seconds = side_by_side(ways, device, rounds, clock)
    ours, library, plain = seconds["ours"], seconds["library"], seconds["plain"]
    moved = experts * expert.nbytes + x.nbytes + x.shape[0] * out_features * x.element_size()
    return (
        f"| {tokens} | {ours * 1e3:.3g} | {library * 1e3:.3g} | **{library / ours:.1f} ×** "
        f"| {library / plain:.1f} × | {plain * 1e3:.3g} | {plain / ours:.2f} "
        f"| {moved / ours / copied:.0%} |"
    )


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The machine, the software and the path that was taken."""
    name = str(dtype).removeprefix("torch.")
    path = f"{name}, path: {implementation_name(device)}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {path}"
    if implementation_name(device) == native.NAME:
        path = f"{path} ({native.reason()})"
    if wide.pays(dtype):
        path = f"{path}, products in float32"
    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    held = ", held to AVX2" if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" else ""
    return f"{processor()}{held}, {cores}, torch {torch.__version__}, {path}"


def processor() -> str:
    """The processor's name, as well as the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def restart_with_avx2() -> None:
    """Become the same command without `--avx2`, with a processor that has AVX2 only."""
    # Read once, when the process starts, so that it has to start again.
    compiler = Path(tempfile.mkdtemp(prefix="shardsurgeon-")) / "cc-avx2"
    compiler.write_text(AVX2_COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    words = [word for word in sys.argv if word != "--avx2"]
    environment = os.environ | AVX2 | {"CC": str(compiler)}
    os.execve(sys.executable, [sys.executable, *words], environment)


if __name__ == "__main__":
    main()
