"""The many spellings of a layer in score files and keep-lists, and the number each one means.

Scores and keep-lists come from many tools, which name a layer by number, by module path or as
llama.cpp does. A name that could mean two layers is not taken for any.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Layer: TypeAlias = int | str
"""A layer's number, or `mtp.<j>` for the j-th next-token-prediction layer."""

_MAX_LENGTH = 300
_NUMBER = r"([0-9]{1,6})"
_REST = r"(?:[./]([A-Za-z_].*))?"
_BARE = re.compile(rf"{_NUMBER}{_REST}")
_WORD = re.compile(rf"(?:^|[./])(?:layers?|blocks?|blk)[._]{_NUMBER}{_REST}\Z")
_SHORT = re.compile(rf"(?:[Ll]ayer|[Bb]lock|blk|L)[ _]?{_NUMBER}{_REST}")
_MTP = re.compile(rf"(?:^|.*[./])mtp(?:[._](?:layers?[._])?{_NUMBER})?{_REST}")


@dataclass(frozen=True, slots=True)
class LayerName:
    """A layer, and what its name says beyond it (`mlp` in `model.layers.3.mlp`, else "")."""

    layer: Layer
    rest: str = ""


def parse_layer(key: object) -> LayerName | None:
    """The layer that a key names; None where it does not name exactly one.

    Understood are 3, "3", "layer_3", "layer3", "L3", "blk.3", "layers.3", "model.layers.3.mlp"
    (and blocks for layers), "mtp", "mtp.0", "mtp.layers.0.mlp", each with more after it; in a
    module path with several numbers it is the one after `layers`.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        return LayerName(key) if key >= 0 else None
    if not isinstance(key, str) or len(key) > _MAX_LENGTH:
        return None
    mtp = _MTP.fullmatch(key)
    if mtp:
        return LayerName(f"mtp.{int(mtp[1] or 0)}", mtp[2] or "")
    word = _WORD.search(key)
    bare = _BARE.fullmatch(key) or (None if word else _SHORT.fullmatch(key))
    if bare:
        return LayerName(int(bare[1]), bare[2] or "")
    if not word or _WORD.search(f".{word[2] or ''}"):
        return None
    return LayerName(int(word[1]), word[2] or "")


def layer_order(layer: Layer) -> tuple[bool, int]:
    """Sort key: numbered layers first, ascending, then the MTP layers."""
    if isinstance(layer, int):
        return False, layer
    return True, int(layer.removeprefix("mtp."))


def layer_number(layer: Layer, first_mtp: int, with_experts: Sequence[int]) -> int:
    """The number of a layer that a file names: MTP layers count on behind the main ones.

    first_mtp: the number of the MTP layer `mtp.0`; with_experts: the MTP layers that have experts,
    ascending. Where a step of MTP is several layers, `mtp.0` may mean the first of these.
    """
    if isinstance(layer, int):
        return layer
    count = int(layer.removeprefix("mtp."))
    number = first_mtp + count
    if number not in with_experts and count < len(with_experts):
        return with_experts[count]
    return number


def listed_layers(layers: Collection[int]) -> str:
    """Layer numbers for a message, ascending, at most five of them."""
    shown = ", ".join(map(str, sorted(layers)[:5]))
    return shown if len(layers) <= 5 else f"{shown} and {len(layers) - 5} more"
