"""The parts of a calibration: the sums over each dataset of a mix, beside those over all samples.

A part is known by the identity of its dataset. A score file holds the sums of all parts as one
array for each array that it holds of all samples, with an axis of parts in front: float64 [P, E],
total_tokens int64 [P]. The parts are the datasets of the file's list of samples, ordered by
identity. A file over one dataset holds no such arrays: its one part is the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import ScoreError, printable
from shardsurgeon.layerwise.accumulators import TOTAL_TOKENS, Accumulators
from shardsurgeon.layerwise.datasets import identity, words_of
from shardsurgeon.scores.table import PARTS
from shardsurgeon.storage.formats.dtypes import StoredArray
from shardsurgeon.storage.limits import MAX_NUMBERS

_DAMAGED = "the file is damaged: fetch it again or calibrate anew"

Array = NDArray[np.generic]
Layers = Mapping[int, Accumulators]


def identities(sources: Iterable[str]) -> list[str]:
    """What tells the datasets of these names apart, ascending."""
    return sorted({identity(source) for source in sources})


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """The identity of each dataset → a name for it, no two alike; in the order of identities.

    sources: as score files name datasets. `code.jsonl@sha256:…` is called code, and
    `org/code@main[python](train)` too; where that is the name of several, these are called
    code.jsonl and code[python](train), or else by their whole source.
    """
    named: dict[str, str] = {}
    for source in sorted({*sources}):
        named.setdefault(identity(source), source)
    # The last spelling is the source itself, so escaped that no two are alike.
    ladders = {
        part: [*map(printable, _spellings(named[part])), ascii(named[part])[1:-1]]
        for part in sorted(named)
    }
    while True:
        names = {part: spellings[0] for part, spellings in ladders.items()}
        alike = [part for part in names if [*names.values()].count(names[part]) > 1]
        longer = [part for part in alike if len(ladders[part]) > 1]
        if not longer:
            return names
        for part in longer:
            ladders[part].pop(0)


def _spellings(source: str) -> tuple[str, ...]:
    """Names of a dataset, the shortest first."""
    words = words_of(source)
    if words is None:  # a file or a folder, by its content
        file = source.rpartition("@")[0]
        return Path(file).stem, file
    subset = f"[{words.subset}]" if words.subset else ""
    split = f"({words.split})" if words.split else ""
    own = words.name.rpartition("/")[2]
    return own, own + subset + split


@dataclass(frozen=True, slots=True)
class PartReport:
    """One dataset of a mix.

    name: a short one, which tells it from the others; source: as the file lists it; records,
    tokens: how many of it were added up.
    """

    name: str
    source: str
    records: int
    tokens: int


def part_reports(samples: Sequence[tuple[str, int, int]]) -> tuple[PartReport, ...]:
    """The datasets of a list of samples (source, record index, tokens), ordered by identity."""
    names = short_names(source for source, _, _ in samples)
    found = []
    for part, name in names.items():
        own = [sample for sample in samples if identity(sample[0]) == part]
        tokens = sum(sample[2] for sample in own)
        found.append(PartReport(name, printable(min(own)[0]), len(own), tokens))
    return tuple(found)


def can_be_kept(layers: Layers, parts: int) -> bool:
    """Whether a file may hold the sums of so many parts: a reader takes no more."""
    arrays = sum(len(sums.arrays()) * sums.num_experts for sums in layers.values())
    return parts * arrays <= MAX_NUMBERS


def stacked(layers: Layers, parts: Sequence[str]) -> dict[int | str, Mapping[str, Array]]:
    """Layer → name → the sums of all parts, [P, E] or [P]. A sum that a part lacks is left out."""
    found: dict[int | str, Mapping[str, Array]] = {}
    for layer, sums in sorted(layers.items()):
        own = [(sums.parts or {})[part].arrays() for part in parts]
        names = [name for name in sums.arrays() if all(name in arrays for arrays in own)]
        found[layer] = {name: np.stack([arrays[name] for arrays in own]) for name in names}
    return found


def unstack(
    held: Mapping[int, Mapping[str, object]], layers: Layers, parts: Sequence[str], where: str
) -> None:
    """Give layers the sums of their parts, as a file holds them.

    held: layer → name → [P, E] or [P], unread arrays or lists. Raises ScoreError where they are
    not of these layers, experts and parts, or do not add up to the counts of all samples.
    """
    if held.keys() != layers.keys():
        problem = f"has {PARTS} of {len(held):,} layers, and sums of {len(layers):,}"
        raise ScoreError(where, problem, _DAMAGED)
    if not can_be_kept(layers, len(parts)):
        raise ScoreError(where, f"holds {len(parts):,} {PARTS}, more than any mix has", _DAMAGED)
    for layer, sums in layers.items():
        place = f"layer {layer} of its {PARTS}"
        tables = {
            name: _table(item, name, (len(parts), sums.num_experts), place, where)
            for name, item in held[layer].items()
            if name in sums.arrays()
        }
        own = [
            {name: table[number] for name, table in tables.items()} for number in range(len(parts))
        ]
        found = [
            Accumulators.from_arrays(arrays, where, f"{layer} of part {number}")
            for number, arrays in enumerate(own)
        ]
        counts = sum(one.counts for one in found)
        tokens = sum(one.total_tokens for one in found)
        if tokens != sums.total_tokens or not np.array_equal(counts, sums.counts):
            problem = f"{place} adds up to {tokens:,} tokens, other counts than those of all"
            raise ScoreError(where, problem, _DAMAGED)
        sums.parts = dict(zip(parts, found, strict=True))


def _table(
    item: object, name: str, shape: tuple[int, int], place: str, where: str
) -> NDArray[np.float64]:
    """The sums of all parts; anything else is refused without reading."""
    wanted = shape[:1] if name == TOTAL_TOKENS else shape
    if isinstance(item, StoredArray):
        if item.dtype[0] in "FIU" and item.shape == wanted:
            return np.asarray(item.load(), np.float64)
    elif isinstance(item, list) and len(item) == wanted[0]:
        rows = item if len(wanted) > 1 else [item]
        lengths = {len(row) if isinstance(row, list) else -1 for row in rows}
        if lengths == {wanted[-1]} and all(type(n) in (int, float) for row in rows for n in row):
            try:
                return np.array(item, np.float64)
            except OverflowError as error:
                problem = f"{place}, {name}, holds an integer beyond all floats"
                raise ScoreError(where, problem, _DAMAGED) from error
    problem = f"{place}, {name}, are not numbers of shape {list(wanted)}"
    raise ScoreError(where, problem, _DAMAGED)
