"""`push`, and what `apply` does with a repository as its destination.

Options, token, permission and card are checked before the long work begins.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, identity_of, open_checkpoint
from shardsurgeon.checkpoint.files import CARD_NAME
from shardsurgeon.checkpoint.provenance import SourceIdentity
from shardsurgeon.errors import ShardSurgeonError, UsageError
from shardsurgeon.operations.card_data import model_facts
from shardsurgeon.operations.card_pictures import card_pictures
from shardsurgeon.operations.carry_out import budget_for, complete
from shardsurgeon.operations.model_card import (
    Placement,
    model_card,
    recipe,
    recipe_by_record,
    require_metadata,
    with_files,
)
from shardsurgeon.operations.prune import Pruning
from shardsurgeon.operations.push_files import (
    files_to_publish,
    refuse_planned_secrets,
    refuse_secret,
    refuse_secrets,
    select_files,
)
from shardsurgeon.operations.push_view import ViewShipment
from shardsurgeon.operations.reports import PushReport, PushTarget
from shardsurgeon.operations.request import Destination
from shardsurgeon.operations.serving import Serving, serve_words, serving_of
from shardsurgeon.operations.verify import headers_only
from shardsurgeon.operations.written import complete_prune, require_as_written
from shardsurgeon.storage.hub.repository import MAIN, Repository
from shardsurgeon.storage.hub.upload import (
    Content,
    HubDestination,
    Published,
    foresee,
    publish,
    silence_hub,
)
from shardsurgeon.storage.limits import CARD, read_limited
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource


def push(
    pruned: str | os.PathLike[str],
    destination: Destination,
    *,
    family: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    follow_links: bool = False,
    dry_run: bool = False,
    disk_budget: int | None = None,
    command: str = "",
) -> PushReport:
    """Push what `apply` wrote to a folder, with a card, in one commit. The folder stays as it is.

    family, follow_links: as for `plan`; include, exclude: as for `select_files`; what they fit may
    differ from what `apply` wrote; dry_run: make and send nothing, and say what would be;
    disk_budget: bytes of a view's shards that may be on the disk, None for a few of the largest;
    command: as the user gave it. A rerun uploads nothing that is there already.

    Raises CheckpointError and its children where the folder is not a complete prune, or has changed
    since, UsageError where a file holds a secret or the Hub refuses the token or the repository,
    PublishError where the upload fails.
    """
    folder, begun = Path(pruned), time.monotonic()
    checkpoint, record = complete_prune(folder, family, follow_links)
    chosen = select_files(checkpoint, include, exclude)
    edited = require_as_written(checkpoint, [*include, *exclude])
    view = None
    names = [file.name for file in chosen.files]
    if isinstance(checkpoint.source, ViewSource):
        names = [name for name in names if name not in checkpoint.source.shards]
        gone = set(record.files or ()).difference(names)
        view = ViewShipment(checkpoint, names, {*edited, *gone}, family, disk_budget)
    elif disk_budget is not None:
        problem = f"is for the shards of a view, and those of {folder} are there"
        raise UsageError("--disk-budget", problem, "leave it out")
    with phase("looking for secrets"):
        refuse_secrets(checkpoint.source, chosen.files)
    with silence_hub() as notes:
        repository, card = _repository(destination), _own_card(destination)
        _prepare(repository, destination, [step.source for step in record.steps], dry_run)
        if destination.with_card and not card:
            card = _card(checkpoint, folder, repository, None)
        files = files_to_publish(folder, names, card)
        if view is None:
            published = foresee(repository, files) if dry_run else publish(repository, files, {})
        elif dry_run:
            published = view.foresee(repository, files)
        else:
            rest = partial(files_to_publish, names=names, card=card)
            published = view.push(repository, rest, command)
    anatomy = read_anatomy(checkpoint)
    kept = {layer: len(found.retained) for layer, found in record.layers.items()}
    serving = serving_of(checkpoint, anatomy, kept)
    left = tuple(name for name in chosen.left if name not in card)
    return _report(repository, published, begun, notes, serving, left)


class Shipment:
    """A prune that is planned, and the repository that it goes to.

    Of the plan it keeps what the push needs, so that the memory is free for the check of the
    result where that stays on the disk.
    """

    def __init__(
        self, pruning: Pruning, destination: Destination, *, dry_run: bool = False
    ) -> None:
        """Make the repository ready; dry_run: only look whether it can be.

        The disk budget is checked first; then that no file tells a secret, the card, the token,
        the repository and the right to write there. Raises UsageError and PublishError where one
        of them does not do.
        """
        self._begun = time.monotonic()
        self.disk_budget = (
            budget_for(pruning.plan, destination.disk_budget) if destination.stream else None
        )
        self._planned = pruning.plan if destination.stream else None
        self._out, self._family = pruning.out, pruning.checkpoint.family
        self._destination = destination
        self._command, self._serving = _recipe(pruning), pruning.serving
        self._declared = pruning.declared
        with phase("looking for secrets"):
            refuse_planned_secrets(pruning.plan, pruning.checkpoint.source)
        self._card = _own_card(destination)
        self._repository = _repository(destination)
        _prepare(self._repository, destination, _origins(pruning.checkpoint), dry_run)
        self._shard_destination: HubDestination | None = None
        self._published: Published | None = None

    def shard_destination(self, check_shard: Callable[[str, Path], None]) -> HubDestination:
        """Where finished shards go; check_shard: raises for one that must not be sent."""
        self._shard_destination = HubDestination(self._repository, check_shard, self._rest)
        return self._shard_destination

    def push(self) -> None:
        """Push the finished folder. An error leaves it there, and says how to go on."""
        self._begun = time.monotonic()
        out = self._out
        words = ["shardsurgeon", "push", str(out), self._repository.repo_id]
        words += _options(self._destination)
        words += ["--family", self._declared] if self._declared else []
        how = f"go on with `{shlex.join(words)}`"
        try:
            pruned = self._opened(LocalSource(out))
            names = [file.name for file in select_files(pruned).files]
            files = files_to_publish(out, names, self._card_for(pruned, out))
            self._published = publish(self._repository, files, {})
        except ShardSurgeonError as error:
            remedy = f"{complete(str(out))}: {how}"
            raise type(error)(error.where, error.problem, remedy) from error
        except BaseException as stop:
            stop.add_note(f"{complete(str(out))}; {how}")
            raise

    @property
    def target(self) -> PushTarget:
        """The repository, as it was found."""
        return _target(self._repository)

    def report(self, notes: Sequence[str]) -> PushReport:
        """The report of a push that is done; notes: what the Hub said meanwhile."""
        sent = self._shard_destination
        published = self._published if sent is None else sent.published
        assert published is not None
        return _report(self._repository, published, self._begun, notes, self._serving)

    def _rest(self, folder: Path) -> Mapping[str, Content]:
        """The files to publish beside the shards, which have been sent."""
        assert self._planned is not None
        pruned = self._opened(headers_only(self._planned, LocalSource(folder), self._out))
        there = {file.name for file in LocalSource(folder).list()}
        names = [file.name for file in select_files(pruned).files if file.name in there]
        return files_to_publish(folder, names, self._card_for(pruned, folder))

    def _opened(self, source: Source) -> Checkpoint:
        return open_checkpoint(source, self._family)

    def _card_for(self, pruned: Checkpoint, folder: Path) -> Mapping[str, bytes]:
        if self._card or not self._destination.with_card:
            return self._card
        return _card(pruned, folder, self._repository, self._command)


def _repository(destination: Destination) -> Repository:
    """The repository. Raises UsageError where `repo_id` cannot be the name of one."""
    return Repository(destination.repo_id, destination.revision, destination.create_pr)


def _own_card(destination: Destination) -> dict[str, bytes]:
    """The user's card, empty where there is none. Raises UsageError where it cannot be read."""
    if destination.card is None:
        return {}
    raw = read_limited(destination.card, CARD, UsageError)
    try:
        text = raw.decode("utf-8-sig")
    except ValueError as error:
        raise UsageError(destination.card, f"cannot be read as a card ({error})") from error
    require_metadata(text, destination.card)
    refuse_secret(text.encode(), os.fspath(destination.card))
    return {CARD_NAME: text.encode()}


