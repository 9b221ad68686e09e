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
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from shardsurgeon._version import __version__
from shardsurgeon.checkpoint.provenance import LayerRecord
from shardsurgeon.checkpoint.recognition import SCORES
from shardsurgeon.checkpoint.wrong_files import require_file
from shardsurgeon.errors import ScoreError, printable
from shardsurgeon.layerwise.calibration_file import find_calibration
from shardsurgeon.operations.evaluation_report import CandidateDamage, EvaluationReport
from shardsurgeon.operations.model_card import address
from shardsurgeon.operations.page_html import (
    Point,
    Series,
    Table,
    curve,
    facts,
    interval_table,
    paragraph,
    safe,
    section,
    table,
)
from shardsurgeon.operations.page_subject import (
    Subject,
    candidate_of,
    read_evaluation_of,
    read_subject,
    scores_beside,
    with_scores,
)
from shardsurgeon.operations.probe_report import read_probe
from shardsurgeon.pruning.analysis import lost_shares
from shardsurgeon.pruning.keep_lists import LayerKeep
from shardsurgeon.pruning.selection import dropped_share, saliency_cut
from shardsurgeon.reports import Report, document
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.files import Output, output_path
from shardsurgeon.units import counted, format_size, number_ranges, percent

AnyPath = str | os.PathLike[str]

_HERE = Path(__file__)
_MARK = b"<!-- shardsurgeon report -->"
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


@dataclass(frozen=True)
class _Page:
    """What a page is made from. fit: a table of machines; command: what was typed."""

    subject: Subject
    scores: str | None
    scores_facts: Mapping[str, object]
    evaluation: EvaluationReport | None
    evaluation_file: str
    probe: Mapping[str, Any] | None
    fit: Table | None
    command: str
    keeps: Mapping[int, LayerKeep] = field(repr=False)

    @cached_property
    def measured(self) -> CandidateDamage | None:
        """What the evaluation says of just these keep-lists."""
        return None if self.evaluation is None else candidate_of(self.subject, self.evaluation)

    @property
    def title(self) -> str:
        """`Kimi-K2.5: 135 of 384 experts kept in each of 60 MoE layers`."""
        layers = self.subject.layers.values()
        kept = sorted({len(each.retained) for each in layers})
        before = sorted({each.num_experts for each in layers})
        counts = (str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (kept, before))
        where = f"in each of {counted(len(layers), 'MoE layer')}"
        return f"{self.subject.source.name}: {' of '.join(counts)} experts kept {where}"


def report_page(
    place: AnyPath,
    out: AnyPath,
    *,
    scores: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    probe: AnyPath | None = None,
    model: AnyPath | None = None,
    family: str | None = None,
    fit: Table | None = None,
    force: bool = False,
    command: str = "",
) -> PageReport:
    """Write a page about a plan.json, or about a folder that `apply` wrote.

    out: the .html file. scores: what the plan was made from; of a folder, by default the score file
    that it keeps. evaluation: of the unpruned model. probe: of the pruned model, served. model: of
    a plan, for its sizes; family: as for `plan`. fit: which machines it fits. force: replace
    another page; command: what was typed. Raises KeepListError, CheckpointError, ScoreError or
    UsageError for a file that is missing, broken, or about another model.
    """
    given = [Path(each) for each in (place, scores, evaluation, probe) if each is not None]
    output = Output(output_path(out), "a report", is_page, force).apart_from(given)
    subject = read_subject(place, model, family)
    beside = scores_beside(place) if scores is None and subject.is_prune else None
    said: Mapping[str, object] = {}
    if scores is not None or beside is not None:
        file = scores or beside
        assert file is not None
        require_file(file, SCORES, ScoreError)
        table_of = read_scores(file)
        try:
            subject = with_scores(subject, table_of)
            said = _said_of(file, table_of.facts)
        except ScoreError:
            # What a prune keeps need not be what decided; what the user names must be.
            if scores is not None:
                raise
            beside = None
    found = None if evaluation is None else read_evaluation_of(evaluation, subject)
    page = _Page(
        subject=subject,
        scores=None if (file := scores or beside) is None else os.fspath(file),
        scores_facts=said,
        evaluation=found,
        evaluation_file=os.fspath(evaluation or ""),
        probe=None if probe is None else read_probe(Path(probe)),
        fit=fit,
        command=command,
        keeps=subject.keep.layers,
    )
    sections = {name: text for name, text in _sections(page) if text}
    data = _html(page, "".join(sections.values()))
    written = output.write(data)
    names = tuple(sections)
    count = len(subject.layers)
    facts_of = (os.fspath(out), subject.source.name, count, subject.num_experts)
    return PageReport(*facts_of, names, len(data), subject.notes, written)


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    try:
        with path.open("rb") as file:
            return _MARK in file.read(256)
    except OSError:
        return False


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


