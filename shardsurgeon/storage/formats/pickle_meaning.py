"""Who says what the words in a pickle mean: asked by pickles.py, answered by torch_names.py."""

from __future__ import annotations

from typing import Protocol


class Meaning(Protocol):
    """What the words in a pickle stand for. Every method raises ScoreError for what it refuses."""

    def named(self, module: str, name: str) -> object:
        """What the global `module.name` becomes."""
        ...

    def called(self, function: object, arguments: tuple[object, ...]) -> object:
        """What calling `function`, a result of `named`, on `arguments` becomes."""
        ...

    def given_state(self, target: object, state: object) -> object:
        """What `target` becomes when the pickle sets its state."""
        ...

    def persistent(self, key: object) -> object:
        """What the persistent id `key` stands for."""
        ...

    def leaf(self, value: object) -> None:
        """Refuse a value made by the methods above that may not be part of the result."""
        ...
