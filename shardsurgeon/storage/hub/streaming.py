"""Finished shards go to the Hub one by one, and a single commit makes a model of them.

`execution` hands every shard over while others are still being filled and drops it here
afterwards: the disk need hold a few shards, not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from shardsurgeon.storage.hub.additions import Receipt
from shardsurgeon.storage.hub.repository import Repository
from shardsurgeon.storage.hub.upload import Content, Published, publish


class HubOutlet:
    """An Outlet of `execution` that leads to a repository."""

    def __init__(
        self,
        repository: Repository,
        check_shard: Callable[[str, Path], None],
        rest: Callable[[Path], Mapping[str, Content]],
    ) -> None:
        """repository: prepared; check_shard: raises where a shard, by its name and its path, is
        not what it should be; rest: given the folder of the files that stayed, says what of them
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

    def deliver(self, folder: Path, receipts: Mapping[str, str]) -> None:
        """Commit everything at once; made again, the commit is found and not repeated."""
        files = self._rest(folder)
        sent = {name: Receipt.from_text(text, name) for name, text in receipts.items()}
        self.published = publish(self._repository, files, sent)
