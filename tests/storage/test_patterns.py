"""Patterns of strangers: those that could take for ever are refused, the usual ones are not."""

import re

import pytest

from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.storage import patterns
from shardsurgeon.storage.patterns import QuickPattern, require_quick_pattern

EVIL = [
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)+$",
    "(.*)*x",
    "(.*?)*?x",
    "(x+x+)+y",
    r"(\w+\s?)*$",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    "((((a*)*)*)*)*",
    "(?:a{0,50}){0,50}b",
    "(((a{1,9}){1,9}){1,9}){1,9}",
    "(?=(a+)+b)",
    "(?!(a+)+b)",
    "(?>(a+)+b)",
    ".*.*.*.*.*.*x",
    ".*a.*a.*a.*a.*a.*a.*b",
    "a?" * 30 + "a" * 30,
    "(|a)" * 40,
    "(?:(?:){60000}){60000}",
    r"(a*)\1\1\1b",
    "(a)?(?(1)b|c)",
    "(" * 2000 + ")" * 2000,
    "a" * 10_001,
]
USUAL = [
    "lm_head",
    r".*lm_head",
    r".*mlp\.experts\.\d+\.(gate|up|down)_proj$",
    r"model\.layers\.[0-9]+\.mlp\..*",
    r"^(?!.*experts).*",
    r".*layers\..*\.mlp\..*\.w[123].*",
    r"(?:model|language_model)?\.layers\.(?:1|2|3|40)\.self_attn.*",
    r"(?i).*\.SHARED_EXPERT[s]?\b.*",
    r"layers\.\d{1,3}\.experts\.\d{1,4}",
]
NAMES = [
    f"{prefix}layers.{layer}.{rest}"
    for prefix in ("model.", "language_model.model.", "")
    for layer in (0, 1, 40)
    for rest in ("mlp.experts.5.up_proj", "self_attn.q_proj", "mlp.shared_experts.w1", "w1")
]


@pytest.mark.parametrize("pattern", EVIL, ids=lambda pattern: pattern[:30])
def test_a_pattern_that_could_take_for_ever_is_refused_unrun(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^config.json: pattern .*; write it with fewer"):
        require_quick_pattern(pattern, "config.json")


@pytest.mark.parametrize("pattern", ["(", "[", "a{1,99999999999}", "*a", "(?P<a>x)(?P<a>y)"])
def test_what_is_no_pattern_is_refused_in_the_callers_words(pattern: str) -> None:
    with pytest.raises(FamilyError, match="is no regular expression"):
        require_quick_pattern(pattern, "family.toml", FamilyError)


@pytest.mark.parametrize("pattern", USUAL)
def test_the_usual_patterns_match_as_they_always_do(pattern: str) -> None:
    quick, slow = QuickPattern(pattern, "config.json"), re.compile(pattern)
    for name in NAMES:
        for way in ("match", "fullmatch", "search"):
            ours, pythons = getattr(quick, way)(name), getattr(slow, way)(name)
            assert (ours and ours.span()) == (pythons and pythons.span())


def test_a_pattern_whose_way_of_being_read_changes_warns_nobody(
    recwarn: pytest.WarningsRecorder,
) -> None:
    require_quick_pattern("[[a]b]", "config.json")
    assert not recwarn.list


def test_a_slow_pattern_is_stopped_between_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MOST_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(patterns, "_SLOW_SECONDS", 0.0)
    with pytest.raises(ConfigError, match=r"'\.\*a\.\*a\.\*b' takes too long"):
        QuickPattern(".*a.*a.*b", "config.json").match("a" * 100)


def test_a_long_name_counts_as_long() -> None:
    with pytest.raises(ConfigError, match=r"can take for ever on a name of 4,000 characters"):
        QuickPattern(".*a.*a.*a.*b", "config.json").search("a" * 4000)
    assert QuickPattern("lm_head", "config.json").search("a" * 4000 + "lm_head")
