"""What the commands print and write is what was recorded; a change is meant, or it is a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.transcript import SESSIONS, recorded, session

# Written .pt files are in it, for which the command needs torch.
NEEDS_TORCH = {"scores"}
NAMES = [
    pytest.param(name, marks=pytest.mark.torch) if name in NEEDS_TORCH else name
    for name in SESSIONS
]


@pytest.mark.parametrize("name", NAMES)
def test_commands_print_and_write_what_was_recorded(name: str, tmp_path: Path) -> None:
    """After a change that is meant: `python -m tests.cli.transcript --write`, and read the diff."""
    assert session(name, tmp_path / "t") == recorded()[name]


def test_nothing_else_is_recorded() -> None:
    assert list(recorded()) == list(SESSIONS)
