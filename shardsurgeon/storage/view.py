"""A view as a source: a pruned model whose shards are byte ranges of another one.

Everything that reads a model reads a view like any other: its shards are listed, and their bytes
are put together as they are asked for. `formats.view` has the layout of its manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path

from shardsurgeon.errors import CheckpointError, SourceChangedError, SourceReadError
from shardsurgeon.storage.formats.safetensors import Header
from shardsurgeon.storage.formats.view import DATA_NAME, VIEW_NAME, read_manifest
from shardsurgeon.storage.limits import MAX_MANIFEST_NBYTES
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import (
    CHUNK_NBYTES,
    Source,
    SourceFile,
    leads_out,
    require_plain,
    require_unchanged,
    unusual,
)

# A commit of the Hub; a branch would be another model tomorrow.
_PINNED = re.compile(
    r"hf://(?!datasets/|spaces/|buckets/)(?P<id>\w[\w.-]*/\w[\w.-]*)@(?P<commit>[0-9a-f]{40})"
    r"(/(?P<folder>[^@\\\x00-\x1f]+))?",
    re.ASCII,
)
_MAKE_AGAIN = "make the view again with `apply --view`"


def open_folder(path: str | os.PathLike[str], *, follow_links: bool = False) -> Source:
    """The source of a local folder: a view where it holds the manifest of one.

    Arguments and errors are those of `LocalSource`, and CheckpointError for a manifest that cannot
    be used, NetworkError where a view's source cannot be reached.
    """
    folder = LocalSource(path, follow_links=follow_links)
    return ViewSource(folder) if is_view(folder.local_path(VIEW_NAME).parent) else folder


def is_view(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds the manifest of a view, or anything in its place."""
    return os.path.lexists(os.path.join(folder, VIEW_NAME))


