"""A fixture built and pruned by the real command, and what the result must hold.

Which tensors have an expert axis is said per family by a `Layout`, written from the modeling
source and not from our declarations; torch indexing does the rest.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from shardsurgeon.cli.main import main
from tests.oracle.byte_oracle import read_config, read_tensors, same_bits

ROOT = Path(__file__).parents[2]
ConfigPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a family has experts.

    layers: start of a layer's names, its number in group 1. mtp: the same for MTP layers that
    count from 0. experts: start of an expert's names behind that, its number in group 1.
    sliced: (rest of a name, expert axis). counts: where config.json has the expert count.
    tables: rest of the names of tables whose values are expert ids. tail: (rest of the names, rows
    behind the experts') of routers that have some. flat: (rest of the names, rows of one expert)
    of tensors whose axis counts rows. counted: rest of the names of tensors whose first number is
    the expert count.
    """

    layers: str
    experts: str | None
    sliced: tuple[tuple[str, int], ...]
    counts: tuple[ConfigPath, ...]
    mtp: str | None = None
    tables: tuple[str, ...] = ()
    tail: tuple[str, int] = (r"(?!)", 0)
    flat: tuple[str, int] = (r"(?!)", 1)
    counted: str = r"(?!)"


@dataclass(frozen=True)
class Pair:
    """A checkpoint, its pruned copy, and which experts each layer kept."""

    name: str
    source: Path
    folder: Path
    retained: dict[int, list[int]]


def builders(module: str) -> dict[str, Callable[[], Any]]:
    """The fixture builders of fixtures/builders/<module>.py, by the family's name."""
    found: dict[str, Callable[[], Any]] = _fixtures(module).BUILDERS
    return found


def _fixtures(module: str) -> Any:
    if str(ROOT / "fixtures") not in sys.path:
        sys.path.insert(0, str(ROOT / "fixtures"))
    return importlib.import_module(f"builders.{module}")


def build_and_prune(name: str, build: Callable[[], Any], folder: Path, *options: str) -> Pair:
    """Write the fixture below `folder` and prune it by half (or by `options`)."""
    source, out = _fixtures("folder").write(build(), folder), folder / "pruned"
    arguments = [source / "scores.pt", "--model", source, *(options or ("--ratio", "0.5"))]
    assert main(["apply", *map(str, arguments), "--no-verify", "-o", str(out)]) == 0
    metadata = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    retained = {int(layer): entry["retained"] for layer, entry in metadata["layers"].items()}
    return Pair(name, source, out, retained)


def assert_tensors_follow(pair: Pair, layout: Layout, main_layers: int) -> None:
    """Every tensor of the pruned checkpoint is the source's: renumbered, sliced, or as it was."""
    result, expected = read_tensors(pair.folder), _expected(pair, layout, main_layers)
    assert result.keys() == expected.keys()
    assert [name for name in expected if not same_bits(result[name], expected[name])] == []
    # And something was cut in every layer that the metadata names.
    kept = {(layer >= main_layers, len(ids)) for layer, ids in pair.retained.items()}
    assert len(kept) == len({is_mtp for is_mtp, _ in kept})
    assert all(ids == sorted(set(ids)) for ids in pair.retained.values())


def _expected(pair: Pair, layout: Layout, main_layers: int) -> dict[str, torch.Tensor]:
    expected, touched = {}, set()
    for name, tensor in read_tensors(pair.source).items():
        layer, rest = _place(name, layout, main_layers)
        keep = pair.retained.get(layer) if layer is not None else None
        expert = re.match(layout.experts, rest) if layout.experts else None
        axes = [axis for regex, axis in layout.sliced if re.fullmatch(regex, rest)]
        if keep is None:
            # A layer without experts has nothing that looks like one.
            assert layer is None or not (expert or axes), name
            expected[name] = tensor
        elif expert:
            touched.add(layer)
            old = int(expert[1])
            if old in keep:
                start = len(name) - len(rest)
                begin, end = start + expert.start(1), start + expert.end(1)
                expected[f"{name[:begin]}{keep.index(old)}{name[end:]}"] = tensor
        elif axes:
            touched.add(layer)
            expected[name] = tensor.index_select(
                axes[0], _rows(tensor, axes[0], rest, layout, keep)
            )
        elif re.fullmatch(layout.counted, rest):
            expected[name] = torch.cat([tensor.new_tensor([len(keep)]), tensor[1:]])
        elif any(re.fullmatch(regex, rest) for regex in layout.tables):
            expected[name] = renumbered_table(tensor, keep)
        else:
            expected[name] = tensor
    assert touched == pair.retained.keys()
    return expected


def _rows(
    tensor: torch.Tensor, axis: int, rest: str, layout: Layout, keep: list[int]
) -> torch.Tensor:
    """The rows that stay: one or several of each survivor, and those behind the experts'."""
    each = layout.flat[1] if re.fullmatch(layout.flat[0], rest) else 1
    more = layout.tail[1] if re.fullmatch(layout.tail[0], rest) else 0
    whole = tensor.shape[axis]
    rows = [expert * each + row for expert in keep for row in range(each)]
    return torch.tensor([*rows, *range(whole - more, whole)])


def renumbered_table(table: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """A table of expert ids, row by row: a survivor's new number, or for an id that is gone
    the first of (id mod kept), and those after it, that the row does not hold yet."""
    rows = []
    for old in table.tolist():
        new = [keep.index(expert) if expert in keep else None for expert in old]
        for column, expert in enumerate(old):
            if new[column] is None:
                turns = ((expert + turn) % len(keep) for turn in range(len(keep)))
                new[column] = next(substitute for substitute in turns if substitute not in new)
        rows.append(new)
    return torch.tensor(rows, dtype=table.dtype)


def _place(name: str, layout: Layout, main_layers: int) -> tuple[int | None, str]:
    """(layer number, rest of the name); MTP layers count on from the main ones."""
    for pattern, first in ((layout.layers, 0), (layout.mtp, main_layers)):
        match = re.match(pattern, name) if pattern else None
        if match:
            return first + int(match[1]), name[match.end() :]
    return None, name


def assert_config_follows(pair: Pair, layout: Layout) -> None:
    """config.json has the new count at every path of the layout, and not one other change."""
    kept = len(next(iter(pair.retained.values())))
    expected = deepcopy(read_config(pair.source))
    for path in layout.counts:
        node: Any = expected
        for part in path[:-1]:
            node = node[part]
        assert node[path[-1]] != kept
        node[path[-1]] = kept
    # The fixtures are written this way, so equal text is nothing else changed, order included.
    text = json.dumps(expected, indent=2) + "\n"
    assert (pair.folder / "config.json").read_text(encoding="utf-8") == text
