"""How engines read quantization lists: their own few lines, module by module, without an index.

After compressed-tensors 0.20, vLLM 0.32, transformers 5.23 and ModelOpt's wildcards. A section
and a module's name in, what the engine does with the module out.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Section = Mapping[str, Any]
Engine = Callable[[Section, str], object]


def match_name(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def compressed_tensors(section: Section, name: str) -> object:
    """The library: exact names first, then patterns in order, then the class."""
    if any(match_name(name, entry) for entry in section.get("ignore", [])):
        return None
    schemes = {t: key for key, g in section["config_groups"].items() for t in g["targets"]}
    by_name = [t for t in sorted(schemes, key=lambda t: ("re:" in t, t)) if match_name(name, t)]
    return schemes[by_name[0]] if by_name else schemes.get("Linear")


def vllm_compressed_tensors(section: Section, name: str) -> object:
    if any(match_name(name, entry) for entry in section.get("ignore", [])):
        return None
    schemes = {t: key for key, g in section["config_groups"].items() for t in g["targets"]}
    return next((key for t, key in schemes.items() if match_name(name, t)), schemes.get("Linear"))


def vllm_modelopt(section: Section, name: str) -> object:
    excluded = section["ignore"]
    if name in excluded or any(entry in name for entry in excluded):
        return False
    return not any(fnmatch.fnmatch(name, entry) for entry in excluded)


def modelopt(section: Section, name: str) -> object:
    return not any(fnmatch.fnmatch(name, entry) for entry in section["ignore"])


def modelopt_mixed(section: Section, name: str) -> object:
    return section["quantized_layers"].get(name)


def transformers(section: Section, name: str) -> object:
    """`should_convert_module`."""
    keys = section.get("modules_to_not_convert", section.get("llm_int8_skip_modules", []))
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return not any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in keys)


def vllm_fp8(section: Section, name: str) -> object:
    return name not in section["modules_to_not_convert"]


def vllm_awq(section: Section, name: str) -> object:
    return not any(entry in name for entry in section["modules_to_not_convert"])


def vllm_bitsandbytes(section: Section, name: str) -> object:
    skipped, parts = set(section["llm_int8_skip_modules"]), name.split(".")
    return not (
        skipped & set(parts) or skipped & {".".join(parts[: n + 1]) for n in range(len(parts))}
    )


def vllm_torchao(section: Section, name: str) -> object:
    return not any(f".{s}." in f".{name}." for s in section["modules_to_not_convert"])


def torchao(section: Section, name: str) -> object:
    config = section["module_fqn_to_config"]
    if name in config:
        return config[name]
    for pattern, value in config.items():
        if pattern.startswith("re:") and re.fullmatch(pattern[3:], name):
            return value
    return config.get("_default")


def gptq(section: Section, name: str) -> object:
    for pattern, overrides in section["dynamic"].items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return overrides
    return None


def vllm_gptq_block(section: Section, name: str) -> object:
    entries = [e for inner in section["modules_in_block_to_quantize"] for e in inner]
    return any(entry in name for entry in entries)


def auto_round(section: Section, name: str) -> object:
    config = section["extra_config"]
    if name in config:
        return config[name]
    for key in config:
        if name.endswith(f".{key}"):
            return config[key]
    for pattern, value in config.items():
        if any(char in set(r"*+?^$()[]{}|\\") for char in pattern):
            try:
                if re.search(pattern, name):
                    return value
            except re.error:
                continue
    return None


def vllm_quark(section: Section, name: str) -> object:
    if any(match_name(name, entry) for entry in section["exclude"]):
        return None
    return quark_layer(section, name)


def quark(section: Section, name: str) -> object:
    if any(match_name(name, e) or fnmatch.fnmatch(name, e) for e in section["exclude"]):
        return None
    return quark_layer(section, name)


def quark_layer(section: Section, name: str) -> object:
    for pattern, value in section["layer_quant_config"].items():
        if name == pattern or ("*" in pattern and fnmatch.fnmatch(name, pattern)):
            return value
    return "global"


def mlx(section: Section, name: str) -> object:
    return section.get(name)


LIST, MAP, NESTED, GROUPS = "list", "map", "nested", "groups"
# quant_method → (where its entries stand, as what, further members), who reads them.
SCHEMES: dict[str, tuple[list[tuple[str, str]], dict[str, Any], list[Engine]]] = {
    "compressed-tensors": (
        [("ignore", LIST), ("config_groups", GROUPS)],
        {},
        [compressed_tensors, vllm_compressed_tensors],
    ),
    "modelopt": ([("ignore", LIST)], {}, [vllm_modelopt, modelopt]),
    "modelopt_mixed": ([("quantized_layers", MAP)], {"ignore": []}, [modelopt_mixed]),
    "fp8": ([("modules_to_not_convert", LIST)], {}, [transformers, vllm_fp8]),
    "awq": ([("modules_to_not_convert", LIST)], {}, [transformers, vllm_awq]),
    "bitsandbytes": ([("llm_int8_skip_modules", LIST)], {}, [transformers, vllm_bitsandbytes]),
    "torchao": (
        [("modules_to_not_convert", LIST), ("module_fqn_to_config", MAP)],
        {},
        [transformers, vllm_torchao, torchao],
    ),
    "quanto": ([("modules_to_not_convert", LIST)], {}, [transformers]),
    "gptq": (
        [("dynamic", MAP), ("modules_in_block_to_quantize", NESTED)],
        {},
        [gptq, vllm_gptq_block],
    ),
    "auto-round": ([("extra_config", MAP)], {}, [auto_round]),
    "quark": ([("exclude", LIST), ("layer_quant_config", MAP)], {}, [vllm_quark, quark]),
    "mlx": ([("", MAP)], {}, [mlx]),
}


def section_of(method: str, entries: list[str], values: list[int]) -> dict[str, Any]:
    """A section that has the entries in every place of the scheme; values: what they say."""
    places, more, _ = SCHEMES[method]
    section: dict[str, Any] = {"quant_method": method, **more}
    mapped = {e: {"bits": v} for e, v in zip(entries, values, strict=True)}
    for key, how in places:
        if how == LIST:
            section[key] = list(dict.fromkeys(entries))
        elif how == NESTED:
            section[key] = [["self_attn.o_proj"], list(dict.fromkeys(entries))]
        elif how == GROUPS:
            named: dict[int, list[str]] = {}
            for entry, value in zip(entries, values, strict=True):
                named.setdefault(value, []).append(entry)
            named.setdefault(0, []).append("Linear")
            section[key] = {f"group_{v}": {"targets": t} for v, t in sorted(named.items())}
        elif key:
            section[key] = mapped
        else:
            section |= mapped
    return section


def differing(
    method: str, before: Section, after: Section, modules: Mapping[str, str]
) -> list[str]:
    """Engine and module where a section after the prune says something else than before it.

    modules: name in the source → name in the result, of every module that is left.
    """
    wrong = []
    for engine in SCHEMES[method][2]:
        for old, new in modules.items():
            try:
                was = engine(before, old)
            except re.error:
                break  # an engine that does not load the source either
            now = engine(after, new)
            if json.dumps(was, sort_keys=True) != json.dumps(now, sort_keys=True):
                wrong.append(f"{engine.__name__}: {old} was {was}, {new} is {now}")
    return wrong
