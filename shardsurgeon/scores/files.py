"""Score files read and written: .pt, .safetensors, .npz and .json.

Whatever its format and shape, a file is read as one table (`scores.table`). Nothing here knows
the model. A .pt file is read without torch and written by torch.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.layer_names import Layer
from shardsurgeon.checkpoint.recognition import SCORES, is_well_known
from shardsurgeon.checkpoint.wrong_files import require_file
from shardsurgeon.errors import HeaderError, ScoreError, ShardSurgeonError, UsageError, install
from shardsurgeon.scores.shapes import flat_metric, read_tables, small_facts
from shardsurgeon.scores.table import ACCUMULATORS, CALIBRATION, PARTS, UNNAMED, Fact, Scores
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.storage.formats.dtypes import ITEM_NBYTES, Array, StoredArray, decode
from shardsurgeon.storage.formats.npz import read_npz
from shardsurgeon.storage.formats.safetensors import (
    PREFIX_NBYTES,
    build_header,
    header_length,
    parse_header,
)
from shardsurgeon.storage.formats.strict_json import read_object, read_records
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.formats.torch_file import read_torch_file
from shardsurgeon.storage.formats.zip_reader import ZipReader, file_nbytes, read_range
from shardsurgeon.storage.limits import (
    CALIBRATION_JSON,
    SCORES_JSON,
    require_json,
    require_size,
)
from shardsurgeon.storage.phases import phase

# What a file says of itself that a calibration made.
FORMAT = "shardsurgeon scores"
VERSION = 1

# Every ending that can be written; the first two need torch.
_PLAIN_SUFFIXES = (".safetensors", ".npz", ".json")
_SUFFIXES = (".pt", ".pth", *_PLAIN_SUFFIXES)
_NO_JSON = "save the scores as .safetensors or .npz"
# A sample takes several steps of the pickle, and our reader bounds the steps of a file.
_MOST_SAMPLES_IN_PT = 100_000
# So few fit, whatever the names of their datasets are; other settings take as much at most.
_FEW_SAMPLES = 10_000
_BESIDE_SAMPLES_NBYTES = 4 << 20
# The array of an `.npz` with the UTF-8 of a JSON object: text by name, as safetensors has it.
_NPZ_METADATA = "metadata"
# numpy's names of the two types that are written, and those of safetensors headers.
_DTYPES = {"f8": "F64", "i8": "I64"}

AnyPath = str | PathLike[str]
Table = Mapping[Layer, Mapping[str, NDArray[Any]]]
# What a file holds, arrays unread, and its metadata.
_Held = tuple[object, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class ScoreContent:
    """What a score file holds. Arrays are float64 or int64.

    layers: layer → metric → [experts], or one number for the whole layer; rows: metric →
    [MoE layers, experts], of scores that name no layers; facts: small values beside them.
    accumulators: layer → name → array, and calibration: plain values, of a file that a
    calibration made and that can be merged with another; parts: layer → name → array with an axis
    of parts in front, where it is over a mix of datasets.
    """

    layers: Table = field(default_factory=dict)
    rows: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    accumulators: Table = field(default_factory=dict)
    parts: Table = field(default_factory=dict)
    calibration: Mapping[str, object] | None = None


def read_scores(path: str | PathLike[str]) -> Scores:
    """Read a score file: `.pt`, `.pth`, `.safetensors`, `.npz`, `.json` or `.jsonl`.

    A file of another name is recognised by its first bytes. Gives every metric of the file as
    float64 [experts] per layer, in the units of the file. Nothing in a `.pt` file is executed.

    Raises ScoreError where the file cannot be read, is hostile or broken, or does not hold one
    number per expert and layer.

    >>> scores = shardsurgeon.read_scores("fixtures/kimi_k25/scores.pt")
    >>> scores.metrics[:3], scores.facts
    (('ean_mean', 'ean_sum', 'expert_frequency'), {'total_tokens': 4096})
    """
    where = str(path)
    try:
        with phase("reading scores"):
            value, notes = read_value(path)
            if _is_keep_list(value):
                raise _no_scores(where)
            scores = read_tables(value, where)
    except ScoreError as error:
        _refuse_others(Path(path), error)
        raise
    return replace(scores, facts={**small_facts(notes), **scores.facts})


def read_value(path: str | PathLike[str]) -> _Held:
    """What a score file holds, arrays unread, and its metadata, before any of it is understood.

    Raises ScoreError where it cannot be read, is hostile or broken.
    """
    file, where = Path(path), str(path)
    require_file(path, SCORES, ScoreError)
    read = _READERS.get(file.suffix.lower()) or _recognised(file, where)
    return read(file, where)


def _refuse_others(path: Path, error: ScoreError) -> None:
    """Raise ScoreError for a file that cannot be read as scores, because it is a model's."""
    if is_well_known(path.name) and path.is_file():
        remedy = "give a file of scores, and the model's folder as the model"
        raise ScoreError(path, "is a file of a model, not scores", remedy) from error


