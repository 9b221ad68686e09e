"""Which parts of a quantization section name modules, and how the engines read the names. Pure.

The facts are those of compressed-tensors 0.20, vLLM 0.32 and transformers 5.23. Matching itself is
written twice, in `pruning.module_names` and `verification.module_names`, so that a slip in
the one is found by the other.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shardsurgeon.errors import ConfigError
from shardsurgeon.storage.patterns import QuickPattern

JsonPath = tuple[str | int, ...]


class Reading(Enum):
    """How an entry is held against a module's name.

    NAME: equal. TAGGED: a regular expression at the beginning behind `re:`, else equal. FULL: as
    TAGGED, to the end of the name. GLOB: fnmatch. WILDCARD: as TAGGED, else fnmatch. SUBSTRING:
    anywhere in it. ANYWHERE: as SUBSTRING, or fnmatch. COMPONENT: anywhere between two dots. PART:
    one part between dots, or the name's beginning up to a dot. MODULE: transformers' way, a regular
    expression from the beginning to a dot or the end, or the end of the name as text. DYNAMIC:
    GPTQ's, a regular expression at the beginning behind `+:` or `-:`. SEARCH: AutoRound's, equal,
    or behind a dot at the end, or, with a character special to them, a regular expression anywhere.
    """

    NAME = "name"
    TAGGED = "tagged"
    FULL = "full"
    GLOB = "glob"
    WILDCARD = "wildcard"
    SUBSTRING = "substring"
    ANYWHERE = "anywhere"
    COMPONENT = "component"
    PART = "part"
    MODULE = "module"
    DYNAMIC = "dynamic"
    SEARCH = "search"


# Of an object that is read so, the first key that means a module counts, and no later one.
FIRST_COUNTS = frozenset({Reading.DYNAMIC, Reading.GLOB, Reading.TAGGED})
REGEX_TAG = "re:"
DYNAMIC_TAGS = ("+:", "-:")
SEARCH_CHARACTERS = frozenset(r"*+?^$()[]{}|\\")
# Behind a key of transformers' lists.
MODULE_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"

_DEFAULT = (Reading.WILDCARD,)
_MODELOPT = (Reading.GLOB, Reading.ANYWHERE)
_SKIPPED = (Reading.MODULE,)
# Key of a list → beginning of the quant_method ("" for any other) → every way it is read.
_LISTS: Mapping[str, Mapping[str, tuple[Reading, ...]]] = {
    "ignore": {"compressed-tensors": (Reading.TAGGED,), "modelopt": _MODELOPT},
    "targets": {"": (Reading.TAGGED,)},
    "exclude": {"": (Reading.TAGGED, Reading.WILDCARD)},
    "exclude_modules": {"": _MODELOPT},
    "ignored_layers": {"modelopt": _MODELOPT, "mxfp8": _MODELOPT, "": (Reading.NAME,)},
    "modules_to_not_convert": {
        "awq": (Reading.SUBSTRING, *_SKIPPED),
        "gptq": (Reading.SUBSTRING, *_SKIPPED),
        "moe_wna16": (Reading.SUBSTRING, *_SKIPPED),
        "fp8": (Reading.NAME, *_SKIPPED),
        "torchao": (Reading.COMPONENT, *_SKIPPED),
        "": _SKIPPED,
    },
    "llm_int8_skip_modules": {"": (Reading.PART, *_SKIPPED)},
    "skip_modules": {"": _SKIPPED},
    "linear_weights_not_to_quantize": {"": _SKIPPED},
    "modules_in_block_to_quantize": {"": (Reading.SUBSTRING, Reading.COMPONENT)},
}
# Key of an object whose keys name modules → every way these are read.
_MAPS: Mapping[str, tuple[Reading, ...]] = {
    "dynamic": (Reading.DYNAMIC,),
    "extra_config": (Reading.SEARCH,),
    "quantized_layers": (Reading.NAME,),
    "layer_quant_config": (Reading.GLOB,),
    "module_fqn_to_config": (Reading.FULL,),
    "fqn_to_config": (Reading.FULL,),
}
_GROUPS = "config_groups"
# Side files that do not say which tool wrote them.
_TOOLS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


@dataclass(frozen=True, slots=True)
class ModuleList:
    """One list of module names, patterns among them, as a section has it.

    path: where it stands; readings: every way it is read, each of which must keep its meaning;
    entries: the texts in order; values: of an object, what each of its keys stands for, as JSON;
    None of a list, whose entries all say the same. is_flat: whether all there is are the entries.
    """

    path: JsonPath
    readings: tuple[Reading, ...]
    entries: tuple[str, ...]
    values: tuple[str, ...] | None
    is_flat: bool = True


def module_lists(
    section: Mapping[str, Any], path: JsonPath = (), method: str = ""
) -> Iterator[ModuleList]:
    """Every list of module names in a quantization section.

    path: that of the section itself; method: the quant_method where the section says none. The
    groups of compressed-tensors are given twice: the targets of each, and all targets in order
    with the groups they stand for, at the path of `config_groups`.
    """
    method = str(section.get("quant_method") or method)
    named = {key: value for key, value in section.items() if "." in key}
    if named:
        yield _map(path, _DEFAULT, named)
    for key, value in section.items():
        inside = (*path, key)
        if isinstance(value, Mapping):
            if key in _MAPS:
                yield _map(inside, _MAPS[key], value)
            elif key not in named:
                yield from module_lists(value, inside, method)
            if key == _GROUPS:
                yield _groups(inside, value)
        elif isinstance(value, list):
            texts = tuple(_texts(value))
            if texts:
                flat = all(isinstance(item, str) for item in value)
                yield ModuleList(inside, _readings(key, method), texts, None, flat)
            for position, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from module_lists(item, (*inside, position), method)


def tool_of(name: str) -> str:
    """The quant_method of the tool that writes a side file of this name; "" where it says so."""
    return _TOOLS.get(name.rpartition("/")[2], "")


def compiled(pattern: str, entry: str, where: str) -> QuickPattern:
    """A pattern of a downloaded list. Raises ConfigError, naming the entry, where it is none or
    could take for ever."""
    try:
        return QuickPattern(pattern, where)
    except ConfigError as error:
        shown = entry if len(entry) <= 200 else f"{entry[:197]}..."
        problem = f"quantization entry {shown!r}: {error.problem}"
        raise ConfigError(where, problem, "correct it, or remove it") from error


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression at all."""
    try:
        with warnings.catch_warnings():  # of what a later Python reads in another way
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _readings(key: str, method: str) -> tuple[Reading, ...]:
    by_method = _LISTS.get(key, {})
    found = (how for name, how in by_method.items() if name and name in method.lower())
    return next(found, by_method.get("", _DEFAULT))


def _map(path: JsonPath, readings: tuple[Reading, ...], entries: Mapping[str, Any]) -> ModuleList:
    # The sign of GPTQ's patterns is part of what they say.
    signs = (key[:2] if Reading.DYNAMIC in readings else "" for key in entries)
    values = (json.dumps(value, sort_keys=True) for value in entries.values())
    said = (f"{sign}{value}" for sign, value in zip(signs, values, strict=True))
    return ModuleList(path, readings, tuple(entries), tuple(said))


def _groups(path: JsonPath, groups: Mapping[str, Any]) -> ModuleList:
    found: dict[str, str] = {}
    for name, group in groups.items():
        if isinstance(group, Mapping) and isinstance(group.get("targets"), list):
            found |= dict.fromkeys(_texts(group["targets"]), name)
    return ModuleList(path, (Reading.TAGGED,), tuple(found), tuple(found.values()))


def _texts(items: list[Any]) -> Iterator[str]:
    for item in items:
        if type(item) is str:
            yield item
        elif isinstance(item, list):
            yield from _texts(item)
