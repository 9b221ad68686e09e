"""The text of the small model: two parts, and held-out records that it was not taught."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from tests.bench.small_model import HELD_OUT, PARTS, PIECE, documents, pieces, separate, split

SOURCE = '''"""About it."""
import os

\f
class Seat:
    """Where
    one sits."""

    def taken(self):
        """Whether."""
        return "no docstring"
'''


def test_docstrings_are_prose_and_the_other_lines_are_code() -> None:
    found = separate(SOURCE)
    assert found["prose"] == "About it.\n\nWhere\none sits.\n\nWhether."
    assert found["code"].split("\n") == [
        *("import os", "", "\f", "class Seat:", "", "    def taken(self):"),
        *('        return "no docstring"', ""),
    ]


def test_pieces_are_whole_lines_in_their_order() -> None:
    lines = [f"line {number}\n" for number in range(300)]
    found = list(pieces("".join(lines)))
    assert "".join(lines).startswith("".join(found))
    assert all(PIECE <= len(piece) < PIECE + len(lines[-1]) for piece in found[:-1])
    assert all(piece.endswith("\n") for piece in found)
    assert len("".join(lines)) - len("".join(found)) < PIECE // 4


def test_a_rest_that_is_short_is_left_out() -> None:
    assert list(pieces("a\n" * (PIECE // 8 - 1))) == []
    assert len(list(pieces("a\n" * (PIECE // 8)))) == 1


def test_every_tenth_document_is_held_out_but_for_what_was_taught() -> None:
    texts = [{"code": f"{number:0{PIECE}}", "prose": "the same" * PIECE} for number in range(30)]
    trained, unseen = split(texts)
    assert [int(text) for text in unseen["code"]] == [0, HELD_OUT, 2 * HELD_OUT]
    assert len(trained["code"]) == 27
    assert unseen["prose"] == []


def test_the_library_of_this_python_gives_both_parts() -> None:
    package = Path(json.__file__).parent
    trained, unseen = split(documents(package))
    texts = {part: "".join((*trained[part], *unseen[part])) for part in PARTS}
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0] in texts["prose"]
    assert docstring.splitlines()[0] not in texts["code"]
    assert "def detect_encoding" in texts["code"]
    # A topic of help().
    assert "statement is used for conditional execution" in texts["prose"]
    assert not any(set(trained[part]) & set(unseen[part]) for part in PARTS)
