"""What vLLM is told with a plan turns its config into the pruned one, for every family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.execution.plan import Plan
from shardsurgeon.operations.prune import Pruning, serve_planned
from shardsurgeon.pruning.overrides import Overrides, engine_overrides
from shardsurgeon.storage.source import MemorySource
from tests.families.specimens import builders, fixture, written
from tests.support import tiny

# Dictionaries at the top that are no configs of their own in vLLM, which takes them as a whole.
PLAIN = ("quantization_config", "compression_config", "quantization")
# What --hf-overrides cannot say, and how it is put.
ONLY_A_VIEW: dict[str, str] = {}


def told(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config after vLLM's --hf-overrides."""
    found = deepcopy(dict(config))
    for key, value in overrides.items():
        merged = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = updated(found[key], value) if merged and key not in PLAIN else value
    return found


def updated(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config)
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = updated(found[key], value) if both else value
    return found


def pruned(pruning: Pruning) -> Any:
    return json.loads(dict(pruning.plan.generated_files)[pruning.checkpoint.names.config])


@pytest.mark.parametrize("name", sorted(builders()))
def test_the_overrides_make_the_pruned_config_of_the_models(name: str, tmp_path: Path) -> None:
    folder = written(fixture(name), tmp_path)
    pruning = shardsurgeon.plan(folder, next(folder.glob("scores.*")), ratio=0.5)
    values, problem = pruning.overrides.values, pruning.overrides.problem
    assert problem.partition(",")[0] == ONLY_A_VIEW.get(name, "")
    assert pruning.report.hf_overrides == (None if problem else values)
    if not problem:
        assert values
        assert told(pruning.checkpoint.settings, values) == pruned(pruning)


def overridden(
    before: Mapping[str, Any], after: Mapping[str, Any], **quantization: tuple[str, str]
) -> Overrides:
    """Of a model with settings before and after, and files `<key>.json` beside them."""
    beside = {f"{name}.json": texts for name, texts in quantization.items()}
    files = tiny.files(tiny.config(**before))
    files |= {name: text.encode() for name, (text, _) in beside.items()}
    generated = {name: text.encode() for name, (_, text) in beside.items()}
    generated["config.json"] = json.dumps(tiny.config(**after)).encode()
    checkpoint = open_checkpoint(MemorySource(files, name="tiny"))
    plan = Plan((), tuple(generated.items()), (), (), (), (), "")
    return engine_overrides(checkpoint, dict(plan.generated_files))


def test_what_is_merged_cannot_lose_a_setting_and_what_is_replaced_can() -> None:
    old, new = {"ignore": ["a"], "layers": {"a": 1, "b": 2}}, {"ignore": ["a"], "layers": {"a": 1}}
    found = overridden({"quantization_config": old}, {"quantization_config": new})
    assert found.values == {"quantization_config": new} and not found.problem
    assert found.changes == {("quantization_config", "layers", "b"): None}
    found = overridden({"text_config": {"layers": old}}, {"text_config": {"layers": new}})
    assert found.problem == "text_config.layers.layers.b goes, which no override can say"


def test_of_a_nested_config_only_what_differs_is_told_and_lists_are_whole() -> None:
    old, new = {"experts": 8, "width": 4, "kinds": [1, 2]}, {"experts": 3, "width": 4, "kinds": [1]}
    found = overridden({"text_config": old}, {"text_config": new, "added": [3, 3, 0]})
    assert found.values == {"added": [3, 3, 0], "text_config": {"experts": 3, "kinds": [1]}}
    assert found.changes[("text_config", "kinds")] == [1]


def test_a_quantization_file_that_engines_read_needs_a_view() -> None:
    lists = {"hf_quant_config": ('{"a": [1, 2]}', '{"a": [1]}')}
    assert overridden({}, {}, **lists).problem.startswith("hf_quant_config.json changes")
    # Of a mixed precision, config.json may say no more than that there is one.
    said = {"quantization_config": {"quant_method": "modelopt"}}
    assert overridden(said, said, **lists).problem.startswith("hf_quant_config.json changes")
    # Others are not read beside it.
    other = {"quantize_config": lists["hf_quant_config"]}
    assert overridden({}, {}, **other).problem.startswith("quantize_config.json changes")
    assert not overridden(said, said, **other).problem
    assert not overridden({}, {}, hf_quant_config=("{}", "{}")).problem


def test_lists_that_no_command_takes_need_a_view() -> None:
    names = [f"model.layers.1.mlp.experts.{number}.up_proj" for number in range(5000)]
    found = overridden({}, {"quantization_config": {"ignore": names}})
    assert found.problem == "the lists of quantized modules are too long for a command"


def test_the_command_names_the_model_the_plan_and_the_settings(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, content in tiny.files().items():
        (folder / name).write_bytes(content)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({layer: [n * n / 7 for n in range(8)] for layer in (1, 2)}))
    words = serve_planned(shardsurgeon.plan(folder, scores, keep=4), "plan.json")
    assert words == (
        *("vllm", "serve", str(folder), "--load-format", "shardsurgeon"),
        *("--model-loader-extra-config", '{"plan": "plan.json"}'),
        *("--hf-overrides", '{"n_routed_experts": 4}'),
    )
    dropped = shardsurgeon.plan(folder, scores, keep=4, mtp="drop")
    assert '{"plan": "plan.json", "mtp": "drop"}' in (serve_planned(dropped, "plan.json") or ())
    # Elsewhere than in a folder or on the Hub, vLLM reads nothing.
    far = open_checkpoint(MemorySource(tiny.files(), name="tiny", remote=True))
    assert serve_planned(shardsurgeon.plan(far, scores, keep=4), "plan.json") is None
