"""The layers of a plan as a table, all of them or their spread and the worst, and as pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from shardsurgeon.cli.output import (
    layer_number,
    mtp_legend,
    no_accuracy,
    percent,
    saliency,
    table,
    width,
)
from shardsurgeon.pruning.request import MtpPolicy

if TYPE_CHECKING:
    from shardsurgeon.pruning.report import LayerReport

# A table of so many layers is no longer than what would stand in its place.
_FEW = 10
_WORST = 5
# From nothing to the tallest, and where a cut is; for terminals that can print them, and others.
_BLOCKS, _LETTERS = (" ▁▂▃▄▅▆▇█", "│"), (" .:-=+*%#", "|")
_SPREAD = ("lowest", "25%", "median", "75%", "highest")


def _count(value: float) -> str:
    return f"{value:g}"


# Heading → field of a layer, and how it is written. Columns without a value are left out.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kept": ("kept", _count),
    "pruned": ("pruned", _count),
    "never\nrouted": ("never_routed", _count),
    "pre-\nserved": ("preserved", _count),
    "lowest\nkept": ("min_retained_saliency", saliency),
    "highest\npruned": ("max_pruned_saliency", saliency),
    "saliency\ndropped": ("saliency_dropped", percent),
    "dropped,\nif equal": ("saliency_dropped_uniform", percent),
    "chosen\nby": ("policy", str),
}
_ALWAYS, _ONLY_IF_ANY = ("kept", "pruned"), ("never_routed", "preserved")


def layer_lines(
    layers: Sequence[LayerReport], *, every: bool, measuring: Sequence[str]
) -> Iterator[str]:
    """The table of a plan's layers and its legends; every: all of them, however many; measuring:
    as for `no_accuracy`."""
    headings = [heading for heading in _COLUMNS if _has_value(layers, heading)]
    if every or len(layers) <= _FEW:
        rows = [_row(layer, headings) for layer in layers]
        yield from table(("layer", *headings), rows)
        yield from mtp_legend(layers)
    else:
        yield from _summary(layers, headings)
    if every:
        yield from profile_lines((layer_number(x), x.profile, _share_kept(x)) for x in layers)
    if "saliency\ndropped" in headings:
        yield "  saliency dropped: share of a layer's saliency that goes with its experts"
        yield from no_accuracy(measuring)


def profile_lines(
    layers: Iterable[tuple[str, str, float | None]], meaning: str = ""
) -> Iterator[str]:
    """A line for each layer that has saliencies: these from the highest down, and the cut.

    layers: (number, profile, the share of the experts before the cut, None for no cut); meaning: of
    the cut. In blocks, or where stdout cannot print them in ASCII.
    """
    rows = [layer for layer in layers if layer[1]]
    if not rows:
        return
    letters, cut = _BLOCKS if _prints("".join(_BLOCKS)) else _LETTERS
    label = max(len(number) for number, *_ in rows)
    yield ""
    for number, profile, share in rows:
        every = -(-len(profile) // (width() - label - 5))
        drawn = "".join(letters[int(digit)] for digit in profile[::every])
        if share is not None:
            place = round(share * len(drawn))
            drawn = f"{drawn[:place]}{cut}{drawn[place:]}"
        yield f"  {number:>{label}}  {drawn}".rstrip()
    yield f"  heights: roots of saliencies, the highest first; {cut} the cut{meaning}"


def _share_kept(layer: LayerReport) -> float:
    return layer.kept / (layer.kept + layer.pruned)


def _prints(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def scored(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Without the layers that were chosen by router norms, having no saliency."""
    return [layer for layer in layers if layer.policy != MtpPolicy.ROUTER_NORM]


def _summary(layers: Sequence[LayerReport], headings: Sequence[str]) -> Iterator[str]:
    measured = scored(layers) or list(layers)
    spread = [
        _spread([_value(layer, heading) for layer in measured], heading) for heading in headings
    ]
    rows = [(label, *cells) for label, *cells in zip(_SPREAD, *spread, strict=True)]
    losing = [layer for layer in measured if layer.saliency_dropped is not None]
    worst = sorted(losing, key=_loss, reverse=True)[:_WORST]
    others = [layer for layer in layers if layer not in measured]
    shown = [*worst, *others]
    if shown:
        rows += [("",) * (len(headings) + 1), *(_row(layer, headings) for layer in shown)]
    yield from table(("layer", *headings), rows)
    yield from mtp_legend(shown)
    what = (
        f"the {len(worst)} that lose most of {len(layers)} layers"
        if worst
        else f"{len(layers)} layers"
    )
    yield f"  {what}; `shardsurgeon plan --layers` shows each"


def _loss(layer: LayerReport) -> tuple[float, int]:
    """Ordered as the totals choose their worst layer."""
    return layer.saliency_dropped or 0.0, layer.layer


def _spread(values: list[Any], heading: str) -> list[str]:
    """Least, quartiles and greatest of a column; of words nothing."""
    known = sorted(value for value in values if isinstance(value, int | float))
    if not known:
        return [""] * len(_SPREAD)
    inner = quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3
    return [_COLUMNS[heading][1](value) for value in (known[0], *inner, known[-1])]


def _has_value(layers: Sequence[LayerReport], heading: str) -> bool:
    name = _COLUMNS[heading][0]
    values = [getattr(layer, name) for layer in layers]
    if name == "policy":
        return any(value != "scores" for value in values)
    if name in _ONLY_IF_ANY:
        return any(values)
    return name in _ALWAYS or any(value is not None for value in values)


def _row(layer: LayerReport, headings: Sequence[str]) -> tuple[str, ...]:
    cells = (_COLUMNS[heading][1](_value(layer, heading)) for heading in headings)
    return layer_number(layer), *cells


def _value(layer: LayerReport, heading: str) -> Any:
    return getattr(layer, _COLUMNS[heading][0])
