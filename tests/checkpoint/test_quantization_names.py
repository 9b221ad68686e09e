"""Which expert an entry of a quantization list names: module names, fnmatch and patterns."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardsurgeon.checkpoint.quantization_names import (
    NamedExpert,
    highest_expert,
    is_regex,
    named_expert,
)
from shardsurgeon.errors import ConfigError

EXPERTS = 128


def named(text: str, experts: int = EXPERTS, regex: bool | None = None) -> NamedExpert | None:
    return named_expert(text, is_regex(text, ()) if regex is None else regex, experts, "config")


@pytest.mark.parametrize(
    ("text", "layer", "expert"),
    [
        ("model.layers.7.mlp.experts.12.up_proj", 7, 12),
        ("model.layers.7.mlp.experts.1", 7, 1),
        ("language_model.model.layers.3.mlp.experts.0.down_proj.weight", 3, 0),
        ("layers.3.ffn.experts.5.w1", 3, 5),
        ("backbone.layers.3.mixer.experts.5.up_proj", 3, 5),
        (r"re:model\.layers\.7\.mlp\.experts\.12\..*", 7, 12),
        (r"re:^model\.layers\.7\.mlp\.experts\.12\.(gate|up)_proj$", 7, 12),
        (r"re:model[.]layers[.]7[.]mlp[.]experts[.]12[.].*", 7, 12),
        (r"-:model\.layers\.7\.mlp\.experts\.12\b", 7, 12),
        (r"+:model\.layers\.7\..*experts\.12$", 7, 12),
        (r"re:model\.layers\.7\.mlp\.experts\.12(\..*)?", 7, 12),
        # Numbers of a submodule, a projection and a scale, not of an expert.
        ("model.layers.7.mlp.experts.12.0.w2_scale_2", 7, 12),
        ("model.layers.7.mlp.experts.12.*", 7, 12),
        # No layer, or no single one.
        ("mlp.experts.12.up_proj", None, 12),
        (r"re:.*mlp\.experts\.12\.up_proj", None, 12),
        (r"re:model\.layers\.(1|2)\.mlp\.experts\.12\.up_proj", None, 12),
        ("model.layers.*.mlp.experts.12.up_proj", None, 12),
    ],
)
def test_an_entry_names_one_expert_of_a_layer(text: str, layer: int | None, expert: int) -> None:
    found = named(text)
    assert found is not None
    assert (found.layer, found.expert) == (layer, expert)
    assert text[found.begin : found.end] == str(expert)
    assert found.renumbered(text, 99) == text[: found.begin] + "99" + text[found.end :]


@pytest.mark.parametrize(
    ("text", "mtp"),
    [
        ("mtp.layers.0.mlp.experts.3.up_proj", True),
        (r"re:model\.mtp\.layers\.0\.mlp\.experts\.3\..*", True),
        ("mtp.0.ffn.experts.3.w1", True),
        ("model.layers.0.mlp.experts.3.up_proj", False),
        (r"re:layers\.0\.mlp\.experts\.3\..*", False),
        (r"re:.*\.layers\.0\.mlp\.experts\.3\..*", None),
        (r"re:.*layers\.0\.mlp\.experts\.3\..*", None),
        ("*.layers.0.mlp.experts.3.up_proj", None),
    ],
)
def test_an_mtp_layer_of_its_own_numbers_is_told_apart(text: str, mtp: bool | None) -> None:
    found = named(text, experts=8)
    assert found is not None
    assert found.mtp is mtp


@pytest.mark.parametrize(
    "text",
    [
        "Linear",
        "lm_head",
        "minmax",
        "model.layers.12.mlp.gate",
        "model.layers.12.mlp.shared_experts.0.up_proj",
        "model.layers.12.mlp.experts",
        "model.layers.12.mlp.experts.gate_up_proj",
        "model.layers.12.mlp.experts_norm.3",
        "model.layers.12.mlp.experts*",
        "model.layers.12.mlp.experts.*.w1",
        "model.layers.12.mlp.experts.*",
        "re:.*experts.*",
        r"re:.*mlp\.experts\.\d+\.w2$",
        r"re:.*mlp\.experts\.(\d+)\.w2$",
        r"re:.*mlp\.experts\.\d{1,3}\.w2$",
        r"re:.*mlp\.experts\.[0-9]+\.w2$",
        r"re:.*mlp\.experts\.(?:[0-9]+)\.up_proj$",
        r"re:.*mlp\.experts\.[^.]+\.up_proj$",
        r"re:.*experts\..*|re:.*layers\.3\.self_attn.*",
    ],
)
def test_what_names_no_expert_by_number_stays(text: str) -> None:
    assert named(text) is None


@pytest.mark.parametrize(
    "text",
    [
        r"re:model\.layers\.1\.mlp\.experts\.(1|2)\..*",
        r"re:model\.layers\.1\.mlp\.experts\.[0-3]\..*",
        r"re:model\.layers\.1\.mlp\.experts\.[3-9][0-9]\..*",
        r"re:model\.layers\.1\.mlp\.experts\.1[0-9]\..*",
        r"re:model\.layers\.1\.mlp\.experts\.1\d\..*",
        r"re:model\.layers\.1\.mlp\.experts\.(?!5\.)\d+\..*",
        r"re:model\.layers\.1\.mlp\.experts\..*5\.up_proj",
        r"re:(model\.layers\.1\.mlp\.experts\.1|model\.layers\.2\.mlp\.experts\.3)\..*",
        r"re:model\.layers\.1\.mlp\.experts\.1\..*|lm_head",
        r"re:(?!model\.layers\.1\.mlp\.experts\.1\.).*",
        r"re:(model\.layers\.1\.mlp\.experts\.1\.)?up_proj",
        "model.layers.1.mlp.experts.1*",
        "model.layers.1.mlp.experts.[0-3].up_proj",
        "model.layers.1.mlp.experts.?.up_proj",
        # 50 to 59 as well.
        "re:model.layers.1.mlp.experts.5.*",
        # The ids of one digit, or of two.
        r"re:.*mlp\.experts\.\d\..*",
        r"re:.*mlp\.experts\.[0-9]\..*",
        r"re:.*mlp\.experts\.\d{1,2}\..*",
    ],
)
def test_what_names_several_experts_by_number_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named(text)
    assert repr(text) in str(caught.value)
    assert "several experts by number" in str(caught.value)


@pytest.mark.parametrize(
    "text", [r"re:.*mlp\.experts\.\d\..*", "re:model.layers.1.mlp.experts.5.*"]
)
def test_with_ten_experts_one_digit_is_all_of_a_number(text: str) -> None:
    named(text, experts=10)


def test_absurd_numbers_are_no_experts_and_no_crash() -> None:
    digits = "9" * 5000
    with pytest.raises(ConfigError):
        named(f"model.layers.1.mlp.experts.{digits}.up_proj")
    found = named(f"model.layers.{digits}.mlp.experts.1.up_proj")
    assert found is not None
    assert found.layer is None
    assert named("re:experts\\.\\d{1," + digits + "}x", experts=8) is None
    assert highest_expert(f"experts.{digits}") > EXPERTS


def test_the_highest_number_is_found_anywhere_in_an_entry() -> None:
    assert highest_expert("experts.3|experts.17.up") == 17
    assert highest_expert("model.layers.99.mlp.shared_experts.50") == -1


def test_entries_of_gptq_and_autoround_are_regular_expressions_without_a_mark() -> None:
    assert is_regex("model.layers.1", ("quantization_config", "dynamic", "model.layers.1"))
    assert is_regex("model.layers.1", ("extra_config", "model.layers.1"))
    assert not is_regex("model.layers.1", ("quantization_config", "ignore"))


WORDS = ["model.", "layers", "mtp", "experts", ".", r"\.", "[.]", "re:", "5", "12", "0", "*"]
WORDS += ["|", "(", ")", "[", "]", "[0-9]", r"\d", "+", "?", "{1,", "}", "^", "$", "\\", "_", "²"]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.booleans())
@example("experts.٣", False)
def test_any_text_is_read_or_refused_in_our_words(text: str, regex: bool) -> None:
    highest_expert(text)
    try:
        found = named(text, regex=regex)
    except ConfigError:
        return
    if found is not None:
        # A new number is read again where the old one stood.
        again = named(found.renumbered(text, 7), regex=regex)
        assert again is not None
        assert (again.expert, again.begin, again.layer) == (7, found.begin, found.layer)