def _is_keep_list(value: object) -> bool:
    """Whether it is a plan or the record of a prune, which repeat the saliencies they came from:
    those of the experts that stay whatever these say are missing there."""
    layers = value.get("layers") if isinstance(value, dict) else None
    records = layers.values() if isinstance(layers, dict) else ()
    return any(isinstance(each, dict) and {"retained", "pruned"} <= each.keys() for each in records)


def _no_scores(where: str) -> ScoreError:
    problem = "is a keep-list, not scores"
    return ScoreError(where, problem, "`plan` and `apply` take it with --plan")


def write_scores(out: Output | AnyPath, content: ScoreContent) -> bool:
    """Write a score file, whole or not at all; False where the file holds this content already.

    out: what `score_output` gave, or a name. The ending says the format. Raises OutputError where
    the file that is there stays, OutputWriteError where the disk does not take it, UsageError for
    more samples than the format's reader takes and for a metric whose name it cannot keep.
    """
    output = out if isinstance(out, Output) else score_output(out)
    listed = (content.calibration or {}).get("samples")
    check_samples(output.path, listed if isinstance(listed, list) else ())
    path = output.path
    return output.write(_torch_file(content) if is_torch_file(path) else score_file(path, content))


def score_output(out: AnyPath, *, force: bool = False, extra: str = "torch") -> Output:
    """The score file that -o names, for `write_scores`.

    force: let it replace another score file; extra: the one that brings torch, and what else the
    command needs. Raises OutputError for a place that is none of this
    machine, UsageError where its ending is not that of a score file, or needs torch and torch is
    not installed.
    """
    path = output_path(out)
    check_score_file_name(path)
    if is_torch_file(path) and find_spec("torch") is None:
        remedy = f"{install(extra)}, or give a name that ends in .safetensors"
        raise UsageError(path, "writing this format needs torch, which is not installed", remedy)
    return Output(path, "a score file", _is_score_file, force)


def _is_score_file(path: Path) -> bool:
    try:
        read_scores(path)
    except ShardSurgeonError:
        return False
    return True


def check_samples(out: str | os.PathLike[str], listed: Sequence[object]) -> None:
    """Check that a score file of that name can list so many samples. Raises UsageError.

    listed: the records that they are made of.
    """
    if is_torch_file(out) and len(listed) > _MOST_SAMPLES_IN_PT:
        problem = f"a .pt file lists at most {_MOST_SAMPLES_IN_PT:,} records, these are "
        raise UsageError(out, f"{problem}{len(listed):,}", "give a name that ends in .safetensors")
    if len(listed) > _FEW_SAMPLES:
        nbytes, most = len(json.dumps(listed)), CALIBRATION_JSON.nbytes - _BESIDE_SAMPLES_NBYTES
        if nbytes > most:
            problem = f"the list of {len(listed):,} records takes {nbytes:,} bytes, a score file "
            raise UsageError(out, f"{problem}holds {most:,}", "draw fewer samples")


def check_score_file_name(path: str | PathLike[str]) -> None:
    """Raise UsageError unless the name ends in a form that can be written."""
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        problem = f"scores are not written as '{suffix}'" if suffix else "its name has no ending"
        listed = ", ".join((".pt", *_PLAIN_SUFFIXES[:-1]))
        raise UsageError(path, problem, f"give a name that ends in {listed} or .json")


def is_torch_file(path: str | PathLike[str]) -> bool:
    """Whether a file of that name is torch.save's to write."""
    return _suffix(path) in _SUFFIXES and _suffix(path) not in _PLAIN_SUFFIXES


def _suffix(path: str | PathLike[str]) -> str:
    return Path(path).suffix.lower()


def _read_torch(path: Path, where: str) -> _Held:
    return read_torch_file(path, where), {}


def _read_npz(path: Path, where: str) -> _Held:
    arrays = read_npz(path, where)
    stored = arrays.get(_NPZ_METADATA)
    if stored is None or stored.dtype != "U8" or len(stored.shape) != 1:
        return arrays, {}
    require_size(stored.shape[0], CALIBRATION_JSON, f"{where}, {_NPZ_METADATA}", ScoreError)
    raw = arrays.pop(_NPZ_METADATA).load().astype(np.uint8).tobytes()
    what, remedy = f"its {_NPZ_METADATA}", "save the scores again"
    metadata = read_object(raw, where, what, ScoreError, remedy, CALIBRATION_JSON)
    return arrays, {key: text for key, text in metadata.items() if isinstance(text, str)}


def _read_json(path: Path, where: str) -> _Held:
    require_size(file_nbytes(path, where), SCORES_JSON, where, ScoreError, _NO_JSON)
    raw = read_range(path, 0, SCORES_JSON.nbytes, where)
    require_json(raw, SCORES_JSON, where, ScoreError, _NO_JSON)
    value = read_records(raw, where, "the file", ScoreError, "save it again as JSON", SCORES_JSON)
    return value, {}


