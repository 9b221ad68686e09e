"""What a probe found, as a document, and such a document read as the original's side."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from shardsurgeon.errors import UsageError
from shardsurgeon.operations.answers import Kind
from shardsurgeon.operations.intervals import answers_needed, newcombe, wilson
from shardsurgeon.operations.prompts import BASE, Sampling
from shardsurgeon.reports import Report
from shardsurgeon.storage.formats.strict_json import parse_json
from shardsurgeon.storage.limits import OTHER_JSON, read_limited

Verdict: TypeAlias = Literal["more", "fewer", "no difference", "undecided"]
Counts: TypeAlias = Mapping[Kind, tuple[int, int]]
"""Kind → how many answers are of it, and of how many."""

_PROBE_AGAIN = "give a file that `shardsurgeon probe` wrote"


@dataclass(frozen=True, slots=True)
class DifferenceReport:
    """A share less another one. count, answers: of that other one; difference, low, high: with
    Newcombe's interval of 95 %.

    verdict: `more` or `fewer` where the interval leaves out 0; else `no difference` where it is no
    wider than what was to be detected, and `undecided` where it is; answers_needed: then, how many
    answers each would take, if the shares stay.
    """

    count: int
    answers: int
    difference: float
    low: float
    high: float
    verdict: str
    answers_needed: int | None


@dataclass(frozen=True, slots=True)
class FailureReport:
    """How many answers fail in one way. share, low, high: with Wilson's interval of 95 %.

    answers: those that could; to_original, to_base: what the share is more than the original's
    under the same sampling, and than that of the base setting.
    """

    kind: str
    count: int
    answers: int
    share: float
    low: float
    high: float
    to_original: DifferenceReport | None = None
    to_base: DifferenceReport | None = None


@dataclass(frozen=True, slots=True)
class SettingReport:
    """What answers under one setting are like. sampling: what was sent; refused: questions that
    the server did not answer."""

    name: str
    sampling: dict[str, float]
    answers: int
    refused: int
    failures: tuple[FailureReport, ...]


@dataclass(frozen=True, slots=True)
class RefusedReport:
    """A question that a server did not answer: asked from which record, where, and what it said."""

    server: str
    record: str
    said: str


@dataclass(frozen=True, slots=True)
class OriginalReport:
    """What was compared with. where: a server or a file; answers_file: where its answers are."""

    where: str
    model: str
    answers_file: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class ProbeReport(Report):
    """Free answers of a served model, and how many of them fail in which way.

    prompts: the spec; records: how many different ones were asked; samples: questions for each
    setting; request: a digest of all that was asked; refusals: the first of them; resumed: answers
    that an earlier run had kept; written: False where the file held this already.

    >>> from shardsurgeon.operations.probe_report import SettingReport, failure
    >>> loop = failure("loops", 7, 100)
    >>> base = SettingReport("base", {}, 100, 0, (loop,))
    >>> shardsurgeon.ProbeReport(
    ...     "probe.json", "http://127.0.0.1:8000/v1", "K2.5-72", "chats.jsonl", 100, 100, 42, 0.02,
    ...     "1f0c", "9ad2", "probe.answers.jsonl", None, (base,), ()
    ... )
    K2.5-72: 7 of 100 answers loop, 7.00 % [3.43 %, 13.75 %] -> probe.json
    """

    out: str
    url: str
    model: str
    prompts: str
    records: int
    samples: int
    seed: int
    detect: float
    prompts_sha256: str
    request: str
    answers_file: str
    original: OriginalReport | None
    settings: tuple[SettingReport, ...]
    refusals: tuple[RefusedReport, ...]
    resumed: int = 0
    written: bool = True

    @property
    def title(self) -> str:
        """`K2.5-72: 7 of 100 answers loop, 7.00 % [3.43 %, 13.75 %] -> probe.json`."""
        loops = self.settings[0].failures[0]
        share, low, high = (f"{100 * x:.2f} %" for x in (loops.share, loops.low, loops.high))
        said = f"{loops.count:,} of {loops.answers:,} answers loop, {share} [{low}, {high}]"
        return f"{self.model}: {said} -> {self.out}{'' if self.written else ': there already'}"


def failure(
    kind: str,
    count: int,
    of: int,
    original: tuple[int, int] | None = None,
    base: tuple[int, int] | None = None,
    detect: float = 0.0,
) -> FailureReport:
    """A share and its differences. original, base: (count, answers) of what it is compared with."""
    share = wilson(count, of)
    to_original, to_base = (
        None if other is None else _difference((count, of), other, detect)
        for other in (original, base)
    )
    ends = (share.value, share.low, share.high)
    return FailureReport(kind, count, of, *ends, to_original, to_base)


def failures(
    counts: Counts, original: Counts | None, base: Counts | None, detect: float
) -> tuple[FailureReport, ...]:
    """One for each kind that an answer could be of."""
    return tuple(
        failure(str(kind), *of, (original or {}).get(kind), (base or {}).get(kind), detect)
        for kind, of in counts.items()
    )


def _difference(here: tuple[int, int], there: tuple[int, int], detect: float) -> DifferenceReport:
    found = newcombe(wilson(*here), wilson(*there))
    verdict: Verdict = "more" if found.low > 0 else "fewer" if found.high < 0 else "no difference"
    needed = None
    if verdict == "no difference" and found.width > detect:
        verdict = "undecided"
        needed = answers_needed(here[0] / here[1], there[0] / there[1], detect)
    return DifferenceReport(*there, found.value, found.low, found.high, verdict, needed)


def is_probe(path: Path) -> bool:
    """Whether a file is one that a probe wrote."""
    try:
        read_probe(path)
    except UsageError:
        return False
    return True


def read_probe(path: Path) -> dict[str, Any]:
    """The document of a probe. Raises UsageError for another file."""
    raw = read_limited(path, OTHER_JSON, UsageError, _PROBE_AGAIN)
    try:
        found = parse_json(raw, OTHER_JSON)
        sound = all(
            isinstance(setting["sampling"], dict) and all(map(_is_failure, setting["failures"]))
            for setting in found["settings"]
        )
        texts = (found["request"], found["prompts_sha256"], found["model"])
        sound = sound and isinstance(found["samples"], int)
        sound = sound and all(isinstance(text, str) for text in texts)
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UsageError(path, "is no report of a probe", _PROBE_AGAIN)
    document: dict[str, Any] = found
    return document


def _is_failure(said: Mapping[str, Any]) -> bool:
    count, answers = said["count"], said["answers"]
    return type(count) is type(answers) is int and 0 <= count <= answers > 0


def counts_of(
    path: Path, prompts: tuple[str, int], settings: Mapping[str, Sampling]
) -> tuple[str, dict[str, Counts]]:
    """The model of an earlier probe and, by the name of a setting, what was counted there.

    prompts: their SHA-256, and how many they are. Settings that it lacks, but for the base, are
    left out. Raises UsageError where that probe asked other prompts, or sampled in other ways.
    """
    found = read_probe(path)
    same = "compare with a probe of the same --prompts, --samples and --seed"
    if found["samples"] != prompts[1]:
        problem = f"asked {found['samples']:,} questions, this command asks {prompts[1]:,}"
        raise UsageError(path, problem, same)
    if found["prompts_sha256"] != prompts[0]:
        raise UsageError(path, "asked other prompts, or with another seed", same)
    counts: dict[str, Counts] = {}
    for name, sampling in settings.items():
        wanted = asdict(sampling)
        fitting = (each for each in found["settings"] if each["sampling"] == wanted)
        setting = next(fitting, None)
        if setting is None and name != BASE:
            continue
        if setting is None:
            problem = f"sampled otherwise: {_unlike(wanted, found['settings'])}"
            raise UsageError(path, problem, "probe both with the same sampling")
        counts[name] = {
            kind: (each["count"], each["answers"])
            for each in setting["failures"]
            if (kind := _kind(each.get("kind"))) is not None
        }
    return found["model"], counts


def _kind(text: object) -> Kind | None:
    return next((kind for kind in Kind if kind == text), None)


def _unlike(wanted: Mapping[str, Any], settings: Collection[Mapping[str, Any]]) -> str:
    """`temperature 0.6, not 1`: of the nearest setting that is there."""
    unlike: list[list[str]] = [
        [
            f"{name} {str(each['sampling'].get(name))[:20]}, not {value:g}"
            for name, value in wanted.items()
            if each["sampling"].get(name) != value
        ]
        for each in settings
    ]
    least = sorted(unlike, key=len)[:1]
    return "; ".join(*least) if least else "it has no setting"