def _html(page: _Page, body: str) -> bytes:
    """The whole file. The page may run this script and no other, and load nothing."""
    style, script, frame = (
        _HERE.with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "mark": _MARK.decode(),
        "digest": digest,
        "title": safe(page.title),
        "style": style,
        "script": script,
        "summary": facts(_summary(page)) + "".join(map(paragraph, page.subject.notes)),
        "body": body,
        "data": _embedded(page),
        "version": safe(__version__),
    }
    return Template(frame).substitute(values).encode("utf-8", "backslashreplace")


def _embedded(page: _Page) -> str:
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


def _summary(page: _Page) -> Iterator[tuple[str, str]]:
    sizes, measured = page.subject.sizes, page.measured
    if sizes is not None:
        share = percent(sizes.after / sizes.before)
        yield "size", f"{format_size(sizes.before)} → {format_size(sizes.after)} ({share})"
    lost = _lost(page)
    if lost:
        worst, layer = max((share, n) for n, share in lost.items())
        mean = percent(sum(lost.values()) / len(lost))
        yield "saliency dropped", f"{mean} on average, {percent(worst)} at worst (layer {layer})"
    if measured is not None:
        damage = measured.damage
        assert page.evaluation is not None
        before = page.evaluation.original.perplexity
        yield "perplexity", f"{before:.4g} → {damage.perplexity:.4g}"
        same = percent(damage.agreement)
        yield "mean KL", f"{damage.kl_mean:.3g} nats, same first choice {same}"


def _lost(page: _Page) -> dict[int, float]:
    """Layer → the share of its saliency that goes, of those whose shares mean something."""
    shares = {n: dropped_share(keep) for n, keep in page.keeps.items()}
    by_norm = {n for n, each in page.subject.layers.items() if each.policy == "router-norm"}
    return {n: share for n, share in shares.items() if share is not None and n not in by_norm}


def _sections(page: _Page) -> Iterator[tuple[str, str]]:
    """The parts of the page, by name, in order; "" where there is nothing to show."""
    yield "map", _HERE.with_name("page_map.html").read_text(encoding="utf-8")
    yield "cost", section("cost", "What it costs", *_cost(page))
    yield "answers", section("answers", "What it answers", *_answers(page.probe))
    fit = "" if page.fit is None else table(page.fit)
    yield "machines", section("machines", "Where it fits", fit)
    yield "layers", section("layers", "Layer by layer", table(_layers(page)))
    yield "origin", section("origin", "Where it comes from", facts(_origin(page)))
    commands = "\n".join(printable(line) for line in _commands(page))
    again = f"<pre tabindex=0><code>{safe(commands)}</code></pre>"
    yield "again", section("again", "To make it again", again)


def _cost(page: _Page) -> Iterator[str]:
    found, sizes = page.evaluation, page.subject.sizes
    size = None if sizes is None else sizes.at

    def text(nbytes: float) -> str:
        return format_size(round(nbytes))

    if found is None:
        series = _saliency_curve(page)
        if series:
            yield curve(series, "share of saliency dropped", size, text)
            yield paragraph("Experts of the lowest saliency go first, as many from every layer.")
            yield paragraph(_NO_ACCURACY)
        return
    yield curve(_damage_series(page, found), _KL, size, text)
    if sizes is None:
        yield paragraph("Sizes are on the curve where the model is given with --model.")
    yield table(_damage(page, found))
    if page.measured is None:
        yield paragraph("The evaluation did not measure the keep-lists of this page.")


def _damage_series(page: _Page, found: EvaluationReport) -> list[Series]:
    """A line for each way of choosing, over the ratios; plans by their names are points."""
    lines: dict[str, list[Point]] = {}
    for each in found.candidates:
        first, _, rest = each.name.partition(" ")
        is_ratio = first.replace(".", "", 1).isdecimal()
        name = (rest or "by ratio") if is_ratio else "other plans"
        label = f"{each.name}: KL {each.damage.kl_mean:.3g}, {percent(each.removed)} removed"
        point = Point(each.removed, each.damage.kl_mean, label, each is page.measured)
        lines.setdefault(name, []).append(point)
    start = Point(0.0, 0.0, "the whole model")
    return [
        Series(name, points if name == "other plans" else [start, *points], name != "other plans")
        for name, points in lines.items()
    ]


