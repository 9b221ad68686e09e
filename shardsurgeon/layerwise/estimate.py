"""What a calibration takes on a machine: seconds, bytes and memory, from sizes alone.

Bytes and products are counted from headers; a machine's speeds are assumed. Nothing here is
measured. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.machines import MACHINES, Machine, this_machine
from shardsurgeon.layerwise.memory import ModelSize
from shardsurgeon.layerwise.schedule import (
    SAVE_SECONDS,
    SAVED_SHARE,
    Costs,
    Hold,
    Limits,
    Place,
    Schedule,
    chunks,
    costs,
    layers_that_run,
    make_schedule,
    products,
)
from shardsurgeon.layerwise.settings import INSTALL, BatchSize, missing_packages
from shardsurgeon.reports import Report

# Bytes of one number of each dtype.
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes on one machine.

    dtype: of the arithmetic; device_free_nbytes, host_free_nbytes: memory of one device and of the
    host; flops: operations per second that products are taken to reach on one device; link, disk:
    bytes per second, between a device and the host, and of reading and writing. Speeds are None
    where they are not known; so are then all seconds. problem, remedy: why it cannot run there, and
    what to do, else empty; what follows them is None where it cannot.

    hold: `layer`, all experts of a layer stay ready, `stored`, they stay as they are on disk,
    `groups`, so many (group) at a time; ahead: whether the next layer's arrive meanwhile;
    batch_size: samples of a forward pass; chunk_tokens: that pass before experts make way;
    readings: how often each expert is read; states: where hidden states are between layers,
    `device`, `host` or `file`.

    seconds: in all; bound_by: `computing`, `link` or `disk`; seconds_computing; seconds_weights:
    over the link; seconds_states: over the link, the longer way; seconds_disk: weights, states
    that are in a file, and saving; seconds_saving: of that.

    weights_nbytes: that each device reads; disk_nbytes: read from and written to the disk;
    states_nbytes: of hidden states, to and from where layers compute; state_nbytes: of the hidden
    states of all tokens at one time; saved_nbytes: of states, in `saves` goes, for a run that is
    interrupted; device_nbytes, host_nbytes: the peaks, of one device and of the host, without the
    system's file cache.
    """

    machine: str
    devices: int
    dtype: str
    device_free_nbytes: int
    host_free_nbytes: int
    flops: float | None
    link: float | None
    disk: float | None
    problem: str = ""
    remedy: str = ""
    hold: str | None = None
    group: int | None = None
    ahead: bool | None = None
    batch_size: int | None = None
    chunk_tokens: int | None = None
    readings: int | None = None
    states: str | None = None
    seconds: float | None = None
    bound_by: str | None = None
    seconds_computing: float | None = None
    seconds_weights: float | None = None
    seconds_states: float | None = None
    seconds_disk: float | None = None
    seconds_saving: float | None = None
    weights_nbytes: int | None = None
    disk_nbytes: int | None = None
    states_nbytes: int | None = None
    state_nbytes: int | None = None
    saved_nbytes: int | None = None
    saves: int | None = None
    device_nbytes: int | None = None
    host_nbytes: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class CalibrationEstimate(Report):
    """What a calibration would take, estimated from counted bytes and products, not measured.

    samples, tokens: of the run; drawn: whether the tokens were counted, else each sample was taken
    to be as long as it may be; max_length: of a sample; layers: that run, MTP layers included;
    moe_layers: of these; flops: of all products; here: on this machine, None where nothing is known
    of it; machines: on others.

    >>> report = shardsurgeon.estimate_calibration("fixtures/qwen3_moe", samples=8, max_length=64)
    >>> report.tokens, report.drawn, report.machines[0].readings
    (512, False, 1)
    """

    model: str
    dataset: str
    samples: int
    tokens: int
    drawn: bool
    max_length: int
    layers: int
    moe_layers: int
    flops: int
    device: str
    here: Estimate | None
    machines: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """`Kimi-K2.5: 1,024 samples, at most 16,777,216 tokens`."""
        most = "" if self.drawn else "at most "
        return f"{self.model}: {self.samples:,} samples, {most}{self.tokens:,} tokens"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request leaves to the machine, or does not.

    dtype: None for what the machine computes fast in, or the model's; own_dtype: the model's;
    memory: the most bytes on a device; states_budget: the most of hidden states on the host, all
    devices together.
    """

    own_dtype: str
    dtype: str | None = None
    batch_size: BatchSize = "auto"
    memory: int | None = None
    states_budget: int | None = None


def estimates(
    size: ModelSize, lengths: Sequence[int], wishes: Wishes, device: str
) -> CalibrationEstimate:
    """What a run over samples of these lengths takes here, on a device, and on MACHINES.

    Wishes about memory are about this machine. Model, dataset and whether samples were drawn are
    for the caller to fill in.
    """
    layers, notes = layers_that_run(size), []
    here = None
    try:
        here = estimate(size, lengths, this_machine(device), wishes, device)
    except UsageError as error:
        notes.append(f"nothing is known of this machine: {error}")
    if missing := missing_packages():
        needed = f"a run needs {', '.join(missing)}, not installed here"
        notes.append(f"{needed}, so that no dataset was opened; {INSTALL}")
    elsewhere = replace(wishes, memory=None, states_budget=None)
    return CalibrationEstimate(
        model="",
        dataset="",
        samples=len(lengths),
        tokens=sum(lengths),
        drawn=False,
        max_length=max(lengths),
        layers=len(layers),
        moe_layers=sum(layer.experts > 0 for layer in layers),
        flops=products(size, lengths),
        device=device,
        here=here,
        machines=tuple(estimate(size, lengths, machine, elsewhere) for machine in MACHINES),
        notes=tuple(notes),
    )


def estimate(
    size: ModelSize, lengths: Sequence[int], machine: Machine, wishes: Wishes, device: str = ""
) -> Estimate:
    """What a run over samples of these lengths takes on a machine.

    device: as `--device` names it. Samples are divided among devices; each reads all weights over
    its own link, and from the disk they come once, since the file's pages are shared. Layers that
    must run together are taken to run one by one, samples of different lengths to share batches.
    """
    dtype = wishes.dtype or machine.dtype or wishes.own_dtype
    limits = _limits(machine, wishes, ITEMSIZE[dtype], device)
    share = sorted(lengths, reverse=True)[:: machine.devices]
    found = Estimate(
        machine=machine.name,
        devices=machine.devices,
        dtype=dtype,
        device_free_nbytes=limits.device_free,
        host_free_nbytes=machine.host_memory,
        flops=machine.flops or None,
        link=machine.link or None,
        disk=machine.disk or None,
    )
    try:
        schedule = make_schedule(size, share, limits)
    except UsageError as error:
        return replace(found, problem=error.problem, remedy=error.remedy)
    num_chunks = len(chunks(share, schedule, mixed=True))
    spent = costs(size, share, schedule, limits.itemsize, num_chunks)
    state = sum(lengths) * size.state * limits.itemsize
    return _Bill(size, machine, schedule, spent, state).put_into(found)


def _limits(machine: Machine, wishes: Wishes, itemsize: int, device: str) -> Limits:
    most = wishes.memory
    free = machine.device_memory if most is None else min(machine.device_memory, most)
    # On a processor there is one memory, and states are in it as well.
    host = machine.host_memory // machine.devices if machine.on_gpu else free
    budget = wishes.states_budget
    return Limits(
        itemsize=itemsize,
        on_gpu=machine.on_gpu,
        device_free=free,
        host_free=host,
        states_budget=None if budget is None else budget // machine.devices,
        batch_size=wishes.batch_size,
        device=device,
    )


class _Bill:
    """What one run moves, and how long that takes. Bytes of one device, but for state and disk."""

    def __init__(
        self, size: ModelSize, machine: Machine, schedule: Schedule, spent: Costs, state: int
    ) -> None:
        self._machine, self._schedule, self._spent, self._state = machine, schedule, spent, state
        self._weights = spent.experts + spent.dense
        on_host = schedule.states is not Place.DEVICE
        self._states = (spent.states_in, spent.states_out) if on_host else (0, 0)
        self._in_file = sum(self._states) * machine.devices
        if schedule.states is not Place.FILE:
            self._in_file = 0
        # What is read several times comes from the system's file cache where a layer fits there.
        layer = max(layer.stored for layer in size.layers)
        cached = machine.host_memory - self._on_host() >= layer
        self._from_disk = spent.experts // (spent.readings if cached else 1) + spent.dense
        self._saves = 0

    def put_into(self, found: Estimate) -> Estimate:
        """The estimate with what the run takes."""
        machine, schedule, spent = self._machine, self._schedule, self._spent
        if machine.flops:
            # What is saved depends on the time, and the disk's time on what is saved.
            self._saves = self._saves_in(self._total())
            found = replace(
                found,
                seconds=self._total(),
                bound_by=self._bound(),
                seconds_computing=self._computing(),
                seconds_weights=self._link(self._weights),
                seconds_states=self._link(max(self._states)),
                seconds_disk=self._disk(),
                seconds_saving=self._saving(),
            )
        return replace(
            found,
            hold=str(schedule.hold),
            group=schedule.group,
            ahead=schedule.ahead,
            batch_size=schedule.batch_size,
            chunk_tokens=schedule.chunk,
            readings=spent.readings,
            states=str(schedule.states),
            weights_nbytes=self._weights,
            disk_nbytes=self._from_disk + self._in_file + self._saved(),
            states_nbytes=sum(self._states) * machine.devices,
            state_nbytes=self._state,
            saved_nbytes=self._saved(),
            saves=self._saves,
            device_nbytes=schedule.device_nbytes,
            host_nbytes=self._on_host(),
        )

    def _on_host(self) -> int:
        """Bytes of the host's memory, for all devices."""
        if not self._machine.on_gpu:
            return self._schedule.host_nbytes
        held = self._schedule.states is Place.HOST
        return self._schedule.host_nbytes * self._machine.devices if held else 0

    def _total(self) -> float:
        """All at the same time, but for weights that wait until the layer before has gone."""
        ways = self._computing(), self._link(self._weights + self._states[0]), self._disk()
        if self._weights_overlap():
            return max(*ways, self._link(self._states[1]))
        arriving = max(self._link(self._weights), self._from_disk / self._machine.disk)
        left = max(self._link(max(self._states)), self._disk() - self._reading())
        return arriving + max(self._computing(), left)

    def _weights_overlap(self) -> bool:
        schedule = self._schedule
        return schedule.ahead or schedule.hold is Hold.GROUPS or not self._machine.on_gpu

    def _bound(self) -> str:
        link = self._link(max(self._weights + self._states[0], self._states[1]))
        parts = {"computing": self._computing(), "link": link, "disk": self._disk()}
        return max(parts, key=lambda name: parts[name])

    def _computing(self) -> float:
        return self._spent.flops / self._machine.flops

    def _link(self, nbytes: int) -> float:
        """Seconds; 0 where a processor has weights and states in its own memory."""
        return nbytes / self._machine.link if self._machine.link else 0.0

    def _reading(self) -> float:
        return self._from_disk / self._machine.disk

    def _disk(self) -> float:
        return self._reading() + self._in_file / self._machine.disk + self._saving()

    def _saving(self) -> float:
        return self._saved() / self._machine.disk

    def _saved(self) -> int:
        return self._saves * self._state

    def _saves_in(self, seconds: float) -> int:
        """How often hidden states are saved: by the clock, and for a small part of the time. What
        is in a file is saved."""
        if self._schedule.states is Place.FILE:
            return 0
        each = self._state / self._machine.disk
        return int(seconds / max(SAVE_SECONDS, each / SAVED_SHARE))
