"""Time against size: `plan` over the number of tensors, `apply` over the bytes that are kept.

Called by `run.py --growth PNG`, and needs matplotlib. Both must lie on a straight line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import measure

HERE = Path(__file__).parent
LAYERS = (8, 16, 31, 61)
SIZES = ("2GB", "4GB", "6GB", "8GB")

Point = tuple[float, float]  # (thousands of tensors or GB, seconds)


def draw(work: Path, picture: Path, runs: int) -> None:
    """Measure, print both tables and save the picture."""
    planned = [plan_point(work, layers, runs) for layers in LAYERS]
    print("\n" + _table("thousand tensors", "plan", planned))
    applied = [apply_point(work, size, runs) for size in SIZES]
    print("\n" + _table("GB kept", "apply", applied))
    _save(picture, planned, applied)


def plan_point(work: Path, layers: int, runs: int) -> Point:
    """The time of `plan` on Kimi-K2.5 with so many of its layers; headers only."""
    model = _skeleton(work, "--layers", str(layers))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    samples = [measure.run(_command("plan", model)) for _ in range(runs)]
    shutil.rmtree(model)
    return len(index["weight_map"]) / 1000, measure.median(samples).wall


def apply_point(work: Path, size: str, runs: int) -> Point:
    """The time of `apply` on a model of that size, read from memory."""
    model, out = _skeleton(work, "--size", size, "--shards", "4", "--fill"), work / "out"
    samples, kept = [], 0
    for _ in range(runs):
        measure.remove(out)
        measure.warm(model)
        samples.append(measure.run([*_command("apply", model), "-o", str(out)]))
        kept = sum(path.stat().st_size for path in measure.files(out))
    measure.remove(out)
    shutil.rmtree(model)
    return kept / 1e9, measure.median(samples).wall


def _skeleton(work: Path, *options: str) -> Path:
    model = work / "model"
    subprocess.run([sys.executable, str(HERE / "skeleton.py"), str(model), *options], check=True)
    return model


def _command(name: str, model: Path) -> list[str]:
    words = [name, str(model / "scores.json"), "--model", str(model), "--ratio", "0.5"]
    return [sys.executable, "-m", "shardsurgeon", *words]


def _table(unit: str, command: str, points: Sequence[Point]) -> str:
    rows = [[f"{x:,.1f}", f"{seconds:.2f}", f"{1000 * seconds / x:.1f}"] for x, seconds in points]
    return measure.table([unit, f"{command} s", f"ms per {unit.rstrip('s')}"], rows)


def _save(picture: Path, planned: Sequence[Point], applied: Sequence[Point]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, points, unit, title in (
        (panels[0], planned, "thousand tensors", "plan"),
        (panels[1], applied, "GB kept", "apply"),
    ):
        slope, start = _line(points)
        end = 1.05 * max(x for x, _ in points)
        panel.plot([0, end], [start, start + slope * end], color="0.7", linewidth=1)
        panel.plot(*zip(*points, strict=True), "o", color="black")
        panel.set(title=title, xlabel=unit, ylabel="seconds", xlim=(0, end))
        panel.set_ylim(bottom=0)
    figure.savefig(picture, dpi=120)


def _line(points: Sequence[Point]) -> tuple[float, float]:
    """(slope, value at zero) of the line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x
