"""What is fuzzed: each target takes bytes and raises only where a promise is broken.

A target feeds the bytes to a reader as a file or as part of one. Our own errors are the right
answer to bad input; anything else that comes out is a finding. What is accepted is looked at:
with the safetensors library and numpy where they read the same format, else by writing it
again and reading that.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import safetensors

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.config import OVERRIDES_KEY, PER_LAYER_KEY, PUBLISHED_KEYS
from shardsurgeon.checkpoint.guess import guess_family
from shardsurgeon.checkpoint.provenance import is_foreign, parse_provenance
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.errors import (
    CheckpointError,
    ConfigError,
    FamilyError,
    HeaderError,
    IndexFileError,
    InputError,
    KeepListError,
    OutputError,
    ScoreError,
)
from shardsurgeon.execution.journal import read_journal
from shardsurgeon.families.schema import (
    ConfigKeys,
    Family,
    TensorNames,
    TransformersView,
    is_declared,
    parse_family,
)
from shardsurgeon.layerwise.calibration_file import find_calibration, read_calibration
from shardsurgeon.operations.evaluation_report import read_evaluation
from shardsurgeon.pruning.analysis import view_alone
from shardsurgeon.pruning.config_edits import pruned_config
from shardsurgeon.pruning.keep_list_files import read_keeplist
from shardsurgeon.pruning.keep_list_shapes import Meaning
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep, resolve
from shardsurgeon.scores.checks import check_values
from shardsurgeon.scores.files import read_scores, score_file
from shardsurgeon.storage.formats.dtypes import Array, StoredArray
from shardsurgeon.storage.formats.index import build_index, parse_index
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.npz import read_npz
from shardsurgeon.storage.formats.safetensors import Header, header_length, parse_header
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.formats.torch_file import read_torch_file
from shardsurgeon.storage.formats.torch_objects import _CALLS
from shardsurgeon.storage.source import MemorySource
from tests.fuzz import hub_answers, quantization_lists, seeds, views
from tests.fuzz.edits import as_json, edited
from tests.support import tiny

# The library reads these and we do not: files on which readers disagree.
DELIBERATE = re.compile(
    r"twice|unknown key|begins with|not an object|unknown dtype \{|below 2\^63|overflows"
)


@dataclass(frozen=True)
class Target:
    """run: the target; seeds: files of the fixtures and of this folder it starts from."""

    name: str
    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()


# Headers, against the safetensors library


def header(data: bytes, scratch: Path) -> None:
    """The first two bytes say how much data follows the header, the rest is the header."""
    file_begin, text = data[:2].ljust(2, b"\0"), data[2:]
    payload = bytes(int.from_bytes(file_begin, "little"))
    _header_file(struct.pack("<Q", len(text)) + text + payload)


def header_file(data: bytes, scratch: Path) -> None:
    """A whole file, prefix and all."""
    _header_file(data)


def _header_file(file: bytes) -> None:
    library = _library_reads(file)
    try:
        length = header_length(file[:8], len(file), "a.safetensors")
        ours = parse_header(file[8 : 8 + length], len(file), "a.safetensors")
    except HeaderError as error:
        if library is not None and not DELIBERATE.search(str(error)):
            raise AssertionError(f"the library reads what we refuse: {error}") from error
        return
    assert library is not None, "accepted what the library refuses"
    assert library == _as_library(ours, file), "read otherwise than the library"


def _library_reads(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in tensors
    }


def _as_library(ours: Header, file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    begin = ours.data_begin
    return {
        tensor.name: (tensor.dtype, tensor.shape, file[begin + tensor.begin : begin + tensor.end])
        for tensor in ours.tensors
    }


# JSON


def index(data: bytes, scratch: Path) -> None:
    try:
        found = parse_index(data, "index.json")
    except IndexFileError:
        return
    shards: dict[str, list[TensorRecord]] = {}
    for name, shard in found.weight_map.items():
        shards.setdefault(shard, []).append(TensorRecord(name, "U8", (1,), 0, 1))
    tables = {shard: TensorTable.of(records) for shard, records in shards.items()}
    again = parse_index(build_index(tables, found.metadata), "index.json")
    # By its text: NaN is not equal to itself.
    assert again.weight_map == found.weight_map
    assert json.dumps(again.metadata, sort_keys=True) == json.dumps(found.metadata, sort_keys=True)


def document(data: bytes, scratch: Path) -> None:
    try:
        found = Document.parse(data, "config.json")
    except ConfigError:
        return
    assert found.edit({}) == data
    plain = json.loads(data.decode("utf-8-sig"))
    assert json.dumps(found.value) == json.dumps(plain), "read otherwise than json"
    if isinstance(found.value, dict) and found.value:
        key = next(iter(found.value))
        edited = Document.parse(found.edit({(key,): [1, "x"]}), "config.json")
        assert isinstance(edited.value, dict) and edited.value[key] == [1, "x"]


def provenance(data: bytes, scratch: Path) -> None:
    is_foreign(data)
    try:
        found = parse_provenance(data, "metadata.json")
    except CheckpointError:
        return
    again = found.to_bytes()
    assert parse_provenance(again, "metadata.json").to_bytes() == again


def journal(data: bytes, scratch: Path) -> None:
    path = _written(scratch, "journal", data)
    try:
        record = read_journal(path)
    except OutputError:
        return
    assert record is not None and 0 < record.nbytes <= len(data)


def keep_list(data: bytes, scratch: Path) -> None:
    path = _written(scratch, "keep.json", data)
    meanings: list[Meaning | None] = [None, "kept", "dropped"]
    for meaning in meanings:
        try:
            found = read_keeplist(path, meaning)
            resolved = resolve(found, sorted(k for k in found.layers if isinstance(k, int)), 16)
        except KeepListError:
            continue
        for keep in resolved.layers.values():
            assert sorted(keep.retained + keep.pruned) == list(range(16))


# A model's config and its declaration, with a model behind them


_TINY = tiny.files()


def config(data: bytes, scratch: Path) -> None:
    """config.json of a tiny model, which is opened, read and pruned to half of its experts."""
    _model(data, None)


def config_edited(data: bytes, scratch: Path) -> None:
    """The same with a sound config that has odd values."""
    _model(as_json(edited(_CONFIGS, data, _CONFIG_KEYS)), None)


def family(data: bytes, scratch: Path) -> None:
    """A family file, and the tiny model read by it."""
    try:
        declared = parse_family(data.decode("utf-8", "replace"), "my.toml")
    except FamilyError:
        return
    _model(_TINY["config.json"], declared)


def _model(config_json: bytes, declared: Family | None) -> None:
    try:
        checkpoint = open_checkpoint(MemorySource({**_TINY, "config.json": config_json}), declared)
        if declared is None and not is_declared(checkpoint.settings):
            guess_family(checkpoint)
        anatomy = read_anatomy(checkpoint)
        count_parameters(checkpoint.tables, checkpoint.settings)
        kept = {layer.index: max(layer.num_experts // 2, 1) for layer in anatomy.layers}
        layers = {
            layer.index: LayerKeep(
                tuple(range(kept[layer.index])), tuple(range(kept[layer.index], layer.num_experts))
            )
            for layer in anatomy.layers
        }
        pruned_config(checkpoint, anatomy, KeepList(anatomy.num_experts, layers), drop_mtp=False)
    except InputError as error:
        assert len(str(error)) < 4000, "a sentence that nobody reads"


def keep_list_edited(data: bytes, scratch: Path) -> None:
    """A plan or another keep-list that has odd values."""
    keep_list(as_json(edited(_KEEP_LISTS, data, _KEEP_KEYS)), scratch)


def provenance_edited(data: bytes, scratch: Path) -> None:
    """A pruned model's metadata that has odd values."""
    provenance(as_json(edited(_PROVENANCES, data, _PROVENANCE_KEYS)), scratch)


