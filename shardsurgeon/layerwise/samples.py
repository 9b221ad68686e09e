"""Samples: records chosen by a seed, turned into text by the chat template, and tokenized."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.files import is_needed
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.datasets import (
    OPTION,
    DatasetPart,
    OpenDataset,
    identity,
    open_dataset,
)
from shardsurgeon.layerwise.records import Conversation, read_record
from shardsurgeon.layerwise.settings import require
from shardsurgeon.storage.files import writing
from shardsurgeon.storage.formats.index import CONFIG_NAME, INDEX_NAME
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint
from shardsurgeon.storage.limits import TOKENIZER_CONFIG, TOKENIZER_FILE, read_limited, require_size
from shardsurgeon.storage.phases import Phase, phase
from shardsurgeon.storage.source import Source, require_plain

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


_OPTION = "--tokenizer"
_TRUST = "--trust-remote-code"

# Vocabularies, merges, templates and the code of some tokenizers; sizes from sentencepiece
# models down. Weights have other endings.
_ENDINGS = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")


class Tokenizer:
    """A tokenizer of transformers with its chat template.

    place: what messages call it.
    """

    def __init__(
        self, place: str | PathLike[str], *, name: str = "", trust_remote_code: bool = False
    ) -> None:
        """Load it. place: a folder, or a model of the Hub; name: what messages call it instead.

        Raises UsageError where there is no tokenizer, where it cannot be read, and where it is
        code of the model that trust_remote_code does not allow to run.
        """
        transformers = require("transformers")
        self.place = name or str(place)
        if not trust_remote_code and _is_code(Path(place)):
            problem = f"the tokenizer of {self.place} is code that its folder ships"
            raise UsageError(_OPTION, problem, f"read it, then allow it with {_TRUST}")
        with silence_hub():
            self._tokenizer = _load(transformers, str(place), self.place, trust_remote_code)
        # Without tokenizer files, transformers makes an empty tokenizer for a known model type.
        if not self._tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise _unreadable(self.place)

    def encode(self, content: Conversation | str, where: str) -> NDArray[np.int64]:
        """The token ids, int64 [tokens], of a conversation in the chat template, or of a text.

        where: the record, as messages name it. Raises DatasetError where the template refuses
        the conversation, UsageError where there is no template.
        """
        is_chat = isinstance(content, Conversation)
        text = self._render(content, where) if isinstance(content, Conversation) else content
        # The template's text contains the special tokens already.
        encoded = self._tokenizer(text, add_special_tokens=not is_chat, verbose=False)
        return np.asarray(encoded["input_ids"], np.int64)

    def _render(self, conversation: Conversation, where: str) -> str:
        if not self._tokenizer.chat_template:
            problem = f"{self.place} has no chat template, and {where} is a conversation"
            raise UsageError(_OPTION, problem, "name a tokenizer with one, or give texts")
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation.messages, tools=conversation.tools, tokenize=False
            )
        # A template is a program that may raise anything.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            problem = f"does not go through the chat template ({reason})"
            raise DatasetError(where, problem, "leave the record out or mend it") from error
        return text


def _load(transformers: Any, place: str, name: str, trust_remote_code: bool) -> Any:
    load = transformers.AutoTokenizer.from_pretrained
    try:
        return load(place, trust_remote_code=trust_remote_code)
    # Each tokenizer class reads its files, and the config, with code that may raise anything.
    except Exception as error:
        # The config may be what transformers cannot read, not the tokenizer: try an empty one.
        with suppress(Exception):
            empty = transformers.PreTrainedConfig()
            return load(place, config=empty, trust_remote_code=trust_remote_code)
        raise _unreadable(name, error) from error


def _is_code(folder: Path) -> bool:
    """Whether a folder's tokenizer needs code from the folder: no tokenizer.json replaces it."""
    try:
        raw = read_limited(folder / "tokenizer_config.json", TOKENIZER_CONFIG, UsageError)
        own = "AutoTokenizer" in parse_for_a_hint(raw, TOKENIZER_CONFIG).get("auto_map", {})
    except (UsageError, AttributeError, TypeError):
        return False
    return own and not (folder / "tokenizer.json").exists()


def _unreadable(place: str, error: Exception | None = None) -> UsageError:
    problem = f"{place} has no tokenizer that transformers can read"
    if error is not None:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        problem += f" ({reason})"
    return UsageError(_OPTION, problem, f"name a folder that has one with {_OPTION}")


@contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path]:
    """The model's folder or, where the model is remote, temporary copies of its small files.

    Raises what reading the source raises, CheckpointError where a file in it is a pipe or a link to
    nothing, and OutputWriteError where the copies do not fit.
    """
    config = source.local_path(CONFIG_NAME)
    if config is not None:
        # transformers would wait for the other end of a pipe.
        source.list()
        require_plain(source, sorted(filter(is_needed, source.odd)), links=True)
        yield config.parent
        return
    with TemporaryDirectory() as name:
        for file in source.list():
            if "/" not in file.name and file.name.endswith(_ENDINGS) and file.name != INDEX_NAME:
                where = f"{source.location}/{file.name}"
                require_size(file.nbytes, TOKENIZER_FILE, where, UsageError)
                copy = Path(name, file.name)
                with writing(copy):
                    copy.write_bytes(source.read(file.name, 0, file.nbytes))
        yield Path(name)
