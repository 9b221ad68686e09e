"""A model on the Hugging Face Hub, read by byte ranges and pinned to one commit.

huggingface_hub provides the address, the login, the session and the local cache; the bytes come by
plain range requests. hf_xet can stream a range as well, but it transfers whole compressed blocks
whose sizes it does not tell, so a promise about bytes downloaded could be neither kept nor checked;
and it retries by its own rules. Plain ranges work with every endpoint.

A large file's address on the Hub redirects, with size and hash in the headers, to a signed address
on another host. That one is used for every range until it expires: one request to the Hub per file,
not per range. The token is sent to the Hub's hosts only.

The listing gives the size and a hash of every file. A file that is read whole (config, index,
tokenizer, code) is compared with them, bytes and all. A shard is read by ranges, which no hash of
the whole can prove: there the size, and the hash that the Hub and its storage say they have, must
be the listed ones, and a storage that sends other bytes of the same size is not found out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import (
    constants,
    get_session,
    get_token,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from shardsurgeon.errors import CheckpointError, IndexFileError, SourceReadError, UsageError
from shardsurgeon.storage.connections import (
    MOST_REDIRECTS,
    REDIRECTS,
    redirect_target,
    status_line,
    whole_number,
)
from shardsurgeon.storage.files import open_regular
from shardsurgeon.storage.formats.index import INDEX_NAME, parse_index
from shardsurgeon.storage.http import (
    answer,
    body,
    changed,
    drain,
    endless,
    etag_of,
    range_header,
    without_secrets,
)
from shardsurgeon.storage.hub.errors import refused_read, require_sound_settings
from shardsurgeon.storage.hub.listing import HubHeaders, Listing, fetch_listing, hub_error
from shardsurgeon.storage.limits import INDEX, read_limited
from shardsurgeon.storage.local import LocalSource, pieces_of
from shardsurgeon.storage.retry import RetryableError, RetryPolicy, Waits, retry, stream_pieces
from shardsurgeon.storage.source import Source, SourceFile, is_left_behind, unusual

_RETRY_POLICY = RetryPolicy()

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_OF_TOTAL = re.compile(r"-\d+-of-(\d+)\.safetensors$")
# A link that the Hub has just given may have expired on the way; not so twice.
_FRESH_LINKS = 3
_LOOK = "look at its files on the Hub"
# A snapshot without these is complete: they are not part of a result.
_NOT_NEEDED = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*")


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the Hub says that a file's bytes are, and what that place calls them."""

    url: str
    etag: str | None


