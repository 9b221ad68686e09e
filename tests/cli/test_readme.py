"""The documents a newcomer follows say what is true."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from shardsurgeon._version import __version__
from shardsurgeon.cli.main import cli
from shardsurgeon.cli.scores import scores_commands
from shardsurgeon.families.schema import all_families
from tests.cli.standins import ROOT, Run, lay_recipes

# Every document of ours, by its path; those of the fixtures stand for a publisher's own.
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in (".", "shardsurgeon", "kernels", "tests")
    for path in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
}
README, CONTRIBUTING = DOCUMENTS["README.md"], DOCUMENTS["CONTRIBUTING.md"]
FAMILIES = DOCUMENTS["shardsurgeon/families/README.md"]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
CHECKS = ["ruff check", "ruff format --check", "mypy"]

INSTALL_AND_PRUNE = (
    "python3 -m venv .venv && .venv/bin/pip install . && "
    "(cd fixtures/kimi_k25 && ../../.venv/bin/shardsurgeon apply scores.pt --ratio 0.65)"
)
INSTALL_AND_TEST = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && "
    ".venv/bin/python -m pytest --loop full -n 2"
)


def commands(*names: str) -> list[str]:
    """The lines of the named documents that call the command line, each once."""
    text = "\n".join(DOCUMENTS[name] for name in names)
    return list(dict.fromkeys(re.findall(r"^shardsurgeon (.+)$", text, flags=re.MULTILINE)))


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


@pytest.mark.parametrize("line", commands("README.md", "shardsurgeon/README.md", "CONTRIBUTING.md"))
def test_every_command_of_the_documents_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_recipes(tmp_path)
    ended = run(*shlex.split(line))
    assert ended.status == 0, ended.stderr


def test_every_command_is_shown_in_the_readme() -> None:
    assert {line.split()[0] for line in commands("README.md")} == set(cli.commands)


def test_the_guide_shows_every_command_of_the_scores() -> None:
    lines = [line.split() for line in commands("shardsurgeon/README.md")]
    assert {words[1] for words in lines if words[0] == "scores"} == set(scores_commands.commands)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_every_shipped_family_is_listed() -> None:
    for family in all_families():
        assert f"| `{family.name}` |" in FAMILIES
    declared = sum(not family.refusal for family in all_families())
    assert f"| families | {declared} declared: " in README


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_link_leads_to_something(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = folder / path if path else ROOT / name
        assert found.exists(), target
        if heading:
            assert heading in anchors(found.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """What a link to a heading says: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_program_that_a_document_runs_is_there(name: str) -> None:
    for path in re.findall(r"python ((?:tests|kernels|fixtures)/\S+\.py)", DOCUMENTS[name]):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (tests\.[\w.]+)", DOCUMENTS[name]):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_that_a_document_names_is_there(name: str) -> None:
    """Files and folders between back quotes, from the top or from the package."""
    known = re.findall(r"`([\w./]+/[\w.]*)`", DOCUMENTS[name])
    assert known
    for path in known:
        assert (ROOT / path).exists() or (ROOT / "shardsurgeon" / path).exists(), path


def test_the_walk_through_quotes_the_family_file_as_it_is() -> None:
    quoted = re.findall(r"```toml\n(.*?)```", FAMILIES, flags=re.DOTALL)
    path = ROOT / "shardsurgeon" / "families" / "kimi_linear.toml"
    shipped = path.read_text(encoding="utf-8")
    assert "".join(shipped.splitlines()[1:]) == "".join("".join(quoted).splitlines()).strip()
    assert tomllib.loads("".join(quoted)) == tomllib.loads(shipped)


def test_the_core_install_names_no_heavy_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert names == {"click", "huggingface_hub", "numpy", "safetensors", "tqdm"}


def test_the_version_stands_in_the_changelog_and_in_the_citation() -> None:
    latest = re.search(r"^## (\S+)", DOCUMENTS["CHANGELOG.md"], flags=re.MULTILINE)
    assert latest and latest[1] == __version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [__version__]
