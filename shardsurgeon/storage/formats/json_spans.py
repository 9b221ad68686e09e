"""Reads JSON into values that know where in the text they stand: what documents.py edits by."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from shardsurgeon.errors import InputError
from shardsurgeon.storage.formats.strict_json import brief, is_text

MAX_DEPTH = 500


def read_spans(text: str, where: str, error: type[InputError]) -> Node:
    """The root value of a JSON text, which may begin with a byte order mark.

    NaN and the infinities are read as floats. Raises `error`, naming `where`, line and column,
    for what is not JSON, and for repeated keys, lone surrogates and nesting deeper than
    MAX_DEPTH.
    """
    return _Reader(text, where, error).document()


class Node:
    """A value and its place: text[begin:end], after its key text[key_begin:key_end].

    A list element and the root have an empty key that ends where they begin. children holds
    a container's values by key or position; what is no container shares an empty one.
    """

    __slots__ = ("begin", "children", "end", "key_begin", "key_end", "value")

    def __init__(self, begin: int, value: object, key: tuple[int, int] | None) -> None:
        self.begin = begin
        self.end = begin
        self.key_begin, self.key_end = key or (begin, begin)
        self.value = value
        self.children: dict[str | int, Node] = {} if isinstance(value, dict | list) else _CHILDLESS


_CHILDLESS: dict[str | int, Node] = {}

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z]+")
_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}


class _Reader:
    """Reads one text from left to right, with its own stack: depth costs no recursion."""

    def __init__(self, text: str, where: str, error: type[InputError]) -> None:
        self._text = text
        self._where = where
        self._error = error
        self._at = 1 if text.startswith("\ufeff") else 0

    def document(self) -> Node:
        """The root, once the whole text is read."""
        root = node = self._value(None)
        containers: list[Node] = []
        while True:
            if node.end == node.begin:  # still open: its first child comes next
                containers.append(node)
                if len(containers) > MAX_DEPTH:
                    self._refuse(f"nested deeper than {MAX_DEPTH} levels")
            else:
                while containers and not self._takes(","):
                    self._close(containers.pop())
                if not containers:
                    break
            node = self._child(containers[-1])
        self._skip_space()
        if self._at < len(self._text):
            self._refuse(f"{len(self._text) - self._at:,} characters follow the document")
        return root

    def _child(self, parent: Node) -> Node:
        """The next value of an open container, with its key where the container is an object."""
        if isinstance(parent.value, list):
            node = self._value(None)
            parent.children[len(parent.children)] = node
            parent.value.append(node.value)
            return node
        assert isinstance(parent.value, dict)
        self._skip_space()
        begin = self._at
        key = self._string()
        if key in parent.children:
            self._refuse(f"key {brief(key)} stands twice in one object", begin)
        span = begin, self._at
        self._expect(":")
        node = self._value(span)
        parent.children[key] = node
        parent.value[key] = node.value
        return node

    def _value(self, key: tuple[int, int] | None) -> Node:
        """A scalar or an empty container, complete, or a container's opening bracket."""
        self._skip_space()
        begin = self._at
        opening = self._text[begin : begin + 1]
        if opening in ("{", "["):
            self._at += 1
            node = Node(begin, {} if opening == "{" else [], key)
            if self._takes("}" if opening == "{" else "]"):
                node.end = self._at
            return node
        node = Node(begin, self._scalar(opening), key)
        node.end = self._at
        return node

    def _scalar(self, first: str) -> object:
        if first == '"':
            return self._string()
        begin = self._at
        if word := _WORD.match(self._text, begin):
            self._at = word.end()
            if word[0] not in _WORDS:
                self._refuse(f"{brief(word[0])} is no JSON value", begin)
            return _WORDS[word[0]]
        number = _NUMBER.match(self._text, begin)
        if not number:
            self._refuse(f"expected a value, found {self._found()}")
        self._at = number.end()
        if number[1] or number[2]:
            return float(number[0])
        try:
            return int(number[0])
        except ValueError as cause:  # Python limits the digits it converts
            self._refuse(f"a number of {len(number[0]):,} digits", begin, cause)

    def _string(self) -> str:
        begin = self._at
        token = _STRING.match(self._text, begin)
        if not token:
            self._refuse(f"expected a string, found {self._found()}")
        try:
            value = json.loads(token[0])
        except ValueError as cause:
            self._refuse("a string with an invalid escape", begin, cause)
        if not isinstance(value, str) or not is_text(value):
            self._refuse("a string with a lone surrogate", begin)
        self._at = token.end()
        return value

    def _close(self, container: Node) -> None:
        self._expect("}" if isinstance(container.value, dict) else "]", " or ','")
        container.end = self._at

    def _takes(self, mark: str) -> bool:
        self._skip_space()
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _expect(self, mark: str, alternative: str = "") -> None:
        if not self._takes(mark):
            self._refuse(f"expected '{mark}'{alternative}, found {self._found()}")

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _found(self) -> str:
        return brief(self._text[self._at]) if self._at < len(self._text) else "the end of the file"

    def _refuse(
        self, problem: str, at: int | None = None, cause: Exception | None = None
    ) -> NoReturn:
        place = self._at if at is None else at
        line = self._text.count("\n", 0, place) + 1
        column = place - self._text.rfind("\n", 0, place)
        raise self._error(
            self._where,
            f"not readable as JSON at line {line:,}, column {column:,}: {problem}",
            "correct it or fetch the file again",
        ) from cause