# Scores


def scores_json(data: bytes, scratch: Path) -> None:
    _scores(_written(scratch, "scores.json", data))


def scores_safetensors(data: bytes, scratch: Path) -> None:
    _scores(_written(scratch, "scores.safetensors", data))


def scores_unnamed(data: bytes, scratch: Path) -> None:
    """A file whose name says nothing is recognised by its first bytes."""
    _scores(_written(scratch, "scores", data))


def _scores(path: Path) -> None:
    try:
        found = read_scores(path)
        if found.rows:
            found = found.assign_rows(list(range(len(next(iter(found.rows.values()))))))
        _, layers = found.select()
        counts = found.frequencies()
        for layer, values in layers.items():
            assert values.dtype == np.float64 and values.ndim == 1
            check_values(layer, values, counts.get(layer), "scores")
        view = view_alone(found, None)
        assert len(view.layers()) == len(layers)
        assert all(0 <= cut.mean_lost <= cut.limit * 1.001 for cut in view.cuts())
    except ScoreError:
        pass
    _calibration(path)


def _calibration(path: Path) -> None:
    try:
        found = find_calibration(path)
        if found is not None:
            assert found.samples
    except ScoreError:
        return
    if found is not None:
        again = path.with_name("again.json")
        again.write_bytes(score_file(again, found.content()))
        assert read_calibration(again).content().accumulators.keys() == found.layers.keys()
        assert read_calibration(again).parts == found.parts


