"""`--tokens assistant`: which tokens a sample counts, and where that cannot be known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shardsurgeon.cli.main import main
from shardsurgeon.errors import DatasetError, UsageError
from shardsurgeon.layerwise.calibration_file import read_calibration
from shardsurgeon.layerwise.datasets import parse_spec
from shardsurgeon.layerwise.samples import (
    Drawn,
    SamplingOptions,
    counted_tokens,
    draw_samples,
    open_datasets,
    samples_sha256,
    total_tokens,
)
from shardsurgeon.layerwise.tokenizer import Tokenizer
from tests.layerwise.chats import words, write_chats

MODEL = Path(__file__).parents[2] / "fixtures" / "qwen3_moe"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Why ünïcode?"},
    {"role": "assistant", "content": "Because 漢字 and  🙂."},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": " yes"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model, whose template marks what the assistant says."""
    folder = tmp_path_factory.mktemp("marked")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(folder: Path, *records: Any, samples: int | None = None, **options: Any) -> Drawn:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    draw = SamplingOptions(**{"seed": 42, "max_length": 512, "tokens": "assistant", **options})
    opened = open_datasets(parse_spec("a.jsonl", samples or len(records)), draw)
    return draw_samples(opened, Tokenizer(folder), draw)


def pieces(talk: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """The template written out: texts, and whether the assistant says them."""
    for message in talk:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def test_what_the_assistant_says_counts_and_nothing_else(marked: Path) -> None:
    (sample,) = drawn(marked, {"messages": TALK}).samples
    text = "".join(part for part, _ in pieces(TALK))
    said = np.array([own for part, own in pieces(TALK) for _ in part])
    plain = AutoTokenizer.from_pretrained(MODEL)(
        text, add_special_tokens=False, return_offsets_mapping=True
    )
    assert sample.ids.tolist() == plain["input_ids"]
    expected = [bool(said[begin:end].any()) for begin, end in plain["offset_mapping"]]
    assert sample.counted is not None and sample.counted.tolist() == expected
    assert 0 < sample.num_counted < sample.num_tokens
    assert sample.entries == [(sample.source, 0, sum(expected))]
    # Which tokens pass through the model does not depend on it.
    (whole,) = drawn(marked, {"messages": TALK}, tokens="all").samples
    assert whole.counted is None and whole.ids.tolist() == sample.ids.tolist()
    assert samples_sha256([whole]) != samples_sha256([sample])


def test_the_mask_is_that_of_transformers_where_every_letter_has_a_token(marked: Path) -> None:
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat, far"}]
    (sample,) = drawn(marked, {"messages": talk}).samples
    mask = AutoTokenizer.from_pretrained(marked).apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.counted is not None
    assert sample.ids.tolist() == mask["input_ids"]
    assert sample.counted.astype(int).tolist() == mask["assistant_masks"]


def test_a_cut_sample_counts_what_is_left_and_one_without_an_answer_is_none(marked: Path) -> None:
    mute = {"messages": TALK[:1]}
    (sample,) = drawn(marked, mute, {"messages": TALK}, samples=1).samples
    assert sample.index == 1 and sample.counted is not None
    first = int(np.flatnonzero(sample.counted)[0])
    (cut,) = drawn(marked, {"messages": TALK}, max_length=first + 2).samples
    assert cut.counted is not None
    assert cut.counted.tolist() == [False] * first + [True] * 2
    assert (total_tokens([cut]), counted_tokens([cut])) == (first + 2, 2)
    with pytest.raises(DatasetError, match="has 2 records, of which 0 can be drawn"):
        drawn(marked, mute, {"messages": TALK}, samples=1, max_length=first)


def test_a_text_has_no_assistant(marked: Path) -> None:
    with pytest.raises(DatasetError, match=r"record 0: is a text, in which no assistant speaks"):
        drawn(marked, {"text": "hello"})
    found = drawn(marked, {"text": "x"}, {"messages": TALK}, samples=1, skip_invalid=True)
    assert [sample.index for sample in found.samples] == [1]


def test_a_template_without_marks_is_refused_with_the_way_out() -> None:
    says = r"--tokens assistant: the chat template of .* does not mark what the assistant says; "
    says += r"give one with \{% generation %\} \(--tokenizer\), or count all tokens"
    # Also where bad records are left out: they all would be.
    with pytest.raises(UsageError, match=says):
        drawn(MODEL, {"messages": TALK}, skip_invalid=True)


def test_a_tokenizer_that_does_not_know_where_its_tokens_lie_is_refused(
    marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(marked)), "is_fast", False)
    with pytest.raises(UsageError, match="does not say where in a text its tokens lie"):
        drawn(marked, {"messages": TALK})


def test_the_file_says_which_tokens_it_counts_and_grows_by_the_same_alone(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, more = (write_chats(tmp_path / f"{n}.jsonl", count=2, seed=n) for n in (1, 2))
    long = ("--max-length", "256", "--samples", "2", "--dtype", "float32")
    long += ("--tokenizer", str(marked))
    assistant = (*long, "--tokens", "assistant")
    assert main(words("qwen3_moe", chats, Path("a.json"), *assistant, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["counted_tokens"] < report["tokens"]
    found = read_calibration("a.json")
    assert found.settings["counted"] == "assistant"
    assert sum(tokens for _, _, tokens in found.samples) == report["counted_tokens"]
    assert main(["scores", "show", "a.json"]) == 0
    assert "the assistant's tokens alone" in " ".join(capsys.readouterr().out.split())
    extend = ("--extend", "a.json")
    assert main(words("qwen3_moe", more, Path("b.json"), *long, *extend)) == 2
    line = capsys.readouterr().err
    assert "a.json: was made with --tokens assistant, this calibration with all; calibrate anew, "
    assert "then `scores merge --mixed` adds them up" in line and line.count("\n") == 1
    assert main(words("qwen3_moe", more, Path("b.json"), *assistant, *extend)) == 0
    assert main(words("qwen3_moe", more, Path("c.json"), *long)) == 0
    merge = ["scores", "merge", "a.json", "c.json", "-o", "d.json"]
    assert main(merge) == 2 and "--mixed" in capsys.readouterr().err
    assert main([*merge, "--mixed"]) == 0
