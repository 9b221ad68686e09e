"""Samples: records chosen by a seed, as the tokens that pass through the model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.datasets import (
    OPTION,
    DatasetPart,
    OpenDataset,
    identity,
    open_dataset,
)
from shardsurgeon.layerwise.records import Conversation, read_record
from shardsurgeon.layerwise.tokenizer import Tokenizer
from shardsurgeon.storage.phases import Phase, phase

SampleEntry: TypeAlias = tuple[str, int, int]
"""(source, record index, tokens): how a score file lists a sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence of tokens.

    ids: int64 [tokens], at least one, without padding; source: the dataset, as
    `OpenDataset.source` names it; index: the record's number there, from 0.
    """

    ids: NDArray[np.int64]
    source: str
    index: int

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.ids)

    @property
    def entry(self) -> SampleEntry:
        """How a score file lists it."""
        return self.source, self.index, self.num_tokens


def total_tokens(samples: Iterable[Sample]) -> int:
    """Tokens of all samples together."""
    return sum(sample.num_tokens for sample in samples)


def samples_sha256(samples: Iterable[Sample]) -> str:
    """SHA-256 of sources, record indices and tokens, in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.source}\n{sample.index}\n{sample.num_tokens}\n".encode())
        digest.update(sample.ids.astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How samples are chosen from records and made of them.

    seed: of the order of records; max_length: tokens that a sample is cut to; field: the only
    field to look at, None for the known ones; taken: (source, record index) of records to skip,
    which another calibration has used, under whatever name its copy of the dataset had.
    """

    seed: int
    max_length: int
    field: str | None = None
    taken: Collection[tuple[str, int]] = ()


def open_datasets(
    parts: Sequence[DatasetPart], options: SamplingOptions
) -> tuple[OpenDataset, ...]:
    """The datasets of all parts. What can be wrong with them is found here, without a tokenizer.

    Raises DatasetError for a dataset that is missing or empty, whose first record is of unknown
    form, or that has fewer records than asked for, and UsageError where two parts are the same
    data.
    """
    opened: dict[str, str] = {}
    datasets = []
    for part in parts:
        dataset = open_dataset(part)
        twin = opened.setdefault(identity(dataset.source), part.words)
        if twin != part.words:
            problem = f"{twin} and {part.words} hold the same records"
            raise UsageError(OPTION, problem, "name one of them")
        next(_contents(dataset, options), None)
        left = len(dataset.records) - len(_taken(dataset, options))
        if part.count is not None and left < part.count:
            raise _too_few(dataset, max(left, 0), options)
        datasets.append(dataset)
    return tuple(datasets)


def draw_samples(
    datasets: Sequence[OpenDataset], tokenizer: Tokenizer, options: SamplingOptions
) -> list[Sample]:
    """The samples of all datasets, in their order.

    Records without a token are skipped. Raises DatasetError for a record of unknown form and for a
    dataset that has fewer records with a token than asked for, and UsageError where a conversation
    meets a tokenizer without a chat template.
    """
    samples: list[Sample] = []
    with phase("drawing samples", sum(dataset.part.count or 0 for dataset in datasets)) as at:
        for dataset in datasets:
            samples += _draw_part(dataset, tokenizer, options, at)
    return samples


def _draw_part(
    dataset: OpenDataset, tokenizer: Tokenizer, options: SamplingOptions, at: Phase
) -> list[Sample]:
    count = dataset.part.count
    assert count is not None
    samples: list[Sample] = []
    for sample in _in_order(dataset, tokenizer, options):
        samples.append(sample)
        at.advance()
        if len(samples) == count:
            return samples
    raise _too_few(dataset, len(samples), options)


def _in_order(
    dataset: OpenDataset, tokenizer: Tokenizer, options: SamplingOptions
) -> Iterator[Sample]:
    for index, where, content in _contents(dataset, options):
        ids = tokenizer.encode(content, where)[: options.max_length]
        if len(ids):
            yield Sample(ids, dataset.source, index)


def _contents(
    dataset: OpenDataset, options: SamplingOptions
) -> Iterator[tuple[int, str, Conversation | str]]:
    """(number, how messages name it, content) of every record, in the order of drawing."""
    taken = _taken(dataset, options)
    for index in _order(len(dataset.records), options.seed, dataset.source).tolist():
        if index not in taken:
            where = f"{dataset.part.words}, record {index:,}"
            yield index, where, read_record(dataset.records[index], where, options.field)


def _taken(dataset: OpenDataset, options: SamplingOptions) -> set[int]:
    """The numbers of the dataset's records that are to be skipped."""
    known_as = identity(dataset.source)
    return {index for source, index in options.taken if identity(source) == known_as}


def _order(num_records: int, seed: int, source: str) -> NDArray[np.int64]:
    """Every record once, shuffled. numpy promises that a bit generator's raw output stays the
    same in later versions; it promises no such thing for its shuffle."""
    digest = np.frombuffer(hashlib.sha256(source.encode()).digest(), "<u4")
    bits = np.random.PCG64([seed, *digest.tolist()])
    return np.argsort(bits.random_raw(num_records), kind="stable").astype(np.int64)


def _too_few(dataset: OpenDataset, found: int, options: SamplingOptions) -> DatasetError:
    part, records = dataset.part, len(dataset.records)
    taken = len(_taken(dataset, options))
    problem = f"has {records:,} records, of which {found:,} can be drawn"
    if taken:
        problem += f" ({taken:,} are in the calibration that is extended)"
    problem += f"; {part.count:,} samples were asked for"
    if not found:
        return DatasetError(part.words, problem, "give another dataset")
    return DatasetError(part.words, problem, f"ask for {found:,} (--samples, or name:{found})")
