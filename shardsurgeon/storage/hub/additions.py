"""Files whose bytes go ahead of their commit: the one place that touches huggingface_hub's insides.

A commit names large files by size and sha256 alone. Which of them have been uploaded is kept in
attributes of CommitOperationAdd that are not public; a test holds each of them to what they do.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from shardsurgeon.errors import OutputError

# Larger files are not looked at twice.
_TWIN_NBYTES = 1 << 26
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What names an uploaded file in a commit: its sha256 (hex) and its size in bytes."""

    sha256: str
    nbytes: int

    def to_text(self) -> str:
        """The receipt as a line of a journal."""
        return json.dumps({"sha256": self.sha256, "nbytes": self.nbytes})

    @classmethod
    def from_text(cls, text: str, where: str) -> Receipt:
        """Read `to_text` back. Raises OutputError, naming `where`, for anything else."""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        match value:
            case {"sha256": str(sha256), "nbytes": int(nbytes)} if _SHA256.fullmatch(sha256):
                return cls(sha256, nbytes)
        problem = "its receipt in the journal is of no upload"
        raise OutputError(where, problem, "--restart starts over")


def without_twins(additions: Sequence[CommitOperationAdd]) -> list[CommitOperationAdd]:
    """The additions but for those whose bytes another one of them has.

    In one request they would be uploaded twice; asked for later, the Hub has them. Looks at
    files that can be hashed in no time, and that weights are not.
    """
    found: dict[object, CommitOperationAdd] = {}
    sizes = Counter(addition.upload_info.size for addition in additions)
    for addition in additions:
        nbytes = addition.upload_info.size
        alike = sizes[nbytes] > 1 and nbytes <= _TWIN_NBYTES
        found.setdefault(addition.upload_info.sha256 if alike else id(addition), addition)
    return list(found.values())


def to_upload_ahead(name: str, path: Path) -> CommitOperationAdd:
    """A file that is uploaded as a large one whatever the server would choose for its size.

    A small file would otherwise travel inside the commit, when it is no longer on the disk.
    """
    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
    addition._upload_mode = "lfs"
    addition._should_ignore = False
    return addition


def receipt_of(addition: CommitOperationAdd) -> Receipt:
    """The receipt of a file that has just been uploaded."""
    if not addition._is_uploaded:
        raise RuntimeError(f"{addition.path_in_repo} was not uploaded")
    return Receipt(addition.upload_info.sha256.hex(), addition.upload_info.size)


def uploaded_before(name: str, receipt: Receipt) -> CommitOperationAdd:
    """A file whose bytes the Hub has, for a commit to name; it need be on no disk any more."""
    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
    addition.upload_info.size = receipt.nbytes
    addition.upload_info.sha256 = bytes.fromhex(receipt.sha256)
    addition._upload_mode = "lfs"
    addition._should_ignore = False
    addition._is_uploaded = True
    return addition