class ViewSource(Source):
    """A view: the files of its folder, and shards whose bytes lie in another source.

    Whoever made the view chose that place, so that opening a stranger's view may make it read a
    folder of this machine. It reads files called `.safetensors` only, of which the manifest knows
    the size and, in a folder, the time of writing in nanoseconds and the inode; no manifest is read
    that leaves those out. Who knows all that has seen the files. Like the shards of any model they
    may be links to anywhere, and nothing else of the place is looked at, however large it is.

    origin: that source. It is opened with the view, and has to be what it was: every listing looks.
    folder: the view's own files; manifest: what its shards are made of; shards: those, by name, in
    order; digest: SHA-256 of the manifest, in hex; data: values that no source has, expert counts
    and tables of expert ids.
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
        self._own: dict[str, SourceFile] = {}
        raw = self._read_own(VIEW_NAME, MAX_MANIFEST_NBYTES)
        self.digest = hashlib.sha256(raw).hexdigest()
        self.manifest = read_manifest(raw, f"{self.location}/{VIEW_NAME}")
        self.shards = {shard.file: shard for shard in self.manifest.shards}
        self.data = self._own_values()
        self._require_no_files()
        self.origin = self._open_origin()
        self.is_remote = self.origin.is_remote
        self._require_origin()

    def list(self) -> tuple[SourceFile, ...]:
        """The files of the folder and the shards, sorted by name.

        Raises CheckpointError where a shard is there as a file too, or where the manifest, or a
        file that shards are made of, is no longer what it was.
        """
        files = {file.name: file for file in self.folder.list()}
        self.odd, self.touched = self.folder.odd, self.folder.touched
        self._require_own(files)
        self._require_no_files()
        for name in self._own:
            files.pop(name, None)
        stamp = self._own[VIEW_NAME].stamp
        for name, shard in self.shards.items():
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

    def known_header(self, name: str) -> Header | None:
        """What a shard's header says; None for another file."""
        shard = self.shards.get(name)
        return None if shard is None else shard.header

    def open(self, name: str) -> FileIO | None:
        """The file itself; None for a shard, which is none."""
        return None if name in self.shards else self.folder.open(name)

    def local_path(self, name: str) -> Path | None:
        """The file's path; None for a shard."""
        return None if name in self.shards else self.folder.local_path(name)

    def _read_own(self, name: str, most: int) -> bytes:
        """A file of the view's folder, which has at most so many bytes."""
        where = f"{self.location}/{name}"
        found = self.folder.described([name])
        require_plain(self.folder, [name])
        if not found:
            raise CheckpointError(where, "is missing, or no plain file", _MAKE_AGAIN)
        (file,) = found
        if file.nbytes > most:
            problem = f"has {file.nbytes:,} bytes, at most {most:,} are read"
            raise CheckpointError(where, problem, _MAKE_AGAIN)
        self._own[name] = file
        return self.folder.read(name, 0, file.nbytes)

    def _own_values(self) -> bytes:
        file = self.manifest.data
        if file is None:
            return b""
        found = self._read_own(DATA_NAME, file.nbytes)
        if hashlib.sha256(found).hexdigest() != file.stamp:
            problem = "is not the file that the manifest was made with"
            raise CheckpointError(f"{self.location}/{DATA_NAME}", problem, _MAKE_AGAIN)
        return found

    def _require_own(self, files: Mapping[str, SourceFile]) -> None:
        """Raise CheckpointError where the files that describe the shards are not those that were
        read. files: what is there now."""
        for name, file in self._own.items():
            if files.get(name) != file or name in self.touched:
                problem = "was written to, replaced or removed since it was read"
                raise CheckpointError(f"{self.location}/{name}", problem, "run the command again")

    def _require_no_files(self) -> None:
        """Raise CheckpointError where a shard is there as a file too."""
        for name in self.shards:
            if os.path.lexists(self._home / name):
                problem = f"is there as a file, and {VIEW_NAME} describes it too"
                raise CheckpointError(f"{self.location}/{name}", problem, "move the file away")

    def _open_origin(self) -> Source:
        where, place = f"{self.location}/{VIEW_NAME}", self.manifest.source
        if pinned := _PINNED.fullmatch(place):
            from shardsurgeon.storage.hub.source import open_repository

            inner = pinned["folder"] or ""
            if inner and (leads_out(inner) or unusual(inner)):
                problem = f"its source {place!a} is no folder of a repository"
                raise CheckpointError(where, problem, _MAKE_AGAIN)
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
        if is_view(origin.local_path(VIEW_NAME).parent):
            raise CheckpointError(where, f"its source {folder} is a view itself", _MAKE_AGAIN)
        return origin

    def _require_origin(self) -> None:
        """Raise CheckpointError where the files that shards are made of are not what they were."""
        files = self.origin_files
        names = [file.name for file in files]
        try:
            self.origin.described(names)
            require_plain(self.origin, names, links=True)
            require_unchanged(self.origin, files)
        except SourceChangedError as error:
            problem = error.problem.replace("the run was planned", "the view was made")
            raise CheckpointError(error.where, problem, _MAKE_AGAIN) from error
        except SourceReadError as error:
            raise CheckpointError(error.where, error.problem, _MAKE_AGAIN) from error

    @property
    def origin_files(self) -> tuple[SourceFile, ...]:
        """The files of `origin` that the shards are made of, as they have to be."""
        files = self.manifest.files
        return self._as_cached(files) if self._is_cached else files

    @property
    def _is_cached(self) -> bool:
        """Whether a commit of the Hub is read from its cache, without a network."""
        return bool(_PINNED.fullmatch(self.manifest.source)) and not self.origin.is_remote

    def _as_cached(self, files: tuple[SourceFile, ...]) -> tuple[SourceFile, ...]:
        """Files of the Hub as the cache has them: links to bytes that are called by their hash."""
        present = {each.name: each for each in self.origin.described(file.name for file in files)}
        found = []
        for file in files:
            path, there = self.origin.local_path(file.name), present.get(file.name)
            is_it = path is not None and os.path.basename(os.path.realpath(path)) == file.stamp
            found.append(replace(file, stamp=there.stamp) if is_it and there else file)
        return tuple(found)
