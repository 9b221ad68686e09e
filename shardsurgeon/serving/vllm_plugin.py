"""vLLM's `--load-format shardsurgeon`: a view, or a model and a plan, loaded as a pruned model.

vLLM calls `register` in each of its processes, by the entry point that pyproject.toml declares:

    vllm serve VIEW --load-format shardsurgeon
    vllm serve MODEL --load-format shardsurgeon \\
        --model-loader-extra-config '{"plan": "plan.json"}' --hf-overrides ...

The loader is vLLM's own for safetensors, with the tensors from elsewhere: which of them a rank does
not need, what of the model stays without weights, reloading and drafts are its matter. It is
written for vLLM 0.32 and 0.33. vLLM is imported inside functions, since nobody else needs it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.serving.pruned import PrunedModel, is_view, of_plan, of_view
from shardsurgeon.storage.formats.index import HUGGING_FACE

LOAD_FORMAT = "shardsurgeon"
_EXTRA = "--model-loader-extra-config"
# What the loader calls of vLLM's own one, by name.
_NEEDED = (
    *("load_model", "load_weights", "get_all_weights", "download_model"),
    *("_get_weights_iterator", "_prepare_weights"),
)


@cache
def register() -> None:
    """Make the load format known to vLLM. A vLLM that has it not goes on without, and says so."""
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm").warning(
            "--load-format %s is not there: this vLLM is not one of 0.32 or 0.33 (%s)",
            LOAD_FORMAT,
            error,
        )


def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.transformers_utils import config

    loader = _loader()
    config._read_safetensors_metadata_in_dir = _with_views(config._read_safetensors_metadata_in_dir)
    register_model_loader(LOAD_FORMAT)(loader)


def _with_views(
    read_folder: Callable[[Path], dict[str, Any]],
) -> Callable[[Path], dict[str, Any]]:
    """vLLM's reading of all headers in a folder, for views too.

    It looks there whether a model has a head of its own, and which modules AWQ and GPTQ left as
    they were.
    """

    def read(folder: Path) -> dict[str, Any]:
        if not is_view(folder):
            return read_folder(folder)
        return {
            record.name: {
                "dtype": record.dtype,
                "shape": list(record.shape),
                "data_offsets": [record.begin, record.end],
            }
            for shard in of_view(str(folder)).shards
            for record in shard.header.tensors
        }

    return read


def _loader() -> type[Any]:
    """The loader's class. Raises ImportError and AttributeError where vLLM is another."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.model_loader import weight_utils
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    for name in _NEEDED:
        getattr(DefaultModelLoader, name)

    class ShardSurgeonLoader(DefaultModelLoader):  # type: ignore[misc]
        """Loads what `serving.pruned` opens, and everything else as vLLM does."""

        counter_before_loading_weights: float

        def __init__(self, load_config: Any) -> None:
            self._plan, self._mtp, rest = _settings(load_config.model_loader_extra_config)
            self._opened: dict[str, PrunedModel] = {}
            super().__init__(
                replace(load_config, load_format="auto", model_loader_extra_config=rest)
            )

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            found = self._pruned(model_config)
            if found is not None:
                found.require_settings(
                    model_config.hf_config,
                    model_config.hf_text_config,
                    is_draft=model_config.runner_type == "draft",
                )
            return super().load_model(vllm_config, model_config, prefix)

        def load_weights(self, model: Any, model_config: Any) -> None:
            found = self._pruned(model_config)
            if found is not None:
                found.require_counts(_experts_of(model))
            super().load_weights(model, model_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            self._pruned(model_config)
            yield from super().get_all_weights(model_config, model)
            self._opened.clear()

        def download_model(self, model_config: Any) -> None:
            if not os.path.isdir(model_config.model):
                super().download_model(model_config)

        def _pruned(self, model_config: Any) -> PrunedModel | None:
            """The pruned model that vLLM's name of a model stands for; None for a draft that is a
            model of its own, to be loaded as it is."""
            name = model_config.model
            if name in self._opened:
                return self._opened[name]
            engine = get_current_vllm_config_or_none()
            is_draft = engine is not None and engine.model_config.model != name
            if self._plan is None or is_draft:
                if not is_view(name):
                    if is_draft:
                        return None
                    raise UsageError(name, "is not a view", f"make one, or add {_plan_words()}")
                self._opened[name] = of_view(name)
            else:
                self._opened[name] = of_plan(self._folder(model_config), self._plan, self._mtp)
            return self._opened[name]

        def _folder(self, model_config: Any) -> str:
            """The folder of a model, which is fetched first where it is a repository."""
            name = model_config.model
            if os.path.isdir(name):
                return str(name)
            folder: str = self._prepare_weights(name, None, model_config.revision, True, None)[0]
            return folder

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
            found = self._opened.get(source.model_or_path)
            if found is None or source.subfolder is not None:
                inner: Iterator[tuple[str, Any]] = super()._get_weights_iterator(source)
                return inner
            if self.counter_before_loading_weights == 0.0:
                self.counter_before_loading_weights = time.perf_counter()
            return self._weights(found, source)

        def _weights(self, found: PrunedModel, source: Any) -> Iterator[tuple[str, Any]]:
            """The tensors that this rank needs, shard after shard, each read when it is used."""
            unused = source.is_unused_weight or (lambda name: False)
            with found.tensors() as tensors:
                for shard in weight_utils.tqdm(
                    self._wanted(found, source.allow_patterns_overrides),
                    desc="Loading the shards of a pruned model",
                    disable=not weight_utils.enable_tqdm(self.load_config.use_tqdm_on_load),
                    bar_format=weight_utils._BAR_FORMAT,
                ):
                    names = [
                        record.name
                        for record in shard.header.tensors
                        if not should_skip_weight(record.name, self.local_expert_ids)
                        and not unused(record.name)
                    ]
                    for name, tensor in tensors.in_turn(names):
                        yield source.prefix + name, tensor

        def _wanted(self, found: PrunedModel, patterns: list[str] | None) -> list[Any]:
            """The shards to load: all, or those of some names, less those of a model that is not
            built."""
            shards = {
                os.path.join(found.where, shard.file): shard
                for shard in found.shards
                if patterns is None or any(fnmatch(shard.file, each) for each in patterns)
            }
            names = list(shards)
            if self._encoder_only_lm_prefixes is not None:
                names = weight_utils.filter_mm_encoder_only_safetensors_files(
                    names,
                    found.where,
                    HUGGING_FACE.index,
                    self._encoder_only_lm_prefixes,
                    weights_mapper=self._encoder_only_weights_mapper,
                )
            return [shards[name] for name in names]

    return ShardSurgeonLoader


def _settings(extra: Any) -> tuple[str | None, MtpPolicy, Any]:
    """(plan, --mtp, what is vLLM's own) of the extra config. Raises UsageError."""
    if not isinstance(extra, dict):
        return None, MtpPolicy.ROUTER_NORM, extra
    rest = dict(extra)
    plan, mtp = rest.pop("plan", None), rest.pop("mtp", MtpPolicy.ROUTER_NORM.value)
    if plan is not None and not isinstance(plan, str):
        raise UsageError(_EXTRA, f"plan is {plan!r}", f"add {_plan_words()}")
    known = [policy.value for policy in MtpPolicy]
    if mtp not in known:
        raise UsageError(_EXTRA, f"mtp is {mtp!r}", f"give one of {', '.join(known)}")
    return plan, MtpPolicy(mtp), rest


def _plan_words() -> str:
    return f'{_EXTRA} \'{{"plan": "plan.json"}}\''


def _experts_of(model: Any) -> dict[str, int]:
    """Module → the experts that vLLM built it with, copies not counted."""
    found = {}
    for name, module in model.named_modules():
        count = getattr(getattr(module, "moe_config", None), "num_logical_experts", None)
        if isinstance(count, int):
            found[name] = count
    return found
