"""Time against size: `plan` over the number of tensors, `apply` over the bytes that are kept.

Called by `run.py --growth PNG`, and needs matplotlib. Both must lie on a straight line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measure

LAYERS = (8, 16, 31, 61)
SIZES = ("2GB", "4GB", "6GB", "8GB")


@dataclass(frozen=True)
class Point:
    """A size, in thousands of tensors or in GB, and the figures of that size."""

    size: float
    figures: measure.Sample


def draw(work: Path, picture: Path, runs: int) -> None:
    """Measure, print both tables and save the picture."""
    planned = plan_points(work, runs)
    print("\n" + _table("thousand tensors", "plan", planned))
    applied = [apply_point(work, size, runs) for size in SIZES]
    print("\n" + _table("GB kept", "apply", applied))
    _save(picture, planned, applied)


def plan_points(work: Path, runs: int) -> list[Point]:
    """`plan` on Kimi-K2.5 with so many of its layers; the shards are headers only."""
    models = [measure.make_model(work / f"layers-{n}", "--layers", str(n)) for n in LAYERS]
    rounds = [[measure.run(_command("plan", model)) for model in models] for _ in range(runs)]
    points = []
    for model, samples in zip(models, zip(*rounds, strict=True), strict=True):
        points.append(Point(tensors_of(model) / 1000, measure.median(samples)))
        shutil.rmtree(model)
    return points


def tensors_of(model: Path) -> int:
    """How many tensors a model has; asked of a process of its own, as reading them takes memory."""
    words = [sys.executable, "-m", "shardsurgeon", "inspect", str(model), "--json"]
    said = subprocess.run(words, check=True, capture_output=True).stdout
    tensors: int = json.loads(said)["tensors"]
    return tensors


def apply_point(work: Path, size: str, runs: int) -> Point:
    """`apply` on a model of that size, read from memory."""
    model = measure.make_model(work / "model", "--size", size, "--shards", "4", "--fill")
    out = work / "out"
    samples, kept = [], 0
    for _ in range(runs):
        measure.remove(out)
        measure.warm(model)
        samples.append(measure.run([*_command("apply", model), "-o", str(out)]))
        kept = sum(path.stat().st_size for path in measure.files(out))
    measure.remove(out)
    shutil.rmtree(model)
    return Point(kept / 1e9, measure.median(samples))


def _command(name: str, model: Path) -> list[str]:
    words = [name, str(model / "scores.json"), "--model", str(model), "--ratio", "0.5"]
    return [sys.executable, "-m", "shardsurgeon", *words]


def _table(unit: str, command: str, points: Sequence[Point]) -> str:
    rows = [
        [
            f"{point.size:,.1f}",
            f"{point.figures.wall:.2f}",
            f"{point.figures.cpu:.2f}",
            f"{point.figures.rss / 1e6:,.0f}",
        ]
        for point in points
    ]
    return measure.table([unit, f"{command}, wall s", "CPU s", "peak MB"], rows)


def _save(picture: Path, planned: Sequence[Point], applied: Sequence[Point]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, points, unit, title in (
        (panels[0], planned, "thousand tensors", "plan"),
        (panels[1], applied, "GB kept", "apply"),
    ):
        slope, start = _line(points)
        end = 1.05 * max(point.size for point in points)
        panel.plot([0, end], [start, start + slope * end], color="0.7", linewidth=1)
        walls = [point.figures.wall for point in points]
        panel.plot([point.size for point in points], walls, "o", color="black")
        panel.set(title=title, xlabel=unit, ylabel="seconds", xlim=(0, end))
        panel.set_ylim(bottom=0)
    figure.savefig(picture, dpi=120)


def _line(points: Sequence[Point]) -> tuple[float, float]:
    """(slope, value at zero) of the line with the least squares."""
    pairs = [(point.size, point.figures.wall) for point in points]
    mean_x = sum(x for x, _ in pairs) / len(pairs)
    mean_y = sum(y for _, y in pairs) / len(pairs)
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    return slope, mean_y - slope * mean_x
