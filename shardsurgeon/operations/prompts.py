"""Prompts of datasets, and how a server is to sample its answers to them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shardsurgeon.checkpoint.sampling import OPTION as SAMPLING
from shardsurgeon.checkpoint.sampling import SETTINGS, number_of
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.datasets import DatasetPart, open_dataset, parse_spec
from shardsurgeon.layerwise.records import Conversation, Message, read_record
from shardsurgeon.layerwise.samples import record_order
from shardsurgeon.storage.phases import phase

DEFAULT_ANSWERS = 2000
OPTION = "--prompts"
BASE = "base"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled. Every value is sent, so that no server's defaults count.

    top_k -1, top_p 1, min_p 0 and repetition_penalty 1 leave the model's own distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        """Raises UsageError for a value that no server takes."""
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if not (setting.is_sound(value) and math.isfinite(value)):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(option, f"{value:g} cannot be", f"give {setting.wanted}")

    def with_values(self, values: Mapping[str, Any]) -> Sampling:
        """The same with other values. Raises UsageError, naming --sampling."""
        given: dict[str, Any] = {name: number_of(name, value) for name, value in values.items()}
        return replace(self, **given)

    def body(self) -> dict[str, Any]:
        """Its members of a request."""
        body = asdict(self)
        if self.repetition_penalty != 1:
            body["repeat_penalty"] = self.repetition_penalty  # as llama.cpp calls it
        return body


def settings_of(base: Sampling, others: Sequence[Mapping[str, Any]]) -> dict[str, Sampling]:
    """Name → setting: `base`, and the others by what they change. Raises UsageError."""
    settings = {BASE: base}
    for values in others:
        setting = base.with_values(values)
        name = ",".join(f"{key}={value:g}" for key, value in values.items())
        if setting in settings.values():
            raise UsageError(
                SAMPLING, f"'{name}' changes nothing, or is given twice", "leave it out"
            )
        settings[name] = setting
    return settings


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked. messages, tools: as servers take them; source, record: where it is from;
    text: what the record held where that was no conversation.
    """

    messages: list[Message]
    tools: list[Any] | None
    source: str
    record: int
    text: str | None = None


def draw_prompts(spec: str, samples: int | None, seed: int, field: str | None) -> list[Prompt]:
    """One prompt for each answer, the records of a dataset in an order by the seed.

    A dataset with fewer records than answers gives each of them several times. samples, field: as
    for calibration, but for the default. Raises UsageError for a spec that is none, DatasetError
    for what is missing or holds no prompt.
    """
    try:
        parts = parse_spec(spec, samples, DEFAULT_ANSWERS)
    except UsageError as error:
        error.reword(OPTION, error.problem, error.remedy)
        raise
    with phase("reading prompts", sum(part.count or 0 for part in parts)) as at:
        prompts = []
        for part in parts:
            for prompt in _of_part(part, seed, field):
                prompts.append(prompt)
                at.advance()
    return prompts


def _of_part(part: DatasetPart, seed: int, field: str | None) -> Iterator[Prompt]:
    dataset = open_dataset(part)
    order = record_order(len(dataset.records), seed, dataset.source).tolist()
    found: dict[int, Prompt] = {}
    for number in range(part.count or 0):
        index = order[number % len(order)]
        if index not in found:
            where = f"{part.words}, record {index:,}"
            content = read_record(dataset.records[index], where, field)
            found[index] = _prompt(content, dataset.source, index, where)
        yield found[index]


def _prompt(content: Conversation | str, source: str, record: int, where: str) -> Prompt:
    """A conversation without the answer that it ends with, or a text as what a user says."""
    if isinstance(content, str):
        if not content.strip():
            raise DatasetError(where, "its text is empty", "leave such records out")
        return Prompt([{"role": "user", "content": content}], None, source, record, content)
    messages = list(content.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] in ("user", "tool") for message in messages):
        problem = "holds nothing that a user says before the last answer"
        raise DatasetError(where, problem, "leave such records out")
    return Prompt([_as_sent(message) for message in messages], content.tools, source, record)


def _as_sent(message: Message) -> Message:
    """A message whose tool calls have their arguments as text, as servers take them."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_as_sent(call) for call in calls]}


def _call_as_sent(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def prompts_sha256(prompts: Sequence[Prompt], seed: int) -> str:
    """SHA-256 of all prompts in their order and of the seed, in hex."""
    digest = hashlib.sha256(f"{seed}\n".encode())
    for prompt in prompts:
        digest.update(json.dumps([prompt.messages, prompt.tools], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def require_distinct(prompts: Sequence[Prompt], settings: Mapping[str, Sampling]) -> None:
    """Raise UsageError where one prompt is to be answered twice without sampling: by the same."""
    records = len({(prompt.source, prompt.record) for prompt in prompts})
    cold = next((name for name, setting in settings.items() if setting.temperature == 0), None)
    if cold is not None and records < len(prompts):
        problem = f"{len(prompts):,} answers to {records:,} prompts, and at temperature 0 a prompt"
        raise UsageError("--samples", f"{problem} has one answer", f"ask for at most {records}")
