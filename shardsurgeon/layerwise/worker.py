"""A process that takes a share of a calibration: what it is told, what it does, what it says.

It is a child that `processes` starts, or a rank that torchrun does. It opens the checkpoint itself,
runs its samples through all layers, and keeps in a folder of its own what a resumed run goes on
from. A thread listens meanwhile: told to stop, the worker keeps what it has; where whoever gave the
job is gone, it ends at once, for the next run is about to take its folder.
"""

from __future__ import annotations

import _thread
import logging
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import FrameType

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import OutputError, WorkError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.channels import Channel
from shardsurgeon.layerwise.resume import FinishedLayers
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.settings import LayerSink, Listener, Progress, Settings
from shardsurgeon.storage.files import writing
from shardsurgeon.storage.system import default_system
from shardsurgeon.storage.threads import WAKE_SECONDS

LOCK = "shardsurgeon.lock"
RESUMES = "the same command resumes"
LOG = "shardsurgeon"
_STOPPED_STATUS = 128 + signal.SIGTERM
# How long what is left of an earlier worker may hold a folder: it is about to end.
_LOCKED_SECONDS = 30.0
# Between two reports of how far it is.
_REPORT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does, or, before it is shared out, all of them together.

    model, family: as `open_model` takes them; settings: with one device; folder: for hidden states
    and finished layers; budget: bytes of memory for hidden states; memory: bytes that it may take
    on its device, None for what is free; sharing: how many processes share the cores of this one's
    machine, 1 where each has been given its own; log_level: of what is worth telling.
    """

    model: str | os.PathLike[str] | None
    family: str | None
    samples: Sequence[Sample]
    settings: Settings
    folder: Path
    budget: int
    memory: int | None = None
    sharing: int = 1
    log_level: int = logging.WARNING

    def share(self, number: int, positions: Sequence[int], devices: Sequence[str]) -> Job:
        """What the worker of this number does, of one for each of the devices."""
        return replace(
            self,
            samples=[self.samples[position] for position in positions],
            settings=replace(self.settings, device=devices[number]),
            folder=self.folder / str(number),
            budget=self.budget // len(devices),
        )


@dataclass(frozen=True, slots=True)
class Stop:
    """Told to a worker: end, and keep what there is."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Told to a rank: rank 0 has ended, with this result or error, None where it was stopped."""

    result: object


# What a worker says, beside `Progress`.


@dataclass(frozen=True, slots=True)
class LayerSums:
    """The sums over its samples in one layer; those of an earlier run come at the beginning."""

    index: int
    is_mtp: bool
    sums: Accumulators


@dataclass(frozen=True, slots=True)
class Logged:
    """A line of the log."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """It ends with this error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Done:
    """All layers are done."""


class _Stopped(BaseException):
    """This worker is to end."""


def child() -> None:
    """Do the job that comes through stdin: the program of a process that `processes` starts."""
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what a library prints must not be taken for a message
    orders, status = _listen(channel), 1
    try:
        with _stoppable():
            job = orders.get()
            assert isinstance(job, Job)
            _work(job, channel)
        status = 0
    except _Stopped:
        status = _STOPPED_STATUS
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # all is said and kept: nothing that libraries left running is waited for


def follow(channel: Channel) -> object:
    """Do what rank 0 says, as another rank of torchrun, and return what it ended with.

    Raises the error that it ended with, and KeyboardInterrupt where it was stopped.
    """
    orders = _listen(channel)
    with _stoppable():
        try:
            order = orders.get()
        except _Stopped:
            raise KeyboardInterrupt from None
        if isinstance(order, Job):
            with suppress(_Stopped):
                _work(order, channel)
                order = orders.get()
            # A rank does not end before rank 0: torchrun would end that one too, before it could
            # say why.
            if not isinstance(order, Ended):
                order = orders.get()
    assert isinstance(order, Ended)
    if isinstance(order.result, Exception):
        raise order.result
    if order.result is None:
        raise KeyboardInterrupt
    return order.result


