"""Samples drawn from datasets by a real tokenizer: which ones, how long, in which order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.datasets import parse_spec
from shardsurgeon.layerwise.records import Conversation
from shardsurgeon.layerwise.samples import (
    MOST_LISTED,
    Sample,
    SamplingOptions,
    draw_samples,
    open_datasets,
    samples_sha256,
    total_tokens,
)
from shardsurgeon.layerwise.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"line {n} of the first\n" for n in range(40)))
    Path("b.txt").write_text("".join(f"line {n} of the second\n" for n in range(40)))


def drawn(
    tokenizer: Tokenizer, spec: str, count: int | None = None, **options: object
) -> list[Sample]:
    draw = SamplingOptions(**{"seed": 42, "max_length": 64, **options})  # type: ignore[arg-type]
    return draw_samples(open_datasets(parse_spec(spec, count), draw), tokenizer, draw).samples


def indices(samples: Sequence[Sample]) -> list[int]:
    return [sample.index for sample in samples]


def test_a_seed_decides_which_samples_are_drawn(
    tokenizer: Tokenizer,
) -> None:
    first = drawn(tokenizer, "a.txt", 10)
    assert indices(first) == indices(drawn(tokenizer, "a.txt", 10))
    assert samples_sha256(first) == samples_sha256(drawn(tokenizer, "a.txt", 10))
    assert indices(first) != indices(drawn(tokenizer, "a.txt", 10, seed=43))
    assert indices(first) != sorted(indices(first))
    assert len(set(indices(first))) == 10


def test_the_order_of_a_seed_stays_the_same_in_every_version(tokenizer: Tokenizer) -> None:
    # By hand: argsort of the raw words of PCG64, seeded with 42 and the SHA-256 of the name.
    assert indices(drawn(tokenizer, "a.txt", 5)) == [5, 23, 10, 38, 29]


def test_a_longer_draw_begins_with_the_shorter_one(tokenizer: Tokenizer) -> None:
    assert indices(drawn(tokenizer, "a.txt", 30))[:10] == indices(drawn(tokenizer, "a.txt", 10))
    mixed = drawn(tokenizer, "a.txt:10,b.txt:5")
    assert indices(mixed[:10]) == indices(drawn(tokenizer, "a.txt", 10))
    assert indices(mixed[10:]) == indices(drawn(tokenizer, "b.txt", 5))


def test_samples_of_an_earlier_calibration_are_skipped(tokenizer: Tokenizer) -> None:
    whole = drawn(tokenizer, "a.txt", 20)
    taken = frozenset((sample.source, sample.index) for sample in whole[:12])
    assert indices(drawn(tokenizer, "a.txt", 8, taken=taken)) == indices(whole[12:])


def test_samples_of_a_copy_under_another_name_are_skipped(tokenizer: Tokenizer) -> None:
    used = drawn(tokenizer, "a.txt", 30)
    Path("a.txt").rename("copy.txt")
    taken = frozenset((sample.source, sample.index) for sample in used)
    again = drawn(tokenizer, "copy.txt", 10, taken=taken)
    assert sorted(indices(used) + indices(again)) == list(range(40))
    with pytest.raises(DatasetError, match=r"30 are in the calibration that is extended"):
        drawn(tokenizer, "copy.txt", 11, taken=taken)


def test_the_same_data_twice_is_refused(tokenizer: Tokenizer) -> None:
    Path("copy.txt").write_bytes(Path("a.txt").read_bytes())
    with pytest.raises(UsageError, match=r"a\.txt and copy\.txt hold the same records"):
        drawn(tokenizer, "a.txt:5,copy.txt:5")


def test_samples_are_cut_and_counted(tokenizer: Tokenizer) -> None:
    plain = AutoTokenizer.from_pretrained(MODEL)
    for sample in drawn(tokenizer, "a.txt", 40, max_length=9):
        ids = plain(f"line {sample.index} of the first")["input_ids"]
        assert sample.ids.dtype == np.int64
        assert sample.ids.tolist() == ids[:9]
        assert sample.entries == [(sample.source, sample.index, min(9, len(ids)))]
    assert total_tokens(drawn(tokenizer, "a.txt", 3, max_length=2)) == 6


def test_conversations_go_through_the_chat_template(tokenizer: Tokenizer) -> None:
    Path("chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    (sample,) = drawn(tokenizer, "chats.jsonl", 1)
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
    plain = AutoTokenizer.from_pretrained(MODEL)
    assert sample.ids.tolist() == plain(text, add_special_tokens=False)["input_ids"]


def test_records_without_a_token_are_skipped(tokenizer: Tokenizer) -> None:
    Path("gaps.jsonl").write_text('{"text": ""}\n{"text": "word"}\n{"text": ""}\n')
    assert indices(drawn(tokenizer, "gaps.jsonl", 1)) == [1]
    with pytest.raises(DatasetError, match="has 3 records, of which 1 can be drawn; 2 samples"):
        drawn(tokenizer, "gaps.jsonl", 2)


def test_an_empty_text_is_no_sample_where_texts_begin_with_a_token_of_their_own(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda *given: np.concatenate([[1], plain(*given)]).astype(np.int64)
    )
    Path("gaps.jsonl").write_text('{"text": ""}\n{"text": "word"}\n{"text": ""}\n')
    assert indices(drawn(tokenizer, "gaps.jsonl", 1)) == [1]


MIXED = (
    '{"text": "one"}\n{"messages": []}\n{"text": null}\n{"text": ""}\n{"id": 1}\n[1]\n{\n'
    '{"text": "two"}\n{"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}\n'
)


def test_one_record_that_cannot_be_used_is_refused_with_the_way_out(tokenizer: Tokenizer) -> None:
    Path("mixed.jsonl").write_text(MIXED)
    with pytest.raises(DatasetError) as raised:
        drawn(tokenizer, "mixed.jsonl", 2)
    assert "leave such records out with --skip-invalid" in str(raised.value)
    Path("empty.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DatasetError) as raised:
        drawn(tokenizer, "empty.jsonl", 1)
    assert str(raised.value) == (
        "empty.jsonl, record 0: its messages are empty; leave such records out with --skip-invalid"
    )


def test_records_that_cannot_be_used_are_left_out_and_listed_on_request(
    tokenizer: Tokenizer,
) -> None:
    Path("mixed.jsonl").write_text(MIXED)
    options = SamplingOptions(42, 64, skip_invalid=True)
    found = draw_samples(open_datasets(parse_spec("mixed.jsonl", 2), options), tokenizer, options)
    assert sorted(sample.index for sample in found.samples) == [0, 7]
    # Which are met before the second sample depends on the order: the rest of it has no record.
    with pytest.raises(DatasetError, match=r"of which 2 can be drawn \(6 are invalid: .*ask for 2"):
        drawn(tokenizer, "mixed.jsonl", 3, skip_invalid=True)
    reasons = {index: reason for _, index, reason in found.skipped}
    assert found.num_skipped == len(reasons)
    assert {source for source, _, _ in found.skipped} == {found.samples[0].source}
    expected = {
        1: "its messages are empty",
        2: "its text is null",
        4: "has no field that is known to hold a conversation or a text; its fields: id",
        5: "is not a JSON object",
        6: "is not JSON",
        8: "field 'messages' holds a message without a role",
    }
    assert reasons and all(reason.startswith(expected[index]) for index, reason in reasons.items())


def test_the_list_of_records_left_out_is_bounded(tokenizer: Tokenizer) -> None:
    Path("bad.jsonl").write_text('{"messages": []}\n' * 500 + '{"text": "x"}\n')
    options = SamplingOptions(42, 64, skip_invalid=True)
    found = draw_samples(open_datasets(parse_spec("bad.jsonl", 1), options), tokenizer, options)
    assert found.samples[0].index == 500
    assert len(found.skipped) == MOST_LISTED < found.num_skipped
    with pytest.raises(DatasetError, match=r"501 records, of which 1 can be drawn \(500 are inv"):
        drawn(tokenizer, "bad.jsonl", 2, skip_invalid=True)


def test_a_dataset_of_which_nothing_can_be_used_is_not_read_to_its_end(
    tokenizer: Tokenizer,
) -> None:
    Path("other.jsonl").write_text('{"id": 1}\n' * 3_000)
    says = r"other\.jsonl: of the first 1,000 records drawn none can be used: has no field"
    with pytest.raises(DatasetError, match=says):
        drawn(tokenizer, "other.jsonl", 1, skip_invalid=True)


def test_more_samples_than_records_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DatasetError, match=r"a.txt: has 40 records.*ask for 40"):
        drawn(tokenizer, "a.txt", 41)
    taken = frozenset((sample.source, sample.index) for sample in drawn(tokenizer, "a.txt", 30))
    says = r"of which 10 can be drawn \(30 are in the calibration that is extended\)"
    with pytest.raises(DatasetError, match=says):
        drawn(tokenizer, "a.txt", 11, taken=taken)


@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25", "kimi_linear", "deepseek_v3"])
def test_a_config_that_transformers_cannot_read_does_not_matter(family: str) -> None:
    plain = tokenizers.Tokenizer.from_file(str(MODEL.parent / family / "tokenizer.json"))
    ids = Tokenizer(MODEL.parent / family).encode("some words", "here")
    assert ids.tolist() == plain.encode("some words", add_special_tokens=True).ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer that transformers can read"):
        Tokenizer(tmp_path)
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(UsageError, match="name a folder that has one with --tokenizer"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_is_code_runs_only_where_that_is_allowed(tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UsageError) as raised:
        Tokenizer(tmp_path)
    assert "is code that its folder ships" in str(raised.value)
    assert "--trust-remote-code" in str(raised.value)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("text", "here").tolist()
    with pytest.raises(UsageError, match="has no chat template, and here is a conversation"):
        tokenizer.encode(Conversation([{"role": "user", "content": "x"}]), "here")


def test_a_conversation_that_the_template_refuses_is_one_line(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(DatasetError) as raised:
        Tokenizer(tmp_path).encode(Conversation(CHAT), "a.jsonl, record 0")
    assert "a.jsonl, record 0: does not go through the chat template" in str(raised.value)
    assert "roles must alternate" in str(raised.value)
