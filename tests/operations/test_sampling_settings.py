"""Sampling settings that a prune writes into generation_config.json, and nothing else with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.checkpoint.sampling import (
    are_members,
    as_option,
    generation_members,
    settings_of,
)
from shardsurgeon.errors import ConfigError, OutputError, UsageError
from shardsurgeon.execution.workers import Progress
from shardsurgeon.operations.card_data import ModelFacts, model_facts
from shardsurgeon.operations.model_card import Placement, model_card, recipe_by_record
from tests.support import tiny

NAME = "generation_config.json"
ROWS = {layer: [expert + 0.5 for expert in range(8)] for layer in (1, 2, 3)}
# Spaced and spelled as no writer does it.
ODD = (
    b'{"temperature" : 6e-1,\r\n\t"eos_token_id":[1,\t2] , "x": 1.50, "do_sample":true,'
    b'"y":"\\u00e9"}'
)


def model(folder: Path, generation: bytes | None = ODD) -> Path:
    folder.mkdir()
    for name, content in tiny.files().items():
        (folder / name).write_bytes(content)
    if generation is not None:
        (folder / NAME).write_bytes(generation)
    return folder


def pruned(source: Path, out: Path, sampling: dict[str, Any], **options: Any) -> Path:
    options = {"keep": 4} | options
    shardsurgeon.apply(shardsurgeon.plan(source, ROWS, sampling=sampling, **options), out)
    return out


def facts_of(folder: Path) -> ModelFacts:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.provenance is not None
    return model_facts(checkpoint, read_anatomy(checkpoint), checkpoint.provenance, folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def steps(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / PROVENANCE_NAME).read_bytes())["steps"]
    return found


def test_the_settings_are_written_and_every_other_byte_stays(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    out = pruned(source, tmp_path / "out", {"temperature": 0.7, "min_p": 0.05})
    assert (out / NAME).read_bytes() == (
        b'{"temperature" : 0.7,\r\n\t"eos_token_id":[1,\t2] , "x": 1.50, "do_sample":true,'
        b'"y":"\\u00e9","min_p":0.05}'
    )
    assert (source / NAME).read_bytes() == ODD
    assert steps(out)[0]["sampling"] == {"temperature": 0.7, "min_p": 0.05}
    assert shardsurgeon.verify(source, out).differences == ()


def test_nothing_but_that_file_and_its_record_is_another_than_without(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    plain = contents(pruned(source, tmp_path / "plain", {}))
    asked = contents(pruned(source, tmp_path / "asked", {"min_p": 0.05}))
    assert plain[NAME] == ODD and b"sampling" not in plain[PROVENANCE_NAME]
    assert {name for name in plain if plain[name] != asked[name]} == {NAME, PROVENANCE_NAME}
    assert plain.keys() == asked.keys()
    record, other = (json.loads(each[PROVENANCE_NAME]) for each in (asked, plain))
    assert record["steps"][0].pop("sampling") == {"min_p": 0.05}
    for each in (record, other):
        del each["files"], each["sha256"][NAME]
    assert record == other


@pytest.mark.parametrize(("generation", "options"), [(None, {}), (ODD, {"exclude": NAME})])
def test_a_result_that_would_have_no_such_file_gets_one_of_the_settings_alone(
    tmp_path: Path, generation: bytes | None, options: dict[str, Any]
) -> None:
    source = model(tmp_path / "model", generation)
    out = pruned(source, tmp_path / "out", {"min_p": 0.05, "max_tokens": 99}, **options)
    assert (out / NAME).read_text() == (
        '{\n  "min_p": 0.05,\n  "max_new_tokens": 99,\n  "do_sample": true\n}\n'
    )
    report = shardsurgeon.verify(source, out)
    assert report.differences == () and not any(NAME in note for note in report.notes)


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [
        ("{}", {"min_p": 0.1}, {"min_p": 0.1, "do_sample": True}),
        ('{"do_sample": null}', {"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ('{"do_sample": false}', {"top_p": 0.9}, {"do_sample": False, "top_p": 0.9}),
        ('{"do_sample": true}', {"temperature": 0}, {"do_sample": False, "temperature": 0.0}),
        ("{}", {"temperature": 0}, {"temperature": 0.0, "do_sample": False}),
        ("{}", {"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ("{}", {"max_tokens": 5.0}, {"max_new_tokens": 5}),
        ("{}", {"top_k": -1}, {"top_k": 0, "do_sample": True}),
    ],
)
def test_do_sample_comes_with_what_needs_it_where_the_source_does_not_say_it(
    tmp_path: Path, before: str, asked: dict[str, Any], after: dict[str, Any]
) -> None:
    source = model(tmp_path / "model", before.encode())
    out = pruned(source, tmp_path / "out", asked)
    written = json.loads((out / NAME).read_bytes())
    assert json.dumps(written) == json.dumps(after)
    assert shardsurgeon.verify(source, out).differences == ()


@pytest.mark.torch
def test_an_answer_still_ends_where_the_file_is_made_anew(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ends: dict[str, Any] = {"eos_token_id": [3, 4], "pad_token_id": None}
    config = tiny.config(**ends, text_config={"bos_token_id": 1, "eos_token_id": 9})
    source = model(tmp_path / "model", None)
    (source / "config.json").write_text(json.dumps(config))
    out = pruned(source, tmp_path / "out", {"min_p": 0.05})
    assert shardsurgeon.verify(source, out).differences == ()
    # What transformers, and with it vLLM, takes where there is no such file.
    before = transformers.GenerationConfig.from_model_config(config)
    after = transformers.GenerationConfig.from_pretrained(out)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after, key) == getattr(before, key)
    assert (after.eos_token_id, after.bos_token_id) == ([3, 4], 1)


@pytest.mark.torch
def test_transformers_reads_the_file_and_can_save_it_again(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    asked = {"temperature": 0.6, "top_k": -1, "top_p": 0.9, "min_p": 0.05}
    out = pruned(model(tmp_path / "model", b'{"eos_token_id": 7}'), tmp_path / "out", asked)
    read = transformers.GenerationConfig.from_pretrained(out)
    assert (read.temperature, read.top_k, read.top_p, read.min_p) == (0.6, 0, 0.9, 0.05)
    assert (read.do_sample, read.eos_token_id) == (True, 7)
    # Refuses settings that nothing would use.
    read.save_pretrained(tmp_path / "saved")


def test_the_next_prune_takes_the_file_as_it_is_and_may_change_it_again(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    first = pruned(source, tmp_path / "first", {"min_p": 0.05}, keep=6)
    second = pruned(first, tmp_path / "second", {})
    assert (second / NAME).read_bytes() == (first / NAME).read_bytes()
    assert ["sampling" in step for step in steps(second)] == [True, False]
    third = pruned(second, tmp_path / "third", {"min_p": 0.1, "top_p": 0.9}, keep=3)
    expected = ODD.replace(b"}", b',"min_p":0.1,"top_p":0.9}')
    assert (third / NAME).read_bytes() == expected
    for before, after in ((first, second), (source, second), (second, third), (source, third)):
        assert shardsurgeon.verify(before, after).differences == ()
    facts = facts_of(third)
    assert "--sampling min_p=0.1,top_p=0.9" in recipe_by_record(facts)


def test_a_run_with_other_settings_is_another_run(tmp_path: Path) -> None:
    source, out = model(tmp_path / "model"), tmp_path / "out"

    def stopped(progress: Progress) -> None:
        if progress.shards_done:  # before that nothing is kept
            raise KeyboardInterrupt

    asked = shardsurgeon.plan(source, ROWS, keep=4, sampling={"min_p": 0.05})
    with pytest.raises(KeyboardInterrupt):
        shardsurgeon.apply(asked, out, on_progress=stopped)
    for other, said in (({"min_p": 0.06}, "min_p 0.06"), ({}, "unsaid")):
        plan = shardsurgeon.plan(source, ROWS, keep=4, sampling=other)
        with pytest.raises(OutputError) as error:
            shardsurgeon.apply(plan, out)
        assert "min_p 0.05" in str(error.value) and said in str(error.value)
    shardsurgeon.apply(asked, out)
    shardsurgeon.apply(asked, out)
    with pytest.raises(OutputError, match="holds something else"):
        shardsurgeon.apply(shardsurgeon.plan(source, ROWS, keep=4, sampling={"min_p": 0.06}), out)


def test_a_plan_says_what_would_be_written(tmp_path: Path) -> None:
    plan = shardsurgeon.plan(model(tmp_path / "model"), ROWS, keep=4, sampling={"min_p": 0.05})
    assert f"{NAME} gets min_p 0.05" in plan.report.notes
    assert NAME not in plan.report.carried_along and NAME not in plan.report.left_behind
    plain = shardsurgeon.plan(tmp_path / "model", ROWS, keep=4)
    assert not any(NAME in note for note in plain.report.notes)
    assert NAME in plain.report.carried_along


def test_the_card_names_the_settings_and_the_command_repeats_them(tmp_path: Path) -> None:
    source = model(tmp_path / "model", None)
    asked = {"min_p": 0.05, "top_k": -1, "max_tokens": 99}
    facts = facts_of(pruned(source, tmp_path / "out", asked))
    card = model_card(facts, Placement("me/small", None, [recipe_by_record(facts)]))
    told = "`min_p` 0.05, `top_k` 0, `max_new_tokens` 99, `do_sample` true"
    assert f"- [{NAME}]({NAME}) was given defaults to sample with: {told}" in card
    assert "--sampling min_p=0.05,top_k=-1,max_tokens=99" in card
    plain = facts_of(pruned(source, tmp_path / "plain", {}))
    plain_card = model_card(plain, Placement("me/small", None, [recipe_by_record(plain)]))
    assert NAME not in plain_card and "--sampling" not in plain_card


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"mirostat": 1}, "sampling: 'mirostat' is no setting; choose temperature, top_p, top_k"),
        ({"min_p": 1.01}, "sampling: min_p is 1.01; give between 0 and 1"),
        ({"top_p": 0}, "sampling: top_p is 0; give above 0 and at most 1"),
        ({"top_k": 1.5}, "sampling: top_k is 1.5; give a whole number"),
        ({"top_k": -2}, "sampling: top_k is -2; give 1 or more, or -1 for all tokens"),
        ({"temperature": -1}, "sampling: temperature is -1; give 0 or more"),
        ({"temperature": float("inf")}, "sampling: temperature is inf; give a number"),
        ({"temperature": float("nan")}, "sampling: temperature is nan; give a number"),
        ({"repetition_penalty": 0}, "sampling: repetition_penalty is 0; give above 0"),
        ({"max_tokens": 10**400}, "sampling: max_tokens is 1000"),
        ({"min_p": True}, "sampling: min_p is True; give a number"),
        ({"min_p": "0.1"}, "sampling: min_p is 0.1; give a number"),
        ({3: 1}, "sampling: '3' is no setting"),
    ],
)
def test_settings_that_no_engine_takes_are_refused_in_a_line(
    tmp_path: Path, sampling: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError) as error:
        shardsurgeon.plan(tmp_path, ROWS, keep=4, sampling=sampling)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'{"min_p": 1, "min_p": 2}'])
def test_a_file_that_takes_no_settings_is_refused_only_where_it_is_to_take_some(
    tmp_path: Path, content: bytes
) -> None:
    source = model(tmp_path / "model", content)
    with pytest.raises(ConfigError, match=NAME):
        shardsurgeon.plan(source, ROWS, keep=4, sampling={"min_p": 0.05})
    assert (pruned(source, tmp_path / "out", {}) / NAME).read_bytes() == content
    shutil.rmtree(tmp_path / "out")
    pruned(source, tmp_path / "out", {"min_p": 0.05}, exclude=NAME)


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.just(-1) | st.integers(1, 10**6),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "max_tokens": st.integers(1, 10**6),
    },
)


@given(SETTINGS)
def test_settings_come_back_from_what_is_written_of_them(settings: dict[str, float]) -> None:
    members = json.loads(json.dumps(generation_members(settings)))
    assert settings_of(members) == settings
    assert are_members(members) == bool(settings)
    typed = dict(word.split("=") for word in as_option(settings).split(",") if word)
    assert {name: float(number) for name, number in typed.items()} == settings
