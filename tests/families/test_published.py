"""Published config.json files: pruned in headers of their own widths, or refused with the reason.

The files are not in the repository: without them there is nothing to compare, and these tests say
so. `shardsurgeon/families/published.md` is the result.
"""

from __future__ import annotations

import pytest

from tests.families.published import DOCUMENT, FOLDER, Published, published, row

MODELS = list(published())
needs_files = pytest.mark.skipif(
    not MODELS, reason=f"no published config.json below {FOLDER} (SHARDSURGEON_PUBLISHED)"
)


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_published_model_is_what_the_table_says(model: Published) -> None:
    assert row(model) in DOCUMENT.read_text(encoding="utf-8").splitlines()


@needs_files
def test_the_table_has_every_published_model() -> None:
    rows = DOCUMENT.read_text(encoding="utf-8").count("\n| ") - 1
    assert rows == len(MODELS)


def test_no_model_with_experts_is_refused_for_having_none() -> None:
    """The names that are refused are those of dense models, every one."""
    refused = [
        line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "refused" in line
    ]
    assert refused
    assert all("dense model has no" in line for line in refused)
    assert not any("-A" in line.split("|")[1] or "MoE" in line.split("|")[1] for line in refused)
