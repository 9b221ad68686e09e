"""What an evaluation found, and its file, which `plan --evaluation` and model cards read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, ClassVar, TypeVar

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
    """What one part of the data says of a model. name: the part's; samples: how many it has."""

    name: str
    samples: int
    damage: Damage


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


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationReport(Report):
    """What several prunes of one model cost, measured before any of them is made.

    config_sha256: of the model; run: what tells this evaluation from any other; samples, tokens: as
    they passed through the models; predicted: tokens that were predicted, over which all means
    are; original: of the whole model; layers_resumed: layers that an earlier run had finished;
    seconds: wall time of this run.
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

    figures: ClassVar[tuple[str, ...]] = ()

    @property
    def title(self) -> str:
        """The model, and what was measured."""
        return f"{self.model}: {counted(len(self.candidates), 'candidate')} on {self.dataset}"

    def file(self) -> bytes:
        """evaluation.json."""
        return (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode()


def is_evaluation(path: str | PathLike[str]) -> bool:
    """Whether a file is one that an evaluation wrote."""
    try:
        raw = read_limited(path, EVALUATION, ScoreError, "no evaluation is so large")
    except ScoreError:
        return False
    found = parse_for_a_hint(raw, EVALUATION)
    return isinstance(found, dict) and found.get("kind") == KIND


def read_evaluation(path: str | PathLike[str]) -> EvaluationReport:
    """Read an evaluation.json. Raises ScoreError where it is none, or is broken."""
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"is not what an evaluation wrote ({type(error).__name__}: {str(error)[:80]})"
        raise ScoreError(where, problem, _REMEDY) from error


def _report(found: Mapping[str, Any]) -> EvaluationReport:
    given = _known(EvaluationReport, found)
    given["original"] = _damage(found["original"])
    given["original_parts"] = tuple(map(_part, found["original_parts"]))
    given["candidates"] = tuple(map(_candidate, found["candidates"]))
    given["notes"] = tuple(map(str, found["notes"]))
    return _checked(EvaluationReport(**given))


def _candidate(found: Mapping[str, Any]) -> CandidateDamage:
    given = _known(CandidateDamage, found)
    given["damage"] = _damage(found["damage"])
    given["parts"] = tuple(map(_part, found["parts"]))
    given["layers"] = tuple(
        _checked(LayerDamage(**_known(LayerDamage, layer))) for layer in found["layers"]
    )
    return _checked(CandidateDamage(**given))


def _part(found: Mapping[str, Any]) -> PartDamage:
    return _checked(PartDamage(found["name"], found["samples"], _damage(found["damage"])))


def _damage(found: Mapping[str, Any]) -> Damage:
    given = _known(Damage, found)
    accepted = given["accepted"]
    if accepted is not None:
        given["accepted"] = _checked(Accepted(**_known(Accepted, accepted)))
    return _checked(Damage(**given))


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
