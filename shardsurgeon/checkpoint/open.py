"""Open a model with the family that was asked for, or guess one where none is declared."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint, with_family
from shardsurgeon.checkpoint.guess import guess_family
from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.families.schema import is_declared, read_family
from shardsurgeon.storage.files import JOURNAL_NAME
from shardsurgeon.storage.formats.index import CONFIG_NAME
from shardsurgeon.storage.source import Source


def open_model(
    model: str | os.PathLike[str] | Source | None,
    family: str | None = None,
    *,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a checkpoint; model: as `open_checkpoint` takes it, None for the current folder.

    family: a file with the model's declaration; `auto` to read a model without one where names
    and config leave no doubt; None for the shipped declarations. follow_links: whether links that
    lead out of the model are as good as files; they are to commands that copy none. Raises
    UsageError where the current folder is not a model, and whatever opening a checkpoint raises.
    """
    declared = read_family(family) if family not in (None, "auto") else None
    model = _named(model)
    if isinstance(model, str | os.PathLike):  # and not a source that is open already
        require_finished(model)
    checkpoint = open_checkpoint(model, declared, follow_links=follow_links)
    if family != "auto" or is_declared(checkpoint.settings):
        return checkpoint
    guess = guess_family(checkpoint)
    checkpoint = with_family(checkpoint, guess.family)
    return replace(checkpoint, notes=(*checkpoint.notes, *guess.notes))


def require_finished(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for a folder that an interrupted command left, or that lies in one."""
    place = Path(folder)
    for path in (place, place.absolute().parent):
        if os.path.isfile(path / JOURNAL_NAME):
            raise unfinished(path)


def unfinished(folder: Path) -> CheckpointError:
    """The error for the folder that an interrupted command left."""
    problem = "is the unfinished work of an apply"
    return CheckpointError(folder, problem, "finish it by the same command, or remove it")


def reopened(
    model: str | os.PathLike[str] | Checkpoint | None,
    family: str | None = None,
    *,
    follow_links: bool = False,
) -> Checkpoint:
    """As `open_model`; a checkpoint that is open already stays as it is, and takes no family."""
    if not isinstance(model, Checkpoint):
        return open_model(model, family, follow_links=follow_links)
    if family is not None:
        raise already_open("family")
    return model


def already_open(option: str) -> UsageError:
    """The error of an option that says how to open a model, with a model that is open."""
    problem = "is for a model that is still to be opened"
    return UsageError(option, problem, "give the model's folder or address instead")


def files_read(checkpoint: Checkpoint, family: str | None) -> list[Path]:
    """The files of this machine that opening a model reads, however the rest of it is used.

    family: as for `open_model`. Some of them need not be there.
    """
    names = {*(shard.file for shard in checkpoint.shards), *checkpoint.rewritten}
    local = (checkpoint.source.local_path(name) for name in names)
    declared = Path(family) if family not in (None, "auto") else None
    return [path for path in (*local, declared) if path is not None]


def _named(model: str | os.PathLike[str] | Source | None) -> str | os.PathLike[str] | Source:
    if model is not None:
        if model == "":
            raise UsageError("MODEL", "is an empty name", "give a folder or org/name")
        return model
    # Weights without a config are a model that lacks something, and opening it says what.
    if not Path(CONFIG_NAME).is_file() and not any(Path().glob("*.safetensors")):
        problem = f"the current folder has no {CONFIG_NAME}"
        raise UsageError("--model", problem, "go to a model's folder or name one with --model")
    return "."
