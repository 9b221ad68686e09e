"""A view as a source: a pruned model whose shards are byte ranges of another one.

Everything that reads a model reads a view like any other: its shards are listed, and their bytes
are put together as they are asked for. `formats.view` has the layout of its manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from io import FileIO
from pathlib import Path

from shardsurgeon.errors import CheckpointError, SourceChangedError, SourceReadError
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.formats.view import (
    DATA_NAME,
    VIEW_NAME,
    Range,
    read_manifest,
)
from shardsurgeon.storage.limits import MIB, Limit, require_size
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import (
    CHUNK_NBYTES,
    Source,
    SourceFile,
    require_inside,
    require_plain,
    require_unchanged,
)

# A commit of the Hub; a branch would be another model tomorrow.
_PINNED = re.compile(
    r"hf://(?P<id>\w[\w.-]*/\w[\w.-]*)@(?P<commit>[0-9a-f]{40})(/(?P<folder>[^@]+))?", re.ASCII
)
_MANIFEST = Limit(64 * MIB, 0)  # packed: 0.2 million tensors are 4 MB
_MAKE_AGAIN = "make the view again with `apply --view`"


def open_folder(path: str | os.PathLike[str], *, follow_links: bool = False) -> Source:
    """The source of a local folder: a view where it holds the manifest of one.

    Arguments and errors are those of `LocalSource`, and CheckpointError for a manifest that cannot
    be used, NetworkError where a view's source cannot be reached.
    """
    folder = LocalSource(path, follow_links=follow_links)
    is_view = os.path.lexists(folder.local_path(VIEW_NAME))
    return ViewSource(folder) if is_view else folder


class ViewSource(Source):
    """A view: the files of its folder, and shards whose bytes lie in another source.

    origin: that source. It is opened with the view, and has to be what it was: every listing looks.
    folder: the view's own files; manifest: what its shards are made of; shards: those, by name, in
    order; digest: SHA-256 of the manifest, in hex.
    """

    def __init__(self, folder: LocalSource, *, at: Path | None = None) -> None:
        """folder: the view's; at: the name that it is going to have, from which a relative source
        is counted, None for the one that it has.

        Raises CheckpointError where the manifest in the folder, or the source that it names,
        cannot be used, NetworkError where that cannot be reached."""
        self.folder = folder
        self.name, self.location = folder.name, folder.location
        self.follows_links = folder.follows_links
        self._home = folder.local_path(VIEW_NAME).parent
        self._at = Path(os.path.realpath(at)) if at is not None else self._home
        raw = self._read_manifest()
        self.digest = hashlib.sha256(raw).hexdigest()
        self.manifest = read_manifest(raw, f"{self.location}/{VIEW_NAME}")
        self.shards = {shard.file: shard for shard in self.manifest.shards}
        self.origin = self._open_origin()
        self.is_remote = self.origin.is_remote
        self._require_own_values()
        self._require_origin()

    def list(self) -> tuple[SourceFile, ...]:
        """The files of the folder and the shards, sorted by name.

        Raises CheckpointError where a shard is there as a file too, or where a file that shards
        are made of is no longer what it was.
        """
        files = {file.name: file for file in self.folder.list()}
        self.odd, self.touched = self.folder.odd, self.folder.touched
        manifest = files.pop(VIEW_NAME, None)
        files.pop(DATA_NAME, None)
        for name, shard in self.shards.items():
            if name in files or name in self.odd:
                problem = f"is there as a file, and {VIEW_NAME} describes it too"
                raise CheckpointError(f"{self.location}/{name}", problem, "move the file away")
            stamp = manifest.stamp if manifest is not None else ""
            files[name] = SourceFile(name, shard.nbytes, stamp)
        self._require_origin()
        return tuple(files[name] for name in sorted(files))

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file, piece by piece; of a shard, from the view's source."""
        shard = self.shards.get(name)
        if shard is None:
            yield from self.folder.stream(name, begin, end)
            return
        if end > shard.nbytes:
            problem = f"ends at byte {shard.nbytes:,}, byte {end:,} was expected"
            raise SourceReadError(f"{self.location}/{name}", problem, _MAKE_AGAIN)
        behind = shard.header.data_begin
        if begin < behind:
            head = shard.head[begin:end]
            for at in range(0, len(head), CHUNK_NBYTES):
                yield head[at : at + CHUNK_NBYTES]
        for file, at, nbytes in shard.ranges(max(begin - behind, 0), end - behind):
            if file == DATA_NAME:
                yield self.data[at : at + nbytes]
            else:
                yield from self.origin.stream(file, at, at + nbytes)

    def open(self, name: str) -> FileIO | None:
        """The file itself; None for a shard, which is none."""
        return None if name in self.shards else self.folder.open(name)

    def local_path(self, name: str) -> Path | None:
        """The file's path; None for a shard."""
        return None if name in self.shards else self.folder.local_path(name)

    def resolve(self, name: str, begin: int, nbytes: int) -> Iterator[Range | bytes]:
        """Where `nbytes` of a shard, from byte `begin` of the file, lie in the view's source.

        Bytes that no source has come as they are.
        """
        shard = self.shards[name]
        at = begin - shard.header.data_begin
        for file, first, count in shard.ranges(at, at + nbytes):
            if file == DATA_NAME:
                yield self.data[first : first + count]
            else:
                yield file, first, count

    @cached_property
    def data(self) -> bytes:
        """Values that no source has: expert counts and tables of expert ids."""
        file = self.manifest.data
        return b"" if file is None else self.folder.read(DATA_NAME, 0, file.nbytes)

    def _read_manifest(self) -> bytes:
        where = f"{self.location}/{VIEW_NAME}"
        for name in (VIEW_NAME, DATA_NAME):
            path = self._home / name
            if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
                raise CheckpointError(f"{self.location}/{name}", "is no plain file", _MAKE_AGAIN)
        nbytes = os.stat(self._home / VIEW_NAME).st_size
        require_size(nbytes, _MANIFEST, where, CheckpointError)
        return self.folder.read(VIEW_NAME, 0, nbytes)

    def _open_origin(self) -> Source:
        where, place = f"{self.location}/{VIEW_NAME}", self.manifest.source
        if pinned := _PINNED.fullmatch(place):
            from shardsurgeon.storage.hub.source import open_repository

            inner = pinned["folder"] or ""
            if inner:
                require_inside(inner, where, _MAKE_AGAIN)
            return open_repository(pinned["id"], pinned["commit"], inner)
        if "://" in place:
            problem = f"its source {place!a} is neither a folder nor a commit of a repository"
            raise CheckpointError(where, problem, _MAKE_AGAIN)
        folder = os.path.normpath(self._at / place)
        try:
            origin = LocalSource(folder, follow_links=self.follows_links)
        except CheckpointError as error:
            problem = f"its source {folder}: {error.problem}"
            raise CheckpointError(where, problem, _MAKE_AGAIN) from error
        if os.path.lexists(origin.local_path(VIEW_NAME)):
            raise CheckpointError(where, f"its source {folder} is a view itself", _MAKE_AGAIN)
        return origin

    def _require_own_values(self) -> None:
        """Raise CheckpointError where the view's own values are not what they were."""
        file = self.manifest.data
        if file is None:
            return
        path = self._home / DATA_NAME
        there = os.path.isfile(path) and os.stat(path).st_size == file.nbytes
        if not there or sha256_of(path) != file.stamp:
            problem = "is not the file that the manifest was made with"
            raise CheckpointError(f"{self.location}/{DATA_NAME}", problem, _MAKE_AGAIN)

    def _require_origin(self) -> None:
        """Raise CheckpointError where the files that shards are made of are not what they were."""
        try:
            require_unchanged(self.origin, self.origin_files)
        except SourceChangedError as error:
            problem = error.problem.replace("the run was planned", "the view was made")
            raise CheckpointError(error.where, problem, _MAKE_AGAIN) from error
        require_plain(self.origin, (file.name for file in self.origin_files), links=True)

    @property
    def origin_files(self) -> tuple[SourceFile, ...]:
        """The files of `origin` that the shards are made of, as they have to be."""
        files = self.manifest.files
        return tuple(map(self._as_cached, files)) if self._is_cached else files

    @property
    def _is_cached(self) -> bool:
        """Whether a commit of the Hub is read from its cache, without a network."""
        return bool(_PINNED.fullmatch(self.manifest.source)) and not self.origin.is_remote

    def _as_cached(self, file: SourceFile) -> SourceFile:
        """A file of the Hub as the cache has it: a link to bytes that are called by their hash."""
        path = self.origin.local_path(file.name)
        assert path is not None
        if os.path.basename(os.path.realpath(path)) != file.stamp:
            return file
        there = {each.name: each for each in self.origin.list()}
        return replace(file, stamp=there[file.name].stamp) if file.name in there else file
