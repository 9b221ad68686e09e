"""What stands on a page, section by section: damage, answers, layers, where it comes from.

All of it is HTML and SVG made here, so that it prints, and is there for a reader without scripts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from shardsurgeon._version import __version__
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.damage import LayerDamage
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    by_plan,
    by_way,
    candidate_of,
)
from shardsurgeon.operations.page_commands import commands, plain_name, without_folders
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
from shardsurgeon.operations.page_subject import Subject
from shardsurgeon.pruning.analysis import lost_shares
from shardsurgeon.pruning.keep_lists import LayerKeep, keep_sha256
from shardsurgeon.pruning.selection import dropped_share, saliency_cut
from shardsurgeon.units import counted, format_size, number_ranges, percent

_NO_ACCURACY = "A share of saliency is no accuracy: measure what the pruned model answers."
_KL = "mean KL, nats per token"


@dataclass(frozen=True)
class Page:
    """What a page is made from. files: option → file, of those that were given, and the score file
    that a prune keeps; fit: a table of machines."""

    subject: Subject
    files: Mapping[str, str]
    scores_facts: Mapping[str, object]
    evaluation: EvaluationReport | None
    probe: Mapping[str, Any] | None
    fit: Table | None
    keeps: Mapping[int, LayerKeep] = field(repr=False)

    @cached_property
    def measured(self) -> CandidateDamage | None:
        """What the evaluation says of just these keep-lists."""
        return (
            None
            if self.evaluation is None
            else candidate_of(self.evaluation, keep_sha256(self.subject.keep, self.subject.main))
        )

    @cached_property
    def lost(self) -> dict[int, float]:
        """Layer → the share of its saliency that goes, of those whose shares mean something."""
        shares = {n: dropped_share(keep) for n, keep in self.keeps.items()}
        by_norm = {n for n, each in self.subject.layers.items() if each.policy == "router-norm"}
        return {n: share for n, share in shares.items() if share is not None and n not in by_norm}

    @property
    def title(self) -> str:
        """`Kimi-K2.5: 135 of 384 experts kept in each of 60 MoE layers`."""
        layers = self.subject.layers.values()
        kept = sorted({len(each.retained) for each in layers})
        before = sorted({each.num_experts for each in layers})
        counts = (str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (kept, before))
        where = f"in each of {counted(len(layers), 'MoE layer')}"
        return f"{self.subject.source.name}: {' of '.join(counts)} experts kept {where}"


def summary(page: Page) -> Iterator[tuple[str, str]]:
    """The most needed facts: name and value."""
    sizes, measured = page.subject.sizes, page.measured
    if sizes is not None:
        share = percent(sizes.after / sizes.before)
        yield "size", f"{format_size(sizes.before)} → {format_size(sizes.after)} ({share})"
    if page.lost:
        worst, layer = max((share, n) for n, share in page.lost.items())
        mean = percent(sum(page.lost.values()) / len(page.lost))
        yield "saliency dropped", f"{mean} on average, {percent(worst)} at worst (layer {layer})"
    if measured is not None:
        damage = measured.damage
        assert page.evaluation is not None
        before = page.evaluation.original.perplexity
        yield "perplexity", f"{before:.4g} → {damage.perplexity:.4g}"
        same = percent(damage.agreement)
        yield "mean KL", f"{damage.kl_mean:.3g} nats, same first choice {same}"


def sections(page: Page) -> Iterator[tuple[str, str]]:
    """The parts below the map, by name, in order; "" where there is nothing to show."""
    yield "cost", section("cost", "What it costs", *_cost(page))
    yield "answers", section("answers", "What it answers", *_answers(page))
    fit = "" if page.fit is None else table(page.fit)
    yield "machines", section("machines", "Where it fits", fit)
    yield "layers", section("layers", "Layer by layer", table(_layers(page)))
    yield "origin", section("origin", "Where it comes from", facts(_origin(page)))
    lines = "\n".join(commands(page.subject, page.files, page.evaluation))
    again = f"<pre tabindex=0><code>{safe(lines)}</code></pre>"
    yield "again", section("again", "To make it again", again)


def _cost(page: Page) -> Iterator[str]:
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
    yield table(_damage(page, found))
    if page.measured is None:
        yield paragraph("The evaluation did not measure the keep-lists of this page.")


def _damage_series(page: Page, found: EvaluationReport) -> list[Series]:
    """A line for each way of choosing, over the ratios; plans by their names are points."""
    start = Point(0.0, 0.0, "the whole model")

    def point(each: CandidateDamage) -> Point:
        label = f"{each.name}: KL {each.damage.kl_mean:.3g}, {percent(each.removed)} removed"
        return Point(each.removed, each.damage.kl_mean, label, each is page.measured)

    lines = [
        Series(way or "by ratio", [start, *map(point, candidates)])
        for way, candidates in by_way(found).items()
    ]
    others = [point(each) for each in by_plan(found)]
    return [*lines, *([Series("other plans", others, joined=False)] if others else [])]


def _saliency_curve(page: Page) -> list[Series]:
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
        pairs = list(zip(at.tolist(), values.tolist(), strict=True))[::4]
        return Series(name, [Point(x, y, f"{x:.0%}: {percent(y)}") for x, y in pairs])

    return [
        along("mean of the layers", stacked.mean(axis=0)),
        along("the layer that loses most", stacked.max(axis=0)),
    ]


def _damage(page: Page, found: EvaluationReport) -> Table:
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
        cells += [f"{damage.perplexity:.4g}", f"{100 * (each.perplexity_ratio - 1):+.1f} %"]
        cells += [f"{damage.kl_mean:.3g}", f"{damage.kl_p99:.3g}", percent(damage.agreement)]
        cells += [format_size(sizes.at(each.removed))] if sizes is not None else []
        rows.append(cells)
    tokens = f"{counted(found.predicted, 'token')} of {counted(found.samples, 'sample')}"
    legend = f"On {tokens} of {without_folders(found.dataset)}."
    legend += " KL: in nats per token, of a candidate from the model."
    return Table(headings, rows, [legend, *found.notes])


def _answers(page: Page) -> list[str]:
    if page.probe is None:
        return []
    try:
        return [*_answer_parts(page.probe)]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"is not what a probe wrote ({type(error).__name__}: {str(error)[:80]})"
        raise UsageError(page.files["--probe"], problem, "probe again") from error


def _answer_parts(probe: Mapping[str, Any]) -> Iterator[str]:
    for setting in probe["settings"]:
        rows, differences = [], []
        for each in setting["failures"]:
            share, low, high = (float(each[key]) for key in ("share", "low", "high"))
            counts = f"{each['count']:,} of {each['answers']:,}"
            said = "{:.2f} % [{:.2f} %, {:.2f} %]".format(*(100 * x for x in (share, low, high)))
            cells = [str(each["kind"]), counts, said]
            rows.append((cells, (low, share, high)))
            for key, name in (("to_original", "the original"), ("to_base", "the base setting")):
                if (other := each.get(key)) is not None:
                    differences.append([str(each["kind"]), name, *_difference(other)])
        yield f"<h3>{safe(setting.get('name', ''))}</h3>"
        yield interval_table(["answers that", "count", "share [95 %]"], rows)
        if differences:
            headings = ["answers that", "less those of", "difference [95 %]", "verdict"]
            yield table(Table(headings, differences))
    words = f"{probe['model']}, {counted(probe['samples'], 'question')} for each setting"
    yield paragraph(f"Asked: {words}. Intervals: Wilson's; of differences, Newcombe's.")


def _difference(other: Mapping[str, Any]) -> list[str]:
    ends = (100 * float(other[key]) for key in ("difference", "low", "high"))
    value, low, high = (f"{end:+.2f} %" for end in ends)
    return [f"{value} [{low}, {high}]", str(other["verdict"])]


def _layers(page: Page) -> Table:
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
            "saliency dropped": percent(page.lost[number]) if number in page.lost else "",
            "relative error": f"{damage[number].relative_error:.3g}" if number in damage else "",
            "weight lost": _weight_lost(damage.get(number)),
            "chosen by": "" if record.policy == "scores" else record.policy,
        }
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    mtp = len(page.subject.main) < len(page.subject.layers)
    legend = ["* next-token-prediction layer"] if mtp else []
    return Table([*shown], list(zip(*shown.values(), strict=True)), legend)


def _weight_lost(found: LayerDamage | None) -> str:
    return "" if found is None or found.lost_weight is None else percent(found.lost_weight)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _origin(page: Page) -> Iterator[tuple[str, str]]:
    subject, found, probe = page.subject, page.evaluation, page.probe
    source, chosen = subject.source, subject.selection
    yield "model", source.name
    yield "revision", source.revision or ""
    yield "config.json", f"sha256 {source.config_sha256}" if source.config_sha256 else ""
    yield "layers", number_ranges(sorted(subject.layers))
    yield "chosen by", ", ".join(f"{k} {v}" for k, v in chosen.items() if v is not None)
    yield "prunes", str(subject.steps) if subject.steps > 1 else ""
    yield "scores", plain_name(page.files.get("--scores", ""))
    yield "calibration", ", ".join(f"{k} {v}" for k, v in page.scores_facts.items())
    if found is not None:
        data = without_folders(found.dataset)
        words = f"{data}, {found.samples:,} samples, {found.predicted:,} tokens"
        yield "evaluation", f"{words}, {found.dtype} on {found.device}"
    if probe is not None:
        known = ("model", "prompts", "samples", "seed", "prompts_sha256")
        words = ", ".join(f"{key} {probe[key]}" for key in known if key in probe)
        yield "probe", without_folders(words)
    yield "made by", f"shardsurgeon {__version__}"
