"""Options that several commands have: said in one way everywhere, long and short."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from shardsurgeon.cli.main import cli
from tests.cli.standins import FakeOperations, Run

OUT = ("-o", "out.npz")
SELECTED = ("scores.pt", "--ratio", "0.5")
# Command lines that take a model, without it.
WITH_MODEL = {
    "inspect": ("inspect",),
    "fit": ("fit",),
    "plan": ("plan", *SELECTED),
    "apply": ("apply", *SELECTED),
    "verify": ("verify", "pruned"),
    "calibrate": ("calibrate", "--dataset", "a.txt", *OUT),
    "evaluate": ("evaluate", *SELECTED, "--dataset", "a.txt", *OUT),
    "show": ("scores", "show", "scores.pt"),
    "convert": ("scores", "convert", "scores.pt", *OUT),
    "from-router": ("scores", "from-router", *OUT),
    "from-weights": ("scores", "from-weights", *OUT),
    "random": ("scores", "random", *OUT),
    "report": ("report", "plan.json", *OUT),
}
# Those of them with a positional for it, which comes before other positionals.
POSITIONAL = ["inspect", "verify", "calibrate", "evaluate", "from-router", "from-weights", "random"]
# One meaning, one way to write it.
SHORT = {
    "-m": {"--model"},
    "-o": {"--out", "--output"},
    "-j": {"--workers"},
    "-r": {"--ratio"},
    "-V": {"--version"},
}


def commands(group: click.Group = cli, *path: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Each command by its words, and the options that it takes."""
    for name, command in group.commands.items():
        yield (*path, name), {word for each in command.params for word in _options(each)}
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


def _options(parameter: click.Parameter) -> list[str]:
    is_option = isinstance(parameter, click.Option)
    return [*parameter.opts, *parameter.secondary_opts] if is_option else []


def with_positional(name: str, model: str) -> tuple[str, ...]:
    """The line with a model as its first positional."""
    words = WITH_MODEL[name]
    start = 2 if words[0] == "scores" else 1
    return (*words[:start], model, *words[start:])


def models(fake: FakeOperations) -> list[str]:
    """The models that the operations were called with, wherever they take them."""
    given = [item for args, options in fake.calls for item in (*args, *options.values())]
    return [item for item in given if isinstance(item, str) and item.startswith("/models")]


def test_every_command_with_a_family_is_a_command_with_a_model() -> None:
    taking = {words[-1] for words, options in commands() if "--model" in options}
    # That of a recipe is the model of its steps, which say their families themselves.
    taking.remove("run")
    assert taking == set(WITH_MODEL)
    assert {words[-1] for words, options in commands() if "--family" in options} == {
        *taking,
        "materialize",
        "push",
    }


@pytest.mark.parametrize("name", WITH_MODEL)
@pytest.mark.parametrize("option", ["--model", "-m"])
def test_every_command_takes_its_model_as_an_option(
    run: Run, fake: FakeOperations, name: str, option: str
) -> None:
    assert run(*WITH_MODEL[name], option, "/models/K2").status == 0
    assert models(fake) == ["/models/K2"]


@pytest.mark.parametrize("name", POSITIONAL)
def test_the_positional_is_the_same_model(run: Run, fake: FakeOperations, name: str) -> None:
    assert run(*with_positional(name, "/models/K2")).status == 0
    assert run(*with_positional(name, "/models/K2/"), "-m", "/models/K2").status == 0
    assert models(fake) == ["/models/K2", "/models/K2/"]


@pytest.mark.parametrize("name", POSITIONAL)
def test_two_different_models_are_one_line(run: Run, fake: FakeOperations, name: str) -> None:
    ended = run(*with_positional(name, "/models/K3"), "--model", "/models/K2")
    what = "SOURCE" if name == "verify" else "MODEL"
    problem = "says /models/K3, --model says /models/K2; give one of them"
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == f"shardsurgeon: error: {what}: {problem}\n"
    assert fake.calls == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "SOURCE and PRUNED are needed, none is given; see `shardsurgeon verify --help`"),
        (("a",), "SOURCE and PRUNED are needed, one of them is given"),
        (("-m", "a"), "Missing argument 'PRUNED'"),
        (("a", "b", "c"), "Got unexpected extra argument (c)"),
    ],
)
def test_verify_says_which_of_its_two_folders_is_missing(
    run: Run, fake: FakeOperations, words: tuple[str, ...], line: str
) -> None:
    ended = run("verify", *words)
    assert ended.status == 2 and line in ended.stderr
    assert fake.calls == []


def test_short_forms_are_there_wherever_the_long_ones_are() -> None:
    found = dict(commands())
    found[()] = {word for each in cli.params for word in _options(each)}
    for short, long in SHORT.items():
        having = {words for words, options in found.items() if long & options}
        assert having
        for words in having:
            assert {short, *long} <= found[words], words
        assert {words for words, options in found.items() if short in options} == having


@pytest.mark.parametrize("option", ["-o", "--out", "--output"])
def test_every_way_to_name_an_output_is_the_same(
    run: Run, fake: FakeOperations, option: str
) -> None:
    assert run("scores", "random", option, "s.npz").status == 0
    assert run("apply", *SELECTED, option, "out").status == 0
    assert fake.calls[0][0] == (None, "s.npz")
    assert fake.calls[1][1]["out"] == "out"


def test_a_variable_gives_the_model_where_the_words_do_not(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSURGEON_MODEL", "/models/K2")
    for name in ("inspect", "plan", "verify", "random"):
        assert run(*WITH_MODEL[name]).status == 0
        assert run(*WITH_MODEL[name], "-m", "/models/K3").status == 0
        if name in POSITIONAL:
            assert run(*with_positional(name, "/models/K4")).status == 0
    every = ["/models/K2", "/models/K3", "/models/K4"]
    assert models(fake) == [*every, *every[:2], *every, *every]


def test_scores_are_looked_at_alone_whatever_the_variable_says(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSURGEON_MODEL", "/models/K2")
    assert run("scores", "show", "scores.pt").status == 0
    assert run("scores", "convert", "scores.pt", *OUT).status == 0
    assert models(fake) == []


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("-3", "SHARDSURGEON_WORKERS: -3 is less than 0"),
        ("many", "Invalid value for SHARDSURGEON_WORKERS: 'many' is not a valid integer"),
    ],
)
def test_a_variable_that_is_wrong_is_named(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch, value: str, line: str
) -> None:
    monkeypatch.setenv("SHARDSURGEON_WORKERS", value)
    ended = run("apply", *SELECTED)
    assert ended.status == 2 and line in ended.stderr
    assert run("apply", *SELECTED, "-j", "2").status == 0
    assert fake.calls[-1][0][1].workers == 2


def test_variables_that_are_empty_say_nothing(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODEL", "WORKERS", "DEVICE"):
        monkeypatch.setenv(f"SHARDSURGEON_{name}", "")
    assert run("apply", *SELECTED).status == 0
    assert models(fake) == [] and fake.calls[-1][0][1].workers == 0
    assert run("calibrate", "--dataset", "a.txt", *OUT).status == 0
    assert fake.calls[-1][0][1].settings.device == "cpu"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("plan", "--ratio"), "shardsurgeon plan"),
        (("apply", "s.pt", "-j"), "shardsurgeon apply"),
        (("scores", "random", "-o"), "shardsurgeon scores random"),
    ],
)
def test_an_option_without_its_value_leads_to_the_help_that_has_it(
    run: Run, words: tuple[str, ...], path: str
) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert ended.stderr.endswith(f"requires an argument; see `{path} --help`\n")
