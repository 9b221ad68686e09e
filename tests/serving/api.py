"""Whether a vLLM has what the plugin calls, by its sources: `python -m tests.serving.api VLLM...`.

VLLM: the folder `vllm` of an unpacked wheel or an environment; nothing of it is imported, so that a
release is checked that has no CPU build. Exit status 1 where something is missing or takes other
arguments.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LOADERS = "model_executor/model_loader"
# File → function, or class and method → its arguments, as the plugin gives or takes them.
CALLED: dict[str, dict[str, str]] = {
    f"{LOADERS}/default_loader.py": {
        "DefaultModelLoader.__init__": "self load_config",
        "DefaultModelLoader._prepare_weights": "self model_name_or_path subfolder revision "
        "fall_back_to_pt allow_patterns_overrides",
        "DefaultModelLoader._get_weights_iterator": "self source",
        "DefaultModelLoader.get_all_weights": "self model_config model",
        "DefaultModelLoader.download_model": "self model_config",
        "DefaultModelLoader.load_weights": "self model model_config",
    },
    f"{LOADERS}/base_loader.py": {
        "BaseModelLoader.load_model": "self vllm_config model_config prefix",
    },
    f"{LOADERS}/__init__.py": {"register_model_loader": "load_format"},
    f"{LOADERS}/ep_weight_filter.py": {"should_skip_weight": "weight_name local_expert_ids"},
    f"{LOADERS}/weight_utils.py": {
        "enable_tqdm": "use_tqdm_on_load",
        "filter_mm_encoder_only_safetensors_files": "hf_weights_files hf_folder index_file "
        "language_model_prefixes weights_mapper",
    },
    "config/vllm.py": {"get_current_vllm_config_or_none": ""},
    "transformers_utils/config.py": {"_read_safetensors_metadata_in_dir": "local_dir"},
}
# File → names that are assigned or declared somewhere in it.
NAMED = {
    f"{LOADERS}/default_loader.py": "model_or_path subfolder prefix allow_patterns_overrides "
    "is_unused_weight counter_before_loading_weights local_expert_ids _encoder_only_lm_prefixes "
    "_encoder_only_weights_mapper",
    f"{LOADERS}/weight_utils.py": "_BAR_FORMAT tqdm",
    "config/load.py": "model_loader_extra_config use_tqdm_on_load load_format",
    "config/model.py": "hf_config hf_text_config runner_type",
    "model_executor/layers/fused_moe/config.py": "num_logical_experts",
    "model_executor/layers/fused_moe/routed_experts.py": "moe_config",
}


def missing(package: Path) -> Iterator[str]:
    """What the plugin uses and this vLLM has not, or has otherwise."""
    for file, functions in CALLED.items():
        has = dict(_functions(_parsed(package / file).body))
        for name, wanted in functions.items():
            if has.get(name) != wanted.split():
                yield f"{file}: {name}({wanted}): {has.get(name)}"
    for file, names in NAMED.items():
        has_names = set(_names(_parsed(package / file)))
        yield from (f"{file}: {name}" for name in names.split() if name not in has_names)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _functions(body: list[ast.stmt], outer: str = "") -> Iterator[tuple[str, list[str]]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            yield outer + node.name, [each.arg for each in arguments]


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def main() -> int:
    """Check each folder; return the exit status."""
    status = 0
    for package in map(Path, sys.argv[1:]):
        found = [*missing(package)]
        print(f"{package}: {len(found)} missing", *found, sep="\n  ")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
