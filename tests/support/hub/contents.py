"""What the Hub keeps: files, commits, repositories. Knows nothing of HTTP.

A file is bytes in memory or a path to them, so a checkpoint of gigabytes is served from where it
lies. Commit ids and dates follow from the content and the order, never from the clock.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.hub.refusals import entry_not_found, outdated_parent, revision_not_found

Content = bytes | Path
CHUNK_NBYTES = 1 << 20
# Above this a file is an LFS object whatever its name.
REGULAR_LIMIT = 10 << 20
SAMPLE_NBYTES = 512
NO_COMMIT = "0" * 40
FIRST_DATE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

# What a repository that was created on the Hub begins with, and what goes to LFS without one.
LFS_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npz", "*.npy", "*.gguf", "*.h5", "*.onnx"),
    *("*.zip", "*.gz", "*.tar", "*.model", "*.parquet", "*.arrow", "*.msgpack", "*.pkl"),
)
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS
).encode()


@dataclass(frozen=True)
class Blob:
    """One version of one file; `sha256` only where it is an LFS object."""

    content: Content
    size: int
    git_id: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What the Hub calls the file's version: its sha256 in LFS, its id in git."""
        return self.sha256 or self.git_id

    def pieces(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), piece by piece."""
        if isinstance(self.content, bytes):
            yield self.content[begin:end]
            return
        with self.content.open("rb") as file:
            file.seek(begin)
            while begin < end:
                piece = file.read(min(end - begin, CHUNK_NBYTES))
                if not piece:
                    return
                begin += len(piece)
                yield piece

    def read(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces(0, self.size))


def regular_blob(content: bytes) -> Blob:
    """A file that lies in git itself."""
    return Blob(content, len(content), git_id(content))


def lfs_blob(content: Content, size: int, sha256: str) -> Blob:
    """A file of which git holds a pointer."""
    return Blob(content, size, git_id(lfs_pointer(sha256, size)), sha256)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that stands in git for an LFS object."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def git_id(content: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def content_sha256(content: Content) -> str:
    """Hash of the bytes, read piece by piece."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def belongs_in_lfs(path: str, size: int, sample: bytes, attributes: bytes | None) -> bool:
    """Whether the Hub wants this file as an LFS object. An empty file never is one."""
    if not size:
        return False
    patterns = LFS_PATTERNS if attributes is None else _lfs_patterns(attributes)
    name = path.rsplit("/", 1)[-1]
    named = any(fnmatch.fnmatch(name, one) or fnmatch.fnmatch(path, one) for one in patterns)
    return named or size > REGULAR_LIMIT or b"\0" in sample


def _lfs_patterns(attributes: bytes) -> list[str]:
    lines = (line.split() for line in attributes.decode().splitlines())
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


@dataclass(frozen=True)
class Commit:
    """A state of the whole repository: path to file."""

    id: str
    parent: str | None
    tree: dict[str, Blob]
    title: str
    description: str
    author: str
    date: str


@dataclass
class Repository:
    """Commits and the names that point at them."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)
    # LFS objects that were uploaded here or are part of a commit here.
    objects: dict[str, Blob] = field(default_factory=dict)
    # Who was let in behind the gate.
    accepted: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a ref or a hash (7 digits are enough) names."""
        for prefix, names in (("refs/heads/", self.branches), ("refs/tags/", self.tags)):
            name = revision.removeprefix(prefix)
            if name in names:
                return self.commits[names[name]]
        number = revision.removeprefix("refs/pr/")
        if number != revision and number.isdigit() and int(number) in self.pulls:
            return self.commits[self.pulls[int(number)]]
        if len(revision) >= 7:
            found = [one for one in self.commits if one.startswith(revision)]
            if len(found) == 1:
                return self.commits[found[0]]
        raise revision_not_found(revision)

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file of a revision, and the commit that this is."""
        commit = self.resolve(revision)
        if path not in commit.tree:
            raise entry_not_found(path, commit.id)
        return commit, commit.tree[path]

    def commit(
        self,
        revision: str,
        tree: Mapping[str, Blob],
        title: str,
        *,
        description: str = "",
        author: str = "me",
        parent: str | None = None,
        as_pull: bool = False,
    ) -> Commit:
        """Put a new state on top of a branch or pull request; `as_pull` opens a pull request.

        `parent` is what the committer believes to be the newest commit: refused if it is not.
        """
        with self.lock:
            head = self.resolve(revision) if self.commits else None
            if parent is not None and (head is None or not head.id.startswith(parent)):
                raise outdated_parent()
            commit = self._new_commit(head, dict(tree), title, description, author)
            self.commits[commit.id] = commit
            self.objects.update(
                {blob.sha256: blob for blob in commit.tree.values() if blob.sha256 is not None}
            )
            self._point(revision, commit.id, as_pull=as_pull)
            return commit

    def _new_commit(
        self, head: Commit | None, tree: dict[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        parent = head.id if head else None
        number = len(self.commits)
        facts = [self.id, str(number), parent or NO_COMMIT, author, title, description]
        facts += [f"{path}\0{blob.git_id}" for path, blob in sorted(tree.items())]
        date = FIRST_DATE + datetime.timedelta(minutes=number)
        return Commit(
            id=hashlib.sha1("\n".join(facts).encode()).hexdigest(),
            parent=parent,
            tree=dict(sorted(tree.items())),
            title=title,
            description=description,
            author=author,
            date=date.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        )

    def _point(self, revision: str, commit: str, *, as_pull: bool) -> None:
        number = revision.removeprefix("refs/pr/")
        if as_pull:
            self.pulls[len(self.pulls) + 1] = commit
        elif number != revision and int(number) in self.pulls:
            self.pulls[int(number)] = commit
        elif not self.branches or revision.removeprefix("refs/heads/") in self.branches:
            self.branches[revision.removeprefix("refs/heads/")] = commit
        else:
            raise revision_not_found(revision)

    def log(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commit: Commit | None = self.resolve(revision)
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found
