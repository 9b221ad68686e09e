"""A model on the Hugging Face Hub, read by byte ranges and pinned to one commit.

huggingface_hub gives the address, the login, the session and the local cache; asked is by plain
ranges. Its other way, hf_xet, can stream a range as well, but what travels there are whole
compressed blocks whose sizes it does not tell, so that a promise about bytes downloaded could be
neither kept nor checked; and it retries by its own rules. Plain ranges work with every endpoint.

A large file's address on the Hub leads, by a redirect that says size and hash, to a signed one
elsewhere. That one is asked for every range from then on, until it expires: one question to the
Hub per file, not per range. The login never goes to another host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from shardsurgeon.errors import CheckpointError, SourceReadError, UsageError
from shardsurgeon.storage.base import SourceFile, is_left_behind, leads_out
from shardsurgeon.storage.httpranges import (
    HTTP_ERROR,
    MOST_REDIRECTS,
    REDIRECTS,
    answer,
    body,
    changed,
    drain,
    etag_of,
    raise_if_passing,
    range_header,
    said,
    status_line,
)
from shardsurgeon.storage.hub.hubcache import cached_file
from shardsurgeon.storage.hub.hubrefusals import refusal, require_sound_settings
from shardsurgeon.storage.local import pieces_of
from shardsurgeon.storage.retrying import Interrupted, Patience, attempt, read_pieces, stream_pieces

# Whoever is redirected from one of these to another is still known there.
_HUBS = ("https://huggingface.co", "https://hf.co")
_AGENT = "shardsurgeon"
_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the Hub says that a file's bytes are, and what that place calls them."""

    url: str
    etag: str | None


