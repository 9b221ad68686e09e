"""The options that commands share, and how they become frozen requests."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from shardsurgeon.cli.gpus import FIT, SERVING, selected
from shardsurgeon.cli.output import Steps, as_typed
from shardsurgeon.cli.progress import PROGRAM, shown
from shardsurgeon.cli.values import OfMachine, choice, kept, of_variable, ratios, size
from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.request import (
    SELECTION,
    Allocation,
    Lists,
    MtpPolicy,
    Rounding,
    SelectionRequest,
)

# An address, alone or behind `--model=`: its scheme, login, place and query.
_ADDRESS = re.compile(r"((?:^|=)\w[\w+.-]*://)(?:[^/?]*@)?([^?]*)(?:\?.*)?", re.DOTALL)
Command = TypeVar("Command", bound=Callable[..., Any])
# The ways to name an output, of every command that writes one.
OUT = ("-o", "--out", "--output")


def selection_options(command: Command) -> Command:
    """Add SELECTION and its modifiers to a command.

    It receives them as `requests`: one SelectionRequest per ratio, or the only one. Raises
    UsageError, out of the parsing, for options that contradict each other.
    """

    def requests(ratio: tuple[float, ...], **others: Any) -> tuple[SelectionRequest, ...]:
        asked = selected(others)
        return tuple(SelectionRequest(ratio=value, **asked) for value in ratio or (None,))

    gathered = _gathered(command, _SELECTION, "requests", requests)

    @functools.wraps(gathered)
    def with_hint(*args: Any, **given: Any) -> Any:
        try:
            return gathered(*args, **given)
        except UsageError as error:
            if error.where == SELECTION:
                _refuse_keep_list(given.get("scores"))
            raise

    return cast(Command, with_hint)


def _refuse_keep_list(scores: str | None) -> None:
    """Raise UsageError where the file of scores is a keep-list, which says how many to keep."""
    from shardsurgeon.checkpoint.recognition import PLAN, kind_of

    if scores is not None and kind_of(Path(scores)) == PLAN:
        raise UsageError(scores, "is a keep-list, not scores", "give it with --plan")


def push_options(command: Command) -> Command:
    """Add the options that say how to push; the command receives them as `pushed`, by name."""
    return _gathered(command, _PUSH, "pushed", dict)


def _gathered(
    command: Command,
    options: Mapping[str, Callable[[Command], Command]],
    name: str,
    gather: Callable[..., object],
) -> Command:
    """Add options to a command, which receives them as one argument.

    options: by the name of their value; name: of the argument; gather: makes it of the values.
    """

    @functools.wraps(command)
    def with_options(*args: Any, **given: Any) -> Any:
        given[name] = check(given)
        return command(*args, **{each: given[each] for each in given if each not in options})

    def check(given: Mapping[str, Any]) -> object:
        return gather(**{option: given[option] for option in options})

    with_options.checks = [check, *getattr(command, "checks", ())]  # type: ignore[attr-defined]
    return _with_all([*options.values()], cast(Command, with_options))


def check_options(context: click.Context) -> None:
    """Raise UsageError where the options that a command was given contradict each other."""
    for check in getattr(context.command.callback, "checks", ()):
        check(context.params)


def only_one(requests: Sequence[SelectionRequest]) -> SelectionRequest:
    """The request of a command that takes one. Raises UsageError for several ratios."""
    if len(requests) > 1:
        problem = f"{len(requests)} ratios at once"
        raise UsageError("--ratio", problem, "give one; `shardsurgeon plan` compares several")
    return requests[0]


def model_option(command: Command) -> Command:
    """Add `--model MODEL`."""
    return _model_option("Folder, org/name or URL.  [default: this folder]")(command)


def model_argument(command: Command) -> Command:
    """Add the optional positional MODEL, and `--model` for the same; received as `model`."""

    @functools.wraps(command)
    def with_model(*args: Any, model: str | None, named: str | None, **given: Any) -> Any:
        return command(*args, model=one_model("MODEL", model, named, "named"), **given)

    option = _model_option("The same as MODEL.  [default: this folder]", "named")
    return click.argument("model", required=False)(option(cast(Command, with_model)))


def source_and_pruned(command: Command) -> Command:
    """Add the positionals SOURCE and PRUNED, and `--model` in place of SOURCE.

    The command receives them as `source` and `pruned`. A single word is PRUNED.
    """

    @functools.wraps(command)
    def with_both(*args: Any, places: tuple[str, ...], model: str | None, **given: Any) -> Any:
        if len(places) > 2:
            raise click.UsageError(f"Got unexpected extra argument ({' '.join(places[2:])})")
        first = places[0] if len(places) > 1 else None
        source = one_model("SOURCE", first, model, "model")
        if source is None:
            count = "one of them" if places else "none"
            raise click.UsageError(f"SOURCE and PRUNED are needed, {count} is given")
        if not places:
            raise click.UsageError("Missing argument 'PRUNED'")
        return command(*args, source=source, pruned=places[-1], **given)

    option = _model_option("The same as SOURCE; then PRUNED stands alone.")
    places = click.argument("places", metavar="[SOURCE] PRUNED", nargs=-1)
    return places(option(cast(Command, with_both)))


def one_model(what: str, given: str | None, named: str | None, option: str) -> str | None:
    """The model of a command, said as a positional, with --model, both or not at all.

    what: what the positional is called; option: the parameter of --model. Raises UsageError where
    the two are different; one of the environment gives way.
    """
    named_here = named is not None and not of_variable(click.get_current_context(), option)
    if given is not None and named_here and _same_place(given) != _same_place(named or ""):
        raise UsageError(what, f"says {given}, --model says {named}", "give one of them")
    return named if given is None else given


def refuse_swapped(model: str, scores: str) -> None:
    """Raise UsageError where a file stands in the place of MODEL and a folder in that of SCORES."""
    if os.path.isfile(model) and os.path.isdir(scores):
        meant = f"{as_typed(scores)} {as_typed(model)}"
        raise UsageError(model, "is a file, where MODEL is a folder", f"did you mean {meant}?")


def _same_place(name: str) -> str:
    return name.rstrip("/\\") or name


def _model_option(text: str, *names: str) -> Callable[[Command], Command]:
    return click.option(
        "--model",
        "-m",
        *names,
        cls=OfMachine,
        envvar="SHARDSURGEON_MODEL",
        metavar="MODEL",
        help=text,
    )


def family_option(command: Command) -> Command:
    """Add `--family auto|FILE`."""
    return click.option(
        "--family",
        metavar="auto|FILE",
        help="Read a model of no declared family: by a declaration of your own (TOML), or"
        " without one where its names, shapes and config leave no doubt.",
    )(command)


def links_option(command: Command) -> Command:
    """Add `--follow-links`."""
    return click.option(
        "--follow-links",
        is_flag=True,
        help="Take files that are links out of the folder, as shards may always be.",
    )(command)


def evaluation_option(command: Command) -> Command:
    """Add `--evaluation FILE`."""
    return click.option(
        "--evaluation",
        metavar="FILE",
        help="What `evaluate` measured of this prune: shown with the plan, kept in calibration/, "
        "printed in the model card.",
    )(command)


def scores_argument(command: Command) -> Command:
    """Add the optional positional SCORES."""
    return click.argument(
        "scores", metavar="[SCORES]", nargs=-1, required=False, callback=_one_file
    )(command)


def _one_file(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> str | None:
    """A callback that takes one word, and knows a model where it sees one beside it."""
    if len(words) < 2:
        return words[0] if words else None
    folders = [word for word in words if os.path.isdir(word)]
    others = [word for word in words if not os.path.isfile(word)]
    if len(words) == 2 and len(folders or others) == 1:
        (model,) = folders or others
        problem = "is a second argument beside SCORES"
        raise UsageError(model, problem, f"did you mean --model {as_typed(model)}?")
    raise click.UsageError(f"Got unexpected extra argument ({' '.join(words[1:])})", context)


class InOrder(click.Group):
    """A group that lists its commands in the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, as the group was given them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of its words then names its help, and not the group's."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            name = ctx.invoked_subcommand
            if error.ctx is None and name is not None and name in self.commands:
                error.ctx = click.Context(self.commands[name], parent=ctx, info_name=name)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, which is what one looks for, before the options."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)


