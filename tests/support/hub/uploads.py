"""Upload: which files are LFS objects, where their bytes go, and the commit that names them.

An object goes to storage in one piece or in parts, by signed links; it is kept only if its bytes
have the hash that was announced. What the repository already has is not asked for again. A commit
may name only what has arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.hub.access import require_write_access
from tests.support.hub.contents import (
    SAMPLE_NBYTES,
    Blob,
    Repository,
    belongs_in_lfs,
    content_sha256,
    lfs_blob,
    regular_blob,
)
from tests.support.hub.refusals import Refusal, bad_request, entry_not_found
from tests.support.hub.store import Store, segment

LFS = "/{owner}/{name}.git/info/lfs/objects"
API = "/api/models/{owner}/{name}"


class UploadRoutes:
    """Everything that takes the content of files."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.routes = [
            Route(f"{API}/preupload/{{revision}}", self.preupload, methods=["POST"]),
            Route(f"{LFS}/batch", self.batch, methods=["POST"]),
            Route(f"{LFS}/verify", self.verify, methods=["POST"]),
            Route(f"{LFS}/complete/{{sha256}}/{{upload}}", self.complete, methods=["POST"]),
            Route("/upload/{owner}/{name}/{sha256}", self.whole, methods=["PUT"]),
            Route(
                "/upload/{owner}/{name}/{sha256}/{upload}/{part:int}", self.part, methods=["PUT"]
            ),
            Route(f"{API}/commit/{{revision}}", self.commit, methods=["POST"]),
        ]
        # Multipart uploads under way: their number to the file that they are put together in, and
        # the etags of the parts that it has.
        self._assembly: dict[str, tuple[Path, dict[int, str]]] = {}

    async def preupload(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        as_pull = bool(request.query_params.get("create_pr"))
        require_write_access(account, repository, as_pull=as_pull)
        commit = repository.resolve(segment(request, "revision"))
        attributes = commit.tree.get(".gitattributes")
        files = []
        for file in (await request.json())["files"]:
            sample = base64.b64decode(file.get("sample", ""))[:SAMPLE_NBYTES]
            large = belongs_in_lfs(
                file["path"], file["size"], sample, attributes.read() if attributes else None
            )
            present = commit.tree.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": present.etag if present else None,
                }
            )
        return JSONResponse({"files": files, "commitOid": commit.id})

    async def batch(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        body = await request.json()
        # A pull request may be opened without the right to write; its objects carry no ref.
        require_write_access(account, repository, as_pull="ref" not in body)
        objects = [
            self._instructions(repository, one["oid"], one["size"]) for one in body["objects"]
        ]
        large = any(one["size"] > self.store.multipart_above for one in body["objects"])
        transfer = "multipart" if large else "basic"
        return JSONResponse({"transfer": transfer, "objects": objects})

    def _instructions(self, repository: Repository, sha256: str, size: int) -> dict[str, object]:
        known: dict[str, object] = {"oid": sha256, "size": size}
        if sha256 in repository.objects:
            return known
        sign, place = self.store.sign, f"/upload/{repository.id}/{sha256}"
        verify = {"href": f"{self.store.hub_url}/{repository.id}.git/info/lfs/objects/verify"}
        if size <= self.store.multipart_above:
            upload: dict[str, object] = {"href": sign(self.store.cdn_url, place)}
        else:
            length = self.store.part_nbytes
            path = self.store.incoming()
            self._assembly[path.name] = (path, {})
            place = f"{place}/{path.name}"
            parts = range(1, -(-size // length) + 1)
            links = {f"{part:05d}": sign(self.store.cdn_url, f"{place}/{part}") for part in parts}
            done = f"/{repository.id}.git/info/lfs/objects/complete/{sha256}/{path.name}"
            upload = {
                "href": sign(self.store.hub_url, done),
                "header": {"chunk_size": str(length), **links},
            }
        return {**known, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    async def whole(self, request: Request) -> Response:
        self.store.check_link(request)
        path = self.store.incoming()
        sha256 = await _receive(request, path, 0, hashlib.sha256())
        self._keep(request, path, sha256)
        return Response(status_code=200)

    async def part(self, request: Request) -> Response:
        self.store.check_link(request)
        part = request.path_params["part"]
        path, etags = self._assembly_of(request)
        begin = (part - 1) * self.store.part_nbytes
        etags[part] = f'"{await _receive(request, path, begin, hashlib.md5())}"'
        return Response(status_code=200, headers={"ETag": etags[part]})

    async def complete(self, request: Request) -> Response:
        self.store.check_link(request)
        path, etags = self._assembly_of(request)
        told = {one["partNumber"]: one["etag"] for one in (await request.json())["parts"]}
        if not told or told != etags:
            raise bad_request("One or more of the specified parts could not be found.")
        self._keep(request, path, await run_in_threadpool(content_sha256, path))
        del self._assembly[path.name]
        return JSONResponse({})

    def _assembly_of(self, request: Request) -> tuple[Path, dict[int, str]]:
        upload = segment(request, "upload")
        if upload not in self._assembly:
            raise Refusal(404, None, "The specified upload does not exist.")
        return self._assembly[upload]

    def _keep(self, request: Request, path: Path, sha256: str) -> None:
        told = segment(request, "sha256")
        if sha256 != told:
            path.unlink()
            raise bad_request(f"The bytes have the hash {sha256}, announced was {told}")
        repository = self.store.repositories[
            f"{segment(request, 'owner')}/{segment(request, 'name')}"
        ]
        size = path.stat().st_size
        path.replace(self.store.kept(sha256))
        repository.objects[sha256] = lfs_blob(self.store.kept(sha256), size, sha256)
        self.store.uploads[sha256] += 1

    async def verify(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        body = await request.json()
        blob = repository.objects.get(body["oid"])
        if blob is None or blob.size != body["size"]:
            raise entry_not_found(body["oid"])
        return JSONResponse({})

    async def commit(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        as_pull = bool(request.query_params.get("create_pr"))
        require_write_access(account, repository, as_pull=as_pull)
        assert account is not None
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines.pop(0)["value"]
        revision = segment(request, "revision")
        with repository.lock:
            tree = dict(repository.resolve(revision).tree)
            for line in lines:
                CHANGES[line["key"]](repository, tree, line["value"])
            made = repository.commit(
                revision,
                tree,
                header["summary"],
                description=header.get("description", ""),
                author=account.name,
                parent=header.get("parentCommit"),
                as_pull=as_pull,
            )
        base = f"{self.store.hub_url}/{repository.id}"
        answer = {"success": True, "commitOid": made.id, "commitUrl": f"{base}/commit/{made.id}"}
        answer["hookOutput"] = ""
        if as_pull:
            answer["pullRequestUrl"] = f"{base}/discussions/{len(repository.pulls)}"
        return JSONResponse(answer)


async def _receive(request: Request, path: Path, begin: int, digest: hashlib._Hash) -> str:
    """Write the body at its place in the file; returns its hash. A torn upload raises."""
    path.touch()
    with path.open("r+b") as file:
        file.seek(begin)
        try:
            async for piece in request.stream():
                file.write(piece)
                digest.update(piece)
        except ClientDisconnect:
            raise bad_request("The connection was closed before the body was complete") from None
    return digest.hexdigest()


def _add_regular(repository: Repository, tree: dict[str, Blob], value: dict[str, str]) -> None:
    tree[value["path"]] = regular_blob(base64.b64decode(value["content"]))


def _add_lfs(repository: Repository, tree: dict[str, Blob], value: dict[str, str]) -> None:
    blob = repository.objects.get(value["oid"])
    if blob is None:
        raise bad_request(
            "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        )
    tree[value["path"]] = blob


def _delete_file(repository: Repository, tree: dict[str, Blob], value: dict[str, str]) -> None:
    if tree.pop(value["path"], None) is None:
        raise entry_not_found(f"A file with this name doesn't exist: {value['path']}")


def _delete_folder(repository: Repository, tree: dict[str, Blob], value: dict[str, str]) -> None:
    inside = [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise entry_not_found(f"A folder with this name doesn't exist: {value['path']}")
    for path in inside:
        del tree[path]


CHANGES = {
    "file": _add_regular,
    "lfsFile": _add_lfs,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}
