"""Score files of every accepted format and shape, as one table: layer → metric → float64 [experts].

This is where saliency enters the program. Nothing here knows the model: which layers there are
and how many experts they have is compared later, by whoever holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import numpy as np

from shardsurgeon.checkpoint.layernames import Layer
from shardsurgeon.errors import HeaderError, ScoreError
from shardsurgeon.scores.scoretables import (
    NPZ_METADATA,
    UNNAMED,
    Fact,
    Vector,
    read_tables,
    small_facts,
)
from shardsurgeon.storage.formats.npz import read_npz
from shardsurgeon.storage.formats.numbers import ITEM_NBYTES, Array, StoredArray, decode
from shardsurgeon.storage.formats.safetensors import (
    PREFIX_NBYTES,
    TensorRecord,
    header_length,
    parse_header,
)
from shardsurgeon.storage.formats.strict_json import read_object
from shardsurgeon.storage.formats.torch_pickle import read_torch_file
from shardsurgeon.storage.formats.zipfiles import ZipReader, read_range

_PREFERRED = ("reap", UNNAMED, "sal")
_FREQUENCIES = ("expert_frequency", "cnt")
_MAX_JSON = 128 * 2**20


@dataclass(frozen=True)
class Scores:
    """What a score file says.

    origin: the file, as messages name it.
    layers: layer number, or `mtp.<j>` for an MTP layer named so, → metric → float64 [experts],
    read-only. A table that names no metric has the one metric `saliency`.
    rows: metric → float64 [MoE layers, experts], of a file that names no layers; then layers
    is empty until `assign_rows`.
    facts: small values found beside the scores (total_tokens, dataset, seed, …).
    """

    origin: str
    layers: Mapping[Layer, Mapping[str, Vector]]
    rows: Mapping[str, Vector] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some layer has, sorted."""
        return tuple(sorted({name for layer in self.layers.values() for name in layer}))

    def assign_rows(self, moe_layers: Sequence[int]) -> Scores:
        """Give the rows of a 2-D table to the model's MoE layers, in order.

        Scores that name their layers come back as they are. Raises ScoreError where there are
        not as many rows as layers.
        """
        if not self.rows:
            return self
        count = len(next(iter(self.rows.values())))
        if count != len(moe_layers):
            raise ScoreError(
                self.origin,
                f"its table has {count} rows, the model has {len(moe_layers)} MoE layers",
                "name the layers ({layer: scores}) or use scores made for this model",
            )
        layers: dict[Layer, Mapping[str, Vector]] = {
            layer: {metric: table[row] for metric, table in self.rows.items()}
            for row, layer in enumerate(moe_layers)
        }
        return replace(self, layers=layers, rows={})

    def select(self, metric: str | None = None) -> tuple[str, dict[Layer, Vector]]:
        """One metric of every layer, and its name.

        metric: its name, which the file must have; None means the default: `reap`, else the
        saliency of a table without names, else the only metric the file has. Raises
        ScoreError, listing the metrics there are.
        """
        if self.rows:
            raise ScoreError(
                self.origin, "its 2-D table does not say which layer a row is", "give the model"
            )
        name = self._default_metric() if metric is None else metric
        lacking = [layer for layer, metrics in self.layers.items() if name not in metrics]
        if lacking:
            shown = "" if len(lacking) == len(self.layers) else f" for layer {lacking[0]}"
            raise ScoreError(
                self.origin,
                f"has no metric {name!r}{shown}",
                f"choose with --metric: {', '.join(self.metrics)}",
            )
        return name, {layer: metrics[name] for layer, metrics in self.layers.items()}

    def frequencies(self) -> dict[Layer, Vector]:
        """How often each expert was routed to, of the layers for which the file says it."""
        return {
            layer: metrics[name]
            for layer, metrics in self.layers.items()
            for name in _FREQUENCIES
            if name in metrics
        }

    def _default_metric(self) -> str:
        there = self.metrics
        for name in _PREFERRED:
            if name in there:
                return name
        return there[0] if len(there) == 1 else _PREFERRED[0]


def read_scores(path: str | PathLike[str]) -> Scores:
    """Read a score file: `.pt`, `.pth`, `.safetensors`, `.npz` or `.json`.

    A file of another name is recognised by its first bytes. Raises ScoreError where it cannot
    be read, is hostile or broken, or does not hold one number per expert and layer.
    """
    where = str(path)
    value, notes = read_value(path)
    tables = read_tables(value, where)
    return Scores(where, tables.layers, tables.rows, {**small_facts(notes), **tables.facts})


def read_value(path: str | PathLike[str]) -> tuple[object, Mapping[str, str]]:
    """What a score file holds, arrays unread, and its metadata, before any of it is understood.

    Raises ScoreError where it cannot be read, is hostile or broken.
    """
    file, where = Path(path), str(path)
    read = _READERS.get(file.suffix.lower()) or _recognised(file, where)
    return read(file, where)


