"""`scores plot`: a score file as a picture for a paper, by matplotlib; and those of a model card.

At the left the saliencies of every layer in their order, and the cut; at the right what prunes
cost: measured where there is an evaluation, else the share of saliency that goes, which is none.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.recognition import EVALUATION, SCORES
from shardsurgeon.checkpoint.wrong_files import require_file
from shardsurgeon.errors import OutputError, ScoreError, UsageError, install, printable
from shardsurgeon.layerwise.calibration_file import find_calibration
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    by_plan,
    by_way,
    read_evaluation,
)
from shardsurgeon.pruning.analysis import lost_shares, view_alone
from shardsurgeon.pruning.request import removed_count
from shardsurgeon.reports import Report
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.units import counted, require_ratios

AnyPath = str | os.PathLike[str]
Values = NDArray[np.float64]

_KINDS = {".png": b"\x89PNG", ".svg": b"<?xml"}
_MARK = b"shardsurgeon"
_DPI = 200
_GREY, _CUT = "#8c8c8c", "#d55e00"
_COLOURS, _MARKERS = ("#0072b2", "#b34700", "#00735a", "#8a2f6b"), "os^D"
# What makes the same picture of the same numbers: no time, no random names.
_SETTINGS = {"svg.hashsalt": "shardsurgeon", "font.size": 9, "axes.titlesize": 9}
_SHARES = np.linspace(0.0, 1.0, 41)
# What it says of its caches goes to a log where there is one, and not between the lines of a push.
logging.getLogger("matplotlib").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True, repr=False)
class PlotReport(Report):
    """A picture that was written. out: the file; metric: what it shows; removed: experts of the
    largest layers that the cut leaves out, None without a cut; measured: candidates on the curve;
    written: False where it was there already.

    >>> from shardsurgeon.operations.plots import PlotReport
    >>> PlotReport("picture.png", "scores.pt", "reap", 60, 384, 249, 0)
    scores.pt: reap of 384 experts in 60 layers -> picture.png
    """

    out: str
    file: str
    metric: str
    layers: int
    num_experts: int
    removed: int | None
    measured: int
    written: bool = True

    @property
    def title(self) -> str:
        """`scores.pt: reap of 384 experts in 60 layers -> picture.png`."""
        what = f"{self.metric} of {self.num_experts} experts in {counted(self.layers, 'layer')}"
        return f"{self.file}: {what} -> {self.out}{'' if self.written else ': there already'}"


def plot_scores(
    file: AnyPath,
    out: AnyPath,
    *,
    ratio: float | None = None,
    evaluation: AnyPath | None = None,
    metric: str | None = None,
    force: bool = False,
) -> PlotReport:
    """Draw a score file as a .png or .svg.

    ratio: share of the experts of every layer that the cut leaves out, None for no cut; evaluation:
    of the same model, for the curve; metric: None for the one that `plan` would take; force:
    replace another picture of ours. Raises ScoreError for files that are broken or of two models,
    OutputError for another ending, UsageError where matplotlib is missing.

    >>> try:
    ...     shardsurgeon.plot_scores("fixtures/kimi_k25/scores.pt", "picture.pdf")
    ... except shardsurgeon.InputError as error:
    ...     print(error)
    picture.pdf: does not end in .png or .svg; name the picture so
    """
    kind = Path(out).suffix.lower()
    if kind not in _KINDS:
        raise OutputError(out, "does not end in .png or .svg", "name the picture so")
    if ratio is not None:
        require_ratios([ratio])
    given = [Path(each) for each in (file, evaluation) if each is not None]
    output = Output(output_path(out), "a picture", _is_picture, force).apart_from(given)
    require_file(file, SCORES, ScoreError)
    shown = view_alone(read_scores(file), metric)
    found = None if evaluation is None else _evaluation_of(evaluation, file)
    cuts = {n: removed_count(ratio or 0.0, len(row)) for n, row in shown.values.items()}
    drawn = {str(n): row for n, row in shown.values.items()}
    removed = {str(n): count for n, count in cuts.items()} if ratio is not None else {}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_map(figure, left, shown.metric, drawn, removed)
        if found is None:
            _draw_shares(right, drawn)
        else:
            _draw_damage(right, found)

    data = _saved(kind, 10, draw)
    return PlotReport(
        out=os.fspath(out),
        file=os.fspath(file),
        metric=shown.metric,
        layers=len(drawn),
        num_experts=max(map(len, drawn.values())),
        removed=max(removed.values(), default=None) if removed else None,
        measured=0 if found is None else len(found.candidates),
        written=output.write(data),
    )


def _evaluation_of(path: AnyPath, scores: AnyPath) -> EvaluationReport:
    """An evaluation. Raises ScoreError where the scores say that they are of another model."""
    require_file(path, EVALUATION, ScoreError)
    found, calibration = read_evaluation(path), find_calibration(scores)
    said = None if calibration is None else calibration.settings.get("config_sha256")
    if said not in (None, found.config_sha256):
        problem = f"is of {found.model[:40]}, whose config.json has sha256 "
        problem += f"{found.config_sha256[:12]}…, that of {os.fspath(scores)} has {str(said)[:12]}…"
        raise ScoreError(path, problem, "give an evaluation of the same model, or leave it out")
    return found


def map_of_prune(metric: str, layers: Mapping[str, tuple[Values, Values]]) -> bytes:
    """A .png of what a prune kept and what it removed.

    layers: layer → the saliencies of its experts that stayed, and of those that went; NaN where
    one is unknown. Raises UsageError where matplotlib is missing.
    """
    rows = {name: np.concatenate(list(map(_descending, both))) for name, both in layers.items()}
    removed = {name: len(gone) for name, (_, gone) in layers.items()}
    order = "experts that stayed, then those that went, each the highest saliency first"

    def draw(figure: Any) -> None:
        _draw_map(figure, figure.subplots(), metric, rows, removed, order)

    return _saved(".png", 7, draw)


def curve_of_damage(found: EvaluationReport, this: CandidateDamage) -> bytes:
    """A .png of what an evaluation measured; this: the candidate that is marked in it.

    Raises UsageError where matplotlib is missing.
    """

    def draw(figure: Any) -> None:
        _draw_damage(figure.subplots(), found, this)

    return _saved(".png", 5, draw)


def _saved(kind: str, width: float, draw: Callable[[Any], None]) -> bytes:
    """The bytes of a picture, 4 inches high. Raises UsageError where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("scores plot", "needs matplotlib", install("report")) from error
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, 4), layout="constrained")
        draw(figure)
        written = io.BytesIO()
        mark = _MARK.decode()
        metadata = {"Date": None, "Creator": mark} if kind == ".svg" else {"Software": mark}
        figure.savefig(written, format=kind[1:], dpi=_DPI, metadata=metadata)
    return written.getvalue()


