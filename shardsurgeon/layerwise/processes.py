"""A calibration on several devices: a process for each, which takes a share of the samples.

    this process  ── pipes, or the sockets of torchrun's ranks ──  a worker for each device
    lock, score file, one bar                                      its share through all layers

Hidden states stay in a worker, which has a folder OUT.partial/files/<n>. It tells of a layer's sums
when they are complete; they are added here, in the order of the shares, so that the same samples on
as many devices give the same bytes. Which sample is in which share is written down before the first
token: a resumed run does not decide it anew.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import BinaryIO, TypeVar, cast

from shardsurgeon.errors import OutputError, UsageError, WorkError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.channels import Channel, this_rank
from shardsurgeon.layerwise.settings import LayerSink, Listener, Progress, Settings
from shardsurgeon.layerwise.worker import (
    LOCK,
    LOG,
    RESUMES,
    Done,
    Ended,
    Failed,
    Job,
    LayerSums,
    Logged,
    Stop,
    portable,
)
from shardsurgeon.storage.files import make_folder, write_file, writing
from shardsurgeon.storage.system import default_system
from shardsurgeon.storage.threads import WAKE_SECONDS

Result = TypeVar("Result")

_SHARES = "shares.json"
# How long a worker may take to keep what it has when it is told to stop.
_STOP_SECONDS = 60.0
# A signal to a group of processes reaches one after the other.
_GROUP_SECONDS = 0.3
# Unlike multiprocessing, this does not run the user's script again in every process.
_CHILD = (
    "import sys; sys.path[:] = {path!r}; from shardsurgeon.layerwise.worker import child; child()"
)


def devices(settings: Settings) -> list[str]:
    """The devices that are used: all that are visible for `cuda`, else the one that is named.

    Among ranks of torchrun, one for each. Raises UsageError where those would have to share one.
    """
    rank, device = this_rank(), settings.device
    if rank is not None:
        if device.startswith("cuda:"):
            problem = f"is one device, and torchrun starts {rank.count} processes"
            raise UsageError(f"--device {device}", problem, "give --device cuda")
        # On one machine LOCAL_RANK is RANK.
        return [f"cuda:{n}" if device == "cuda" else device for n in range(rank.count)]
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [device]


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Positions of samples for each of `count` workers, so that all have about as many tokens.

    The longest first, each to the first of those that have the fewest tokens by then.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        least = tokens.index(min(tokens))
        dealt[least].append(position)
        tokens[least] += lengths[position]
    return [sorted(share) for share in dealt]


def lead(peers: Sequence[Channel], work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; the other ranks are told of it and end likewise."""
    end = Ended(None)
    try:
        result = work()
        end = Ended(result)
        return result
    except Exception as error:
        end = Ended(portable(error))
        raise
    finally:
        for peer in peers:
            peer.send(end)


def calibrate_apart(
    job: Job,
    devices: Sequence[str],
    peers: Sequence[Channel],
    sink: LayerSink,
    on_progress: Listener,
) -> None:
    """Do a job on several devices, and give each layer's sums over all samples to the sink.

    devices: one for each worker, at most as many as there are samples; peers: channels to ranks
    1, 2, … which are workers, none where all are to be started here. Raises what `calibrate_layers`
    raises on any of them, and WorkError where a worker is killed.
    """
    dealt = _kept_shares(job, len(devices))
    job = replace(job, log_level=logging.getLogger(LOG).getEffectiveLevel())
    if not peers:  # torchrun says how many cores a rank has
        job = replace(job, sharing=len(devices))
    jobs = [job.share(number, positions, devices) for number, positions in enumerate(dealt)]
    for each in jobs:
        make_folder(each.folder, default_system())
    team = _Team(sink, on_progress)
    try:
        team.start(jobs, peers)
        team.attend()
    except BaseException as error:
        if peers and isinstance(error, Exception):
            with _deaf():
                team.stop(0.0)
                time.sleep(_GROUP_SECONDS)
        else:
            team.stop(_STOP_SECONDS)
        _remove_if_nothing_is_kept(job, jobs)
        raise
    team.close(_STOP_SECONDS)


def _kept_shares(job: Job, count: int) -> list[list[int]]:
    """The shares as an earlier run wrote them down, or new ones, which are written down."""
    lengths = [sample.num_tokens for sample in job.samples]
    path = job.folder / _SHARES
    with writing(path):
        if not path.exists():
            dealt = shares(lengths, count)
            write_file(path, json.dumps(dealt).encode(), default_system())
            return dealt
        data = path.read_bytes()
    with suppress(ValueError, TypeError):
        found = [[int(position) for position in share] for share in json.loads(data)]
        if len(found) == count and sorted(chain(*found)) == list(range(len(lengths))):
            return found
    problem = f"is not how {len(lengths):,} samples were shared out to {count} devices"
    raise OutputError(path, problem, "--restart starts over")


def _remove_if_nothing_is_kept(job: Job, jobs: Sequence[Job]) -> None:
    with suppress(OSError):
        if all(set(os.listdir(each.folder)) <= {LOCK} for each in jobs):
            for each in jobs:
                shutil.rmtree(each.folder)
            (job.folder / _SHARES).unlink()


