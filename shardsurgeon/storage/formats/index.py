"""The index, model.safetensors.index.json: read with every check, and written.

It says which shard has which tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import repeat

import numpy as np

from shardsurgeon.errors import IndexFileError
from shardsurgeon.storage.formats.columns import find_weight_map, read_weight_map
from shardsurgeon.storage.formats.strict_json import Repeated, brief, is_text, read_object
from shardsurgeon.storage.formats.tensor_table import Column, Stems, TensorTable, split_name
from shardsurgeon.storage.limits import INDEX

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_REMEDY = "fetch the index again"
_MAX_DEPTH = 50  # of metadata, which json must be able to write again
_QUOTE = json.encoder.encode_basestring_ascii
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class FileNames:
    """What the files of a model are called: its config, its index, and how its shards begin."""

    config: str
    index: str
    stem: str

    def shard(self, number: int, total: int) -> str:
        """The name of shard `number` (from 1) of `total`."""
        if total == 1:
            return f"{self.stem}{_SUFFIX}"
        return f"{self.stem}-{number:05d}-of-{total:05d}{_SUFFIX}"


HUGGING_FACE = FileNames(CONFIG_NAME, INDEX_NAME, "model")
MISTRAL = FileNames("params.json", "consolidated.safetensors.index.json", "consolidated")


@dataclass(frozen=True, slots=True)
class Index:
    """What an index says.

    names: (head, tail, shard) of tensors, as `split_name` takes a name apart and with a shard as a
    path inside the checkpoint with forward slashes; code, number: for each tensor, which of these
    it has, and the number in its name. metadata: total_size and whatever else the author noted;
    empty where there is none.
    """

    names: tuple[tuple[str, str, str], ...]
    code: Column = field(repr=False)
    number: Column = field(repr=False)
    metadata: dict[str, object]

    @staticmethod
    def of(weight_map: Mapping[str, str], metadata: dict[str, object]) -> Index:
        """What an index with this map says. weight_map: tensor name → shard."""
        codes: dict[tuple[str, str, str], int] = {}
        files: dict[str, str] = {}  # one string object per shard
        code, number = [], []
        for name, shard in weight_map.items():
            head, which, tail = split_name(name)
            of = head, tail, files.setdefault(shard, shard)
            code.append(codes.setdefault(of, len(codes)))
            number.append(which)
        return Index(tuple(codes), np.array(code, np.int64), np.array(number, np.int64), metadata)

    @property
    def shards(self) -> list[str]:
        """Every shard once, in the order of their numbers."""
        return sorted({shard for _, _, shard in self.names}, key=natural_order)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → shard."""
        return {
            f"{head}{number}{tail}" if number >= 0 else tail: shard
            for (head, tail, shard), number in zip(
                map(self.names.__getitem__, self.code.tolist()), self.number.tolist(), strict=True
            )
        }


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts `model-2-of-12` before `model-10-of-12`."""
    # Of numbers without leading zeros the longer is the larger, and one may be too long for int.
    parts = ((part, part.lstrip("0")) for part in _DIGITS.split(name))
    return [(len(bare), bare) if part.isdecimal() else (-1, part) for part, bare in parts]


def parse_index(raw: bytes, where: str) -> Index:
    """Turn the index's bytes (UTF-8, with or without a byte order mark) into an Index.

    where: the file, as messages name it. Raises IndexFileError for what is not such a JSON object,
    for repeated names, and for shards that are not a plain path to a .safetensors file inside the
    checkpoint.
    """
    place = find_weight_map(raw)
    found = read_weight_map(place) if place is not None else None
    if place is None or found is None:
        return _read_strictly(raw, where)
    names, code, number = found
    rest = raw[: place[1]] + raw[place[2] :]
    members = read_object(rest, where, "the index", IndexFileError, _REMEDY, INDEX)
    sound = not any(map(shard_name_problem, {shard for _, _, shard in names}))
    if members.get("weight_map") != {} or not sound or _repeat(names, code, number):
        return _read_strictly(raw, where)
    return Index(tuple(names), code, number, _metadata(members, where))


def _read_strictly(raw: bytes, where: str) -> Index:
    """The same, of any JSON."""
    members = read_object(raw, where, "the index", IndexFileError, _REMEDY, INDEX)
    weight_map = _member(members, "weight_map", where)
    if not weight_map:
        raise IndexFileError(where, "weight_map is missing or empty", _REMEDY)
    return Index.of(_checked(weight_map, where), _metadata(members, where))


def _repeat(names: list[tuple[str, str, str]], code: Column, number: Column) -> bool:
    """Whether a tensor is named twice."""
    stems = Stems()
    stem = np.array([stems.of(head, tail) for head, tail, _ in names], np.int64)
    keys = np.sort(stems.joined(stem[code], number))
    return bool((keys[1:] == keys[:-1]).any())


def _checked(weight_map: dict[str, object], where: str) -> dict[str, str]:
    """The map; refuses what is not a name or not that of a shard."""
    known = set()
    checked: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not is_text(name) or not isinstance(shard, str):
            raise IndexFileError(
                where, f"weight_map maps {brief(name)} to {brief(shard)}, not to a file", _REMEDY
            )
        checked[name] = shard
        if shard in known:
            continue
        known.add(shard)
        if problem := shard_name_problem(shard):
            said = f"tensor {brief(name)} is said to be in {brief(shard)}, {problem}"
            raise IndexFileError(where, said, _REMEDY)
    return checked


def _metadata(members: dict[str, object], where: str) -> dict[str, object]:
    if members.get("metadata") is None:  # some writers say null where they note nothing
        members["metadata"] = {}
    metadata = _member(members, "metadata", where)
    if not _is_plain(metadata, _MAX_DEPTH):
        raise IndexFileError(
            where, f"metadata names a key twice or is nested deeper than {_MAX_DEPTH}", _REMEDY
        )
    return metadata


def build_index(tables: Mapping[str, TensorTable], metadata: Mapping[str, object]) -> bytes:
    """The index's bytes as transformers writes them: indented by 2, keys sorted, newline.

    tables: shard → its tensors.
    """
    head = json.dumps({"metadata": dict(metadata), "weight_map": {}}, indent=2, sort_keys=True)
    names: list[str] = []
    shards: list[str] = []
    for shard, table in tables.items():
        names += table.names()
        shards += repeat(json.dumps(shard), len(table))
    if not names:
        return f"{head}\n".encode()
    text = BytesIO()
    text.write(head.removesuffix("}\n}").encode())
    before = "\n"
    for place in sorted(range(len(names)), key=names.__getitem__):
        text.write(f"{before}    {_QUOTE(names[place])}: {shards[place]}".encode())
        before = ",\n"
    text.write(b"\n  }\n}\n")
    return text.getvalue()


def _member(members: dict[str, object], key: str, where: str) -> dict[str, object]:
    value = members.get(key, {})
    if isinstance(value, Repeated):
        raise IndexFileError(where, f"{key} names {brief(value.key)} twice", _REMEDY)
    if not isinstance(value, dict):
        raise IndexFileError(where, f"{key} is {brief(value)}, not an object", _REMEDY)
    return value


def _is_plain(value: object, levels: int) -> bool:
    if levels == 0 or isinstance(value, Repeated):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_plain(item, levels - 1) for item in inner)


def shard_name_problem(name: str) -> str | None:
    """Why a name from outside is not that of a shard in or below its folder, on any system; None
    where it is."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(mark in name for mark in "\\:"):
        return "not a plain path inside the folder"
    if not is_text(name) or any(ord(character) < 32 for character in name):
        return "not a possible file name"
    return None if name.endswith(_SUFFIX) else f"not a {_SUFFIX} file"
