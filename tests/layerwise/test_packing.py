"""`--pack`: windows filled with records, and that no record is ever added up twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shardsurgeon.cli.main import main
from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.calibration_file import read_calibration
from shardsurgeon.layerwise.datasets import parse_spec
from shardsurgeon.layerwise.samples import (
    GAP_ID,
    PackedRecord,
    Sample,
    SamplingOptions,
    counted_tokens,
    draw_samples,
    open_datasets,
    samples_sha256,
    windows,
)
from shardsurgeon.layerwise.tokenizer import Tokenizer
from tests.layerwise.chats import sums, words, write_chats

MODEL = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"{'word ' * (n % 7)}line {n}\n" for n in range(40)))


def of(*lengths: int) -> list[Sample]:
    """Records of these lengths; the tokens of the third are 300, 301, …"""
    return [
        Sample(np.arange(n) + 100 * number, "a", number - 1)
        for number, n in enumerate(lengths, start=1)
    ]


def drawn(tokenizer: Tokenizer, count: int, **options: Any) -> list[Sample]:
    draw = SamplingOptions(**{"seed": 42, "max_length": 64, "pack": True, **options})
    return draw_samples(open_datasets(parse_spec("a.txt", count), draw), tokenizer, draw).samples


def as_the_reference_packs(records: Sequence[list[int]], length: int) -> list[tuple[Any, Any]]:
    """Ids and attention mask of each window, as CerebrasResearch/reap fills them: from its
    description, a position at a time."""
    left = [list(record) for record in records]
    made = []
    while left:
        ids, mask, at = [0] * length, [0] * length, 0
        while at < length and left:
            for token in left.pop(0):
                if at == length:
                    break
                ids[at], mask[at] = token, 1
                at += 1
            at += 1
        made.append((ids, mask))
    return made


def test_windows_are_filled_as_the_reference_fills_them(tokenizer: Tokenizer) -> None:
    plain = AutoTokenizer.from_pretrained(MODEL)
    lines = Path("a.txt").read_text().splitlines()
    order = drawn(tokenizer, 40, pack=False)
    expected = as_the_reference_packs(
        [plain(lines[sample.index])["input_ids"] for sample in order], 64
    )
    found = drawn(tokenizer, len(expected))
    assert len(found) > 5
    for sample, (ids, mask) in zip(found[:-1], expected[:-1], strict=True):
        assert sample.ids.tolist() == ids
        assert sample.counted is not None and sample.counted.astype(int).tolist() == mask
    # The reference fills the last one with padding, which is nothing that we need.
    last, (ids, mask) = found[-1], expected[-1]
    assert ids == [*last.ids.tolist(), *[0] * (64 - last.num_tokens)]
    assert sum(mask) == last.num_counted


@pytest.mark.parametrize(
    ("lengths", "places"),
    [
        ((8, 1), [[(0, 0, 8)], [(1, 0, 1)]]),  # full to the last position
        ((7, 1), [[(0, 0, 7)], [(1, 0, 1)]]),  # the gap is the last position
        ((6, 5, 3), [[(0, 0, 6), (1, 7, 8)], [(2, 0, 3)]]),  # one token is left, the rest is cut
        ((2, 2, 2), [[(0, 0, 2), (1, 3, 5), (2, 6, 8)]]),
        ((1,), [[(0, 0, 1)]]),
        ((), []),
    ],
)
def test_a_gap_follows_a_record_and_the_last_one_is_cut(
    lengths: tuple[int, ...], places: list[list[tuple[int, int, int]]]
) -> None:
    found = list(windows(of(*lengths), 8))
    assert [[(r.index, r.begin, r.end) for r in each.records] for each in found] == places
    for window in found:
        covered = {at for r in window.records for at in range(r.begin, r.end)}
        gaps = [at for at in range(window.num_tokens) if at not in covered]
        assert np.flatnonzero(window.ids == GAP_ID).tolist() == gaps
        assert window.gaps is None if not gaps else np.flatnonzero(window.gaps).tolist() == gaps
        assert (window.counted is None) == (not gaps)
        for r in window.records:
            assert window.ids[r.begin] == 100 * (r.index + 1)
        assert counted_tokens([window]) == len(covered) == sum(n for _, _, n in window.entries)
    assert all(window.num_tokens == 8 for window in found[:-1])


def test_a_mask_is_joined_as_the_tokens_are() -> None:
    half = [True, False, True]
    records = [
        Sample(np.array([5, 6, 7]), "a", 3, np.array(half)),
        Sample(np.array([8, 9, 5]), "a", 9, np.array([False, False, True])),
    ]
    (window,) = windows(records, 6)
    assert window.ids.tolist() == [5, 6, 7, GAP_ID, 8, 9]
    assert window.counted is not None and window.counted.tolist() == [*half, *[False] * 3]
    assert window.gaps is not None and window.gaps.tolist() == [False] * 3 + [True] + [False] * 2
    # The second record is listed: it was seen, and must not be drawn again.
    assert window.entries == [("a", 3, 2), ("a", 9, 0)]


def test_the_digest_knows_where_one_record_ends_and_the_next_begins() -> None:
    ids, counted = np.array([7, 0, 0, 8, 9]), np.array([True, False, False, True, True])
    one = Sample(ids, "a", 1, counted, (PackedRecord(1, 0, 1), PackedRecord(2, 3, 5)))
    other = Sample(ids, "a", 1, counted, (PackedRecord(1, 0, 1), PackedRecord(3, 3, 5)))
    alone = Sample(ids, "a", 1, counted)
    assert len({samples_sha256([each]) for each in (one, other, alone)}) == 3


def test_a_longer_draw_begins_with_the_shorter_one_and_no_two_windows_share_a_record(
    tokenizer: Tokenizer,
) -> None:
    long, short = drawn(tokenizer, 6), drawn(tokenizer, 4)
    assert [s.entries for s in long[:4]] == [s.entries for s in short]
    records = [index for window in long for _, index, _ in window.entries]
    assert len(records) == len(set(records))


def test_records_of_an_earlier_calibration_are_in_no_window(tokenizer: Tokenizer) -> None:
    used = [entry for window in drawn(tokenizer, 3) for entry in window.entries]
    more = drawn(tokenizer, 3, taken=frozenset(entry[:2] for entry in used))
    assert not {e[1] for e in used} & {e[1] for window in more for e in window.entries}


def test_more_windows_than_the_records_fill_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DatasetError) as raised:
        drawn(tokenizer, 30)
    assert "a.txt: has 40 records, which fill " in str(raised.value)
    found = int(str(raised.value).partition("fill ")[2].partition(" ")[0])
    assert found > 5 and len(drawn(tokenizer, found)) == found
    assert f"windows of 64 tokens; 30 samples were asked for; ask for {found}" in str(raised.value)


def test_the_file_lists_every_record_once_and_grows_by_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", count=10)
    tokens = ("--max-length", "120", "--dtype", "float32")
    short = words("qwen3_moe", chats, Path("a.json"), *tokens, "--pack", "--samples", "2", "--json")
    assert main(short) == 0
    report = json.loads(capsys.readouterr().out)
    first = read_calibration("a.json")
    assert (report["samples"], report["total_samples"], first.num_samples) == (2, 2, 2)
    assert first.settings["windows"] == 2
    assert len(first.samples) >= 2
    assert (
        sum(n for _, _, n in first.samples) == report["counted_tokens"] <= report["tokens"] == 240
    )
    more = words("qwen3_moe", chats, Path("b.json"), *tokens, "--pack", "--samples", "2")
    assert main([*more, "--extend", "a.json"]) == 0
    capsys.readouterr()
    both = read_calibration("b.json")
    assert both.num_samples == 4 and "windows" not in both.settings
    indices = [index for _, index, _ in both.samples]
    assert len(indices) == len(set(indices)) > len(first.samples)
    # The very run again is done, and what is in a file is in no sum of it with another.
    assert main([*more, "--extend", "a.json"]) == 0
    assert "by an earlier run" in capsys.readouterr().out
    assert main(["scores", "merge", "a.json", "b.json", "-o", "c.json"]) == 2
    assert "samples are in" in capsys.readouterr().err
    assert main(["scores", "show", "b.json"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 samples, " in shown and "packed windows" in shown
    assert sums(Path("b.json")).keys() == sums(Path("a.json")).keys()


def test_short_records_are_worth_a_note_where_they_are_not_packed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("short.txt").write_text("a b c d\n" * 9)
    command = words("qwen3_moe", Path("short.txt"), Path("a.json"), "--samples", "3", "--json")
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    held = report["tokens"]
    assert f"3 samples hold {held} tokens, {held / 144:.0%} of 3 x 48; --pack fills" in "".join(
        report["notes"]
    )
    packed = words("qwen3_moe", Path("short.txt"), Path("b.json"), "--samples", "1", "--pack")
    assert main([*packed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
