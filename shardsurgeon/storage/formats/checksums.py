"""The list of SHA-256 in a JSON object that records files: its last member, `sha256`.

The object itself is a file that cannot hold its own digest, so it is not in the list. The list can
be added when everything else of the object has been written, as long as the files it names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

CHECKSUMS_KEY = "sha256"
_NONE_YET = "0" * 64


def with_checksums(document: bytes, digests: Mapping[str, str]) -> bytes:
    """The document with the list. document: an object that ends with a brace on a line of its own;
    digests: file name → SHA-256 in hex."""
    listed = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(digests[name])}" for name in sorted(digests)
    )
    member = f',\n  "{CHECKSUMS_KEY}": {{\n{listed}\n  }}\n}}\n'
    return begin_with_checksums(document) + member.encode()


def begin_with_checksums(document: bytes) -> bytes:
    """What `with_checksums` begins with, whatever the digests."""
    return document.removesuffix(b"\n}\n")


def without_checksums(document: bytes) -> tuple[bytes, dict[str, str]] | None:
    """The document that `with_checksums` was given, and the digests; None where it made no such."""
    begin = document.rfind(f',\n  "{CHECKSUMS_KEY}": {{\n'.encode())
    if begin < 0:
        return None
    before = document[:begin] + b"\n}\n"
    try:
        digests = json.loads(b"{" + document[begin + 1 :])[CHECKSUMS_KEY]
        made = with_checksums(before, digests)
    except (ValueError, TypeError, AttributeError):
        return None
    return (before, digests) if made == document else None


def nbytes_with_checksums(document: bytes, names: Collection[str]) -> int:
    """The size of `with_checksums` for files of these names, which need not be there yet."""
    return len(with_checksums(document, dict.fromkeys(names, _NONE_YET)))
