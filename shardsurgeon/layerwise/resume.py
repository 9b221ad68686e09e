"""What a calibration keeps on disk, so that an interrupted run can be resumed.

Hidden states between layers, which stay in memory as well where they fit, and the accumulators of
finished layers. Both are in the folder OUT.partial.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from shardsurgeon.errors import OutputError, OutputWriteError, ScoreError
from shardsurgeon.execution.journal import Run
from shardsurgeon.execution.workdir import WorkDir, lock_workdir
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.storage.files import (
    free_space,
    read_into,
    reserve_file,
    write_all,
    write_file,
    writing,
)
from shardsurgeon.storage.system import System, default_system
from shardsurgeon.units import counted, format_size

if TYPE_CHECKING:
    from torch import Tensor

_LAYOUT = "activations.json"
_BATCH_SIZES = "portions.json"


@dataclass(frozen=True, slots=True)
class _Layout:
    """One generation: the input of one group of layers, for all samples.

    generation: its number; dtype: its name in torch; row_shape, row_nbytes: of one token's state.
    """

    generation: int
    dtype: str
    row_shape: tuple[int, ...]
    row_nbytes: int


class _InMemory:
    """A generation as one tensor per sample, [tokens, *row_shape]."""

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        self.states: dict[int, Tensor] = {}

    def read(self, sample: int) -> Tensor:
        return self.states[sample]

    def write(self, sample: int, states: Tensor) -> None:
        import torch

        # A copy: a view would keep the whole batch in memory.
        self.states[sample] = states.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )

    def close(self) -> None:
        self.states.clear()


class _InFile:
    """A generation as one file, sample after sample.

    begins: the number of tokens before each sample, and of all; new: reserve space for it.
    """

    def __init__(
        self, layout: _Layout, begins: Sequence[int], path: Path, system: System, new: bool
    ) -> None:
        self.layout = layout
        self._begins = begins
        self._path = path
        self._system = system
        if new:
            _reserve(path, begins[-1] * layout.row_nbytes, system)
        with writing(path):
            self._file = FileIO(path, "r+")

    def read(self, sample: int) -> Tensor:
        import torch

        begin, end = self._begins[sample], self._begins[sample + 1]
        layout = self.layout
        buffer = bytearray((end - begin) * layout.row_nbytes)
        at = begin * layout.row_nbytes
        read_into(self._file, memoryview(buffer), at, self._path, self._system)
        flat = torch.frombuffer(buffer, dtype=getattr(torch, layout.dtype))
        return flat.reshape(end - begin, *layout.row_shape)

    def write(self, sample: int, states: Tensor) -> None:
        at = self._begins[sample] * self.layout.row_nbytes
        write_all(self._file, _bytes(states), at, self._path, self._system)

    def sync(self) -> None:
        with writing(self._path):
            self._system.sync_file(self._file)

    def close(self) -> None:
        self._file.close()


class ActivationStore:
    """The hidden states of all samples between two groups of layers; a context manager.

    Holds the current generation, which is read, and the next one, which is written. In memory,
    the current one is also saved to a file in the background. For one thread at a time.
    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        budget_nbytes: int,
        system: System | None = None,
    ) -> None:
        """Load what an earlier run left in the folder, which must exist.

        lengths: tokens of each sample; budget_nbytes: memory for two generations, which are kept
        in files only where they need more. Raises OutputWriteError and SourceReadError where the
        files cannot be used.
        """
        self._folder = folder
        self._begins = _sums(lengths)
        self._budget = budget_nbytes
        self._system = system or default_system()
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._saving: Future[None] | None = None
        self._written: set[int] = set()
        self._next: _InMemory | _InFile | None = None
        self._current = self._resume()

    @property
    def generation(self) -> int | None:
        """The group of layers whose input is the current generation, None before the first."""
        return self._current.layout.generation if self._current else None

    @property
    def in_memory(self) -> bool:
        """Whether the current generation is in memory."""
        return isinstance(self._current, _InMemory)

    def read(self, sample: int) -> Tensor:
        """A sample's states of the current generation, [tokens, ...], on the CPU; do not modify."""
        assert self._current is not None
        return self._current.read(sample)

    def write(self, sample: int, states: Tensor) -> None:
        """Keep a sample's states for the next generation: [tokens, ...], on any device.

        All samples of a generation have one dtype and, after the first axis, one shape. Raises
        OutputWriteError, also where the disk has no space for all samples.
        """
        if self._next is None:
            self._next = self._begin(states)
        layout = self._next.layout
        tokens = self._begins[sample + 1] - self._begins[sample]
        assert (tokens, *layout.row_shape) == tuple(states.shape)
        assert _dtype_name(states) == layout.dtype
        self._next.write(sample, states)
        self._written.add(sample)

    def advance(self) -> None:
        """Make the next generation, which must be complete, the current one.

        Raises OutputWriteError where this or an earlier generation could not be written.
        """
        assert self._next is not None
        assert len(self._written) == len(self._begins) - 1
        self._wait()
        if isinstance(self._next, _InFile):
            self._next.sync()
            self._record(self._next.layout)
        else:
            self._saving = self._saver.submit(self._save, self._next)
        if self._current is not None:
            self._current.close()
        self._current, self._next = self._next, None
        self._written.clear()

    def keep_batch_sizes(self, batch_size: int, chunk: int) -> tuple[int, int]:
        """The batch size and chunk tokens of an earlier run, or the given ones, which are kept.

        Float sums are rounded as samples are grouped into batches; with another amount of free
        memory, a resumed run would group them differently. Raises OutputWriteError.
        """
        path = self._folder / _BATCH_SIZES
        with suppress(OSError, ValueError):
            match json.loads(path.read_bytes()):
                case [int(before), int(size)] if before > 0 and size > 0:
                    return before, size
        write_file(path, json.dumps([batch_size, chunk]).encode(), self._system)
        return batch_size, chunk

    def close(self) -> None:
        """Wait until the current generation is on disk. Raises OutputWriteError if that fails."""
        try:
            self._wait()
        finally:
            self._saver.shutdown()
            for states in (self._current, self._next):
                if states is not None:
                    states.close()
            self._current = self._next = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        if kind is None:
            self.close()
        else:
            # The exception that ends the block is reported, not a second one.
            with suppress(OutputWriteError):
                self.close()

    def _begin(self, states: Tensor) -> _InMemory | _InFile:
        row = states[:1]
        layout = _Layout(
            generation=0 if self.generation is None else self.generation + 1,
            dtype=_dtype_name(states),
            row_shape=tuple(row.shape[1:]),
            row_nbytes=row.numel() * row.element_size(),
        )
        if self._fits(layout):
            return _InMemory(layout)
        return _InFile(layout, self._begins, self._path(layout), self._system, new=True)

    def _fits(self, layout: _Layout) -> bool:
        return 2 * self._begins[-1] * layout.row_nbytes <= self._budget

    def _path(self, layout: _Layout) -> Path:
        return self._folder / f"activations.{layout.generation % 2}"

    def _save(self, states: _InMemory) -> None:
        layout = states.layout
        path = self._path(layout)
        _reserve(path, self._begins[-1] * layout.row_nbytes, self._system)
        with writing(path):
            file = FileIO(path, "r+")
        with file:
            for sample, begin in enumerate(self._begins[:-1]):
                data = _bytes(states.states[sample])
                write_all(file, data, begin * layout.row_nbytes, path, self._system)
            with writing(path):
                self._system.sync_file(file)
        self._record(layout)

    def _wait(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _record(self, layout: _Layout) -> None:
        content = {**asdict(layout), "tokens": self._begins[-1]}
        write_file(self._folder / _LAYOUT, json.dumps(content).encode(), self._system)

    def _resume(self) -> _InMemory | _InFile | None:
        """The generation that was recorded last, None where none is complete."""
        try:
            content = json.loads((self._folder / _LAYOUT).read_bytes())
            tokens = content.pop("tokens")
            layout = _Layout(**{**content, "row_shape": tuple(content["row_shape"])})
            nbytes = self._path(layout).stat().st_size
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if tokens != self._begins[-1] or nbytes != tokens * layout.row_nbytes:
            return None
        states = _InFile(layout, self._begins, self._path(layout), self._system, new=False)
        if not self._fits(layout):
            return states
        loaded = _InMemory(layout)
        try:
            for sample in range(len(self._begins) - 1):
                loaded.states[sample] = states.read(sample)
        finally:
            states.close()
        return loaded


def _reserve(path: Path, nbytes: int, system: System) -> None:
    """Reserve disk space for a file. Raises OutputWriteError where there is not enough."""
    held = path.stat().st_size if path.exists() else 0
    free = free_space(path.parent, system) + held
    if free < nbytes:
        raise OutputWriteError(
            path,
            f"activations between two layers take {format_size(nbytes)}, {format_size(free)} "
            "are free there",
            "free some space there or give fewer samples",
        )
    reserve_file(path, nbytes, system)


def _bytes(states: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, in order; numpy has no bfloat16 to go through."""
    import torch

    flat = states.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _dtype_name(states: Tensor) -> str:
    return str(states.dtype).removeprefix("torch.")


def _sums(lengths: Sequence[int]) -> list[int]:
    """The number of tokens before each sample, and of all samples."""
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    return begins


_LAYER = re.compile(r"layer-(\d{5,})\.json")


class FinishedLayers:
    """The accumulators of finished layers, on disk and in memory; a LayerSink of the engine."""

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
        sums = {name: array.tolist() for name, array in accumulators.arrays().items()}
        # json writes a float with as many digits as it takes to read the same float back.
        content = {"layer": index, "is_mtp": is_mtp, "accumulators": sums}
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


class PartialCalibration:
    """A locked OUT.partial: the finished layers, and the folder for activations."""

    def __init__(self, workdir: WorkDir) -> None:
        """workdir: locked, with its journal open."""
        self._files = workdir.files
        self.layers = FinishedLayers(workdir.files, workdir.system)

    @property
    def activations(self) -> Path:
        """The folder for the activations."""
        return self._files

    def clear(self) -> None:
        """Remove everything; to be called once the score file is written."""
        with writing(self._files):
            shutil.rmtree(self._files)


@contextmanager
def partial_calibration(
    out: Path, run: Run, layers: int = 0, *, restart: bool = False, system: System | None = None
) -> Iterator[PartialCalibration]:
    """Lock OUT.partial for one run.

    run: identifies the command and the source; layers: how many it is to finish; restart: discard
    what an earlier run left. What becomes of an OUT that exists is for the caller to say. Raises
    OutputError where another process has locked the folder, and where it belongs to another
    command.
    """
    with (
        lock_workdir(out, system or default_system(), may_exist=True) as workdir,
        workdir.open_journal(run, restart),
    ):
        partial = PartialCalibration(workdir)
        try:
            yield partial
        except Exception:
            raise
        except BaseException as stop:
            done = len(partial.layers.done_layers())
            if done and workdir.files.exists():
                kept = f"{done} of {counted(layers, 'layer')} are kept in {workdir.folder}"
                stop.add_note(f"{kept}; the same command resumes")
            raise


def _read_layer(path: Path, index: int) -> Accumulators:
    try:
        content = json.loads(path.read_bytes())
        sums = {name: np.array(values) for name, values in content["accumulators"].items()}
        return Accumulators.from_arrays(sums, str(path), index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ScoreError) as error:
        remedy = "--restart starts over"
        raise OutputError(path, f"is not what a calibration wrote ({error})", remedy) from error
