"""Which modules an entry means: both readers, with their indexes, against a look at every name."""

from __future__ import annotations

import fnmatch
import random
import re

import pytest

from shardsurgeon.checkpoint.quantization_lists import Reading
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.module_names import Modules, needed_text
from shardsurgeon.verification.module_names import Names
from tests.fuzz import quantization_lists as lists

TRIES = {"quick": 4000, "full": 8000, "long": 200_000}
RETAINED = {1: (0, 1, 5, 12), 2: (1, 2, 3, 13), 3: (4, 5, 6, 7)}
SPECIAL = set(r"*+?^$()[]{}|\\")
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def searched(entry: str, name: str) -> bool:
    if SPECIAL.isdisjoint(entry):
        return False
    try:
        return re.search(entry, name) is not None
    except re.error:
        return False


def module_key(entry: str, name: str) -> bool:
    try:
        return re.match(f"(?:{entry}){BOUNDARY}", name) is not None or name.endswith(entry)
    except re.error:
        return name.endswith(entry)


def tagged(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


READERS = {
    Reading.NAME: lambda e, n: e == n,
    Reading.TAGGED: tagged,
    Reading.FULL: lambda e, n: bool(re.fullmatch(e[3:], n)) if e.startswith("re:") else e == n,
    Reading.GLOB: lambda e, n: fnmatch.fnmatchcase(n, e),
    Reading.WILDCARD: lambda e, n: (
        tagged(e, n) or (not e.startswith("re:") and fnmatch.fnmatchcase(n, e))
    ),
    Reading.SUBSTRING: lambda e, n: e in n,
    Reading.ANYWHERE: lambda e, n: e in n or fnmatch.fnmatchcase(n, e),
    Reading.COMPONENT: lambda e, n: f".{e}." in f".{n}.",
    Reading.PART: lambda e, n: e in n.split(".") or n == e or n.startswith(f"{e}."),
    Reading.MODULE: module_key,
    Reading.DYNAMIC: lambda e, n: bool(re.match(e[2:] if e[:2] in ("-:", "+:") else e, n)),
    Reading.SEARCH: lambda e, n: e == n or n.endswith(f".{e}") or searched(e, n),
}


def drawn(numbers: random.Random) -> str:
    return "".join(numbers.choice(lists.PIECES) for _ in range(numbers.randint(1, 6)))


@pytest.mark.parametrize("reading", Reading, ids=lambda reading: reading.value)
def test_both_readers_find_what_a_look_at_every_name_finds(reading: Reading, loop: str) -> None:
    checkpoint, anatomy = lists.model()
    modules = Modules(checkpoint, anatomy, lists.keep_list(RETAINED), drop_mtp=False)
    verifiers = Names(modules.names)
    numbers, seen = random.Random(reading.value), 0
    for _ in range(TRIES[loop] // len(Reading)):
        entry = drawn(numbers)
        if numbers.random() < 0.3:
            name = numbers.choice(modules.names)
            begin = numbers.randrange(len(name))
            entry = numbers.choice([name, name[begin:], name[:begin], name.replace(".", r"\.")])
        try:
            expected = [n for n in modules.names if READERS[reading](entry, n)]
        except re.error:
            with pytest.raises(ConfigError, match="is no regular expression"):
                modules.meant(entry, reading)
            with pytest.raises(ConfigError, match="is no regular expression"):
                verifiers.meant([entry], reading)
            continue
        found = [modules.names[place] for place in modules.meant(entry, reading)]
        assert found == expected, entry
        # Among many others, as lists have them.
        beside = [f"no module {n}" for n in range(60)] if reading is Reading.SUBSTRING else []
        assert sorted(verifiers.meant([entry, *beside], reading)) == sorted(expected), entry
        seen += 0 < len(expected) < len(modules.names)
    assert seen > 10


def test_a_needed_text_is_in_every_name_that_matches(loop: str) -> None:
    numbers, names, told = random.Random("needed"), lists.modules(), 0
    for _ in range(TRIES[loop]):
        pattern = drawn(numbers)
        text = needed_text(pattern)
        try:
            matched = [name for name in names if re.search(pattern, name)]
        except re.error:
            continue
        assert all(text in name for name in matched), pattern
        told += bool(text and matched)
    assert told > 100


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"model\.layers\.1\.mlp\.experts\.5\..*", "model.layers.1.mlp.experts.5."),
        (r".*layers[.]1[.]mlp[.]experts[.]5[.]up_proj$", "layers.1.mlp.experts.5.up_proj"),
        (r"a|b", ""),
        (r"ab?c", "a"),
        (r"ab*", "a"),
        (r"ab{0,3}cd", "cd"),
        (r"ab+c", "ab"),
        (r"(?i)abc", ""),
        (r"\x41bc", ""),
        (r"(abc|d)ef", "ef"),
        (r"[abc]de[^]x]", "de"),
    ],
)
def test_the_longest_text_that_a_pattern_needs(pattern: str, text: str) -> None:
    assert needed_text(pattern) == text