def json_option(command: Command) -> Command:
    """Add `--json`, received as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the report as one JSON document."
    )(command)


def progress_option(command: Command) -> Command:
    """Add `-q`, `-v` and `--progress/--no-progress`; what the command does is shown as they say."""

    @functools.wraps(command)
    def with_progress(
        *args: Any, quiet: bool, verbose: bool, progress: bool | None, **given: Any
    ) -> Any:
        with shown(quiet, verbose, progress):
            return command(*args, **given)

    return _with_all(_PROGRESS, cast(Command, with_progress))


def forwarded_progress_option(command: Command) -> Command:
    """The same for a command that runs others; it receives the words for these as `shown_as`."""

    @functools.wraps(command)
    def with_words(
        *args: Any, quiet: bool, verbose: bool, progress: bool | None, **given: Any
    ) -> Any:
        words = ["--quiet"] * quiet + ["--verbose"] * verbose
        if progress is not None:
            words.append("--progress" if progress else "--no-progress")
        return command(*args, shown_as=words, **given)

    return _with_all(_PROGRESS, cast(Command, with_words))


def _with_all(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def as_given() -> str:
    """The command as it was typed, to say later what was interrupted: `shardsurgeon apply …`.

    Without what an address may hold beside its place: logins and queries.
    """
    root = click.get_current_context().find_root().obj or ()
    given: Sequence[str] = root.words if isinstance(root, Steps) else root
    return " ".join([PROGRAM, *(as_typed(_ADDRESS.sub(r"\1\2", word)) for word in given)])


def out_option(command: Command) -> Command:
    """Add the required `-o FILE`, received as `out`, and `--force`."""
    return click.option(
        *OUT,
        "out",
        metavar="FILE",
        required=True,
        help="Score file to write: .safetensors, .npz, .json, or with torch .pt.",
    )(force_option(command))


def force_option(command: Command) -> Command:
    """Add `--force`, for a score file that is there already."""
    return click.option(
        "--force", is_flag=True, help="Replace another score file that lies there."
    )(command)


lists_option = click.option(
    "--lists",
    metavar="MEANING",
    type=click.Choice([str(meaning) for meaning in Lists]),
    callback=choice(Lists),
    help="What lists of expert ids are in a file that does not say it: kept or dropped, with "
    "--plan; best-first or worst-first, where SCORES ranks the experts.",
)

_SELECTION: dict[str, Callable[[Any], Any]] = {
    "ratio": click.option(
        "--ratio",
        "-r",
        metavar="R",
        callback=ratios,
        help="Share of each layer's experts to remove: 0.65 or 65%.",
    ),
    "keep": click.option(
        "--keep", metavar="N", callback=kept, help="Keep this many experts in every MoE layer."
    ),
    "target_size": click.option(
        "--target-size",
        metavar="SIZE",
        callback=size,
        help="The most experts that fit a size, such as 122GB.",
    ),
    "fit": FIT,
    **SERVING,
    "plan_file": click.option(
        "--plan",
        "plan_file",
        metavar="FILE",
        help="Take a keep-list of `plan`, or from elsewhere.",
    ),
    "lists": lists_option,
    "rounding": click.option(
        "--rounding",
        metavar="RULE",
        type=click.Choice([str(rounding) for rounding in Rounding]),
        callback=choice(Rounding),
        help="How ratio x experts becomes the number removed: floor (as REAP does), nearest or "
        "ceil.  [default: floor]",
    ),
    "multiple_of": click.option(
        "--multiple-of",
        metavar="N",
        type=int,
        help="Raise the kept count to the next multiple of N (even expert parallelism).",
    ),
    "metric": click.option(
        "--metric",
        metavar="NAME",
        help="Which metric decides where SCORES holds several.  [default: reap]",
    ),
    "preserve_super_experts": click.option(
        "--preserve-super-experts",
        is_flag=True,
        help="Keep experts with extreme activation norms whatever their saliency.",
    ),
    "mtp": click.option(
        "--mtp",
        metavar="POLICY",
        type=click.Choice([str(policy) for policy in MtpPolicy]),
        default=str(MtpPolicy.ROUTER_NORM),
        show_default=True,
        callback=choice(MtpPolicy),
        help="What becomes of next-token-prediction layers that have experts and no scores: "
        "router-norm scores them by their router rows, last reuses the choice of the last layer, "
        "keep leaves them whole where the config has a count for them alone, drop removes them.",
    ),
    "allocate": click.option(
        "--allocate",
        metavar="WAY",
        type=click.Choice([str(way) for way in Allocation]),
        default=str(Allocation.UNIFORM),
        show_default=True,
        callback=choice(Allocation),
        help="uniform keeps as many experts in every layer; the others share the same number of "
        "experts out by the layers' shares of saliency: global for the smallest loss on average, "
        "waterfill for the smallest loss in the worst layer.",
    ),
    "allow_nonuniform": click.option(
        "--allow-nonuniform",
        is_flag=True,
        help="Accept layers that keep different numbers of experts, for an engine that reads a "
        "count per layer. Stock vLLM and transformers refuse to load such a model or misread it "
        "(plan says which), except where its config has counts per block.",
    ),
    "include": click.option(
        "--include",
        metavar="GLOB",
        multiple=True,
        help="Carry along these files of the model's folder as well, such as 'eval/*'.",
    ),
    "exclude": click.option(
        "--exclude",
        metavar="GLOB",
        multiple=True,
        help="Leave these files of the model's folder behind.",
    ),
}

_PROGRESS: list[Callable[[Any], Any]] = [
    click.option(
        "--progress/--no-progress",
        default=None,
        help="Show on stderr what is being done: in place on a terminal, as lines elsewhere."
        "  [default: what SHARDSURGEON_PROGRESS says, auto, bar, plain or none]",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, help="Say more on stderr: each file, each new try."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors."),
]

_PUSH: dict[str, Callable[[Any], Any]] = {
    "private": click.option(
        "--private", is_flag=True, help="Make the repository private, if it is made."
    ),
    "revision": click.option(
        "--revision",
        metavar="REV",
        help="Branch to push to; made where it is missing.  [default: main]",
    ),
    "create_pr": click.option("--create-pr", is_flag=True, help="Open a pull request with it."),
    "card": click.option(
        "--card", metavar="FILE", help="Use this README.md instead of making one."
    ),
    "with_card": click.option(
        "--no-card", "with_card", flag_value=False, default=True, help="Make no README.md."
    ),
}
