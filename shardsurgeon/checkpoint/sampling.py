"""Sampling settings, and what they are called in generation_config.json.

An engine reads its defaults there: vLLM takes temperature, top_p, top_k, min_p,
repetition_penalty and max_new_tokens, transformers these and do_sample, without which it uses none
of the first four. Nothing is opened here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from shardsurgeon.errors import UsageError
from shardsurgeon.storage.formats.strict_json import as_number

GENERATION_CONFIG_NAME = "generation_config.json"
OPTION = "--sampling"
# Whether anything is drawn at all.
DO_SAMPLE = "do_sample"


@dataclass(frozen=True, slots=True)
class Setting:
    """kind: what its numbers are; is_sound: whether servers take a finite one; wanted: in words."""

    kind: type[int] | type[float]
    is_sound: Callable[[float], bool]
    wanted: str


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "temperature": Setting(float, lambda x: 0 <= x <= 100, "0 or more"),
        "top_p": Setting(float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "top_k": Setting(int, lambda x: x == -1 or x > 0, "1 or more, or -1 for all tokens"),
        "min_p": Setting(float, lambda x: 0 <= x <= 1, "between 0 and 1"),
        "repetition_penalty": Setting(float, lambda x: 0 < x <= 100, "above 0, and 1 for none"),
        "max_tokens": Setting(int, lambda x: x > 0, "1 or more"),
    }
)
# max_tokens has another name there.
_KEYS = {"max_tokens": "max_new_tokens"}
# Where there is no generation_config.json engines take these, by which an answer ends, from the
# config; where there is one, they do not.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = {_KEYS.get(name, name): name for name in SETTINGS}


def number_of(name: str, value: object) -> int | float:
    """A setting's number, of its kind.

    Raises UsageError, naming --sampling, for a name that is no setting's and a value that is no
    such number. Whether a server takes the number, `SETTINGS` says.
    """
    if name not in SETTINGS:
        problem = f"'{str(name)[:40]}' is no setting"
        raise UsageError(OPTION, problem, f"choose {', '.join(SETTINGS)}")
    kind = SETTINGS[name].kind
    number = as_number(value)
    if number is None or not math.isfinite(number) or kind(number) != number:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(OPTION, f"{name} is {str(value)[:40]}", f"give {wanted}")
    return kind(number)


def generation_members(settings: Mapping[str, object]) -> dict[str, Any]:
    """What settings are in generation_config.json, in their order.

    Raises UsageError, naming --sampling, for names and numbers that cannot be.
    """
    members: dict[str, Any] = {}
    for name, value in settings.items():
        number = number_of(name, value)
        if not SETTINGS[name].is_sound(number):
            raise UsageError(OPTION, f"{name} is {number:g}", f"give {SETTINGS[name].wanted}")
        # transformers refuses -1; 0 is all tokens to both.
        all_tokens = name == "top_k" and number == -1
        members[_KEYS.get(name, name)] = 0 if all_tokens else number
    return members


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json must have that is made where there was none: the token ids
    that config.json says, at its top or of its text model."""
    text = config.get("text_config")
    places = [config, *([text] if isinstance(text, Mapping) else [])]
    said = {key: [at[key] for at in places if _are_ids(at.get(key))] for key in _TOKEN_IDS}
    return {key: values[0] for key, values in said.items() if values}


def _are_ids(value: object) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(type(one) is int for one in each)


def settings_of(members: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `generation_members` gives these for; do_sample is none. Raises KeyError
    for a member that is none of theirs."""
    return {
        _NAMES[key]: -1 if (key, value) == ("top_k", 0) else value
        for key, value in members.items()
        if key != DO_SAMPLE
    }


def are_members(value: Mapping[str, Any]) -> bool:
    """Whether a record can say these were written: settings in range, and at most do_sample."""
    try:
        said = generation_members(settings_of(value))
    except (KeyError, UsageError):
        return False
    rest = {key: each for key, each in value.items() if key != DO_SAMPLE}
    sampled = value.get(DO_SAMPLE, True)
    # As JSON: 1, 1.0 and true are different there.
    return bool(said) and isinstance(sampled, bool) and json.dumps(said) == json.dumps(rest)


def listed(members: Mapping[str, Any]) -> str:
    """Members in a sentence: `min_p 0.05, do_sample true`."""
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in members.items())


def as_option(settings: Mapping[str, Any]) -> str:
    """The value of --sampling: `min_p=0.05,top_k=20`."""
    return ",".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
