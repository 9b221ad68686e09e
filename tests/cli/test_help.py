"""Help: every option explained, 80 columns, quick, and with examples that work."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

import shardsurgeon
from shardsurgeon.cli.help import SECTIONS
from shardsurgeon.cli.main import cli
from shardsurgeon.cli.scores import scores_commands
from tests.cli.standins import Run, in_python, lay_recipes

HEAVY = {"numpy", "huggingface_hub", "torch", "transformers", "datasets", "safetensors", "tqdm"}
COMMANDS = ["inspect", "fit", "plan", "apply", "materialize", "verify", "push", "scores"]
COMMANDS += ["calibrate", "evaluate", "probe", "report", "run", "families", "env", "completion"]
SCORES = ["show", "plot", "compare", "convert", "merge", "blend", "from-router", "from-weights"]
SCORES += ["random"]
WORDS = [*((name,) for name in COMMANDS), *(("scores", name) for name in SCORES)]


def command(words: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for word in words:
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


def examples(text: str) -> list[str]:
    return re.findall(r"^ +shardsurgeon (.+)$", text, flags=re.MULTILINE)


def test_the_commands_are_those_of_the_contract_in_order_of_use() -> None:
    assert list(cli.commands) == COMMANDS


def test_every_command_of_a_group_is_tested() -> None:
    for words in WORDS:
        found = command(words)
        inner = found.commands if isinstance(found, click.Group) else {}
        assert {(*words, name) for name in inner} <= set(WORDS)


@pytest.mark.parametrize("words", WORDS)
def test_every_option_has_help(words: tuple[str, ...]) -> None:
    for parameter in command(words).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("words", [(), *WORDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_fits_80_columns(run: Run, words: tuple[str, ...], flag: str) -> None:
    ended = run(*words, flag)
    assert ended.status == 0
    assert ended.stderr == ""
    assert max(map(len, ended.stdout.splitlines())) <= 80


@pytest.mark.parametrize("words", WORDS)
def test_examples_come_before_options_and_everything_else_after(
    run: Run, words: tuple[str, ...]
) -> None:
    lines = run(*words, "--help").stdout.splitlines()
    assert lines[2].startswith("  ") and lines[3] == "" and lines[4] == "  Examples:"
    if not isinstance(command(words), click.Group):
        options = next(number for number, line in enumerate(lines) if re.match("  +-", line))
        assert options > lines.index("  Examples:")
        headings = [line for line in lines if re.match(r"\S.*:$", line)]
        assert headings[-1] == "Notes:" or "Notes:" not in headings


def test_a_long_help_begins_with_what_most_need(run: Run) -> None:
    """A terminal of 80x24 shows 23 lines and the prompt."""
    long = {}
    for words in WORDS:
        lines = run(*words, "--help").stdout.splitlines()
        if len(lines) > 2 * 23:
            long[words[0]] = re.findall(r"^ +(-.+?)(?:  |$)", "\n".join(lines[:23]), re.MULTILINE)
            assert lines.count("Options:") == 0
    how_much = ["-r, --ratio R", "--keep N", "--target-size SIZE", "--fit MACHINE"]
    how_much += ["--plan FILE"]
    place = "-m, --model MODEL"
    assert set(long) == {
        "fit",
        "plan",
        "apply",
        "calibrate",
        "evaluate",
        "push",
        "scores",
        "probe",
    } | {"report", "materialize"}
    assert set(long["scores"]) >= {"--weights NAME=W[,...]", "--objective [max-min]", *how_much[:2]}
    assert set(long["plan"]) >= {*how_much, place, "-o, --out, --output FILE"}
    assert set(long["apply"]) >= {*how_much, place, "-o, --out, --output OUT", "--dry-run"}
    assert "--dry-run" in long["push"]
    assert set(long["evaluate"]) >= {
        *("-r, --ratio R[,...]", "--keep N", "--plan FILE", "--dataset SPEC", "--samples N"),
        *(place, "-o, --out, --output FILE"),
    }
    assert set(long["probe"]) >= {"--prompts SPEC", "--samples N", "--against URL|FILE"}
    assert set(long["calibrate"]) >= {
        *("--dataset SPEC", "--samples N", "--max-length L", place),
        *("-o, --out, --output FILE", "--device NAME"),
    }


def test_the_first_screen_lists_the_commands(run: Run) -> None:
    for words, group in (((), cli), (("scores",), scores_commands)):
        shown = run(*words, "--help").stdout.splitlines()[:23]
        listed = [line.split()[0] for line in shown[shown.index("Commands:") + 1 :] if line]
        assert listed[: len(group.commands)] == list(group.commands)


@pytest.mark.parametrize(
    "words",
    [
        *(
            (name,)
            for name in ["fit", "plan", "apply", "calibrate", "evaluate", "push", "probe", "report"]
        ),
        ("scores", "blend"),
    ],
)
def test_every_option_of_a_long_help_is_in_a_group(run: Run, words: tuple[str, ...]) -> None:
    grouped = {name for names in SECTIONS.values() for name in names}
    text = run(*words, "--help").stdout
    for parameter in command(words).params:
        if isinstance(parameter, click.Option):
            assert grouped & set(parameter.opts), parameter.opts
            assert re.search(rf"^ +(?:-\w, )?{parameter.opts[0]}\b", text, re.MULTILINE)
    assert len(re.findall(r"^\S.*:$", text, re.MULTILINE)) > 4


def test_help_says_which_variables_give_defaults(run: Run) -> None:
    for words in WORDS:
        text = " ".join(run(*words, "--help").stdout.split())
        for parameter in command(words).params:
            if parameter.envvar:
                assert f"{parameter.envvar} ({parameter.opts[0]})" in text


def test_no_words_at_all_show_the_help(run: Run) -> None:
    assert run().stdout == run("--help").stdout
    assert run("scores").stdout == run("scores", "--help").stdout


@pytest.mark.parametrize("words", WORDS)
def test_the_examples_in_the_help_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_recipes(tmp_path)
    found = examples(run(*words, "--help").stdout)
    assert len(found) >= 2
    for example in found:
        assert run(*shlex.split(example)).status == 0, example


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"shardsurgeon, version {shardsurgeon.__version__}\n"


def imported_by(*words: str) -> set[str]:
    """Top-level modules that a command line imports, whatever comes of it."""
    code = (
        "import json, sys; from shardsurgeon.cli.main import main; status = main(sys.argv[1:]);"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = in_python(code, *words, capture_output=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("apply", "--help"),
        ("calibrate", "--help"),
        ("scores", "from-router", "-h"),
        ("scores", "show", "-h"),
        ("--version",),
        ("aply",),
    ],
)
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert imported_by(*words) & HEAVY == set()
