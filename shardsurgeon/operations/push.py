"""`push`, and `apply` with a repository as its destination: pruned models on the Hub.

Checks what can be checked (words, token, permission, the model's card) before the long work
begins.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, identity_of, open_checkpoint
from shardsurgeon.checkpoint.files import CARD_NAME, set_aside
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Provenance
from shardsurgeon.errors import CheckpointError, ShardSurgeonError, UsageError
from shardsurgeon.execution.run import output_sizes, require_budget
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.execution.workers import Listener
from shardsurgeon.operations import prune
from shardsurgeon.operations.card_data import model_facts
from shardsurgeon.operations.model_card import (
    Placement,
    model_card,
    recipe,
    recipe_by_record,
    require_metadata,
    with_files,
)
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.operations.reports import ApplyReport, PushReport
from shardsurgeon.operations.verify import headers_only
from shardsurgeon.pruning.lineage import check_lineage
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.storage.hub.repository import MAIN, Repository
from shardsurgeon.storage.hub.upload import Content, HubDestination, Published, publish, silence_hub
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.open import hub_name
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.system import default_system

# How many of the largest shards fit on the disk at a time where no budget is given.
_FEW_SHARDS = 4


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a model is pushed to, and with what card.

    repo_id: `org/name`, or `name` for the user's own; private: for a repository that is made;
    revision: the branch, None for main; create_pr: open a pull request against it; card: a file
    to use as README.md in place of the one that is made; with_card: False leaves the source's.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    card: str | os.PathLike[str] | None = None
    with_card: bool = True

    def __post_init__(self) -> None:
        """Refuse words that contradict each other."""
        if self.card is not None and not self.with_card:
            raise UsageError("--card", "and --no-card contradict each other", "give one of them")

    def repository(self) -> Repository:
        """The repository. Raises UsageError where there can be none of that name."""
        return Repository(self.repo_id, self.revision, self.create_pr)

    def own_card(self) -> bytes | None:
        """The content of the user's card. Raises UsageError where it cannot be one."""
        if self.card is None:
            return None
        try:
            text = Path(self.card).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UsageError(self.card, f"cannot be read as a card ({error})") from error
        require_metadata(text, self.card)
        return text.encode()


def push(
    pruned: str | os.PathLike[str],
    destination: Destination,
    *,
    family: str | None = None,
    bars: bool = False,
) -> PushReport:
    """Push a folder that `apply` wrote, with a card, in one commit. The folder stays as it is.

    family: as for `plan`; bars: let huggingface_hub show how far the uploads are. A rerun uploads
    nothing that is there already. Raises CheckpointError and its children where the folder is no
    complete prune, UsageError where the Hub refuses the words or the token, PublishError where
    the upload fails.
    """
    folder, begun = Path(pruned), time.monotonic()
    checkpoint, record = _complete_prune(folder, family)
    with silence_hub(bars) as said:
        repository, card = destination.repository(), destination.own_card()
        repository.prepare(destination.private)
        _require_another(repository, record.steps[-1].source.name)
        if destination.with_card and card is None:
            card = _card(checkpoint, folder, repository, None)
        published = publish(repository, files_to_publish(folder, card), {})
    return _report(repository, published, begun, said)


def apply(
    model: str | None,
    scores: str | None,
    request: SelectionRequest,
    destination: Destination,
    *,
    stream: bool = False,
    disk_budget: int | None = None,
    out: str | None = None,
    max_shard_nbytes: int | None = None,
    workers: int = 0,
    verify: bool = True,
    dry_run: bool = False,
    restart: bool = False,
    progress: Listener | None = None,
    family: str | None = None,
    bars: bool = False,
) -> ApplyReport:
    """`operations.plan` and `carry_out` in one."""
    pruning = prune.plan(
        model, scores, request, out=out, max_shard_nbytes=max_shard_nbytes, family=family
    )
    return carry_out(
        pruning,
        destination,
        stream=stream,
        disk_budget=disk_budget,
        workers=workers,
        verify=verify,
        dry_run=dry_run,
        restart=restart,
        progress=progress,
        bars=bars,
    )


def carry_out(
    pruning: Pruning,
    destination: Destination,
    *,
    stream: bool = False,
    disk_budget: int | None = None,
    workers: int = 0,
    verify: bool = True,
    dry_run: bool = False,
    restart: bool = False,
    progress: Listener | None = None,
    bars: bool = False,
) -> ApplyReport:
    """What `operations.carry_out` does, and push the result.

    stream: upload every shard as soon as it is finished and keep none, so that there is no OUT;
    disk_budget: bytes of shards that may be on the disk meanwhile, None for a few of the largest.
    The budget comes first; then the token, the repository and the right to write there are seen
    to, all before any byte is moved.
    """
    prune.require_ready(pruning)
    if dry_run:
        return prune.carry_out(pruning, verify=verify, dry_run=True)
    begun = time.monotonic()
    budget = _budget(pruning, disk_budget) if stream else None
    with silence_hub(bars and not stream) as said:
        shipment = _Shipment(pruning, destination)
        report = prune.carry_out(
            pruning,
            workers=workers,
            verify=verify,
            restart=restart,
            progress=progress,
            shard_destination=shipment.shard_destination if stream else None,
            disk_budget=budget,
        )
        if not stream:
            begun = time.monotonic()
            shipment.push()
    return replace(report, push=_report(shipment.repository, shipment.published, begun, said))


def _budget(pruning: Pruning, given: int | None) -> int:
    """Bytes of shards that may be on the disk. Raises UsageError where one alone takes more."""
    sizes = output_sizes(pruning.plan)
    budget = given or _FEW_SHARDS * max(sizes.values())
    require_budget(budget, sizes)
    return budget


