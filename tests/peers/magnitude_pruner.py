"""compressed-tensors' expert pruner and ours, run on one checkpoint, and what to tell it.

Its user says by regular expressions which tensors are routers, experts and per-expert vectors,
and how many experts go. Its keep-lists come to us as the report that llm-compressor saves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters.magnitude_expert_pruner import (
    MagnitudeExpertPruner,
)

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.operations import scores
from tests.oracle.byte_oracle import read_config, read_tensors, same_bits

# Router name → ascending ids of the experts that stay.
Retained = dict[str, list[int]]


@dataclass(frozen=True)
class Patterns:
    """What its user says. aux: None for its default pattern of per-expert vectors."""

    router: str
    expert: str
    aux: str | None = None


MLP = Patterns(r"\.mlp\.gate\.weight$", r"\.mlp\.experts\.")
SPARSE = Patterns(r"block_sparse_moe\.gate\.weight$", r"block_sparse_moe\.experts\.")
ROUTER = Patterns(r"\.router\.weight$", r"\.experts\.")
MIXER = Patterns(r"mixer\.gate\.weight$", r"mixer\.experts\.")
GRANITE = Patterns(r"router\.layer\.weight$", r"moe\.(input|output)_linear\.weight$")
STEP = Patterns(r"\.moe\.gate\.weight$", r"\.moe\.((gate|up|down)_proj|experts)\.")
GEMMA = Patterns(r"router\.proj\.weight$", r"\.experts\.")
HUNYUAN = Patterns(r"\.gate\.wg\.weight$", MLP.expert)


def told_of(patterns: Patterns, aux: str) -> Patterns:
    """The patterns with one for per-expert vectors."""
    return Patterns(patterns.router, patterns.expert, aux)


def pruner(
    source: Path, patterns: Patterns, sparsity: float = 0.5, key: str | None = None
) -> MagnitudeExpertPruner:
    """Its pruner, made from a checkpoint; key: of the expert count, None to let it look."""
    aux = {} if patterns.aux is None else {"aux_pattern": patterns.aux}
    return MagnitudeExpertPruner.from_pretrained(
        source, patterns.router, patterns.expert, sparsity, key, **aux
    )


def theirs(source: Path, their: MagnitudeExpertPruner) -> Path:
    """The folder that it writes."""
    out = source.with_name("theirs")
    convert_checkpoint(source, out, their, device="cpu")
    return out


def report(retained: Retained, folder: Path) -> Path:
    """Its keep-lists as llm-compressor reports them: module path → retained ids."""
    path = folder / "report.json"
    path.write_text(json.dumps({name.rsplit(".", 2)[0]: ids for name, ids in retained.items()}))
    return path


def ours(source: Path, retained: Retained) -> Path:
    """The folder that we write for its keep-lists."""
    out = source.with_name("ours")
    plan = shardsurgeon.plan(source, plan_file=report(retained, source.parent))
    shardsurgeon.apply(plan, out, verify=False)
    return out


def scored(source: Path) -> dict[int, list[int]]:
    """Layer → the half that we retain by `scores from-router --norm l1`."""
    file = source.with_name("scores.safetensors")
    scores.scores_from_router(source, file, norm="l1")
    keep = shardsurgeon.plan(source, file, ratio=0.5).decision.keep
    return {layer: list(kept.retained) for layer, kept in keep.layers.items()}


def layer_numbers(source: Path) -> dict[str, int]:
    """Router name → layer number, MTP layers counted on."""
    layers = read_anatomy(shardsurgeon.open_checkpoint(source)).layers
    return {layer.router: layer.index for layer in layers}


def groups_of(source: Path) -> int:
    """How many groups the router of a checkpoint limits its choice by."""
    config = read_config(source)
    config = config.get("text_config", config)
    return int(config.get("n_group", config.get("num_expert_group", 1)))


def differing(left: Path, right: Path) -> list[str]:
    """Names of tensors that are not the same, or not there, in two folders."""
    one, other = read_tensors(left), read_tensors(right)
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not same_bits(one[name], other[name])
    )
