"""`families`: what is declared, as the files have it, and what an unknown model type is told."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

import shardsurgeon
from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT

DECLARED = {
    path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
    for path in (Path(shardsurgeon.__file__).parent / "families").glob("*.toml")
}


def test_every_declared_family_is_listed_with_its_model_types(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    listed = {family["name"]: family for family in report["families"]}
    assert list(listed) == sorted(DECLARED)
    for name, data in DECLARED.items():
        if "like" not in data:
            assert listed[name]["model_types"] == data["model_types"]
        assert (listed[name]["refusal"] or "") == data.get("refusal", "")
    able = [family for family in listed.values() if family["refusal"] is None]
    assert report["supported"] == len({n for family in able for n in family["model_types"]})


def test_the_list_fits_a_terminal_and_tells_what_cannot_be_pruned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    refused = [name for name, data in DECLARED.items() if "refusal" in data]
    cannot = lines.index(f"{len(refused)} cannot:")
    for name in DECLARED:
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"  {name} "))
        assert (at > cannot) == (name in refused), name


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        (
            "qwen3_mow",
            "the closest are qwen3_moe, qwen3_5_moe, qwen2_moe); did you mean qwen3_moe?",
        ),
        ("zzz", "lists the 118 that are); try --family auto"),
    ],
)
def test_an_unknown_model_type_is_told_the_closest_three_and_where_all_are_listed(
    model_type: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": []}
    (model / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(model)]) == 2
    line = capsys.readouterr().err
    assert "`shardsurgeon families` lists the " in line and line.count("\n") == 1
    assert says.replace("118", str(supported(capsys))) in line


def supported(capsys: pytest.CaptureFixture[str]) -> int:
    assert main(["families", "--json"]) == 0
    found: int = json.loads(capsys.readouterr().out)["supported"]
    return found
