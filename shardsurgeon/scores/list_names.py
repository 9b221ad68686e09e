"""The many names that tools give a list of experts, and records that say one thing of one expert.

`kept`, `retained_indices`, `keep_by_layer` and `per_layer_keep` are one word to us, as are
`expert_ranking` and `ranked_by_layer`. A name that says something else besides means nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypeGuard

from shardsurgeon.checkpoint.layer_names import Layer, parse_layer

ListMeaning: TypeAlias = Literal["kept", "dropped", "ranking"]

_SAID: Mapping[str, ListMeaning] = {
    **dict.fromkeys(("keep", "kept", "retain", "retained", "survivors"), "kept"),
    **dict.fromkeys(("drop", "dropped", "prune", "pruned", "remove", "removed"), "dropped"),
    **dict.fromkeys(("ranked", "ranking", "rankings"), "ranking"),
}
_BESIDE = frozenset(
    (
        *("expert", "experts", "id", "ids", "index", "indices", "by", "per", "layer", "layers"),
        *("list", "lists", "map", "maps", "set", "sets"),
    )
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")

# What records call the layer and the expert that they are about.
_LAYER_KEYS = ("layer", "layer_idx", "layer_id", "layer_index", "layerIndex", "layerIdx")
_EXPERT_KEYS = ("expert", "expert_id", "expert_idx", "expert_index", "expertId", "expertIndex")
# Keys under which other tools put what they say of each layer.
LAYER_TABLES = ("layers", "per_layer", "perLayer", "layer_reports", "by_layer")


def list_meaning(key: object) -> ListMeaning | None:
    """What a list under this key is, None where its name does not say it."""
    if not isinstance(key, str) or len(key) > 80:
        return None
    words = [word.lower() for word in _WORD.findall(key)]
    said = [word for word in words if word not in _BESIDE]
    return _SAID.get(said[0]) if len(said) == 1 else None


def layer_of(record: Mapping[Any, object]) -> Layer | None:
    """The layer that a record says it is about."""
    return next((_parsed(record[key]) for key in _LAYER_KEYS if key in record), None)


def expert_of(record: Mapping[Any, object]) -> object:
    """What a record says its expert is; None where it is not about one."""
    return next((record[key] for key in _EXPERT_KEYS if key in record), None)


def is_place(key: object) -> bool:
    """Whether a record's key says where it belongs, and nothing of its worth."""
    return key in _LAYER_KEYS or key in _EXPERT_KEYS


def are_records(value: object) -> TypeGuard[list[dict[Any, object]]]:
    """Whether it is a list of objects each of which names a layer."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and layer_of(item) is not None for item in value)
    )


def ranking_in(value: Mapping[Any, object]) -> object:
    """What lies under a word for a ranking, in an object or below a word for lists in it."""
    for key, item in value.items():
        meaning = list_meaning(key)
        if meaning == "ranking" and not isinstance(item, bool | int | float | str):
            return item
        if meaning is not None and isinstance(item, dict):
            below = ranking_in(item)
            if below is not None:
                return below
    return None


def _parsed(value: object) -> Layer | None:
    name = parse_layer(value)
    return None if name is None else name.layer
