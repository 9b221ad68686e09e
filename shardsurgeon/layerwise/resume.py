"""OUT.partial of a calibration: what is finished, so that the same command goes on from there.

`run` opens it; `engine` hands the results of whole layers to it and keeps its activations in it.

    OUT.partial/                the folder of `workplace`, with its lock and its journal
        files/layer-00003.json  what all samples added up in layer 3; whole once it is there
        files/activations.*     hidden states between two layers, of `store`

The journal holds the fingerprint of the command: another command, or another state of the model,
is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shardsurgeon.errors import OutputError, ScoreError
from shardsurgeon.execution.journal import Run
from shardsurgeon.execution.workplace import Workplace, hold
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.storage.durable import write_file, writing
from shardsurgeon.storage.system import System, default_system

_LAYER = re.compile(r"layer-(\d{5,})\.json")


class FinishedLayers:
    """The layers that are done, on the disk. What `engine` knows as a LayerSink."""

    def __init__(self, folder: Path, system: System) -> None:
        """Take up what an earlier run left. Raises OutputError for a file that is broken."""
        self._folder = folder
        self._system = system
        self._layers: dict[int, Accumulators] = {}
        for path in sorted(folder.iterdir()):
            match = _LAYER.fullmatch(path.name)
            if match:
                self._layers[int(match[1])] = _read(path, int(match[1]))

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        """Keep the results of a layer; those of one that is kept already change nothing.

        Raises OutputWriteError.
        """
        if index in self._layers:
            return
        sums = {name: array.tolist() for name, array in accumulators.arrays().items()}
        # Python writes floats with as many digits as it takes to read them back unchanged.
        content = {"layer": index, "is_mtp": is_mtp, "accumulators": sums}
        path = self._folder / f"layer-{index:05d}.json"
        write_file(path, json.dumps(content).encode(), self._system)
        self._layers[index] = accumulators

    def done_layers(self) -> set[int]:
        """Their numbers."""
        return set(self._layers)

    @property
    def layers(self) -> dict[int, Accumulators]:
        """Layer → its accumulators, ascending."""
        return dict(sorted(self._layers.items()))


class PartialCalibration:
    """An OUT.partial while it is held: the finished layers, and the place of the activations."""

    def __init__(self, place: Workplace) -> None:
        """place: held, with its journal open."""
        self._place = place
        self.layers = FinishedLayers(place.files, place.system)

    @property
    def activations(self) -> Path:
        """The folder for the activations."""
        return self._place.files

    def clear(self) -> None:
        """Remove everything: the score file is there, and nothing is left to resume."""
        with writing(self._place.files):
            shutil.rmtree(self._place.files)


@contextmanager
def partial_calibration(
    out: Path, run: Run, *, restart: bool = False, system: System | None = None
) -> Iterator[PartialCalibration]:
    """Hold OUT.partial for one run.

    restart: throw away what an earlier run left, whosever it was. Raises OutputError where OUT
    exists, where another run holds the place, and where it belongs to another command.
    """
    with (
        hold(out, system or default_system()) as place,
        place.open_journal(run, restart),
    ):
        yield PartialCalibration(place)


def _read(path: Path, index: int) -> Accumulators:
    try:
        content = json.loads(path.read_bytes())
        sums = {name: np.array(values) for name, values in content["accumulators"].items()}
        return Accumulators.from_arrays(sums, str(path), index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ScoreError) as error:
        remedy = "--restart starts over"
        raise OutputError(path, f"is not what a calibration wrote ({error})", remedy) from error
