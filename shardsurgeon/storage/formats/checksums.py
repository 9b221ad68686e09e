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
    digests: file name → SHA-256 in hex. A list that it has already is added to, and what that says
    stays."""
    before, known = _split(document)
    return _joined(before, {**digests, **known})


def begin_with_checksums(document: bytes) -> bytes:
    """What `with_checksums` begins with, whatever the digests."""
    return _split(document)[0].removesuffix(b"\n}\n")


def ends_with_checksums(document: bytes) -> bool:
    """Whether it is what `with_checksums` makes of one without a list."""
    return bool(_split(document)[1])


def _joined(document: bytes, digests: Mapping[str, str]) -> bytes:
    listed = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(digests[name])}" for name in sorted(digests)
    )
    member = f',\n  "{CHECKSUMS_KEY}": {{\n{listed}\n  }}\n}}\n'
    return document.removesuffix(b"\n}\n") + member.encode()


def _split(document: bytes) -> tuple[bytes, dict[str, str]]:
    """A document without its list, and the list; itself, and none, where it ends in no such."""
    begin = document.rfind(f',\n  "{CHECKSUMS_KEY}": {{\n'.encode())
    if begin < 0:
        return document, {}
    before = document[:begin] + b"\n}\n"
    try:
        digests = json.loads(b"{" + document[begin + 1 :])[CHECKSUMS_KEY]
        made = _joined(before, digests)
    except (ValueError, TypeError, AttributeError):
        return document, {}
    return (before, digests) if made == document else (document, {})


def nbytes_with_checksums(document: bytes, names: Collection[str]) -> int:
    """The size of `with_checksums` for files of these names, which need not be there yet."""
    return len(with_checksums(document, dict.fromkeys(names, _NONE_YET)))
