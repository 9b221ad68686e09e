"""A model's tokenizer: conversations in its chat template, and texts, as token ids."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.files import is_needed
from shardsurgeon.checkpoint.transformers_model import silence_hub
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.records import Answered, Conversation
from shardsurgeon.layerwise.settings import require
from shardsurgeon.storage.files import writing
from shardsurgeon.storage.formats.index import CONFIG_NAME, INDEX_NAME
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint
from shardsurgeon.storage.limits import TOKENIZER_CONFIG, TOKENIZER_FILE, read_limited, require_size
from shardsurgeon.storage.source import Source, require_plain

_OPTION = "--tokenizer"
_TRUST = "--trust-remote-code"
_ASSISTANT = "--tokens assistant"
_THINK = "<think>"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

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
        text = self._render(content, where)[0] if isinstance(content, Conversation) else content
        # The template's text contains the special tokens already.
        encoded = self._tokenizer(text, add_special_tokens=not is_chat, verbose=False)
        return np.asarray(encoded["input_ids"], np.int64)

    @property
    def is_chat(self) -> bool:
        """Whether it has a chat template."""
        return bool(self._tokenizer.chat_template)

    def encode_answer(
        self, answered: Answered, where: str
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The token ids of a prompt and its answer, and which are the answer's.

        Each is cut into tokens by itself, as a server does that goes on from the prompt. Raises
        what `encode` raises.
        """
        prompt, answer = answered.prompt, answered.answer
        if isinstance(prompt, Conversation):
            text = self._render(prompt, where, asking=True)[0]
            # The template may have begun the thought already.
            if text.rstrip().endswith(_THINK):
                answer = answer.removeprefix(f"{_THINK}\n")
            before = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            before = self._tokenizer(prompt, verbose=False)["input_ids"]
        after = self._tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray([*before, *after], np.int64)
        return ids, np.arange(len(ids)) >= len(before)

    def require_assistant_tokens(self) -> None:
        """Raise UsageError where it cannot be told which tokens the assistant says."""
        template = self._tokenizer.chat_template
        self._require_marks(template.get("default") if isinstance(template, dict) else template)
        if not self._tokenizer.is_fast:
            problem = f"the tokenizer of {self.place} does not say where in a text its tokens lie"
            raise UsageError(_ASSISTANT, problem, f"give one with a tokenizer.json ({_OPTION})")

    def encode_assistant(
        self, content: Conversation, where: str
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The token ids of a conversation, as `encode` gives them, and which the assistant says.

        Those are the tokens between the marks that the chat template sets (`{% generation %}`), cut
        ones included. Raises what `encode` and `require_assistant_tokens` raise.
        """
        text, spans = self._render(content, where, marked=True)
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        begins, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        said = np.zeros(len(begins), np.bool_)
        for begin, end in spans:
            inside = np.flatnonzero((begins < end) & (ends > begin) & (begins < ends))
            # Tokens of no length, such as blanks that a tokenizer trims, lie between others.
            if len(inside):
                said[inside[0] : inside[-1] + 1] = True
        return np.asarray(encoded["input_ids"], np.int64), said

    def _require_marks(self, template: str | None) -> None:
        if template is None or not _MARK.search(template):
            problem = f"the chat template of {self.place} does not mark what the assistant says"
            remedy = f"give one with {{% generation %}} ({_OPTION}), or count all tokens"
            raise UsageError(_ASSISTANT, problem, remedy)

    def _render(
        self,
        conversation: Conversation,
        where: str,
        *,
        marked: bool = False,
        asking: bool = False,
    ) -> tuple[str, Sequence[tuple[int, int]]]:
        """A conversation in the chat template; marked: also from where to where the template says
        that the assistant speaks, in characters; asking: up to where an answer begins."""
        if not self._tokenizer.chat_template:
            problem = f"{self.place} has no chat template, and {where} is a conversation"
            raise UsageError(_OPTION, problem, "name a tokenizer with one, or give texts")
        messages, tools = conversation.messages, conversation.tools
        try:
            if not marked:
                plain: str = self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=asking
                )
                return plain, ()
            template = self._tokenizer.get_chat_template(None, tools)
            self._require_marks(template)
            # What apply_chat_template does, which gives a mask of tokens: where a text ends in
            # something that is in no token, that mask has all tokens behind it.
            texts, spans = require("transformers.utils.chat_template_utils").render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
            return str(texts[0]), spans[0]
        except UsageError:
            raise
        # A template is a program that may raise anything.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            problem = f"does not go through the chat template ({reason})"
            raise DatasetError(where, problem, "mend it") from error


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
