"""A worker of a calibration on several devices without an engine: what it does, its samples say.

Everything around it is the real thing: the pipes, the lock, signals, how it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from shardsurgeon.errors import FamilyError
from shardsurgeon.layerwise import worker
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.channels import Channel
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.settings import Progress, Settings
from shardsurgeon.layerwise.worker import Job, LayerSums, Logged

LAYERS = (0, 3)
EXPERTS = 2


def job(folder: Path, does: dict[str, int]) -> Job:
    """A job of samples, each with what its worker does and its tokens."""
    samples = [
        Sample(np.arange(1, length + 1), what, number)
        for number, (what, length) in enumerate(does.items())
    ]
    return Job("nowhere", None, samples, Settings(dtype="float32"), folder, 1000)


def sums(samples: list[Sample], layer: int) -> Accumulators:
    """Sums in which each token has its part; not the same in another order."""
    found = Accumulators.zeros(EXPERTS)
    for sample in samples:
        found.total_tokens += sample.num_tokens
        found.counts += sample.num_tokens
        found.norm_sum += (layer + 1) / sample.ids.sum()
    return found


def does(job: Job, channel: Channel) -> None:
    """In the place of the engine."""
    what = job.samples[0].source
    tokens = sum(sample.num_tokens for sample in job.samples)
    sys.stdout.write("as a library does")
    sys.stdout.flush()
    with worker._locked(job.folder):
        match what:
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuses":
                raise FamilyError("layer 7", "has 3 gates", "declare them")
            case "breaks":
                raise ZeroDivisionError("no tokens")
            case "warns":
                logging.getLogger("shardsurgeon.layerwise").warning("it takes long")
            case "waits":
                (job.folder / "pid.writing").write_text(str(os.getpid()))
                (job.folder / "pid.writing").rename(job.folder / "pid")
                try:
                    time.sleep(60)
                finally:
                    (job.folder / "kept").touch()
        for done, layer in enumerate(LAYERS, start=1):
            channel.send(LayerSums(layer, layer == LAYERS[-1], sums(list(job.samples), layer)))
            now = Progress(layer, done, len(LAYERS), done * tokens, len(LAYERS) * tokens)
            channel.send(now)
    channel.send(Logged(logging.INFO, f"budget {job.budget}, {job.sharing} share the cores"))


def child() -> None:
    """As `worker.child`."""
    worker._calibrate = does
    worker.child()
