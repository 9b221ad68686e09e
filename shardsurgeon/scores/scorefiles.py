"""Scores as the content of a file that `scores` reads: `.safetensors`, `.json` or `.npz`.

The other way round from `scores`. Whoever writes the file does so atomically; nothing here
touches one. What torch.save needs for a `.pt` comes from here too (`as_tree`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layernames import Layer
from shardsurgeon.errors import UsageError
from shardsurgeon.scores.scoretables import (
    ACCUMULATORS,
    CALIBRATION,
    NPZ_METADATA,
    UNNAMED,
    Fact,
    flat_metric,
)
from shardsurgeon.storage.formats.safetensors import build_header

Table = Mapping[Layer, Mapping[str, NDArray[Any]]]

FORMAT = "shardsurgeon scores"
VERSION = 1
_PLAIN_SUFFIXES = (".safetensors", ".npz", ".json")
SUFFIXES = (".pt", ".pth", *_PLAIN_SUFFIXES)
"""Every ending that can be written; the first two need torch."""

_DTYPES = {"f8": "F64", "i8": "I64"}


@dataclass(frozen=True, slots=True)
class ScoreContent:
    """What a score file holds. Arrays are float64 or int64.

    layers: layer → metric → [experts], or one number for the whole layer; rows: metric →
    [MoE layers, experts], of scores that name no layers; facts: small values beside them.
    accumulators: layer → name → array, and calibration: plain values, of a file that a
    calibration made and that can be merged with another.
    """

    layers: Table = field(default_factory=dict)
    rows: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    accumulators: Table = field(default_factory=dict)
    calibration: Mapping[str, object] | None = None


def check_score_file_name(path: str | PathLike[str]) -> None:
    """Raise UsageError unless the name ends in a form that can be written."""
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        problem = f"scores are not written as '{suffix}'" if suffix else "its name has no ending"
        listed = ", ".join((".pt", *_PLAIN_SUFFIXES[:-1]))
        raise UsageError(path, problem, f"give a name that ends in {listed} or .json")


def is_torch_file(path: str | PathLike[str]) -> bool:
    """Whether a file of that name is torch.save's to write."""
    return _suffix(path) in SUFFIXES and _suffix(path) not in _PLAIN_SUFFIXES


def score_file(path: str | PathLike[str], content: ScoreContent) -> bytes:
    """The bytes of a score file of that name, which is not one for torch.save.

    `.safetensors` and `.npz` hold an array `layers.<n>.<metric>` for each metric and
    `accumulators.layers.<n>.<name>` for each accumulator; what lies beside them is metadata, in
    an `.npz` an array of that name with the UTF-8 of a JSON object. JSON holds the tree that
    `as_tree` gives, as lists. The numbers survive all of them to the last bit. The same content
    gives the same bytes.
    Raises UsageError for a metric whose name such a file cannot keep.
    """
    check_score_file_name(path)
    suffix = _suffix(path)
    if suffix == ".json":
        return _json(path, content)
    arrays = dict(_flat(path, content))
    words = {
        key: item if isinstance(item, str) else json.dumps(item)
        for key, item in _beside(content).items()
    }
    return _npz(arrays, words) if suffix == ".npz" else _safetensors(arrays, words)


def _npz(arrays: dict[str, NDArray[Any]], words: Mapping[str, str]) -> bytes:
    if words:
        text = json.dumps(words).encode()
        arrays = {**arrays, NPZ_METADATA: np.frombuffer(text, np.uint8)}
    buffer = io.BytesIO()
    # np.savez takes no array of the name `file`.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _safetensors(arrays: Mapping[str, NDArray[Any]], words: Mapping[str, str]) -> bytes:
    rows = {name: array.astype(f"<{array.dtype.str[1:]}") for name, array in arrays.items()}
    header = build_header(
        [(name, _DTYPES[row.dtype.str[1:]], row.shape, row.nbytes) for name, row in rows.items()],
        dict(words),
    )
    return header + b"".join(row.tobytes() for row in rows.values())


def as_tree(content: ScoreContent) -> dict[str, Any]:
    """The content as nested dicts of arrays: what `.pt` files hold and JSON spells."""
    tree: dict[str, Any] = _beside(content)
    if content.rows:
        named = {"scores" if name == UNNAMED else name: row for name, row in content.rows.items()}
        return {**tree, **named}
    tree["scores"] = {layer: dict(metrics) for layer, metrics in content.layers.items()}
    if content.accumulators:
        tree[ACCUMULATORS] = {layer: dict(sums) for layer, sums in content.accumulators.items()}
    return tree


def _json(path: str | PathLike[str], content: ScoreContent) -> bytes:
    if set(content.rows) - {UNNAMED}:
        problem = "a table of rows has no place for the names of metrics in JSON"
        raise UsageError(path, problem, "name the layers with --model, or write .safetensors")
    return (json.dumps(_listed(as_tree(content)), indent=1) + "\n").encode()


def _listed(value: Any) -> Any:
    """The value with lists in place of arrays and text in place of layer numbers."""
    if isinstance(value, Mapping):
        return {str(key): _listed(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _beside(content: ScoreContent) -> dict[str, Any]:
    """What is said beside the scores; a calibration's file says what it is."""
    if content.calibration is None:
        return dict(content.facts)
    named = {"format": FORMAT, "version": VERSION}
    return {**content.facts, **named, CALIBRATION: dict(content.calibration)}


def _flat(path: str | PathLike[str], content: ScoreContent) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array under a name of its own."""
    for metric, row in content.rows.items():
        yield ("scores" if metric == UNNAMED else metric), row
    for layer, metrics in content.layers.items():
        for metric, row in metrics.items():
            name = f"layers.{layer}.{metric}" if isinstance(layer, int) else f"{layer}.{metric}"
            if flat_metric(name) != (layer, metric):
                problem = f"metric {metric!r} could not be told from a part of its tensor's name"
                raise UsageError(path, problem, "write .json or .pt")
            yield name, row
    for layer, sums in content.accumulators.items():
        for name, array in sums.items():
            yield f"{ACCUMULATORS}.layers.{layer}.{name}", array


def _suffix(path: str | PathLike[str]) -> str:
    return Path(path).suffix.lower()
