"""One model repository on the Hub: prepare it, upload to it, commit.

Knows names, sizes and digests, not what the files mean. Authentication, endpoints, Xet and LFS are
left to huggingface_hub; the token is not kept here. A commit names large files by size and sha256
alone. Which of them have been uploaded is kept in attributes of CommitOperationAdd that are not
public; a test checks that each of them still means what is assumed here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._runtime import is_xet_available

from shardsurgeon._version import __version__
from shardsurgeon.errors import OutputError, PublishError, UsageError, keep_secret, redacted
from shardsurgeon.storage.connections import uploaded_nbytes
from shardsurgeon.storage.formats.index import HUGGING_FACE, MISTRAL
from shardsurgeon.storage.hub.errors import (
    LOG_IN_TO_PUSH,
    RETRY_POLICY,
    hub_errors,
    require_sound_settings,
    with_retries,
)
from shardsurgeon.storage.hub.listing import fetch_listing
from shardsurgeon.storage.hub.sent_bytes import CountedAddition, SentBytes
from shardsurgeon.storage.hub.source import HubSource
from shardsurgeon.storage.phases import Phase
from shardsurgeon.units import format_size

MAIN = "main"
_Answer = TypeVar("_Answer")
_LOG = logging.getLogger(__name__)
_TOKENS = "https://huggingface.co/settings/tokens"

_HEADS = "refs/heads/"
# What git allows in no branch's name, and names that the Hub has for something else.
_NO_BRANCH = re.compile(
    r"[\s\x00-\x1f\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|\Z)|\A[-./]|[./]\Z"
    r"|\A(?:@|HEAD)?\Z|\Arefs/(?!pr/[0-9]+\Z)"
)

# Larger files are not hashed to find out whether two are equal.
_TWIN_NBYTES = 1 << 26
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a revision: its size in bytes; its sha256 (hex) where it is a large one; digest:
    that, or git's of a small one."""

    nbytes: int
    sha256: str | None
    digest: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that was made. pull_request: the address of the one it opened, if it did."""

    oid: str
    url: str
    pull_request: str | None


class Repository:
    """A model repository that is pushed to. Talks to the Hub from `prepare` on."""

    def __init__(self, repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
        """repo_id: `org/name`, or `name` for one of the user's own; revision: the branch, None
        for main; create_pr: commit to a new pull request against it.

        Raises UsageError where `repo_id` is not a repository id, or `revision` no branch's name.
        """
        with hub_errors(repo_id or "REPO_ID"):
            validate_repo_id(repo_id)
        self.repo_id = repo_id
        self.revision = branch_name(revision)
        self.create_pr = create_pr
        self.is_new = False
        self.is_there = False
        self.is_private: bool | None = None
        self._base = self.revision
        self._uploaded_before = uploaded_nbytes()

    @cached_property
    def _api(self) -> HfApi:
        return HfApi(library_name="shardsurgeon", library_version=__version__)

    @property
    def endpoint(self) -> str:
        """The Hub it is on: `https://huggingface.co`, or what HF_ENDPOINT says."""
        return self._api.endpoint

    @property
    def url(self) -> str:
        """Its page, for people."""
        place = f"{self.endpoint}/{self.repo_id}"
        return place if self.revision == MAIN else f"{place}/tree/{self.revision}"

    def prepare(self, private: bool, *, dry_run: bool = False) -> None:
        """Check the token, make the repository and the branch where they are missing, and make
        sure that they may be written to.

        private: whether a new repository is to be private; dry_run: make nothing, and ask whether
        it could be made. Afterwards `is_new` says whether the repository is, or would be, made, and
        `is_private` whether it is seen by its owners only, None where its organization decides.
        Raises UsageError where the Hub refuses any of that, and where the repository exists, is
        public, and was asked to be private.
        """
        with hub_errors(self.repo_id):
            user = self._sign_in()
            self._find(private)
            if not self.is_there:
                self.is_new = True
                if dry_run:
                    self._require_own(user, private)
                    return
                self._create(private)
            self._base = self._create_branch(dry_run)
            self._require_writable(self._base)

    def _sign_in(self) -> Mapping[str, Any]:
        """Who the token is of, as the Hub says it."""
        # A broken token, once sent, would be quoted in the HTTP library's complaint.
        require_sound_settings()
        if get_token() is None:
            raise UsageError(
                self.repo_id, "there is no Hugging Face token to push with", LOG_IN_TO_PUSH
            )
        keep_secret(get_token())
        user = self._with_retries(self._api.whoami)
        if _member(user, "auth", "accessToken", "role") == "read":
            problem = "the token may only read"
            raise UsageError(self.repo_id, problem, f"make one that may write at {_TOKENS}")
        if "/" not in self.repo_id:
            name = _member(user, "name")
            if not isinstance(name, str) or redacted(name) != name:
                problem = f"{self.endpoint} does not answer as a Hub does: it names no user"
                raise PublishError(self.repo_id, problem, "check HF_ENDPOINT")
            validate_repo_id(f"{name}/{self.repo_id}")
            self.repo_id = f"{name}/{self.repo_id}"
        return user if isinstance(user, dict) else {}

    def _find(self, private: bool) -> None:
        """Look for the repository. private: as for `prepare`."""
        try:
            there = self._with_retries(lambda: self._api.model_info(self.repo_id))
        except RepositoryNotFoundError:
            return
        if private and not there.private:
            remedy = "make it private in its settings, or leave --private out"
            raise UsageError(self.repo_id, "is there already, and public", remedy)
        # As the Hub writes it, to which another case, and an old name, are the same repository.
        self.repo_id, self.is_there = there.id, True
        self.is_private = bool(there.private)

    def _require_own(self, user: Mapping[str, Any], private: bool) -> None:
        """Raise UsageError where the user could make no repository under this name.

        user: what the Hub says of them.
        """
        owner, name = self.repo_id.partition("/")[0].casefold(), _member(user, "name")
        roles = {
            str(_member(each, "name")).casefold(): _member(each, "roleInOrg")
            for each in user.get("orgs") or ()
        }
        if owner == str(name).casefold():
            self.is_private = private
        elif owner not in roles or roles[owner] == "read":
            what = "may only read there" if owner in roles else "is no member there"
            problem = f"is not there, and {name} cannot make it: {name} {what}"
            raise UsageError(self.repo_id, problem, f"name one of your own, {name}/...")
        else:
            # Where nothing is asked for, the organization has a setting.
            self.is_private = private or None

    def _create(self, private: bool) -> None:
        self._with_retries(
            lambda: self._api.create_repo(self.repo_id, private=private or None, exist_ok=True)
        )
        self.is_private = bool(
            self._with_retries(lambda: self._api.model_info(self.repo_id)).private
        )

    def _create_branch(self, dry_run: bool) -> str:
        """Make the branch where it is missing, and give its name; main's in a dry run, where it
        would be made."""
        if self.revision == MAIN:
            return MAIN
        try:
            self._with_retries(lambda: self._api.model_info(self.repo_id, revision=self.revision))
        except RevisionNotFoundError:
            if self.create_pr:
                raise
            if dry_run:
                return MAIN
            self._with_retries(
                lambda: self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            )
        return self.revision

    def _require_writable(self, branch: str) -> None:
        """Ask how a small file would be uploaded: the Hub answers only those who may write."""
        probe = CommitOperationAdd(path_in_repo="config.json", path_or_fileobj=b"{}")
        self._preupload([probe], branch)

    def files(self, revision: str | None = None) -> dict[str, RemoteFile]:
        """Every file of the branch, or of another revision, by name."""

        def listed() -> dict[str, RemoteFile]:
            asked = revision or self.revision
            found = fetch_listing(self.repo_id, asked, self.repo_id, RETRY_POLICY).files
            return {
                name: RemoteFile(file.nbytes, file.digest if file.is_large else None, file.digest)
                for name, file in found.items()
            }

        with hub_errors(self.repo_id):
            return self._with_retries(listed)

    def files_before(self) -> dict[str, RemoteFile]:
        """Every file that a commit would be made upon; none in a repository that is to be made."""
        return self.files(self._base) if self.is_there else {}

    def config_digests(self) -> frozenset[str]:
        """SHA-256 (hex) of the config files that the branch has now."""
        there = HubSource(self.repo_id, self.revision)
        sizes = {file.name: file.nbytes for file in there.list()}
        configs = (names.config for names in (HUGGING_FACE, MISTRAL))
        contents = (there.read(name, 0, sizes[name]) for name in configs if name in sizes)
        return frozenset(hashlib.sha256(raw).hexdigest() for raw in contents)

    @property
    def uploaded(self) -> int | None:
        """Bytes of large files that have been sent from here; None where Xet sends them."""
        return None if is_xet_available() else uploaded_nbytes() - self._uploaded_before

    def upload(self, name: str, path: Path, at: Phase | None = None) -> Receipt:
        """Send a large file's bytes ahead of the commit that will name it; `at` counts them."""
        with hub_errors(self.repo_id), SentBytes(at) as sent:
            addition = to_upload_ahead(name, path)
            self._preupload([addition])
            receipt = receipt_of(addition)
            sent.reach(receipt.nbytes)
        _LOG.debug("%s is uploaded, %s", name, format_size(receipt.nbytes))
        return receipt

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        sent: Mapping[str, Receipt],
        removed: Sequence[str],
        message: str,
    ) -> Commit:
        """Add files of this machine and files sent ahead, remove others, in one commit.

        What the branch has already is neither uploaded nor committed again; where it has
        everything, the result is the commit that the branch is at.
        """
        with hub_errors(self.repo_id):
            additions = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in files.items()
            ]
            firsts = without_twins(additions)
            self._preupload(firsts)
            chosen = {id(addition) for addition in firsts}
            self._preupload(each for each in additions if id(each) not in chosen)
            additions += [uploaded_before(name, receipt) for name, receipt in sent.items()]
            deletions = [CommitOperationDelete(path_in_repo=name) for name in removed]
            info = self._commit([*additions, *deletions], message)
        if not isinstance(info.oid, str) or not _COMMIT.fullmatch(info.oid):
            problem = f"{self.endpoint} does not answer as a Hub does: it names no commit"
            raise PublishError(self.repo_id, problem, "look whether the commit is there")
        return Commit(info.oid, str(info.commit_url), info.pr_url)

    def _preupload(self, additions: Iterable[Any], branch: str | None = None) -> None:
        """Upload large files. gitignore_content: empty, so that a model's .gitignore hides none."""
        additions = list(additions)
        if not additions:
            return
        self._with_retries(
            lambda: self._api.preupload_lfs_files(
                self.repo_id,
                additions,
                revision=branch or self.revision,
                create_pr=self.create_pr,
                free_memory=False,
                gitignore_content="",
            )
        )

    def _commit(self, operations: list[Any], message: str) -> Any:
        # Not repeated where the connection broke: the commit may have been made, and the next run
        # finds out.
        return self._with_retries(
            lambda: self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
            ),
            repeatable=False,
        )

    def _with_retries(self, call: Callable[[], _Answer], *, repeatable: bool = True) -> _Answer:
        return with_retries(call, self.repo_id, repeatable=repeatable)