def check_values(
    layer: Layer, values: Vector, frequency: Vector | None, where: str
) -> tuple[int, ...]:
    """The never-routed experts of a layer, ascending; refuse values that mean nothing.

    NaN is what 0/0 leaves of an expert without tokens: where the file counts tokens, it may
    only stand at experts with none. +inf marks an expert that must stay. Experts counted
    zero times are never-routed whatever their value. values, frequency: float64 [experts].
    Raises ScoreError naming layer and expert.
    """
    unknown = np.isnan(values)
    if np.isneginf(values).any():
        expert = int(np.argmax(np.isneginf(values)))
        raise ScoreError(
            where, f"layer {layer}, expert {expert} has the score -inf", "scores are above -inf"
        )
    if unknown.all():
        raise ScoreError(
            where,
            f"layer {layer} has no score: all {len(values)} are NaN",
            "calibrate again with more tokens",
        )
    if frequency is None:
        return tuple(np.flatnonzero(unknown).tolist())
    unexplained = unknown & ~(frequency == 0)
    if unexplained.any():
        expert = int(np.argmax(unexplained))
        raise ScoreError(
            where,
            f"layer {layer}, expert {expert} has the score NaN "
            f"though {frequency[expert]:,.0f} tokens were routed to it",
            "calibrate again: the activations overflowed",
        )
    return tuple(np.flatnonzero(frequency == 0).tolist())


_Reading = Callable[[Path, str], tuple[object, Mapping[str, str]]]


def _read_torch(path: Path, where: str) -> tuple[object, Mapping[str, str]]:
    return read_torch_file(path, where), {}


def _read_npz(path: Path, where: str) -> tuple[object, Mapping[str, str]]:
    arrays = read_npz(path, where)
    stored = arrays.get(NPZ_METADATA)
    if stored is None or stored.dtype != "U8" or len(stored.shape) != 1:
        return arrays, {}
    raw = arrays.pop(NPZ_METADATA).load().astype(np.uint8).tobytes()
    metadata = read_object(raw, where, f"its {NPZ_METADATA}", ScoreError, "save the scores again")
    return arrays, {key: text for key, text in metadata.items() if isinstance(text, str)}


def _read_json(path: Path, where: str) -> tuple[object, Mapping[str, str]]:
    raw = read_range(path, 0, _MAX_JSON + 1, where)
    if len(raw) > _MAX_JSON:
        problem = f"has more than {_MAX_JSON:,} bytes of JSON"
        raise ScoreError(where, problem, "save the scores as .safetensors or .npz")
    raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
    if raw.startswith(b"["):
        # The strict reader takes objects only; the check keeps a list from smuggling in members.
        value = read_object(b'{"scores":' + raw + b"}", where, "the file", ScoreError, "")
        if len(value) == 1:
            return value, {}
    return read_object(raw, where, "the file", ScoreError, "save it again as JSON"), {}


def _read_safetensors(path: Path, where: str) -> tuple[object, Mapping[str, str]]:
    nbytes = _file_nbytes(path, where)
    try:
        length = header_length(read_range(path, 0, PREFIX_NBYTES, where), nbytes, where)
        raw = read_range(path, PREFIX_NBYTES, length, where)
        header = parse_header(raw, nbytes, where)
    except HeaderError as error:
        raise ScoreError(error.where, error.problem, error.remedy) from error
    data_begin = header.data_begin
    arrays = {record.name: _stored(path, where, data_begin, record) for record in header.tensors}
    return arrays, header.metadata or {}


def _stored(path: Path, where: str, data_begin: int, record: TensorRecord) -> StoredArray:
    def load() -> Array:
        if record.dtype not in ITEM_NBYTES:
            problem = f"tensor {record.name} is of type {record.dtype}"
            raise ScoreError(where, problem, "save it as F32")
        raw = read_range(path, data_begin + record.begin, record.nbytes, where)
        if len(raw) != record.nbytes:
            raise ScoreError(where, f"tensor {record.name} breaks off", "fetch the file again")
        return decode(record.dtype, raw).reshape(record.shape)

    return StoredArray(record.dtype, record.shape, load)


def _file_nbytes(path: Path, where: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ScoreError(where, f"cannot be read ({error.strerror or error})") from error


def _recognised(path: Path, where: str) -> _Reading:
    head = read_range(path, 0, 64, where)
    if head.startswith(b"PK"):
        names = ZipReader(path, where).entries
        return _read_torch if any(name.endswith("data.pkl") for name in names) else _read_npz
    if head[8:9] == b"{" and head[:1] not in (b"{", b"["):
        return _read_safetensors
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return _read_json
    if head.startswith(b"\x80"):
        return _read_torch  # which says what kind of pickle it is
    raise ScoreError(
        where,
        "this is no score file: neither torch.save's, nor safetensors, npz or JSON",
        "give a file that ends in .pt, .pth, .safetensors, .npz or .json",
    )


_READERS: dict[str, _Reading] = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_npz,
    ".json": _read_json,
    ".safetensors": _read_safetensors,
}
