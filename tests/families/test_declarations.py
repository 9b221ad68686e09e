"""Family files of strangers: wrong types, names that cannot be read, and names without an end."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import FamilyError
from shardsurgeon.families.schema import (
    ConfigKeys,
    Family,
    TensorNames,
    TransformersView,
    parse_family,
    read_family,
)
from shardsurgeon.families.templates import pattern, require_templates

VALUES = [
    "1",
    "-1",
    "1.5",
    "true",
    '"text"',
    '""',
    "[]",
    "[1]",
    '["text"]',
    '[""]',
    '[["text"]]',
    "{}",
    "{ a = 1 }",
    '{ a = "text" }',
    "[{ }]",
    '[{ name = "a", axis = "0" }]',
    '[{ name = "a", axis = -1 }]',
    '[{ name = "a", axis = true }]',
    "[{ name = 1 }]",
    '[{ name = "{expert}{expert}" }]',
    '["{layer}{layer}"]',
    '["{part}.{part}"]',
    "1979-05-27",
    "nan",
    "9" * 400,
    "9" * 5000,
]
TABLES = {
    "": Family,
    "config": ConfigKeys,
    "tensors": TensorNames,
    "transformers": TransformersView,
}
ENTRIES = [(table, field.name) for table, kind in TABLES.items() for field in fields(kind)]


def declaration(table: str, entry: str, value: str) -> str:
    """A file that is like another family but for one entry."""
    lines = ['like = "deepseek_v3"', 'facts = "x"', 'model_types = ["x"]', "architectures = []"]
    lines = [line for line in lines if table or not line.startswith(f"{entry} =")]
    top = [f"{entry} = {value}"] if not table else []
    return "\n".join([*lines, *top, *([f"[{table}]", f"{entry} = {value}"] if table else [])])


@pytest.mark.parametrize(("table", "entry"), ENTRIES)
def test_an_entry_of_any_value_is_read_or_refused_in_one_sentence(table: str, entry: str) -> None:
    read = 0
    for value in VALUES:
        try:
            read += isinstance(parse_family(declaration(table, entry, value), "my.toml"), Family)
        except FamilyError as error:
            assert str(error).startswith("my.toml") and len(str(error)) < 500
    assert read < len(VALUES)


@pytest.mark.parametrize("table", ["config", "tensors", "transformers", "like"])
@pytest.mark.parametrize("value", ["1", "true", '"../schema"', "[]", '["a"]', '"no such"'])
def test_a_table_that_is_none_is_refused(table: str, value: str) -> None:
    like = "" if table == "like" else 'like = "deepseek_v3"\n'
    with pytest.raises(FamilyError, match=r"^my.toml"):
        parse_family(f"{like}{table} = {value}", "my.toml")


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("layers", '["model.layers"]', "has no {layer}"),
        ("mtp", '["mtp"]', "has no {layer}"),
        ("layers", '["{layer}.{expert}"]', "has {expert}, which"),
        ("experts", '["experts.{part}"]', "has no {expert}"),
        ("experts", '["{expert}.{expert}"]', "has {expert} twice"),
        ("shared", '["{part}{part}"]', "has {part} twice"),
        ("routers", "[]", "'routers' is empty"),
        ("layers", "[]", "'layers' is empty"),
        ("experts", "[]", "'experts' is empty"),
        ("shared", '["' + "a" * 301 + '"]', "has 301 characters"),
        ("shared", str([f"a{n}" for n in range(300)]), "has 3.. names, at most 300"),
    ],
)
def test_names_that_could_not_be_read_are_refused(entry: str, value: str, says: str) -> None:
    with pytest.raises(FamilyError, match=re.escape(says).replace(r"\.\.", "..")) as caught:
        parse_family(declaration("tensors", entry, value), "my.toml")
    assert str(caught.value).startswith("my.toml")


def test_a_place_of_counts_per_layer_says_where_the_layer_stands() -> None:
    with pytest.raises(FamilyError, match=r"'experts' has not one '\*'"):
        parse_family(declaration("config", "per_layer", '"experts"'), "my.toml")


@pytest.mark.parametrize(
    "template",
    ["*a" * 60 + "b", "{part}" + "a*" * 60 + "b", "*" * 300, "{part}.*.*.*.*.*.*.*.x"],
)
def test_no_name_takes_for_ever(template: str) -> None:
    """Each of these would take longer than the universe has been there."""
    require_templates([("shared", template)], "my.toml")
    regex = re.compile(pattern(template))
    begun = time.thread_time()
    assert regex.fullmatch("a" * 2000) is None or template == "*" * 300
    assert time.thread_time() - begun < 20


def every_way(template: str) -> str:
    """The plain regular expression, which tries every way in which a name can be read."""
    number = "(?:0|[1-9][0-9]{0,8})"
    known = {"{layer}": number, "{expert}": number, "{part}": ".+", "*": ".*"}
    parts = re.split(r"(\{layer\}|\{expert\}|\{part\}|\*)", template)
    return "".join(known.get(part, re.escape(part)) for part in parts)


TEMPLATES = st.lists(
    st.sampled_from(["*", "{part}", "{layer}", "a", "b", "1", ".", "ab"]), max_size=8
)


@given(TEMPLATES.map("".join), st.text("ab1.", max_size=12))
def test_a_name_is_read_as_if_every_way_were_tried(template: str, name: str) -> None:
    if any(template.count(token) > 1 for token in ("{part}", "{layer}")):
        return
    plain = re.fullmatch(every_way(template), name)
    assert (re.fullmatch(pattern(template), name) is None) == (plain is None)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for content, says in ((b"\xff", "cannot be read"), (b"a = [", "not TOML"), (b"", "missing")):
        path = tmp_path / "my.toml"
        path.write_bytes(content)
        with pytest.raises(FamilyError, match=says) as caught:
            read_family(str(path))
        assert str(caught.value).startswith(str(path))
