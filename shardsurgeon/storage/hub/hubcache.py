"""What huggingface_hub has on this machine already: single files, and whole snapshots.

Beside `hub`, which asks for files, and `places`, which works from a snapshot where
HF_HUB_OFFLINE=1 keeps it off the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from shardsurgeon.errors import CheckpointError
from shardsurgeon.storage.base import SourceFile
from shardsurgeon.storage.formats.index import INDEX_NAME

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_OF_TOTAL = re.compile(r"-\d+-of-(\d+)\.safetensors$")
# A snapshot without these is complete: what prunes leaves them behind.
_NOT_NEEDED = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*")


def cached_file(repo_id: str, commit: str, file: SourceFile) -> Path | None:
    """A file of a commit in the local cache, where it is there and as large as it must be."""
    found = try_to_load_from_cache(repo_id, file.name, revision=commit)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return path if path.stat().st_size == file.nbytes else None


def offline_snapshot(repo_id: str, revision: str | None) -> Path:
    """The newest complete snapshot of a model in the local cache that is of a revision.

    revision: a branch, a tag, a commit hash or the begin of one; None means main's and, where
    that is not complete, any. Raises CheckpointError where there is none.
    """
    where = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
    incomplete = ""
    for folder in _candidates(repo_id, revision):
        missing = _missing(folder) or _unlisted(repo_id, folder)
        if not missing:
            return folder
        incomplete = incomplete or f"; its snapshot {folder.name[:12]} lacks {missing}"
    raise CheckpointError(
        where,
        f"is not in the Hub's local cache, and HF_HUB_OFFLINE=1 forbids to fetch it{incomplete}",
        f"unset HF_HUB_OFFLINE, or run `hf download {repo_id}` where there is a network",
    )


def _candidates(repo_id: str, revision: str | None) -> Iterator[Path]:
    """The snapshots of a revision, the likeliest first."""
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
    """What lies in a folder, the newest first; nothing where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _ref(store: Path, revision: str) -> str | None:
    """The commit that a branch or a tag stood for when it was last fetched."""
    path = store / "refs" / revision
    if ".." in Path(revision).parts or not path.is_file():
        return None
    return path.read_text(encoding="utf-8").strip()


def _missing(snapshot: Path) -> str:
    """The first file that a checkpoint cannot do without and that is not there, or ""."""
    index = snapshot / INDEX_NAME
    shards = [path.name for path in snapshot.glob("*.safetensors")]
    needed = ["config.json"]
    if index.is_file():
        try:
            needed += sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""  # whoever opens it will say what is wrong with it
    elif not shards:
        needed.append("model.safetensors")
    elif (total := _OF_TOTAL.search(shards[0])) and len(shards) < int(total[1]):
        return f"{int(total[1]) - len(shards)} of {int(total[1])} shards"
    return next((name for name in needed if not (snapshot / name).is_file()), "")


def _unlisted(repo_id: str, snapshot: Path) -> str:
    """What huggingface_hub knows to be missing beside the weights; its older versions do not."""
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
