"""From what a user types for a model to the source that it means, and back.

Network libraries are imported only for a model behind a network. Records name a repository of the
Hub by its full name, so that it can be found again, whether its bytes came over the network or from
the Hub's cache, and anything else by the name of its folder.
"""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.storage.formats.index import CONFIG_NAME
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import Source, leads_out, unusual
from shardsurgeon.storage.view import open_folder

_REPOSITORY = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>.*))?", re.ASCII | re.DOTALL)
# As huggingface_hub has it: a slash in the name of a revision is written %2F, but for these two.
_HUB_URL = re.compile(
    r"hf://(models/)?(?P<id>\w[\w.-]*(/\w[\w.-]*)?)"
    r"(@(?P<revision>refs/pr/\d+(?![^/])|refs/convert/\w+(?![^/])|[^/]*))?(/(?P<folder>.*))?",
    re.ASCII | re.DOTALL,
)
_HOW = "write it like hf://org/name, hf://org/name@revision or hf://org/name@revision/folder"
# What a browser shows of a model, or of a file of it.
_HUB_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>\w[\w.-]*/\w[\w.-]*)"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/?#]+)(?:/(?P<folder>[^?#]*))?|/)?(?:[?#].*)?",
    re.ASCII | re.DOTALL,
)

_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@[^/]*)?(/.+)?")
_IN_CACHE = "models--"
_NO_MODELS = ("datasets/", "spaces/", "buckets/")
# As git names branches and tags, without what leads out of a folder or commands a terminal.
_REVISION = re.compile(
    r"(?!.*(\.\.|//|@\{|/\.))[^\s\x00-\x20\x7f-\x9f~^:?*\[\\\ud800-\udfff]{1,255}"
)


def open_source(model: str | PathLike[str] | Source, *, follow_links: bool = False) -> Source:
    """The source that a user means by `model`.

    A path that exists is that folder (or file, which stands for its folder), whatever else it may
    look like. Otherwise `hf://org/name[@revision]`, and `org/name[@revision]` without a scheme, is
    a model on the Hugging Face Hub, pinned to a commit; with HF_HUB_OFFLINE=1 its newest complete
    snapshot in the local cache; `hf://org/name[@revision]/folder` is one in a folder of its
    repository, and the address of a page of huggingface.co what it shows. Any other `https://` is a
    folder of a web server, and any other scheme a folder of an fsspec filesystem. A PathLike is a
    local path, and a Source is itself. follow_links: as `LocalSource` has it.

    Raises InputError or a subclass, with what to do, where there is no such place or it may not be
    read, and NetworkError where it cannot be reached.
    """
    if not isinstance(model, str | PathLike):
        return model
    if isinstance(model, PathLike) or _exists(model):
        return open_folder(fspath(model), follow_links=follow_links)
    page = _HUB_PAGE.fullmatch(model)
    if page is not None and not page["id"].startswith(_NO_MODELS):
        revision = page["revision"]
        return _hub(page["id"], revision and unquote(revision), unquote(page["folder"] or ""))
    scheme, separator, _ = model.partition("://")
    if not separator:
        return _unmarked(model)
    if scheme == "hf":
        found = _HUB_URL.fullmatch(model)
        if found is None or found["id"].startswith(_NO_MODELS):
            raise UsageError(model, "is not a model on the Hub", _HOW)
        revision = found["revision"]
        revision = None if revision is None else unquote(revision)
        return _hub(found["id"], revision, found["folder"] or "")
    if scheme == "file":
        return open_folder(url2pathname(urlsplit(model).path), follow_links=follow_links)
    return _elsewhere(scheme, model)


def require_revision(revision: str, where: str) -> None:
    """Raise UsageError, naming `where`, for what can be no branch, tag or commit."""
    bad_end = revision.startswith(("-", "/", ".")) or revision.endswith(("/", ".", ".lock"))
    if bad_end or not _REVISION.fullmatch(revision):
        problem = f"{revision!a} is no name of a revision"
        raise UsageError(where, problem, "give a branch, a tag or a commit")


def _unmarked(model: str) -> Source:
    """What is neither a path nor a URL: the name of a repository, or a mistyped folder."""
    found = _REPOSITORY.fullmatch(model)
    if found is None:
        return LocalSource(model)
    try:
        return _hub(found["id"], found["revision"])
    except CheckpointError as error:
        problem = f"is not a folder here, and {error.problem}"
        raise CheckpointError(model, problem, error.remedy) from error


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def _hub(repo_id: str, revision: str | None, folder: str = "") -> Source:
    if revision is not None:
        require_revision(revision, repo_id)
    folder = folder.rstrip("/")
    if folder and (leads_out(folder) or unusual(folder)):
        raise UsageError(f"hf://{repo_id}", f"{folder!a} is no folder of a repository", _HOW)
    from shardsurgeon.storage.hub.source import open_repository

    return open_repository(repo_id, revision, folder)


def _elsewhere(scheme: str, url: str) -> Source:
    if ascii(url) != ascii(url.encode("utf-8", "replace").decode()):
        raise UsageError(url, "is no address: it holds bytes that are no text", "write them as %..")
    if scheme in ("http", "https"):
        from shardsurgeon.storage.web import WebSource

        return WebSource(url)
    from shardsurgeon.storage.object_store import StoreSource

    return StoreSource(url)


def address_of(source: Source) -> str:
    """What to type to name the source again, at the commit that it is pinned to."""
    name = hub_name(source) if source.is_remote else None
    return source.location if name is None else hub_address(name, source.revision)


def hub_address(name: str, revision: str | None) -> str:
    """What to type for a model of the Hub at a commit; name: as `hub_name` gives it."""
    at = "" if revision is None else f"@{revision}"
    org, repository, *folder = name.split("/", 2)
    whole = f"{org}/{repository}{at}"
    return f"hf://{whole}/{folder[0]}" if folder else whole


def hub_name(source: Source) -> str | None:
    """`org/name` of a repository of the Hub, `org/name/folder` of a model in a folder of it, None
    for every other source."""
    remote = _HUB.fullmatch(source.location)
    if remote is not None:
        return remote[1] + (remote[2] or "")
    path = source.local_path(CONFIG_NAME)
    if path is None or source.revision is None:
        return None
    # The cache keeps snapshots as models--org--name/snapshots/<commit>.
    folder = path.absolute().parent
    snapshot = next(each for each in (folder, *folder.parents) if each.name == source.revision)
    repository = snapshot.parent.parent.name
    parts = repository.removeprefix(_IN_CACHE).split("--")
    if not repository.startswith(_IN_CACHE) or len(parts) != 2:
        return None
    return "/".join((*parts, *folder.relative_to(snapshot).parts))
