"""The small language in which a family file names tensors, as regular expressions.

{layer}   a layer number          {expert}  an expert number
{part}    the rest of the name    *         anything
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shardsurgeon.errors import FamilyError

# No more digits than Python turns into a number at once; names come from strangers.
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_PLACEHOLDERS = {
    "{layer}": rf"(?P<layer>{_NUMBER})",
    "{expert}": rf"(?P<expert>{_NUMBER})",
    "{part}": r"(?P<part>.+)",
    "*": r".*",
}
_NAMED = ("{layer}", "{expert}", "{part}")
_WILDCARDS = ("{part}", "*")
_TOKEN = re.compile("|".join(re.escape(token) for token in _PLACEHOLDERS))
_MOST_CHARACTERS = 300
# Each is tried on each of a model's tensors, of which there may be hundreds of thousands.
_MOST_TEMPLATES = 300


def pattern(template: str) -> str:
    """The regular expression of a name template; every placeholder becomes a named group.

    Where a wildcard and the text behind it stand before another wildcard, the first place of that
    text is as good as any, and no other is tried: else names could take time without an end.
    """
    out, pieces = [], _pieces(template)
    for position, (token, text) in enumerate(pieces):
        written, behind = _PLACEHOLDERS.get(token, ""), re.escape(text)
        if _takes_the_first(pieces, position):
            shortest = written.replace(".*", ".*?").replace(".+", ".+?")
            out.append(f"(?>{shortest}{behind})")
        else:
            out.append(written + behind)
    return "".join(out)


def require_templates(named: Sequence[tuple[str, str]], where: str) -> None:
    """Raise FamilyError, naming the file `where`, unless every name can be read.

    named: (entry, name) of all names of a family.
    """
    if len(named) > _MOST_TEMPLATES:
        many = f"has {len(named):,} names, at most {_MOST_TEMPLATES} are tried on a tensor"
        raise FamilyError(where, many, "write several as one, with *")
    for entry, template in named:
        if problem := _problem(entry, template):
            remedy = "see 'Adding a family' in CONTRIBUTING.md"
            raise FamilyError(f"{where} {entry}", f"'{template[:80]}' {problem}", remedy)


def _problem(entry: str, template: str) -> str | None:
    """Why a name cannot stand in an entry of a family's tensors; None where it can."""
    if not 0 < len(template) <= _MOST_CHARACTERS:
        return f"has {len(template):,} characters, 1 to {_MOST_CHARACTERS} are read"
    needed = {"layers": "{layer}", "mtp": "{layer}", "experts": "{expert}"}.get(entry)
    if needed is not None and needed not in template:
        return f"has no {needed}"
    twice = next((token for token in _NAMED if template.count(token) > 1), None)
    if twice is not None:
        return f"has {twice} twice"
    if entry in ("layers", "mtp") and "{expert}" in template:
        return "has {expert}, which the name of a layer has not"
    return None


def _pieces(template: str) -> list[tuple[str, str]]:
    """(placeholder, the text behind it) of a template, the first with "" for a placeholder."""
    found = list(_TOKEN.finditer(template))
    ends = [token.start() for token in found] + [len(template)]
    begins = [0] + [token.end() for token in found]
    texts = [template[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return list(zip(["", *(token[0] for token in found)], texts, strict=True))


def _takes_the_first(pieces: list[tuple[str, str]], position: int) -> bool:
    """Whether it is a wildcard with another one next."""
    behind = pieces[position + 1 : position + 2]
    return pieces[position][0] in _WILDCARDS and bool(behind) and behind[0][0] in _WILDCARDS