def _descending(row: Values) -> Values:
    return np.sort(np.nan_to_num(row, nan=0.0, posinf=np.inf, neginf=0.0))[::-1]


def _draw_map(
    figure: Any,
    axes: Any,
    metric: str,
    layers: Mapping[str, Values],
    removed: Mapping[str, int],
    order: str | None = None,
) -> None:
    """Each layer's saliencies over its own 99.5th percentile.

    removed: layer → experts beyond the cut, empty for no cut; order: that of the saliencies in
    words, None to draw them from the highest down.
    """
    wide = max(map(len, layers.values()))
    picture = np.full((len(layers), wide), np.nan)
    for number, row in enumerate(layers.values()):
        known = _descending(row) if order is None else row
        finite = known[np.isfinite(known)]
        top = np.quantile(finite, 0.995) if finite.size else 0.0
        picture[number, : len(row)] = np.sqrt(np.clip(known / (top or 1.0), 0.0, 1.0))
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0)
    if removed:
        edges = np.array([len(layers[name]) - count for name, count in removed.items()]) - 0.5
        rows = np.arange(len(edges) + 1) - 0.5
        axes.step(np.append(edges, edges[-1]), rows, where="pre", color=_CUT, linewidth=1.5)
    every = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), _plain([*layers][::every]))
    axes.set_xlabel(order or "experts, the highest saliency first")
    axes.set_ylabel("layer")
    axes.set_title(_plain([metric])[0] + (", and the cut" if removed else ""))
    figure.colorbar(image, ax=axes, label="root of saliency over the layer's 99.5th percentile")


def _draw_shares(axes: Any, layers: Mapping[str, Values]) -> None:
    lost = [found for row in layers.values() if (found := lost_shares(row)) is not None]
    if lost:
        rows = np.stack([np.interp(_SHARES, np.linspace(0, 1, len(row)), row) for row in lost])
        for number, (name, row) in enumerate(
            {"mean of the layers": rows.mean(axis=0), "worst layer": rows.max(axis=0)}.items()
        ):
            look = {"color": _COLOURS[number], "linestyle": ("-", "--")[number], "label": name}
            axes.plot(100 * _SHARES, 100 * row, **look)
        axes.legend(frameon=False)
    _label(axes, "saliency dropped, %")
    axes.set_title("share of saliency, which is no accuracy")


def _draw_damage(axes: Any, found: EvaluationReport, this: CandidateDamage | None = None) -> None:
    start = [(0.0, 0.0)]
    lines = {way or "by ratio": start + _points(each) for way, each in by_way(found).items()}
    lines |= {"other plans": _points(others)} if (others := by_plan(found)) else {}
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        style = "" if name == "other plans" else "-"
        look = f"{_MARKERS[number % len(_MARKERS)]}{style}"
        axes.plot(x, y, look, color=_COLOURS[number % len(_COLOURS)], label=_plain([name])[0])
    if this is not None:
        ring = {"markersize": 14, "markerfacecolor": "none", "color": _GREY, "linestyle": ""}
        axes.plot(*zip(*_points([this]), strict=True), "o", **ring, label="this model")
    axes.legend(frameon=False)
    _label(axes, "mean KL, nats per token")
    axes.set_title(f"on {found.predicted:,} tokens")


def _points(candidates: Iterable[CandidateDamage]) -> list[tuple[float, float]]:
    return [(100 * each.removed, each.damage.kl_mean) for each in candidates]


def _label(axes: Any, what: str) -> None:
    axes.set_xlabel("experts removed, %")
    axes.set_ylabel(what)
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(left=0.0)
    axes.grid(color=_GREY, alpha=0.3)


def _plain(names: list[str]) -> list[str]:
    """Words from a file without what matplotlib would read as mathematics."""
    return [printable(name).replace("$", r"\$")[:60] for name in names]


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture that was written here."""
    begun = _KINDS.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return begun is not None and head.startswith(begun) and _MARK in head
