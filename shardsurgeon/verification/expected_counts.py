"""The expert counts that a pruned config must have, worked out from the source's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.config import (
    OVERRIDES_KEY,
    PER_LAYER_KEY,
    PUBLISHED_KEYS,
    config_section,
    config_values,
    layer_at,
    per_layer_paths,
)
from shardsurgeon.verification.record import RetainedIds

Path = tuple[str | int, ...]


class ExpectedCounts:
    """The counts of one pruned config, worked out from the source's and the keep-lists.

    mtp_dropped: whether the MTP layers are gone.
    """

    def __init__(
        self, config: Mapping[str, Any], anatomy: Anatomy, keeps: RetainedIds, mtp_dropped: bool
    ) -> None:
        keys = anatomy.family.config
        self._keys = keys
        self._anatomy = anatomy
        self._mtp_dropped = mtp_dropped
        self._keeps = keeps
        self._left = {layer: len(ids) for layer, ids in keeps.retained.items()}
        self._every = {_last_name(dotted) for dotted in (*keys.num_experts, *keys.also)}
        self._of_mtp = {_last_name(dotted) for dotted in keys.mtp_num_experts}
        self._per_layer = per_layer_paths(keys, anatomy.num_layers)
        own = (config_section(config, at) for at in keys.at) if keys.per_layer else ()
        path = tuple(keys.per_layer.split("."))
        native = any(value is not None for each in own for _, value in config_values(each, path))
        self._uniform = anatomy.is_uniform(self._left)
        self._adds = not self._uniform and not native

    def of(self, path: Path, value: int) -> int | None:
        """The new value of the number at a path; None where it does not count experts."""
        for template, first in self._per_layer:
            tail = path[-len(template) :]
            if len(tail) == len(template) and all(
                want == "*" or want == there for want, there in zip(template, tail, strict=True)
            ):
                position = layer_at(tail[template.index("*")])
                if position is None:
                    continue
                # A published list says of a dense layer what the config says of all.
                dense = template[0] in PUBLISHED_KEYS and value == self._anatomy.shared_count
                layer = first + position
                return self._left.get(layer, self._shared() if dense else value)
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        if name in self._every and value == self._anatomy.shared_count:
            return self._shared()
        if name in self._of_mtp and not self._mtp_dropped:
            first_mtp = self._anatomy.num_layers
            left = max((n for layer, n in self._left.items() if layer >= first_mtp), default=value)
            # 0 says "as many as the others", and stays where that is true.
            return value if not value and left == self._shared() else left
        return None

    def elements(self, path: Path, items: list[Any]) -> list[Any]:
        """The elements of the source's list that stay: those of dropped MTP layers do not."""
        if not self._mtp_dropped or not path:
            return items
        main = self._anatomy.num_layers
        padded = (
            path[-1] in self._keys.mtp_padded
            and ".".join(map(str, path[:-1])) in self._keys.at
            and len(items) == main + self._anatomy.num_mtp_layers
        )
        listed = path[-1] in (PER_LAYER_KEY, *PUBLISHED_KEYS)
        return items[:main] if padded or listed else items

    def completed(
        self, path: Path, section: Mapping[str, Any], members: dict[str, Any]
    ) -> dict[str, Any]:
        """What an object must have become, from its members one by one.

        Beside the one count stand those of the layers, where these differ: as a list, and as
        transformers' overrides. section: the object in the source's config.
        """
        if self._mtp_dropped and path and path[-1] in PUBLISHED_KEYS:
            main = range(self._anatomy.num_layers)
            members = {key: each for key, each in members.items() if layer_at(key) in main}
        if ".".join(map(str, path)) not in self._keys.at:
            return members
        if self._uniform:
            return self._without_overrides(members)
        spellings = (*self._keys.num_experts, *self._keys.also)
        counts = {
            value
            for dotted in spellings
            for _, value in config_values(section, tuple(dotted.split(".")))
        }
        if not self._adds or self._anatomy.shared_count not in counts:
            return members
        published = any(isinstance(section.get(key), list | dict) for key in PUBLISHED_KEYS)
        if PER_LAYER_KEY not in section and not published:
            mtp = 0 if self._mtp_dropped else self._anatomy.num_mtp_layers
            length = max(self._anatomy.num_layers + mtp, max(self._left, default=0) + 1)
            members[PER_LAYER_KEY] = [self._left.get(layer, 0) for layer in range(length)]
        overrides = members.setdefault(OVERRIDES_KEY, {})
        if overrides is None:
            overrides = members[OVERRIDES_KEY] = {}
        if isinstance(overrides, dict):
            self._override(overrides)
        return members

    def _override(self, overrides: dict[str, Any]) -> None:
        """Put the count of every main layer with experts into transformers' overrides."""
        for layer in self._anatomy.main_layers:
            # Of two keys for one layer transformers takes the last.
            spelled = [key for key in overrides if layer_at(key) == layer.index]
            for dotted in self._keys.overrides:
                place = overrides
                *outer, name = (spelled or [str(layer.index)])[-1], *dotted.split(".")
                for key in outer:
                    if not isinstance(place.get(key), dict):
                        place[key] = {}
                    place = place[key]
                place[name] = self._left.get(layer.index, layer.num_experts)

    def _without_overrides(self, members: dict[str, Any]) -> dict[str, Any]:
        """An object without overrides of the count, if it has some, nor objects left empty."""
        names = {(*name.split("."),) for name in (*self._keys.overrides, *self._keys.num_experts)}
        overrides = members.get(OVERRIDES_KEY)
        if not isinstance(overrides, dict):
            return members
        layers = overrides.values()
        if not any(next(config_values(each, name), None) for each in layers for name in names):
            return members
        left = {key: _without(each, names) for key, each in overrides.items()}
        left = {key: each for key, each in left.items() if each != {}}
        gone = () if left else (OVERRIDES_KEY,)
        return {
            key: left if key == OVERRIDES_KEY else each
            for key, each in members.items()
            if key not in gone
        }

    def _shared(self) -> int:
        """The one count: of all main layers, or where they differ of the largest layer."""
        counts = self._keeps.shared_counts(self._anatomy)
        # Without any keep-list, which is a finding of its own, the count is not known.
        return max(counts, default=self._anatomy.shared_count)


def _last_name(dotted: str) -> str:
    return [word for word in dotted.split(".") if word != "*"][-1]


def _without(node: Any, names: Collection[tuple[str, ...]]) -> Any:
    """An object without the members at some paths, nor objects that are empty without them."""
    if not isinstance(node, dict):
        return node
    left = {
        key: _without(value, {name[1:] for name in names if name[0] == key})
        for key, value in node.items()
        if (key,) not in names
    }
    return {key: value for key, value in left.items() if value != {}}
