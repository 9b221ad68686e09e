"""Where the checks put what they find: the first differences in full, the others counted."""

from __future__ import annotations

KEPT = 20


class Findings:
    """Differences in the order they were found, one line each."""

    def __init__(self, keep: int = KEPT) -> None:
        """keep: how many lines are kept; those that follow are only counted."""
        self._keep = keep
        self._lines: list[str] = []
        self.count = 0

    def add(self, where: str, problem: str) -> None:
        """Note a difference. where: file, tensor or metadata entry; problem: with its numbers."""
        self.count += 1
        if len(self._lines) < self._keep:
            self._lines.append(f"{where}: {problem}")

    def lines(self) -> tuple[str, ...]:
        """The lines kept, and one more that says how many were not."""
        left = self.count - len(self._lines)
        if not left:
            return tuple(self._lines)
        return (*self._lines, f"and {left:,} more difference{'s' if left > 1 else ''}")
