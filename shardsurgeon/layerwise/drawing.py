"""Samples drawn from datasets, the same ones for the same seed on every machine.

Every dataset is put into an order of its own, which its name and the seed decide; samples are
taken from the front. So a longer draw begins with the shorter one, and a calibration is extended
with the records that come next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.datasets import OpenDataset, open_dataset
from shardsurgeon.layerwise.records import read_record
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.specs import DatasetPart
from shardsurgeon.layerwise.tokenizing import Tokenizer


@dataclass(frozen=True, slots=True)
class Draw:
    """How samples are made of records.

    seed: decides the order; max_length: tokens that a sample is cut to; field: the only field
    to look at, None for those that are known; taken: (source, record index) of samples that
    another calibration has already.
    """

    seed: int
    max_length: int
    field: str | None = None
    taken: Collection[tuple[str, int]] = ()


def draw_samples(parts: Sequence[DatasetPart], tokenizer: Tokenizer, draw: Draw) -> list[Sample]:
    """The samples of all parts, in order of the parts.

    Records without a single token are passed over. Raises DatasetError for a dataset that is
    missing, empty, not to be understood, or has fewer records than are asked of it.
    """
    samples: list[Sample] = []
    for part in parts:
        samples += _draw_part(open_dataset(part), tokenizer, draw)
    return samples


def _draw_part(dataset: OpenDataset, tokenizer: Tokenizer, draw: Draw) -> list[Sample]:
    count = dataset.part.count
    assert count is not None
    samples: list[Sample] = []
    for sample in _in_order(dataset, tokenizer, draw):
        samples.append(sample)
        if len(samples) == count:
            return samples
    raise _too_few(dataset, len(samples), draw)


def _in_order(dataset: OpenDataset, tokenizer: Tokenizer, draw: Draw) -> Iterator[Sample]:
    for index in _order(len(dataset.records), draw.seed, dataset.source).tolist():
        if (dataset.source, index) in draw.taken:
            continue
        where = f"{dataset.part.words}, record {index:,}"
        said = read_record(dataset.records[index], where, draw.field)
        ids = tokenizer.encode(said, where)[: draw.max_length]
        if len(ids):
            yield Sample(ids, dataset.source, index)


def _order(num_records: int, seed: int, source: str) -> NDArray[np.int64]:
    """Every record once. Made of raw bits, which numpy promises to be the same for ever."""
    digest = np.frombuffer(hashlib.sha256(source.encode()).digest(), "<u4")
    bits = np.random.PCG64([seed, *digest.tolist()])
    return np.argsort(bits.random_raw(num_records), kind="stable").astype(np.int64)


def _too_few(dataset: OpenDataset, found: int, draw: Draw) -> DatasetError:
    part, records = dataset.part, len(dataset.records)
    taken = sum(source == dataset.source for source, _ in draw.taken)
    problem = f"has {records:,} records, of which {found:,} can be drawn"
    if taken:
        problem += f" ({taken:,} are in the calibration that is extended)"
    problem += f"; {part.count:,} samples were asked for"
    if not found:
        return DatasetError(part.words, problem, "give another dataset")
    return DatasetError(part.words, problem, f"ask for {found:,} (--samples, or name:{found})")
