"""A pruned model that an engine is to load: of a view, or of a model and a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.config import PER_LAYER_KEY
from shardsurgeon.errors import CheckpointError, ConfigError, UsageError
from shardsurgeon.pruning.overrides import Overrides, engine_overrides
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.serving.planned import open_planned
from shardsurgeon.serving.tensors import ViewTensors
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.view import VIEW_NAME, ViewShard
from shardsurgeon.storage.limits import CONFIG, require_size
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource

_CONFIG_NAME = "config.json"
_A_VIEW = "make a view: `apply --plan PLAN --view`"


@dataclass(frozen=True)
class PrunedModel:
    """What is loaded.

    where: the folder that the engine was given; shards, origin, data: as in ViewTensors; counts:
    experts of any layer, none where that is not known; overrides: how its config.json differs from
    the one in the folder, None where it is that one.
    """

    where: str
    shards: Sequence[ViewShard]
    origin: Source
    data: bytes
    counts: frozenset[int] = frozenset()
    overrides: Overrides | None = None

    def tensors(self) -> ViewTensors:
        """Its tensors, in torch, to be read in order: what has been read of a file counts as memory
        of this process as long as it is mapped, so the next file takes its place."""
        return ViewTensors(self.shards, self.origin, self.data, most_mapped=1)

    def require_settings(
        self, config: object, text_config: object, *, is_draft: bool = False
    ) -> None:
        """Raise UsageError unless an engine's config says what the pruned config.json does.

        config: the whole one; text_config: that of the text model, which may stand for both;
        is_draft: whether it is a draft's, for which vLLM takes no overrides.
        """
        if self.overrides is None:
            return
        if self.overrides.problem:
            problem = f"cannot be served with a plan: {self.overrides.problem}"
            raise UsageError(self.where, problem, _A_VIEW)
        for path, value in self.overrides.changes.items():
            inner = (_at(text_config, path[begin:]) for begin in range(1, len(path)))
            if value not in (_at(config, path), *inner):
                dotted, found = ".".join(map(str, path)), _at(config, path)
                problem = f"{dotted} is {found!r}, with this plan it is {value!r}"
                told = json.dumps(self.overrides.values, separators=(",", ":"))
                if isinstance(value, list | dict):
                    problem = f"{dotted} is not what it is with this plan"
                remedy = f"add --hf-overrides '{told}'"
                if is_draft:
                    problem += " in the draft, to which vLLM passes no overrides"
                    remedy = _A_VIEW
                raise UsageError(self.where, problem, remedy)

    def require_counts(self, built: Mapping[str, int]) -> None:
        """Raise UsageError where an engine built a layer with another number of experts.

        built: module → its experts.
        """
        for module, count in built.items():
            if self.counts and count not in self.counts:
                kept = " or ".join(map(str, sorted(self.counts)))
                problem = f"the engine built {module} with {count} experts, the plan keeps {kept}"
                raise UsageError(self.where, problem, _A_VIEW)


def is_view(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the manifest of a view."""
    return os.path.lexists(os.path.join(folder, VIEW_NAME))


def of_view(folder: str) -> PrunedModel:
    """The model of a view. Raises what opening it does, and UsageError for layers that keep
    different numbers of experts where only one count can be said."""
    view = ViewSource(LocalSource(folder))
    path = view.folder.local_path(_CONFIG_NAME)
    if not path.is_file():
        raise ConfigError(f"{folder}/{_CONFIG_NAME}", "is missing", "make the view again")
    require_size(path.stat().st_size, CONFIG, str(path), ConfigError)
    _require_one_count(folder, Document.parse(path.read_bytes(), str(path)).value)
    return PrunedModel(folder, view.manifest.shards, view.origin, view.data)


def of_plan(folder: str, plan_file: str, mtp: MtpPolicy = MtpPolicy.ROUTER_NORM) -> PrunedModel:
    """What `apply --plan` would make of a model. mtp: its --mtp.

    Raises InputError and its children for a model or a plan that cannot be used.
    """
    planned = open_planned(folder, plan_file, mtp=mtp)
    checkpoint = planned.checkpoint
    _require_one_count(folder, Document.parse(planned.config, checkpoint.names.config).value)
    return PrunedModel(
        folder,
        planned.shards,
        planned.origin,
        planned.data,
        frozenset(len(keep.retained) for keep in planned.keep.layers.values()),
        engine_overrides(checkpoint, planned.generated),
    )


def _require_one_count(folder: str, config: Any) -> None:
    """Refuse a list of counts that no engine's model reads."""
    if not isinstance(config, Mapping):
        return
    counts = {count for count in config.get(PER_LAYER_KEY) or () if count}
    if len(counts) > 1:
        problem = (
            f"its layers keep {min(counts)} to {max(counts)} experts, and vLLM's class of this "
            "model builds all of them with one number"
        )
        raise CheckpointError(folder, problem, "plan without --allocate")
    for value in config.values():
        _require_one_count(folder, value)


def _at(config: Any, path: Sequence[str | int]) -> object:
    for key in path:
        is_plain = isinstance(config, Mapping)
        config = config.get(key) if is_plain else getattr(config, str(key), None)
    return config