def _saliency_curve(page: _Page) -> list[Series]:
    """What would go of each layer's saliency at every share of experts removed."""
    rows = []
    for number in page.subject.main:
        saliency = page.subject.layers[number].saliency
        values = np.array([np.nan if value is None else value for value in saliency])
        if (lost := lost_shares(values)) is not None:
            share = np.linspace(0, 1, len(lost))
            rows.append(np.interp(np.linspace(0, 1, 41), share, lost))
    if not rows:
        return []
    stacked = np.stack(rows)
    at = np.linspace(0, 1, 41)

    def along(name: str, values: np.ndarray[Any, Any]) -> Series:
        pairs = list(zip(at.tolist(), values.tolist(), strict=True))[:: 4]
        return Series(name, [Point(x, y, f"{x:.0%}: {percent(y)}") for x, y in pairs])

    return [
        along("mean of the layers", stacked.mean(axis=0)),
        along("the layer that loses most", stacked.max(axis=0)),
    ]


def _damage(page: _Page, found: EvaluationReport) -> Table:
    headings = ["", "kept", "removed", "perplexity", "change", "KL mean", "KL p99", "same choice"]
    sizes = page.subject.sizes
    headings += ["size, about"] if sizes is not None else []
    whole = found.original.perplexity
    rows = [["the whole model", str(found.num_experts), "0 %", f"{whole:.4g}", "", "", "", ""]]
    rows[0] += [format_size(sizes.before)] if sizes is not None else []
    for each in found.candidates:
        damage = each.damage
        mark = " (this page)" if each is page.measured else ""
        cells = [f"{each.name}{mark}", str(each.kept), percent(each.removed)]
        cells += [f"{damage.perplexity:.4g}", f"{damage.perplexity / whole - 1:+.1%}"]
        cells += [f"{damage.kl_mean:.3g}", f"{damage.kl_p99:.3g}", percent(damage.agreement)]
        cells += [format_size(sizes.at(each.removed))] if sizes is not None else []
        rows.append(cells)
    tokens = f"{counted(found.predicted, 'token')} of {counted(found.samples, 'sample')}"
    legend = f"On {tokens} of {found.dataset}. KL: in nats per token, of a candidate from the model."
    return Table(headings, rows, [legend, *found.notes[:_MOST_NOTES]])


def _answers(probe: Mapping[str, Any] | None) -> Iterator[str]:
    if probe is None:
        return
    for setting in probe["settings"]:
        rows, differences = [], []
        for each in setting["failures"]:
            share, low, high = (float(each[key]) for key in ("share", "low", "high"))
            counts = f"{each['count']:,} of {each['answers']:,}"
            cells = [str(each["kind"]), counts, f"{share:.2%} [{low:.2%}, {high:.2%}]"]
            rows.append((cells, (low, share, high)))
            for key, name in (("to_original", "the original"), ("to_base", "the base setting")):
                if (other := each.get(key)) is not None:
                    differences.append([str(each["kind"]), name, *_difference(other)])
        yield f"<h3>{safe(setting.get('name', ''))}</h3>"
        yield interval_table(["answers that", "count", "share [95 %]", ""][:3], rows)
        if differences:
            headings = ["answers that", "less those of", "difference [95 %]", "verdict"]
            yield table(Table(headings, differences))
    words = f"{probe['model']}, {counted(probe['samples'], 'question')} for each setting"
    yield paragraph(f"Asked: {words}. Intervals: Wilson's; of differences, Newcombe's.")


def _difference(other: Mapping[str, Any]) -> list[str]:
    ends = (100 * float(other[key]) for key in ("difference", "low", "high"))
    value, low, high = (f"{end:+.2f} %" for end in ends)
    return [f"{value} [{low}, {high}]", str(other["verdict"])]


