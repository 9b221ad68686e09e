"""What every expert count in config.json must have become: one for all layers, or each its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import config_section, config_values
from shardsurgeon.checkpoint.confignumbers import PER_LAYER_KEY, per_layer_paths
from shardsurgeon.verification.lineage import Keeps

Path = tuple[str | int, ...]


class ExpectedCounts:
    """The counts of one pruned config, worked out from the source's and the keep-lists.

    mtp_dropped: whether the MTP layers are gone.
    """

    def __init__(
        self, config: Mapping[str, Any], anatomy: Anatomy, keeps: Keeps, mtp_dropped: bool
    ) -> None:
        keys = anatomy.family.config
        self._keys = keys
        self._anatomy = anatomy
        self._mtp_dropped = mtp_dropped
        self._left = {layer: len(ids) for layer, ids in keeps.retained.items()}
        self._every = {_last_name(dotted) for dotted in (*keys.num_experts, *keys.also)}
        self._of_mtp = {_last_name(dotted) for dotted in keys.mtp_num_experts}
        self._per_layer = per_layer_paths(keys, anatomy.num_layers)
        own = (config_section(config, at) for at in keys.at) if keys.per_layer else ()
        path = tuple(keys.per_layer.split("."))
        native = any(value is not None for each in own for _, value in config_values(each, path))
        self._adds = not keeps.is_uniform and not native

    def of(self, path: Path, value: int) -> int | None:
        """What the number at a path must have become; None where it counts no experts."""
        for template, first in self._per_layer:
            tail = path[-len(template) :]
            if len(tail) == len(template) and all(
                want == "*" or want == there for want, there in zip(template, tail, strict=True)
            ):
                position = tail[template.index("*")]
                return self._left.get(first + int(position), value)
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        if name in self._every and value == self._anatomy.shared_count:
            return self._most(mtp=not self._anatomy.own_mtp_count)
        if name in self._of_mtp and not self._mtp_dropped:
            first_mtp = self._anatomy.num_layers
            return max((n for layer, n in self._left.items() if layer >= first_mtp), default=value)
        return None

    def elements(self, path: Path, items: list[Any]) -> list[Any]:
        """The elements of the source's list that stay: those of MTP layers go with them."""
        per_layer = self._mtp_dropped and path[-1:] == (PER_LAYER_KEY,)
        return items[: self._anatomy.num_layers] if per_layer else items

    def added(self, path: Path, section: Mapping[str, Any]) -> dict[str, Any]:
        """What an object must have beyond its own members: the list of counts per layer."""
        if not self._adds or ".".join(map(str, path)) not in self._keys.at:
            return {}
        spellings = (*self._keys.num_experts, *self._keys.also)
        counts = {
            value
            for dotted in spellings
            for _, value in config_values(section, tuple(dotted.split(".")))
        }
        if PER_LAYER_KEY in section or self._anatomy.shared_count not in counts:
            return {}
        mtp = 0 if self._mtp_dropped else self._anatomy.num_mtp_layers
        length = max(self._anatomy.num_layers + mtp, max(self._left, default=0) + 1)
        return {PER_LAYER_KEY: [self._left.get(layer, 0) for layer in range(length)]}

    def _most(self, *, mtp: bool) -> int:
        first_mtp = self._anatomy.num_layers
        counts = [n for layer, n in self._left.items() if mtp or layer < first_mtp]
        # Without a single keep-list, which is a finding of its own, nothing is known.
        return max(counts, default=self._anatomy.shared_count)


def _last_name(dotted: str) -> str:
    return [word for word in dotted.split(".") if word != "*"][-1]
