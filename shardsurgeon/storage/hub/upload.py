"""A pruned model's files as one commit of a repository, uploaded together or one by one.

For a whole folder and for one whose shards have been sent ahead. Uploads run on threads that the
program does not wait for when it stops; the next run finds what they have sent.
"""

from __future__ import annotations

import hashlib
import logging as levels
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    tqdm,
)

from shardsurgeon.errors import PublishError
from shardsurgeon.storage.connections import guarded_sessions
from shardsurgeon.storage.files import reading, sha256_of
from shardsurgeon.storage.formats.index import INDEX_NAME
from shardsurgeon.storage.hub.repository import Commit, Receipt, RemoteFile, Repository
from shardsurgeon.storage.hub.sent_bytes import xet_counted
from shardsurgeon.storage.phases import BYTES, phase
from shardsurgeon.storage.threads import map_in_threads
from shardsurgeon.units import counted

Content = Path | bytes
_WEIGHTS = ".safetensors"
_ATTRIBUTES = ".gitattributes"  # which a repository begins with

_Result = TypeVar("_Result")

# More connections do not fill a link better; Xet has several of its own for each file.
UPLOADS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Published:
    """The result of a push.

    files, nbytes: what the model consists of there; sent: bytes of files that travelled, where Xet
    sends them at most; removed: names of another model's weights that the commit removed;
    replaced: of files that have other bytes than before; others: of files that are no part of the
    model and stay.
    """

    commit: Commit
    files: int
    nbytes: int
    sent: int
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    others: tuple[str, ...]


def publish(
    repository: Repository, files: Mapping[str, Content], sent: Mapping[str, Receipt]
) -> Published:
    """Commit files of this machine and shards that were sent ahead, and check the commit.

    What the branch has already is not sent again. Weights there that do not belong to this model
    are removed by the same commit: a loader might load them. Raises PublishError, UsageError.
    """
    there = repository.files()
    weights = _weights(files)
    files = {name: content for name, content in files.items() if name not in weights}
    sent = {**sent, **_upload(repository, weights)}
    missing = {name: receipt for name, receipt in sent.items() if not _same(there, name, receipt)}
    removed = tuple(sorted(_stray_weights(there, files.keys() | sent.keys())))
    sizes = {name: _nbytes(content) for name, content in files.items()}
    sizes |= {name: receipt.nbytes for name, receipt in sent.items()}
    with phase("committing"):
        commit = repository.commit(files, missing, removed, _message(repository, removed))
        now = repository.files(commit.oid)
        _require_published(repository, commit, sizes, sent, now)
    changed = {name: now[name] for name in sizes if _digest(there, name) != now[name].digest}
    return Published(
        commit,
        len(sizes),
        sum(sizes.values()),
        _sent_nbytes(changed, repository.uploaded),
        removed,
        tuple(sorted(there.keys() & changed.keys())),
        tuple(sorted(there.keys() - sizes.keys() - {*removed, _ATTRIBUTES})),
    )


@dataclass(frozen=True, slots=True)
class Unmade:
    """A large file that is not made yet: its size in bytes, and what finds its SHA-256 (hex)."""

    nbytes: int
    sha256: Callable[[], str]


def foresee(repository: Repository, files: Mapping[str, Content | Unmade]) -> Published:
    """What `publish` of these files would come to. Sends nothing; reads each file that has the size
    of the one that is there."""
    there = repository.files_before()
    sizes = {name: _nbytes(content) for name, content in files.items()}
    changed = {name for name in files if not _is_there(there.get(name), files[name], sizes[name])}
    removed = tuple(sorted(_stray_weights(there, files)))
    return Published(
        Commit("", repository.url, None),
        len(sizes),
        sum(sizes.values()),
        sum(sizes[name] for name in changed),
        removed,
        tuple(sorted(there.keys() & changed)),
        tuple(sorted(there.keys() - sizes.keys() - {*removed, _ATTRIBUTES})),
    )


def _is_there(found: RemoteFile | None, content: Content | Unmade, nbytes: int) -> bool:
    """Whether a file of a revision has these bytes."""
    if found is None or found.nbytes != nbytes:
        return False
    if isinstance(content, Unmade):
        return found.sha256 == content.sha256()
    if found.sha256 is not None:
        if isinstance(content, bytes):
            return found.sha256 == hashlib.sha256(content).hexdigest()
        return found.sha256 == sha256_of(content)
    with reading(str(content) if isinstance(content, Path) else "README.md"):
        raw = content if isinstance(content, bytes) else content.read_bytes()
    return found.digest == hashlib.sha1(b"blob %d\0" % nbytes + raw).hexdigest()


def _digest(there: Mapping[str, RemoteFile], name: str) -> str | None:
    return there[name].digest if name in there else None


def _sent_nbytes(changed: Mapping[str, RemoteFile], uploaded: int | None) -> int:
    """Bytes of files that travelled. changed: those that the branch did not have so; uploaded: of
    large files, None where nobody counted."""
    small = [file.nbytes for file in changed.values() if file.sha256 is None]
    large = [file.nbytes for file in changed.values() if file.sha256 is not None]
    return sum(small) + (sum(large) if uploaded is None else uploaded)


