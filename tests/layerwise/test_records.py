"""Records as conversations and texts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.records import Conversation, read_answer, read_record

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def messages(record: Any, field: str | None = None) -> list[dict[str, Any]]:
    found = read_record(record, "here", field)
    assert isinstance(found, Conversation)
    return found.messages


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT], "text": "no", "prompt": "no"},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"conversation": [USER, ASSISTANT], "messages": None},
        {"messages": [{**USER, "tool_calls": None, "name": None}, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
        {"prompt": "hi", "response": "ho"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "hi", "output": "ho"},
        {"instruction": "hi", "input": " ", "output": "ho"},
        {"question": "hi", "answer": "ho", "text": "no"},
        {"query": "hi", "answers": "ho"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER]},
    ],
)
def test_conversations_in_the_forms_that_datasets_use(record: dict[str, Any]) -> None:
    assert messages(record) == [USER, ASSISTANT]


def test_the_context_of_an_instruction_follows_it() -> None:
    found = messages({"instruction": "Sum up.", "input": "A story.", "output": "Short."})
    assert found[0] == {"role": "user", "content": "Sum up.\n\nA story."}


def test_a_system_prompt_comes_first() -> None:
    found = messages({"system": "Be brief.", "prompt": "hi", "response": "ho"})
    assert found == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]


def test_tools_and_the_arguments_of_calls_become_objects() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    record = {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": json.dumps([tool]),
    }
    found = read_record(record, "here")
    assert isinstance(found, Conversation)
    assert found.tools == [tool]
    assert found.messages[1]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("a line", "a line"),
        ({"text": "a", "meta": 1}, "a"),
        ({"content": "b"}, "b"),
        ({"prompt": "[1, 2]"}, "[1, 2]"),
        ({"text": ""}, ""),
    ],
)
def test_texts(record: Any, text: str) -> None:
    assert read_record(record, "here") == text


def test_a_named_field_is_the_only_one_looked_at() -> None:
    record = {"messages": [USER], "body": "text", "dialogue": [USER, ASSISTANT]}
    assert read_record(record, "here", "body") == "text"
    assert messages(record, "dialogue") == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("record", "field", "says"),
    [
        ({"id": 1, "body": "x"}, None, "its fields: id, body; name one with --field"),
        ({}, None, "its fields: none"),
        ({"messages": "hello"}, None, "field 'messages' holds str, not a list of messages"),
        ({"messages": [{"content": "x"}]}, None, "a message without a role"),
        ({"messages": ["x"]}, None, "field 'messages' holds list"),
        ({"prompt": "a", "completion": [1]}, None, "field 'completion' holds list"),
        ({"messages": []}, None, "its messages are empty"),
        ({"messages": None}, None, "its messages are null"),
        ({"text": None, "id": 7}, None, "its text is null"),
        (
            {"instruction": "", "output": "ho", "x": 1},
            None,
            "its instruction is empty, and nothing",
        ),
        ({"messages": [], "body": "hi"}, None, "its other fields: body; name one with --field"),
        ({"a": [], "messages": [USER]}, "a", "its a is empty"),
        ({"a": None}, "a", "its a is null"),
        ({"a": "x"}, "b", "has no field 'b'; its fields: a; name another with --field"),
        ({"a": 3}, "a", "field 'a' holds int"),
    ],
)
def test_records_of_unknown_form_are_refused(
    record: dict[str, Any], field: str | None, says: str
) -> None:
    with pytest.raises(DatasetError) as raised:
        read_record(record, "a.jsonl, record 3", field)
    assert str(raised.value).startswith("a.jsonl, record 3: ")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"prompt": "why", "completion": "so"}, "so"),
        (
            {"messages": [USER], "completion": "so", "reasoning": "hm"},
            "<think>\nhm\n</think>\n\nso",
        ),
        # What a server gave as its answer is one, without a token of its own.
        ({"prompt": "why", "completion": ""}, ""),
        ({"prompt": "why", "completion": [ASSISTANT]}, None),
        ({"completion": "so"}, None),
        ({"text": "so"}, None),
    ],
)
def test_answers_that_a_record_keeps(record: dict[str, Any], answer: str | None) -> None:
    found = read_answer(record, "record 1", is_chat=True)
    assert (found and found.answer) == answer
    if found is not None:
        assert isinstance(found.prompt, Conversation)
        assert [message["role"] for message in found.prompt.messages] == ["user"]
        plain = read_answer(record, "record 1", is_chat=False)
        assert plain is not None and (plain.prompt == "why") == ("prompt" in record)
