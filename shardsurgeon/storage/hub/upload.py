"""A pruned model's files, as one commit of a repository.

Between `publishing`, which makes the card and checks the model, and `repository`, which talks to
the Hub. Works for a whole folder and for one whose shards have gone ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.checkpoint.cardnames import CARD_NAME, set_aside
from shardsurgeon.errors import PublishError
from shardsurgeon.storage.durable import reading
from shardsurgeon.storage.formats.index import INDEX_NAME
from shardsurgeon.storage.hub.abreast import abreast
from shardsurgeon.storage.hub.additions import Receipt
from shardsurgeon.storage.hub.repository import Commit, RemoteFile, Repository
from shardsurgeon.storage.local import LocalSource

Content = Path | bytes
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Published:
    """What a push came to. files, nbytes: what the model consists of there; removed: names of
    another model's weights that the commit took out."""

    commit: Commit
    files: int
    nbytes: int
    removed: tuple[str, ...]


def files_to_publish(folder: Path, card: bytes | None) -> dict[str, Content]:
    """Every file of a folder by its name in the repository.

    card: what README.md is to say; the folder's own then goes by README.source.md, and an
    earlier one of that name by README.source-2.md. None: every file keeps its name.
    """
    source = LocalSource(folder)
    files: dict[str, Content] = {file.name: folder / file.name for file in source.list()}
    if card is None:
        return files
    moving, name = files.get(CARD_NAME), set_aside(CARD_NAME)
    files[CARD_NAME] = card
    while moving is not None and name is not None:
        files[name], moving = moving, files.get(name)
        name = set_aside(name)
    return files


def publish(
    repository: Repository, files: Mapping[str, Content], sent: Mapping[str, Receipt]
) -> Published:
    """Commit files of this machine and shards that were sent ahead, and look whether it holds.

    What the branch has already goes no second time. Weights there that are no part of this model
    are removed by the same commit: a loader might take them. Raises PublishError, UsageError.
    """
    there = repository.files()
    weights = _weights(files)
    files = {name: content for name, content in files.items() if name not in weights}
    sent = {**sent, **abreast(repository.upload, weights)}
    missing = {name: receipt for name, receipt in sent.items() if not _same(there, name, receipt)}
    removed = tuple(sorted(_stray_weights(there, files.keys() | sent.keys())))
    commit = repository.commit(files, missing, removed, _message(repository, removed))
    sizes = {name: _nbytes(content) for name, content in files.items()}
    sizes |= {name: receipt.nbytes for name, receipt in sent.items()}
    _require_published(repository, commit, sizes, sent)
    return Published(commit, len(sizes), sum(sizes.values()), removed)


def _weights(files: Mapping[str, Content]) -> dict[str, Path]:
    """The files that are too large for a commit; an empty one is none."""
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


def _nbytes(content: Content) -> int:
    if isinstance(content, bytes):
        return len(content)
    with reading(content):
        return content.stat().st_size


def _require_published(
    repository: Repository, commit: Commit, sizes: Mapping[str, int], sent: Mapping[str, Receipt]
) -> None:
    """Raise PublishError unless the commit has every file, and of those sent ahead the bytes."""
    there = repository.files(commit.oid)
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
