"""Plans and scores recognised by content, files that configs name, and globs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.recognition import recognised
from shardsurgeon.checkpoint.side_files import require_sound, side_files
from shardsurgeon.errors import UsageError
from shardsurgeon.operations import api
from shardsurgeon.scores.files import ScoreContent, score_file
from shardsurgeon.storage.source import MemorySource
from tests.pruning.test_keep_lists_of_others import BARE, BY_WORD, PUBLISHED
from tests.scores.test_scores_of_others import RANKINGS, telemetry
from tests.support import torch_file
from tests.support.hub.models import fixture_folder

MODEL = {
    path.relative_to(fixture_folder("qwen3_moe")).as_posix(): path.read_bytes()
    for path in fixture_folder("qwen3_moe").rglob("*")
    if path.is_file()
}


ROW = np.array([0.5, 0.25])


def beside(files: Mapping[str, bytes]) -> Checkpoint:
    return open_checkpoint(MemorySource({**MODEL, **files}))


def plan_json(folder: Path) -> bytes:
    fixture = fixture_folder("qwen3_moe")
    api.plan(fixture, fixture / "scores.pt", keep=8).write_plan(folder / "p.json")
    return (folder / "p.json").read_bytes()


def content(metrics: tuple[str, ...] = ("reap", "ean_sum")) -> ScoreContent:
    row = np.array([0.5, 0.25, 1e-300])
    return ScoreContent(layers={n: dict.fromkeys(metrics, row) for n in (0, 1)})


def test_our_own_plan_is_recognised_under_any_name(tmp_path: Path) -> None:
    found = side_files(beside({"my keep list.json": plan_json(tmp_path), "sub/x.json": b"{}"}))
    assert found.left["my keep list.json"] == "plan"
    assert "sub/x.json" in found.carried


@pytest.mark.parametrize("suffix", ["json", "npz", "safetensors"])
def test_a_score_file_that_was_written_here_is_recognised(suffix: str) -> None:
    name = f"sub/whatever.{suffix}"
    assert recognised(name, score_file(name, content())[:4096]) == "scores"
    assert recognised(name, score_file(name, content(("ean_sum",)))[:4096]) == "scores"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({3: ROW}, "scores"),
        ({"3": ROW, "4": ROW}, "scores"),
        ({"model.layers.3.mlp": ROW}, "scores"),
        ({0: {"expert_frequency": ROW, "reap": ROW}, 1: {}}, "scores"),
        ({"total_tokens": 4096, "scores": {0: ROW}}, "scores"),
        ({"model.layers.3.mlp.gate.weight": ROW, "lm_head.weight": ROW}, None),
        ({"speaker": ROW}, None),
    ],
)
def test_a_file_of_torch_is_told_by_its_first_keys(
    tmp_path: Path, value: dict[object, object], kind: str | None
) -> None:
    head = torch_file.save(value, tmp_path / "a.pt").read_bytes()[:4096]
    assert recognised("sub/a.pt", head) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("scores", "scores"), ("reap_saliency", "scores"), ("speaker", None), ("scores/voice", None)],
)
def test_rows_alone_are_scores_where_the_name_says_so(
    tmp_path: Path, name: str, kind: str | None
) -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    head = torch_file.save(rows, tmp_path / "a.pt").read_bytes()[:4096]
    assert recognised(f"sub/{name}.pt", head) == kind
    assert recognised(f"sub/{name}.json", json.dumps(rows.tolist()).encode()) == kind


def test_a_score_file_of_torch_is_recognised() -> None:
    found = side_files(beside({"old.pt": MODEL["scores.pt"]}))
    assert found.left == {"old.pt": "scores", "scores.pt": "scores"}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('{"0": [1, 5, 7], "1": [0]}', "plan"),
        ('{"kept": {"3": [1, 5]}}', "plan"),
        ('{"dropped": {"layers.3": [1, 5]}}', "plan"),
        ('{"0": {"keep": 2, "kept": [1, 2]}}', "plan"),
        ('{"base_model": "org/m", "per_layer_keep": {"0": [1, 2]}}', "plan"),
        ('{"model.layers.0.mlp": [0, 1]}', "plan"),
        ('{"method": "reap", "num_experts_before": 8}', "plan"),
        ('{"0": [0.5, 1e-9]}', "scores"),
        ('{"L0": {"reap": [0.5, 1]}}', "scores"),
        ('{"total_tokens": 4096, "scores": {"0": {"ean_mean": [0.5]}}}', "scores"),
        ('{"saliency": [[0.5, 1.0]]}', "scores"),
        ('{"experts": [{"layer": 0, "expert": 3, "reap": 0.5}]}', "scores"),
        ("{}", None),
        ('{"model.layers.0.self_attn.q_proj": {"bits": 4}}', None),
        ('{"model.layers.0.mlp": {"bits": 4, "group_size": [128]}}', None),
        ('{"model.layers.0.mlp": {"group_size": [128]}}', None),
        ('{"version": 1, "quant": {"model.layers.0.mlp": {"block": [128, 128]}}}', None),
        ('{"map": {"0": [1, 2]}}', None),
        ('{"0": "cat", "1": "dog"}', None),
        ('{"vocab": {"0": 15, "1": 16}}', None),
        ('{"layers": 61, "kept": true}', None),
        ('["a", "b"]', None),
        ("no JSON at all", None),
    ],
)
def test_json_of_any_name_is_told_by_how_it_begins(said: str, kind: str | None) -> None:
    for text in (said, json.dumps(json.loads(said), indent=2) if kind else said):
        assert recognised("any.json", text.encode()) == kind
        assert recognised("any.json", b"\xef\xbb\xbf" + text.encode()) == kind


@pytest.mark.parametrize(
    "value", [*BY_WORD.values(), *BARE.values(), *RANKINGS.values(), telemetry()]
)
def test_whatever_is_read_as_a_plan_or_as_scores_is_recognised(value: object) -> None:
    texts = [value] if isinstance(value, str) else [json.dumps(value), json.dumps(value, indent=2)]
    for text in texts:
        assert recognised("my scores.jsonl", text.encode()[:4096]) in ("plan", "scores")


@pytest.mark.parametrize(
    "again",
    ['"a": 1, ', '"layer": 1, ', '"kept": "a", ', '{"scores": ', '"rank', '"a.0.', '"', "[ ", "9."],
)
def test_hostile_beginnings_take_no_more_than_a_moment(again: str) -> None:
    for begun in ("{", "[", '{"0": {', '"layer": 1, ', "PK data.pkl"):
        head = (begun + again * 4096)[:4096].encode()
        for suffix in ("json", "pt", "npz", "safetensors"):
            assert recognised(f"a.{suffix}", head) in (None, "scores", "plan")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published keep-lists here")
def test_published_drop_maps_are_recognised() -> None:
    for path in PUBLISHED.glob("*drop_map*.json"):
        if "summary" not in path.name:
            assert recognised(path.name, path.read_bytes()[:4096]) == "plan"


def test_other_tensors_are_not_taken_for_scores() -> None:
    assert recognised("a.pt", b"PK\3\4archive/data.pkl\x80\x02ccollections\nOrderedDict") is None
    assert recognised("a.npz", b"PK\3\4" + bytes(26) + b"voice_embedding.npy") is None
    assert recognised("a/x.safetensors", b'\x40\0\0\0\0\0\0\0{"layers.0.weight": {}') is None


def test_what_the_configs_name_is_carried_along_unless_it_is_hidden_or_a_secret() -> None:
    config = json.loads(MODEL["config.json"])
    config["ngram"] = {"tables": ["./tables/ngram.bin", "other.bin"]}
    tokenizer = {"vocab_file": "plain.h5", "auth": ".env", "hidden": ".dot", "key": "a.pem"}
    files = ["tables/ngram.bin", "plain.h5", "unnamed.h5", ".env", ".dot", "a.pem"]
    found = side_files(
        beside(
            {
                **dict.fromkeys(files, b"x"),
                "config.json": json.dumps(config).encode(),
                "tokenizer_config.json": json.dumps(tokenizer).encode(),
            }
        )
    )
    assert {"tables/ngram.bin", "plain.h5"} <= {*found.carried}
    assert set(found.left) == {"unnamed.h5", ".env", ".dot", "a.pem", "scores.pt"}


def test_a_tokenizer_config_that_is_no_json_hinders_nothing() -> None:
    assert "a.h5" in side_files(beside({"a.h5": b"x", "tokenizer_config.json": b"{"})).left


def test_globs_decide_otherwise() -> None:
    files = dict.fromkeys(["wandb/a/b.json", "train.log", "sub/x.log", "docs/a.md"], b"x")
    checkpoint = beside(files)
    found = side_files(checkpoint, include=["wandb", "*.log"], exclude=["sub/", "*.md"])
    assert {"wandb/a/b.json", "train.log"} <= {*found.carried}
    assert found.left["sub/x.log"] == found.left["docs/a.md"] == "excluded"
    assert found.left["README.md"] == "excluded"


@pytest.mark.parametrize(
    ("include", "exclude", "problem"),
    [
        (["nothing*"], [], "--include: nothing. fits none of the"),
        ([], ["nothing/"], "--exclude: nothing/ fits none of the"),
        ([], ["config.json"], "--exclude: config.json would exclude config.json"),
        ([], ["*.json"], "would exclude config.json"),
        ([], ["model-*"], "--exclude: model-. fits none|would exclude model-"),
        ([], ["*"], "would exclude config.json"),
    ],
)
def test_a_glob_without_a_meaning_is_refused(
    include: list[str], exclude: list[str], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        require_sound(beside({}), include, exclude)


def test_of_a_far_model_only_doubtful_beginnings_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = plan_json(tmp_path) + b" " * 100_000
    files = {**MODEL, "keep.json": long, "vision/model.safetensors": b"x" * 9}
    source = MemorySource(files, remote=True)
    checkpoint = open_checkpoint(source)
    asked: list[tuple[str, int, int]] = []
    real = source.read

    def read(name: str, begin: int, end: int) -> bytes:
        asked.append((name, begin, end))
        return real(name, begin, end)

    monkeypatch.setattr(source, "read", read)
    assert checkpoint.left_behind == {"keep.json": "plan", "scores.pt": "scores"}
    assert checkpoint.left_behind is checkpoint.left_behind
    size = len(MODEL["tokenizer_config.json"])
    heads = [("keep.json", 0, 4096), ("scores.pt", 0, len(MODEL["scores.pt"][:4096]))]
    assert sorted(asked) == [*heads, ("tokenizer_config.json", 0, size)]
