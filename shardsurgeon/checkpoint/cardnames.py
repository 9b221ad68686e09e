"""What a model's card is called, and what becomes of it when another takes its name.

Who publishes a model with a card of its own sets the source's aside, and whoever compares the
two looks for it there.
"""

from __future__ import annotations

import re

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
_SET_ASIDE = re.compile(r"README\.source(?:-(\d+))?\.md")


def set_aside(name: str) -> str | None:
    """The name a card gets in a model made of its own: README.md becomes README.source.md, that
    README.source-2.md, and so on; None for a file that is no card."""
    if name == CARD_NAME:
        return SOURCE_CARD_NAME
    found = _SET_ASIDE.fullmatch(name)
    return f"README.source-{int(found[1] or 1) + 1}.md" if found else None
