"""Documents: the json module says what a text means, str comparison says what survived."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import ConfigError, IndexFileError
from shardsurgeon.storage.formats.json_edit import DELETE, Document, Insert, Path, Rename

CONFIG = """{
  "architectures": ["DeepseekV3ForCausalLM"],
  "n_routed_experts" : 384,
  "rms_norm_eps": 1e-06,
  "rope": {"theta": 50000.0, "factor":64.00},
  "ignore": [
    "lm_head",
    "model.layers.1.mlp.experts.0.up_proj",
    "re:.*self_attn.*"
  ],
  "text_config": {
    "num_experts": 384
  }
}
"""


def parse(text: str | bytes) -> Document:
    raw = text if isinstance(text, bytes) else text.encode()
    return Document.parse(raw, "config.json")


def edit(text: str, changes: dict[Path, object]) -> str:
    return parse(text).edit(changes).decode()


def test_a_count_changes_and_nothing_else() -> None:
    changes: dict[Path, object] = {
        ("n_routed_experts",): 135,
        ("text_config", "num_experts"): 135,
    }
    assert edit(CONFIG, changes) == CONFIG.replace("384", "135")


def test_the_value_is_plain_python() -> None:
    assert parse('{"a": [1, 1.0, 1e2, -0, true, null, "\\u00e9\\n"]}').value == {
        "a": [1, 1.0, 100.0, 0, True, None, "\u00e9\n"]
    }
    assert [type(item) for item in parse("[1, 1.0, true]").value] == [int, float, bool]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        CONFIG,
        CONFIG.replace("\n", "\r\n"),
        "\ufeff" + CONFIG,
        '{"a":1e-06,"b":1E-6,"c":0.0000010,"d":-0.0,"e":1e999}',
        '{"a": NaN, "b": [Infinity, -Infinity]}',
        '\t{ "\\u00e9" :\r "é\\/\\ud83d\\ude00" , "x":[ ] , "y" : { } }\n\n',
        "3",
        ' "text" ',
        "[[],[[]],{}]",
    ],
)
def test_an_empty_edit_changes_no_byte(text: str) -> None:
    assert parse(text).edit({}) == text.encode()


def test_an_equal_replacement_keeps_the_spelling() -> None:
    text = '{"eps": 1e-06, "list": [1,2,  3.0], "n": 4}'
    changes: dict[Path, object] = {
        ("eps",): 0.000001,
        ("list",): [1, 2, 3.0],
        ("n",): 4.0,
    }
    assert edit(text, changes) == '{"eps": 1e-06, "list": [1,2,  3.0], "n": 4.0}'


def test_spelling_outside_of_a_cut_survives_byte_order_mark_and_crlf() -> None:
    text = '\ufeff{\r\n\t"a": 1e-06,\r\n\t"é": "\\u00e9",\r\n\t"n": 8\r\n}\r\n'
    assert edit(text, {("n",): 4}) == text.replace("8", "4")


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ([0], "[ 2,\n 3 ,4]"),
        ([1], "[ 1 , 3 ,4]"),
        ([0, 1], "[ 3 ,4]"),
        ([1, 2], "[ 1 , 4]"),
        ([3], "[ 1 , 2,\n 3]"),
        ([2, 3], "[ 1 , 2]"),
        ([0, 3], "[ 2,\n 3]"),
        ([0, 2], "[ 2,\n 4]"),
        ([1, 2, 3], "[ 1]"),
        ([0, 1, 2, 3], "[]"),
    ],
)
def test_elements_go_with_their_comma(gone: list[int], left: str) -> None:
    assert edit("[ 1 , 2,\n 3 ,4]", {(position,): DELETE for position in gone}) == left


def test_an_indented_list_stays_indented_whatever_goes() -> None:
    lines = CONFIG.splitlines(keepends=True)
    first, middle, last = 6, 7, 8
    assert edit(CONFIG, {("ignore", 0): DELETE}) == "".join(
        line for number, line in enumerate(lines) if number != first
    )
    assert edit(CONFIG, {("ignore", 1): DELETE}) == "".join(
        line for number, line in enumerate(lines) if number != middle
    )
    without_last = [line for number, line in enumerate(lines) if number != last]
    without_last[middle] = without_last[middle].replace(",\n", "\n")
    assert edit(CONFIG, {("ignore", 2): DELETE}) == "".join(without_last)
    assert '"ignore": [],\n' in edit(CONFIG, {("ignore", i): DELETE for i in range(3)})


def test_members_go_with_their_key_and_comma() -> None:
    text = '{\n  "a": 1,\n  "b": {"x": 1},\n  "c": 3\n}'
    assert edit(text, {("a",): DELETE}) == '{\n  "b": {"x": 1},\n  "c": 3\n}'
    assert edit(text, {("b",): DELETE}) == '{\n  "a": 1,\n  "c": 3\n}'
    assert edit(text, {("c",): DELETE}) == '{\n  "a": 1,\n  "b": {"x": 1}\n}'
    assert edit(text, {("b", "x"): DELETE}) == '{\n  "a": 1,\n  "b": {},\n  "c": 3\n}'


def test_keys_are_renamed_in_place_and_may_swap() -> None:
    text = '{"experts.3": {"bits": 4}, "experts.5" : 8, "x": 1}'
    changes: dict[Path, object] = {
        ("experts.3",): DELETE,
        ("experts.5",): Rename("experts.3"),
        ("x",): Rename("y"),
    }
    assert edit(text, changes) == '{"experts.3" : 8, "y": 1}'
    assert edit('{"a":1,"b":2}', {("a",): Rename("b"), ("b",): Rename("a")}) == '{"b":1,"a":2}'


def test_edits_below_a_renamed_key_use_its_old_name() -> None:
    text = '{"experts.3": {"bits": 4}}'
    changes: dict[Path, object] = {
        ("experts.3",): Rename("experts.1"),
        ("experts.3", "bits"): 8,
    }
    assert edit(text, changes) == '{"experts.1": {"bits": 8}}'


def test_a_replaced_list_is_laid_out_as_the_one_before() -> None:
    assert edit(CONFIG, {("ignore",): ["lm_head", "x"]}) == (
        CONFIG[: CONFIG.index('    "model.layers')] + '    "x"\n' + CONFIG[CONFIG.index("  ],") :]
    )
    assert edit('{"a": [1, 2]}', {("a",): [3, {"b": 4}]}) == '{"a": [3, {"b": 4}]}'
    assert edit('{"a":[1,2]}', {("a",): [3, {"b": 4}]}) == '{"a":[3,{"b":4}]}'
    assert edit("[\r\n\t1\r\n]", {(): [2, [3]]}) == "[\r\n\t2,\r\n\t[\r\n\t\t3\r\n\t]\r\n]"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"a": 1}', '{"a": 1, "n": [0, 4]}'),
        ('{"a":1}', '{"a":1,"n":[0,4]}'),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 2, "n": [0, 4]}'),
        ('{"a":1,"b":2}', '{"a":1,"b":2,"n":[0,4]}'),
        ('{"a": 1 ,\t"b" : 2 }', '{"a": 1 ,\t"b" : 2,\t"n" : [0, 4] }'),
        ("{}", '{"n": [0, 4]}'),
        ('{ "a": 1 }\n', '{ "a": 1, "n": [0, 4] }\n'),
        ('{\n  "a": 1\n}', '{\n  "a": 1,\n  "n": [0, 4]\n}'),
        (
            '{\r\n\t"a": [\r\n\t\t1\r\n\t]\r\n}',
            '{\r\n\t"a": [\r\n\t\t1\r\n\t],\r\n\t"n": [\r\n\t\t0,\r\n\t\t4\r\n\t]\r\n}',
        ),
    ],
)
def test_a_new_member_stands_last_and_is_laid_out_as_its_neighbours(text: str, result: str) -> None:
    assert edit(text, {("n",): Insert([0, 4])}) == result


def test_a_new_list_is_broken_into_lines_where_the_lists_of_the_document_are() -> None:
    path, before = ("text_config", "n"), '"num_experts": 384\n'
    one_line = '"num_experts": 384,\n    "n": [0, 4]\n'
    assert edit(CONFIG, {path: Insert([0, 4])}) == CONFIG.replace(before, one_line)
    broken = CONFIG.replace('["Deep', '[\n    "Deep').replace('M"],', 'M"\n  ],')
    assert edit(broken, {path: Insert([0, 4])}) == broken.replace(
        before, '"num_experts": 384,\n    "n": [\n      0,\n      4\n    ]\n'
    )


def test_new_members_stand_behind_what_stays() -> None:
    text = '{\n  "a": 1,\n  "b": 2,\n  "c": 3\n}'
    changes: dict[Path, object] = {("c",): DELETE, ("x",): Insert(8), ("y",): Insert("é")}
    assert edit(text, changes) == '{\n  "a": 1,\n  "b": 2,\n  "x": 8,\n  "y": "\\u00e9"\n}'
    everything: dict[Path, object] = {(key,): DELETE for key in "abc"}
    assert edit(text, {**everything, ("x",): Insert(1)}) == '{"x": 1}'
    renamed: dict[Path, object] = {("a",): Rename("b"), ("c",): Insert(3)}
    assert edit('{"a": 1}', renamed) == '{"b": 1, "c": 3}'


def test_new_text_is_escaped_as_the_document_is() -> None:
    assert edit('{"a": "\\u00e9"}', {("a",): "è"}) == '{"a": "\\u00e8"}'
    assert edit('{"a": "é"}', {("a",): "è"}) == '{"a": "è"}'


def test_a_changed_value_attribute_does_not_hide_an_edit() -> None:
    document = parse('{"a": [1]}')
    document.value["a"].append(2)  # type: ignore[index]
    assert document.edit({("a",): [1, 2]}) == b'{"a": [1, 2]}'


@pytest.mark.parametrize("path", [("b",), ("a", 2), ("a", -1), ("a", "0"), ("a", 0, "x"), (0,)])
def test_a_path_that_does_not_exist_is_a_defect_of_the_caller(path: Path) -> None:
    with pytest.raises(KeyError):
        edit('{"a": [1, 2]}', {path: 3})


@pytest.mark.parametrize(
    "changes",
    [
        {(): DELETE},
        {(): Rename("x")},
        {("a", 0): Rename("x")},
        {("b",): Rename("a")},
        {("b",): Rename("c"), ("a",): Rename("c")},
        {("a",): DELETE, ("a", 0): 5},
        {("a",): [], ("a", 0): 5},
        {("a",): None, ("a", 0): DELETE},
        {(): Insert(1)},
        {("b",): Insert(1)},
        {("b",): Rename("c"), ("c",): Insert(1)},
        {("a", 2): Insert(1)},
        {("a", "x"): Insert(1)},
        {("b",): DELETE, ("b", "x"): Insert(1)},
    ],
)
def test_changes_that_contradict_each_other_are_a_defect_of_the_caller(
    changes: dict[Path, object],
) -> None:
    with pytest.raises(ValueError, match=r"deleted|renamed|have the key|lies below|inserted"):
        edit('{"a": [1, 2], "b": 1}', changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: expected a value, found the end of the file"),
        ("{} {}", "line 1, column 4: 2 characters follow the document"),
        ('{"a": 1,\n "a": 2}', "line 2, column 2: key 'a' stands twice"),
        ('{"a": {"\\u0062": 1, "b": 2}}', "key 'b' stands twice"),
        ('{"a": 1,}', "column 9: expected a string, found '}'"),
        ("[1,]", "expected a value, found ']'"),
        ("[1 2]", "expected ']' or ',', found '2'"),
        ("[01]", "expected ']' or ',', found '1'"),
        ("[1.]", "expected ']' or ','"),
        ("[.5]", "expected a value"),
        ("[+1]", "expected a value"),
        ("{'a': 1}", 'expected a string, found "\'"'),
        ('{"a" 1}', "expected ':', found '1'"),
        ('["a\n"]', "expected a string"),
        ('["a', "expected a string"),
        ('["\\x"]', "invalid escape"),
        ('["\\ud800"]', "lone surrogate"),
        ("[True]", "'True' is not a JSON value"),
        ("[1, // one\n2]", "expected a value, found '/'"),
        ("{", "expected a string, found the end of the file"),
        ("[", "expected a value, found the end of the file"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100 levels"),
        ("[" + "9" * 5000 + "]", "a number of 5,000 digits"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
        ("\ufeff\ufeff{}", "expected a value"),
        ("<html>", "expected a value, found '<'"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    line = str(caught.value)
    assert line.startswith("config.json: ")
    assert message in line
    assert len(line) < 300


def test_the_caller_says_which_error_it_is() -> None:
    with pytest.raises(IndexFileError, match=r"index\.json"):
        Document.parse(b"[", "index.json", IndexFileError)


def test_five_hundred_levels_are_read_and_edited() -> None:
    text = "[" * 100 + "1" + "]" * 100
    assert edit(text, {(0,) * 100: 2}) == text.replace("1", "2")


# Random documents: rendered with random white space by a renderer of the test's own.

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
spaces = st.sampled_from(["", "", " ", "\n", "\r\n  ", "\t"])


def spell(value: object, draw: st.DrawFn) -> str:
    def space() -> str:
        return draw(spaces)

    def scalar(item: object) -> str:
        return json.dumps(item, ensure_ascii=draw(st.booleans()))

    if isinstance(value, dict):
        members = [
            f"{space()}{scalar(key)}{space()}:{space()}{spell(item, draw)}{space()}"
            for key, item in value.items()
        ]
        return "{" + (",".join(members) or space()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(space() + spell(v, draw) + space() for v in value) or space()) + "]"
    return scalar(value)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, object]:
    value = draw(values)
    mark = draw(st.sampled_from(["", "\ufeff"]))
    return mark + draw(spaces) + spell(value, draw) + draw(spaces), value


def paths_of(value: object, above: Path = ()) -> list[Path]:
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    else:
        inner = []
    return [above, *(path for key, item in inner for path in paths_of(item, (*above, key)))]


def applied(value: object, changes: dict[Path, object], above: Path = ()) -> object:
    """The edit done on the Python value."""
    change = changes.get(above, value)
    if above in changes and not isinstance(change, Rename):
        return copy.deepcopy(change)
    if isinstance(value, dict):
        renamed = {}
        for key, item in value.items():
            path = (*above, key)
            if changes.get(path) is DELETE:
                continue
            change = changes.get(path)
            new_key = change.new_key if isinstance(change, Rename) else key
            renamed[new_key] = applied(item, changes, path)
        for path, change in changes.items():
            if path[:-1] == above and isinstance(change, Insert):
                renamed[path[-1]] = copy.deepcopy(change.value)
        return renamed
    if isinstance(value, list):
        return [
            applied(item, changes, (*above, position))
            for position, item in enumerate(value)
            if changes.get((*above, position)) is not DELETE
        ]
    return value


def objects_that_stay(value: object, changes: dict[Path, object], draw: st.DrawFn) -> list[Path]:
    """Up to two objects that no change replaces or removes."""

    def at(path: Path) -> object:
        node: object = value
        for step in path:
            node = node[step]  # type: ignore[index]
        return node

    def stays(path: Path) -> bool:
        above = [changes.get(path[:length]) for length in range(len(path) + 1)]
        there = [path[:length] in changes for length in range(len(path) + 1)]
        return all(
            not is_there or isinstance(change, Rename)
            for change, is_there in zip(above, there, strict=True)
        )

    objects = [path for path in paths_of(value) if isinstance(at(path), dict) and stays(path)]
    return draw(st.lists(st.sampled_from(objects), max_size=2)) if objects else []


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, object, dict[Path, object]]:
    text, value = draw(documents())
    changes: dict[Path, object] = {}
    for number, path in enumerate(draw(st.lists(st.sampled_from(paths_of(value)), max_size=5))):
        below = any(other[: len(path)] == path or path[: len(other)] == other for other in changes)
        if below:
            continue
        options = ["replace"]
        if path:
            options.append("delete")
        if path and isinstance(path[-1], str):
            options.append("rename")
        new_key = f"a key that is longer than the random ones, {number}"
        match draw(st.sampled_from(options)):
            case "replace":
                changes[path] = draw(values)
            case "delete":
                changes[path] = DELETE
            case _:
                changes[path] = Rename(new_key)
    for number, path in enumerate(objects_that_stay(value, changes, draw)):
        changes[(*path, f"an inserted key, {number}")] = Insert(draw(values))
    return text, value, changes


def items_in_order(value: object) -> object:
    """A form in which key order and number types count, too."""
    if isinstance(value, dict):
        return [(key, items_in_order(item)) for key, item in value.items()]
    if isinstance(value, list):
        return ["list", *(items_in_order(item) for item in value)]
    return type(value), value


@settings(max_examples=200, deadline=None)
@given(documents())
def test_any_text_is_read_as_json_reads_it_and_kept(document: tuple[str, object]) -> None:
    text, value = document
    parsed = parse(text)
    assert items_in_order(parsed.value) == items_in_order(value)
    assert parsed.edit({}) == text.encode()


@settings(max_examples=300, deadline=None)
@given(edits())
def test_an_edit_means_the_same_as_on_the_python_value(
    case: tuple[str, object, dict[Path, object]],
) -> None:
    text, value, changes = case
    result = parse(text).edit(changes).decode("utf-8-sig")
    expected = applied(value, changes)
    assert items_in_order(json.loads(result)) == items_in_order(expected)


@settings(max_examples=200, deadline=None)
@given(documents(), st.data())
def test_text_outside_of_a_replaced_value_is_unchanged(
    document: tuple[str, object], data: st.DataObject
) -> None:
    text, value = document
    path = data.draw(st.sampled_from(paths_of(value)))
    marker = 987654321987654321
    result = edit(text, {path: marker})
    before, after = result.split(str(marker))
    assert text.startswith(before)
    assert text.endswith(after)
    replaced = text[len(before) : len(text) - len(after)]
    present = value
    for step in path:
        present = present[step]  # type: ignore[index]
    assert items_in_order(json.loads(replaced)) == items_in_order(present)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text('{}[]",:0123456789.eE-\\u tfn\n', max_size=25))
def test_random_input_raises_only_the_named_error(raw: bytes | str) -> None:
    try:
        document = parse(raw)
    except ConfigError:
        return
    # What is accepted, json accepts with the same meaning.
    text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    assert repr(document.value) == repr(json.loads(text))