def _options(destination: Destination) -> list[str]:
    """A destination as the options of `push`."""
    words = ["--private"] if destination.private else []
    words += ["--revision", destination.revision] if destination.revision else []
    words += ["--create-pr"] if destination.create_pr else []
    words += ["--card", os.fspath(destination.card)] if destination.card is not None else []
    return words + ([] if destination.with_card else ["--no-card"])


def _recipe(pruning: Pruning) -> str | None:
    """The command of a prune; None where its scores were not read from a file."""
    given = {name: path for name, path, _ in pruning.plan.score_files}
    evaluation = {} if pruning.evaluation is None else pruning.evaluation.files
    if len(given) == len(evaluation):
        return None
    return recipe(
        pruning.request,
        identity_of(pruning.checkpoint),
        given,
        pruning.max_shard_nbytes,
        pruning.declared,
        evaluation,
    )


def _card(
    pruned: Checkpoint, folder: Path, repository: Repository, command: str | None
) -> dict[str, bytes]:
    """The card of a pruned model, README.md, and its pictures.

    folder: has its small files; command: the one that made it, None to derive one from its record.
    """
    record = pruned.provenance
    assert record is not None
    with phase("writing the card"):
        facts = model_facts(pruned, read_anatomy(pruned), record, folder)
        revision = None if repository.revision == MAIN else repository.revision
        lines = with_files(command or recipe_by_record(facts), repository.repo_id, revision)
        pictures = card_pictures(facts)
        card = model_card(facts, Placement(repository.repo_id, revision, lines), pictures)
    raw = card.encode(errors="backslashreplace")  # a folder's name may be any bytes
    return {CARD_NAME: raw, **{picture.name: picture.data for picture in pictures.values()}}


