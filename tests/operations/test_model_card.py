"""The model card: what the Hub reads in it, and what people do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import UsageError
from shardsurgeon.operations import api
from shardsurgeon.operations.card_data import ModelFacts, metadata_of, model_facts
from shardsurgeon.operations.model_card import (
    Placement,
    model_card,
    recipe_by_record,
    require_metadata,
)
from tests.operations.workbench import scores_of
from tests.support.hub.models import ROOT, fixture_folder

FAMILIES = ("kimi_k25", "kimi_linear", "deepseek_v3", "qwen3_5_moe", "qwen3_moe", "kimi_k2")


def prune(family: str, out: Path, model: Path | None = None, **how: Any) -> Path:
    plan = api.plan(model or fixture_folder(family), scores_of(family), **(how or {"ratio": 0.5}))
    api.apply(plan, out)
    return out


def facts_of(folder: Path) -> ModelFacts:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.provenance is not None
    return model_facts(checkpoint, read_anatomy(checkpoint), checkpoint.provenance, folder)


def card_of(folder: Path, revision: str | None = None) -> str:
    facts = facts_of(folder)
    return model_card(facts, Placement("me/small", revision, (recipe_by_record(facts),)))


def rewritten(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a model whose publisher's card says something."""
    folder = tmp_path_factory.mktemp("half")
    model = Path(shutil.copytree(fixture_folder("qwen3_moe"), folder / "model"))
    said = {
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "library_name": "vllm",
        "tags": ["chat", "moe"],
        "datasets": ["not/carried-over"],
        "base_model": "org/ancestor",
    }
    text = f"---\n{yaml.safe_dump(said)}---\n# The original\n"
    (model / "README.md").write_text(text, encoding="utf-8")
    return prune("qwen3_moe", folder / "half", model)


# Metadata


def test_what_holds_for_the_source_is_carried_over(half: Path) -> None:
    data = ModelCard(card_of(half)).data
    assert isinstance(data, ModelCardData)
    assert data.license == "other"
    assert (data.license_name, data.license_link) == ("tiny-license", "LICENSE")
    assert data.language == ["en", "zh"]
    assert (data.pipeline_tag, data.library_name) == ("text-generation", "vllm")
    assert data.tags == ["chat", "moe", "reap", "pruned", "expert-pruning", "shardsurgeon"]
    assert data.datasets is None


def test_the_base_model_is_what_the_record_names(half: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(half, tmp_path / "copy"))

    def name(record: Any) -> None:
        record["steps"][0]["source"] |= {"name": "org/Tiny", "revision": "0123456789abcdef"}

    rewritten(copy, "calibration/reap_pruning_metadata.json", name)
    card = card_of(copy)
    data = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    assert (data["base_model"], data["base_model_relation"]) == (["org/Tiny"], "finetune")
    assert "[org/Tiny](https://huggingface.co/org/Tiny) without 50 %" in card
    assert "`org/Tiny` at `0123456789ab`" in card
    assert "--model org/Tiny@0123456789abcdef" in card


def test_else_it_is_what_the_sources_card_names(half: Path) -> None:
    assert ModelCard(card_of(half)).data.base_model == ["org/ancestor"]


def test_without_either_there_is_none(tmp_path: Path) -> None:
    card = card_of(prune("qwen3_moe", tmp_path / "out"))
    assert "base_model" not in card
    assert "`qwen3_moe` without 50 % of its experts" in card


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no metadata",
        "---\nlicense: [mit\n---\n",
        "---\n- a\n- list\n---\n",
        "---\n1: 2\nlicense: mit\n---\n",
        "---\nmodel-index: 7\n---\n",
        "---\n---\n",
        "\ufeff---\nlicense: mit\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
    ],
)
def test_a_strangers_metadata_never_stops_a_push(half: Path, text: str, tmp_path: Path) -> None:
    assert isinstance(metadata_of(text), dict) or metadata_of(text) == {}
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    (copy / "README.md").write_text(text, encoding="utf-8")
    assert "README.source.md" in card_of(copy)


