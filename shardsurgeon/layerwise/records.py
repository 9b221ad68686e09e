"""Records of datasets as conversations or texts, whatever their fields are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.datasets import Record

Message: TypeAlias = dict[str, Any]

_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "answers"),
    ("problem", "solution"),
    ("input", "output"),
)
_TEXTS = ("text", "content", "code", "raw_content", "prompt")
# The better one of two answers: messages, or the whole conversation as one text.
_PREFERENCES = ("chosen",)
# The text that an instruction is about; it is added to the instruction.
_CONTEXT = ("input", "context")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIELD = "--field"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them, and the tools that a model may call, if any."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answer, token by token what it said, and what it was asked.

    prompt: messages, or a text that the answer goes on with.
    """

    prompt: Conversation | str
    answer: str


def read_answer(record: Record, where: str, *, is_chat: bool) -> Answered | None:
    """The answer of a record that has a `completion`, and `messages` or a `prompt` before it.

    A `reasoning` before the completion is part of the answer. is_chat: whether a prompt that is a
    text is the user's message. None where the record holds none; an empty one is an answer without
    a token. Raises DatasetError where the messages have an unknown form.
    """
    if not isinstance(record, dict) or not isinstance(record.get("completion"), str):
        return None
    answer, thought = record["completion"], record.get("reasoning")
    if isinstance(thought, str) and thought:
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"
    asked = record.get("messages") or record.get("prompt")
    if not asked:
        return None
    if isinstance(asked, str) and not _are_messages(_unpacked(asked)):
        prompt = {"role": "user", "content": asked}
        return Answered(Conversation([prompt], _tools(record)) if is_chat else asked, answer)
    name = "messages" if record.get("messages") else "prompt"
    return Answered(Conversation(_messages(asked, name, where), _tools(record)), answer)


def read_record(record: Record, where: str, field: str | None = None) -> Conversation | str:
    """The conversation or the text of a record.

    where: the record, as error messages name it; field: the only field to look at. Raises
    DatasetError where no known field exists, where those that exist are empty, or where a value
    has an unknown form. A text without a letter is a text.
    """
    if isinstance(record, str):
        return record
    if field is not None:
        return _one_field(record, field, where)
    for name in _CONVERSATIONS:
        if record.get(name):
            return Conversation(_messages(record[name], name, where), _tools(record))
    for first, second in _PAIRS:
        if record.get(first) and isinstance(record.get(second), str | list):
            return Conversation(_pair(record, first, second, where), _tools(record))
    for name in (*_PREFERENCES, *_TEXTS):
        if _are_messages(_unpacked(record.get(name))):
            return Conversation(_messages(record[name], name, where), _tools(record))
        if isinstance(record.get(name), str):
            return str(record[name])
    raise _unknown(record, where)


def _unknown(record: dict[str, Any], where: str) -> DatasetError:
    """What is the matter with a record that holds neither a conversation nor a text."""
    pairs = [name for pair in _PAIRS for name in pair]
    known = [name for name in (*_CONVERSATIONS, *pairs, *_PREFERENCES, *_TEXTS) if name in record]
    empty = next((name for name in known if _is_empty(record[name])), None)
    others = [
        str(name) for name, value in record.items() if isinstance(value, str | list) and value
    ]
    if empty is None:
        fields = ", ".join(map(str, record)) or "none"
        problem = "has no field that is known to hold a conversation or a text"
        return DatasetError(where, f"{problem}; its fields: {fields}", f"name one with {_FIELD}")
    if not others:
        return DatasetError(where, _emptiness(empty, record[empty]))
    problem = f"{_emptiness(empty, record[empty])}, and nothing else is known to hold a"
    problem += f" conversation or a text; its other fields: {', '.join(others)}"
    return DatasetError(where, problem, f"name one with {_FIELD}")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _emptiness(name: str, value: Any) -> str:
    """`its messages are empty`, `its text is null`."""
    verb = "are" if name.endswith("s") else "is"
    return f"its {name} {verb} {'null' if value is None else 'empty'}"


def _one_field(record: dict[str, Any], field: str, where: str) -> Conversation | str:
    if field not in record:
        fields = ", ".join(map(str, record)) or "none"
        problem = f"has no field '{field}'; its fields: {fields}"
        raise DatasetError(where, problem, f"name another with {_FIELD}")
    value = record[field]
    if _is_empty(value) and value != "":
        raise DatasetError(where, _emptiness(field, value))
    if _are_messages(_unpacked(value)):
        return Conversation(_messages(value, field, where), _tools(record))
    if isinstance(value, str):
        return value
    kind = type(value).__name__
    raise DatasetError(where, f"field '{field}' holds {kind}, no text and no messages")


def _pair(record: dict[str, Any], first: str, second: str, where: str) -> list[Message]:
    """A question and its answer as messages; either may be a list of messages already."""
    asked = _messages_or_text(record[first], "user", first, where)
    answered = _messages_or_text(record[second], "assistant", second, where)
    context = next(
        (record[name] for name in _CONTEXT if name not in (first, second) and name in record), ""
    )
    if isinstance(context, str) and context.strip() and len(asked) == 1:
        asked = [{**asked[0], "content": f"{asked[0]['content']}\n\n{context}"}]
    system = record.get("system") or record.get("system_prompt")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*opening, *asked, *answered]


def _messages_or_text(value: Any, role: str, name: str, where: str) -> list[Message]:
    if _are_messages(_unpacked(value)):
        return _messages(value, name, where)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    kind = type(value).__name__
    raise DatasetError(where, f"field '{name}' holds {kind}, no text and no messages")


def _messages(value: Any, name: str, where: str) -> list[Message]:
    """Messages with `role` and `content`, from these or from `from` and `value`."""
    listed = _unpacked(value)
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        kind = type(listed).__name__
        raise DatasetError(where, f"field '{name}' holds {kind}, not a list of messages")
    return [_message(item, name, where) for item in listed]


def _message(item: dict[str, Any], name: str, where: str) -> Message:
    role = item.get("role") or item.get("from")
    if not isinstance(role, str):
        raise DatasetError(where, f"field '{name}' holds a message without a role")
    # In a table every message has every field; those that it lacks are None.
    kept = {key: part for key, part in item.items() if part is not None}
    content = kept.pop("content", kept.pop("value", ""))
    kept.pop("from", None)
    message: Message = {**kept, "role": _ROLES.get(role, role), "content": _plain(content)}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _plain(content: Any) -> Any:
    """A content that consists of text parts as one text: few templates accept parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return content


def _tool_call(call: Any) -> Any:
    """A call with its arguments as an object, which templates expect, not as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = _unpacked(record.get("tools"))
    return tools if isinstance(tools, list) and tools else None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )


def _unpacked(value: Any) -> Any:
    """A list of objects that a dataset stores as JSON text, parsed; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            unpacked = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(unpacked, list) and all(isinstance(item, dict) for item in unpacked):
            return unpacked
    return value
