"""The `probe` command: free answers of a served model, and what is wrong with them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.datasets import without_folders
from shardsurgeon.operations.asking import Served, Side, ask_all, digest_of, model_of
from shardsurgeon.operations.intervals import require_detect
from shardsurgeon.operations.kept_answers import KeptAnswers
from shardsurgeon.operations.probe_report import (
    Counts,
    OriginalReport,
    ProbeReport,
    SettingReport,
    counts_of,
    failures,
    is_probe,
    read_probe,
)
from shardsurgeon.operations.prompts import (
    BASE,
    Sampling,
    draw_prompts,
    prompts_sha256,
    require_distinct,
    settings_of,
)
from shardsurgeon.storage.completions import ANSWER_SECONDS, POLICY, CompletionServer
from shardsurgeon.storage.connections import origin
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.storage.http import parse_address
from shardsurgeon.storage.retry import RetryPolicy

AnyPath = str | os.PathLike[str]

_MOST_LISTED = 20
_MOST_AT_ONCE = 1024
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What is asked, how, and what it is compared with.

    prompts: a spec of datasets; samples: answers to each setting, None for what prompts says or
    2000; base: the sampling, in which each of `others` changes something; against: a server or a
    file of the original, None for none; detect: the difference of shares that matters; at_once:
    questions at a time; seconds: that an answer may take; field: as for calibration. Of each of
    the two servers: the model, None for its only one, and the variable that holds its key.
    """

    prompts: str
    samples: int | None = None
    base: Sampling = field(default_factory=Sampling)
    others: Sequence[Mapping[str, Any]] = ()
    against: AnyPath | None = None
    detect: float = 0.02
    seed: int = 42
    at_once: int = 32
    seconds: float = ANSWER_SECONDS
    field: str | None = None
    served_model: str | None = None
    against_model: str | None = None
    api_key_env: str | None = None
    against_key_env: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for options that cannot be, alone or together."""
        require_detect(self.detect)
        if not 0 < self.at_once <= _MOST_AT_ONCE:
            raise UsageError("--parallel", f"{self.at_once} is not between 1 and {_MOST_AT_ONCE}")
        if not self.seconds > 0:
            raise UsageError("--timeout", f"{self.seconds:g} is not above 0")
        if not 0 <= self.seed < 2**31:
            raise UsageError("--seed", f"{self.seed} is not between 0 and {2**31 - 1:,}")
        for option, value in (
            ("--against-model", self.against_model),
            ("--against-key-env", self.against_key_env),
        ):
            if value is not None and self.server_against is None:
                raise UsageError(option, "is for a server, and --against names none")

    @property
    def server_against(self) -> str | None:
        """The address of the original's server, None where it is a file or nothing."""
        other = None if self.against is None else os.fspath(self.against)
        return other if other is not None and "://" in other else None

    @property
    def file_against(self) -> Path | None:
        """The report of the original's own probe, None where it is a server or nothing."""
        is_file = self.against is not None and self.server_against is None
        return Path(self.against) if is_file and self.against is not None else None


def probe(
    url: str,
    request: ProbeRequest,
    out: AnyPath,
    *,
    restart: bool = False,
    force: bool = False,
    policy: RetryPolicy = POLICY,
) -> ProbeReport:
    """Ask a server for free answers, count what is wrong with them, and write that as JSON.

    The answers are kept beside `out`, as `<name>.answers.jsonl`, and those of the original's
    server as `<name>.original.answers.jsonl`; what is there is not asked again. restart: discard
    them and ask everything; force: replace a probe of something else, and discard answers to other
    questions. Raises children of InputError for what cannot be used, NetworkError where a server
    fails; the answers stay.
    """
    places, settings = _Places.of(out), settings_of(request.base, request.others)
    keys = _keys(url, request)
    prompts = draw_prompts(request.prompts, request.samples, request.seed, request.field)
    require_distinct(prompts, settings)
    sha256 = prompts_sha256(prompts, request.seed)
    original: OriginalReport | None = None
    compared: Mapping[str, Counts] | None = None
    if request.file_against is not None:
        model, compared = counts_of(request.file_against, (sha256, len(prompts)), settings)
        original = OriginalReport(request.file_against.name, model)
    with ExitStack() as closing:
        served = [
            Served(server, model, prompts, settings, request.seed)
            for server, model in _connected(url, request, keys, policy, closing)
        ]
        for other in served[1:]:
            original = OriginalReport(other.server.location, other.model, places.original.name)
        digest = digest_of(served, request.detect, original and asdict(original), compared)
        output = places.output(digest, request, force or restart)
        sides = []
        for each, path in zip(served, (places.answers, places.original), strict=False):
            kept = closing.enter_context(KeptAnswers(path, restart=restart))
            sides.append(Side(each, kept, force))
        resumed = sum(len(side.kept) for side in sides)
        ask_all(sides, request.at_once)
        counts, *others = [side.counts() for side in sides]
        (compared,) = others or (compared,)
        report = ProbeReport(
            out=os.fspath(out),
            url=served[0].server.location,
            model=served[0].model,
            prompts=without_folders(request.prompts),
            records=len({(prompt.source, prompt.record) for prompt in prompts}),
            samples=len(prompts),
            seed=request.seed,
            detect=request.detect,
            prompts_sha256=sha256,
            request=digest,
            answers_file=places.answers.name,
            original=original,
            settings=_settings(sides[0], settings, counts, compared, request.detect),
            refusals=tuple(each for side in sides for each in side.refusals())[:_MOST_LISTED],
            resumed=resumed,
        )
        for side in sides:
            side.kept.sort(side.questions)
    return replace(report, written=output.write(_document(report)))


