"""What `calibrate --dry-run` prints: how samples would pass this machine, and tables of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardsurgeon.cli.output import fact, table
from shardsurgeon.cli.plan import note_lines
from shardsurgeon.errors import UsageError
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from shardsurgeon.layerwise.estimate import CalibrationEstimate, Estimate

_TIMES = ("machine", "in all", "products", "weights", "states", "disk", "saves", "bound by")
_BYTES = ("machine", "experts", "read", "weights", "states", "moved", "device", "host")
_LEGENDS = (
    (
        "  weights, states: over the link, the states both ways at once; disk: weights,",
        "  states in a file, and saves of states for a run that is interrupted",
    ),
    (
        "  experts of a layer: all stay ready (layer) or as they are stored, or come in",
        "  groups; read: how often each is; weights: that each device reads; moved: states",
    ),
)
_HOLDS = {
    "layer": "a layer's experts stay, ready to compute",
    "stored": "a layer's experts stay as they are stored",
    "groups": "experts come in groups of {group}",
}
_STATES = {"device": "on the device", "host": "in memory", "file": "in a file"}


def does_not_fit(report: CalibrationEstimate) -> UsageError | None:
    """What a run here would end with, None where a layer fits or nothing is known."""
    here = report.here
    if here is None or not here.problem:
        return None
    return UsageError(f"--device {report.device}", here.problem, here.remedy)


def estimate_lines(report: CalibrationEstimate) -> Iterator[str]:
    """The report for people."""
    yield report.title
    yield ""
    drawn = f"drawn, the longest has {report.max_length:,} tokens"
    if not report.drawn:
        drawn = f"not drawn: {report.max_length:,} tokens each is the most there can be"
    yield from fact("samples", drawn)
    layers = f"{counted(report.layers, 'layer')}, {report.moe_layers} with experts"
    yield from fact("computed", f"{layers}: {_operations(report.flops)}")
    if report.here is not None:
        yield from _here(report.here)
    yield from note_lines(report.notes)
    yield ""
    yield "Estimated, not measured: bytes and operations are counted, speeds assumed."
    yield ""
    fitting = [each for each in report.machines if not each.problem]
    if fitting:
        yield from table(_TIMES, map(_times, fitting))
        yield from _LEGENDS[0]
        yield ""
        yield from table(_BYTES, map(_bytes, fitting))
        yield from _LEGENDS[1]
        yield ""
    for each in report.machines:
        speeds = f"{(each.flops or 0) / 1e12:g} TFLOP/s, disk {format_size(int(each.disk or 0))}/s"
        if each.link:
            speeds += f", link {format_size(int(each.link))}/s"
        memory = f"{format_size(each.device_free_nbytes)} free"
        if each.link:
            memory += f", {format_size(each.host_free_nbytes)} on the host"
        yield from fact(each.machine, f"{speeds}, {each.dtype}; {memory}")
        if each.problem:
            yield from fact("", f"does not fit: {each.problem}; {each.remedy}")
    stop = "; the run would stop at once" if does_not_fit(report) else ""
    yield ""
    yield f"Dry run: nothing was written{stop}."


def _here(here: Estimate) -> Iterator[str]:
    """How samples would pass this machine."""
    free = f"{format_size(here.device_free_nbytes)} free"
    if here.problem:
        yield from fact("here", f"{free}: {here.problem}")
        return
    readings = "once" if here.readings == 1 else f"{here.readings:,} times"
    hold = _HOLDS[here.hold or ""].format(group=here.group)
    batch = counted(here.batch_size or 0, "sample")
    states = f"hidden states {_STATES[here.states or '']}, {format_size(here.state_nbytes or 0)}"
    taken = f"{format_size(here.device_nbytes or 0)} in use, {free}"
    yield from fact("here", f"{hold}, each read {readings}; batches of {batch}; {states}; {taken}")
    weights, moved = format_size(here.weights_nbytes or 0), format_size(here.states_nbytes or 0)
    yield from fact("moved", f"{weights} of weights, {moved} of hidden states")


def _times(each: Estimate) -> list[str]:
    computing = map(_time, (each.seconds, each.seconds_computing))
    over_link = map(_time, (each.seconds_weights, each.seconds_states))
    link = over_link if each.link else ("-", "-")
    disk = _time(each.seconds_disk)
    return [each.machine, *computing, *link, disk, str(each.saves), str(each.bound_by)]


def _bytes(each: Estimate) -> list[str]:
    sizes = (each.states_nbytes, each.device_nbytes, each.host_nbytes)
    moved, device, host = (format_size(nbytes or 0) for nbytes in sizes)
    weights = format_size(each.weights_nbytes or 0)
    return [
        *(each.machine, str(each.hold), f"{each.readings:,} x", weights),
        *(str(each.states), moved, device, host if each.host_nbytes and each.link else "-"),
    ]


def _time(seconds: float | None) -> str:
    """`12 s`, `57 min`, `5.8 h`, `6.6 days`."""
    value = seconds or 0.0
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if value < most:
            return f"{value / length:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{value / 86_400:.1f} days"


def _operations(count: int) -> str:
    """`1.37 EFLOP`."""
    for unit, factor in (("EFLOP", 10**18), ("PFLOP", 10**15), ("TFLOP", 10**12)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"
