"""The verifier reads quantization lists itself, and compares what they mean, not their text."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardsurgeon
from shardsurgeon.errors import ConfigError
from tests.fuzz import quantization_lists as lists
from tests.support import engines, tiny

RETAINED = {1: (0, 1, 5, 12), 2: (1, 2, 3, 13), 3: (4, 5, 6, 7)}
TRIES = {"quick": 300, "full": 1500, "long": 10_000}
NAME = "model.layers.{}.mlp.experts.{}.up_proj"
NUMBER = re.compile(r"[0-9]+")


def spoiled(section: Any, numbers: random.Random) -> Any:
    """A section with a number of one of its entries changed, or an entry less, or one more."""
    content = json.loads(json.dumps(section))
    places = [key for key, value in content.items() if isinstance(value, list | dict) and value]
    key = numbers.choice(places)
    value = content[key]
    if isinstance(value, dict):
        items = list(value.items())
        place = numbers.randrange(len(items))
        entry, said = items.pop(place)
        if numbers.random() < 0.7:
            new = NUMBER.sub(lambda match: str(numbers.randrange(lists.KEPT)), entry)
            items.insert(place, (new, said))
        content[key] = dict(items)
    else:
        place = numbers.randrange(len(value))
        if numbers.random() < 0.3 or not isinstance(value[place], str):
            del value[place]
        else:
            value[place] = NUMBER.sub(
                lambda match: str(numbers.randrange(lists.KEPT)), value[place]
            )
    return content


def test_a_spoiled_list_that_engines_read_otherwise_is_found(loop: str) -> None:
    numbers, found = random.Random("spoiled"), 0
    methods = [m for m in lists.METHODS if m not in ("mlx", "compressed-tensors")]
    pieces = [piece for seed in lists.seeds() for piece, _ in lists.entries_of(seed[5:])]
    for _ in range(TRIES[loop]):
        method = numbers.choice(methods)
        entries = [
            NUMBER.sub(lambda match: str(numbers.choice([*range(1, 6), 12, 13])), piece)
            for piece in numbers.choices(pieces, k=3)
        ]
        entries = list(dict.fromkeys(entries))
        before = engines.section_of(method, entries, [1, 2, 1][: len(entries)])
        try:
            after = lists.pruned(method, before, RETAINED)
        except ConfigError:
            continue
        if not any(after[key] for key, _ in engines.SCHEMES[method][0]):
            continue  # nothing is left to spoil
        wrong = spoiled(after, numbers)
        if engines.differing(method, before, wrong, lists.left(RETAINED)):
            assert lists.verified(method, before, wrong, RETAINED), (before, wrong)
            found += 1
    assert found > TRIES[loop] // 20


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([r"re:.*\.5\.up_proj"], [r"re:.*\.5\.up_proj"]),
        ([r"re:.*\.5\.up_proj"], [NAME.format(1, 2)]),
        ([r"re:.*\.5\.up_proj"], [NAME.format(1, 2), NAME.format(3, 1), NAME.format(2, 1)]),
        ([r"re:.*e.perts\.1\..*"], [r"re:.*e.perts\.1\..*"]),
        ([NAME.format(1, 12)], [NAME.format(1, 2)]),
        ([NAME.format(1, 12)], []),
        (["model.layers.2.mlp.experts"], []),
        (["lm_head"], ["lm_head", "model.layers.2.mlp.experts"]),
        ([r"re:.*self_attn.*"], [r"re:.*self_attn.*", r"re:.*shared_experts.*"]),
    ],
)
def test_lists_of_compressed_tensors_are_held_module_by_module(
    before: list[str], wrong: list[str]
) -> None:
    plain = {"quant_method": "compressed-tensors", "config_groups": {}}
    (line,) = lists.verified(
        "compressed-tensors", {**plain, "ignore": before}, {**plain, "ignore": wrong}, RETAINED
    )
    assert line.startswith("config.json: ignore does not mean for model.layers.")


def test_groups_that_changed_places_are_found() -> None:
    before = engines.section_of(
        "compressed-tensors", [NAME.format(1, 5), NAME.format(1, 1)], [1, 2]
    )
    after = lists.pruned("compressed-tensors", before, RETAINED)
    assert lists.verified("compressed-tensors", before, after, RETAINED) == ()
    groups = after["config_groups"]
    groups["group_1"], groups["group_2"] = groups["group_2"], groups["group_1"]
    assert lists.verified("compressed-tensors", before, after, RETAINED)


# Of layer 1 the experts 1 and 3 are left, of layer 2 0 and 5, of the MTP layer 2 and 3.
KEPT = {"1": [1, 3], "2": [0, 5], "3": [2, 3]}
SECTION = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear", r"re:.*\.5\.down_proj"]}},
    "ignore": ["lm_head", r"re:.*\.3\.up_proj", "model.layers.3.eh_proj", NAME.format(2, 5)],
}
IGNORE = ["lm_head", NAME.format(1, 1), NAME.format(3, 1), "model.layers.3.eh_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lists")
    source = folder / "source"
    source.mkdir()
    for name, raw in tiny.files(tiny.config(quantization_config=SECTION)).items():
        (source / name).write_bytes(raw)
    excluded = {"quantization": {"exclude_modules": ["*.5.*", "model.layers.3.eh_proj"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(excluded))
    keep = folder / "keep.json"
    keep.write_text(json.dumps({"kept": KEPT}))
    shardsurgeon.apply(shardsurgeon.plan(source, plan_file=keep), folder / "out")
    return source, folder / "out"


def section(out: Path) -> Any:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def test_what_apply_wrote_out_holds(made: tuple[Path, Path]) -> None:
    source, out = made
    assert section(out)["ignore"] == [*IGNORE, NAME.format(2, 1)]
    assert section(out)["config_groups"]["group_0"]["targets"] == [
        "Linear",
        "model.layers.2.mlp.experts.1.down_proj",
    ]
    assert shardsurgeon.verify(source, out).differences == ()


def dropped(ignore: list[str]) -> Callable[[Any], None]:
    return lambda section: section.update(ignore=ignore)


@pytest.mark.parametrize(
    "ignore",
    [
        SECTION["ignore"],
        IGNORE,
        [*IGNORE, NAME.format(2, 1), NAME.format(2, 0)],
        [*IGNORE, NAME.format(2, 0)],
        ["lm_head", NAME.format(1, 1), "model.layers.3.eh_proj", NAME.format(2, 1)],
        [*IGNORE[1:], NAME.format(2, 1)],
        [*IGNORE, NAME.format(2, 1), "re:.*vision.*"],
        [*IGNORE, NAME.format(2, 1), NAME.format(2, 4)],
    ],
)
def test_a_spoiled_list_of_a_result_is_found(
    ignore: list[str], made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = made
    copy = shutil.copytree(out, tmp_path / "copy")
    content = json.loads((copy / "config.json").read_text())
    content["quantization_config"]["ignore"] = ignore
    (copy / "config.json").write_text(json.dumps(content, indent=2))
    found = shardsurgeon.verify(source, copy).differences
    assert any("ignore" in line for line in found), found


def test_a_spoiled_list_beside_the_config_is_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    copy = shutil.copytree(out, tmp_path / "copy")
    shutil.copy(source / "hf_quant_config.json", copy)
    found = shardsurgeon.verify(source, copy).differences
    assert any(line.startswith("hf_quant_config.json: ") for line in found), found


def test_entries_of_a_dropped_mtp_layer_must_be_gone(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = made
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({"kept": {layer: KEPT[layer] for layer in "12"}}))
    out = tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(source, plan_file=keep, mtp="drop"), out)
    assert section(out)["ignore"] == ["lm_head", NAME.format(1, 1), NAME.format(2, 1)]
    assert shardsurgeon.verify(source, out).differences == ()
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"]["ignore"].append("model.layers.3.eh_proj")
    (out / "config.json").write_text(json.dumps(content, indent=2))
    found = shardsurgeon.verify(source, out).differences
    assert any("ignore" in line for line in found), found


def test_thousands_of_names_mean_what_a_look_at_each_says() -> None:
    """Where a list is long, its texts are looked up and not tried."""
    names = [NAME.format(layer, e) for layer in (1, 2) for e in range(lists.EXPERTS)]
    more = [f"model.layers.{n}.mlp.experts.{e}.w1" for n in range(9) for e in range(200)]
    retained = {1: tuple(range(4)), 2: tuple(range(4)), 3: tuple(range(4))}
    for method in ("awq", "fp8", "modelopt", "bitsandbytes", "auto-round", "torchao"):
        before = engines.section_of(method, [*names, *more], [1] * len([*names, *more]))
        assert lists.verified(method, before, before, retained) == ()
        wrong = engines.section_of(method, [*names[1:], *more], [1] * len([*names[1:], *more]))
        assert len(lists.verified(method, before, wrong, retained)) >= 1