def test_a_card_that_is_no_text_never_stops_a_push(half: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    (copy / "README.md").write_bytes(b"---\nlicense: mit\nx: \xff\xfe\n---\n")
    assert ModelCard(card_of(copy)).data.license == "mit"


def test_ones_own_card_must_be_sound() -> None:
    require_metadata("# no metadata", "card.md")
    require_metadata("---\nlicense: mit\n---\n", "card.md")
    with pytest.raises(UsageError, match=r"card\.md: its metadata cannot be read"):
        require_metadata("---\n- a\n---\n", "card.md")


# Figures


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_before_is_that_of_the_source(family: str, tmp_path: Path) -> None:
    source = fixture_folder(family)
    before = after = 0
    for folder in (source, prune(family, tmp_path / "out")):
        before, after = after, 0
        for shard in folder.glob("*.safetensors"):
            # Not every dtype is one of numpy's, and there are no holes: the file minus its header.
            data = shard.read_bytes()
            after += len(data) - 8 - int.from_bytes(data[:8], "little")
    facts = facts_of(tmp_path / "out")
    assert (facts.before.nbytes, facts.after.nbytes) == (before, after)


def test_the_parameters_are_counted_on_both_sides(half: Path) -> None:
    facts = facts_of(half)
    for extent, folder in ((facts.before, fixture_folder("qwen3_moe")), (facts.after, half)):
        shapes = []
        for shard in folder.glob("*.safetensors"):
            with safe_open(shard, "np") as file:
                names = list(file.keys())
                shapes += [file.get_slice(name).get_shape() for name in names]
        assert extent.parameters == sum(int(np.prod(shape)) for shape in shapes)


def test_the_table_says_what_became_smaller(half: Path) -> None:
    card = card_of(half)
    assert "| Experts per MoE layer | 16 | 8 |" in card
    layers = len(facts_of(half).provenance.layers)
    assert f"| Experts in all | {16 * layers} | {8 * layers} |" in card
    assert re.search(r"\| Weights \| [\d.]+ kB \| [\d.]+ kB \|", card)


def test_layers_that_differ_are_listed_and_no_stock_engine_is_named(tmp_path: Path) -> None:
    kept = {1: 16, 2: 8, 3: 12}
    listed = {"kept": {str(layer): list(range(count)) for layer, count in kept.items()}}
    (tmp_path / "keep.json").write_text(json.dumps(listed))
    model = fixture_folder("kimi_k25")
    plan = api.plan(model, plan_file=tmp_path / "keep.json", allow_nonuniform=True)
    api.apply(plan, tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert "8 to 16 of 32 stay, in 3 MoE layers" in card
    assert "| 1 | 32 | 16 |\n| 2 | 32 | 8 |\n| 3 | 32 | 12 |" in card
    assert "vllm serve" not in card and "num_routed_experts_per_layer" in card
    assert "--allow-nonuniform" in card


def test_super_experts_mtp_layers_and_scores_are_told(tmp_path: Path) -> None:
    out = prune("deepseek_v3", tmp_path / "out", ratio=0.5, preserve_super_experts=True)
    card = card_of(out)
    assert "- 1 super expert preserved whatever the saliency, in layer 1\n" in card
    assert "- The experts of MTP layer 3 were chosen by the norm of their router rows" in card
    assert "- Scores: [calibration/scores.pt](calibration/scores.pt) (`total_tokens` " in card
    assert "| `deepseek_v3` | 24 → 12 | ratio 0.5, rounded floor | `reap` |" in card


def test_words_of_a_score_file_stay_words(half: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    scores = {"scores": {"0": [1.0, 2.0]}, "dataset": "a`b\n# Heading | <b> $use", "samples": 12345}
    (copy / "calibration" / "mine.json").write_text(json.dumps(scores))
    card = card_of(copy)
    assert "(`dataset` `ab # Heading | <b> $use`, `samples` `12,345`)" in card


def test_a_prune_of_a_prune_tells_both(half: Path, tmp_path: Path) -> None:
    out = prune("qwen3_moe", tmp_path / "out", half, keep=4)
    card = card_of(out)
    assert "| 16 → 8 |" in card and "| 8 → 4 |" in card
    assert "4 of 16 stay" in card
    assert facts_of(out).before == facts_of(half).before


def test_the_card_says_whose_plan_was_used(tmp_path: Path) -> None:
    """A plan made for one model serves a fine-tune of it, with the saliencies of the former."""
    model = fixture_folder("qwen3_moe")
    plan = tmp_path / "plan.json"
    api.plan(model, scores_of("qwen3_moe"), ratio=0.5).write_plan(plan)
    other = Path(shutil.copytree(model, tmp_path / "fine-tune"))
    rewritten(other, "config.json", lambda config: config.update(finetuned=True))
    out = tmp_path / "out"
    api.apply(api.plan(other, plan_file=plan), out)
    card = card_of(out)
    assert "| `fine-tune` | 16 → 8 | a keep-list | a keep-list made for `qwen3_moe` |" in card
    assert "- The saliencies are those of `qwen3_moe`, whose plan was used." in card
    own = tmp_path / "own"
    api.apply(api.plan(model, plan_file=plan), own)
    assert "made for" not in card_of(own) and "whose plan" not in card_of(own)


# How to use it, and how to make it again


def test_the_models_own_code_is_mentioned_where_it_has_some(half: Path, tmp_path: Path) -> None:
    assert "trust" not in card_of(half)
    card = card_of(prune("kimi_k25", tmp_path / "out"), "65pct")
    assert "vllm serve me/small --revision 65pct --trust-remote-code\n" in card
    [python] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(python, "card", "exec")
    assert 'from_pretrained("me/small", revision="65pct", trust_remote_code=True' in python


def test_the_snippet_is_of_the_kind_of_the_model(half: Path) -> None:
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in card_of(half)


@pytest.mark.parametrize(
    ("family", "how"),
    [("qwen3_moe", {"keep": 6}), ("deepseek_v3", {"ratio": 0.5, "mtp": "drop"})],
)
def test_the_command_of_the_record_makes_the_same_weights(
    family: str, how: dict[str, Any], tmp_path: Path
) -> None:
    out = prune(family, tmp_path / "out", **how)
    shutil.copytree(fixture_folder(family), tmp_path / family)
    shutil.copytree(out / "calibration", tmp_path / "calibration")
    [line] = re.findall(r"^shardsurgeon (apply .*)$", card_of(out), flags=re.MULTILINE)
    subprocess.run(
        [sys.executable, "-m", "shardsurgeon", *line.split(), "-o", "again"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    made = [path for path in out.glob("*") if path.suffix in (".safetensors", ".json")]
    assert made
    for path in made:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_scientist_finds_the_paper(half: Path) -> None:
    assert "eprint        = {2510.13999}" in card_of(half)


def test_names_of_a_hostile_model_become_neither_code_nor_markup(
    half: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "out"))
    evil = "AutoModelForX; import os\nos.system('x') #"
    rewritten(out, "config.json", lambda config: config.update(auto_map={evil: "x.Y"}))

    def spoil(record: Any) -> None:
        record["steps"][0]["source"]["name"] = "a`</code><script>|x"
        record["steps"][0]["metric"] = "r`|<b>"
        record["metric"] = record["steps"][0]["metric"]

    rewritten(out, PROVENANCE_NAME, spoil)
    card = card_of(out)
    assert "os.system" not in card
    # In code nothing is markup; a bar of theirs ends no cell.
    for line in re.sub(r"```.*?```", "", card, flags=re.DOTALL).splitlines():
        outside = re.sub(r"`[^`]*`", "", line)
        assert "<script>" not in outside and "<b>" not in outside
    assert "`a</code><script>\\|x`" in card and "`r\\|<b>`" in card


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.5, "| ratio 0.5, rounded floor |"), (0.65, "| ratio 0.65 asked for, 50 % removed, ")],
)
def test_a_ratio_that_groups_changed_is_not_the_share_removed(
    ratio: float, said: str, tmp_path: Path
) -> None:
    # 24 experts in 4 groups: of 9 to keep they make 12.
    assert said in card_of(prune("deepseek_v3", tmp_path / "out", ratio=ratio))
