"""A Chromium without a window; tests with the marker `browser` run only where they are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.operations.page import report_page
from tests.support import pages


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect them unless `-m` names the marker."""
    if "browser" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The one browser of a run."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("SHARDSURGEON_CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        # Without its sandbox, which needs rights that a container has not.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan of 60 layers of 384 experts, with all that a page may have."""
    folder = tmp_path_factory.mktemp("full")
    values = pages.saliencies(60, 384)
    keep = pages.keep_list(values, 135, preserved=3)
    (folder / "evaluation.json").write_bytes(pages.evaluation(keep).file())
    out = folder / "report.html"
    report_page(
        pages.lay_plan(folder / "plan.json", keep),
        out,
        scores=pages.lay_scores(folder / "scores.json", values),
        evaluation=folder / "evaluation.json",
        probe=pages.lay_probe(folder / "probe.json"),
        fit=pages.MACHINES,
    )
    return out
