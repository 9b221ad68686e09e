"""Web addresses of folders, and how they may be shown: without passwords and signatures."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from shardsurgeon.errors import UsageError

_SECRET_PARTS = re.compile(r"\?[^\s'\"]*|(?<=//)[^/\s'\"]*@")


def parse_address(url: str) -> SplitResult:
    """The parts of a folder's address; a safetensors file stands for the folder it lies in.

    Raises UsageError where it is none.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(printable(url), f"is no address ({error})") from None
    folder = parts.path.rstrip("/")
    if folder.endswith(".safetensors"):
        folder = folder.rpartition("/")[0]
    return parts._replace(path=folder, fragment="")


def printable(text: str) -> str:
    """An address, or a text that quotes some, on one line and without what opens doors."""
    return _SECRET_PARTS.sub("", " ".join(text.split()))