class HubSource:
    """The files of one commit of a model repository. Safe to use from several threads."""

    def __init__(
        self, repo_id: str, revision: str | None = None, patience: Patience = _PATIENCE
    ) -> None:
        """Ask the Hub which commit a revision is, and what is in it.

        repo_id: `org/name`; revision: a branch, a tag or a commit hash, None for main.
        Raises CheckpointError or UsageError, with what to do, where the Hub says no, and
        NetworkError where it does not answer.
        """
        require_sound_settings()
        self._repo_id = repo_id
        self._patience = patience
        self._endpoint = constants.ENDPOINT
        asked = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
        info = attempt(partial(_info, repo_id, revision, asked), asked, patience.brief())
        self._commit = info.sha or "of no commit"
        self._files = _listing(info, self.location)
        self._headers = build_hf_headers(user_agent=_AGENT)
        self._trusted = {_origin(address) for address in (self._endpoint, *_HUBS)}
        # File → where its bytes are. Written by several threads: each entry is as good as another.
        self._routes: dict[str, _Route] = {}
        self._cached: dict[str, Path | None] = {}

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self._repo_id.rpartition("/")[2]

    @property
    def location(self) -> str:
        """`hf://org/name@` and the begin of the commit's hash."""
        return f"hf://{self._repo_id}@{self._commit[:12]}"

    @property
    def revision(self) -> str:
        """The hash of the commit that everything is read from."""
        return self._commit

    @property
    def is_remote(self) -> bool:
        """True, though single files may have a local path."""
        return True

    def list(self) -> tuple[SourceFile, ...]:
        """Every file of the commit, sorted by name; the stamp is its sha256 or its blob id."""
        return tuple(self._files.values())

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file. Raises what `stream` raises."""
        return read_pieces(self.stream(name, begin, end), end - begin)

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file: from the local cache, or by one request.

        Raises SourceReadError, SourceChangedError or NetworkError, and CheckpointError where
        the Hub no longer lets this login read it.
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
            return pieces_of(path, begin, end)

        def request(at: int) -> Any:
            return self._range(file, where, at, end)

        return stream_pieces(request, where, begin, end, self._patience)

    def local_path(self, name: str) -> Path | None:
        """Where the local cache has this file of this commit, if it has."""
        if name not in self._cached:
            file = self._files.get(name)
            known = None if file is None else cached_file(self._repo_id, self._commit, file)
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
            headers = {**self._known_to(url), **range_header(begin, end)}
            with answer(get_session(), url, headers) as response:
                if response.status_code in REDIRECTS:
                    _require_listed(file, where, response.headers)
                    drain(response)
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                is_hubs = known is None and step == 0
                if response.status_code not in (200, 206, 416):
                    self._raise(response, where, file.name, is_hubs)
                etag = etag_of(response.headers)
                if is_hubs:
                    _require_listed(file, where, response.headers, etag)
                elif known and known.etag != etag:
                    raise changed(where, f"had etag {known.etag}, has {etag}")
                else:
                    self._routes[file.name] = _Route(url, etag)
                yield body(response, file, where, begin, end)
                return
        raise SourceReadError(where, f"leads to more than {MOST_REDIRECTS} other addresses")

    def _raise(self, response: Any, where: str, name: str, is_hubs: bool) -> None:
        """Raise what an answer that is no part of a file means."""
        if not is_hubs and "X-Error-Code" not in response.headers:
            # A signed address expires; the next try asks the Hub for a new one.
            self._routes.pop(name, None)
            raise Interrupted(f"{status_line(response)} from {response.url.host}")
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError as error:
            raise SourceReadError(where, "is no longer there", "check the repository") from error
        except HfHubHTTPError as error:
            raise refusal(error, where, self._repo_id, self._commit) from error
        raise SourceReadError(where, f"cannot be read ({status_line(response)})")

    def _address(self, name: str) -> str:
        return hf_hub_url(self._repo_id, name, revision=self._commit, endpoint=self._endpoint)

    def _known_to(self, url: str) -> dict[str, str]:
        """The headers for an address: the login is for the Hub only."""
        if _origin(url) in self._trusted:
            return dict(self._headers)
        return {key: self._headers[key] for key in self._headers if key != "authorization"}


def _info(repo_id: str, revision: str | None, asked: str) -> ModelInfo:
    """What the Hub says about a revision. Raises Interrupted where another try may help."""
    try:
        timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        api = HfApi(user_agent=_AGENT)
        return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    except HFValidationError as error:
        raise UsageError(asked, "is no name of a repository", "write it like org/name") from error
    except HfHubHTTPError as error:
        raise_if_passing(error.response)
        raise refusal(error, asked, repo_id, revision) from error
    except HTTP_ERROR as error:
        raise Interrupted(f"{constants.ENDPOINT}: {said(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{constants.ENDPOINT} does not answer as a Hub does"
        raise CheckpointError(asked, problem, "check HF_ENDPOINT") from error


def _listing(info: ModelInfo, location: str) -> dict[str, SourceFile]:
    """The files of a commit by name, sorted. Raises CheckpointError for names that lead out."""
    files: dict[str, SourceFile] = {}
    for found in sorted(info.siblings or (), key=lambda sibling: sibling.rfilename):
        name, nbytes = found.rfilename, found.size
        stamp = found.lfs.sha256 if found.lfs else found.blob_id
        if leads_out(name):
            raise CheckpointError(location, f"file name {name!r} leads out of the repository")
        if nbytes is None or stamp is None:
            problem = f"the Hub does not say the size and the hash of {name}"
            raise CheckpointError(location, problem, "check HF_ENDPOINT")
        if not is_left_behind(name):
            files[name] = SourceFile(name, nbytes, stamp)
    return files


def _require_listed(file: SourceFile, where: str, headers: Any, etag: str | None = None) -> None:
    """Raise SourceChangedError where the Hub now says another hash or size than it listed.

    etag: the answer's own, which is the hash where nothing is linked to.
    """
    found = etag_of(headers, "X-Linked-Etag") or etag
    if found is not None and found != file.stamp:
        raise changed(where, f"had hash {file.stamp[:12]} when it was listed, has {found[:12]}")
    size = headers.get("X-Linked-Size", "")
    if size.isdigit() and int(size) != file.nbytes:
        raise changed(where, f"had {file.nbytes:,} bytes when it was listed, has {int(size):,}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
