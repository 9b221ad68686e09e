"""`shardsurgeon env`: what a report of a fault should say of the machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import click

from shardsurgeon.cli.help import Command
from shardsurgeon.cli.options import json_option
from shardsurgeon.cli.output import emit, fact
from shardsurgeon.units import format_size

if TYPE_CHECKING:
    from shardsurgeon.operations.reports import EnvReport

_PACKAGES = (
    *("numpy", "safetensors", "huggingface_hub", "hf_xet", "click", "tqdm", "fsspec", "s3fs"),
    *("gcsfs", "torch", "transformers", "compressed-tensors", "datasets", "vllm"),
)
# What changes how the program runs. Of those that may be secret only that they are set is said.
_VARIABLES = (
    "SHARDSURGEON_",
    "HF_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "NO_COLOR",
    "COLUMNS",
)
_PLAIN = ("SHARDSURGEON_", "HF_HUB_", "HF_XET_", "NO_COLOR", "COLUMNS")


@click.command("env", cls=Command)
@json_option
def env_command(as_json: bool) -> None:
    """Show versions and the machine, for a report of a fault.

    \b
    Examples:
      shardsurgeon env
      shardsurgeon env --json
    """
    from shardsurgeon.operations.reports import EnvReport

    report = EnvReport(
        python=platform.python_version(),
        system=platform.platform(),
        encoding=sys.getfilesystemencoding(),
        cores=_cores(),
        memory=_memory(),
        free_space=_free_space(),
        packages=dict(_packages()),
        variables=dict(_variables()),
    )
    emit(report, _lines(report), as_json)


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def _memory() -> int | None:
    """Of the machine, in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _free_space() -> int | None:
    """In the current folder, in bytes."""
    try:
        return shutil.disk_usage(".").free
    except OSError:
        return None


def _packages() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _variables() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.upper().startswith(_VARIABLES):
            plain = name.startswith(_PLAIN) and "TOKEN" not in name
            yield name, os.environ[name] if plain else "(set)"


def _lines(report: EnvReport) -> Iterator[str]:
    yield report.title
    yield ""
    yield from fact("python", report.python)
    yield from fact("system", report.system)
    yield from fact("encoding", report.encoding)
    yield from fact("cores", str(report.cores))
    for label, size in (("memory", report.memory), ("free space", report.free_space)):
        yield from fact(label, "unknown" if size is None else format_size(size))
    for label, members in (("packages", report.packages), ("variables", report.variables)):
        said = ", ".join(f"{name} {value}" for name, value in members.items())
        yield from fact(label, said or "none")
