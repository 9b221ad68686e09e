"""A recipe that ends with a push."""

from __future__ import annotations

import json
import shutil

from tests.operations.workbench import Shell, digests, downloaded, same_model
from tests.support.hub.models import ROOT

RECIPE = """\
model = "model"

[apply]
scores = "model/scores.pt"
ratio = 0.5
out = "small"

[push]
repo-id = "me/small"
private = true
"""


def test_apply_and_push_in_one_command_and_nothing_twice(shell: Shell) -> None:
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", shell.folder / "model")
    (shell.folder / "recipe.toml").write_text(RECIPE)
    steps = json.loads(shell.good("run", "recipe.toml", "--json"))["steps"]
    assert list(steps) == ["apply", "push"] and steps["push"]["created"] is True
    pushed = downloaded(shell.hub, "me/small", shell.folder / "there")
    same_model(digests(pushed), digests(shell.folder / "small"))
    # Where it is pushed to makes no bytes of the result.
    assert "me/small" not in (pushed / "calibration" / "recipe.toml").read_text()
    shell.hub.reset_counts()
    again = json.loads(shell.good("run", "recipe.toml", "--json"))["steps"]
    assert again["push"]["commit"] == steps["push"]["commit"]
    assert shell.hub.uploads == {}
