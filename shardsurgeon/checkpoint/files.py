"""Which file of a model is what: its card, and weights in other formats."""

from __future__ import annotations

import re

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
_SET_ASIDE = re.compile(r"README\.source(?:-(\d+))?\.md")

_OTHER_WEIGHTS = (".bin", ".pth", ".gguf", ".bin.index.json")


def set_aside(name: str) -> str | None:
    """The name a card gets in a model made of its own: README.md becomes README.source.md, that
    README.source-2.md, and so on; None for a file that is no card."""
    if name == CARD_NAME:
        return SOURCE_CARD_NAME
    found = _SET_ASIDE.fullmatch(name)
    return f"README.source-{int(found[1] or 1) + 1}.md" if found else None


def is_other_weight_format(name: str) -> bool:
    """Whether a file holds the weights in another format, which pruning leaves behind."""
    folder, _, rest = name.partition("/")
    base = name.rpartition("/")[2]
    return (
        base.endswith(_OTHER_WEIGHTS)
        or base.startswith("consolidated")
        or (folder == "original" and bool(rest))
    )
