"""`report`: a plan or a prune as one page that can be sent: saliencies, damage, answers, machines.

The page is one file that needs no network. It draws the map of saliencies itself, on a canvas: one
pixel for each expert, scaled, takes a few milliseconds for any model, and needs no library of a
megabyte in every file. The numbers lie in the page as JSON, in full; tables and curves are HTML and
SVG made here, so that they print, and are there for a reader without scripts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.checkpoint.provenance import LayerRecord
from shardsurgeon.checkpoint.recognition import EVALUATION, PAGE_MARK, SCORES
from shardsurgeon.checkpoint.wrong_files import require_file
from shardsurgeon.errors import ScoreError, UsageError, printable
from shardsurgeon.layerwise.calibration_file import find_calibration
from shardsurgeon.operations.page_content import Page, sections, summary
from shardsurgeon.operations.page_html import (
    Table,
    facts,
    paragraph,
    safe,
)
from shardsurgeon.operations.page_subject import (
    Subject,
    kept_beside,
    read_evaluation_of,
    read_subject,
    with_scores,
)
from shardsurgeon.operations.probe_report import read_probe
from shardsurgeon.pruning.fit import ASSUMED, Fit
from shardsurgeon.pruning.machines import FitRequest
from shardsurgeon.reports import Report, document
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.units import counted, format_size

AnyPath = str | os.PathLike[str]

_NO_ACCURACY = "A share of saliency is no accuracy: measure what the pruned model answers."
_KL = "mean KL, nats per token"
_MOST_NOTES = 20


@dataclass(frozen=True, slots=True, repr=False)
class PageReport(Report):
    """A page that was written. out: the file; holds: its sections, by name; nbytes: its size;
    written: False where it was there already.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> plan.write_plan("keep.json")
    True
    >>> shardsurgeon.report("keep.json", "report.html").holds
    ('map', 'cost', 'layers', 'origin', 'again')
    """

    out: str
    model: str
    layers: int
    num_experts: int
    holds: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]
    written: bool = True

    @property
    def title(self) -> str:
        """`Kimi-K2.5: 384 experts in 60 layers -> report.html`."""
        there = "" if self.written else ": there already"
        what = f"{self.num_experts} experts in {counted(self.layers, 'layer')}"
        return f"{self.model}: {what} -> {self.out}{there}"


def report_page(
    place: AnyPath,
    out: AnyPath,
    *,
    scores: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    probe: AnyPath | None = None,
    model: AnyPath | None = None,
    family: str | None = None,
    gpus: FitRequest | None = None,
    fit: Table | None = None,
    force: bool = False,
) -> PageReport:
    """Write a page about a plan.json, or about a folder that `apply` wrote.

    out: the .html file. scores: what the plan was made from; evaluation: of the unpruned model; of
    a folder, by default those that it keeps. probe: of the pruned model, served. model: of
    a plan, for its sizes; family: as for `plan`. gpus: machines that the page says the room of, for
    which a plan needs its model; fit: such a table that is made already. force: replace another
    page. Raises KeepListError, CheckpointError, ScoreError or UsageError for a file that is
    missing, broken, or about another model.
    """
    given = [Path(each) for each in (place, scores, evaluation, probe) if each is not None]
    output = Output(output_path(out), "a report", is_page, force).apart_from(given)
    subject = read_subject(place, model, family)
    if subject.is_prune and model is not None:
        problem = f"gives sizes to a plan, and {os.fspath(place)} is a pruned model"
        raise UsageError("--model", problem, "leave it out")
    if gpus is not None and model is None and not subject.is_prune:
        problem = f"says what {os.fspath(place)} leaves of GPUs, and its model is not named"
        raise UsageError("--gpus", problem, "name it with --model")
    if subject.is_prune:
        scores = scores or _kept(place, SCORES, partial(_scored, subject))
        checked = partial(read_evaluation_of, subject=subject)
        evaluation = evaluation or _kept(place, EVALUATION, checked)
    if gpus is not None:
        fit = _room(place if model is None else model, family, subject, gpus)
    said: Mapping[str, object] = {}
    if scores is not None:
        subject, said = _scored(subject, scores)
    found = None if evaluation is None else read_evaluation_of(evaluation, subject)
    page = Page(
        subject=subject,
        files={
            option: os.fspath(file)
            for option, file in {
                "--scores": scores,
                "--evaluation": evaluation,
                "--probe": probe,
                "--model": model,
            }.items()
            if file is not None
        }
        | ({} if gpus is None else gpus.options),
        scores_facts=said,
        evaluation=found,
        probe=None if probe is None else read_probe(Path(probe)),
        fit=fit,
        keeps=subject.keep.layers,
    )
    shown = {"map": _part("page_map.html")}
    shown |= {name: text for name, text in sections(page) if text}
    data = _html(page, "".join(shown.values()))
    written = output.write(data)
    notes = subject.notes
    if subject.sizes is None:
        notes += ("the page has no sizes: --model names the plan's model",)
    return PageReport(
        out=os.fspath(out),
        model=subject.source.name,
        layers=len(subject.layers),
        num_experts=subject.num_experts,
        holds=tuple(shown),
        nbytes=len(data),
        notes=notes,
        written=written,
    )


def _room(model: AnyPath, family: str | None, subject: Subject, gpus: FitRequest) -> Table:
    """What a prune leaves of machines. model: the pruned folder, or the one that a plan is of."""
    checkpoint = open_model(model, family, follow_links=True)
    anatomy = read_anatomy(checkpoint)
    fit = Fit(checkpoint, anatomy, gpus)
    kept = anatomy.experts_per_layer
    if not subject.is_prune:
        kept = {n: len(keep.retained) for n, keep in subject.keep.layers.items()}
    rows = []
    for machine in gpus.machines:
        found = fit.on(machine, [kept])
        if not found.rows:
            rows.append([found.machine, found.problem or "-", "-", "-", "-"])
            continue
        (row,) = found.rows
        cells = [format_size(row.weights_nbytes), format_size(max(row.cache_nbytes, 0))]
        cells += [f"{row.tokens:,}", f"{row.longest_context:,}" if row.longest_context else "-"]
        rows.append([found.machine, *cells])
    headings = ["machine", "weights per GPU", "KV cache per GPU", "KV tokens", "longest context"]
    sequences = counted(gpus.sequences, "sequence")
    legend = f"Longest context: of {sequences} at a time. Computed from headers and config, with:"
    return Table(headings, rows, (legend, *ASSUMED))


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    try:
        with path.open("rb") as file:
            return PAGE_MARK in file.read(256)
    except OSError:
        return False


def _kept(place: AnyPath, kind: str, check: Callable[[Path], object]) -> Path | None:
    """The file of a kind that a prune keeps, where it is about that prune; it need not be.

    check: raises ScoreError where it is not.
    """
    file = kept_beside(place, kind)
    try:
        return None if file is None or check(file) is None else file
    except ScoreError:
        return None


def _scored(subject: Subject, file: AnyPath) -> tuple[Subject, dict[str, object]]:
    """With the scores of a file, and what it says of how they were made."""
    require_file(file, SCORES, ScoreError)
    scores = read_scores(file)
    return with_scores(subject, scores), _said_of(file, scores.facts)


def _said_of(file: AnyPath, beside: Mapping[str, object]) -> dict[str, object]:
    """What a score file says of how it was made."""
    calibration = find_calibration(file)
    if calibration is None:
        return dict(beside)
    known = ("model", "dataset", "seed", "max_length", "dtype")
    settings = calibration.settings
    made = {key: settings[key] for key in known if settings.get(key) is not None}
    tokens = sum(sample[2] for sample in calibration.samples)
    return {**made, "samples": calibration.num_samples, "tokens": tokens}


def _html(page: Page, body: str) -> bytes:
    """The whole file. The page may run this script and no other, and load nothing."""
    style, script, frame = (_part(f"page.{kind}") for kind in ("css", "js", "html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "mark": PAGE_MARK.decode(),
        "digest": digest,
        "title": safe(page.title),
        "style": style,
        "script": script,
        "summary": facts(summary(page)) + "".join(map(paragraph, page.subject.notes)),
        "body": body,
        "data": _embedded(page),
        "version": safe(__version__),
    }
    return Template(frame).substitute(values).encode("utf-8", "backslashreplace")


def _embedded(page: Page) -> str:
    """The numbers as JSON in which nothing ends a script."""
    subject = page.subject
    found = document(
        {
            "model": subject.source.name,
            "metric": subject.selection.get("metric"),
            "n_group": subject.n_group,
            "layers": [_layer(subject, n, each) for n, each in sorted(subject.layers.items())],
        }
    )
    text = printable(json.dumps(found, allow_nan=False, separators=(",", ":")))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _layer(subject: Subject, number: int, record: LayerRecord) -> dict[str, object]:
    known = any(value is not None for value in record.saliency)
    return {
        "layer": number,
        "mtp": number not in subject.main,
        "policy": record.policy,
        "retained": record.retained,
        "pruned": record.pruned,
        "preserved": record.preserved,
        "saliency": record.saliency if known else None,
        "frequency": subject.frequency.get(number),
    }


def _part(name: str) -> str:
    """A file beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