def _layers(page: _Page) -> Table:
    damage = {} if page.measured is None else {each.layer: each for each in page.measured.layers}
    columns: dict[str, list[str]] = {}
    for number, record in sorted(page.subject.layers.items()):
        low, high = saliency_cut(page.keeps[number])
        counted_here = page.subject.frequency.get(number)
        never = None if counted_here is None else sum(value == 0 for value in counted_here)
        cells = {
            "layer": f"{number}{'' if number in page.subject.main else '*'}",
            "kept": str(len(record.retained)),
            "pruned": str(len(record.pruned)),
            "preserved": str(len(record.preserved) or ""),
            "never routed": "" if never is None else str(never),
            "lowest kept": _short(low),
            "highest pruned": _short(high),
            "saliency dropped": "" if (at := _lost_at(page, number)) is None else percent(at),
            "relative error": f"{damage[number].relative_error:.3g}" if number in damage else "",
            "weight lost": percent(damage[number].lost_weight) if number in damage else "",
            "chosen by": "" if record.policy == "scores" else record.policy,
        }
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    mtp = len(page.subject.main) < len(page.subject.layers)
    legend = ["* next-token-prediction layer"] if mtp else []
    return Table([*shown], list(zip(*shown.values(), strict=True)), legend)


def _lost_at(page: _Page, number: int) -> float | None:
    return _lost(page).get(number)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _origin(page: _Page) -> Iterator[tuple[str, str]]:
    subject, found, probe = page.subject, page.evaluation, page.probe
    source, chosen = subject.source, subject.selection
    yield "model", source.name
    yield "revision", source.revision or ""
    yield "config.json", f"sha256 {source.config_sha256}" if source.config_sha256 else ""
    yield "layers", number_ranges(sorted(subject.layers))
    yield "chosen by", ", ".join(f"{k} {v}" for k, v in chosen.items() if v is not None)
    yield "prunes", str(subject.steps) if subject.steps > 1 else ""
    yield "scores", page.scores or ""
    yield "calibration", ", ".join(f"{k} {v}" for k, v in page.scores_facts.items())
    if found is not None:
        words = f"{found.dataset}, {found.samples:,} samples, {found.predicted:,} tokens"
        yield "evaluation", f"{words}, {found.dtype} on {found.device}"
    if probe is not None:
        known = ("url", "prompts", "samples", "seed", "prompts_sha256")
        yield "probe", ", ".join(f"{key} {probe[key]}" for key in known if key in probe)
    yield "made by", f"shardsurgeon {__version__}"


def _commands(page: _Page) -> Iterator[str]:
    """What was done, as far as the files say it; words in capitals are for the reader to fill."""
    subject, chosen = page.subject, page.subject.selection
    model, scores = address(subject.source), page.scores or "SCORES"
    if subject.is_prune:
        plan = [*_program("apply"), "--plan", f"{subject.origin}/calibration/…"]
        plan[-1] = os.path.join(subject.origin, "calibration", "reap_pruning_metadata.json")
        yield shlex.join([*plan, "--model", model])
        yield shlex.join([*_program("verify"), model, subject.origin])
    else:
        words = [*_program("plan"), scores, *_how_many(chosen), "--model", model]
        if chosen.get("selection") != "plan":
            yield shlex.join([*words, "-o", subject.origin])
        yield shlex.join([*_program("apply"), "--plan", subject.origin, "--model", model])
    if page.evaluation is not None:
        ratios = ",".join(
            first
            for each in page.evaluation.candidates
            if (first := each.name.partition(" ")[0]).replace(".", "", 1).isdecimal()
        )
        measured = ["--ratio", ratios] if ratios else ["--plan", subject.origin]
        words = [*_program("evaluate"), *([scores] if ratios else []), *measured]
        words += ["--model", model, "--dataset", page.evaluation.dataset]
        yield shlex.join([*words, "-o", page.evaluation_file])
    if page.command:
        yield page.command


def _program(command: str) -> tuple[str, str]:
    return "shardsurgeon", command


def _how_many(chosen: Mapping[str, Any]) -> Sequence[str]:
    """The options that a plan says it was made with."""
    by_ratio = chosen.get("selection") == "ratio" and chosen.get("ratio") is not None
    words = ["--ratio", str(chosen["ratio"])] if by_ratio else ["--keep", str(chosen.get("kept"))]
    usual = {"rounding": "floor", "metric": "reap", "allocate": "uniform", "mtp": "router-norm"}
    for name, default in usual.items():
        if chosen.get(name) not in (None, default):
            words += [f"--{name}", str(chosen[name])]
    return words