def branch_name(revision: str | None) -> str:
    """The branch that the Hub takes a revision for: `refs/heads/main` is main, as None is.

    Raises UsageError for what cannot be the name of one.
    """
    if revision is None:
        return MAIN
    name = revision
    while name.startswith(_HEADS):
        name = name.removeprefix(_HEADS)
    if _NO_BRANCH.search(name):
        problem = f"{revision!r} is not the name of a branch"
        raise UsageError("--revision", problem, "write it like main or half-the-experts")
    return name


@dataclass(frozen=True, slots=True)
class Receipt:
    """What names an uploaded file in a commit: its sha256 (hex) and its size in bytes."""

    sha256: str
    nbytes: int

    def to_text(self) -> str:
        """The receipt as one line, for the journal."""
        return json.dumps({"sha256": self.sha256, "nbytes": self.nbytes})

    @classmethod
    def from_text(cls, text: str, where: str) -> Receipt:
        """Read `to_text` back. Raises OutputError, naming `where`, for anything else."""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        match value:
            case {"sha256": str(sha256), "nbytes": int(nbytes)} if _SHA256.fullmatch(sha256):
                return cls(sha256, nbytes)
        problem = "its receipt in the journal is not that of an upload"
        raise OutputError(where, problem, "--restart starts over")


