"""Samples: records chosen by a seed, turned into text by the chat template, and tokenized."""

from __future__ import annotations

import hashlib
import json
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

from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.datasets import DatasetPart, OpenDataset, Record, open_dataset
from shardsurgeon.layerwise.settings import require
from shardsurgeon.storage.files import writing
from shardsurgeon.storage.formats.index import CONFIG_NAME, INDEX_NAME
from shardsurgeon.storage.source import Source

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
    which another calibration has used.
    """

    seed: int
    max_length: int
    field: str | None = None
    taken: Collection[tuple[str, int]] = ()


def draw_samples(
    parts: Sequence[DatasetPart], tokenizer: Tokenizer, options: SamplingOptions
) -> list[Sample]:
    """The samples of all parts, in the order of the parts.

    Records without a token are skipped. Raises DatasetError for a dataset that is missing or
    empty, that holds a record of unknown form, or that has fewer records than asked for, and
    UsageError where a conversation meets a tokenizer without a chat template.
    """
    samples: list[Sample] = []
    for part in parts:
        samples += _draw_part(open_dataset(part), tokenizer, options)
    return samples


def _draw_part(
    dataset: OpenDataset, tokenizer: Tokenizer, options: SamplingOptions
) -> list[Sample]:
    count = dataset.part.count
    assert count is not None
    samples: list[Sample] = []
    for sample in _in_order(dataset, tokenizer, options):
        samples.append(sample)
        if len(samples) == count:
            return samples
    raise _too_few(dataset, len(samples), options)


def _in_order(
    dataset: OpenDataset, tokenizer: Tokenizer, options: SamplingOptions
) -> Iterator[Sample]:
    for index in _order(len(dataset.records), options.seed, dataset.source).tolist():
        if (dataset.source, index) in options.taken:
            continue
        where = f"{dataset.part.words}, record {index:,}"
        content = read_record(dataset.records[index], where, options.field)
        ids = tokenizer.encode(content, where)[: options.max_length]
        if len(ids):
            yield Sample(ids, dataset.source, index)


def _order(num_records: int, seed: int, source: str) -> NDArray[np.int64]:
    """Every record once, shuffled. numpy promises that a bit generator's raw output stays the
    same in later versions; it promises no such thing for its shuffle."""
    digest = np.frombuffer(hashlib.sha256(source.encode()).digest(), "<u4")
    bits = np.random.PCG64([seed, *digest.tolist()])
    return np.argsort(bits.random_raw(num_records), kind="stable").astype(np.int64)


def _too_few(dataset: OpenDataset, found: int, options: SamplingOptions) -> DatasetError:
    part, records = dataset.part, len(dataset.records)
    taken = sum(source == dataset.source for source, _ in options.taken)
    problem = f"has {records:,} records, of which {found:,} can be drawn"
    if taken:
        problem += f" ({taken:,} are in the calibration that is extended)"
    problem += f"; {part.count:,} samples were asked for"
    if not found:
        return DatasetError(part.words, problem, "give another dataset")
    return DatasetError(part.words, problem, f"ask for {found:,} (--samples, or name:{found})")


Message: TypeAlias = dict[str, Any]

_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "answers"),
    ("problem", "solution"),
    ("input", "output"),
)
_TEXTS = ("text", "content", "code", "raw_content", "prompt")
# The better one of two answers: messages, or the whole conversation as one text.
_PREFERENCES = ("chosen",)
# The text that an instruction is about; it is added to the instruction.
_CONTEXT = ("input", "context")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIELD = "--field"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them, and the tools that a model may call, if any."""

    messages: list[Message]
    tools: list[Any] | None = None


