"""Samples: records chosen by a seed, as the tokens that pass through the model.

A sample is a record, cut to a length; or, packed, a window of that length, filled with records one
behind another. Windows are filled as the REAP reference does by default (`reap/data.py` of
CerebrasResearch/reap): after a record one position stays empty, the gap; the last record is cut at
the window's end, and what is cut off is in no other window. A window's records see one another.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.errors import DatasetError, UsageError, printable
from shardsurgeon.layerwise.datasets import (
    OPTION,
    DatasetPart,
    OpenDataset,
    identity,
    open_dataset,
)
from shardsurgeon.layerwise.records import Conversation, read_answer, read_record
from shardsurgeon.layerwise.settings import Tokens
from shardsurgeon.layerwise.tokenizer import Tokenizer
from shardsurgeon.storage.phases import Phase, phase

# Of the records that were left out, so many are listed.
MOST_LISTED = 100
# Where none of so many records can be used, the rest is not read.
_HOPELESS = 1_000
_SKIP = "--skip-invalid"

SampleEntry: TypeAlias = tuple[str, int, int]
"""(source, record index, tokens that are added up): how a score file lists a sample."""


GAP_ID = 0


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """Which record lies in a window at [begin, end); index: its number in the dataset, from 0."""

    index: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence of tokens.

    ids: int64 [tokens], at least one, without padding; source: the dataset, as
    `OpenDataset.source` names it; index: the record's number there, from 0; counted: bool
    [tokens], which tokens are added up, at least one of them, None for all. All tokens pass
    through the model. records: of a packed window, whose `index` is that of its first record, what
    it is filled with, in order. is_answer: whether the counted tokens are a model's answer, which
    is forced on others.
    """

    ids: NDArray[np.int64]
    source: str
    index: int
    counted: NDArray[np.bool_] | None = None
    records: tuple[PackedRecord, ...] = ()
    is_answer: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.ids)

    @property
    def num_counted(self) -> int:
        """How many of them are added up."""
        return self.num_tokens if self.counted is None else int(self.counted.sum())

    @property
    def gaps(self) -> NDArray[np.bool_] | None:
        """Bool [tokens], which positions hold no token of a record; None where all do.

        Their id is GAP_ID, they are not added up, and no token may attend to them.
        """
        empty = np.ones(self.num_tokens, np.bool_)
        for record in self.records:
            empty[record.begin : record.end] = False
        return empty if self.records and empty.any() else None

    @property
    def entries(self) -> list[SampleEntry]:
        """How a score file lists it: every record, so that none is ever added up twice."""
        if not self.records:
            return [(self.source, self.index, self.num_counted)]
        counted = np.ones(self.num_tokens, np.bool_) if self.counted is None else self.counted
        return [
            (self.source, record.index, int(counted[record.begin : record.end].sum()))
            for record in self.records
        ]


def total_tokens(samples: Iterable[Sample]) -> int:
    """Tokens of all samples together."""
    return sum(sample.num_tokens for sample in samples)


def counted_tokens(samples: Iterable[Sample]) -> int:
    """Tokens of all samples together that are added up."""
    return sum(sample.num_counted for sample in samples)


def samples_sha256(samples: Iterable[Sample]) -> str:
    """SHA-256 of sources, record indices and tokens, in their order, and of which tokens are added
    up where not all are, as hexadecimal digits."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.source}\n{sample.index}\n{sample.num_tokens}\n".encode())
        digest.update(sample.ids.astype("<i8").tobytes())
        for record in sample.records:
            digest.update(f"{record.index} {record.begin} {record.end}\n".encode())
        if sample.counted is not None:
            digest.update(b"counted\n" + np.packbits(sample.counted).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How samples are chosen from records and made of them.

    seed: of the order of records; max_length: tokens that a sample is cut to; field: the only
    field to look at, None for the known ones; taken: (source, record index) of records to skip,
    which another calibration has used, under whatever name its copy of the dataset had;
    skip_invalid: whether records that cannot be used are left out; tokens: which tokens are added
    up; pack: whether a sample is a window of max_length tokens filled with records; answers:
    whether the `completion` of a record is an answer to force, of which alone tokens are added up.
    """

    seed: int
    max_length: int
    field: str | None = None
    taken: Collection[tuple[str, int]] = ()
    skip_invalid: bool = False
    tokens: Tokens = "all"
    pack: bool = False
    answers: bool = False


