"""vLLM serves what no one wrote: views, and plans of a model, give the bits that the folder gives.

Not part of the default run: `pytest -m serving` runs it. It installs this package into vLLM's
environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.cases import CASES, STAND_INS, Case
from tests.serving.environment import ROOT, default_folder, environment, with_this_package
from tests.serving.proof import RATIO, prompts, pruned_checkpoint

pytestmark = pytest.mark.serving

OFFLINE = Path(__file__).with_name("offline.py")
# What all engines have here. The prompts are short.
SETTINGS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "max_logprobs": -1}
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
OURS = {"load_format": "shardsurgeon"}


@dataclass(frozen=True)
class Served:
    """One pruned model in its three forms.

    source: the model; folder: what `apply` made of it; view: what `apply --view` did; plan: a file
    for `apply --plan`; overrides: what `plan` says for --hf-overrides.
    """

    source: Path
    folder: Path
    view: Path
    plan: Path
    overrides: Mapping[str, Any]

    @property
    def planned(self) -> dict[str, Any]:
        """Engine arguments: the model with the plan."""
        extra = {"plan": str(self.plan)}
        told = {"model_loader_extra_config": extra, "hf_overrides": self.overrides}
        return {"model": str(self.source), **OURS, **told}


@pytest.fixture(scope="module")
def engine() -> Path:
    """An interpreter that has vLLM and this package."""
    named = os.environ.get("SHARDSURGEON_SERVING_VENV")
    found = environment(Path(named) if named else default_folder())
    return with_this_package(found).python


def served(family: str, work: Path) -> Served:
    pruned = pruned_checkpoint(family, work)
    view, plan = pruned.folder.with_name("view"), pruned.folder.with_name("plan.json")
    words = [str(pruned.source / "scores.pt"), "--model", str(pruned.source), "--ratio", RATIO]
    command("apply", *words, "--view", "-o", str(view))
    (report,) = json.loads(command("plan", *words, "--json", "-o", str(plan)))["plans"]
    return Served(pruned.source, pruned.folder, view, plan, report["hf_overrides"])


def command(*words: str) -> str:
    run = [sys.executable, "-m", "shardsurgeon", *words]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings_of(case: Case) -> dict[str, Any]:
    """A case's arguments for the server, as those of `vllm.LLM`."""
    found: dict[str, Any] = {"dtype": case.dtype, **SETTINGS}
    name = ""
    for word in case.arguments:
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            found[name] = True
        else:
            found[name] = json.loads(word) if word.startswith("{") else word
    return found


def asked(
    python: Path, work: Path, engines: Sequence[Mapping[str, Any]], *, stand_ins: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run engines one after the other; their answers go to `work`/answers.json."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(STAND_INS)} if stand_ins else {}
    return subprocess.run(
        [python, OFFLINE, work / "answers.json", *map(json.dumps, engines)],
        input=json.dumps(prompts()),
        capture_output=True,
        text=True,
        cwd=work,
        env=variables
        | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )


def answers(
    python: Path, work: Path, engines: Sequence[Mapping[str, Any]], *, stand_ins: bool = False
) -> list[Any]:
    done = asked(python, work, engines, stand_ins=stand_ins)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Any] = json.loads((work / "answers.json").read_text())
    assert len(found) == len(engines)
    return found


def refused(python: Path, work: Path, engine: Mapping[str, Any]) -> str:
    """What an engine says that does not start."""
    done = asked(python, work, [{**settings_of(CASES["qwen3_moe"]), **engine}])
    assert done.returncode
    assert not (work / "answers.json").exists()
    return done.stdout + done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", CASES)
def test_a_view_and_a_plan_give_the_bits_that_the_folder_gives(
    family: str, ranks: int, engine: Path, tmp_path: Path
) -> None:
    case, model = CASES[family], served(family, tmp_path)
    settings = settings_of(case) | (TWO_RANKS if ranks == 2 else {})
    forms = [{"model": str(model.folder)}, {"model": str(model.view), **OURS}]
    # Ranks of a plan are those of a view.
    forms += [model.planned] if ranks == 1 else []
    engines = [{**form, **settings} for form in forms]
    folder, *others = answers(engine, tmp_path, engines, stand_ins=case.stand_ins)
    assert len(folder) == len(prompts())
    assert all(other == folder for other in others)


def test_vllms_own_loader_stops_at_a_view(engine: Path, tmp_path: Path) -> None:
    model = served("qwen3_moe", tmp_path)
    said = refused(engine, tmp_path, {"model": str(model.view)})
    assert "Cannot find any model weights with" in said
    # The same where the index names shards that are not there.
    for shard in model.folder.glob("*.safetensors"):
        shard.unlink()
    said = refused(engine, tmp_path, {"model": str(model.folder)})
    assert "Cannot find any model weights with" in said


def test_what_cannot_be_loaded_is_refused_in_our_words(engine: Path, tmp_path: Path) -> None:
    model = served("qwen3_moe", tmp_path)
    without = {key: value for key, value in model.planned.items() if key != "hf_overrides"}
    said = refused(engine, tmp_path, without)
    line = f"UsageError: {model.source}: num_experts is 16, with this plan it is 8; add --hf-over"
    assert line in said
    said = refused(engine, tmp_path, {"model": str(model.folder), **OURS})
    assert f"UsageError: {model.folder}: is not a view; make one, or add --model-loader" in said
    shard = next(model.source.glob("*.safetensors"))
    os.utime(shard)
    said = refused(engine, tmp_path, {"model": str(model.view), **OURS})
    assert f"CheckpointError: {shard}: was written to or replaced since the view was made" in said


def test_a_draft_of_the_models_own_layers_is_loaded_from_the_view(
    engine: Path, tmp_path: Path
) -> None:
    case, model = CASES["glm4_moe"], served("glm4_moe", tmp_path)
    draft = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    forms = ({"model": str(model.folder)}, {"model": str(model.view), **OURS})
    engines = [{**form, **settings_of(case), **draft} for form in forms]
    folder, view = answers(engine, tmp_path, engines)
    assert view == folder
