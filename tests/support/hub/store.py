"""The state of the Hub: accounts, repositories, uploads. It outlives a restart of the server."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from urllib.parse import quote, unquote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.support.hub.access import Account, require_sight
from tests.support.hub.contents import GITATTRIBUTES, Repository, regular_blob
from tests.support.hub.refusals import Refusal, wrong_token


class Store:
    """Everything that the routes share. `folder` takes the uploaded objects."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, Account] = {}
        # How often each LFS object arrived in full.
        self.uploads: Counter[str] = Counter()
        self.hub_url = ""
        self.cdn_url = ""
        # Larger objects are uploaded in parts of part_nbytes.
        self.multipart_above = 64 << 20
        self.part_nbytes = 16 << 20
        self.page_length = 1000
        self._serial = itertools.count()
        self._key = 0

    def account(self, request: Request) -> Account | None:
        """Who sent the request; None without a token. Refuses a token that it does not know."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        account = self.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise wrong_token()
        return account

    def sight(self, request: Request) -> tuple[Account | None, Repository]:
        """The asker and the repository of the path; refuses one that is hidden or missing."""
        account = self.account(request)
        id = f"{segment(request, 'owner')}/{segment(request, 'name')}"
        return account, require_sight(account, self.repository(id))

    def repository(self, id: str) -> Repository | None:
        """The repository of that name, in whatever case it is written."""
        named = {known.casefold(): each for known, each in self.repositories.items()}
        return self.repositories.get(id) or named.get(id.casefold())

    def create(self, id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A new repository without a commit."""
        repository = self.repositories[id] = Repository(id, private=private, gated=gated)
        return repository

    def create_initialised(self, id: str, *, private: bool = False) -> Repository:
        """A new repository as users get it: with a .gitattributes."""
        repository = self.create(id, private=private)
        repository.commit("main", {".gitattributes": regular_blob(GITATTRIBUTES)}, "initial commit")
        return repository

    def incoming(self) -> Path:
        """A path for an upload that has just begun."""
        folder = self.folder / "incoming"
        folder.mkdir(exist_ok=True)
        return folder / str(next(self._serial))

    def kept(self, sha256: str) -> Path:
        """The path for an object that has arrived in full."""
        folder = self.folder / "objects"
        folder.mkdir(exist_ok=True)
        return folder / sha256

    def sign(self, base: str, path: str) -> str:
        """A link that needs no token."""
        return f"{base}{quote(path)}?{urlencode({'Expires': '4102444800', **self._seal(path)})}"

    def expire_links(self) -> None:
        """Refuse all links signed until now, as storage does when they are an hour old."""
        self._key += 1

    def check_link(self, request: Request) -> None:
        """Refuse what storage refuses: a wrong or expired signature, a second authentication."""
        if "authorization" in request.headers:
            raise Refusal(400, None, "Only one auth mechanism allowed")
        if request.query_params.get("Signature") != self._seal(path_of(request))["Signature"]:
            raise Refusal(403, None, "Request has expired")

    def _seal(self, path: str) -> dict[str, str]:
        return {"Signature": hashlib.sha256(f"{self._key}{path}".encode()).hexdigest()}


def segment(request: Request, name: str) -> str:
    """A part of the path, decoded; a slash in it may have been sent as %2F."""
    return unquote(request.path_params[name])


def path_of(request: Request) -> str:
    """The whole path, decoded."""
    return unquote(request.scope["path"])


async def answer_refusal(request: Request, error: Exception) -> Response:
    """A refusal as the Hub sends it: the reason in headers and, where there may be one, a body."""
    assert isinstance(error, Refusal)
    headers = {**error.headers, "X-Error-Message": error.message}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, error.status, headers)
