"""One entry of a quantization list: which expert of which layer does it name?

Entries are module names (`model.layers.1.mlp.experts.5.up_proj`), fnmatch patterns (ModelOpt,
Quark) or regular expressions (`re:` of compressed-tensors, `-:` and `+:` of GPTQModel, bare ones
of AutoRound). They are read as text: a pattern that came with a download is never run.
`pruning.config_edits` and `verification.config_check` walk the lists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardsurgeon.errors import ConfigError

_DOT = r"(?:\\*\.|\[\.\])"
# No model has ids of ten digits, and a longer run of digits is not read as a number.
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
# A word of its own, so not `shared_experts`; the b of a `\b` before it does not count as a letter.
_WORD = r"(?:(?<!\w)|(?<=\\b))experts(?!\w)"
_EXPERTS = re.compile(_WORD)
_ANY_EXPERT = re.compile(rf"{_WORD}{_DOT}(?P<expert>[0-9]+)")
# A number ends at a dot, at the end, or where a regular expression says so.
_EXPERT = re.compile(rf"{_WORD}{_DOT}(?P<expert>{_NUMBER})(?=\Z|{_DOT}(?![+?{{])|\\[bZ]|\$|\()")
_LAYER = re.compile(
    rf"(?<![A-Za-z0-9_])(?:(?P<mtp>mtp{_DOT})?(?:layers|blocks){_DOT}(?P<number>{_NUMBER})"
    rf"|mtp{_DOT}(?P<own>{_NUMBER}))(?={_DOT})"
)
_OPEN_END = re.compile(rf"{_DOT}\*")
_REGEX_KEYS = frozenset(["dynamic", "extra_config"])
_REGEX_MARKS = ("re:", "-:", "+:")
# Patterns for any number, and the numbers of layers.
_NOT_AN_EXPERT = re.compile(
    rf"(?:layers|blocks){_DOT}{_NUMBER}|\\d(?:\{{1,[0-9]*\}})?|\[0-9\](?:\{{1,[0-9]*\}})?|\\[A-Za-z]"
)
_LONE_DIGIT = re.compile(r"(?<![A-Za-z0-9_])[0-9]")
_DIGITS = re.compile(
    rf"{_WORD}{_DOT}(?:\((?:\?:)?)?(?:\\d|\[0-9\])(?P<times>\{{1,(?P<most>[0-9]?)\}}|[+*])?"
)
_QUESTION = re.compile(rf"{_WORD}\.\?")  # of fnmatch: any one character
_SEVERAL = "write one entry per expert, or one for all of them"


@dataclass(frozen=True, slots=True)
class NamedExpert:
    """The expert that an entry names by number. begin, end: the span of the number in the entry.

    layer: the layer's number, None where the entry has none; open_layer: whether every layer
    whose number begins with these digits is meant. mtp: whether it is an MTP layer that counts
    from 0 on its own; None where a wildcard before `layers` leaves that open.
    """

    expert: int
    begin: int
    end: int
    layer: int | None
    open_layer: bool
    mtp: bool | None

    def renumbered(self, text: str, expert: int) -> str:
        """The entry with another expert number in this place."""
        return f"{text[: self.begin]}{expert}{text[self.end :]}"


def is_regex(text: str, path: tuple[str | int, ...]) -> bool:
    """Whether an entry at a path of the config is a regular expression, not a name or fnmatch."""
    return text.startswith(_REGEX_MARKS) or "\\" in text or not _REGEX_KEYS.isdisjoint(path)


def named_expert(text: str, regex: bool, num_experts: int, where: str) -> NamedExpert | None:
    """The one expert that an entry names; None where it names none, or all of them.

    regex: whether it is a regular expression; num_experts: how many there are; where: the file,
    for messages. Raises ConfigError where it names several experts by their numbers.
    """
    if _EXPERTS.search(text) is None:
        return None
    found = list(_EXPERT.finditer(text))
    if not found:
        if _selects(text, regex, num_experts):
            raise _several(text, where)
        return None
    match = found[0]
    # As a regular expression, `experts.5.*` is 50 to 59 as well.
    open_end = regex and _OPEN_END.match(text, match.end()) is not None
    ambiguous = open_end and num_experts > 10
    if len(found) > 1 or ambiguous or not _stands_alone(text, match.start()):
        raise _several(text, where)
    begin, end = match.span("expert")
    layers = list(_LAYER.finditer(text, 0, match.start()))
    if not layers:
        return NamedExpert(int(match["expert"]), begin, end, None, False, None)
    layer = layers[-1]
    before = text[: layer.start()].removesuffix("[.]").removesuffix(".").removesuffix("\\")
    mtp: bool | None = bool(layer["mtp"] or layer["own"])
    if not mtp and before.endswith(("*", "+", ")", "]", "?")):
        mtp = None
    open_layer = regex and _OPEN_END.match(text, layer.end()) is not None
    number = int(layer["number"] or layer["own"])
    return NamedExpert(int(match["expert"]), begin, end, number, open_layer, mtp)


def highest_expert(text: str) -> int:
    """The highest expert number that the text has anywhere, -1 without one."""
    return max((int(match["expert"][:10]) for match in _ANY_EXPERT.finditer(text)), default=-1)


def plain_name(text: str) -> str:
    """The module name of a literal entry, without marks, anchors and escapes."""
    for mark in _REGEX_MARKS:
        text = text.removeprefix(mark)
    return re.sub(r"\\(.)", r"\1", text.removeprefix("^")).replace("[.]", ".")


def _several(text: str, where: str) -> ConfigError:
    problem = f"quantization entry {text!r} names several experts by number"
    return ConfigError(where, problem, _SEVERAL)


def _selects(text: str, regex: bool, num_experts: int) -> bool:
    """Whether a pattern without a plain expert number means some experts and not others."""
    if not regex and num_experts > 10 and _QUESTION.search(text):
        return True
    digits = _DIGITS.search(text)
    if digits and digits["times"] not in ("+", "*"):
        most = int(digits["most"] or 9) if digits["times"] else 1
        if num_experts > 10**most:
            return True
    word = _EXPERTS.search(text)
    rest = text[word.end() :] if word else ""
    return _LONE_DIGIT.search(_NOT_AN_EXPERT.sub(" ", rest)) is not None


def _stands_alone(text: str, begin: int) -> bool:
    """Whether a place is outside every group, in a pattern without other branches."""
    depth, escaped, in_class = 0, False, False
    for position, char in enumerate(text):
        if position == begin and depth:
            return False
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            return False
    return True
