"""The index, model.safetensors.index.json: read with every check, and written.

It says which shard has which tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat

from shardsurgeon.errors import IndexFileError
from shardsurgeon.storage.formats.columns import find_weight_map, read_weight_map
from shardsurgeon.storage.formats.strict_json import Repeated, brief, is_text, read_object
from shardsurgeon.storage.formats.tensor_table import TensorTable
from shardsurgeon.storage.limits import INDEX, MIB, json_problem

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
# A shorter weight map takes less memory than any index may, whatever it says.
_UNCOUNTED = 32 * MIB
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

    weight_map: tensor name → shard, a path inside the checkpoint with forward slashes.
    metadata: total_size and whatever else the author noted; empty where there is none.
    """

    weight_map: dict[str, str]
    metadata: dict[str, object]

    @property
    def shards(self) -> list[str]:
        """Every shard once, in the order of their numbers."""
        return sorted(set(self.weight_map.values()), key=natural_order)


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
    members, weight_map = _read(raw, where)
    if members.get("metadata") is None:  # some writers say null where they note nothing
        members["metadata"] = {}
    metadata = _member(members, "metadata", where)
    if not _is_plain(metadata, _MAX_DEPTH):
        raise IndexFileError(
            where, f"metadata names a key twice or is nested deeper than {_MAX_DEPTH}", _REMEDY
        )
    return Index(weight_map, metadata)


def _read(raw: bytes, where: str) -> tuple[dict[str, object], dict[str, str]]:
    """(members of the index, its weight map), the latter quickly where it is spelled as usual."""
    # What could take too much memory is for the strict reader, which refuses it.
    is_vast = len(raw) > _UNCOUNTED and json_problem(raw, INDEX)
    place = None if is_vast else find_weight_map(raw)
    weight_map = read_weight_map(place) if place is not None else None
    if (
        place is not None
        and weight_map
        and not any(map(shard_name_problem, {*weight_map.values()}))
    ):
        rest = raw[: place[1]] + raw[place[2] :]
        # What is wrong with the rest is said by its place in the whole, below.
        with suppress(IndexFileError):
            members = read_object(rest, where, "the index", IndexFileError, _REMEDY, INDEX)
            if members.get("weight_map") == {}:
                return members, weight_map
    members = read_object(raw, where, "the index", IndexFileError, _REMEDY, INDEX)
    return members, _checked(_member(members, "weight_map", where), where)


def _checked(weight_map: dict[str, object], where: str) -> dict[str, str]:
    """The map. Raises IndexFileError for an empty one, and what is no name or not a shard's."""
    if not weight_map:
        raise IndexFileError(where, "weight_map is missing or empty", _REMEDY)
    shards: dict[str, str] = {}  # one string object per shard, not one per tensor
    checked: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not is_text(name) or not isinstance(shard, str):
            raise IndexFileError(
                where, f"weight_map maps {brief(name)} to {brief(shard)}, not to a file", _REMEDY
            )
        if shard not in shards:
            _check_path(shard, name, where)
            shards[shard] = shard
        checked[name] = shards[shard]
    return checked


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


def _check_path(shard: str, name: str, where: str) -> None:
    """Refuse what is not the name of a shard."""
    if problem := shard_name_problem(shard):
        said = f"tensor {brief(name)} is said to be in {brief(shard)}, {problem}"
        raise IndexFileError(where, said, _REMEDY)
