"""How near a calibration comes to the plain products of its model, on whatever device there is.

    python tests/bench/layer_stream.py                                     a small model, on a CPU
    python tests/bench/layer_stream.py --shapes kimi --device cuda --tokens 1048576 --length 16384
    python tests/bench/layer_stream.py --shapes qwen --device cuda --tokens 1048576 --length 16384

Writes a checkpoint of random weights, of a few layers with the shapes of Kimi-K2.5 (INT4) or
Qwen3-235B (bf16), and prints a table: the products alone, with random data of the shapes, dtype and
token counts that the layers have; a forward of transformers' own model, where it can be loaded;
the calibration. Each runs in a process of its own, so that the peaks of memory are its own. Needs
torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import measure
from layouts import KIMI, QWEN, Model, Spec, config, tensors

# With first layer dense, as published.
SHAPES = {
    "small": replace(QWEN, layers=4, experts=64, hidden=512, moe=256, vocabulary=4096, heads=8),
    "kimi": replace(KIMI, layers=3, vocabulary=4096, vision_blocks=0),
    "qwen": replace(QWEN, layers=3, vocabulary=4096),
}
TOP_K = 8
# Experts of one layer that the products alone rotate through: more would only take memory.
ROTATED = 16
# Of what is free, the most that transformers' model may take to be tried.
FITS = 0.7
PHASES = ("products", "transformers", "calibrate")


@dataclass
class Figures:
    """What one process measured. seconds, and bytes; parts: of the seconds, by name."""

    seconds: float = 0.0
    host: int = 0
    device: int = 0
    parts: dict[str, float] | None = None
    counted: dict[str, Any] | None = None
    problem: str = ""


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="a dense first one of Kimi's included")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--tokens", type=int, default=4096, help="of all samples together")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="float32 is faster on most CPUs")
    parser.add_argument("--work", type=Path, help="where the checkpoint is written")
    parser.add_argument("--phase", choices=("make", *PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    counts = {"layers": given.layers, "experts": given.experts}
    model = replace(SHAPES[given.shapes], **{key: n for key, n in counts.items() if n})
    run = Run(model, given.tokens // given.length, given.length, given.device, given.dtype)
    if given.phase == "make":
        make(model, given.folder)
    elif given.phase:
        figures = getattr(run, given.phase)(given.folder)
        figures.host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures.device = run.device_peak()
        (given.folder / f"{given.phase}.json").write_text(json.dumps(asdict(figures)))
    else:
        with tempfile.TemporaryDirectory(dir=given.work) as scratch:
            compare(run, Path(scratch) / "model")


def compare(run: Run, folder: Path) -> None:
    """Run the phases and print what they measured."""
    words = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--phase"]
    measure.run([*words, "make"])
    measure.warm(folder)
    found = {}
    for phase in PHASES:
        measure.run([*words, phase])
        found[phase] = Figures(**json.loads((folder / f"{phase}.json").read_text()))
    print("\n".join(report(run, found)))


def report(run: Run, found: dict[str, Figures]) -> Iterator[str]:
    """Markdown."""
    products, stream = found["products"], found["calibrate"]
    assert products.parts is not None and stream.counted is not None
    tokens = run.samples * run.length
    yield f"{run.samples} x {run.length:,} tokens on {run.device}, {run.dtype}, {run.model}"
    yield ""
    rows = []
    for name, seconds in products.parts.items():
        if name != "reading":
            rows.append([f"products: {name}", f"{seconds:.2f}", "", "", "", ""])
    names = {"products": "products alone"}
    for name, figures in ((names.get(phase, phase), each) for phase, each in found.items()):
        if figures.problem:
            rows.append([f"{name}: {figures.problem}", "", "", "", "", ""])
            continue
        ratio = f"{figures.seconds / products.seconds:.2f}"
        speed = f"{tokens / figures.seconds:,.0f}"
        peaks = (f"{nbytes / 1e6:,.0f}" for nbytes in (figures.host, figures.device))
        rows.append([name, f"{figures.seconds:.2f}", speed, ratio, *peaks])
    headings = ("", "seconds", "tokens/s", "÷ products", "host MB", "device MB")
    yield measure.table(headings, rows)
    yield ""
    moving = sum(stream.parts.values()) if stream.parts else 0.0
    hidden = products.seconds + moving - stream.seconds
    share = min(max(hidden / moving, 0.0), 1.0) if moving else 1.0
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in (stream.parts or {}).items())
    yield f"Moving alone: {each}; of that, beside products: {share:.0%}."
    yield f"Counted: {', '.join(f'{key} {value}' for key, value in stream.counted.items())}."


@dataclass(frozen=True)
class Run:
    """What every phase is given."""

    model: Model
    samples: int
    length: int
    device: str
    dtype: str

    def products(self, folder: Path) -> Figures:
        """The matrix products of all layers, and nothing else."""
        import torch

        with torch.inference_mode():
            parts = {
                "experts": self._experts(),
                "other matrices": self._others(),
                "attention": self._attention(),
            }
        return Figures(sum(parts.values()), parts=parts)

    def _experts(self) -> float:
        """Of one layer, the tokens routed at random; times the layers."""
        import torch

        model, tokens = self.model, self._batch() * self.length
        routed = torch.randint(model.experts, (tokens * TOP_K,)).bincount(minlength=model.experts)
        counts = [count for count in routed.tolist() if count]
        up = [self._random(model.hidden, 2 * model.moe) for _ in range(ROTATED)]
        down = [self._random(model.moe, model.hidden) for _ in range(ROTATED)]
        inputs = self._random(max(counts), model.hidden)

        def once() -> None:
            for expert, count in enumerate(counts):
                inner = inputs[:count] @ up[expert % ROTATED]
                inner[:, : model.moe] @ down[expert % ROTATED]

        return self._timed(once) * len(model.moe_layers)

    def _others(self) -> float:
        """Of all layers, the matrices outside of experts."""
        spent = 0.0
        for rows, columns in self._matrices():
            weight = self._random(columns, rows)
            inputs = self._random(self._batch() * self.length, columns)
            spent += self._timed(lambda a=inputs, b=weight: a @ b)  # type: ignore[misc]
        return spent

    def _matrices(self) -> Iterator[tuple[int, int]]:
        for name, dtype, shape in tensors(self.model):
            inside = ".layers." in name and ".experts." not in name
            if inside and len(shape) == 2 and dtype == "BF16":
                yield shape[0], shape[1]

    def _attention(self) -> float:
        """Of all layers, the fused kernel over samples of their length."""
        import torch

        model = self.model
        latent = model.layout == "int4"
        key = model.nope + model.rope if latent else 128
        value = model.v_head if latent else 128
        shape = (self._batch(), model.heads, self.length)
        queries, keys = self._random(*shape, key), self._random(*shape, key)
        values = self._random(*shape, value)
        attend = torch.nn.functional.scaled_dot_product_attention
        spent = self._timed(lambda: attend(queries, keys, values, is_causal=True))
        return spent * model.layers

    def transformers(self, folder: Path) -> Figures:
        """A forward of the model as transformers has it, without its head."""
        import torch
        from transformers import AutoModelForCausalLM

        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        # Packed weights are unpacked by the library.
        needed = size * (4 if self.model.layout == "int4" else 1) * self._itemsize() // 2
        if needed > self._free() * FITS:
            return Figures(problem=f"not loaded, {needed / 1e9:.1f} GB do not fit")
        try:
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype))
            inner = whole.to(self.device).eval().model
        except Exception as error:
            return Figures(problem=f"not loaded, {type(error).__name__}: {str(error)[:60]}")
        ids = torch.randint(self.model.vocabulary, (self._batch(), self.length), device=self.device)
        with torch.inference_mode():
            return Figures(self._timed(lambda: inner(ids, use_cache=False)))

    def calibrate(self, folder: Path) -> Figures:
        """The engine; what it moves, and how long that takes alone."""
        import numpy as np

        from shardsurgeon.checkpoint.checkpoint import open_checkpoint
        from shardsurgeon.layerwise.activations import ActivationStore
        from shardsurgeon.layerwise.devices import Device
        from shardsurgeon.layerwise.engine import calibrate_layers
        from shardsurgeon.layerwise.memory import free_memory
        from shardsurgeon.layerwise.samples import Sample
        from shardsurgeon.layerwise.settings import Settings

        drawn = np.random.default_rng(0)
        samples = [
            Sample(drawn.integers(0, self.model.vocabulary, self.length), "random", number)
            for number in range(self.samples)
        ]
        lengths, budget = [self.length] * self.samples, free_memory("cpu") // 2
        device = Device(self.device)
        sink, scratch = Forget(), tempfile.TemporaryDirectory(dir=folder.parent)
        begun = time.perf_counter()
        with scratch as place, ActivationStore(Path(place), lengths, budget) as store:
            schedule = calibrate_layers(
                open_checkpoint(folder),
                samples,
                Settings(self.device, self.dtype),
                store,
                sink,
                lambda progress: None,
                device=device,
            )
        seconds = time.perf_counter() - begun
        counted = {
            "experts": f"held by {schedule.hold}, {schedule.group} at once",
            "batch": f"{schedule.batch_size} samples",
            "chunk": f"{schedule.chunk:,} tokens",
            "states": f"in {schedule.states}",
            "states in": f"{device.sent / 1e6:,.1f} MB",
            "states out": f"{device.fetched / 1e6:,.1f} MB",
            "weights": f"{device.loaded / 1e6:,.1f} MB",
            "announced peak": f"{schedule.device_nbytes / 1e6:,.0f} MB",
        }
        nbytes = device.sent + device.fetched + device.loaded
        parts = {"reading": _reading(folder), **self._linking(nbytes)}
        return Figures(seconds, parts=parts, counted=counted)

    def _linking(self, nbytes: int) -> dict[str, float]:
        """Seconds that so many bytes take over the link, from pinned memory."""
        if self.device == "cpu":
            return {}
        import torch

        block = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(block, device=self.device)
        each = self._once(lambda: there.copy_(block, non_blocking=True))
        return {"link": each * nbytes / block.numel()}

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds for all samples, of work on one batch."""
        return self._once(work) * self.samples / self._batch()

    def _once(self, work: Callable[[], object]) -> float:
        """The median of three, after one that does not count."""
        taken = []
        for _ in range(4):
            begun = time.perf_counter()
            work()
            self._wait()
            taken.append(time.perf_counter() - begun)
        return sorted(taken[1:])[1]

    def _batch(self) -> int:
        """Samples of a batch: about as the engine takes them."""
        most = 16_384 if self.device == "cpu" else 65_536
        return max(1, min(self.samples, most // self.length))

    def _random(self, *shape: int) -> Any:
        import torch

        dtype = getattr(torch, self.dtype)
        return torch.randn(shape, dtype=dtype, device=self.device) / shape[-1] ** 0.5

    def _itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def _free(self) -> int:
        from shardsurgeon.layerwise.memory import free_memory

        return free_memory(self.device)

    def _wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize(self.device)

    def device_peak(self) -> int:
        """Bytes, 0 on a CPU."""
        if self.device == "cpu":
            return 0
        import torch

        return int(torch.cuda.max_memory_allocated(self.device))


class Forget:
    """A sink that keeps nothing."""

    def finished_layer(self, index: int, is_mtp: bool, accumulators: object) -> None:
        """Nothing."""

    def done_layers(self) -> set[int]:
        """None."""
        return set()


def _reading(folder: Path) -> float:
    """Seconds to read every shard once, as the cache has them."""
    begun = time.perf_counter()
    measure.warm(folder)
    return time.perf_counter() - begun


def make(model: Model, folder: Path) -> None:
    """Write the checkpoint, one shard a layer, with numbers that stay finite."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(model)))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, (_, specs) in enumerate(groupby(tensors(model), key=_layer_of)):
        file = f"model-{number:05}.safetensors"
        held = {spec[0]: _values(spec, generator) for spec in specs}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _layer_of(spec: Spec) -> str:
    """The number of a tensor's layer; empty outside of layers."""
    parts = spec[0].split(".")
    return parts[parts.index("layers") + 1] if "layers" in parts else ""


def _values(spec: Spec, generator: Any) -> Any:
    """A tensor of that name, dtype and shape."""
    import torch

    name, dtype, shape = spec
    if name.endswith("weight_packed"):
        words = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64)
        return words.to(torch.int32)
    if name.endswith("weight_shape"):
        # Of the matrix that is packed; --experts and --layers leave its shape as it is.
        shape = (KIMI.hidden, KIMI.moe) if "down_proj" in name else (KIMI.moe, KIMI.hidden)
        return torch.tensor(shape, dtype=torch.int32)
    if name.endswith("weight_scale"):
        # Four bits have a spread of about 4.6.
        return torch.full(shape, 1 / (4.6 * math.sqrt(32 * shape[-1])), dtype=torch.bfloat16)
    if dtype == "F32":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    return drawn.bfloat16()


if __name__ == "__main__":
    main()