def _member(value: Any, *keys: str) -> Any:
    """What lies under keys of objects in one another, None where one of them is something else."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def without_twins(additions: Sequence[CommitOperationAdd]) -> list[CommitOperationAdd]:
    """The additions without those whose bytes another one of them has.

    Equal files in one request would be uploaded twice; in a later request, the Hub has them.
    Compares small files only, whose hash costs no time.
    """
    found: dict[object, CommitOperationAdd] = {}
    sizes = Counter(addition.upload_info.size for addition in additions)
    for addition in additions:
        nbytes = addition.upload_info.size
        alike = sizes[nbytes] > 1 and nbytes <= _TWIN_NBYTES
        found.setdefault(addition.upload_info.sha256 if alike else id(addition), addition)
    return list(found.values())


def to_upload_ahead(name: str, path: Path) -> CommitOperationAdd:
    """A file that is uploaded as a large one whatever the server would choose for its size.

    A small file would otherwise be sent inside the commit, when it is no longer on the disk.
    """
    addition = CountedAddition(path_in_repo=name, path_or_fileobj=path)
    addition._upload_mode = "lfs"
    addition._should_ignore = False
    return addition


def receipt_of(addition: CommitOperationAdd) -> Receipt:
    """The receipt of a file that has just been uploaded."""
    if not addition._is_uploaded:
        raise RuntimeError(f"{addition.path_in_repo} was not uploaded")
    return Receipt(addition.upload_info.sha256.hex(), addition.upload_info.size)


def uploaded_before(name: str, receipt: Receipt) -> CommitOperationAdd:
    """A file whose bytes the Hub has, for a commit to name. It need not be on this disk."""
    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
    addition.upload_info.size = receipt.nbytes
    addition.upload_info.sha256 = bytes.fromhex(receipt.sha256)
    addition._upload_mode = "lfs"
    addition._should_ignore = False
    addition._is_uploaded = True
    return addition