class _Worker:
    """A worker as it is seen from here.

    process: None for a rank; sums: layer → those of its samples; progress: None before it said any.
    """

    def __init__(
        self, device: str, channel: Channel, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.device = device
        self.channel = channel
        self.process = process
        self.sums: dict[int, Accumulators] = {}
        self.progress: Progress | None = None
        self.is_done = False

    def death(self) -> WorkError:
        """The error of a worker that ended without a word."""
        if self.process is None:
            return WorkError(self.device, "its process ended without a word", RESUMES)
        status = self.process.wait()
        problem, remedy = f"its process ended with exit status {status}", RESUMES
        if status < 0:
            name = _name(-status)
            problem = f"its process was killed by {name}"
            if name == "SIGKILL":  # as Linux does where memory runs out
                remedy = f"see whether memory ran out; {RESUMES}"
        return WorkError(self.device, problem, remedy)


class _Team:
    """The workers of one calibration: what they say, and what is made of it."""

    def __init__(self, sink: LayerSink, on_progress: Listener) -> None:
        self._sink = sink
        self._on_progress = on_progress
        self._workers: list[_Worker] = []
        self._heard: queue.SimpleQueue[tuple[_Worker, object]] = queue.SimpleQueue()

    def start(self, jobs: Sequence[Job], peers: Sequence[Channel]) -> None:
        """Give each job to a process that is started, all but the first to `peers` if any."""
        for number, job in enumerate(jobs):
            device = job.settings.device
            if number > 0 and peers:
                worker = _Worker(f"rank {number}, {device}", peers[number - 1])
            else:
                process = _start_child()
                said, told = cast(BinaryIO, process.stdout), cast(BinaryIO, process.stdin)
                worker = _Worker(device, Channel(said, told), process)
            self._workers.append(worker)
            threading.Thread(None, self._listen, "worker", (worker,), daemon=True).start()
            worker.channel.send(job)

    def attend(self) -> None:
        """Wait until all are done, adding their sums. Raises the first error of any of them."""
        while not all(worker.is_done for worker in self._workers):
            with suppress(queue.Empty):
                self._take(*self._heard.get(timeout=WAKE_SECONDS))

    def stop(self, seconds: float) -> None:
        """Tell all to end and keep what they have; those that take longer are killed."""
        try:
            for worker in self._workers:
                if not worker.is_done:
                    worker.channel.send(Stop())
        finally:
            self.close(seconds)

    def close(self, seconds: float) -> None:
        """Wait for the processes that were started here to end; those that take longer are
        killed."""
        started = [(worker.process, worker) for worker in self._workers]
        end = time.monotonic() + seconds
        try:
            for process, _ in started:
                if process is not None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process, worker in started:
                if process is not None:
                    process.kill()
                    process.wait()
                    worker.channel.close()

    def _listen(self, worker: _Worker) -> None:
        """On a thread: take what a worker says; None is its end."""
        with suppress(EOFError):
            while True:
                self._heard.put((worker, worker.channel.receive()))
        self._heard.put((worker, None))

    def _take(self, worker: _Worker, message: object) -> None:
        match message:
            case Progress():
                worker.progress = message
                self._report()
            case LayerSums():
                worker.sums[message.index] = message.sums
                self._add_up(message)
            case Logged():
                logging.getLogger(LOG).log(message.level, "%s: %s", worker.device, message.text)
            case Done():
                worker.is_done = True
                self._report()
            case Failed():
                time.sleep(_GROUP_SECONDS)  # a signal that has stopped it may be on the way here
                raise message.error
            case None if not worker.is_done:
                if worker.process is not None:
                    time.sleep(_GROUP_SECONDS)
                raise worker.death()

    def _add_up(self, told: LayerSums) -> None:
        """Give a layer to the sink once every worker has told of it."""
        parts = [worker.sums.get(told.index) for worker in self._workers]
        total = Accumulators.zeros(told.sums.num_experts)
        for part in parts:
            if part is None:
                return
            total.add(part)
        self._sink.finished_layer(told.index, told.is_mtp, total)

    def _report(self) -> None:
        """Report the work of all as one, as soon as each has said how much it is."""
        if all(worker.progress or worker.is_done for worker in self._workers):
            said = [worker.progress for worker in self._workers if worker.progress]
            if said:
                now = Progress(
                    layer=min(each.layer for each in said),
                    layers_done=min(each.layers_done for each in said),
                    layers_total=max(each.layers_total for each in said),
                    tokens_done=sum(each.tokens_done for each in said),
                    tokens_total=sum(each.tokens_total for each in said),
                )
                self._on_progress(now)


def _start_child() -> subprocess.Popen[bytes]:
    """A process that waits for its job. What a terminal sends to all of its programs, it does not
    get: that is for its parent, which tells it."""
    group = 0
    if sys.platform == "win32":
        group = subprocess.CREATE_NEW_PROCESS_GROUP
    words = [sys.executable, "-c", _CHILD.format(path=sys.path)]
    with _blocked():
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=group
        )


@contextmanager
def _blocked() -> Iterator[None]:
    """For the time of a `with`, let Ctrl-C and the end of the terminal wait; a process that is
    started meanwhile inherits that for good."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaf() -> Iterator[None]:
    """For the time of a `with`, ignore SIGTERM: where a rank is killed, torchrun sends it to the
    others at once, and what is the matter would not be said."""
    try:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # not the main thread, which no signal disturbs
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
