"""What a record calls the model that a prune started from.

A repository of the Hub by its full name, so that it can be found again, whether its bytes came
over the network or lie in the Hub's cache; anything else by the name of its folder.
"""

from __future__ import annotations

import re

from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from shardsurgeon.checkpoint.provenance import SourceIdentity
from shardsurgeon.storage.base import Source

_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@.*)?")
_IN_CACHE = "models--"


def identity_of(checkpoint: Checkpoint) -> SourceIdentity:
    """Name, commit and config.json's digest of a source."""
    source = checkpoint.source
    name = hub_name(source) or source.name
    return SourceIdentity(name, source.revision, checkpoint.config_sha256)


def address_of(source: Source) -> str:
    """What to type to name the source again, at the commit that it is pinned to."""
    name = hub_name(source) if source.is_remote else None
    return source.location if name is None else f"{name}@{source.revision}"


def hub_name(source: Source) -> str | None:
    """`org/name` of a repository of the Hub, None for every other source."""
    remote = _HUB.fullmatch(source.location)
    if remote is not None:
        return remote[1]
    path = source.local_path(CONFIG_NAME)
    if path is None or source.revision is None:
        return None
    # The cache keeps snapshots as models--org--name/snapshots/<commit>.
    folder = path.absolute().parent.parent.parent.name
    parts = folder.removeprefix(_IN_CACHE).split("--")
    return "/".join(parts) if folder.startswith(_IN_CACHE) and len(parts) == 2 else None
