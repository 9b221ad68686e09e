"""What counts as a loop, as thinking that never closes, as a bad call, and what must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.operations.answers import Kind, judged, loops
from shardsurgeon.storage.completions import Reply

PARAGRAPH = (
    "The committee met on Tuesday and decided, after a long debate, to move the harvest festival "
    "to the second week of October, when the weather is kinder and the school is closed.\n\n"
)
NATURAL = {
    "a laugh": "That is funny! " + "ha " * 40,
    "a long laugh": "A" + "ha" * 100,
    "prose": PARAGRAPH + "Nobody objected, and so the mayor went home early that night.",
    "a paragraph said twice": PARAGRAPH * 2,
    "a refrain, three times": ("Row, row, row your boat,\nGently down the stream.\n" * 3),
    "a numbered list": "\n".join(f"{n}. Check the value of the {n}th item." for n in range(1, 60)),
    "a list of one shape": "\n".join(
        f"- **{name}**: a city in Europe with a river and a cathedral."
        for name in ("Paris", "Rome", "Prague", "Vienna", "Cologne", "Porto", "Basel", "Lyon")
    ),
    "the head of a table": "| a | b |\n" + "| --- " * 30 + "|",
    "a table": "| n | n^2 |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(60)),
    "a table of zeros": "| x | y | z |\n|---|---|---|\n" + "| 0 | 0 | 0 |\n" * 12,
    "a rule": "Section\n" + "=" * 120,
    "code": "".join(
        f"def test_{name}():\n    assert add({n}, 1) == {n + 1}\n\n"
        for n, name in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"))
    ),
    "closing brackets": "{" * 60 + "\n" + "}\n" * 60,
    "a vector": f"zeros = [{'0, ' * 60}0]",
    "counting": " ".join(map(str, range(1, 400))),
    "a loop that was left": "again and again " * 100 + "But that is enough of it; the answer is 4.",
    "short": "yes yes yes yes yes",
    "nothing": "",
    "blank": "\n \n" * 500,
}
LOOPING = {
    "a word": "The answer is " + "very " * 200,
    "a letter": "Hm" + "m" * 400,
    "a sentence, cut in the middle": "Well. " + ("I think that it is so. " * 20)[:-8],
    "a paragraph": "First.\n" + PARAGRAPH * 4,
    "lines of a list": "Steps:\n" + "- Check the logs.\n- Restart the server.\n" * 10,
    "white space that differs": "".join(f"go on and on{' ' * (n % 3 + 1)}" for n in range(40)),
    "line ends after it": "again and again " * 40 + "\n\n  \n",
    "Chinese": "我想" + "这是一个很好的问题。" * 30,
    "emoji": "So happy " + "🎉🥳" * 150,
    "rows of a table": "| a | b |\n|---|---|\n" + "| one more | of the same |\n" * 15,
    "a long tail of a huge text": "x" * 70_000 + " and so it goes on" * 4000,
}


@pytest.mark.parametrize("name", NATURAL)
def test_a_natural_text_is_no_loop(name: str) -> None:
    assert not loops(NATURAL[name])


@pytest.mark.parametrize("name", LOOPING)
def test_a_loop_is_one(name: str) -> None:
    assert loops(LOOPING[name])


def has_period(text: str) -> bool:
    """The definition, looked for in every period, in time that is quadratic."""
    words = " ".join(text.split())
    for period in range(1, len(words) // 4 + 1):
        tail = period
        while tail < len(words) and words[-tail - 1] == words[-tail - 1 + period]:
            tail += 1
        if tail >= max(4 * period, 256):
            return True
    return False


@given(st.text("ab ", max_size=40), st.text("ab c", min_size=1, max_size=60), st.integers(0, 90))
def test_loops_are_what_the_definition_says(before: str, unit: str, times: int) -> None:
    for text in (before + unit * times, before + unit * times + unit[: len(unit) // 2]):
        assert loops(text) == has_period(text)


def test_four_times_and_256_characters_are_where_a_loop_begins() -> None:
    unit = "abcdefghij" * 6 + "wxyz"  # 64 characters
    assert loops("?" + unit * 4) and not loops("?" + (unit * 4)[1:])
    longer = unit + "!"
    assert loops("?" + longer * 4) and not loops("?" + (longer * 4)[1:])


# Whole answers. The kinds that each is of; tools are given where `calls` says so.

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
LOOP = "and so on " * 50
ANSWERS: dict[str, tuple[Reply, set[Kind]]] = {
    "a good one": (Reply("Paris.", finish_reason="stop"), set()),
    "cut": (Reply("Paris is a", finish_reason="length"), {Kind.CUT}),
    "a loop is cut as well": (Reply(LOOP, finish_reason="length"), {Kind.LOOP, Kind.CUT}),
    "nothing": (Reply("", finish_reason="stop"), {Kind.EMPTY}),
    "white space": (Reply(" \n\n", finish_reason="stop"), {Kind.EMPTY}),
    "thinking and an answer": (Reply("<think>Hm.</think>\n\nParis."), set()),
    "thinking and nothing": (Reply("<think>Hm.</think>\n"), {Kind.EMPTY}),
    "open thinking": (
        Reply("<think>Hm, or is it", finish_reason="length"),
        {Kind.UNCLOSED, Kind.CUT},
    ),
    "open thinking that stops": (Reply("\n<think>\nParis."), {Kind.UNCLOSED}),
    "of another family": (Reply("[THINK]Paris?"), {Kind.UNCLOSED}),
    "a tag in the prose": (Reply("Write <think> before the thoughts."), set()),
    "split by the server": (Reply("Paris.", "Hm, France.", finish_reason="stop"), set()),
    "split and open": (Reply("", "Hm, or", finish_reason="length"), {Kind.UNCLOSED, Kind.CUT}),
    "split, open and looping": (
        Reply("", LOOP, finish_reason="length"),
        {Kind.UNCLOSED, Kind.CUT, Kind.LOOP},
    ),
    "split and nothing said": (Reply("", "Hm.", finish_reason="stop"), {Kind.EMPTY}),
    "thoughts that circle, and an answer": (Reply("Paris.", LOOP), set()),
    "a call": (Reply("", tool_calls=(("weather", '{"at": "Rome"}'),)), set()),
    "thinking and a call": (Reply("", "Hm.", (("weather", "{}"),), "tool_calls"), set()),
    "a call of no tool": (Reply("", tool_calls=(("wether", "{}"),)), {Kind.BAD_CALL}),
    "arguments that are cut": (
        Reply("", tool_calls=(("weather", '{"at": "Ro'),), finish_reason="length"),
        {Kind.BAD_CALL, Kind.CUT},
    ),
    "arguments that are a list": (Reply("", tool_calls=(("weather", "[1]"),)), {Kind.BAD_CALL}),
    "a good call and a bad one": (
        Reply("", tool_calls=(("weather", "{}"), ("weather", ""))),
        {Kind.BAD_CALL},
    ),
    "a call left in the text": (
        Reply('<tool_call>\n{"name": "weather"}\n</tool_call>'),
        {Kind.BAD_CALL},
    ),
    "one of Mistral's": (Reply('[TOOL_CALLS]weather{"at": "Rome"}'), {Kind.BAD_CALL}),
    "arguments that loop": (
        Reply("", tool_calls=(("weather", '{"at": "' + "Rome, " * 90),)),
        {Kind.BAD_CALL, Kind.LOOP},
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_of_these_kinds(name: str) -> None:
    reply, kinds = ANSWERS[name]
    assert judged(reply, TOOLS) == kinds
    assert judged(reply, None) == kinds - {Kind.BAD_CALL}


def test_tools_are_known_bare_as_well() -> None:
    call = Reply("", tool_calls=(("weather", "{}"),))
    assert judged(call, [{"name": "weather"}, "odd"]) == set()
