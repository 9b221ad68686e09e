"""The work folder of a calibration, OUT.partial, from which an interrupted run can be resumed.

It holds the accumulators of finished layers and, by the clock, the hidden states between two.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from shardsurgeon.errors import OutputError, ScoreError
from shardsurgeon.execution.journal import Run
from shardsurgeon.execution.workdir import WorkDir, lock_workdir
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.damage import LayerSums
from shardsurgeon.layerwise.saving import saved_layers
from shardsurgeon.storage.files import write_file, writing
from shardsurgeon.storage.system import System, default_system
from shardsurgeon.units import counted

Finished = TypeVar("Finished", "FinishedLayers", "FinishedDamage")

_LAYER = re.compile(r"layer-(\d{5,})\.json")


class FinishedLayers:
    """The accumulators of finished layers, on disk and in memory; a LayerSink of the engine.

    is_result: whether nothing is left to compute once all layers are there.
    """

    is_result = True

    def __init__(self, folder: Path, system: System) -> None:
        """Load what an earlier run left. Raises OutputError for a malformed file."""
        self._folder = folder
        self._system = system
        self._layers: dict[int, Accumulators] = {}
        for path in sorted(folder.iterdir()):
            match = _LAYER.fullmatch(path.name)
            if match:
                self._layers[int(match[1])] = _read_layer(path, int(match[1]))

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        """Keep the sums of a layer; for a layer that is kept, do nothing.

        Raises OutputWriteError.
        """
        if index in self._layers:
            return
        # json writes a float with as many digits as it takes to read the same float back.
        content = {"layer": index, "is_mtp": is_mtp, "accumulators": _listed(accumulators)}
        if accumulators.parts is not None:
            content["parts"] = {part: _listed(sums) for part, sums in accumulators.parts.items()}
        path = self._folder / f"layer-{index:05d}.json"
        write_file(path, json.dumps(content).encode(), self._system)
        self._layers[index] = accumulators

    def done_layers(self) -> set[int]:
        """Numbers of the layers that are kept."""
        return set(self._layers)

    @property
    def layers(self) -> dict[int, Accumulators]:
        """Layer → its accumulators, ascending."""
        return dict(sorted(self._layers.items()))


class FinishedDamage:
    """What an evaluation found in finished layers, on disk and in memory; its sink."""

    # The head still needs what leaves the last layer.
    is_result = False

    def __init__(self, folder: Path, system: System) -> None:
        """Load what an earlier run left. Raises OutputError for a malformed file."""
        self._folder = folder
        self._system = system
        self._layers: dict[int, LayerSums] = {}
        for path in sorted(folder.iterdir()):
            match = _LAYER.fullmatch(path.name)
            if match:
                self._layers[int(match[1])] = _read_damage(path)

    def finished_layer(self, index: int, sums: LayerSums) -> None:
        """Keep what was added up in a layer; for a layer that is kept, do nothing.

        Raises OutputWriteError.
        """
        if index in self._layers:
            return
        gates = None if sums.gates is None else sums.gates.tolist()
        content = {"layer": index, "compared": sums.compared.tolist(), "gates": gates}
        path = self._folder / f"layer-{index:05d}.json"
        write_file(path, json.dumps(content).encode(), self._system)
        self._layers[index] = sums

    def done_layers(self) -> set[int]:
        """Numbers of the layers that are kept."""
        return set(self._layers)

    @property
    def layers(self) -> dict[int, LayerSums]:
        """Layer → its sums, ascending."""
        return dict(sorted(self._layers.items()))


class Partial(Generic[Finished]):
    """A locked OUT.partial: the finished layers, and the folder for activations."""

    def __init__(self, workdir: WorkDir, layers: int, kind: type[Finished]) -> None:
        """workdir: locked, with its journal open; layers: how many the run is to finish."""
        self._files = workdir.files
        self._total = layers
        self.layers: Finished = kind(workdir.files, workdir.system)

    @property
    def activations(self) -> Path:
        """The folder for the activations."""
        return self._files

    @property
    def num_resumed(self) -> int:
        """Layers with experts that a run which begins now need not compute."""
        # On several devices, each has a folder for its share of the samples.
        total = min(map(saved_layers, [*self._files.glob("*/")] or [self._files]))
        done = self.layers.done_layers()
        if self.layers.is_result and len(done) == self._total:
            return self._total
        return sum(layer < total for layer in done)

    def clear(self) -> None:
        """Remove everything; to be called once the score file is written."""
        with writing(self._files):
            shutil.rmtree(self._files)


@contextmanager
def partial_calibration(
    out: Path, run: Run, layers: int = 0, *, restart: bool = False, system: System | None = None
) -> Iterator[Partial[FinishedLayers]]:
    """As `partial_work`, of a calibration."""
    with partial_work(out, run, FinishedLayers, layers, restart=restart, system=system) as partial:
        yield partial


@contextmanager
def partial_work(
    out: Path,
    run: Run,
    kind: type[Finished],
    layers: int = 0,
    *,
    restart: bool = False,
    system: System | None = None,
) -> Iterator[Partial[Finished]]:
    """Lock OUT.partial for one run.

    run: identifies the command and the source; kind: what keeps its layers; layers: how many it is
    to finish; restart: discard what an earlier run left. What becomes of an OUT that exists is for
    the caller to say. Raises OutputError where another process has locked the folder, and where it
    belongs to another command.
    """
    with (
        lock_workdir(out, system or default_system(), may_exist=True) as workdir,
        workdir.open_journal(run, restart),
    ):
        partial = Partial(workdir, layers, kind)
        try:
            yield partial
        except Exception:
            raise
        except BaseException as stop:
            done = partial.num_resumed
            if done and workdir.files.exists():
                kept = f"{done} of {counted(layers, 'layer')} are kept in {workdir.folder}"
                stop.add_note(f"{kept}; the same command resumes")
            raise


def _read_damage(path: Path) -> LayerSums:
    try:
        content = json.loads(path.read_bytes())
        gates = content["gates"]
        compared = np.array(content["compared"], np.float64)
        gates = None if gates is None else np.array(gates, np.float64)
        if compared.ndim != 3 or (gates is not None and gates.ndim != 2):
            raise ValueError("sums of another shape")
        return LayerSums(compared, gates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "--restart starts over"
        raise OutputError(path, f"is not what an evaluation wrote ({error})", remedy) from error


def _listed(accumulators: Accumulators) -> dict[str, object]:
    return {name: array.tolist() for name, array in accumulators.arrays().items()}


def _read_layer(path: Path, index: int) -> Accumulators:
    try:
        content = json.loads(path.read_bytes())
        whole = _sums(content["accumulators"], path, index)
        if "parts" not in content:  # of an earlier version
            return whole
        parts = {part: _sums(listed, path, index) for part, listed in content["parts"].items()}
        return replace(whole, parts=parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ScoreError) as error:
        remedy = "--restart starts over"
        raise OutputError(path, f"is not what a calibration wrote ({error})", remedy) from error


def _sums(listed: dict[str, object], path: Path, index: int) -> Accumulators:
    arrays = {name: np.array(values) for name, values in listed.items()}
    return Accumulators.from_arrays(arrays, str(path), index)
