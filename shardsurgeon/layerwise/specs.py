"""Which datasets, and how many samples of each: the words of `--dataset`.

    name            a dataset of the Hub, a local folder, or a .jsonl, .json, .parquet or .txt file
    name[subset]    one of its subsets
    name(split)     one of its splits
    name@revision   as it was at a commit or tag of the Hub
    name:n          n samples of it; parts without a number share what is left of --samples

Parts are separated by commas. Pure but for one look at whether a name is a path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardsurgeon.errors import UsageError

OPTION = "--dataset"
DEFAULT_SAMPLES = 512

_COUNT = re.compile(r"(?P<name>.+?):(?P<count>[0-9]+)")
_NAME = re.compile(
    r"(?P<name>[^\[\]()@]+)(?:@(?P<revision>[^\[\]()@]+))?"
    r"(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?"
)
_GRAMMAR = "write it like name:256, name[subset]:256, name(split):256 or file.jsonl:256"
# Commas inside of brackets belong to a name.
_PARTS = re.compile(r"(?:[^,\[(]|\[[^\]]*\]?|\([^)]*\)?)+|(?<=,)(?=,|\Z)|\A(?=,|\Z)")


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """One dataset of a spec; count: samples to draw from it, None where the spec does not say."""

    name: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    count: int | None = None

    @property
    def words(self) -> str:
        """How the spec names it, its number left out."""
        words = self.name
        words += f"@{self.revision}" if self.revision else ""
        words += f"[{self.subset}]" if self.subset else ""
        return words + (f"({self.split})" if self.split else "")


def parse_spec(text: str, samples: int | None = None) -> tuple[DatasetPart, ...]:
    """The parts of a spec, each with its count.

    samples: of all parts together; None: what the spec says, or DEFAULT_SAMPLES where a part
    does not say. Raises UsageError for words that are no spec, a dataset named twice, and
    numbers that do not go together.
    """
    parts = [_part(piece.strip()) for piece in _PARTS.findall(text)]
    names = [part.words for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(OPTION, f"names {name} {names.count(name)} times", "add them up")
    return _share_out(parts, samples)


def _part(piece: str) -> DatasetPart:
    counted = _COUNT.fullmatch(piece)
    name, count = (counted["name"], int(counted["count"])) if counted else (piece, None)
    if count == 0:
        raise UsageError(OPTION, f"'{piece}' asks for no sample", _GRAMMAR)
    # What exists is a file or a folder, whatever signs its name has.
    if name and Path(name).exists():
        return DatasetPart(name, count=count)
    match = _NAME.fullmatch(name)
    if not match:
        raise UsageError(OPTION, f"'{piece}' is not a dataset", _GRAMMAR)
    return DatasetPart(**match.groupdict(), count=count)


def _share_out(parts: Sequence[DatasetPart], samples: int | None) -> tuple[DatasetPart, ...]:
    said = sum(part.count or 0 for part in parts)
    silent = sum(part.count is None for part in parts)
    if not silent:
        if samples not in (None, said):
            problem = f"the parts ask for {said:,} samples together, --samples for {samples:,}"
            raise UsageError(OPTION, problem, "leave one of them out")
        return tuple(parts)
    left = (DEFAULT_SAMPLES if samples is None else samples) - said
    if left < silent:
        problem = f"of --samples {said + left:,} the parts with a number take {said:,}, {left:,}"
        problem += f" are left for {silent}"
        raise UsageError(OPTION, problem, "ask for more samples")
    share, more = divmod(left, silent)
    counts = iter([share + (number < more) for number in range(silent)])
    return tuple(
        replace(part, count=next(counts)) if part.count is None else part for part in parts
    )
