"""Quantization lists drawn at random, read by the engines' own code before and after a prune."""

from __future__ import annotations

import random
import re

import pytest
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from shardsurgeon.errors import ConfigError
from tests.fuzz import quantization_lists as lists
from tests.support import engines

FORMS = [
    r"re:.*layers\.{layer}\..*\.{expert}\.(gate|up|down)_proj",
    r"re:.*e.perts\.{expert}\..*",
    r"re:.*exp\w+\.{expert}\.up_proj",
    r"re:model\.layers\.{layer}\.mlp\.experts\.{expert}",
    r"re:.*\.[{expert}3]\.down_proj$",
    r"re:.*layers\.{layer}\.mlp\.experts\.{expert}\..*",
    r"re:.*experts\.\d+\.up_proj",
    r"re:.*(?<!\d){expert}\.up_proj",
    "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    "model.layers.{layer}.mlp.gate",
    "re:.*self_attn.*",
    "lm_head",
]
four = st.sets(st.integers(0, lists.EXPERTS - 1), min_size=4, max_size=4).map(sorted).map(tuple)
entries = st.builds(
    lambda form, layer, expert: form.replace("{layer}", layer).replace("{expert}", expert),
    st.sampled_from(FORMS),
    st.integers(1, 3).map(str),
    st.integers(0, lists.EXPERTS - 1).map(str),
)
LINEAR = nn.Linear(1, 1)


def ignored(section: engines.Section, name: str) -> bool:
    return is_match(name, LINEAR, section["ignore"])


def group(section: engines.Section, name: str) -> str | None:
    schemes = {t: key for key, g in section["config_groups"].items() for t in g["targets"]}
    found = match_targets(name, LINEAR, schemes)
    return schemes[found[0]] if found else None


@profile(max_examples=150, deadline=None)
@given(
    st.dictionaries(entries, st.integers(1, 2), min_size=1, max_size=6),
    st.fixed_dictionaries({1: four, 2: four}, optional={3: four}),
)
def test_compressed_tensors_own_matcher_finds_the_same_modules_before_and_after(
    found: dict[str, int], retained: dict[int, tuple[int, ...]]
) -> None:
    before = engines.section_of("compressed-tensors", list(found), list(found.values()))
    try:
        after = lists.pruned("compressed-tensors", before, retained)
    except ConfigError:
        return
    for old, new in lists.left(retained).items():
        assert ignored(after, new) == ignored(before, old), (old, new, before, after)
        assert group(after, new) == group(before, old), (old, new, before, after)


@pytest.mark.parametrize("engine", ["compressed-tensors", "transformers"])
def test_the_engines_of_the_fuzzer_read_as_the_real_ones_do(engine: str) -> None:
    numbers = random.Random(engine)
    seen = set()
    for _ in range(1500):
        entry = "".join(numbers.choice(lists.PIECES) for _ in range(numbers.randint(1, 5)))
        name = numbers.choice(lists.modules())
        try:
            if engine == "transformers":
                section = {"modules_to_not_convert": [entry]}
                theirs: object = should_convert_module(name, [entry])
                ours = engines.transformers(section, name)
            else:
                theirs, ours = is_match(name, LINEAR, entry), engines.match_name(name, entry)
                ours = ours or entry == "Linear"
        except re.error:
            continue
        assert theirs == ours, (entry, name)
        seen.add(ours)
    assert seen == {True, False}
