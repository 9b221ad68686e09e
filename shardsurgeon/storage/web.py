"""A model in a folder of a web server, read by byte ranges.

A web server lists nothing. Asked for are the config, the index, the shards that the index names,
the code and the vocabularies that the configs name, and the files that models usually have beside
their weights. Files of other names cannot be found, and a note says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any
from urllib.parse import quote, urlunsplit

from shardsurgeon.errors import CheckpointError, SourceReadError, UsageError, keep_secret
from shardsurgeon.storage.connections import status_line
from shardsurgeon.storage.formats.index import INDEX_NAME, natural_order
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint
from shardsurgeon.storage.http import (
    body,
    changed,
    drain,
    etag_of,
    followed,
    kept_words,
    parse_address,
    plain_client,
    printable,
    range_header,
    secrets_of,
    total_nbytes,
    without_secrets,
)
from shardsurgeon.storage.limits import CONFIG, INDEX
from shardsurgeon.storage.retry import RetryPolicy, Waits, retry, stream_pieces
from shardsurgeon.storage.source import Source, SourceFile, leads_out, unusual
from shardsurgeon.storage.threads import map_in_threads

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_NAMING_CODE = (_CONFIG, "tokenizer_config.json", "processor_config.json")
_USUAL = (
    *(_CONFIG, INDEX_NAME, _SINGLE, "mtp.safetensors", "generation_config.json"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
    *("quantization_config.json", "recipe.yaml", "params.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "tekken.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "SYSTEM_PROMPT.txt"),
    *("calibration/reap_pruning_metadata.json",),
)
_QUESTIONS_AT_ONCE = 8
_ABSENT = frozenset({401, 403, 404, 410})
_RETRY_POLICY = RetryPolicy()


class WebSource(Source):
    """The files found below one address. Safe to use from several threads.

    name: the last part of the address; location: the address without login and query.
    """

    is_remote = True

    def __init__(self, url: str, policy: RetryPolicy = _RETRY_POLICY) -> None:
        """url: the folder, or a safetensors file in it; a query is sent along with every request.

        Raises UsageError where `url` is not an address, CheckpointError where there is no model,
        and NetworkError where no server answers.
        """
        self._parts = parse_address(url)
        if not self._parts.hostname:
            raise UsageError(printable(url), "names no server", "write it like https://host/folder")
        self.name = self._parts.path.rpartition("/")[2] or self._parts.hostname
        self.location = printable(urlunsplit(self._parts))
        self._policy, self._waits = policy, Waits(policy)
        self._secrets = secrets_of(url)
        for secret in self._secrets:
            keep_secret(secret)
        self._files: dict[str, SourceFile] = {}
        self._find([_CONFIG])
        if _CONFIG not in self._files:
            problem = "there is no config.json, or it may not be read"
            raise CheckpointError(self.location, problem, "give the address of a model's folder")
        self._find([name for name in _USUAL if name != _CONFIG])
        self._find(sorted(self._code()))
        # An index may name any number of files; without one of them there is no model.
        self._find(self._shards(), need_all=True)
        beside = [name for name in self._files if not name.endswith(".safetensors")]
        self.notes = (
            f"{self.location} cannot be listed: beside the weights {', '.join(beside)} were "
            "found, files of unusual names are left out",
        )

    def list(self) -> tuple[SourceFile, ...]:
        """Every file that was found, sorted by name, as it was found.

        The stamp, its etag or its date, is compared with every answer there is later.
        """
        return tuple(self._files[name] for name in sorted(self._files))

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file, by one request.

        Raises SourceReadError, SourceChangedError or NetworkError.
        """
        where = f"{self.location}/{name}"
        file = self._files.get(name)
        if file is None:
            raise SourceReadError(where, "there is no such file")
        if end > file.nbytes:
            problem = f"ends at byte {file.nbytes:,}, byte {end:,} was expected"
            raise SourceReadError(where, problem)

        def request(at: int) -> Any:
            return self._range(file, where, at, end)

        pieces = stream_pieces(request, where, begin, end, self._policy, self._waits)
        return without_secrets(pieces, self._secrets, where)

    @contextmanager
    def _range(
        self, file: SourceFile, where: str, begin: int, end: int
    ) -> Iterator[Iterator[bytes]]:
        """One try at [begin, end)."""
        with self._answer(file.name, range_header(begin, end)) as response:
            if response.status_code in (200, 206) and _stamp(response) != file.stamp:
                raise changed(where, f"was {file.stamp} when it was found, is {_stamp(response)}")
            yield body(response, file, where, begin, end)

    def _answer(self, name: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
        """The response for a file, wherever redirects lead."""
        where, address = f"{self.location}/{name}", self._address(name)
        return followed(plain_client(), address, lambda url: headers, where, self._policy)

    def _find(self, names: Iterable[str], *, need_all: bool = False) -> None:
        """Ask for files, several at once, and keep those that are there.

        need_all: ask for no more once one is not there.
        """
        missing = threading.Event()

        def probe(name: str) -> SourceFile | None:
            file = self._probe(name)
            if file is None and need_all:
                missing.set()
            return file

        asked = takewhile(lambda name: not missing.is_set(), names)
        # Daemons: Ctrl-C does not wait for their requests.
        for file in map_in_threads(probe, asked, _QUESTIONS_AT_ONCE, "find", daemon=True):
            if file is not None:
                self._files[file.name] = file

    def _probe(self, name: str) -> SourceFile | None:
        """Size and stamp of a file, by its first byte; None where there is none."""
        where = f"{self.location}/{name}"
        look = partial(self._look, name, where)
        return retry(look, where, self._policy.brief(), self._waits)

    def _look(self, name: str, where: str) -> SourceFile | None:
        with self._answer(name, range_header(0, 1)) as response:
            drain(response)
            if response.status_code in _ABSENT:
                return None
            if response.status_code not in (200, 206, 416):
                raise CheckpointError(where, f"cannot be read ({status_line(response)})")
            nbytes = total_nbytes(response)
            # An answer without a size is a page that the server generates, not a file.
            return None if nbytes is None else SourceFile(name, nbytes, _stamp(response))

    def _shards(self) -> Iterable[str]:
        """The shards that the index names, in the order of their numbers."""
        index = self._json(INDEX_NAME).get("weight_map")
        values = index.values() if isinstance(index, dict) else ()
        names = {name for name in values if isinstance(name, str) and _may_be(name)}
        return sorted(names, key=natural_order)

    def _code(self) -> set[str]:
        """The files with code, and the vocabularies, that the configs name."""
        names = set()
        for config in _NAMING_CODE:
            said = self._json(config)
            # vocab_file, merges_file and their like; paths of the publisher's machine are no names.
            names |= {
                value
                for key, value in said.items()
                if key.endswith("_file") and isinstance(value, str)
            }
            code = said.get("auto_map")
            for value in code.values() if isinstance(code, dict) else ():
                for entry in value if isinstance(value, list) else [value]:
                    # `module.Class`; with `--` in it, the code is in another repository.
                    if isinstance(entry, str) and "--" not in entry:
                        names.add(f"{entry.partition('.')[0]}.py")
        return {name for name in names if _may_be(name)}

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON object among the files; an empty one where the file is missing or holds none."""
        file = self._files.get(name)
        if file is None:
            return {}
        limit = INDEX if name == INDEX_NAME else CONFIG
        if file.nbytes > limit.nbytes:
            return {}  # opening the model reports what is wrong with it
        value = parse_for_a_hint(self.read(name, 0, file.nbytes), limit)
        return value if isinstance(value, dict) else {}

    def _address(self, name: str) -> str:
        return urlunsplit(self._parts._replace(path=f"{self._parts.path}/{quote(name)}"))


def _may_be(name: str) -> bool:
    """Whether a file of the model can have a name that a config or the index says."""
    return not leads_out(name) and unusual(name) is None


def _stamp(response: Any) -> str:
    """What changes with a file's content: its etag, its date, or at least its size."""
    dated = kept_words(response.headers.get("Last-Modified", ""))
    return etag_of(response.headers) or dated or f"{total_nbytes(response)} bytes"