def portable(error: Exception) -> Exception:
    """The error as another process can have it."""
    with suppress(Exception):  # what a pickle of a library's error may raise
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _listen(channel: Channel) -> queue.SimpleQueue[object]:
    """What this process is told from now on, but for what ends it."""
    orders: queue.SimpleQueue[object] = queue.SimpleQueue()

    def listen() -> None:
        order: object = None
        while not isinstance(order, Ended):
            try:
                order = channel.receive()
            except EOFError:
                os._exit(1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            if isinstance(order, Stop):
                _interrupt()
            else:
                orders.put(order)

    threading.Thread(None, listen, "orders", daemon=True).start()
    return orders


def _interrupt() -> None:
    """Raise _Stopped in the main thread, which may be waiting for something."""
    if sys.platform == "win32":
        _thread.interrupt_main(signal.SIGTERM)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


@contextmanager
def _stoppable() -> Iterator[None]:
    """For the time of a `with`, SIGTERM raises _Stopped, once: ending takes its time."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # no signal reaches a program that calibrates in another thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(job: Job, channel: Channel) -> None:
    """Do a job, and say how it ended. Raises _Stopped."""
    log, lines = logging.getLogger(LOG), _Lines(channel)
    before = log.level
    log.addHandler(lines)
    log.setLevel(job.log_level)
    try:
        _calibrate(job, channel)
    except _Stopped:
        problem = "its process was told to stop by SIGTERM"
        channel.send(Failed(WorkError(job.settings.device, problem, RESUMES)))
        raise
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        channel.send(Failed(portable(error)))
    else:
        channel.send(Done())
    finally:
        log.setLevel(before)
        log.removeHandler(lines)


def _calibrate(job: Job, channel: Channel) -> None:
    import torch

    from shardsurgeon.layerwise.engine import calibrate_layers
    from shardsurgeon.layerwise.memory import free_memory

    if job.sharing > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.sharing))
    checkpoint = open_model(job.model, job.family, follow_links=True)
    mtp = {layer.index for layer in read_anatomy(checkpoint).mtp_layers}
    lengths = [sample.num_tokens for sample in job.samples]
    with _locked(job.folder):
        layers = FinishedLayers(job.folder, default_system())
        for index, sums in layers.layers.items():
            channel.send(LayerSums(index, index in mtp, sums))
        with ActivationStore(job.folder, lengths, job.budget) as store:
            sink, listener = _Telling(layers, channel), _seldom(channel)
            memory = job.memory
            if job.settings.device == "cpu" and job.sharing > 1:
                free = free_memory("cpu") if memory is None else memory
                memory = free // job.sharing
            calibrate_layers(
                checkpoint, job.samples, job.settings, store, sink, listener, memory=memory
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Raises OutputError where another keeps it."""
    end = time.monotonic() + _LOCKED_SECONDS
    with writing(folder):
        lock = FileIO(folder / LOCK, "a+")
    with lock:
        while not default_system().lock(lock):
            if time.monotonic() >= end:
                problem = "is in use: a process of an earlier run writes there now"
                raise OutputError(folder, problem, f"end that one; {RESUMES}")
            time.sleep(WAKE_SECONDS)
        yield


class _Telling:
    """Keeps the sums of finished layers, then tells of them."""

    def __init__(self, kept: LayerSink, channel: Channel) -> None:
        self._kept = kept
        self._channel = channel

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        """Keep and tell; for a layer that is kept, do nothing. Raises OutputWriteError."""
        if index not in self._kept.done_layers():
            self._kept.finished_layer(index, is_mtp, accumulators)
            self._channel.send(LayerSums(index, is_mtp, accumulators))

    def done_layers(self) -> set[int]:
        """Numbers of the layers that are kept."""
        return self._kept.done_layers()


def _seldom(channel: Channel) -> Listener:
    """Tells how far the work is, a few times a second, and when it is over."""
    told = 0.0

    def tell(now: Progress) -> None:
        nonlocal told
        if now.tokens_done == now.tokens_total or time.monotonic() >= told + _REPORT_SECONDS:
            channel.send(now)
            told = time.monotonic()

    return tell


class _Lines(logging.Handler):
    """What the package logs, sent to where it is shown."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Logged(record.levelno, record.getMessage()))
