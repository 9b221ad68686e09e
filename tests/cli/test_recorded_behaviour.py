"""What the commands print and write is what was recorded; a change is meant, or it is a fault."""

from __future__ import annotations

from pathlib import Path

from tests.cli.transcript import RECORDED, transcript


def test_commands_print_and_write_what_was_recorded(tmp_path: Path) -> None:
    """After a change that is meant: `python -m tests.cli.transcript --write`, and read the diff."""
    now = transcript(tmp_path / "t").splitlines()
    assert now == RECORDED.read_text(encoding="utf-8").splitlines()