class _Shipment:
    """A prune that is planned, and the repository that it goes to."""

    def __init__(self, pruning: Pruning, destination: Destination) -> None:
        """Make the repository ready. Raises UsageError and PublishError where it cannot be."""
        self._pruning = pruning
        self._destination = destination
        self._card = destination.own_card()
        self.repository = destination.repository()
        self.repository.prepare(destination.private)
        _require_another(self.repository, hub_name(pruning.checkpoint.source))
        self._shard_destination: HubDestination | None = None
        self._published: Published | None = None

    def shard_destination(self, check_shard: Callable[[str, Path], None]) -> HubDestination:
        """Where finished shards go."""
        self._shard_destination = HubDestination(self.repository, check_shard, self._rest)
        return self._shard_destination

    def push(self) -> None:
        """Push the finished folder; what goes wrong leaves it, and says how to go on."""
        out = self._pruning.out
        words = ["shardsurgeon", "push", str(out), self.repository.repo_id]
        words += _options(self._destination)
        how = f"go on with `{shlex.join(words)}`"
        try:
            pruned = self._opened(LocalSource(out))
            files = files_to_publish(out, self._card_for(pruned, out))
            self._published = publish(self.repository, files, {})
        except ShardSurgeonError as error:
            remedy = f"{prune.complete(str(out))}: {how}"
            raise type(error)(error.where, error.problem, remedy) from error
        except BaseException as stop:
            stop.add_note(f"{prune.complete(str(out))}; {how}")
            raise

    @property
    def published(self) -> Published:
        """What was published."""
        published = (
            self._shard_destination.published if self._shard_destination else self._published
        )
        assert published is not None
        return published

    def _rest(self, folder: Path) -> Mapping[str, Content]:
        """What goes with shards that have gone ahead."""
        plan = self._pruning.plan
        pruned = self._opened(headers_only(plan, LocalSource(folder), self._pruning.out))
        return files_to_publish(folder, self._card_for(pruned, folder))

    def _opened(self, source: Source) -> Checkpoint:
        return replace(open_checkpoint(source), family=self._pruning.checkpoint.family)

    def _card_for(self, pruned: Checkpoint, folder: Path) -> bytes | None:
        if self._card is not None or not self._destination.with_card:
            return self._card
        return _card(pruned, folder, self.repository, _recipe(self._pruning))


def _options(destination: Destination) -> list[str]:
    """The words of a destination, as `push` takes them."""
    words = ["--private"] if destination.private else []
    words += ["--revision", destination.revision] if destination.revision else []
    words += ["--create-pr"] if destination.create_pr else []
    words += ["--card", os.fspath(destination.card)] if destination.card is not None else []
    return words + ([] if destination.with_card else ["--no-card"])


def _recipe(pruning: Pruning) -> str | None:
    """The command of a prune; None where its scores came from no file."""
    given = dict(pruning.plan.score_files)
    if not given:
        return None
    origin = identity_of(pruning.checkpoint)
    return recipe(pruning.request, origin, given, pruning.max_shard_nbytes, pruning.declared)


def _card(pruned: Checkpoint, folder: Path, repository: Repository, command: str | None) -> bytes:
    """The card of a pruned model. folder: holds its small files; command: what made it, where
    that is known better than by its record."""
    record = pruned.provenance
    assert record is not None
    facts = model_facts(pruned, read_anatomy(pruned), record, folder)
    revision = None if repository.revision == MAIN else repository.revision
    lines = with_files(command or recipe_by_record(facts), repository.repo_id, revision)
    return model_card(facts, Placement(repository.repo_id, revision, lines)).encode()


def _require_another(repository: Repository, source: str | None) -> None:
    """Raise UsageError where a push would put the pruned model in its source's place."""
    aims_at_main = repository.revision == MAIN and not repository.create_pr
    if aims_at_main and source == repository.repo_id:
        problem = "is the repository that was pruned"
        raise UsageError(source, problem, "name another one, or a --revision of it")


def _complete_prune(folder: Path, family: str | None) -> tuple[Checkpoint, Provenance]:
    """Open a folder that `apply` wrote; CheckpointError and its children where it is none."""
    if not folder.is_dir():
        raise CheckpointError(folder, "is no folder", "give the folder that apply wrote")
    _require_finished(folder)
    checkpoint = open_model(folder, family)
    record = checkpoint.provenance
    if record is None:
        problem = f"was not pruned by shardsurgeon, which leaves its {PROVENANCE_NAME} there"
        raise CheckpointError(folder, problem, "`hf upload` pushes any folder")
    check_lineage(record, read_anatomy(checkpoint).experts_per_layer)
    return checkpoint, record


def _require_finished(folder: Path) -> None:
    """Raise CheckpointError for unfinished work, in the folder or around it."""
    journal = WorkDir(folder, default_system()).journal.name
    around = [path / journal for path in (folder, folder.absolute().parent)]
    within = (folder / file.name for file in LocalSource(folder).list())
    inside = (path for path in within if path.name == journal)
    for path in (*filter(Path.exists, around), *inside):
        problem = "is the unfinished work of an apply"
        raise CheckpointError(path.parent, problem, "finish it by the same command, or remove it")


def _report(
    repository: Repository, published: Published, begun: float, said: Sequence[str]
) -> PushReport:
    commit = published.commit
    return PushReport(
        repo_id=repository.repo_id,
        url=commit.pull_request or repository.url,
        revision=None if commit.pull_request else repository.revision,
        commit=commit.oid,
        pull_request=commit.pull_request,
        created=repository.is_new,
        files=published.files,
        nbytes=published.nbytes,
        removed=published.removed,
        seconds=time.monotonic() - begun,
        notes=tuple(said),
    )


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
