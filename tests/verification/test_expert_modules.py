"""Entries of quantization lists that do not tell experts apart: one module speaks for its group."""

from __future__ import annotations

import random
import re

import pytest

from shardsurgeon.checkpoint.quantization_lists import Reading
from shardsurgeon.errors import ConfigError
from shardsurgeon.verification.expert_modules import Group, told_apart
from shardsurgeon.verification.module_names import Names
from tests.fuzz import quantization_lists as lists

TRIES = {"quick": 3600, "full": 12_000, "long": 120_000}
LAYERS = (1, 2, 13)
PARTS = (".up_proj", ".down_proj", "")
GROUPS = [Group(f"model.layers.{layer}.mlp.experts.", part) for layer in LAYERS for part in PARTS]
# Numbers of one digit and of several, some with others in them.
NUMBERS = (0, 1, 3, 5, 12, 13, 31, 100, 113, 255)
MORE = ["[^.]*", r"\.[0-9]+\.", r"\.\d+", r"\.[^.]+\.", r"\w*", "l.yers", "mlp.experts", "_", "s"]


def drawn(numbers: random.Random) -> str:
    entry = "".join(numbers.choice([*lists.PIECES, *MORE]) for _ in range(numbers.randint(1, 6)))
    if numbers.random() < 0.3:
        group = numbers.choice(GROUPS)
        name = f"{group.head}{numbers.choice(NUMBERS)}{group.tail}"
        begin, end = sorted(numbers.choices(range(len(name) + 1), k=2))
        entry = numbers.choice([name, name[begin:], name[:end], name[begin:end]])
        if numbers.random() < 0.3:
            entry = entry.replace(".", numbers.choice([r"\.", ".*", ".", "[^.]*"]))
    return numbers.choice([entry, entry, entry, f"re:.*{entry}.*", f"*{entry}*"])


@pytest.mark.parametrize("how", Reading, ids=lambda how: how.value)
def test_an_entry_that_tells_none_apart_means_all_of_a_group_or_none(
    how: Reading, loop: str
) -> None:
    numbers, told, whole = random.Random(how.value), 0, 0
    members = {group: {f"{group.head}{n}{group.tail}" for n in NUMBERS} for group in GROUPS}
    names = Names(name for each in members.values() for name in each)
    for _ in range(TRIES[loop] // len(Reading)):
        entry = drawn(numbers)
        apart = told_apart([entry], how, GROUPS)
        try:
            meant = names.meant([entry], how).keys()
        except (ConfigError, re.error):
            continue
        for group, each in members.items():
            if group in apart:
                told += 0 < len(each & meant) < len(each)
            else:
                assert not each & meant or each <= meant, (entry, group)
                whole += each <= meant
    assert told > 0
    assert whole > 0 or how is Reading.NAME


@pytest.mark.parametrize(
    ("how", "entry"),
    [
        (Reading.TAGGED, "lm_head"),
        (Reading.TAGGED, "Linear"),
        (Reading.TAGGED, r"re:.*self_attn.*"),
        (Reading.TAGGED, r"re:.*shared_experts.*"),
        (Reading.TAGGED, r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"),
        (Reading.TAGGED, r"re:.*mlp.gate$"),
        (Reading.TAGGED, r"re:.*\.experts\.\d+\.up_proj$"),
        (Reading.TAGGED, r"re:model\.layers\.7\.mlp\.experts\..*"),
        (Reading.TAGGED, "model.layers.1.self_attn.o_proj"),
        (Reading.GLOB, "model.layers.1.*"),
        (Reading.GLOB, "*.mlp.gate*"),
        (Reading.SUBSTRING, "model.layers.1.mlp.gate"),
        (Reading.MODULE, "model.layers.1.mlp.gate"),
        (Reading.MODULE, "model.visual"),
        (Reading.SEARCH, "model.layers.1.mlp.gate"),
        (Reading.DYNAMIC, r"-:.*self_attn.*"),
    ],
)
def test_what_lists_of_published_models_say_takes_no_group_apart(how: Reading, entry: str) -> None:
    assert told_apart([entry], how, GROUPS) == frozenset()


def test_of_entries_that_name_experts_their_own_groups_are_taken_apart() -> None:
    named = f"{GROUPS[0].head}5{GROUPS[0].tail}"
    for how in (Reading.NAME, Reading.TAGGED, Reading.GLOB, Reading.SUBSTRING):
        assert told_apart(["lm_head", named], how, GROUPS) >= {GROUPS[0]}
    assert told_apart([named], Reading.NAME, GROUPS) == {GROUPS[0]}


def test_of_very_many_entries_every_group_is() -> None:
    many = [f"model.layers.{n}.mlp.gate" for n in range(100_000)]
    assert told_apart(many, Reading.SUBSTRING, GROUPS) == frozenset(GROUPS)
