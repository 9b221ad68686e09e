"""Odd values wherever a file has a value that we read: a sentence and status 2, or it works.

Every value of a small config, plan and record is replaced by every odd one, and every key that some
family reads is put there. The quick loop takes a sample, the others more and the fixtures too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.checkpoint.config import (
    OVERRIDES_KEY,
    PER_LAYER_KEY,
    PUBLISHED_KEYS,
    QUANTIZATION_KEYS,
)
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.cli.main import main
from shardsurgeon.families.schema import ConfigKeys, all_families
from tests.fuzz.edits import ODD, Place, as_json, places_in, put
from tests.support import tiny

FIXTURES = Path(__file__).parents[2] / "fixtures"
SAMPLE = {"quick": 150, "full": 1000, "long": 100_000}


def keys_that_families_read() -> list[str]:
    """The last part of every spelling in every family, and the keys that all of them have."""
    found = {PER_LAYER_KEY, OVERRIDES_KEY, *PUBLISHED_KEYS, *QUANTIZATION_KEYS}
    found |= {"model_type", "architectures", "text_config"}
    for family in all_families():
        for field in fields(ConfigKeys):
            value = getattr(family.config, field.name)
            spellings = (value,) if isinstance(value, str) else value
            found.update(part for one in spellings for part in one.split(".") if part != "*")
    return sorted(found - {""})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in tiny.files().items():
        (folder / name).write_bytes(data)
    return folder


def keep_list() -> dict[str, Any]:
    return {"kept": {str(layer): [0, 1, 2, 3] for layer in (1, 2, 3)}, "num_experts": 8}


def cases(documents: dict[str, Any], seed: str, most: int) -> Iterator[tuple[Place, Any, Any]]:
    """(place, odd value, the document with it there) of a sample of all there are."""
    found = [
        (name, place, odd)
        for name, document in documents.items()
        for place in places_in(document)
        for odd in ODD
    ]
    chosen = random.Random(seed).sample(found, min(most, len(found)))
    for name, place, odd in chosen:
        yield place, odd, put(json.loads(json.dumps(documents[name])), place, odd)


def end_well(capsys: pytest.CaptureFixture[str], commands: Iterable[list[str]], what: str) -> None:
    """Each command works, or says in one line on stderr what is wrong with its input."""
    for command in commands:
        status = main(command)
        said = capsys.readouterr().err
        assert status in (0, 2), f"{command[0]}, {what}: status {status}, {said}"
        if status == 2:
            errors = [line for line in said.splitlines() if line.startswith("shardsurgeon: error")]
            assert "--help`" not in said, said  # the command itself is in order
            assert len(errors) == 1 and len(errors[0]) < 1500, f"{command[0]}, {what}: {said}"


def test_odd_values_in_a_config(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    plan = tmp_path / "keep.json"
    plan.write_text(json.dumps(keep_list()))
    quantized = {"quant_method": "fp8", "ignore": ["lm_head"], "bits": 4, "group_size": 32}
    own = tiny.config()
    documents = {
        f"{key} {at}": {**own, key: 1} if not at else {**own, at: {**own, key: 1}}
        for key in keys_that_families_read()
        for at in ("", "text_config")
    }
    documents["whole"] = {**own, "quantization_config": quantized}
    for place, odd, config in cases(documents, "config", SAMPLE[loop]):
        (model / "config.json").write_bytes(as_json(config))
        commands = [
            ["inspect", str(model)],
            ["inspect", str(model), "--family", "auto"],
            ["plan", "--model", str(model), "--plan", str(plan)],
        ]
        end_well(capsys, commands, f"{place} is {str(odd)[:40]!r}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "kimi_k25", "deepseek_v3", "qwen3_5_moe"])
def test_odd_values_in_a_published_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_bytes())
    for place, odd, changed in cases({name: config}, name, SAMPLE[loop] // 4):
        (folder / "config.json").write_bytes(as_json(changed))
        end_well(
            capsys,
            [
                ["inspect", str(folder)],
                ["plan", str(folder / "scores.pt"), "--model", str(folder), "--ratio", "0.5"],
            ],
            f"{place} is {str(odd)[:40]!r}",
        )


def test_odd_values_in_a_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    path = tmp_path / "plan.json"
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({str(n): [e / 8 for e in range(8)] for n in (1, 2, 3)}))
    write = ["plan", str(scores), "--model", str(model), "--keep", "4", "-o", str(path)]
    assert main(write) == 0
    documents = {"plan": json.loads(path.read_bytes()), "keep-list": keep_list()}
    for place, odd, plan in cases(documents, "plan", SAMPLE[loop]):
        path.write_bytes(as_json(plan))
        command = ["plan", "--model", str(model), "--plan", str(path)]
        end_well(capsys, [command], f"{place} is {str(odd)[:40]!r}")


def test_odd_values_in_a_record(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    plan, out = tmp_path / "keep.json", tmp_path / "out"
    plan.write_text(json.dumps(keep_list()))
    assert main(["apply", "--model", str(model), "--plan", str(plan), "-o", str(out)]) == 0
    record = out / PROVENANCE_NAME
    documents = {"record": json.loads(record.read_bytes())}
    for place, odd, changed in cases(documents, "record", SAMPLE[loop]):
        record.write_bytes(as_json(changed))
        what = f"{place} is {str(odd)[:40]!r}"
        end_well(capsys, [["inspect", str(out)]], what)
        # What differs from the source is a finding, with status 1.
        assert main(["verify", str(model), str(out)]) in (0, 1, 2)
        assert "this is a bug" not in capsys.readouterr().err, what
