"""What the Hub says is in a commit: asked for by one request, and believed in nothing.

The answer is read up to a limit, and each field is looked at before it is used: an endpoint may be
a mirror, a proxy that wants a login, or hostile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from shardsurgeon.errors import CheckpointError, keep_secret, redacted
from shardsurgeon.storage.connections import origin, status_line
from shardsurgeon.storage.formats.strict_json import is_text, is_whole_number, read_object
from shardsurgeon.storage.http import followed, text_of
from shardsurgeon.storage.limits import LISTING
from shardsurgeon.storage.retry import RetryPolicy
from shardsurgeon.storage.source import leads_out

# The Hub's own hosts: a redirect from one to another keeps the login.
_HUBS = ("https://huggingface.co", "https://hf.co")
_AGENT = "shardsurgeon"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECK = "check HF_ENDPOINT"
_MOST_NBYTES = 1 << 62
# What huggingface_hub makes an error of; the rest of an answer's head it does not need.
_ERROR_HEADERS = ("Content-Type", "X-Error-Code", "X-Error-Message", "X-Request-Id")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a commit. nbytes: its size in bytes; digest (hex): where it is a large one, the
    SHA-256 of its content, else git's SHA-1 of it.
    """

    nbytes: int
    digest: str
    is_large: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """A commit, None where the endpoint names none, and its files by name, sorted."""

    commit: str | None
    files: Mapping[str, ListedFile]


class HubHeaders:
    """The headers of requests to the Hub, as they are now; the login is for its hosts only."""

    def __init__(self) -> None:
        keep_secret(get_token())
        self._headers = build_hf_headers(user_agent=_AGENT)
        self._trusted = {origin(address) for address in (constants.ENDPOINT, *_HUBS)}

    def of(self, url: str) -> dict[str, str]:
        """The headers for an address."""
        if origin(url) in self._trusted:
            return dict(self._headers)
        return {key: self._headers[key] for key in self._headers if key != "authorization"}


def fetch_listing(repo_id: str, revision: str | None, where: str, policy: RetryPolicy) -> Listing:
    """What the Hub says about a revision; None means main.

    where: what messages call the repository. Raises HFValidationError for what is no repository
    id, HfHubHTTPError where the Hub refuses, RetryableError where another try may succeed,
    CheckpointError where the answer is not a listing, and NetworkError where it has no end.
    """
    validate_repo_id(repo_id)
    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    url += f"/revision/{quote(revision, safe='')}" if revision else ""
    headers: Callable[[str], dict[str, str]] = HubHeaders().of
    with followed(get_session(), f"{url}?blobs=true", headers, where, policy) as response:
        return listing_of(response, where)


def listing_of(response: Any, where: str) -> Listing:
    """The listing that an answer holds, or raises: see `fetch_listing`."""
    if response.status_code != 200:
        raise hub_error(response)
    raw = text_of(response, urlsplit(constants.ENDPOINT).hostname or where)
    return parse_listing(raw, where)


def hub_error(response: Any) -> HfHubHTTPError:
    """What huggingface_hub makes of an answer that refuses, whatever its body holds.

    Of the body 64 KiB are read at most.
    """
    try:
        text = b"".join(response.iter_raw())
    except RuntimeError:  # read, or closed
        text = b""
    said = {name: response.headers.get(name, "").encode() for name in _ERROR_HEADERS}
    headers = {name.encode(): value for name, value in said.items() if value}
    for content in (text, b"{}"):
        answer = type(response)(
            response.status_code, headers=headers, content=content, request=response.request
        )
        try:
            hf_raise_for_status(answer)
        except HfHubHTTPError as error:
            return error
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            continue  # it takes any JSON for an object of texts
    return HfHubHTTPError(status_line(response), response=answer)


def parse_listing(raw: bytes, where: str) -> Listing:
    """The listing in an answer. Raises CheckpointError, with what is wrong."""
    problem = f"{constants.ENDPOINT} does not answer as a Hub does: its listing"
    found = read_object(raw, where, problem, CheckpointError, _CHECK, LISTING)
    commit, siblings = found.get("sha"), found.get("siblings")
    if commit is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        _refuse(where, "names no commit")
    if siblings is not None and not isinstance(siblings, list):
        _refuse(where, "has no list of files")
    files: dict[str, ListedFile] = {}
    for sibling in siblings or ():
        name = _name(sibling, where)
        if name in files:
            _refuse(where, f"has {name!r} twice")
        files[name] = _file(sibling, name, where)
    return Listing(commit, {name: files[name] for name in sorted(files)})


def _name(sibling: object, where: str) -> str:
    name = sibling.get("rfilename") if isinstance(sibling, dict) else None
    if not isinstance(name, str) or not is_text(name) or len(name) > 4096:
        _refuse(where, "has a file without a name")
    if leads_out(name):
        raise CheckpointError(where, f"file name {name!r} leads out of the repository")
    if redacted(name) != name:
        _refuse(where, "has a file name with a token in it")
    return name


def _file(sibling: dict[str, Any], name: str, where: str) -> ListedFile:
    nbytes, lfs = sibling.get("size"), sibling.get("lfs")
    if lfs is None:
        digest, form = sibling.get("blobId"), _SHA1
    else:
        digest, form = lfs.get("sha256") if isinstance(lfs, dict) else None, _SHA256
    is_digest = isinstance(digest, str) and form.fullmatch(digest)
    if not is_digest or not is_whole_number(nbytes) or nbytes > _MOST_NBYTES:
        _refuse(where, f"does not say the size and the hash of {name}")
    return ListedFile(nbytes, str(digest), lfs is not None)


def _refuse(where: str, problem: str) -> NoReturn:
    said = f"{constants.ENDPOINT} does not answer as a Hub does: its listing {problem}"
    raise CheckpointError(where, said, _CHECK)
