"""Samples: what is pushed through the model, and how it is written down.

`drawing` makes them from datasets; `engine` takes them; the score file keeps the list, so that a
calibration can be repeated, extended, or merged with one that shares no sample with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

SampleEntry: TypeAlias = tuple[str, int, int]
"""Source, record index, tokens: how a score file lists a sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence of tokens.

    ids: int64 [tokens], at least one, no padding; source: the dataset it came from, as its spec
    names it; index: the record's number there, from 0.
    """

    ids: NDArray[np.int64]
    source: str
    index: int

    @property
    def num_tokens(self) -> int:
        """How long it is."""
        return len(self.ids)

    @property
    def entry(self) -> SampleEntry:
        """How a score file lists it."""
        return self.source, self.index, self.num_tokens


def total_tokens(samples: Iterable[Sample]) -> int:
    """Tokens of all samples together."""
    return sum(sample.num_tokens for sample in samples)


def samples_sha256(samples: Iterable[Sample]) -> str:
    """The fingerprint of sources, indices and tokens, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.source}\n{sample.index}\n{sample.num_tokens}\n".encode())
        digest.update(sample.ids.astype("<i8").tobytes())
    return digest.hexdigest()
