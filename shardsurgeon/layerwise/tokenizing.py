"""The model's tokenizer: conversations and texts → token ids."""

from __future__ import annotations

import json
import textwrap
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardsurgeon.checkpoint.blueprint import quietly
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.packages import require
from shardsurgeon.layerwise.records import Conversation

_OPTION = "--tokenizer"
_TRUST = "--trust-remote-code"


class Tokenizer:
    """A tokenizer of transformers with its chat template."""

    def __init__(
        self, place: str | PathLike[str], *, name: str = "", trust_remote_code: bool = False
    ) -> None:
        """place: a folder, or a model of the Hub; name: what messages call it instead.

        Raises UsageError where there is no tokenizer, or it cannot be read.
        """
        transformers = require("transformers")
        self.place = name or str(place)
        if not trust_remote_code and _is_code(Path(place)):
            problem = f"the tokenizer of {self.place} is code that its folder ships"
            raise UsageError(_OPTION, problem, f"read it, then allow it with {_TRUST}")
        with quietly():
            self._tokenizer = _load(transformers, str(place), self.place, trust_remote_code)
        # Where the config names a known model, a missing tokenizer is made up, and knows no word.
        if not self._tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise _unreadable(self.place)

    def encode(self, said: Conversation | str, where: str) -> NDArray[np.int64]:
        """The ids of a conversation, by the chat template, or of a text, as the model reads it.

        where: the record, for messages. Raises DatasetError where the template refuses the
        conversation, UsageError where there is no template.
        """
        is_chat = isinstance(said, Conversation)
        text = self._render(said, where) if isinstance(said, Conversation) else said
        # A template writes the special tokens itself.
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
        # A template is a program, and raises what it likes.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            problem = f"does not go through the chat template ({reason})"
            raise DatasetError(where, problem, "leave the record out or mend it") from error
        return text


def _load(transformers: Any, place: str, name: str, trust_remote_code: bool) -> Any:
    load = transformers.AutoTokenizer.from_pretrained
    try:
        return load(place, trust_remote_code=trust_remote_code)
    # Tokenizers, and the configs beside them, are read by whatever code their classes have.
    except Exception as error:
        # A config that transformers cannot read is no fault of the tokenizer: try without.
        with suppress(Exception):
            empty = transformers.PreTrainedConfig()
            return load(place, config=empty, trust_remote_code=trust_remote_code)
        raise _unreadable(name, error) from error


def _is_code(folder: Path) -> bool:
    """Whether a folder's tokenizer is a class of its own, without a form that needs none."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_bytes())
        own = "AutoTokenizer" in said.get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return own and not (folder / "tokenizer.json").exists()


def _unreadable(place: str, error: Exception | None = None) -> UsageError:
    problem = f"{place} has no tokenizer that transformers can read"
    if error is not None:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        problem += f" ({said})"
    return UsageError(_OPTION, problem, f"name a folder that has one with {_OPTION}")
