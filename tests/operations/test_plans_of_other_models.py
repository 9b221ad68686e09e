"""A plan.json on another model than its own: used where the experts compare, and marked as such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import KeepListError
from tests.cli.standins import in_python
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

FAMILY = "qwen3_moe"
CODE = "import sys; from shardsurgeon.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a plan of it."""
    folder = tmp_path_factory.mktemp("plans")
    model = Path(shutil.copytree(fixture_folder(FAMILY), folder / "original"))
    shardsurgeon.plan(model, scores_of(FAMILY), ratio=0.5).write_plan(folder / "plan.json")
    return model, folder / "plan.json"


def changed(model: Path, to: Path, **settings: Any) -> Path:
    """A copy of a model with other settings in its config."""
    other = Path(shutil.copytree(model, to))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **settings}, indent=2))
    return other


def test_a_plan_says_what_its_model_is(made: tuple[Path, Path]) -> None:
    plan = json.loads(made[1].read_text())
    config = json.loads((made[0] / "config.json").read_text())
    assert plan["model"] == {
        "model_type": "qwen3_moe",
        "num_layers": config["num_hidden_layers"],
        "top_k": config["num_experts_per_tok"],
        "n_group": 1,
        "topk_group": 1,
        "router_width": config["hidden_size"],
        **{
            key: config[key]
            for key in (
                "hidden_size",
                "intermediate_size",
                "moe_intermediate_size",
                "num_attention_heads",
            )
            if key in config
        },
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_size": 128}, "hidden_size is 64, and other has 128"),
        ({"moe_intermediate_size": 48}, "moe_intermediate_size is"),
        ({"num_experts_per_tok": 2}, "top_k is 4, and other has 2"),
        ({"num_attention_heads": 3}, "num_attention_heads is"),
    ],
)
def test_a_plan_of_a_model_with_other_sizes_is_refused_with_the_one_that_differs(
    settings: dict[str, Any], says: str, made: tuple[Path, Path], tmp_path: Path
) -> None:
    other = changed(made[0], tmp_path / "other", **settings)
    with pytest.raises(KeepListError) as caught:
        shardsurgeon.plan(other, plan_file=made[1])
    assert f"was made for original, whose {says}" in str(caught.value)
    ended = in_python(
        CODE, "apply", "--plan", str(made[1]), "--model", str(other), cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert says in ended.stderr and ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2_moe"),
        ("num_layers", 61),
        ("n_group", 8),
        ("topk_group", 4),
        ("router_width", 7168),
        ("hidden_size", [64]),
        ("top_k", None),
    ],
)
def test_every_fact_of_a_plan_counts(
    key: str, value: object, made: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = json.loads(made[1].read_text())
    plan["source"]["config_sha256"] = "0" * 64
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert shardsurgeon.plan(made[0], plan_file=path).report.saliency_of == "original"
    plan["model"][key] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(KeepListError, match=f"whose {key} is "):
        shardsurgeon.plan(made[0], plan_file=path)
    # Where the config is the plan's own there is nothing to compare.
    plan["source"] = json.loads(made[1].read_text())["source"]
    path.write_text(json.dumps(plan))
    assert shardsurgeon.plan(made[0], plan_file=path).report.saliency_of is None


def test_a_plan_of_an_earlier_version_is_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    plan = json.loads(made[1].read_text())
    del plan["model"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert shardsurgeon.plan(made[0], plan_file=path).report.saliency_of is None
    other = changed(made[0], tmp_path / "fine-tune", finetuned=True)
    assert shardsurgeon.plan(other, plan_file=path).report.saliency_of == "original"


def test_the_figures_of_a_fine_tune_are_marked_as_those_of_the_plans_model(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    other = changed(made[0], tmp_path / "fine-tune", finetuned=True)
    words = ("plan", "--plan", str(made[1]), "--model", str(other))
    text = in_python(CODE, *words, cwd=tmp_path, capture_output=True)
    assert text.returncode == 0, text.stderr
    said = " ".join(text.stdout.split())
    assert ", as measured on original" in said
    assert "was made for original, whose config.json is not that of fine-tune" in said
    told = in_python(CODE, *words, "--json", cwd=tmp_path, capture_output=True)
    assert json.loads(told.stdout)["plans"][0]["saliency_of"] == "original"

    own = in_python(
        CODE, "plan", "--plan", str(made[1]), "--model", str(made[0]), "--json", cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    assert json.loads(own.stdout)["plans"][0]["saliency_of"] is None


def test_record_and_card_say_whose_the_saliencies_are(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    other = changed(made[0], tmp_path / "fine-tune", finetuned=True)
    out = tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(other, plan_file=made[1]), out)
    assert shardsurgeon.verify(other, out).holds
    (step,) = json.loads((out / PROVENANCE_NAME).read_text())["steps"]
    digest = json.loads(made[1].read_text())["source"]["config_sha256"]
    assert step["saliency_of"] == {"name": "original", "revision": None, "config_sha256": digest}
    checkpoint = shardsurgeon.open_checkpoint(out)
    assert checkpoint.provenance is not None
    assert checkpoint.provenance.steps[0].saliency_of is not None

    # The record is a keep-list itself: of the fine-tune, not of the original.
    record = out / PROVENANCE_NAME
    assert shardsurgeon.plan(other, plan_file=record).report.saliency_of is None
    assert shardsurgeon.plan(made[0], plan_file=record).report.saliency_of == "fine-tune"

    plain = tmp_path / "plain"
    shardsurgeon.apply(shardsurgeon.plan(made[0], plan_file=made[1]), plain)
    (step,) = json.loads((plain / PROVENANCE_NAME).read_text())["steps"]
    assert "saliency_of" not in step
