"""A package that is not installed: one line names the extra that brings all that is needed."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT

MODEL = str(ROOT / "fixtures" / "qwen3_moe")
OTHER = str(ROOT / "fixtures" / "kimi_k2")
CALIBRATE = ("calibrate", MODEL, "--dataset", "org/name", "-o", "new.json")
EVALUATE = ("evaluate", f"{MODEL}/scores.pt", "--model", MODEL, "--ratio", "0.5", "--dataset")
EVALUATE += ("org/name", "-o", "new.json")
ALL = ("torch", "transformers", "psutil", "datasets", "s3fs", "gcsfs")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

needs_torch = pytest.mark.torch


@pytest.mark.parametrize(
    ("words", "hidden", "extra"),
    [
        (CALIBRATE, ALL, "calibrate"),
        pytest.param(CALIBRATE, ("torch",), "calibrate", marks=needs_torch),
        pytest.param(CALIBRATE, ("transformers",), "calibrate", marks=needs_torch),
        pytest.param(CALIBRATE, ("psutil",), "calibrate", marks=needs_torch),
        pytest.param(CALIBRATE, ("datasets",), "calibrate", marks=needs_torch),
        ((*CALIBRATE[:-1], "new.pt"), ALL, "calibrate"),
        (EVALUATE, ALL, "calibrate"),
        pytest.param(EVALUATE, ("psutil",), "calibrate", marks=needs_torch),
        pytest.param(EVALUATE, ("datasets",), "calibrate", marks=needs_torch),
        (("verify", MODEL, OTHER, "--architecture"), ALL, "architecture"),
        pytest.param(
            ("verify", MODEL, OTHER, "--architecture"),
            ("transformers",),
            "architecture",
            marks=needs_torch,
        ),
        (("scores", "convert", f"{MODEL}/scores.pt", "-o", "new.pt"), ALL, "torch"),
        (("scores", "from-router", MODEL, "-o", "new.pt"), ALL, "torch"),
        (("scores", "plot", f"{MODEL}/scores.pt", "-o", "new.png"), ("matplotlib",), "report"),
        (("inspect", "s3://bucket/model"), ALL, "s3"),
        (("inspect", "s3a://bucket/model"), ALL, "s3"),
        (("inspect", "gs://bucket/model"), ALL, "gs"),
        (("verify", "gcs://bucket/model", MODEL), ALL, "gs"),
        (("plan", f"{MODEL}/scores.pt", "--ratio", "0.5", "--model", "s3://b/m"), ALL, "s3"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else value,
)
def test_the_line_names_the_extra_that_brings_it(
    words: tuple[str, ...],
    hidden: tuple[str, ...],
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in hidden:
        monkeypatch.setitem(sys.modules, package, None)
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "calibrate: " not in line
    assert f"in the clone of shardsurgeon, pip install '.[{extra}]'" in line
    # With that, nothing is missing any more.
    missing = [package for package in hidden if package in line]
    assert missing or extra in ("s3", "gs")
    assert set(missing) <= {re.match(r"[\w-]+", each)[0] for each in EXTRAS[extra]}  # type: ignore[index]


def test_documents_install_extras_that_there_are_from_the_clone() -> None:
    for path in ("README.md", "shardsurgeon/README.md", "CONTRIBUTING.md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "shardsurgeon[" not in text
        named = re.findall(r"\.\[([\w,-]+)\]'", text)
        assert named and {extra for each in named for extra in each.split(",")} <= EXTRAS.keys()
