"""What an evaluation found, and its file, which `plan --evaluation` and model cards read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise.damage import Accepted, Damage, LayerDamage
from shardsurgeon.reports import Report
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint, read_object
from shardsurgeon.storage.limits import EVALUATION, read_limited
from shardsurgeon.units import counted

Made = TypeVar("Made")

KIND, FORMAT = "evaluation", 1
_REMEDY = "evaluate again"


@dataclass(frozen=True, slots=True)
class PartDamage:
    """What one part of the data says of a model.

    name: the part's; samples: how many it has; layers: of a candidate, what it does to every
    decoder layer on this part; empty for the whole model, and where there is one part.
    """

    name: str
    samples: int
    damage: Damage
    layers: tuple[LayerDamage, ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateDamage:
    """What an evaluation found of one candidate.

    name: as it was asked for; kept: experts of a layer, of the largest; keep_sha256: of its
    keep-lists, by which it is known; removed: the share of all experts that is gone; damage: on all
    tokens; perplexity_ratio: its perplexity by the whole model's; parts: in the order of the
    dataset; worst_part: the part whose mean KL is largest, None where there is one part; layers: of
    every decoder layer.
    """

    name: str
    kept: int
    removed: float
    keep_sha256: str
    damage: Damage
    perplexity_ratio: float
    parts: tuple[PartDamage, ...]
    worst_part: str | None
    layers: tuple[LayerDamage, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A candidate as a notebook shows it."""

    name: str
    perplexity: float
    kl_mean: float
    kl_p95: float
    kl_p99: float
    same_first_choice: float
    accepted_tokens: float | None
    worst_part: str | None

    @classmethod
    def of(cls, name: str, found: Damage, worst: str | None) -> _Row:
        accepted = found.accepted.mean if found.accepted is not None else None
        kl = found.kl_mean, found.kl_p95, found.kl_p99
        return cls(name, found.perplexity, *kl, found.agreement, accepted, worst)


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationReport(Report):
    """What several prunes of one model cost, measured before any of them is made.

    config_sha256: of the model; run: what tells this evaluation from any other; samples, tokens: as
    they passed through the models; predicted: tokens that were predicted, over which all means
    are; original: of the whole model; layers_resumed: layers that an earlier run had finished;
    seconds: wall time of this run.

    >>> with open("chats.txt", "w") as file:
    ...     written = file.write("the cat sat on the mat, and the dog sat on the cat\\n" * 8)
    >>> report = shardsurgeon.evaluate(
    ...     "fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt", ratio=[0.25, 0.5],
    ...     dataset="chats.txt:8", out="evaluation.json", dtype="float32",
    ... )
    >>> report.title
    'qwen3_moe: 2 candidates on chats.txt:8'
    >>> [(each.name, each.kept, each.damage.kl_mean > 0) for each in report.candidates]
    [('0.25', 12, True), ('0.5', 8, True)]
    """

    model: str
    revision: str | None
    config_sha256: str
    run: str
    out: str
    dataset: str
    samples: int
    tokens: int
    predicted: int
    num_experts: int
    original: Damage
    original_parts: tuple[PartDamage, ...]
    candidates: tuple[CandidateDamage, ...]
    dtype: str
    device: str
    layers_resumed: int
    seconds: float
    notes: tuple[str, ...]
    kind: str = KIND
    format: int = FORMAT

    @property
    def title(self) -> str:
        """The model, and what was measured."""
        return f"{self.model}: {counted(len(self.candidates), 'candidate')} on {self.dataset}"

    def shown(self) -> Iterable[tuple[str, Any]]:
        """What was measured in all, a row for each candidate; layers and parts are for files."""
        yield "samples", self.samples
        yield "predicted tokens", self.predicted
        rows = [_Row.of("original", self.original, None)]
        rows += [_Row.of(each.name, each.damage, each.worst_part) for each in self.candidates]
        yield "candidates", tuple(rows)
        yield "notes", self.notes

    def file(self) -> bytes:
        """evaluation.json, which a pruned model may be published with: no folder is named."""
        document = {"kind": self.kind, "format": self.format, **self.to_dict()}
        document["out"] = Path(self.out).name
        return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def candidate_of(report: EvaluationReport, keep_sha256: str) -> CandidateDamage | None:
    """The candidate with these keep-lists, None where there is none."""
    return next((each for each in report.candidates if each.keep_sha256 == keep_sha256), None)


def is_evaluation(path: str | PathLike[str]) -> bool:
    """Whether a file is one that an evaluation wrote."""
    try:
        raw = read_limited(path, EVALUATION, ScoreError, "no evaluation is so large")
    except ScoreError:
        return False
    found = parse_for_a_hint(raw, EVALUATION)
    return isinstance(found, dict) and found.get("kind") == KIND


