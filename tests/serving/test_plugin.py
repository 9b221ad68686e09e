"""The plugin where there is no vLLM: how it is found, and what it would load.

vLLM itself runs it in `test_views.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import shardsurgeon
from shardsurgeon.errors import CheckpointError, SourceChangedError, UsageError
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.serving import vllm_plugin
from shardsurgeon.serving.pruned import PrunedModel, of_plan, of_view
from shardsurgeon.serving.tensors import ViewTensors
from tests.support import tiny

ROOT = Path(__file__).parents[2]
KEPT = 5


class Model:
    """A tiny model, its plan, its view, and the folder that `apply` makes."""

    def __init__(self, work: Path, **settings: Any) -> None:
        self.folder = work / "model"
        self.folder.mkdir()
        for name, content in tiny.files(tiny.config(**settings)).items():
            (self.folder / name).write_bytes(content)
        scores = work / "scores.json"
        scores.write_text(json.dumps({layer: [n * n % 7 for n in range(8)] for layer in (1, 2)}))
        made = shardsurgeon.plan(self.folder, scores, keep=KEPT)
        self.plan = work / "plan.json"
        made.write_plan(self.plan)
        self.view = work / "view"
        self.applied = work / "applied"
        shardsurgeon.apply(made, self.view, view=True)
        shardsurgeon.apply(made, self.applied)

    def of_plan(self) -> PrunedModel:
        return of_plan(str(self.folder), str(self.plan))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path)


def test_the_plugin_is_declared_for_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["vllm.general_plugins"]
    assert declared == {"shardsurgeon": f"{vllm_plugin.__name__}:{vllm_plugin.register.__name__}"}
    every = [*project["dependencies"], *project["optional-dependencies"].values()]
    assert "vllm" not in str(every)


def test_without_vllm_the_plugin_loads_nothing_and_says_so_in_one_line() -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = None\n"
        "from shardsurgeon.serving.vllm_plugin import register\n"
        "register()\n"
        "register()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("--load-format shardsurgeon is not there: this vLLM is not one of 0.32")


def test_a_plan_and_a_view_have_the_tensors_that_apply_writes(model: Model) -> None:
    for found in (model.of_plan(), of_view(str(model.view))):
        names = []
        with ViewTensors(found.shards, found.origin, found.data, "np") as tensors:
            for shard in sorted(model.applied.glob("*.safetensors")):
                for name, wanted in load_file(shard).items():
                    assert np.array_equal(tensors.get_tensor(name), wanted)
                    names.append(name)
            assert sorted(names) == sorted(tensors.keys())


def test_an_engine_without_the_overrides_is_told_them(model: Model) -> None:
    found = model.of_plan()
    config = json.loads((model.folder / "config.json").read_text())
    with pytest.raises(UsageError) as raised:
        found.require_settings(config, config)
    said = "n_routed_experts is 8, with this plan it is 5"
    assert said in str(raised.value)
    assert str(raised.value).endswith("""add --hf-overrides '{"n_routed_experts":5}'""")
    told = {**config, "n_routed_experts": KEPT}
    found.require_settings(told, told)
    # A view brings its config with it.
    of_view(str(model.view)).require_settings(config, config)


def test_an_engine_that_built_other_layers_is_refused(model: Model) -> None:
    found = model.of_plan()
    found.require_counts({"model.layers.1.mlp.experts": KEPT})
    with pytest.raises(UsageError, match=r"built model\.layers\.2.* with 8 experts.* keeps 5"):
        found.require_counts({"model.layers.1.mlp.experts": KEPT, "model.layers.2": 8})


def test_layers_that_keep_different_numbers_are_refused(model: Model) -> None:
    scores = model.plan.with_name("scores.json")
    different = {1: [0, 1, 2, 3], 2: [1, 2, 3], 3: [0, 1, 2, 3]}
    plan = model.plan.with_name("different.json")
    plan.write_text(
        json.dumps({"layers": {n: {"retained": kept} for n, kept in different.items()}})
    )
    made = shardsurgeon.plan(model.folder, None, plan_file=plan, allow_nonuniform=True)
    view = model.plan.with_name("different")
    shardsurgeon.apply(made, view, view=True)
    for open_it in (lambda: of_view(str(view)), lambda: of_plan(str(model.folder), str(plan))):
        with pytest.raises(CheckpointError, match="its layers keep 3 to 4 experts, and vLLM's"):
            open_it()


def test_a_view_whose_source_changed_is_refused(model: Model) -> None:
    shard = next(model.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b" ")
    with pytest.raises((CheckpointError, SourceChangedError), match="when the view was made"):
        of_view(str(model.view))


def test_vllm_reads_of_a_view_the_headers_that_its_shards_have(model: Model) -> None:
    asked: list[Path] = []

    def others(folder: Path) -> dict[str, Any]:
        asked.append(folder)
        return {}

    read = vllm_plugin._with_views(others)
    found = read(model.view)
    names = []
    for path in model.applied.glob("*.safetensors"):
        with safe_open(path, "np") as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                said = found[name]["dtype"], found[name]["shape"]
                assert said == (part.get_dtype(), part.get_shape())
                names.append(name)
    assert found.keys() == set(names) and not asked
    assert read(model.applied) == {} and asked == [model.applied]


def test_settings_that_are_not_ours_go_on_to_vllm() -> None:
    settings = vllm_plugin._settings({"plan": "p", "mtp": "drop", "enable_weights_track": True})
    assert settings == ("p", MtpPolicy.DROP, {"enable_weights_track": True})
    for wrong in ({"plan": 3}, {"mtp": "some"}):
        with pytest.raises(UsageError, match="--model-loader-extra-config"):
            vllm_plugin._settings(wrong)
