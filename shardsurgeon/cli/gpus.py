"""Options about GPUs and how a model is served on them: of `fit`, and of `plan` and `apply`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import click

from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.machines import FitRequest, parse_machines
from shardsurgeon.units import number_of


def _tokens(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """A callback that turns `32768` or `128k` into a number of tokens."""
    return None if text is None else number_of(text, "--context", "tokens")


# How a model is served: options of whatever is about GPUs, by the name of their value.
SERVING = {
    "context": click.option(
        "--context",
        metavar="TOKENS",
        callback=_tokens,
        help="Tokens of each sequence on the GPUs.  [default: 32768]",
    ),
    "sequences": click.option(
        "--sequences", type=int, metavar="N", help="Sequences at a time.  [default: 16]"
    ),
    "kv_dtype": click.option(
        "--kv-dtype",
        type=click.Choice(["auto", "fp8"]),
        help="Of the KV cache; auto: as the model says.  [default: auto]",
    ),
    "tensor_parallel": click.option(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="GPUs that split each layer; the others are replicas.  [default: all]",
    ),
    "expert_parallel": click.option(
        "--expert-parallel", is_flag=True, help="Each expert whole on one GPU, not split."
    ),
}
FIT = click.option(
    "--fit",
    metavar="MACHINE",
    help="The most experts that fit GPUs, such as 8x80GB.",
)


_GPUS = click.option(
    "--gpus",
    metavar="MACHINES",
    help="Show the KV cache that is left on GPUs, such as 4x80GB,2x141GB.",
)


def _is_given(value: object) -> bool:
    """Whether an option was given: 0 is a value, and refused as one."""
    return value is not None and value is not False


def fit_request(machines: str | None, given: Mapping[str, Any], option: str) -> FitRequest:
    """Words for machines, named by `option`, and the values of SERVING as a request."""
    found = parse_machines(machines, option) if machines is not None else ()
    serving = {name: given[name] for name in SERVING if _is_given(given[name])}
    return FitRequest(machines=found, **serving)


def selected(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a selection, those of --fit and SERVING as one request, or none.

    Raises UsageError where an option says how a model is served, and none on what.
    """
    of_selection = {name: value for name, value in given.items() if name not in SERVING}
    if given["fit"] is None:
        named = next((name for name in SERVING if _is_given(given[name])), None)
        if named and click.get_current_context().params.get("gpus") is None:
            option = f"--{named.replace('_', '-')}"
            raise UsageError(option, "is about GPUs, and none are named", "name them with --fit")
        return of_selection
    return {**of_selection, "fit": fit_request(given["fit"], given, "--fit")}


def gpus_options(command: Any) -> Any:
    """Add `--gpus` and SERVING to a command without a selection; received as `gpus`, a FitRequest
    or None. Raises UsageError where an option says how a model is served, and none on what."""

    @functools.wraps(command)
    def with_gpus(*args: Any, gpus: str | None, **given: Any) -> Any:
        serving = {name: given.pop(name) for name in SERVING}
        named = next((name for name, value in serving.items() if _is_given(value)), None)
        if gpus is None and named:
            option = f"--{named.replace('_', '-')}"
            raise UsageError(option, "is about GPUs, and none are named", "name them with --gpus")
        request = None if gpus is None else fit_request(gpus, serving, "--gpus")
        return command(*args, gpus=request, **given)

    return functools.reduce(
        lambda done, option: option(done), [*reversed(SERVING.values()), _GPUS], with_gpus
    )


def gpus_option(command: Any) -> Any:
    """Add `--gpus` to a command with a selection; received as `gpus`, a FitRequest or None."""

    @functools.wraps(command)
    def with_gpus(*args: Any, gpus: str | None, **given: Any) -> Any:
        request = None if gpus is None else fit_request(gpus, given, "--gpus")
        return command(*args, gpus=request, **given)

    return _GPUS(with_gpus)
