"""Download: resolve, which redirects, and the two places that it redirects to.

As on the Hub, the metadata of an LFS object stands on the redirect and nowhere else; storage, on
another host, has an ETag of its own and takes no token. A regular file is served by the same host
under another path, compressed where the client allows it, and then whole.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.support.hub.access import require_files
from tests.support.hub.contents import Blob
from tests.support.hub.refusals import Refusal, entry_not_found
from tests.support.hub.store import Store, segment

RANGE = re.compile(r"bytes=(\d*)-(\d*)")
COMPRESSED = (".json", ".txt", ".md", ".py", ".jinja")


class FileRoutes:
    """Everything that sends the content of files."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.routes = [
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            Route(
                "/api/resolve-cache/models/{owner}/{name}/{commit}/{path:path}", self.regular_file
            ),
            Route("/cdn/{owner}/{name}/{sha256}/{path:path}", self.lfs_object),
        ]

    async def resolve(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        path = segment(request, "path")
        commit, blob = repository.file(segment(request, "revision"), path)
        require_files(account, repository)
        headers = {
            "X-Repo-Commit": commit.id,
            "X-Linked-Etag": f'"{blob.etag}"',
            "X-Linked-Size": str(blob.size),
            "Accept-Ranges": "bytes",
        }
        if blob.sha256 is not None:
            place = f"/cdn/{repository.id}/{blob.sha256}/{path}"
            headers["Location"] = self.store.sign(self.store.cdn_url, place)
            return Response("", 302, headers)
        place = f"/api/resolve-cache/models/{repository.id}/{commit.id}/{path}"
        headers["Location"] = quote(place) + "?etag=" + quote(headers["X-Linked-Etag"])
        return Response("", 307, headers)

    async def regular_file(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        path = segment(request, "path")
        commit, blob = repository.file(segment(request, "commit"), path)
        require_files(account, repository)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.etag}"'}
        squeezed = "gzip" in request.headers.get("accept-encoding", "")
        if path.endswith(COMPRESSED) and squeezed and request.method == "GET":
            headers |= {"ETag": f'W/"{blob.etag}"', "Content-Encoding": "gzip"}
            return StreamingResponse(iter([gzip.compress(blob.read())]), 200, headers)
        return ranged(request, blob, headers)

    async def lfs_object(self, request: Request) -> Response:
        self.store.check_link(request)
        id = f"{segment(request, 'owner')}/{segment(request, 'name')}"
        repository = self.store.repositories.get(id)
        blob = repository.objects.get(segment(request, "sha256")) if repository else None
        if blob is None:
            raise entry_not_found(segment(request, "path"))
        return ranged(request, blob, {"ETag": f'"{storage_etag(blob)}"'})


def storage_etag(blob: Blob) -> str:
    """Looks like a sha256, is another: that of storage's own."""
    return hashlib.sha256(blob.etag.encode()).hexdigest()


def ranged(request: Request, blob: Blob, headers: dict[str, str]) -> Response:
    """The blob or the range of it that is asked for."""
    begin, end = asked_range(request.headers.get("range"), blob.size)
    headers |= {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"}
    partial = "range" in request.headers and (begin, end) != (0, 0)
    if partial:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{blob.size}"
    pieces: Iterator[bytes] = iter(()) if request.method == "HEAD" else blob.pieces(begin, end)
    media = "application/octet-stream"
    return StreamingResponse(pieces, 206 if partial else 200, headers, media_type=media)


def asked_range(header: str | None, size: int) -> tuple[int, int]:
    """[begin, end) of a Range header. Several ranges, or none: everything."""
    match = RANGE.fullmatch(header or "")
    if match is None or match[0] == "bytes=-":
        return 0, size
    first, last = match[1], match[2]
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= size or begin >= end:
        raise Refusal(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{size}"})
    return begin, end
