"""Every report as text and as HTML: its title, small tables, nothing that a browser would run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

import shardsurgeon
from shardsurgeon.layerwise.request import CalibrationReport
from shardsurgeon.reports import Report, Titled
from tests.cli import standins


def reports(kind: type[Titled] = Titled) -> Iterator[type[Titled]]:
    for child in kind.__subclasses__():
        yield from ((child,) if child.__module__.startswith("shardsurgeon.") else ())
        yield from reports(child)


def test_every_report_is_its_title_and_has_no_repr_of_its_own() -> None:
    kinds = {kind for kind in reports() if kind is not Report}
    assert {kind.__name__ for kind in kinds} >= {"Checkpoint", "Scores", "Pruning", "PlanReport"}
    assert CalibrationReport in kinds
    assert all(kind.__repr__ is Titled.__repr__ for kind in kinds)
    public = {getattr(shardsurgeon, name) for name in shardsurgeon.__all__ if "Report" in name}
    assert public <= kinds


EVERY = [
    *(standins.INSPECTED, standins.PLANNED, standins.APPLIED, standins.VERIFIED, standins.PUSHED),
    *standins.SCORE_OPERATIONS.values(),
    standins.CALIBRATED,
    standins.PAGED,
    standins.EVALUATED,
]


@pytest.mark.parametrize("report", EVERY, ids=lambda report: type(report).__name__)
def test_a_report_shows_its_title_and_its_tables(report: Report) -> None:
    assert repr(report) == report.title and "\n" not in report.title
    html = report._repr_html_()
    assert f"<b>{report.title.replace('>', '&gt;')}</b>" in html
    assert html.count("<table>") == html.count("</table>") > 0


def test_words_from_outside_are_escaped_and_tell_no_secret() -> None:
    name = "<script>alert('x')</script>\x1b[31m hf_" + "aB3dE6gH9jK2mN5p"
    report = replace(standins.INSPECTED, name=name, notes=(f"& {name}",))
    html = report._repr_html_()
    assert "<script>" not in html and "\x1b" not in html
    assert "&lt;script&gt;" in html and "&amp; &lt;" in html
    assert "aB3dE6gH9jK2mN5p" not in html + repr(report)


def test_the_tables_of_a_large_model_are_cut_and_say_so() -> None:
    layers = tuple(standins.layer(number) for number in range(500))
    files = tuple(f"file-{number}.txt" for number in range(10_000))
    report = replace(standins.PLANNED, layers=layers, carried_along=files)
    html = report._repr_html_()
    assert len(html) < 30_000
    assert "436 more layers" in html and "9,992 more" in html
