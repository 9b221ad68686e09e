"""What a calibration is asked for, and what it reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.parts import PartReport
from shardsurgeon.layerwise.settings import TOKENS, Settings, Tokens
from shardsurgeon.reports import Report


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What a calibration is to do.

    dataset: as `--dataset` writes it, empty in a dry run without one; samples: of all parts
    together, None for what the dataset says, or 512; max_length: tokens that a sample is cut to,
    None for 2048 or less where the model allows less; share: (k, n), this run takes every n-th
    sample, beginning with the k-th;
    extend: a score file whose samples are left out and whose sums are added; activation_budget:
    bytes of memory for hidden states between layers, None for half of what is free; field: the
    only field of a record to look at; tokenizer: a folder or a model of the Hub, None for the
    model's own; trust_remote_code: whether a tokenizer may run code of the model; skip_invalid:
    whether records that cannot be used are left out; tokens: which tokens are added up; pack:
    whether a sample is a window of max_length tokens filled with records; memory: the most bytes
    that all of it may take on a device, None for what is free. Raises UsageError for numbers
    below 1, a share that is none, and other tokens.
    """

    dataset: str
    settings: Settings
    samples: int | None = None
    max_length: int | None = None
    share: tuple[int, int] | None = None
    extend: str | os.PathLike[str] | None = None
    activation_budget: int | None = None
    field: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    skip_invalid: bool = False
    tokens: Tokens = "all"
    pack: bool = False
    memory: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--samples", self.samples), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise UsageError(option, f"{value} is less than 1")
        if self.tokens not in TOKENS:
            raise UsageError("--tokens", f"'{self.tokens}' is none of {', '.join(TOKENS)}")
        if self.share is not None and not 1 <= self.share[0] <= self.share[1]:
            problem = f"{self.share[0]}/{self.share[1]} is not a share"
            raise UsageError("--share", problem, "write it like 1/4, 2/4, 3/4, 4/4")


@dataclass(frozen=True, slots=True, repr=False)
class CalibrationReport(Report):
    """What a calibration did.

    samples, tokens: of this run, as they passed through the model; counted_tokens: those of them
    that were added up; total_samples: of the file, those of an extended file included (a window
    is one sample);
    layers: MoE layers in the file; mtp_layers: how many of them are MTP layers; layers_resumed:
    layers that an earlier run had finished; never_routed: experts, over all layers, that no token
    was routed to; dtype: of the arithmetic; dtype_reason: why that is not the model's own, where
    nobody asked for it; seconds: wall time; parts: the datasets of the file, those of an extended
    file included, where it keeps the sums of several apart.

    >>> with open("chats.txt", "w") as file:
    ...     written = file.write("the cat sat on the mat\\n" * 4)
    >>> report = shardsurgeon.calibrate("fixtures/qwen3_moe", "chats.txt:2", "measured.npz")
    >>> report.title, report.device
    ('qwen3_moe: chats.txt:2', 'cpu')
    """

    model: str
    out: str
    dataset: str
    samples: int
    tokens: int
    counted_tokens: int
    total_samples: int
    layers: int
    mtp_layers: int
    layers_resumed: int
    never_routed: int
    dtype: str
    dtype_reason: str | None
    device: str
    seconds: float
    notes: tuple[str, ...]
    parts: tuple[PartReport, ...] = ()

    figures: ClassVar[tuple[str, ...]] = ("tokens_per_second",)

    @property
    def title(self) -> str:
        """The model, and the dataset as it was asked for."""
        return f"{self.model}: {self.dataset}"

    @property
    def tokens_per_second(self) -> float:
        """Through the whole model, in this run."""
        return self.tokens / max(self.seconds, 0.001)
