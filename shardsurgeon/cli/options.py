"""The options that commands share, and how they become frozen requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from shardsurgeon.errors import UsageError
from shardsurgeon.operations.request import Destination, refuse_budget
from shardsurgeon.pruning.request import Allocation, MtpPolicy, Rounding, SelectionRequest
from shardsurgeon.units import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])

_SELECTION_WORDS = (
    *("keep", "target_size", "plan_file", "rounding", "multiple_of"),
    *("metric", "preserve_super_experts", "mtp", "allocate", "allow_nonuniform"),
)

_PUSH_WORDS = ("private", "revision", "create_pr", "card", "with_card")


def selection_options(command: Command) -> Command:
    """Add SELECTION and its modifiers to a command.

    It receives them as `requests`: one SelectionRequest per ratio, or the only one. Raises
    UsageError, out of the parsing, for words that contradict each other.
    """

    @functools.wraps(command)
    def with_requests(*args: Any, ratio: tuple[float | None, ...], **given: Any) -> Any:
        words = {word: given.pop(word) for word in _SELECTION_WORDS}
        requests = tuple(SelectionRequest(ratio=value, **words) for value in ratio)
        return command(*args, requests=requests, **given)

    for option in reversed(_SELECTION):
        with_requests = option(with_requests)
    return with_requests  # type: ignore[return-value]


def only_one(requests: Sequence[SelectionRequest]) -> SelectionRequest:
    """The request of a command that takes one. Raises UsageError for several ratios."""
    if len(requests) > 1:
        problem = f"{len(requests)} ratios at once"
        raise UsageError("--ratio", problem, "give one; `shardsurgeon plan` compares several")
    return requests[0]


def model_option(command: Command) -> Command:
    """Add `--model MODEL`."""
    return click.option(
        "--model",
        metavar="MODEL",
        help="The checkpoint: a folder, org/name[@revision] on the Hugging Face Hub, or a URL"
        " (s3://, gs://, https://).  [default: the current folder]",
    )(command)


def family_option(command: Command) -> Command:
    """Add `--family auto|FILE`."""
    return click.option(
        "--family",
        metavar="auto|FILE",
        help="Read a model of no declared family: by a declaration of your own (TOML), or"
        " without one where its names, shapes and config leave no doubt.",
    )(command)


def scores_argument(command: Command) -> Command:
    """Add the optional positional SCORES."""
    return click.argument("scores", required=False)(command)


def json_option(command: Command) -> Command:
    """Add `--json`, received as `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the report as one JSON document."
    )(command)


def progress_option(command: Command) -> Command:
    """Add `--progress/--no-progress`; None where the user did not say."""
    return click.option(
        "--progress/--no-progress",
        default=None,
        help="Show a progress bar on stderr.  [default: where stderr is a terminal]",
    )(command)


def shard_size(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    """Turn the words of --max-shard-size into bytes; None keeps the source's cutting."""
    return None if text == "source" else parse_size(text, "--max-shard-size")


def at_least(smallest: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """A callback that refuses numbers below `smallest`."""

    def check(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
        if value is not None and value < smallest:
            raise UsageError(parameter.opts[0], f"{value} is less than {smallest}")
        return value

    return check


def _ratios(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float | None, ...]:
    if text is None:
        return (None,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        problem = f"'{text}' is not a number"
        raise UsageError("--ratio", problem, "write it like 0.65") from None


def _target_size(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> int | None:
    return None if text is None else parse_size(text, "--target-size")


def _rounding(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> Rounding | None:
    return None if text is None else Rounding(text)


def _mtp(context: click.Context, parameter: click.Parameter, text: str) -> MtpPolicy:
    return MtpPolicy(text)


def _allocate(context: click.Context, parameter: click.Parameter, text: str) -> Allocation:
    return Allocation(text)


_SELECTION = (
    click.option(
        "--ratio",
        metavar="R",
        callback=_ratios,
        help="Remove this fraction of the experts of every MoE layer, 0 < R < 1.",
    ),
    click.option(
        "--keep", metavar="N", type=int, help="Keep this many experts in every MoE layer."
    ),
    click.option(
        "--target-size",
        metavar="SIZE",
        callback=_target_size,
        help="Keep as many experts as fit a checkpoint of this size, such as 122GB.",
    ),
    click.option(
        "--plan",
        "plan_file",
        metavar="FILE",
        help="Take the experts from a keep-list made by `plan` or elsewhere; no SCORES then.",
    ),
    click.option(
        "--rounding",
        metavar="RULE",
        type=click.Choice([str(rounding) for rounding in Rounding]),
        callback=_rounding,
        help="How ratio x experts becomes the number removed: floor (as REAP does), nearest or "
        "ceil.  [default: floor]",
    ),
    click.option(
        "--multiple-of",
        metavar="N",
        type=int,
        help="Raise the kept count to the next multiple of N (even expert parallelism).",
    ),
    click.option(
        "--metric",
        metavar="NAME",
        help="Which metric decides where SCORES holds several.  [default: reap]",
    ),
    click.option(
        "--preserve-super-experts",
        is_flag=True,
        help="Keep experts with extreme activation norms whatever their saliency.",
    ),
    click.option(
        "--mtp",
        metavar="POLICY",
        type=click.Choice([str(policy) for policy in MtpPolicy]),
        default=str(MtpPolicy.ROUTER_NORM),
        show_default=True,
        callback=_mtp,
        help="What becomes of next-token-prediction layers that have experts and no scores: "
        "router-norm scores them by their router rows, last reuses the choice of the last layer, "
        "drop removes them.",
    ),
    click.option(
        "--allocate",
        metavar="WAY",
        type=click.Choice([str(way) for way in Allocation]),
        default=str(Allocation.UNIFORM),
        show_default=True,
        callback=_allocate,
        help="uniform keeps as many experts in every layer; global shares the same number of "
        "experts out by the layers' shares of saliency, so that some keep more than others.",
    ),
    click.option(
        "--allow-nonuniform",
        is_flag=True,
        help="Accept layers that keep different numbers of experts. Stock vLLM and transformers "
        "misread such a model, except where its config has counts per block.",
    ),
)


def push_options(command: Command) -> Command:
    """Add what says how to push: the command gets it as `pushed`, name → value."""

    @functools.wraps(command)
    def with_words(*args: Any, **given: Any) -> Any:
        pushed = {word: given.pop(word) for word in _PUSH_WORDS}
        return command(*args, pushed=pushed, **given)

    for option in reversed(_OPTIONS):
        with_words = option(with_words)
    return with_words  # type: ignore[return-value]


def apply_destination(
    push_to_hub: str | None,
    stream_push: str | None,
    disk_budget: int | None,
    pushed: dict[str, Any],
) -> Destination | None:
    """Where `apply` pushes to; None where neither option names a repository.

    pushed: what `push_options` gathered. Raises UsageError for options of a push without a
    repository, and for those that contradict each other.
    """
    place = Destination.of(push_to_hub, stream_push, disk_budget=disk_budget, **pushed)
    if place is not None:
        return place
    refuse_budget(disk_budget, stream=False)
    for word, (flag, silent) in _SILENT.items():
        if pushed[word] != silent:
            problem = "is about a push, and nothing is pushed"
            raise UsageError(flag, problem, "name a repository with --push-to-hub")
    return None


# The flag of each option of a push, and its value where the user did not give it.
_SILENT: dict[str, tuple[str, object]] = {
    "private": ("--private", False),
    "revision": ("--revision", None),
    "create_pr": ("--create-pr", False),
    "card": ("--card", None),
    "with_card": ("--no-card", True),
}
_OPTIONS = [
    click.option("--private", is_flag=True, help="Make the repository private, if it is made."),
    click.option(
        "--revision",
        metavar="REV",
        help="Branch to push to; made where it is missing.  [default: main]",
    ),
    click.option("--create-pr", is_flag=True, help="Open a pull request with it."),
    click.option("--card", metavar="FILE", help="Use this README.md instead of making one."),
    click.option(
        "--no-card", "with_card", flag_value=False, default=True, help="Make no README.md."
    ),
]


def out_option(command: Command) -> Command:
    """Add the required `-o FILE`, received as `out`."""
    return click.option(
        "-o",
        "out",
        metavar="FILE",
        required=True,
        help="Score file to write: .safetensors, .npz, .json, or with torch .pt.",
    )(command)


def model_argument(command: Command) -> Command:
    """Add the optional positional MODEL."""
    return click.argument("model", required=False)(command)