def _origins(source: Checkpoint) -> list[SourceIdentity]:
    """A model that is pruned, and those that it was made of."""
    earlier = source.provenance.steps if source.provenance is not None else ()
    return [*(step.source for step in earlier), identity_of(source)]


def _prepare(
    repository: Repository,
    destination: Destination,
    origins: Sequence[SourceIdentity],
    dry_run: bool = False,
) -> None:
    """Make the repository ready; dry_run: only look whether it can be.

    origins: the models that the pruned one was made of. Raises UsageError where it would take the
    place of one of them, by the name or by the config that is there; and what `prepare` raises.
    """
    names = {(origin.repository or origin.name).strip().casefold() for origin in origins}
    configs = {origin.config_sha256 for origin in origins}
    replaces = repository.revision == MAIN and not repository.create_pr

    def refuse_origins() -> None:
        # A name may be written in another case; a copy, or a folder's model, has another name.
        if repository.repo_id.casefold() in names:
            problem = "is the repository that was pruned"
        elif repository.is_there and not configs.isdisjoint(repository.config_digests()):
            problem = "holds the model that was pruned"
        else:
            return
        raise UsageError(repository.repo_id, problem, "name another one, or a --revision of it")

    with phase(f"asking for {repository.repo_id}"):
        if replaces:
            refuse_origins()
        repository.prepare(destination.private, dry_run=dry_run)
        if replaces:
            refuse_origins()


def _target(repository: Repository) -> PushTarget:
    return PushTarget(
        repo_id=repository.repo_id,
        url=repository.url,
        revision=repository.revision,
        created=repository.is_new,
        private=repository.is_private,
        pull_request=repository.create_pr,
    )


def _report(
    repository: Repository,
    published: Published,
    begun: float,
    notes: Sequence[str],
    serving: Serving,
    left: tuple[str, ...] = (),
) -> PushReport:
    commit = published.commit
    revision = None if repository.revision == MAIN else repository.revision
    serve = None
    if serving.by_vllm and not commit.pull_request:
        serve = serve_words(repository.repo_id, revision, serving)
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
        notes=tuple(notes),
        left=left,
        serve=serve,
        dry_run=not commit.oid,
        private=repository.is_private,
        sent=published.sent,
        replaced=published.replaced,
        others=published.others,
    )
