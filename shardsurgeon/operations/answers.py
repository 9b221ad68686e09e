"""What is wrong with a model's answer: what teacher forcing cannot see.

A loop. The answer's last text is taken (the answer, else the arguments of its last tool call, else
its thinking), white space counts as one space each, none at the end. It loops where its tail has a
period of p characters (every character of the tail equals the one p before it) and is at least
4 p and at least 256 characters long. So a unit stands there four times or more, be it a letter or
a paragraph, and the text ends within it. Lists, tables and code repeat with numbers, names and
columns that differ; "ha ha ha", a rule of 80 dashes and the last chorus of a song are too short.
What loops and then goes on, or loops with a number that counts up, is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any

from shardsurgeon.storage.completions import Reply

_PERIODS = 4
_SHORTEST = 256
# Of a longer text the end is looked at; periods of up to a quarter of it are found.
_LONGEST = 1 << 16

# What an answer that thinks aloud begins with, and what ends that.
_THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|think|>", "<|/think|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis", "<|channel|>final"),
)
# What models write around tool calls, and what a server's parser should have taken out.
_MARKUP = (
    *("<tool_call>", "</tool_call>", "<tool_calls>", "<|tool_call", "<function=", "<|python_tag|>"),
    *("[TOOL_CALLS]", "<minimax:tool_call>", "<|channel|>commentary to="),
    # DeepSeek's, with a wide bar and a low block for a space.
    *("<\uff5ctool\u2581call", "<\uff5cDSML\uff5c"),
)


class Kind(StrEnum):
    """What can be wrong with an answer; one can be several of these."""

    LOOP = "loops"
    CUT = "cut by length"
    EMPTY = "empty"
    UNCLOSED = "thinking unclosed"
    BAD_CALL = "bad tool calls"


def judged(reply: Reply, tools: Sequence[Any] | None) -> frozenset[Kind]:
    """What is wrong with a reply to a prompt. tools: those that the prompt brought along."""
    thinking, said = _split(reply)
    unclosed = thinking is not None and said is None
    found = {
        Kind.LOOP: loops(_last_text(reply)),
        Kind.CUT: reply.finish_reason == "length",
        Kind.UNCLOSED: unclosed,
        Kind.EMPTY: not unclosed and not (said or "").strip() and not reply.tool_calls,
        Kind.BAD_CALL: bool(tools) and has_bad_call(reply, _names(tools or ())),
    }
    return frozenset(kind for kind, is_so in found.items() if is_so)


def loops(text: str) -> bool:
    """Whether a text ends in a loop, as this module's docstring defines it."""
    words = " ".join(text[-4 * _LONGEST :].split())[-_LONGEST:]
    if len(words) < _SHORTEST:
        return False
    # Backwards the tail is a beginning, and a period a place where that begins again.
    return any(
        place + same >= max(_SHORTEST, _PERIODS * place)
        for place, same in enumerate(_same_beginnings(words[::-1]))
        if place
    )


def _same_beginnings(text: str) -> list[int]:
    """For each place of a text, how many characters from there on are those of its beginning.

    In time that is linear, by what earlier places have compared (the Z function).
    """
    same = [0] * len(text)
    begin = end = 0  # of the same beginning that reaches furthest
    for place in range(1, len(text)):
        reach = min(end - place, same[place - begin]) if place < end else 0
        while place + reach < len(text) and text[reach] == text[place + reach]:
            reach += 1
        same[place] = reach
        if place + reach > end:
            begin, end = place, place + reach
    return same


def has_bad_call(reply: Reply, names: Collection[str]) -> bool:
    """Whether a call names no tool, has arguments that are no JSON object, or was left as text."""
    _, said = _split(reply)
    if any(mark in (said or "") for mark in _MARKUP):
        return True
    return any(name not in names or not _is_object(text) for name, text in reply.tool_calls)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _names(tools: Sequence[Any]) -> set[str]:
    """What tools are called, be they wrapped as OpenAI does or bare."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return {str(each.get("name")) for each in functions if isinstance(each, dict)}


def _split(reply: Reply) -> tuple[str | None, str | None]:
    """The thinking and what is said after it, None for what is not there.

    Where a server splits them, thinking that it cut by length and that nothing follows never
    closed. Where it does not, thinking is what an answer begins with.
    """
    text = reply.text
    if reply.reasoning.strip():
        open_ended = not text.strip() and not reply.tool_calls and reply.finish_reason == "length"
        return reply.reasoning, None if open_ended else text
    begun = text.lstrip()
    for opening, closing in _THINKING:
        if begun.startswith(opening):
            thinking, closed, said = begun.removeprefix(opening).rpartition(closing)
            return (thinking, said) if closed else (said, None)
    return None, text


def _last_text(reply: Reply) -> str:
    if reply.text.strip():
        return reply.text
    return reply.tool_calls[-1][1] if reply.tool_calls else reply.reasoning
