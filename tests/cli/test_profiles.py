"""Each layer's saliencies as a line of blocks, and the cut in it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout

import pytest

from shardsurgeon.cli.layers import profile_lines
from shardsurgeon.cli.main import main
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

MODEL, SCORES = str(fixture_folder("kimi_k25")), str(scores_of("kimi_k25"))
LINE = re.compile(r"^ +(\d+)  ([ ▁▂▃▄▅▆▇█]+)│([ ▁▂▃▄▅▆▇█]*)$", re.MULTILINE)


def test_plan_cuts_each_layer_where_its_kept_experts_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", SCORES, "--model", MODEL, "--ratio", "0.65"]
    assert main([*words, "--layers"]) == 0
    found = LINE.findall(capsys.readouterr().out)
    assert [int(layer) for layer, *_ in found] == [1, 2, 3]
    # The last of the 20 that go was never routed: it has no height.
    assert {(len(kept), len(pruned)) for _, kept, pruned in found} == {(12, 19)}
    assert all(kept.startswith("█") for _, kept, _ in found)
    assert main(words) == 0
    assert not LINE.search(capsys.readouterr().out)


def test_scores_show_cuts_where_five_percent_of_the_saliency_would_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["scores", "show", SCORES]) == 0
    out = capsys.readouterr().out
    # By hand: 4, 5 and 4 of 32 experts can go, as the column `can go at 5%` says.
    assert [32 - len(kept) for _, kept, _ in LINE.findall(out)] == [4, 5, 4]
    assert "│ the cut at 5%" in out


def test_a_terminal_without_blocks_gets_ascii() -> None:
    layers = [("7", "8421000", 3 / 7), ("12", "80", None), ("13", "", 0.5)]
    for encoding, lines in (
        ("utf-8", ["   7  █▄▂│▁", "  12  █"]),
        ("cp1252", ["   7  #=:|.", "  12  #"]),
        ("ascii", ["   7  #=:|.", "  12  #"]),
    ):
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding=encoding)):
            said = list(profile_lines(layers))
        assert said[:3] == ["", *lines]
        assert len(said) == 4 and all(line.encode(encoding) for line in said[1:])


@pytest.mark.parametrize("columns", [40, 80])
def test_a_line_is_no_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = list(profile_lines([("100", "8" * 64, 0.5)]))
    assert len(lines[1]) <= columns
    left, _, right = lines[1].partition("│")
    assert abs(left.count("█") - right.count("█")) <= 1


def test_no_layer_with_saliencies_is_no_line() -> None:
    assert list(profile_lines([("1", "", 0.5)])) == []