def _read_safetensors(path: Path, where: str) -> _Held:
    nbytes = file_nbytes(path, where)
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


def _recognised(path: Path, where: str) -> Callable[[Path, str], _Held]:
    head = read_range(path, 0, 64, where)
    if head.startswith(b"PK"):
        names = ZipReader(path, where).entries
        return _read_torch if any(name.endswith("data.pkl") for name in names) else _read_npz
    # A safetensors file begins with the length of its header, 8 bytes, and the header, JSON.
    if head[8:9] == b"{" and head[:1] not in (b"{", b"["):
        return _read_safetensors
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return _read_json
    if head.startswith(b"\x80"):
        return _read_torch  # which says what kind of pickle it is
    raise ScoreError(
        where,
        "this is not a score file: not torch.save's, safetensors, npz or JSON",
        "give a file that ends in .pt, .pth, .safetensors, .npz or .json",
    )


_READERS: dict[str, Callable[[Path, str], _Held]] = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_npz,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".safetensors": _read_safetensors,
}


def score_file(path: str | PathLike[str], content: ScoreContent) -> bytes:
    """The bytes of a score file of that name, whose ending is not torch.save's.

    `.safetensors` and `.npz` hold an array `layers.<n>.<metric>` for each metric,
    `accumulators.layers.<n>.<name>` for each accumulator, and `parts.layers.<n>.<name>` for those
    of the parts; what lies beside them is metadata, in an `.npz` an array of that name with the
    UTF-8 of a JSON object. JSON holds the nested objects that `.pt` files hold, with lists for
    arrays. The numbers survive all of them to the last bit. The same content gives the same bytes.

    Raises UsageError for a metric whose name such a file cannot keep.
    """
    check_score_file_name(path)
    suffix = _suffix(path)
    if suffix == ".json":
        return _json(path, content)
    arrays = dict(_flat(path, content))
    metadata = {
        key: item if isinstance(item, str) else json.dumps(item)
        for key, item in _small_values(content).items()
    }
    return _npz(arrays, metadata) if suffix == ".npz" else _safetensors(arrays, metadata)


def _npz(arrays: dict[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    if metadata:
        text = json.dumps(metadata).encode()
        arrays = {**arrays, _NPZ_METADATA: np.frombuffer(text, np.uint8)}
    buffer = io.BytesIO()
    # np.savez takes no array of the name `file`.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _safetensors(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    rows = {name: array.astype(f"<{array.dtype.str[1:]}") for name, array in arrays.items()}
    header = build_header(
        [(name, _DTYPES[row.dtype.str[1:]], row.shape, row.nbytes) for name, row in rows.items()],
        # A name of bytes that are no text is in no file that others can read.
        {key: text.encode("utf-8", "backslashreplace").decode() for key, text in metadata.items()},
    )
    return header + b"".join(row.tobytes() for row in rows.values())


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
    for kind, table in ((ACCUMULATORS, content.accumulators), (PARTS, content.parts)):
        for layer, sums in table.items():
            for name, array in sums.items():
                yield f"{kind}.layers.{layer}.{name}", array


def _json(path: str | PathLike[str], content: ScoreContent) -> bytes:
    if set(content.rows) - {UNNAMED}:
        problem = "a table of rows has no place for the names of metrics in JSON"
        raise UsageError(path, problem, "name the layers with --model, or write .safetensors")
    return (json.dumps(_listed(_tree(content)), indent=1) + "\n").encode()


def _listed(value: Any) -> Any:
    """The value with lists in place of arrays and text in place of layer numbers."""
    if isinstance(value, Mapping):
        return {str(key): _listed(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _torch_file(content: ScoreContent) -> bytes:
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        return value

    buffer = io.BytesIO()
    torch.save(tensors(_tree(content)), buffer)
    return buffer.getvalue()


def _tree(content: ScoreContent) -> dict[str, Any]:
    """The content as nested dicts of arrays: what `.pt` files hold and JSON spells out."""
    tree: dict[str, Any] = _small_values(content)
    if content.rows:
        named = {"scores" if name == UNNAMED else name: row for name, row in content.rows.items()}
        return {**tree, **named}
    tree["scores"] = {layer: dict(metrics) for layer, metrics in content.layers.items()}
    for kind, table in ((ACCUMULATORS, content.accumulators), (PARTS, content.parts)):
        if table:
            tree[kind] = {layer: dict(sums) for layer, sums in table.items()}
    return tree


def _small_values(content: ScoreContent) -> dict[str, Any]:
    """The small values beside the scores; a calibration's file says what it is."""
    if content.calibration is None:
        return dict(content.facts)
    named = {"format": FORMAT, "version": VERSION}
    return {**content.facts, **named, CALIBRATION: dict(content.calibration)}
