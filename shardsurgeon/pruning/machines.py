"""Machines in words (`8x80GB`, `1x128GB-unified`) and how a model is to be served on them.

Imported by the command line for its options, so nothing heavy is imported here.

A GPU is called by its vendor's number. An 80GB card has 80 GiB but for what the driver and error
correction keep, so each GB is taken as a GiB, less two in a hundred: an H100 80GB shows 79.6 GiB
and counts as 78.4 here. Numbers in MiB and GiB are taken as they are: `nvidia-smi` shows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardsurgeon.errors import UsageError

# What is left of a vendor's gigabytes, taken as GiB.
LEFT_OF_GPU = 0.98
# Of unified memory, which the system and other programs use too (macOS gives a GPU as much).
LEFT_OF_UNIFIED = 0.75
_MOST_GPUS = 1024
# What is asked for where nobody says it: tokens of a sequence, and sequences at a time.
CONTEXT, SEQUENCES = 32768, 16
_WORD = re.compile(
    r"(?:(\d{1,5})\s*[x*×])?\s*(\d+(?:\.\d+)?)\s*(GB|G|MIB|GIB)(-UNIFIED)?", re.ASCII | re.I
)
_HOW = "write it like 8x80GB, 2x141GB or 1x128GB-unified"


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs of one kind. label: as it is written; nbytes: of one GPU."""

    label: str
    gpus: int
    nbytes: int
    unified: bool = False


def parse_machines(text: str, option: str = "--gpus") -> tuple[Machine, ...]:
    """Turn `4x80GB,2x141GB` into machines. Raises UsageError, naming `option`."""
    found = tuple(_machine(word.strip(), option) for word in text.split(","))
    doubled = next((m.label for n, m in enumerate(found) if m in found[:n]), None)
    if doubled:
        raise UsageError(option, f"{doubled} is there twice", "name each machine once")
    return found


def _machine(word: str, option: str) -> Machine:
    match = _WORD.fullmatch(word)
    if match is None:
        raise UsageError(option, f"'{word}' is no machine", _HOW)
    gpus, size, unit, unified = (
        int(match[1] or 1),
        float(match[2]),
        match[3].upper(),
        bool(match[4]),
    )
    if not 1 <= gpus <= _MOST_GPUS:
        raise UsageError(option, f"'{word}' has {gpus:,} GPUs, expected 1 to {_MOST_GPUS:,}", _HOW)
    gib = size / 1024 if unit == "MIB" else size
    if not 1 <= gib <= 4096:
        raise UsageError(option, f"a GPU of {match[2]} {match[3]} is none that is sold", _HOW)
    share = 1.0 if unit in ("MIB", "GIB") else LEFT_OF_GPU
    share = LEFT_OF_UNIFIED if unified else share
    spelt = {"MIB": "MiB", "GIB": "GiB"}.get(unit, "GB")
    label = f"{gpus}x{match[2]}{spelt}{'-unified' if unified else ''}"
    return Machine(label, gpus, int(gib * 2**30 * share), unified)


def usual_machines() -> tuple[Machine, ...]:
    """The ones that people ask about."""
    sizes, counts = (24, 32, 48, 80, 96, 141, 192), (1, 2, 4, 8)
    words = [f"{count}x{size}GB" for size in sizes for count in counts]
    words += ["1x128GB-unified", "1x512GB-unified"]
    return parse_machines(",".join(words))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """What is to fit.

    machines: () for the usual ones; context: tokens of a sequence, None for 32,768 or what the
    model is made for; sequences: at the same time; kv_dtype: `auto` or `fp8`; tensor_parallel:
    ranks that split each matrix, None for all GPUs of a machine; expert_parallel: whether whole
    experts go to one GPU each; mtp: whether MTP layers are loaded. Raises UsageError for numbers
    below 1.
    """

    machines: tuple[Machine, ...] = ()
    context: int | None = None
    sequences: int = SEQUENCES
    kv_dtype: str = "auto"
    tensor_parallel: int | None = None
    expert_parallel: bool = False
    mtp: bool = False

    def __post_init__(self) -> None:
        for option, value in (
            ("--context", self.context),
            ("--sequences", self.sequences),
            ("--tensor-parallel", self.tensor_parallel),
        ):
            if value is not None and value < 1:
                raise UsageError(option, f"{value} is less than 1")
        if self.kv_dtype not in ("auto", "fp8"):
            raise UsageError("--kv-dtype", f"'{self.kv_dtype}' is not known", "say auto or fp8")

    @property
    def options(self) -> dict[str, str]:
        """What asks for it on the command line, by option; a flag has an empty value."""
        said = {"--gpus": ",".join(machine.label for machine in self.machines)}
        said |= {} if self.context is None else {"--context": str(self.context)}
        said |= {} if self.sequences == SEQUENCES else {"--sequences": str(self.sequences)}
        said |= {} if self.kv_dtype == "auto" else {"--kv-dtype": self.kv_dtype}
        ranks = self.tensor_parallel
        said |= {} if ranks is None else {"--tensor-parallel": str(ranks)}
        return said | ({"--expert-parallel": ""} if self.expert_parallel else {})
