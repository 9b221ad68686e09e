"""The command that makes a pruned model again, as its card shows it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, SourceIdentity
from shardsurgeon.operations.facts import ModelFacts
from shardsurgeon.pruning.counts import Allocation, MtpPolicy, SelectionRequest

_PROGRAM = ("shardsurgeon", "apply")


def recipe(
    request: SelectionRequest,
    source: SourceIdentity,
    given: Mapping[str, str],
    max_shard_nbytes: int | None,
    declared: str | None,
) -> str:
    """The command that was given, its files under the names that the model carries them by.

    given: name in the model → path, of the score file and the keep-list; declared: the words of
    --family.
    """
    plan = None if request.plan_file is None else str(Path(request.plan_file).absolute())
    scores = [name for name, path in given.items() if path != plan]
    options: dict[str, object] = {
        "--ratio": request.ratio,
        "--keep": request.keep,
        "--target-size": request.target_size,
        "--plan": next((name for name, path in given.items() if path == plan), None),
        "--rounding": request.rounding,
        "--multiple-of": request.multiple_of,
        "--metric": request.metric,
        "--mtp": request.mtp if request.mtp is not MtpPolicy.ROUTER_NORM else None,
        "--allocate": request.allocate if request.allocate is not Allocation.UNIFORM else None,
        "--max-shard-size": max_shard_nbytes,
        "--family": declared and Path(declared).name,
    }
    words = [*_PROGRAM, *scores, "--model", address(source)]
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    words += ["--preserve-super-experts"] if request.preserve_super_experts else []
    words += ["--allow-nonuniform"] if request.allow_nonuniform else []
    return shlex.join(words)


def recipe_by_record(facts: ModelFacts) -> str:
    """The command that goes by the keep-lists in the model's metadata."""
    source = facts.provenance.steps[0].source
    words = [*_PROGRAM, "--plan", PROVENANCE_NAME, "--model", address(source)]
    words += ["--mtp", "drop"] if facts.mtp_removed and not facts.mtp_layers else []
    words += [] if facts.provenance.is_uniform else ["--allow-nonuniform"]
    return shlex.join(words)


def with_files(command: str, repo_id: str, revision: str | None) -> tuple[str, ...]:
    """The command behind the one that fetches the files it names."""
    words = ["hf", "download", repo_id, "--include", "calibration/*", "--local-dir", "."]
    words += ["--revision", revision] if revision else []
    return shlex.join(words), command


def address(source: SourceIdentity) -> str:
    """MODEL as it must be typed: a repository at its commit, or a folder's name."""
    at_commit = source.revision is not None and "/" in source.name
    return f"{source.name}@{source.revision}" if at_commit else source.name
