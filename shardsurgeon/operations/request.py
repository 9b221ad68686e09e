"""What was asked of a run and of a push, beside the experts themselves.

Built once, by the command line or by `api`, and passed on whole. Imported by the command line, so
nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from shardsurgeon.errors import UsageError

if TYPE_CHECKING:
    from shardsurgeon.execution.workers import Progress


# Copying is bound by disks and networks: more threads than this only take memory.
_MOST_WORKERS = 1024

# Fields of Destination that say how to push, and their words on the command line.
PUSH_FLAGS = {
    "private": "--private",
    "revision": "--revision",
    "create_pr": "--create-pr",
    "card": "--card",
    "with_card": "--no-card",
}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is carried out.

    workers: threads, 0 for a number that suits the machine; verify: compare the structure of
    everything and the bytes of a sample; dry_run: say what would happen and write nothing;
    restart: discard what an interrupted run left; checksums: record the SHA-256 of shards as well,
    for which they are read once more; progress: called with how far the run is; command: the words
    that asked for it, which an interrupted run is known by. Raises UsageError for workers below 0
    or beyond use.
    """

    workers: int = 0
    verify: bool = True
    dry_run: bool = False
    restart: bool = False
    checksums: bool = False
    progress: Callable[[Progress], None] | None = None
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= _MOST_WORKERS:
            problem = f"{self.workers} is not from 0 to {_MOST_WORKERS}"
            raise UsageError("--workers", problem, "0 takes a number that suits the machine")


@dataclass(frozen=True, slots=True)
class Destination:
    """The repository that a model is pushed to, and how.

    repo_id: `org/name`, or `name` for the user's own; private: for a repository that is made;
    revision: the branch, None for main; create_pr: open a pull request against it; card: a file
    to use as README.md in place of the one that is made; with_card: False leaves the source's.
    stream: upload every shard as soon as it is finished and keep none; disk_budget: bytes of
    shards that may be on the disk meanwhile, None for a few of the largest.

    Raises UsageError for a card beside `with_card=False`, for a disk_budget without stream, and for
    what can be no revision.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    card: str | PathLike[str] | None = None
    with_card: bool = True
    stream: bool = False
    disk_budget: int | None = None

    def __post_init__(self) -> None:
        from shardsurgeon.storage.open import require_revision

        refuse_budget(self.disk_budget, self.stream)
        if self.revision is not None:
            require_revision(self.revision, "--revision")
        if self.card is not None and not self.with_card:
            raise UsageError("--card", "and --no-card contradict each other", "give one of them")

    @classmethod
    def of(cls, push_to_hub: str | None, stream_push: str | None, **how: Any) -> Destination | None:
        """Where `apply` pushes to, of the two options that name a repository; None for neither.

        how: the other fields. Raises UsageError where the two name different repositories or
        neither names one that the other fields could be about, and whatever the constructor raises.
        """
        if push_to_hub and stream_push and push_to_hub != stream_push:
            problem = f"says {stream_push}, --push-to-hub says {push_to_hub}"
            raise UsageError("--stream-push", problem, "one repository is enough")
        if stream_push is not None:
            return cls(stream_push, stream=True, **how)
        if push_to_hub is not None:
            return cls(push_to_hub, **how)
        refuse_budget(how.get("disk_budget"), stream=False)
        unsaid = cls("")
        for name, flag in PUSH_FLAGS.items():
            if name in how and how[name] != getattr(unsaid, name):
                problem = "is about a push, and nothing is pushed"
                raise UsageError(flag, problem, "name a repository with --push-to-hub")
        return None


def refuse_budget(disk_budget: int | None, stream: bool) -> None:
    """Raise UsageError for a disk budget where shards stay on the disk."""
    if disk_budget is not None and not stream:
        problem = "is for shards that leave the disk"
        raise UsageError("--disk-budget", problem, "say where to with --stream-push REPO_ID")