def _upload(repository: Repository, weights: Mapping[str, Path]) -> dict[str, Receipt]:
    """Upload shards, several at a time; those that the repository has are not sent."""
    receipts: list[Receipt] = []
    with phase("uploading", sum(map(_nbytes, weights.values())), BYTES) as at:

        def send(name: str, path: Path) -> Receipt:
            receipt = repository.upload(name, path, at)
            receipts.append(receipt)
            at.detail = f"{len(receipts)}/{counted(len(weights), 'shard')}"
            return receipt

        return upload_in_parallel(send, weights)


def _weights(files: Mapping[str, Content]) -> dict[str, Path]:
    """The files that are too large for a commit; an empty one is not."""
    return {
        name: content
        for name, content in files.items()
        if isinstance(content, Path) and name.endswith(_WEIGHTS) and _nbytes(content)
    }


def _same(there: Mapping[str, RemoteFile], name: str, receipt: Receipt) -> bool:
    return there.get(name) == RemoteFile(receipt.nbytes, receipt.sha256)


def _stray_weights(there: Iterable[str], ours: Iterable[str]) -> set[str]:
    """Shards beside the config, and their index, that an earlier model of the branch had."""
    weights = {
        name
        for name in there
        if "/" not in name and (name.endswith(_WEIGHTS) or name == INDEX_NAME)
    }
    return weights.difference(ours)


def _message(repository: Repository, removed: tuple[str, ...]) -> str:
    message = "Upload a model pruned with shardsurgeon"
    return f"{message}, in place of another" if removed else message


def _nbytes(content: Content | Unmade) -> int:
    if isinstance(content, Unmade):
        return content.nbytes
    if isinstance(content, bytes):
        return len(content)
    with reading(content):
        return content.stat().st_size


def _require_published(
    repository: Repository,
    commit: Commit,
    sizes: Mapping[str, int],
    sent: Mapping[str, Receipt],
    there: Mapping[str, RemoteFile],
) -> None:
    """Raise PublishError unless the commit has every file, and the bytes of those sent ahead.

    there: what it has.
    """
    for name, nbytes in sorted(sizes.items()):
        found = there.get(name)
        if found is None:
            problem = f"{name} is missing from the commit {commit.oid[:12]}"
        elif found.nbytes != nbytes:
            problem = f"{name} has {found.nbytes:,} bytes there, {nbytes:,} here"
        elif name in sent and found.sha256 != sent[name].sha256:
            problem = f"{name} holds other bytes there than were sent"
        else:
            continue
        raise PublishError(repository.repo_id, problem, "run the same command again")


class HubDestination:
    """Sends finished shards to a repository; a ShardDestination of the executor."""

    def __init__(
        self,
        repository: Repository,
        check_shard: Callable[[str, Path], None],
        rest: Callable[[Path], Mapping[str, Content]],
    ) -> None:
        """repository: prepared; check_shard: raises where a shard, given its name and its path, is
        not what it should be; rest: given the folder of the files that stayed, says which of them
        to publish under which names.
        """
        self._repository = repository
        self._check_shard = check_shard
        self._rest = rest
        self.published: Published | None = None

    @property
    def address(self) -> str:
        """The repository: receipts are for its storage alone."""
        return f"{self._repository.endpoint}/{self._repository.repo_id}"

    def send(self, name: str, path: Path) -> str:
        """Check a shard and upload it; the receipt names its bytes in the commit to come."""
        self._check_shard(name, path)
        return self._repository.upload(name, path).to_text()

    def sha256(self, receipt: str) -> str:
        """The digest of an uploaded shard, by which the commit will name it."""
        return Receipt.from_text(receipt, self.address).sha256

    def publish(self, folder: Path, receipts: Mapping[str, str]) -> None:
        """Commit everything at once; made again, the commit is found and not repeated."""
        files = self._rest(folder)
        sent = {name: Receipt.from_text(text, name) for name, text in receipts.items()}
        self.published = publish(self._repository, files, sent)


def upload_in_parallel(
    send: Callable[[str, Path], _Result], files: Mapping[str, Path], at_once: int = UPLOADS_AT_ONCE
) -> dict[str, _Result]:
    """What `send` returns for every file, by name. Raises the first error of any."""
    results = map_in_threads(
        lambda file: send(*file), files.items(), at_once, "upload", daemon=True
    )
    return dict(zip(files, results, strict=True))


@contextmanager
def silence_hub() -> Iterator[list[str]]:
    """Within a `with`, let huggingface_hub show nothing: its uploads count for one phase of ours.

    Its warnings meanwhile are in the list, a line each, and its requests are guarded. Affects the
    whole process.
    """
    # Made once here: uploads on several threads would make and delete it by turns.
    bar: Any = tqdm
    bar.get_lock()
    level = logging.get_verbosity()
    said: list[str] = []

    def speak(kind: type[BaseException] | None, *_: object) -> None:
        # After a signal threads are still uploading, and would warn of it with signed addresses.
        if kind is None or issubclass(kind, Exception):
            logging.set_verbosity(level)

    with ExitStack() as stack:
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", UserWarning)
        logging.set_verbosity(levels.CRITICAL)
        stack.push(speak)
        stack.enter_context(guarded_sessions())
        stack.enter_context(xet_counted())
        if not are_progress_bars_disabled():
            stack.callback(enable_progress_bars)
            disable_progress_bars()
        try:
            yield said
        finally:
            texts = (" ".join(str(found.message).split()) for found in warned)
            said += [text for text in dict.fromkeys(texts) if "progress bars" not in text]
