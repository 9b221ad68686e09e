"""What decides the result of a calibration, what it reports to, and the packages it needs."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from shardsurgeon.errors import UsageError, install
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.storage.phases import phase

BatchSize: TypeAlias = int | Literal["auto"]

# What a kernel's driver for GPUs that torch calls CUDA leaves in /dev: NVIDIA's, also of its small
# boards, AMD's, and the one of Linux within Windows.
_GPU_FILES = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "kfd", "dxg")
_CUDA_DRIVER = "libcuda.so.1"
# What torch.version says: `cuda: Optional[str] = '13.0'`.
_BUILT = re.compile(r"^(__version__|cuda|hip)\b[^=\n]*=[ \t]*(.+?)[ \t]*$", re.MULTILINE)
# Versions of torch as its makers build it; others may bring a driver of their own.
_OF_ITS_MAKERS = re.compile(r"'[\d.]+(\+(cpu|cu\d+|rocm[\d.]+))?'")

Tokens: TypeAlias = Literal["all", "assistant"]
"""Which tokens are added up: all, or those that the assistant says in a conversation."""
TOKENS = ("all", "assistant")

DTYPES = ("bfloat16", "float16", "float32", "float64")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")

INSTALL = install("calibrate")
# The numbers of a calibration depend on these; the score file names their versions.
_ENGINES = ("torch", "transformers")
_NEEDED = (*_ENGINES, "greenlet", "psutil")


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the numbers of a calibration, apart from its samples.

    device: `cpu`, `cuda` for all that are visible, or `cuda:<n>`; dtype: of weights and
    activations, one of DTYPES, None for the checkpoint's own, or float32 on a CPU that is faster in
    it; batch_size: samples of one forward pass, or `auto` for what fits; seed: of the choice of
    samples. Raises UsageError for other values.
    """

    device: str = "cpu"
    dtype: str | None = None
    batch_size: BatchSize = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            problem = f"'{self.device}' is not a device"
            raise UsageError("--device", problem, "write cpu, cuda or cuda:1")
        if self.dtype not in (None, *DTYPES):
            problem = f"'{self.dtype}' is none of {', '.join(DTYPES)}"
            raise UsageError("--dtype", problem)
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise UsageError("--batch-size", f"{self.batch_size} is less than 1")
        if self.seed < 0:
            raise UsageError("--seed", f"{self.seed} is less than 0")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a calibration is.

    layer: the one that computes now; layers_done, layers_total: MTP layers included;
    tokens_done, tokens_total: each token is counted once in every layer.
    """

    layer: int
    layers_done: int
    layers_total: int
    tokens_done: int
    tokens_total: int


Listener: TypeAlias = Callable[[Progress], None]


class LayerSink(Protocol):
    """Receives the results of finished layers."""

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        """Keep the sums over all samples in a layer; for a layer that is kept, do nothing.

        index: the layer's number; MTP layer j is num_hidden_layers + j.
        """
        ...

    def done_layers(self) -> set[int]:
        """Numbers of the layers that are kept, those of earlier runs included."""
        ...


def require(name: str) -> Any:
    """Import a package. Raises UsageError, saying what to install, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        problem = f"needs {missing}, which is not installed"
        raise UsageError("running a model", problem, INSTALL) from error


def missing_packages() -> list[str]:
    """The packages that every run of a model needs and that are not installed; imports none."""
    return [name for name in _NEEDED if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # in sys.modules, and hidden there
        return False


def require_packages() -> None:
    """Raise UsageError where a package that every run of a model needs is missing; imports none."""
    for name in missing_packages():
        require(name)


def refuse_missing_gpu(device: str) -> None:
    """Raise UsageError where there can be no GPU, without importing torch, which takes seconds.

    What may have one passes: torch itself is asked when it is loaded. A GPU is ruled out where
    torch is built for none, and where Linux has neither a driver's file nor its library.
    """
    if not device.startswith("cuda") or "torch" in sys.modules:
        return
    built = _torch_build()
    version = built.get("__version__", "")
    if not {"cuda", "hip"} <= built.keys() or not _OF_ITS_MAKERS.fullmatch(version):
        return
    where, remedy = f"--device {device}", "give another device, such as cpu"
    if built["cuda"] == built["hip"] == "None":
        named = version.strip("'")
        raise UsageError(where, f"torch {named} is built without CUDA", remedy)
    if sys.platform == "linux" and not _may_have_gpu():
        raise UsageError(where, "this machine has no driver of a GPU", remedy)


def _torch_build() -> dict[str, str]:
    """What the installed torch says of itself in its version.py, as it is written there."""
    spec = find_spec("torch")
    with suppress(OSError, ValueError):
        if spec is not None and spec.origin is not None:
            return dict(_BUILT.findall(Path(spec.origin).with_name("version.py").read_text()))
    return {}


def _may_have_gpu() -> bool:
    if any(any(Path("/dev").glob(pattern)) for pattern in _GPU_FILES):
        return True
    # A GPU of another machine may be lent by a library alone.
    with suppress(OSError):
        ctypes.CDLL(_CUDA_DRIVER)
        return True
    return False


def load_packages() -> None:
    """Import them, which takes long. Raises UsageError where one cannot be imported."""
    with phase("loading torch and transformers"):
        for name in _NEEDED:
            require(name)


def versions() -> dict[str, str]:
    """Package → version, of those that the numbers of a calibration depend on."""
    return {name: str(require(name).__version__) for name in _ENGINES}
