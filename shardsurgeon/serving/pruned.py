"""A pruned model that an engine is to load: of a view, or of a model and a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.config import PER_LAYER_KEY
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import CheckpointError, ConfigError, UsageError
from shardsurgeon.execution.view import plan_view
from shardsurgeon.pruning.decide import decide
from shardsurgeon.pruning.output_files import assemble
from shardsurgeon.pruning.overrides import Overrides, engine_overrides
from shardsurgeon.pruning.planner import (
    SizeEstimate,
    check_expert_counts,
    expert_id_tables,
    plan_shards,
)
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from shardsurgeon.serving.tensors import ViewTensors
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME, ViewShard, read_manifest
from shardsurgeon.storage.limits import CONFIG, require_size
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource

_CONFIG_NAME = "config.json"


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
        """Its tensors, in torch."""
        return ViewTensors(self.shards, self.origin, self.data)

    def require_settings(self, config: object, text_config: object) -> None:
        """Raise UsageError unless an engine's config says what the pruned config.json does.

        config: the whole one; text_config: that of the text model, which may stand for both.
        """
        if self.overrides is None:
            return
        if self.overrides.problem:
            problem = f"cannot be served with a plan: {self.overrides.problem}"
            raise UsageError(self.where, problem, "make a view: `apply --plan PLAN --view`")
        for path, value in self.overrides.changes.items():
            inner = (_at(text_config, path[begin:]) for begin in range(1, len(path)))
            if value not in (_at(config, path), *inner):
                dotted, found = ".".join(map(str, path)), _at(config, path)
                problem = f"{dotted} is {found!r}, with this plan it is {value!r}"
                told = json.dumps(self.overrides.values, separators=(",", ":"))
                if isinstance(value, list | dict):
                    problem = f"{dotted} is not what it is with this plan"
                raise UsageError(self.where, problem, f"add --hf-overrides '{told}'")

    def require_counts(self, built: Mapping[str, int]) -> None:
        """Raise UsageError where an engine built a layer with another number of experts.

        built: module → its experts.
        """
        for module, count in built.items():
            if self.counts and count not in self.counts:
                kept = " or ".join(map(str, sorted(self.counts)))
                problem = f"the engine built {module} with {count} experts, the plan keeps {kept}"
                raise UsageError(self.where, problem, "make a view: `apply --plan PLAN --view`")


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
    model = open_model(folder)
    anatomy = read_anatomy(model)
    request = SelectionRequest(plan_file=plan_file, mtp=mtp, allow_nonuniform=True)
    decision = decide(
        model, anatomy, None, request, SizeEstimate(model, anatomy, mtp=request.mtp).nbytes
    )
    check_expert_counts(model, anatomy)
    kept = {layer: keep.retained for layer, keep in decision.keep.layers.items()}
    require_complete(anatomy.incomplete, kept, model.location)
    shards = plan_shards(
        model,
        anatomy,
        decision.keep,
        tables=expert_id_tables(model, anatomy, decision.keep),
        drop_mtp=decision.drop_mtp,
    )
    plan = assemble(model, anatomy, request, decision, shards, {}, None)
    config = dict(plan.generated_files)[model.names.config]
    _require_one_count(folder, Document.parse(config, model.names.config).value)
    made = dict(plan_view(plan, model.source, Path(folder)).manifest)
    manifest = read_manifest(made[VIEW_NAME], f"{folder} with {plan_file}")
    origin = model.source.origin if isinstance(model.source, ViewSource) else model.source
    return PrunedModel(
        folder,
        manifest.shards,
        origin,
        made.get(DATA_NAME, b""),
        frozenset(map(len, kept.values())),
        engine_overrides(model, plan),
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