def read_evaluation(path: str | PathLike[str]) -> EvaluationReport:
    """Read the file of an `evaluate`. Raises ScoreError where it is none, or is broken.

    >>> with open("chats.txt", "w") as file:
    ...     written = file.write("the cat sat on the mat, and the dog sat on the cat\\n" * 8)
    >>> model, scores = "fixtures/qwen3_moe", "fixtures/qwen3_moe/scores.pt"
    >>> report = shardsurgeon.evaluate(
    ...     model, scores, keep=8, dataset="chats.txt:8", out="evaluation.json", dtype="float32"
    ... )
    >>> shardsurgeon.read_evaluation("evaluation.json").candidates == report.candidates
    True
    """
    where = str(path)
    raw = read_limited(path, EVALUATION, ScoreError, "no evaluation is so large")
    found = read_object(raw, where, "the evaluation", ScoreError, _REMEDY, EVALUATION)
    if found.get("kind") != KIND:
        raise ScoreError(where, "is no evaluation", "give a file of `shardsurgeon evaluate`")
    if found.get("format") != FORMAT:
        problem = f"is an evaluation of format {str(found.get('format'))[:20]}, {FORMAT} is known"
        raise ScoreError(where, problem, _REMEDY)
    try:
        return _report(found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"is not what an evaluation wrote ({type(error).__name__}: {str(error)[:80]})"
        raise ScoreError(where, problem, _REMEDY) from error


def _report(found: Mapping[str, Any]) -> EvaluationReport:
    given = _known(EvaluationReport, found)
    given["original"] = _damage(found["original"])
    given["original_parts"] = _each(found["original_parts"], _part)
    given["candidates"] = _each(found["candidates"], _candidate)
    given["notes"] = _each(found["notes"], str)
    for candidate in given["candidates"]:
        if len(candidate.parts) != len(given["original_parts"]):
            raise ValueError(f"a candidate of {len(candidate.parts)} parts")
    return _checked(EvaluationReport(**given))


def _candidate(found: Mapping[str, Any]) -> CandidateDamage:
    given = _known(CandidateDamage, found)
    given["damage"] = _damage(found["damage"])
    given["parts"] = _each(found["parts"], _part)
    given["layers"] = _each(found["layers"], _layer)
    return _checked(CandidateDamage(**given))


def _layer(found: Mapping[str, Any]) -> LayerDamage:
    return _checked(LayerDamage(**_known(LayerDamage, found)))


def _part(found: Mapping[str, Any]) -> PartDamage:
    layers = _each(found["layers"], _layer)
    return _checked(PartDamage(found["name"], found["samples"], _damage(found["damage"]), layers))


def _damage(found: Mapping[str, Any]) -> Damage:
    given = _known(Damage, found)
    accepted = given["accepted"]
    if accepted is not None:
        given["accepted"] = _checked(Accepted(**_known(Accepted, accepted)))
    return _checked(Damage(**given))


def _each(found: Any, make: Callable[[Any], Made]) -> tuple[Made, ...]:
    """Of every entry of a list. Raises TypeError for anything else."""
    if not isinstance(found, list):
        raise TypeError(f"{str(found)[:20]} is no list")
    return tuple(map(make, found))


def _known(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: found[field.name] for field in fields(kind)}


# A perplexity that no float holds is written as null.
_INFINITE = ("perplexity", "perplexity_ratio")


def _checked(made: Made) -> Made:
    """A dataclass whose plain values are of the types that it declares. Raises TypeError."""
    for field in fields(made):  # type: ignore[arg-type]
        value, kind = getattr(made, field.name), str(field.type)
        if value is None and field.name in _INFINITE:
            object.__setattr__(made, field.name, float("inf"))
            continue
        for name, types in (("int", (int,)), ("float", (int, float)), ("str", (str,))):
            wanted = kind in (name, f"{name} | None")
            fine = isinstance(value, types) and not isinstance(value, bool)
            if wanted and not fine and not (value is None and kind.endswith("None")):
                raise TypeError(f"{field.name} is {str(value)[:20]}")
            if wanted and name == "float" and value is not None:
                # Python's JSON reads NaN; a number that no float holds becomes infinite.
                if not isfinite(number := float(value)):
                    raise ValueError(f"{field.name} is {number}")
                object.__setattr__(made, field.name, number)
    return made


def by_way(found: EvaluationReport) -> dict[str, list[CandidateDamage]]:
    """Way of choosing, as candidates' names say it behind the ratio ("" where they say none) →
    those that were asked for by ratio."""
    ways: dict[str, list[CandidateDamage]] = {}
    for each in found.candidates:
        first, _, rest = each.name.partition(" ")
        if first.replace(".", "", 1).isdecimal():
            ways.setdefault(rest, []).append(each)
    return ways


def by_plan(found: EvaluationReport) -> list[CandidateDamage]:
    """The candidates that were not asked for by ratio."""
    others = [each for way in by_way(found).values() for each in way]
    return [each for each in found.candidates if each not in others]
