"""The documents a newcomer follows say what is true."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from shardsurgeon.cli.main import cli
from tests.cli.standins import ROOT, Run

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
CHECKS = ["ruff check", "ruff format --check", "mypy"]

INSTALL_AND_PRUNE = (
    "python3 -m venv .venv && .venv/bin/pip install . && "
    "(cd fixtures/kimi_k25 && ../../.venv/bin/shardsurgeon apply scores.pt --ratio 0.65)"
)
INSTALL_AND_TEST = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
)


def commands() -> list[str]:
    return re.findall(r"^shardsurgeon (.+)$", README, flags=re.MULTILINE)


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    pattern = re.search(r"grep '(.+)' README.md", CI)
    assert pattern
    found = [line for line in README.splitlines() if re.match(pattern[1], line)]
    assert found == [INSTALL_AND_PRUNE, INSTALL_AND_TEST]


def test_pre_commit_and_the_contributors_run_what_ci_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    listed = " ".join(f'"{check}"' for check in CHECKS)
    assert f"for check in {listed}; do\n" in CI
    assert re.findall(r"entry: python -m (.+)", hooks) == CHECKS
    for check in CHECKS:
        assert f".venv/bin/python -m {check}\n" in CONTRIBUTING


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(*shlex.split(line))
    assert ended.status == 0, ended.stderr


def test_every_command_is_shown_in_the_readme() -> None:
    assert {line.split()[0] for line in commands()} == set(cli.commands)


def test_every_shipped_family_is_listed() -> None:
    for path in (ROOT / "shardsurgeon" / "families").glob("*.toml"):
        assert f"`{path.stem}`" in README


def test_the_walk_through_quotes_the_family_file_as_it_is() -> None:
    quoted = re.findall(r"```toml\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    path = ROOT / "shardsurgeon" / "families" / "kimi_linear.toml"
    shipped = path.read_text(encoding="utf-8")
    assert "".join(shipped.splitlines()[1:]) == "".join("".join(quoted).splitlines()).strip()
    assert tomllib.loads("".join(quoted)) == tomllib.loads(shipped)


def test_the_core_install_names_no_heavy_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert names == {"click", "huggingface_hub", "numpy", "safetensors", "tqdm"}
