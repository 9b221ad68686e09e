"""`shardsurgeon run`: the commands of a recipe, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from shardsurgeon.cli.apply import apply_command
from shardsurgeon.cli.calibrate import calibrate_command
from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import OUT, check_options, forwarded_progress_option, json_option
from shardsurgeon.cli.output import Steps, emit
from shardsurgeon.cli.plan import plan_command
from shardsurgeon.cli.push import push_command
from shardsurgeon.errors import UsageError, WorkError, printable
from shardsurgeon.layerwise.channels import this_rank

if TYPE_CHECKING:
    from shardsurgeon.operations.recipe import Options, Recipe

_COMMANDS = {
    command.name or "": command
    for command in (calibrate_command, plan_command, apply_command, push_command)
}


@click.command("run", cls=Command)
@click.argument("recipe")
@click.option(
    *("--model", "-m"),
    metavar="MODEL",
    help="Folder, org/name or URL.  [default: as the recipe says]",
)
@click.option(*OUT, "out", metavar="OUT", help="Folder to write.  [default: as the recipe says]")
@forwarded_progress_option
@json_option
def run_command(
    recipe: str, model: str | None, out: str | None, shown_as: list[str], as_json: bool
) -> None:
    """Do what a recipe says: calibrate, plan, apply, push.

    RECIPE is a TOML file with a table for each command that is to run, its options
    as keys. Paths are read from the recipe's folder. The same command goes on after
    any interruption. The result keeps a copy in calibration/recipe.toml, which gives
    the same bytes again.

    \b
    Examples:
      shardsurgeon run recipe.toml
      shardsurgeon run pruned/calibration/recipe.toml --model /models/Kimi-K2.5

    \b
    A recipe:
      model = "/models/Kimi-K2.5"
      [calibrate]
      dataset = "chats.jsonl"
      out = "scores.pt"
      [apply]
      ratio = 0.65
      [push]
      repo-id = "me/Kimi-K2.5-REAP-65pct"
    """
    from shardsurgeon.operations.recipe import read_recipe

    if this_rank() is not None:
        problem = "starts several processes, and no step but calibrate shares its work"
        raise UsageError("torchrun", problem, "start `shardsurgeon calibrate` alone with it")
    said = read_recipe(recipe).with_words(model, out)
    words = click.get_current_context().find_root().obj or ()
    steps = Steps(said, words, silent=as_json)
    todo = list(said.steps_to_do())
    # Mistakes of the last step are told before the first one takes hours.
    for step in todo:
        if step != "push":
            _context(said, step, said.options(step), shown_as, steps)
    made: set[str] = set()
    for step in todo:
        options = said.options(step)
        if step == "push" and "apply" in said.steps:
            options.setdefault("pruned", _result(steps))
        if step != "push":
            said.require_recorded(step, made)
        context = _context(said, step, options, shown_as, steps)
        with context, _named(said, step):
            context.command.invoke(context)
        made |= {options["out"]} if "out" in options else set()
        if not as_json and step != todo[-1]:
            click.echo()
    if as_json:
        from shardsurgeon.operations.reports import RunReport

        emit(RunReport(recipe, steps.reports), (), as_json, told_otherwise=True)


def _context(
    recipe: Recipe, step: str, options: Options, shown_as: list[str], steps: Steps
) -> click.Context:
    """The command of a step with its options parsed. Raises UsageError, naming recipe and step."""
    command = _COMMANDS[step]
    with _named(recipe, step):
        words = [*shown_as, *_words(command, options)]
        # Of a command without a group; it remembers how its help is asked for.
        helps = click.get_current_context().help_option_names
        context = command.make_context(
            f"shardsurgeon {step}", words, obj=steps, help_option_names=helps
        )
        check_options(context)
        return context


@contextmanager
def _named(recipe: Recipe, step: str) -> Iterator[None]:
    where = f"{recipe.path} [{step}]"
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where} {error.where}", error.problem, error.remedy) from error
    except click.UsageError as error:
        raise UsageError(where, error.format_message().rstrip(".")) from error


def _result(steps: Steps) -> str:
    out = getattr(steps.reports["apply"], "out", None)
    if out is None:
        raise WorkError("[push]", "apply has left no folder to push")
    return str(out)


def _words(command: click.Command, options: Options) -> list[str]:
    """The options as one would type them. Raises UsageError for what the command has not."""
    words, positional = [], {}
    known = {name: each for each in command.params for name in _spellings(each)}
    for name, value in options.items():
        parameter = known.get(name)
        if parameter is None:
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"see `shardsurgeon {command.name} -h`"
            raise UsageError(name, f"is no option of {command.name}", remedy)
        if isinstance(parameter, click.Option):
            words += _option(parameter, name, value)
        else:
            positional[parameter.name] = str(value)
    names = [each.name for each in command.params if isinstance(each, click.Argument)]
    return [*words, "--", *(positional[name] for name in names if name in positional)]


def _spellings(parameter: click.Parameter) -> list[str]:
    """What a parameter is called in a recipe: its long names, and those that turn it off."""
    if isinstance(parameter, click.Argument):
        return [(parameter.name or "").replace("_", "-")]
    names = [*parameter.opts, *parameter.secondary_opts]
    return [name.removeprefix("--") for name in names if name.startswith("--")]


def _option(option: click.Option, name: str, value: Any) -> list[str]:
    given = f"--{name}"
    if option.is_flag or isinstance(value, bool):
        if not isinstance(value, bool) or not option.is_flag:
            problem = f"is {printable(str(value))}, and it is {'' if option.is_flag else 'not '}"
            raise UsageError(given, f"{problem}a question of true or false")
        off = [each for each in option.secondary_opts if given in option.opts]
        return [given] if value else off[:1]
    if isinstance(value, list) and option.multiple:
        return [word for each in value for word in (given, str(each))]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [f"{given}={text}"]
