"""A pruned model without shards, loaded by transformers as `from_pretrained` loads a folder.

transformers gets the config and, in place of a checkpoint's files, each tensor by name, to be read
when it wants it. All else is its own doing: dtype, placement, quantization, conversion of weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import CheckpointError, ConfigError, UsageError, install
from shardsurgeon.families.schema import family_for
from shardsurgeon.serving.layer_counts import LayerCounts, model_with_counts
from shardsurgeon.serving.model_classes import ModelClasses
from shardsurgeon.serving.planned import open_planned
from shardsurgeon.serving.tensors import ViewTensors
from shardsurgeon.storage.formats.dtypes import TORCH_NAMES
from shardsurgeon.storage.formats.index import CONFIG_NAME
from shardsurgeon.storage.formats.strict_json import read_object
from shardsurgeon.storage.formats.view import ViewShard
from shardsurgeon.storage.limits import CONFIG, require_size
from shardsurgeon.storage.open import hub_name, open_source
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource

AnyPath = str | os.PathLike[str]

# What says where the tensors come from, which the view or the plan does.
_DECIDED = ("config", "gguf_file", "revision", "state_dict", "subfolder", "variant")
_FLOATS = ("Infinity", "-Infinity", "NaN")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# Read by the model's loader, not by its config.
_NOT_FOR_CONFIG = ("dtype", "generation_config", "quantization_config", "torch_dtype")


def load_pruned(
    model: AnyPath | tuple[AnyPath, AnyPath],
    *,
    model_class: Any = None,
    family: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """The transformers model of a pruned checkpoint that no one wrote.

    model: a view's folder, or a pair: a model's folder or its address on the Hub, and a plan.json
    for it. model_class: a class of transformers, an `AutoModelFor...` among them; None for the one
    that config.json names, else AutoModelForCausalLM. family: as `shardsurgeon.plan` takes it, for
    a pair and for layers that keep different numbers of experts. All else is what `from_pretrained`
    takes (dtype, device_map, quantization_config, attn_implementation, trust_remote_code, ...), and
    means the same. Each layer is built with as many experts as it has; where they are not the same
    number, nothing but this function loads what `save_pretrained` writes.

    Nothing is written; layers that device_map puts on the disk go to offload_folder. Tensors that
    lie in one range of a file on this machine are that file, mapped: it has to stay as it is while
    the model is used. Raises InputError and its children for what is no view, or no plan of the
    model, and what `from_pretrained` raises.

    >>> plan = shardsurgeon.plan("fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt", keep=8)
    >>> view = shardsurgeon.apply(plan, "small", view=True).out
    >>> from shardsurgeon.serving import load_pruned
    >>> model = load_pruned(view, dtype="bfloat16")
    >>> model.config.num_experts
    8
    >>> plan.write_plan("keep.json")
    True
    >>> same = load_pruned(("fixtures/qwen3_moe", "keep.json"))
    >>> same.num_parameters() == model.num_parameters()
    True
    """
    for name in _DECIDED:
        if name in from_pretrained_kwargs:
            problem = "is for a checkpoint's own files, and a view or a plan says what to read"
            raise UsageError(name, problem, "leave it out")
    _require_transformers()
    return _load(_pruned(model, family), model_class, from_pretrained_kwargs)


@dataclass(frozen=True)
class _Pruned:
    """What is to be loaded.

    settings: the pruned config; place: where transformers finds all other files, a folder or a
    repository; revision: what it needs to find them there; counts: None where all layers have the
    same number of experts.
    """

    settings: Mapping[str, Any]
    place: str
    revision: Mapping[str, str]
    shards: Sequence[ViewShard] = field(repr=False)
    origin: Source
    data: bytes = field(repr=False)
    counts: LayerCounts | None


def _pruned(model: AnyPath | tuple[AnyPath, AnyPath], family: str | None) -> _Pruned:
    if isinstance(model, tuple):
        planned = open_planned(*model, family=family)
        checkpoint = planned.checkpoint
        settings, where = _parsed(planned.config, checkpoint.config_place), checkpoint.location
        place, revision = _place(checkpoint.source)
        counts = LayerCounts.of(settings, checkpoint.family or family_for(settings, where), where)
        found = (planned.shards, planned.origin, planned.data)
        return _Pruned(settings, place, revision, *found, counts)
    source = open_source(model)
    if not isinstance(source, ViewSource):
        problem = "is a model with its own shards, and no view"
        raise CheckpointError(model, problem, "load it with transformers' from_pretrained")
    where = f"{source.location}/{CONFIG_NAME}"
    if CONFIG_NAME not in {file.name for file in source.list()}:
        raise CheckpointError(where, "is missing, and transformers needs it")
    path = source.folder.local_path(CONFIG_NAME)
    require_size(path.stat().st_size, CONFIG, where, ConfigError)
    raw = source.folder.read(CONFIG_NAME, 0, path.stat().st_size)
    settings, counts = _parsed(raw, where), None
    # In every key that says it; without one, no family is needed.
    if b"per_layer" in raw:
        checkpoint = open_model(source, family)
        counts = LayerCounts.of(settings, checkpoint.family or family_for(settings, where), where)
    found = (source.manifest.shards, source.origin, source.data)
    return _Pruned(settings, str(path.parent), {}, *found, counts)


def _parsed(config: bytes, where: str) -> Mapping[str, Any]:
    """A config as transformers reads it: infinity, which JSON has not, is an object there."""
    settings = read_object(config, where, "", ConfigError, "fetch it again", CONFIG)
    return {key: _with_floats(each) for key, each in settings.items()}


def _place(source: Source) -> tuple[str, dict[str, str]]:
    """How transformers finds the other files of a model, and what else it has to be told."""
    path = source.local_path(CONFIG_NAME)
    if path is not None and not source.is_remote:
        return str(path.parent), {}
    name = hub_name(source)
    if name is None or source.revision is None:
        problem = "is neither a folder on this machine nor a repository of the Hub"
        raise UsageError(source.location, problem, "fetch the model first")
    owner, repository, *folder = name.split("/")
    revision = {"revision": source.revision, "subfolder": "/".join(folder)}
    return f"{owner}/{repository}", revision


def _load(pruned: _Pruned, wanted: Any, kwargs: dict[str, Any]) -> Any:
    found = {**pruned.revision, **{name: kwargs[name] for name in _HUB if name in kwargs}}
    trusted = kwargs.get("trust_remote_code")
    counts = pruned.counts
    settings = pruned.settings if counts is None else counts.settings()
    classes = ModelClasses(settings, pruned.place, found, wanted, trusted)
    for_config = {name: each for name, each in kwargs.items() if name not in _NOT_FOR_CONFIG}
    config, rest = classes.make_config(settings, for_config)
    rest |= {name: kwargs[name] for name in _NOT_FOR_CONFIG if name in kwargs}
    if (rest.get("dtype") or rest.get("torch_dtype") or "auto") == "auto" and config.dtype is None:
        rest["dtype"] = _stored_dtype(pruned.shards)
    built = classes.model
    if counts is not None:
        others = {n: classes.make_config(counts.settings(n), for_config)[0] for n in counts.others}
        built = model_with_counts(classes.model, counts, others)
    with ViewTensors(pruned.shards, pruned.origin, pruned.data) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors}
        wants_info = rest.pop("output_loading_info", False)
        model, info = built.from_pretrained(
            None, config=config, state_dict=slices, output_loading_info=True, **rest
        )
    if counts is not None:
        counts.require_loaded(info["missing_keys"], pruned.place)
    model.__class__ = classes.model
    model.name_or_path = model.config.name_or_path = pruned.place
    if model.can_generate() and kwargs.get("generation_config") is None:
        _read_generation_config(model, pruned.place, found)
    return (model, info) if wants_info else model


def _read_generation_config(model: Any, place: str, found: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(place, **found)
    except OSError:
        # As transformers does where there is no such file.
        model.generation_config = GenerationConfig.from_pretrained(
            place, config_file_name=CONFIG_NAME, _from_model_config=True, **found
        )


def _stored_dtype(shards: Sequence[ViewShard]) -> Any:
    """As transformers finds it where the config has none: of the first floats by name."""
    import torch

    records = sorted(shards[0].header.tensors, key=lambda record: record.name)
    names = (TORCH_NAMES.get(record.dtype) for record in records)
    stored = [getattr(torch, name) for name in names if name is not None]
    # No model can be made in the types of one byte and less.
    usable = (each for each in stored if each.is_floating_point and each.itemsize > 1)
    return next(usable, stored[0] if stored else torch.float32)


def _with_floats(node: Any) -> Any:
    """A config with the floats that JSON has not, which transformers writes as objects."""
    if isinstance(node, list):
        return [_with_floats(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    if node.keys() == {"__float__"} and node["__float__"] in _FLOATS:
        return float(node["__float__"])
    return {key: _with_floats(each) for key, each in node.items()}


def _require_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        problem = f"needs torch and transformers; {error.name} is not installed"
        raise UsageError("load_pruned", problem, install("architecture")) from error
