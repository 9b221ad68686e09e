"""The commands that make again what a page shows, as far as its files say how they were made.

A page is sent to others: files go by their names, without the folders of the machine they lie on.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.operations.evaluation_report import EvaluationReport, by_way
from shardsurgeon.operations.model_card import address
from shardsurgeon.operations.page_subject import Subject
from shardsurgeon.pruning.request import Allocation

# What a plan says of how it was chosen, where it needs no option for it.
_USUAL = {"rounding": "floor", "metric": "reap", "allocate": "uniform", "mtp": "router-norm"}
# A path from the root or from somebody's home, in a list of data: all of it but the file's name.
_FOLDERS = re.compile(r"(?:^|(?<=[,\s]))(?:[A-Za-z]:[\\/]|[\\/]|~)[^,\s]*[\\/]")


def plain_name(path: str) -> str:
    """A file or folder of this machine by its name alone; an address as it is."""
    return Path(os.path.abspath(path)).name if os.path.exists(path) else path


def without_folders(data: str) -> str:
    """A spec of data without the folders that its files lie in."""
    return _FOLDERS.sub("", data)


def commands(
    subject: Subject, files: Mapping[str, str], found: EvaluationReport | None
) -> Iterator[str]:
    """Command lines; words in capitals are for the reader to fill in.

    files: option of `report` → the file or the value that was given, empty for a flag; found: what
    its evaluation is.
    """
    place, model = plain_name(subject.origin), address(subject.source)
    scores = plain_name(files["--scores"]) if "--scores" in files else "SCORES"
    nonuniform = [] if subject.keep.is_uniform else ["--allow-nonuniform"]
    if subject.is_prune:
        record = f"{place}/{PROVENANCE_NAME}"
        yield _line("apply", "--plan", record, "--model", model, *nonuniform)
        yield _line("verify", model, place)
    else:
        if subject.selection.get("selection") != "plan":
            chosen = _how_many(subject.selection)
            yield _line("plan", scores, *chosen, "--model", model, "-o", place)
        yield _line("apply", "--plan", place, "--model", model, *nonuniform)
    if found is not None:
        beside = ["--model", model, "--dataset", without_folders(found.dataset)]
        out = plain_name(files["--evaluation"])
        for way, candidates in by_way(found).items():
            ratios = ",".join(each.name.partition(" ")[0] for each in candidates)
            words = ["evaluate", scores, "--ratio", ratios]
            for word in way.split():
                words += ["--allocate" if word in [*Allocation] else "--metric", word]
            yield _line(*words, *beside, "-o", out)
    given = [word for option, file in files.items() for word in (option, plain_name(file))]
    yield _line("report", place, *filter(None, given), "-o", "report.html")


def _how_many(chosen: Mapping[str, Any]) -> list[str]:
    """The options that a plan says it was made with."""
    by_ratio = chosen.get("selection") == "ratio" and chosen.get("ratio") is not None
    words = ["--ratio", str(chosen["ratio"])] if by_ratio else ["--keep", str(chosen.get("kept"))]
    for name, default in _USUAL.items():
        if chosen.get(name) not in (None, default):
            words += [f"--{name}", str(chosen[name])]
    return words


def _line(*words: str) -> str:
    return shlex.join(["shardsurgeon", *words])
