"""Files that a user named and that are missing, or are something else: what was probably meant.

Score files and keep-lists have any name, so that they are recognised by how they begin, as the
files beside a model's weights are.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER
from shardsurgeon.checkpoint.recognition import EVALUATION, PLAN, SCORES, kind_of
from shardsurgeon.errors import InputError
from shardsurgeon.storage.files import unexpanded_home
from shardsurgeon.storage.formats.index import CONFIG_NAME

AnyPath = str | os.PathLike[str]

_WORDS = {SCORES: "score file", PLAN: "keep-list", EVALUATION: "evaluation"}
_MADE_BY = {
    SCORES: "`shardsurgeon calibrate` or `shardsurgeon scores from-router` makes one",
    PLAN: "`plan -o FILE` saves one",
    EVALUATION: "`shardsurgeon evaluate` makes one",
}
_MOST_SHOWN = 3
# A folder with more files than this is no place to look for one.
_MOST_LOOKED_AT = 500
_UNFINISHED = ".partial"


def require_file(
    path: AnyPath, kind: str, error: type[InputError], *folders: AnyPath | None
) -> None:
    """Raise `error` where there is nothing, or a folder, and name the files that may be meant.

    kind: PLAN, SCORES or EVALUATION; folders: where such files may lie, beside the one that the
    path names.
    """
    where, place = os.fspath(path), Path(path)
    if os.path.isdir(place):
        if place.name.endswith(_UNFINISHED):
            problem = "is the unfinished work of another command"
            raise error(where, problem, "run that command again: it goes on where it stopped")
        what = "a model's folder" if is_model(place) else "a folder"
        problem = f"is {what}, not {'an' if kind == EVALUATION else 'a'} {_WORDS[kind]}"
        raise error(where, problem, _meant(files_of(kind, place), place.name, kind))
    if not os.path.lexists(place):
        home = unexpanded_home(where)
        there = [place.parent, *(Path(folder) for folder in folders if folder is not None)]
        found = [file for folder in dict.fromkeys(there) for file in files_of(kind, folder)]
        raise error(where, "there is no such file", home or _meant(found, place.name, kind))


def is_model(folder: AnyPath) -> bool:
    """Whether it is a folder of this machine with a model's config in it."""
    return os.path.isfile(os.path.join(folder, CONFIG_NAME))


def files_of(kind: str, folder: AnyPath) -> list[Path]:
    """The files of a kind in a folder, and in what an earlier prune left there, sorted."""
    places = [Path(folder), Path(folder, CALIBRATION_FOLDER)]
    files = (file for place in places for file in _files_in(place))
    return [file for file in files if kind_of(file) == kind]


def _files_in(folder: Path) -> Iterable[Path]:
    try:
        with os.scandir(folder) as entries:
            first = list(islice(entries, _MOST_LOOKED_AT))
        return sorted(folder / entry.name for entry in first if entry.is_file())
    except OSError:
        return []


def _meant(found: list[Path], name: str, kind: str) -> str:
    """Which of some files was meant, or which there are."""
    near = difflib.get_close_matches(name, [file.name for file in found], n=1)
    meant = [file for file in found if file.name in near] or found
    if not found:
        return _MADE_BY[kind]
    if len(meant) == 1:
        return f"did you mean {meant[0]}?"
    more = len(found) - _MOST_SHOWN
    listed = ", ".join(map(str, found[:_MOST_SHOWN])) + (f" and {more} more" if more > 0 else "")
    return f"{_WORDS[kind]}s there: {listed}"
