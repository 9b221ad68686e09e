"""What a notebook's cells show and keep: a title, small tables, whatever the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.operations.workbench import scores_of
from tests.support.hub.models import ROOT, fixture_folder

CELLS = """
import shardsurgeon
checkpoint = shardsurgeon.open_checkpoint(MODEL)
checkpoint
--
scores = shardsurgeon.read_scores(SCORES)
scores
--
shardsurgeon.inspect(checkpoint)
--
plan = shardsurgeon.plan(checkpoint, scores, ratio=0.65)
plan
--
plan.report
--
[plan, checkpoint, checkpoint.shards, plan.plan, plan.anatomy, plan.decision]
--
shardsurgeon.plan(checkpoint, scores, ratio=[0.5, "65%"])
"""
WRITING = """
--
report = shardsurgeon.apply(plan, "small", progress=True)
report
--
shardsurgeon.verify(MODEL, "small", progress=True)
"""


def run(cells: str, model: Path, scores: Path, folder: Path) -> str:
    """The notebook's file after it ran, every cell of it."""
    cells = cells.replace("MODEL", repr(str(model))).replace("SCORES", repr(str(scores)))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells.split("--\n")]
    )
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=where).execute()
    return nbformat.writes(notebook)


def outputs(file: str) -> list[dict[str, Any]]:
    """Of each cell, what its last line showed."""
    cells = json.loads(file)["cells"]
    shown = [[o for o in cell["outputs"] if o["output_type"] == "execute_result"] for cell in cells]
    return [each[0]["data"] for each in shown]


@pytest.mark.slow
def test_a_notebook_of_all_steps_stays_small(tmp_path: Path) -> None:
    model, scores = fixture_folder("kimi_k25"), scores_of("kimi_k25")
    file = run(CELLS + WRITING, model, scores, tmp_path)
    assert len(file) < 100_000
    shown = outputs(file)
    title = "kimi_k25: keep 12 of 32 experts in each of 3 MoE layers"
    texts = ["".join(each["text/plain"]) for each in shown]
    assert texts[0] == "kimi_k25: kimi_k25, 944 tensors in 5 shards, 657.6 kB"
    assert texts[3] == texts[4] == texts[7] == title
    assert texts[8] == "small: identical"
    assert texts[6].count("kimi_k25: keep ") == 2
    tables = ["".join(each["text/html"]) for n, each in enumerate(shown) if n not in (5, 6)]
    assert all(table.startswith("<div><b>") and len(table) < 10_000 for table in tables)
    assert (tmp_path / "small" / "config.json").exists()


@pytest.mark.slow
def test_the_notebook_of_a_model_with_many_tensors_stays_as_small(tmp_path: Path) -> None:
    build = [sys.executable, ROOT / "tests" / "bench" / "skeleton.py", tmp_path / "model"]
    subprocess.run([*build, "--layout", "tiny", "--size", "0.25GB"], check=True)
    file = run(CELLS, tmp_path / "model", tmp_path / "model" / "scores.json", tmp_path)
    assert ": kimi_k25, 76,355 tensors in 64 shards" in "".join(outputs(file)[0]["text/plain"])
    assert len(file) < 100_000
