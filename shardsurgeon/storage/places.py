"""The words for a model, made into the source that they mean.

The door to this room: `checkpoint` comes through here with whatever the user wrote. The network's
libraries are imported only for a model that lies behind one.
"""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from shardsurgeon.errors import CheckpointError, UsageError
from shardsurgeon.storage.base import Source
from shardsurgeon.storage.local import LocalSource

_REPOSITORY = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>.+))?", re.ASCII)
_HUB_URL = re.compile(
    r"hf://(models/)?(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>.+))?", re.ASCII
)
_HOW = "write it like hf://org/name or hf://org/name@revision"


def open_source(model: str | PathLike[str] | Source) -> Source:
    """The source that a user's words mean.

    A path that exists is that folder (or file, which stands for its folder), whatever else it
    may look like. Then `hf://org/name[@revision]`, and `org/name[@revision]` without a scheme,
    is a model on the Hugging Face Hub, pinned to a commit; with HF_HUB_OFFLINE=1 its newest
    complete snapshot in the local cache. `https://` is a folder of a web server, and any other
    scheme a folder of an fsspec filesystem. A PathLike is a local path, and a Source is itself.

    Raises InputError and its children, with what to do, where there is no such place or it may
    not be read, and NetworkError where it cannot be reached.
    """
    if not isinstance(model, str | PathLike):
        return model
    if isinstance(model, PathLike) or _exists(model):
        return LocalSource(fspath(model))
    scheme, separator, _ = model.partition("://")
    if not separator:
        return _unmarked(model)
    if scheme == "hf":
        found = _HUB_URL.fullmatch(model)
        if found is None or found["id"].startswith(("datasets/", "spaces/", "buckets/")):
            raise UsageError(model, "is no model on the Hub", _HOW)
        return _hub(found["id"], unquote(found["revision"] or "") or None)
    if scheme == "file":
        return LocalSource(url2pathname(urlsplit(model).path))
    return _elsewhere(scheme, model)


def _unmarked(model: str) -> Source:
    """What is neither there nor a URL: the name of a repository, or a mistyped folder."""
    found = _REPOSITORY.fullmatch(model)
    if found is None:
        return LocalSource(model)
    try:
        return _hub(found["id"], found["revision"])
    except CheckpointError as error:
        problem = f"is no folder here, and {error.problem}"
        raise CheckpointError(model, problem, error.remedy) from error


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def _hub(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        from shardsurgeon.storage.hub.hubcache import offline_snapshot

        return LocalSource(offline_snapshot(repo_id, revision))
    from shardsurgeon.storage.hub.hub import HubSource

    return HubSource(repo_id, revision)


def _elsewhere(scheme: str, url: str) -> Source:
    if scheme in ("http", "https"):
        from shardsurgeon.storage.web import WebSource

        return WebSource(url)
    from shardsurgeon.storage.stores import StoreSource

    return StoreSource(url)