# torch.save's files


def evaluation(data: bytes, scratch: Path) -> None:
    """An evaluation.json, which is what it was when it is written again."""
    path = _written(scratch, "e.json", data)
    try:
        found = read_evaluation(path)
    except ScoreError:
        return
    again = read_evaluation(_written(scratch, "again.json", found.file()))
    assert again.file() == found.file()
    assert found.title and found._repr_html_()


def torch_file(data: bytes, scratch: Path) -> None:
    """A whole `.pt`."""
    _torch(_written(scratch, "scores.pt", data))


def torch_pickle(data: bytes, scratch: Path) -> None:
    """The pickle in a `.pt` whose container is sound, with three storages beside it."""
    members = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{name}": bytes(range(64)) for name in "012"}
    _torch(_written(scratch, "scores.pt", zipped({f"a/{k}": v for k, v in members.items()})))


def _torch(path: Path) -> None:
    try:
        load_all(read_torch_file(path, "scores.pt"))
    except ScoreError:
        return
    _scores(path)


def load_all(value: object) -> None:
    """Read every tensor in a value, each container once however often it is shared."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, StoredArray):
            one.load()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one


# numpy's


def npz_file(data: bytes, scratch: Path) -> None:
    """A whole `.npz`."""
    _npz(_written(scratch, "scores.npz", data), data)


def npz_member(data: bytes, scratch: Path) -> None:
    """An array in an `.npz` whose container is sound."""
    raw = zipped({"3.npy": data})
    _npz(_written(scratch, "scores.npz", raw), raw)


def _npz(path: Path, raw: bytes) -> None:
    try:
        arrays = read_npz(path, "scores.npz")
        ours = {name: array.load() for name, array in arrays.items()}
    except ScoreError:
        return
    for name, array in ours.items():
        theirs = _numpy_reads(raw, name)
        if theirs is not None:
            assert theirs.shape == array.shape, "another shape than numpy's"
            np.testing.assert_array_equal(array, theirs)
    _scores(path)


def _numpy_reads(raw: bytes, name: str) -> Array | None:
    """numpy's reading; None where it is stricter than we are."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            found = file[name]
    except Exception:
        return None
    return found if isinstance(found, np.ndarray) else None