def read_record(record: Record, where: str, field: str | None = None) -> Conversation | str:
    """The conversation or the text of a record.

    where: the record, as error messages name it; field: the only field to look at. Raises
    DatasetError where no known field exists, or where its value has an unknown form.
    """
    if isinstance(record, str):
        return record
    if field is not None:
        return _one_field(record, field, where)
    for name in _CONVERSATIONS:
        if record.get(name):
            return Conversation(_messages(record[name], name, where), _tools(record))
    for first, second in _PAIRS:
        if record.get(first) and isinstance(record.get(second), str | list):
            return Conversation(_pair(record, first, second, where), _tools(record))
    for name in (*_PREFERENCES, *_TEXTS):
        if _are_messages(_unpacked(record.get(name))):
            return Conversation(_messages(record[name], name, where), _tools(record))
        if isinstance(record.get(name), str):
            return str(record[name])
    fields = ", ".join(map(str, record)) or "none"
    problem = f"has no field that is known to hold a conversation or a text; its fields: {fields}"
    raise DatasetError(where, problem, f"name one with {_FIELD}")


def _one_field(record: dict[str, Any], field: str, where: str) -> Conversation | str:
    if field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise DatasetError(where, f"has no field '{field}'; its fields: {fields}", _FIELD)
    value = record[field]
    if _are_messages(_unpacked(value)):
        return Conversation(_messages(value, field, where), _tools(record))
    if isinstance(value, str):
        return value
    kind = type(value).__name__
    raise DatasetError(where, f"field '{field}' holds {kind}, no text and no messages")


def _pair(record: dict[str, Any], first: str, second: str, where: str) -> list[Message]:
    """A question and its answer as messages; either may be a list of messages already."""
    asked = _messages_or_text(record[first], "user", first, where)
    answered = _messages_or_text(record[second], "assistant", second, where)
    context = next(
        (record[name] for name in _CONTEXT if name not in (first, second) and name in record), ""
    )
    if isinstance(context, str) and context.strip() and len(asked) == 1:
        asked = [{**asked[0], "content": f"{asked[0]['content']}\n\n{context}"}]
    system = record.get("system") or record.get("system_prompt")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*opening, *asked, *answered]


def _messages_or_text(value: Any, role: str, name: str, where: str) -> list[Message]:
    if _are_messages(_unpacked(value)):
        return _messages(value, name, where)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    kind = type(value).__name__
    raise DatasetError(where, f"field '{name}' holds {kind}, no text and no messages")


def _messages(value: Any, name: str, where: str) -> list[Message]:
    """Messages with `role` and `content`, from these or from `from` and `value`."""
    listed = _unpacked(value)
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        kind = type(listed).__name__
        raise DatasetError(where, f"field '{name}' holds {kind}, not a list of messages")
    return [_message(item, name, where) for item in listed]


def _message(item: dict[str, Any], name: str, where: str) -> Message:
    role = item.get("role") or item.get("from")
    if not isinstance(role, str):
        raise DatasetError(where, f"field '{name}' holds a message without a role")
    # In a table every message has every field; those that it lacks are None.
    kept = {key: part for key, part in item.items() if part is not None}
    content = kept.pop("content", kept.pop("value", ""))
    kept.pop("from", None)
    message: Message = {**kept, "role": _ROLES.get(role, role), "content": _plain(content)}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _plain(content: Any) -> Any:
    """A content that consists of text parts as one text: few templates accept parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return content


def _tool_call(call: Any) -> Any:
    """A call with its arguments as an object, which templates expect, not as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = _unpacked(record.get("tools"))
    return tools if isinstance(tools, list) and tools else None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )


def _unpacked(value: Any) -> Any:
    """A list of objects that a dataset stores as JSON text, parsed; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            unpacked = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(unpacked, list) and all(isinstance(item, dict) for item in unpacked):
            return unpacked
    return value


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
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        own = "AutoTokenizer" in config.get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
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

    Raises what reading the source raises, and OutputWriteError where the copies do not fit.
    """
    config = source.local_path(CONFIG_NAME)
    if config is not None:
        yield config.parent
        return
    with TemporaryDirectory() as name:
        for file in source.list():
            if "/" not in file.name and file.name.endswith(_ENDINGS) and file.name != INDEX_NAME:
                copy = Path(name, file.name)
                with writing(copy):
                    copy.write_bytes(source.read(file.name, 0, file.nbytes))
        yield Path(name)