class HubSource(Source):
    """The files of one commit of a model repository. Safe to use from several threads.

    name: the repository's without its owner; location: `hf://org/name@` and the first digits of
    the commit; of a folder of the repository, both with what leads to it; revision: the whole
    commit. Single files may have a local path, in the Hub's cache.
    """

    is_remote = True
    revision: str

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        policy: RetryPolicy = _RETRY_POLICY,
        *,
        folder: str = "",
    ) -> None:
        """Ask the Hub which commit a revision is, and what is in it.

        repo_id: `org/name`; revision: a branch, a tag or a commit hash, None for main; folder: the
        one in the repository whose files these are (or a file in it), "" for all of them.
        Raises CheckpointError or UsageError, with what to do, where the Hub refuses or there is no
        such folder, and NetworkError where it does not answer.
        """
        require_sound_settings()
        self._repo_id = repo_id
        self._policy, self._waits = policy, Waits(policy)
        self._endpoint = constants.ENDPOINT
        asked = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
        brief = policy.brief()
        listing = retry(
            partial(_listing, repo_id, revision, asked, brief), asked, brief, self._waits
        )
        self.revision = listing.commit or "of no commit"
        if folder in listing.files:
            folder = folder.rpartition("/")[0]
        self._prefix = f"{folder}/" if folder else ""
        inner = f"/{folder}" if folder else ""
        self.name = (repo_id.rpartition("/")[2] + inner).replace("/", "-")
        self.location = f"hf://{repo_id}@{self.revision[:12]}{inner}"
        listed = {
            name.removeprefix(self._prefix): file
            for name, file in listing.files.items()
            if name.startswith(self._prefix)
        }
        if folder and not listed:
            raise CheckpointError(self.location, "there is no such folder in the repository", _LOOK)
        self._files: dict[str, SourceFile] = {}
        odd: dict[str, str] = {}
        for name, file in listed.items():
            if (what := unusual(name)) is not None:
                odd[name] = what
            elif not is_left_behind(name):
                self._files[name] = SourceFile(name, file.nbytes, file.digest)
        self.odd = odd
        self._hashed = listed
        self._headers, self._token = HubHeaders(), get_token()
        # File → where its bytes are. Several threads may write an entry; any of them will do.
        self._routes: dict[str, _Route] = {}
        self._cached: dict[str, Path | None] = {}

    def list(self) -> tuple[SourceFile, ...]:
        """Every file of the commit, sorted by name; the stamp is its sha256 or its blob id."""
        return tuple(self._files.values())

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file: from the local cache, or by one request.

        All bytes of a file are compared with the hash that the Hub lists for it. Raises
        SourceReadError, SourceChangedError or NetworkError, and CheckpointError where the Hub no
        longer lets this login read it.
        """
        where = f"{self.location}/{name}"
        file = self._files.get(name)
        if file is None:
            raise SourceReadError(where, "there is no such file")
        if end > file.nbytes:
            problem = f"ends at byte {file.nbytes:,}, byte {end:,} was expected"
            raise SourceReadError(where, problem)
        path = self.local_path(name)
        if path is not None:
            return pieces_of(partial(open_regular, path), begin, end)

        def request(at: int) -> Any:
            return self._range(file, where, at, end)

        pieces = stream_pieces(request, where, begin, end, self._policy, self._waits)
        pieces = without_secrets(pieces, [self._token], where)
        return self._hashed_pieces(pieces, file, where) if end - begin == file.nbytes else pieces

    def _hashed_pieces(
        self, pieces: Iterator[bytes], file: SourceFile, where: str
    ) -> Iterator[bytes]:
        """The pieces of a whole file. Raises SourceReadError in place of the last one, unless
        they have the hash that is listed.
        """
        blob = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
        digest = hashlib.sha256() if self._hashed[file.name].is_large else blob
        left = file.nbytes
        for piece in pieces:
            digest.update(piece)
            left -= len(piece)
            if left <= 0 and digest.hexdigest() != file.stamp:
                problem = (
                    f"other bytes came than the Hub lists (expected {digest.name} "
                    f"{file.stamp[:12]}, found {digest.hexdigest()[:12]})"
                )
                remedy = "run the same command again; if it stays so, do not trust that server"
                raise SourceReadError(where, problem, remedy)
            yield piece

    def local_path(self, name: str) -> Path | None:
        """Where the local cache has this file of this commit, if it has."""
        if name not in self._cached:
            file = self._files.get(name)
            known = None
            if file is not None:
                whole = replace(file, name=f"{self._prefix}{name}")
                known = cached_file(self._repo_id, self.revision, whole)
            self._cached[name] = known
        return self._cached[name]

    @contextmanager
    def _range(
        self, file: SourceFile, where: str, begin: int, end: int
    ) -> Iterator[Iterator[bytes]]:
        """One try at [begin, end): along the known route, or by asking the Hub for one."""
        known = self._routes.get(file.name)
        url = known.url if known else self._address(file.name)
        for step in range(MOST_REDIRECTS):
            headers = {**self._headers.of(url), **range_header(begin, end)}
            with answer(get_session(), url, headers, self._policy) as response:
                if response.status_code in REDIRECTS:
                    _require_listed(file, where, response.headers)
                    drain(response)
                    url = redirect_target(response, where)
                    continue
                is_hubs = known is None and step == 0
                if response.status_code not in (200, 206, 416):
                    self._raise(response, where, file.name, is_hubs, known is not None)
                etag = etag_of(response.headers)
                if is_hubs:
                    _require_listed(file, where, response.headers, etag)
                elif known and known.etag != etag:
                    raise changed(where, f"had etag {known.etag}, has {etag}")
                else:
                    self._routes[file.name] = _Route(url, etag)
                yield body(response, file, where, begin, end)
                return
        raise endless(where)

    def _raise(
        self, response: Any, where: str, name: str, is_hubs: bool, was_known: bool
    ) -> NoReturn:
        """Raise the error for an answer that is not part of a file."""
        if not is_hubs and "X-Error-Code" not in response.headers:
            # A signed address expires; the next try asks the Hub for a new one.
            self._routes.pop(name, None)
            said = f"{status_line(response)} from {response.url.host}"
            raise RetryableError(said, most=None if was_known else _FRESH_LINKS)
        error = hub_error(response)
        if isinstance(error, EntryNotFoundError):
            raise SourceReadError(where, "is no longer there", "check the repository") from error
        raise refused_read(error, where, self._repo_id, self.revision) from error

    def _address(self, name: str) -> str:
        path = f"{self._prefix}{name}"
        return hf_hub_url(self._repo_id, path, revision=self.revision, endpoint=self._endpoint)


def open_repository(repo_id: str, revision: str | None = None, folder: str = "") -> Source:
    """A model of the Hub, or a folder of its repository; with HF_HUB_OFFLINE=1 that of the cache.

    Raises what `HubSource` and `offline_snapshot` raise.
    """
    if constants.HF_HUB_OFFLINE:
        return LocalSource(offline_snapshot(repo_id, revision, folder))
    return HubSource(repo_id, revision, folder=folder)


def _listing(repo_id: str, revision: str | None, asked: str, policy: RetryPolicy) -> Listing:
    """What the Hub says about a revision. Raises RetryableError where another try may succeed."""
    try:
        return fetch_listing(repo_id, revision, asked, policy)
    except HFValidationError as error:
        raise UsageError(
            asked, "is not the name of a repository", "write it like org/name"
        ) from error
    except HfHubHTTPError as error:
        raise refused_read(error, asked, repo_id, revision) from error


def _require_listed(file: SourceFile, where: str, headers: Any, etag: str | None = None) -> None:
    """Raise SourceChangedError where the Hub now says another hash or size than it listed.

    etag: the answer's own, which is the hash where nothing is linked to.
    """
    found = etag_of(headers, "X-Linked-Etag") or etag
    if found is not None and found != file.stamp:
        raise changed(where, f"had hash {file.stamp[:12]} when it was listed, has {found[:12]}")
    size = whole_number(headers.get("X-Linked-Size"))
    if size is not None and size != file.nbytes:
        raise changed(where, f"had {file.nbytes:,} bytes when it was listed, has {size:,}")


def cached_file(repo_id: str, commit: str, file: SourceFile) -> Path | None:
    """A file of a commit in the local cache, where it is there and of the right size."""
    try:
        found = try_to_load_from_cache(repo_id, file.name, revision=commit)
    except ValueError:  # a name that Windows has no file for, and that huggingface_hub refuses
        return None
    if not isinstance(found, str):
        return None
    path = Path(found)
    return path if path.stat().st_size == file.nbytes else None


def offline_snapshot(repo_id: str, revision: str | None, inner: str = "") -> Path:
    """The newest complete snapshot of a model in the local cache that is of a revision.

    revision: a branch, a tag, a commit hash or its first digits; None means main's and, where
    that is not complete, any; inner: the folder in the repository that is the model, "" for all of
    it. Raises CheckpointError where there is none.
    """
    where = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
    incomplete = ""
    for folder in _candidates(repo_id, revision):
        missing = _missing(folder / inner) or (not inner and _unlisted(repo_id, folder))
        if not missing:
            return folder / inner
        incomplete = incomplete or f"; its snapshot {folder.name[:12]} lacks {missing}"
    raise CheckpointError(
        where,
        f"is not in the Hub's local cache, and HF_HUB_OFFLINE=1 forbids to fetch it{incomplete}",
        f"unset HF_HUB_OFFLINE, or run `hf download {repo_id}` where there is a network",
    )


def _candidates(repo_id: str, revision: str | None) -> Iterator[Path]:
    """The snapshots that may be of a revision, the most likely first."""
    store = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    snapshots = [path for path in _inside(store / "snapshots") if path.is_dir()]
    named = _ref(store, revision or constants.DEFAULT_REVISION)
    first = [path for path in snapshots if path.name == named]
    yield from first
    if revision is None:
        yield from (path for path in snapshots if path not in first)
    elif _COMMIT.fullmatch(revision):
        yield from (path for path in snapshots if path.name.startswith(revision))


def _inside(folder: Path) -> list[Path]:
    """The entries of a folder, the newest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _ref(store: Path, revision: str) -> str | None:
    """The commit of a branch or a tag when it was last fetched."""
    path = store / "refs" / revision
    if ".." in Path(revision).parts or not os.path.isfile(path):
        return None
    return path.read_text(encoding="utf-8").strip()


def _missing(snapshot: Path) -> str:
    """The first file that a checkpoint needs and that is missing, or ""."""
    index = snapshot / INDEX_NAME
    shards = [path.name for path in snapshot.glob("*.safetensors")]
    needed = ["config.json"]
    if index.is_file():
        try:
            needed += parse_index(read_limited(index, INDEX, IndexFileError), str(index)).shards
        except IndexFileError:
            return ""  # opening the model reports what is wrong with it
    elif not shards:
        needed.append("model.safetensors")
    elif (total := _OF_TOTAL.search(shards[0])) and len(shards) < int(total[1]):
        return f"{int(total[1]) - len(shards)} of {int(total[1])} shards"
    return next((name for name in needed if not (snapshot / name).is_file()), "")


def _unlisted(repo_id: str, snapshot: Path) -> str:
    """What huggingface_hub reports missing beside the weights; older versions report nothing."""
    try:
        snapshot_download(
            repo_id,
            revision=snapshot.name,
            local_files_only=True,
            ignore_patterns=list(_NOT_NEEDED),
        )
    except LocalEntryNotFoundError:
        return "files that its listing names"
    return ""