SkippedRecord: TypeAlias = tuple[str, int, str]
"""(source, record index, why it cannot be used)."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn.

    samples: in the order of the datasets; skipped: the first MOST_LISTED records that were left
    out because they cannot be used; num_skipped: how many there were.
    """

    samples: list[Sample]
    skipped: tuple[SkippedRecord, ...] = ()
    num_skipped: int = 0


def open_datasets(
    parts: Sequence[DatasetPart], options: SamplingOptions
) -> tuple[OpenDataset, ...]:
    """The datasets of all parts. What can be wrong with them is found here, without a tokenizer.

    Raises DatasetError for a dataset that is missing or empty, whose first record cannot be used
    (unless such records are left out), or that has fewer records than asked for, and UsageError
    where two parts are the same data.
    """
    opened: dict[str, str] = {}
    datasets = []
    for part in parts:
        dataset = open_dataset(part)
        twin = opened.setdefault(identity(dataset.source), part.words)
        if twin != part.words:
            problem = f"{twin} and {part.words} hold the same records"
            raise UsageError(OPTION, problem, "name one of them")
        reading = _Reading(dataset, options)
        if not options.skip_invalid:
            first = next(reading.numbers(), None)
            if first is not None:
                reading.content(first)
        left = len(dataset.records) - len(_taken(dataset, options))
        if part.count is not None and left < part.count:
            raise _too_few(reading, max(left, 0))
        datasets.append(dataset)
    return tuple(datasets)


def draw_samples(
    datasets: Sequence[OpenDataset], tokenizer: Tokenizer, options: SamplingOptions
) -> Drawn:
    """The samples of all datasets, in their order.

    Records without a token that is added up are passed over. Raises DatasetError for a record that
    cannot be used, unless such records are left out, and for a dataset that has fewer records with
    a token than asked for, and UsageError where a conversation meets a tokenizer without a chat
    template, or one that does not say which tokens are the assistant's where those are asked for.
    """
    if options.tokens == "assistant":
        tokenizer.require_assistant_tokens()
    samples: list[Sample] = []
    readings = [_Reading(dataset, options) for dataset in datasets]
    with phase("drawing samples", sum(dataset.part.count or 0 for dataset in datasets)) as at:
        for reading in readings:
            samples += _draw_part(reading, tokenizer, at)
    skipped = [record for reading in readings for record in reading.skipped]
    return Drawn(
        samples, tuple(skipped[:MOST_LISTED]), sum(reading.num_skipped for reading in readings)
    )


def _draw_part(reading: _Reading, tokenizer: Tokenizer, at: Phase) -> list[Sample]:
    count = reading.dataset.part.count
    assert count is not None
    samples: list[Sample] = []
    for sample in reading.samples(tokenizer):
        samples.append(sample)
        at.advance()
        if len(samples) == count:
            return samples
    raise _too_few(reading, len(samples), packed=reading.options.pack)


