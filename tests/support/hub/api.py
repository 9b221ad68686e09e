"""What the Hub tells about accounts and repositories, and how repositories come and go."""

from __future__ import annotations

import hashlib
from urllib.parse import parse_qs, urlencode

import yaml  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.hub import refusals
from tests.support.hub.access import (
    require_files,
    require_login,
    require_namespace,
    require_write_access,
)
from tests.support.hub.contents import Blob, Commit, Repository, lfs_pointer
from tests.support.hub.store import Store, segment

API = "/api/models/{owner}/{name}"
EXPANDED_PAGE_LENGTH = 50


class ApiRoutes:
    """The JSON part of the Hub, uploads left out."""

    def __init__(self, store: Store) -> None:
        self.store = store
        tree = f"{API}/tree/{{revision}}"
        self.routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/agent-harnesses", self.agent_harnesses),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/repos/delete", self.delete, methods=["DELETE"]),
            Route(f"{API}/settings", self.change_settings, methods=["PUT"]),
            Route(f"{API}/auth-check", self.auth_check),
            Route(f"{API}/revision/{{revision}}", self.info),
            Route(tree, self.tree),
            Route(f"{tree}/{{path:path}}", self.tree),
            Route(f"{API}/paths-info/{{revision}}", self.paths_info, methods=["POST"]),
            Route(f"{API}/refs", self.refs),
            Route(f"{API}/commits/{{revision}}", self.commits),
            Route(f"{API}/branch/{{branch}}", self.create_branch, methods=["POST"]),
            Route(f"{API}/branch/{{branch}}", self.delete_branch, methods=["DELETE"]),
            Route(f"{API}/tag/{{revision}}", self.create_tag, methods=["POST"]),
            Route(f"{API}/tag/{{revision}}", self.delete_tag, methods=["DELETE"]),
            Route(API, self.info),
        ]

    async def whoami(self, request: Request) -> Response:
        account = require_login(self.store.account(request))
        role = "write" if account.may_write else "read"
        orgs = [
            {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": "write"}
            for name in account.organizations
        ]
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        user = {"type": "user", "id": account.name, "name": account.name, "fullname": account.name}
        return JSONResponse({**user, "email": None, "isPro": False, "orgs": orgs, "auth": token})

    async def validate_yaml(self, request: Request) -> Response:
        content = (await request.json())["content"]
        try:
            card = card_data(content)
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        empty = {"message": "empty or missing yaml metadata in repo card"}
        return JSONResponse({"errors": [], "warnings": [] if card else [empty]})

    async def agent_harnesses(self, request: Request) -> Response:
        return JSONResponse({"standardEnvVars": [], "harnesses": {}})

    async def create(self, request: Request) -> Response:
        body = await request.json()
        account = require_login(self.store.account(request))
        owner = body.get("organization") or account.name
        require_namespace(account, owner)
        id = f"{owner}/{body['name']}"
        # huggingface_hub 1.x says private, 2.x visibility.
        private = bool(body.get("private")) or body.get("visibility") == "private"
        url = {"url": f"{self.store.hub_url}/{id}", "name": id}
        if self.store.repository(id) is not None:
            message = "You already created this model repo"
            return JSONResponse({"error": message, **url}, 409, {"X-Error-Message": message})
        self.store.create_initialised(id, private=private)
        return JSONResponse(url)

    async def delete(self, request: Request) -> Response:
        body = await request.json()
        account = require_login(self.store.account(request))
        owner = body.get("organization") or account.name
        require_namespace(account, owner)
        if self.store.repositories.pop(f"{owner}/{body['name']}", None) is None:
            raise refusals.repository_not_found(logged_in=True)
        return JSONResponse({})

    async def change_settings(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        require_write_access(account, repository)
        body = await request.json()
        if "private" in body or "visibility" in body:
            repository.private = bool(body.get("private")) or body.get("visibility") == "private"
        repository.gated = bool(body.get("gated", repository.gated))
        return JSONResponse({"private": repository.private, "gated": repository.gated})

    async def auth_check(self, request: Request) -> Response:
        require_files(*self.store.sight(request))
        return JSONResponse({})

    async def info(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        named = "revision" in request.path_params
        commit = repository.resolve(segment(request, "revision") if named else "main")
        facts = model_facts(repository, commit, blobs=_is_true(request, "blobs"))
        expand = request.query_params.getlist("expand")
        if expand:
            facts = {key: facts[key] for key in ("_id", "id", *expand) if key in facts}
        return JSONResponse(facts, headers={"X-Repo-Commit": commit.id})

    async def tree(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        commit = repository.resolve(segment(request, "revision"))
        folder = segment(request, "path") if "path" in request.path_params else ""
        expand = _is_true(request, "expand")
        entries = list_entries(commit, folder, recursive=_is_true(request, "recursive"))
        if folder and not entries:
            raise refusals.entry_not_found(folder, commit.id)
        length = EXPANDED_PAGE_LENGTH if expand else self.store.page_length
        begin = int(request.query_params.get("cursor", 0))
        page = [
            describe(commit, path, blob, expand=expand)
            for path, blob in entries[begin : begin + length]
        ]
        headers = {"X-Repo-Commit": commit.id}
        if begin + length < len(entries):
            query = {**request.query_params, "cursor": str(begin + length)}
            place = f"{self.store.hub_url}{request.scope['path']}?{urlencode(query)}"
            headers["Link"] = f'<{place}>; rel="next"'
        return JSONResponse(page, headers=headers)

    async def paths_info(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        commit = repository.resolve(segment(request, "revision"))
        form = parse_qs((await request.body()).decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        found = dict(list_entries(commit, "", recursive=True))
        wanted = [path for path in form.get("paths", []) if path in found]
        return JSONResponse([describe(commit, path, found[path], expand=expand) for path in wanted])

    async def refs(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        answer = {
            "branches": _named_refs("refs/heads/", repository.branches),
            "tags": _named_refs("refs/tags/", repository.tags),
            "converts": [],
        }
        if _is_true(request, "include_prs"):
            pulls = {str(number): commit for number, commit in repository.pulls.items()}
            answer["pullRequests"] = _named_refs("refs/pr/", pulls)
        return JSONResponse(answer)

    async def commits(self, request: Request) -> Response:
        _, repository = self.store.sight(request)
        return JSONResponse(
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": commit.date,
                }
                for commit in repository.log(segment(request, "revision"))
            ]
        )

    async def create_branch(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        require_write_access(account, repository)
        branch = segment(request, "branch")
        if branch.startswith("refs/"):
            raise refusals.bad_request("Invalid reference for a branch")
        if branch in repository.branches:
            raise refusals.conflict("Reference already exists")
        start = repository.resolve((await request.json()).get("startingPoint", "main"))
        repository.branches[branch] = start.id
        return JSONResponse({}, 201)

    async def delete_branch(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        require_write_access(account, repository)
        branch = segment(request, "branch")
        if branch == "main":
            raise refusals.forbidden("Cannot delete the main branch")
        if repository.branches.pop(branch, None) is None:
            raise refusals.revision_not_found(branch)
        return JSONResponse({})

    async def create_tag(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        require_write_access(account, repository)
        tag = (await request.json())["tag"]
        if tag in repository.tags:
            raise refusals.conflict("Tag reference exists already")
        repository.tags[tag] = repository.resolve(segment(request, "revision")).id
        return JSONResponse({}, 201)

    async def delete_tag(self, request: Request) -> Response:
        account, repository = self.store.sight(request)
        require_write_access(account, repository)
        if repository.tags.pop(segment(request, "revision"), None) is None:
            raise refusals.revision_not_found(segment(request, "revision"))
        return JSONResponse({})


def card_data(readme: str) -> dict[str, object]:
    """The YAML block at the top of a model card; empty where there is none."""
    parts = readme.split("---\n", 2)
    if not readme.startswith("---\n") or len(parts) < 3:
        return {}
    data = yaml.safe_load(parts[1])
    return data if isinstance(data, dict) else {}


def model_facts(repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, object]:
    """The answer of model_info."""
    readme = commit.tree.get("README.md")
    card = card_data(readme.read().decode()) if readme else {}
    return {
        "_id": hashlib.sha1(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.split("/")[0],
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": repository.commits[next(iter(repository.commits))].date,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card,
        "usedStorage": sum(blob.size for blob in repository.objects.values()),
        "siblings": [
            {"rfilename": path, **(_sibling(blob) if blobs else {})}
            for path, blob in commit.tree.items()
        ],
    }


def _sibling(blob: Blob) -> dict[str, object]:
    facts: dict[str, object] = {"blobId": blob.git_id, "size": blob.size}
    if blob.sha256 is not None:
        length = len(lfs_pointer(blob.sha256, blob.size))
        facts["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": length}
    return facts


def list_entries(commit: Commit, folder: str, *, recursive: bool) -> list[tuple[str, Blob | None]]:
    """Files, and folders as None, below a folder; only its own ones unless recursive."""
    prefix = folder.rstrip("/") + "/" if folder else ""
    found: dict[str, Blob | None] = {}
    for path, blob in commit.tree.items():
        if not path.startswith(prefix):
            continue
        steps = path[len(prefix) :].split("/")
        for depth in range(1, len(steps)):
            if recursive or depth == 1:
                found[prefix + "/".join(steps[:depth])] = None
        if recursive or len(steps) == 1:
            found[path] = blob
    return sorted(found.items())


def describe(commit: Commit, path: str, blob: Blob | None, *, expand: bool) -> dict[str, object]:
    """An entry of a tree as the Hub spells it."""
    facts: dict[str, object]
    if blob is None:
        id = hashlib.sha1(f"{commit.id}{path}".encode()).hexdigest()
        facts = {"type": "directory", "oid": id, "size": 0, "path": path}
    else:
        facts = {"type": "file", "oid": blob.git_id, "size": blob.size, "path": path}
        if blob.sha256 is not None:
            length = len(lfs_pointer(blob.sha256, blob.size))
            facts["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": length}
    if expand:
        facts["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
    return facts


def _named_refs(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": prefix + name, "targetCommit": commit}
        for name, commit in names.items()
    ]


def _is_true(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")
