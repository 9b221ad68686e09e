"""JSON edited in place: key order, number spelling, white space and escapes stay.

`Document.parse` remembers where every value stands in the text; `Document.edit` replaces only
what changes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from shardsurgeon.errors import ConfigError, InputError
from shardsurgeon.storage.formats.strict_json import brief, is_text
from shardsurgeon.storage.limits import CONFIG, MAX_DEPTH, require_json

Path = tuple[str | int, ...]


class _Mark(Enum):
    DELETE = "delete"


DELETE: Final = _Mark.DELETE  # as a change: the member or element is removed, with its comma


@dataclass(frozen=True, slots=True)
class Rename:
    """As a change: the member gets another key and keeps its value."""

    new_key: str


@dataclass(frozen=True, slots=True)
class Insert:
    """As a change of a path that does not exist yet: a new last member of that object."""

    value: object


class Node:
    """A value and its place: text[begin:end], after its key text[key_begin:key_end].

    A list element and the root have an empty key that ends where they begin. children holds
    a container's values by key or position; all scalars share an empty one.
    """

    __slots__ = ("begin", "children", "end", "key_begin", "key_end", "value")

    def __init__(self, begin: int, value: object, key: tuple[int, int] | None) -> None:
        self.begin = begin
        self.end = begin
        self.key_begin, self.key_end = key or (begin, begin)
        self.value = value
        self.children: dict[str | int, Node] = {} if isinstance(value, dict | list) else _CHILDLESS


_CHILDLESS: dict[str | int, Node] = {}


class Document:
    """A JSON text and what it says.

    value: the parsed text as plain Python. NaN and the infinities, which some published
    configs hold, are floats.
    """

    def __init__(self, text: str, root: Node) -> None:
        self._text = text
        self._root = root
        self.value = root.value

    @classmethod
    def parse(cls, raw: bytes, where: str, error: type[InputError] = ConfigError) -> Document:
        """Read a JSON file's bytes (UTF-8, with or without a byte order mark).

        Raises `error`, naming `where`, line and column, for what is not JSON, and for
        repeated keys, lone surrogates and nesting too deep to be meant; also for more than a
        config needs.
        """
        require_json(raw, CONFIG, where, error, "no model is described by so much: fetch it again")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise error(where, f"not UTF-8 at byte {cause.start:,}", "save it as UTF-8") from cause
        return cls(text, _Reader(text, where, error).document())

    def edit(self, changes: Mapping[Path, object]) -> bytes:
        """The text with the changes made and every byte outside of them as it was.

        A path leads from the root by keys and list positions, both as they are before the
        edit. A change is DELETE, a Rename, an Insert (several into one object stand in the
        order given), or the value that replaces the present one; a replacement that equals the
        present value leaves its spelling alone.

        Raises KeyError for a path that does not exist, ValueError for changes that contradict
        each other: one below a value that is removed or replaced, or keys that collide.
        """
        cuts = list(_Editor(self._text, self._root, changes).cuts())
        cuts.sort(key=lambda cut: cut[:2])
        parts, cursor = [], 0
        for begin, end, replacement in cuts:
            parts += [self._text[cursor:begin], replacement]
            cursor = end
        return "".join([*parts, self._text[cursor:]]).encode()


class _Editor:
    """Turns changes into cuts: (begin, end, replacement) over the text, none overlapping."""

    def __init__(self, text: str, root: Node, changes: Mapping[Path, object]) -> None:
        self._text = text
        self._root = root
        self._changes = changes
        member = next(iter(root.children.values()), root)
        spaced = self._text[member.key_end : member.begin] != ":"
        self._separators = (", ", ": ") if spaced else (",", ":")

    def cuts(self) -> Iterator[tuple[int, int, str]]:
        """Every cut, in no particular order."""
        removed: dict[Path, set[str | int]] = {}
        renamed: dict[Path, dict[str | int, str]] = {}
        inserted: dict[Path, dict[str, object]] = {}
        for path, change in self._changes.items():
            self._check_ancestors(path)
            if isinstance(change, Insert):
                self._check_new(path)
                inserted.setdefault(path[:-1], {})[str(path[-1])] = change.value
                continue
            node = self._find(path)
            if change is DELETE:
                if not path:
                    raise ValueError("the root cannot be deleted")
                removed.setdefault(path[:-1], set()).add(path[-1])
            elif isinstance(change, Rename):
                if not path or not isinstance(path[-1], str):
                    raise ValueError(f"{path} has no key that could be renamed")
                renamed.setdefault(path[:-1], {})[path[-1]] = change.new_key
                if change.new_key != path[-1]:
                    yield node.key_begin, node.key_end, self._dump(change.new_key)
            else:
                yield from self._replace(node, change)
        for path in {**renamed, **inserted}:
            gone, new = removed.get(path, set()), inserted.get(path, {})
            _check_collisions(self._find(path), renamed.get(path, {}), gone, new)
        for path, steps in removed.items():
            yield from _removals(self._find(path), steps)
        for path, members in inserted.items():
            yield self._insertion(self._find(path), members, removed.get(path, set()))

    def _find(self, path: Path) -> Node:
        node = self._root
        for step in path:
            if step not in node.children:
                raise KeyError(path)
            node = node.children[step]
        return node

    def _check_ancestors(self, path: Path) -> None:
        for length in range(len(path)):
            above = path[:length]
            if above in self._changes and not isinstance(self._changes[above], Rename):
                raise ValueError(f"{path} lies below {above}, which is removed or replaced")

    def _check_new(self, path: Path) -> None:
        if not path or not isinstance(path[-1], str):
            raise ValueError(f"{path} names no member that could be inserted")
        if not isinstance(self._find(path[:-1]).value, dict):
            raise ValueError(f"{path} cannot be inserted: {path[:-1]} is not an object")

    def _insertion(
        self, container: Node, members: Mapping[str, object], removed: set[str | int]
    ) -> tuple[int, int, str]:
        """The new members behind the last one that stays, spaced as the last one there was."""
        children = list(container.children.values())
        gap, colon = self._separators[0][1:], self._separators[1]
        if children:
            begin = children[-2].end if len(children) > 1 else container.begin
            space = re.split("[,{]", self._text[begin : children[-1].key_begin])[-1]
            gap = space if len(children) > 1 or "\n" in space else gap
            colon = self._text[children[-1].key_end : children[-1].begin]
        sample, margin = self._sample(container), gap.rpartition("\n")[2]
        texts = [
            f"{self._dump(key)}{colon}{self._render(sample, value, margin)}"
            for key, value in members.items()
        ]
        stay = [child for key, child in container.children.items() if key not in removed]
        if not stay:
            begin = container.begin + 1
            return begin, begin, self._separators[0].join(texts)
        return stay[-1].end, stay[-1].end, "".join(f",{gap}{text}" for text in texts)

    def _sample(self, container: Node) -> Node | None:
        """A list of the document to lay new ones out by: a sibling, if there is one."""
        near = (*container.children.values(), *self._root.children.values())
        return next((node for node in near if node.children and isinstance(node.value, list)), None)

    def _replace(self, node: Node, value: object) -> Iterator[tuple[int, int, str]]:
        present = json.loads(self._text[node.begin : node.end])
        # Compared as JSON: 1, 1.0 and true are different there.
        if json.dumps(present) != json.dumps(value):
            yield node.begin, node.end, self._render(node, value)

    def _render(self, sample: Node | None, value: object, margin: str | None = None) -> str:
        """The value on one line, or broken into lines as the container `sample` is.

        margin: the indentation of the line it stands on; None for that of the sample.
        """
        children = list(sample.children.values()) if sample else []
        if sample and children and isinstance(value, (dict, list, tuple)):
            inner = self._text[sample.begin + 1 : children[0].key_begin]
            outer = self._text[children[-1].end : sample.end - 1]
            if "\n" in inner and "\n" in outer:
                newline = "\r\n" if "\r\n" in inner else "\n"
                own = outer.rpartition("\n")[2]
                indent = inner.rpartition("\n")[2].removeprefix(own)
                text = self._dump(value, indent)
                return text.replace("\n", newline + (own if margin is None else margin))
        return self._dump(value)

    def _dump(self, value: object, indent: str | None = None) -> str:
        item, colon = self._separators
        return json.dumps(
            value,
            ensure_ascii=self._text.isascii(),
            indent=indent,
            separators=(item if indent is None else ",", colon),
        )


def _check_collisions(
    container: Node,
    new_keys: Mapping[str | int, str],
    removed: set[str | int],
    inserted: Iterable[str],
) -> None:
    stay = [new_keys.get(key, key) for key in container.children if key not in removed]
    for key, count in Counter([*stay, *inserted]).items():
        if count > 1:
            raise ValueError(f"two members would have the key {key!r}")


def _removals(container: Node, steps: set[str | int]) -> Iterator[tuple[int, int, str]]:
    """Cuts that leave each survivor the white space before it and no comma too many."""
    if len(steps) == len(container.children):
        yield container.begin + 1, container.end - 1, ""
        return
    gone_since: int | None = None
    end = container.begin + 1  # of the last survivor
    for step, child in container.children.items():
        if step in steps:
            gone_since = child.key_begin if gone_since is None else gone_since
            continue
        if gone_since is not None:
            yield gone_since, child.key_begin, ""
        gone_since, end = None, child.end
    if gone_since is not None:
        yield end, child.end, ""


_SPACE = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"-?[A-Za-z]+")
_DIGITS = re.compile(r"-?[0-9]+")
_DECODER = json.JSONDecoder()


class _Reader:
    """Reads one text from left to right.

    Scalars are read by the standard library. Containers are read here, with a stack of their
    own: the library tells no places, and its recursion ends before MAX_DEPTH.
    """

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
        if not self._text.startswith('"', begin):
            self._refuse(f"expected a string, found {self._found()}")
        key = self._scalar()
        assert isinstance(key, str)
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
        node = Node(begin, self._scalar(), key)
        node.end = self._at
        return node

    def _scalar(self) -> object:
        begin = self._at
        try:
            value, self._at = _DECODER.raw_decode(self._text, begin)
        except json.JSONDecodeError as cause:
            word = _WORD.match(self._text, begin)
            if word:
                self._refuse(f"{brief(word[0])} is not a JSON value")
            if "escape" in cause.msg:
                self._refuse("a string with an invalid escape", cause=cause)
            kind = "string" if self._text.startswith('"', begin) else "value"
            self._refuse(f"expected a {kind}, found {self._found()}")
        except ValueError as cause:  # Python limits the digits it converts
            digits = _DIGITS.match(self._text, begin)
            assert digits is not None
            self._refuse(f"a number of {len(digits[0]):,} digits", cause=cause)
        if isinstance(value, str) and not is_text(value):
            self._refuse("a string with a lone surrogate", begin)
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
