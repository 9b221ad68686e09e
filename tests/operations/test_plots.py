"""`scores plot`: pictures that matplotlib can read again, the same for the same numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.errors import OutputError, ScoreError, UsageError
from shardsurgeon.operations.plots import plot_scores
from shardsurgeon.scores.files import write_scores
from tests.layerwise.files import calibration
from tests.support import pages

VALUES = pages.saliencies(4, 16)
KEEP = pages.keep_list(VALUES, 6)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return pages.lay_scores(tmp_path / "scores.json", VALUES)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    (tmp_path / "e.json").write_bytes(pages.evaluation(KEEP).file())
    return tmp_path / "e.json"


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Which pixels [high, wide] are of a colour."""
    return np.abs(picture[..., :3] - np.array(colour) / 255).max(axis=-1) < 0.02


def test_the_cut_stands_where_the_kept_experts_end(scores: Path, tmp_path: Path) -> None:
    for ratio, kept in ((0.25, 12), (0.75, 4)):
        out = tmp_path / f"{ratio}.png"
        assert plot_scores(scores, out, ratio=ratio).removed == 16 - kept
        picture = matplotlib.image.imread(out)
        line = np.flatnonzero(near(picture, (0xD5, 0x5E, 0x00)).sum(axis=0) > 100)
        # The map lies between its darkest and its brightest columns: viridis from 16 experts.
        bright = np.flatnonzero(near(picture, (253, 231, 36)).sum(axis=0) > 100)
        left = bright.min()
        frame = np.flatnonzero((picture[:, :, :3].max(axis=-1) < 0.05).sum(axis=0) > 500)
        right = frame[frame > line.max()].min()
        share = (line.mean() - left) / (right - left)
        assert abs(share - kept / 16) < 0.01


def test_the_same_numbers_give_the_same_bytes(
    scores: Path, evaluation: Path, tmp_path: Path
) -> None:
    for kind in ("png", "svg"):
        one, other = tmp_path / f"one.{kind}", tmp_path / f"other.{kind}"
        for out in (one, other):
            plot_scores(scores, out, ratio=0.5, evaluation=evaluation)
        assert one.read_bytes() == other.read_bytes()
        assert not plot_scores(scores, one, ratio=0.5, evaluation=evaluation).written
        with pytest.raises(OutputError, match="replace a picture with --force"):
            plot_scores(scores, one, ratio=0.25)
        assert plot_scores(scores, one, ratio=0.25, force=True).written


def test_an_svg_has_no_time_and_asks_the_network_for_nothing(
    scores: Path, evaluation: Path, tmp_path: Path
) -> None:
    plot_scores(scores, tmp_path / "p.svg", evaluation=evaluation)
    text = (tmp_path / "p.svg").read_text()
    assert "dc:date" not in text
    links = re.findall(r'href="([^"]*)"', text)
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_what_a_file_says_is_no_mathematics(evaluation: Path, tmp_path: Path) -> None:
    rows = {str(n): {"$x_1": row.tolist()} for n, row in enumerate(VALUES, start=1)}
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    found = json.loads(evaluation.read_text())
    for candidate in found["candidates"]:
        candidate["name"] += " $\\frac{"
    evaluation.write_text(json.dumps(found))
    report = plot_scores(tmp_path / "odd.json", tmp_path / "p.png", evaluation=evaluation)
    assert (report.metric, report.measured) == ("$x_1", 8)


def test_an_evaluation_of_another_model_is_refused(evaluation: Path, tmp_path: Path) -> None:
    scores = tmp_path / "own.npz"
    write_scores(scores, calibration(1).content())
    with pytest.raises(ScoreError, match=r"sha256 cccccccccccc…, that of .*own\.npz has abababab"):
        plot_scores(scores, tmp_path / "p.png", evaluation=evaluation)
    write_scores(tmp_path / "same.npz", calibration(1, config_sha256="c" * 64).content())
    assert plot_scores(tmp_path / "same.npz", tmp_path / "p.png", evaluation=evaluation).written


def test_what_cannot_be_drawn_is_said_before_anything_is_written(
    scores: Path, evaluation: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"does not end in \.png or \.svg"):
        plot_scores(scores, tmp_path / "p.pdf")
    with pytest.raises(UsageError, match=r"ratio: 1\.5 is not between 0 and 1"):
        shardsurgeon.plot_scores(scores, tmp_path / "p.png", ratio=1.5)
    with pytest.raises(ScoreError, match="there is no such file"):
        plot_scores(tmp_path / "none.pt", tmp_path / "p.png")
    with pytest.raises(ScoreError):
        plot_scores(scores, tmp_path / "p.png", metric="none")
    with pytest.raises(OutputError, match="is read by this command"):
        plot_scores(tmp_path / "s.png", scores.rename(tmp_path / "s.png"), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "s.png"}


def test_a_report_says_what_was_drawn(scores: Path, tmp_path: Path) -> None:
    report = plot_scores(scores, tmp_path / "p.png")
    assert (report.layers, report.num_experts, report.removed) == (4, 16, None)
    assert replace(report, written=False).title.endswith(": there already")