def _connected(
    url: str,
    request: ProbeRequest,
    keys: Sequence[str | None],
    policy: RetryPolicy,
    closing: ExitStack,
) -> list[tuple[CompletionServer, str]]:
    """The server, and the original's where there is one, with the models to ask. Raises UsageError
    where the two are one, and what `model_of` raises."""
    found = []
    models = (request.served_model, request.against_model)
    options = ("--served-model", "--against-model")
    for place, key, named, option in zip(
        (url, request.server_against), keys, models, options, strict=True
    ):
        if place is not None:
            server = CompletionServer(place, key, request.at_once, request.seconds, policy)
            closing.enter_context(server)
            found.append((server, model_of(server, named, option)))
    if len({(server.location, model) for server, model in found}) < len(found):
        raise UsageError("--against", "names the server and the model that are probed")
    return found


def _settings(
    side: Side,
    settings: Mapping[str, Sampling],
    counts: Mapping[str, Counts],
    original: Mapping[str, Counts] | None,
    detect: float,
) -> tuple[SettingReport, ...]:
    """What is reported of each setting. original: the counts there, of the settings it has."""
    return tuple(
        SettingReport(
            name,
            asdict(setting),
            *side.answered(name),
            failures(
                counts[name],
                (original or {}).get(name),
                None if name == BASE else counts[BASE],
                detect,
            ),
        )
        for name, setting in settings.items()
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Where things are written: the report, the answers, and those of the original's server."""

    report: Path
    answers: Path
    original: Path

    @classmethod
    def of(cls, out: AnyPath) -> _Places:
        """Those of a report's name. Raises UsageError for a name that is none, OutputError for a
        place that is none."""
        path = output_path(out)
        if path.suffix != ".json":
            raise UsageError(path, "does not end in .json", "write it like -o probe.json")
        answers, original = (
            path.with_name(f"{path.stem}{end}.jsonl") for end in (".answers", ".original.answers")
        )
        return cls(path, answers, original)

    def output(self, digest: str, request: ProbeRequest, force: bool) -> Output:
        """The report, which may take the place of one of the same request. Raises OutputError."""
        output = Output(self.report, "another probe", is_probe, force)
        output = output.apart_from([request.file_against])
        if self.report.is_file() and is_probe(self.report):
            if read_probe(self.report)["request"] != digest and not force:
                output.refuse()
            return replace(output, force=True)
        return output


def _keys(url: str, request: ProbeRequest) -> tuple[str | None, str | None]:
    """The keys of the two servers. The first is for the second too where their address is one."""
    key = _key(request.api_key_env, "--api-key-env")
    other = _key(request.against_key_env, "--against-key-env")
    if other is None and request.server_against is not None:
        alike = [parse_address(each) for each in (url, request.server_against)]
        same = origin(alike[0].geturl()) == origin(alike[1].geturl())
        other = key if same else None
    return key, other


def _key(variable: str | None, option: str) -> str | None:
    """The key that a variable of the environment holds.

    Raises UsageError, which never has in it what may be a key that was typed in its place.
    """
    if variable is None:
        return None
    if not _VARIABLE.fullmatch(variable):
        problem = "is not the name of an environment variable"
        raise UsageError(option, problem, "put the key into one, and name it here")
    key = os.environ.get(variable, "").strip()
    if not _KEY.fullmatch(key):
        problem = "holds what no key is made of" if key else "is not set"
        raise UsageError(option, f"the variable {variable} {problem}", f"export {variable} first")
    return key


def _document(report: ProbeReport) -> bytes:
    """The file of a report: without what depends on where it lies, and on what lay there."""
    document = report.to_dict()
    for name in ("out", "written", "resumed"):
        del document[name]
    return f"{json.dumps(document, indent=1, allow_nan=False)}\n".encode()
