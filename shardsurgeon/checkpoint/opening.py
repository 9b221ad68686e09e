"""The model that a command's words mean, opened with the family that was asked for.

Stands before every operation that works on a checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.likely import guess_family
from shardsurgeon.errors import UsageError
from shardsurgeon.families.schema import is_declared, read_family


def open_model(model: str | os.PathLike[str] | None, family: str | None = None) -> Checkpoint:
    """Open a checkpoint; model: a folder, None for the current one.

    family: a file with the model's declaration, `auto` to read a model without one where that
    leaves no doubt. Raises UsageError where the current folder is no model, and whatever
    opening a checkpoint raises.
    """
    checkpoint = open_checkpoint(_named(model))
    if family is None:
        return checkpoint
    if family != "auto":
        return replace(checkpoint, family=read_family(family))
    if is_declared(checkpoint.settings):
        return checkpoint
    guess = guess_family(checkpoint)
    return replace(checkpoint, family=guess.family, notes=(*checkpoint.notes, *guess.notes))


def _named(model: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if model is not None:
        return model
    if not Path(CONFIG_NAME).is_file():
        problem = f"the current folder has no {CONFIG_NAME}"
        raise UsageError("--model", problem, "go to a model's folder or name one with --model")
    return "."
