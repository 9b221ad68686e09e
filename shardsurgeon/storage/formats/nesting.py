"""What a file's value may contain: no container inside itself, no depth without end, no strays.

A pickle can describe a list that holds itself, or a million lists in each other; whoever walks
such a value never comes back. pickles.py hands out nothing that has not passed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shardsurgeon.errors import ScoreError

MAX_DEPTH = 100
_DAMAGED = "the file is damaged: fetch it again"


def check_nesting(root: object, leaf: Callable[[object], None], where: str) -> None:
    """Raise ScoreError for loops and for depth beyond MAX_DEPTH; show `leaf` what is neither
    a container nor a plain scalar.

    Looks into each container once, however often it is shared.
    """
    heights: dict[int, int] = {}
    open_ids = {id(root)}
    path = [_Visit(root, _inner_containers(root, leaf))]
    while path:
        visit = path[-1]
        child = next(visit.inner, None)
        if child is None:
            path.pop()
            open_ids.remove(id(visit.container))
            heights[id(visit.container)] = visit.height
            if path:
                path[-1].height = max(path[-1].height, visit.height + 1)
            continue
        known = heights.get(id(child))
        if id(child) in open_ids:
            raise ScoreError(where, "a container in its pickle holds itself", _DAMAGED)
        if len(path) + (known or 1) > MAX_DEPTH:
            raise ScoreError(where, f"its pickle nests more than {MAX_DEPTH} containers", _DAMAGED)
        if known is None:
            open_ids.add(id(child))
            path.append(_Visit(child, _inner_containers(child, leaf)))
        else:
            visit.height = max(visit.height, known + 1)


@dataclass(slots=True)
class _Visit:
    """A container being looked into; height: floors found in it so far, itself included."""

    container: object
    inner: Iterator[object]
    height: int = 1


def _inner_containers(container: object, leaf: Callable[[object], None]) -> Iterator[object]:
    """The containers right inside; what is none is shown to `leaf`."""
    values: Iterable[object] = (container,)
    if isinstance(container, dict):
        values = container.values()
    elif isinstance(container, list | tuple):
        values = container
    for value in values:
        if isinstance(value, dict | list | tuple):
            yield value
        elif not isinstance(value, str | bytes | int | float | complex | set | frozenset | None):
            leaf(value)