def zipped(members: dict[str, bytes]) -> bytes:
    """A sound zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _written(scratch: Path, name: str, data: bytes) -> Path:
    path = scratch / name
    path.write_bytes(data)
    return path


_JSON_WORDS = (b'{"', b'":', b"null", b"true", b"NaN", b"-0", b"1e999", b"\\ud800", b'":{"', b"[[")
_HEADER_WORDS = (b'"dtype":', b'"shape":[', b'"data_offsets":[', b'"F4"', b"__metadata__")
_KEEP_WORDS = (b'"kept"', b'"dropped"', b'"mtp"', b'"layers"', b'"retained"', b'"perLayer"')
_PICKLE_WORDS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"X\x07\0\0\0storage",
    b"ccollections\nOrderedDict\n", b"\x93", b"tR", b"tQ", b"h\x00", b"q\x00",
)  # fmt: skip
# Every name that means something in a pickle.
_NAMES = tuple(b"c%b\n%b\n" % tuple(map(str.encode, name.rsplit(".", 1))) for name in _CALLS)
_NPY_WORDS = (b"'descr': '<f8'", b"'fortran_order': True", b"'shape': (", b"PK\x01\x02")

_TOML_WORDS = (
    b'like = "deepseek_v3"\n', b"[config]\n", b"[tensors]\n", b"[transformers]\n", b"{layer}",
    b"{expert}", b"{part}", b"axis = ", b"[[", b'"""', b"1979-05-27", *(
        f"{field.name} = ".encode() for kind in (Family, ConfigKeys, TensorNames, TransformersView)
        for field in fields(kind)
    ),
)  # fmt: skip
_CONFIGS = [json.loads(raw) for raw in seeds.configs()]
_CONFIG_KEYS = (
    "n_routed_experts", "num_experts", "num_local_experts", "num_hidden_layers", "n_group",
    "topk_group", "num_experts_per_tok", "num_nextn_predict_layers", PER_LAYER_KEY,
    *PUBLISHED_KEYS, OVERRIDES_KEY, "1",
    "model_type", "architectures", "quantization_config", "compression_config", "quantization",
    "text_config", "ignore", "modules_to_not_convert", "targets", "config_groups", "dynamic",
    "bits", "group_size", "quant_method", "x",
)  # fmt: skip
_KEEP_LISTS = [json.loads(raw) for raw in seeds.keep_lists()[:-1]]
_KEEP_KEYS = ("kept", "dropped", "retained", "pruned", "layers", "num_experts", "mtp", "3", "kind")
_PROVENANCES = [json.loads(raw) for raw in seeds.provenances()]
_PROVENANCE_KEYS = (
    *("format", "steps", "groups", "files", "include", "retained", "saliency", "2", "sampling"),
    *("min_p", "top_k", "do_sample"),
)

TARGETS = [
    Target("header", header, seeds.headers, (*_JSON_WORDS, *_HEADER_WORDS)),
    Target("header-file", header_file, seeds.header_files, (*_JSON_WORDS, *_HEADER_WORDS)),
    Target("index", index, seeds.indexes, (*_JSON_WORDS, b'"weight_map":', b".safetensors")),
    Target("document", document, seeds.documents, _JSON_WORDS),
    Target("provenance", provenance, seeds.provenances, (*_JSON_WORDS, b'"groups"', b'"steps"')),
    Target("journal", journal, seeds.journals, _JSON_WORDS),
    Target("keep-list", keep_list, seeds.keep_lists, (*_JSON_WORDS, *_KEEP_WORDS)),
    Target(
        "scores-json", scores_json, seeds.scores_jsons, (*_JSON_WORDS, b'"scores"', b'"counts"')
    ),
    Target("scores-safetensors", scores_safetensors, seeds.scores_safetensors, _HEADER_WORDS),
    Target(
        "scores-unnamed",
        scores_unnamed,
        lambda: [*seeds.scores_jsons(), *seeds.scores_safetensors(), *seeds.npz_files()],
        (b"PK\x05\x06", b"\x80\x02"),
    ),
    Target("evaluation", evaluation, seeds.evaluations, (*_JSON_WORDS, b'"damage"', b'"parts"')),
    Target("torch-file", torch_file, seeds.torch_files, (*_PICKLE_WORDS, b"PK\x03\x04")),
    Target("torch-pickle", torch_pickle, seeds.torch_pickles, (*_PICKLE_WORDS, *_NAMES)),
    Target("npz-file", npz_file, seeds.npz_files, _NPY_WORDS),
    Target("npz-member", npz_member, seeds.npz_members, _NPY_WORDS),
    Target(
        "config", config, seeds.configs, (*_JSON_WORDS, *(f'"{k}":'.encode() for k in _CONFIG_KEYS))
    ),
    Target("config-edited", config_edited, seeds.edits),
    Target("plan", keep_list_edited, seeds.edits),
    Target("metadata", provenance_edited, seeds.edits),
    Target("family", family, seeds.families, _TOML_WORDS),
    Target("quantization-lists", quantization_lists.run, quantization_lists.seeds),
    *(
        Target(*told, (*_JSON_WORDS, *_HEADER_WORDS, b',"header":', b',"ranges":{'))
        for told in views.TARGETS
    ),
    *(Target(*told) for told in hub_answers.targets(_JSON_WORDS)),
]