class _Reading:
    """One dataset's records in the order of drawing, and which of them had to be left out."""

    def __init__(self, dataset: OpenDataset, options: SamplingOptions) -> None:
        self.dataset = dataset
        self.options = options
        self.skipped: list[SkippedRecord] = []
        self.num_skipped = 0
        self._found = False

    def numbers(self) -> Iterator[int]:
        """The numbers of the records, without those that are taken."""
        taken = _taken(self.dataset, self.options)
        order = record_order(len(self.dataset.records), self.options.seed, self.dataset.source)
        return (index for index in order.tolist() if index not in taken)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """A sample of each record that has a token, or windows filled with them."""
        singles = self._singles(tokenizer)
        return windows(singles, self.options.max_length) if self.options.pack else singles

    def _singles(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        for index in self.numbers():
            sample = self._sample(index, tokenizer)
            if sample is not None and sample.num_counted:
                self._found = True
                yield sample
            elif self.num_skipped >= _HOPELESS and not self._found:
                raise self._hopeless()

    def content(self, index: int) -> Conversation | str:
        """What a record holds. Raises DatasetError where it cannot be used."""
        where = self._where(index)
        try:
            content = read_record(self.dataset.records[index], where, self.options.field)
            if self.options.tokens == "assistant" and not isinstance(content, Conversation):
                raise DatasetError(where, "is a text, in which no assistant speaks (--tokens)")
            return content
        except DatasetError as error:
            raise _skippable(error) from error

    def _sample(self, index: int, tokenizer: Tokenizer) -> Sample | None:
        """A record's tokens, as many as a sample has; None where it holds nothing."""
        where, longest = self._where(index), self.options.max_length
        try:
            if self.options.answers:
                record = self.dataset.records[index]
                answered = read_answer(record, where, is_chat=tokenizer.is_chat)
                if answered is not None:
                    ids, said = tokenizer.encode_answer(answered, where)
                    ids, said = ids[:longest], said[:longest]
                    return Sample(ids, self.dataset.source, index, said, is_answer=True)
            content = self.content(index)
            if self.options.tokens == "assistant":
                assert isinstance(content, Conversation)
                ids, said = tokenizer.encode_assistant(content, where)
                return Sample(ids[:longest], self.dataset.source, index, said[:longest])
            # To an empty text a tokenizer may still add a token for its beginning.
            if not content:
                return None
            ids = tokenizer.encode(content, where)
            return Sample(ids[:longest], self.dataset.source, index)
        except DatasetError as error:
            if not self.options.skip_invalid:
                raise _skippable(error) from error
            self.num_skipped += 1
            if len(self.skipped) < MOST_LISTED:
                reason = textwrap.shorten(printable(error.problem), 120, placeholder=" …")
                self.skipped.append((self.dataset.source, index, reason))
            return None

    def _hopeless(self) -> DatasetError:
        problem = f"of the first {_HOPELESS:,} records drawn none can be used: "
        problem += self.skipped[0][2]
        return DatasetError(self.dataset.part.words, problem, "give another dataset")

    def _where(self, index: int) -> str:
        return f"{self.dataset.part.words}, record {index:,}"


def windows(samples: Iterable[Sample], length: int) -> Iterator[Sample]:
    """Windows of `length` tokens filled with samples of one dataset, the last as far as they go.

    samples: of records, each at most `length` tokens long.
    """
    window: list[tuple[int, Sample]] = []
    at = 0
    for sample in samples:
        window.append((at, sample))
        at += sample.num_tokens + 1
        if at >= length:
            yield _window(window, length)
            window, at = [], 0
    if window:
        yield _window(window, at - 1)


def _window(placed: Sequence[tuple[int, Sample]], length: int) -> Sample:
    """Samples at their places in a window, the last one cut where it does not fit."""
    ids = np.full(length, GAP_ID, np.int64)
    counted = np.zeros(length, np.bool_)
    records = []
    for begin, sample in placed:
        end = min(begin + sample.num_tokens, length)
        ids[begin:end] = sample.ids[: end - begin]
        counted[begin:end] = True if sample.counted is None else sample.counted[: end - begin]
        records.append(PackedRecord(sample.index, begin, end))
    first = placed[0][1]
    whole = None if counted.all() else counted
    return Sample(ids, first.source, first.index, whole, tuple(records))


def _skippable(error: DatasetError) -> DatasetError:
    """The error of a record, which names the option that leaves such records out."""
    if _SKIP in error.remedy:
        return error
    remedy = f"leave such records out with {_SKIP}"
    if error.remedy:
        remedy = f"{error.remedy}, or {remedy}"
    return DatasetError(error.where, error.problem, remedy)


def _taken(dataset: OpenDataset, options: SamplingOptions) -> set[int]:
    """The numbers of the dataset's records that are to be passed over."""
    known_as = identity(dataset.source)
    return {index for source, index in options.taken if identity(source) == known_as}


def record_order(num_records: int, seed: int, source: str) -> NDArray[np.int64]:
    """The numbers of all records of the dataset `source`, shuffled. numpy promises that a bit
    generator's raw output stays the same in later versions; it promises no such thing for its
    shuffle."""
    digest = np.frombuffer(hashlib.sha256(source.encode()).digest(), "<u4")
    bits = np.random.PCG64([seed, *digest.tolist()])
    return np.argsort(bits.random_raw(num_records), kind="stable").astype(np.int64)


def _too_few(reading: _Reading, found: int, *, packed: bool = False) -> DatasetError:
    """found: records that can be drawn, or, packed, windows that they fill."""
    part, records = reading.dataset.part, len(reading.dataset.records)
    problem = f"has {records:,} records, of which {found:,} can be drawn"
    if packed:
        length = reading.options.max_length
        problem = f"has {records:,} records, which fill {found:,} windows of {length:,} tokens"
    out = []
    if taken := len(_taken(reading.dataset, reading.options)):
        out.append(f"{taken:,} are in the calibration that is extended")
    if reading.num_skipped:
        out.append(f"{reading.num_skipped:,} are invalid: {reading.skipped[0][2]}")
    problem += f" ({', '.join(out)})" if out else ""
    problem += f"; {part.count:,} samples were asked for"
    if not found:
        return DatasetError(part.words, problem, "give another dataset")
    return DatasetError(part.words, problem, f"ask for {found:,} (--samples, or name:{found})")
