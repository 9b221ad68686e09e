"""The direction of imports, the public face, and what the light commands may not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import shardsurgeon

PACKAGE = Path(shardsurgeon.__file__).parent

# From the command line down to the bytes: a module imports from ranks below its own, and from
# its own package, which a star marks. Two packages in one rank do not import each other.
# Exempt are `__init__`, which finds its names when they are asked for, and `__main__`.
RANKS = [
    ["cli*"],
    ["operations*", "serving*"],
    ["layerwise*"],
    ["pruning*", "verification*"],
    ["scores*"],
    ["checkpoint*"],
    ["execution*", "families*"],
    ["storage*"],
    ["reports"],
    ["units"],
    ["errors", "_version"],
]
# The package, and the modules, that may import torch and transformers; the latter inside of
# functions (`scores.files` to write a .pt file).
ENGINES = {"torch", "transformers", "vllm"}
ENGINE_ROOMS = ("layerwise.", "serving.", "checkpoint.transformers_model", "scores.files")
# All else in pruning/ decides and plans: these read what goes beside the weights, and keep-lists.
MAY_OPEN_FILES = {"pruning.output_files", "pruning.keep_list_files"}
CARDS = {"operations.card_data", "operations.model_card"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Our own modules that a module imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("shardsurgeon."):
            base = (node.module or "").removeprefix("shardsurgeon").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base or "__init__")
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {
                n.removeprefix("shardsurgeon.") for n in names if n.startswith("shardsurgeon.")
            }
    return frozenset(found)


def outside_imports(module: str, *, at_top: bool = False) -> set[str]:
    """Libraries that a module imports, anywhere or at its top alone."""
    nodes = tree(module).body if at_top else ast.walk(tree(module))
    names = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    return {name.split(".")[0] for name in names}


def reachable(package: str) -> set[str]:
    """What the modules of a package import, and what that imports, and so on."""
    seen: set[str] = set()
    todo = [name for name in MODULES if name.split(".")[0] == package]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += imports(module)
    return {module.split(".")[0] for module in seen}


def rank_of(module: str) -> int:
    package = module.split(".")[0]
    for number, rank in enumerate(RANKS):
        if package in rank or f"{package}*" in rank:
            return number
    raise AssertionError(f"{module} stands in none of RANKS: give it its place")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__", "__main__"}))
def test_imports_go_down_only(module: str) -> None:
    package = module.split(".")[0]
    for other in imports(module):
        inside = other.split(".")[0] == package and f"{package}*" in RANKS[rank_of(module)]
        below = rank_of(other) > rank_of(module)
        assert inside or below, f"{module} imports {other}, which is not below it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in imports(module) - {"__init__"}:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_verifier_can_reach_neither_the_planner_nor_the_executor() -> None:
    assert not reachable("verification") & {"pruning", "execution"}


def test_nothing_of_the_house_needs_the_engines_loaders() -> None:
    """A view is served by `serving/`, and everything else works without it."""
    users = {module for module in MODULES if any(i.startswith("serving") for i in imports(module))}
    assert {module.split(".")[0] for module in users} <= {"serving", "__init__"}


def test_the_executor_knows_no_experts() -> None:
    assert reachable("execution") == {"execution", "storage", "units", "errors", "_version"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("pruning.")))
def test_what_decides_touches_no_files(module: str) -> None:
    if module in MAY_OPEN_FILES:
        return
    calls = [node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    names |= {call.attr for call in calls if isinstance(call, ast.Attribute)}
    assert not names & {"open", "fdopen", "FileIO", "stat"}
    assert not names & {"read_bytes", "read_text", "write_bytes", "write_text"}
    assert not outside_imports(module) & {"io", "shutil", "time"}
    assert not imports(module) & {"storage.files", "storage.local", "storage.system"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_and_foreign_libraries_stay_in_their_rooms(module: str) -> None:
    found = outside_imports(module)
    assert not found & ENGINES or module.startswith(ENGINE_ROOMS)
    if not module.startswith("layerwise."):
        assert not outside_imports(module, at_top=True) & ENGINES
    if not module.startswith("cli"):
        assert not found & {"click"}
        # A notebook may show a bar.
        assert "tqdm" not in found or module == "operations.bars"
        assert "tqdm" not in outside_imports(module, at_top=True)
    if not module.startswith("storage.") and module not in (
        "operations.card_data",
        "operations.model_card",
    ):
        assert not found & {"huggingface_hub", "fsspec"}
    if module.startswith("cli") or module == "pruning.request":
        assert "numpy" not in found


def test_no_command_imports_an_engine_before_it_is_asked_to() -> None:
    rooms = [f"shardsurgeon.{name}" for name in MODULES if name.startswith("operations.")]
    code = f"import {', '.join(rooms)}, sys; assert not {ENGINES} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_family_is_named_outside_its_own_file() -> None:
    families = {path.stem for path in (PACKAGE / "families").glob("*.toml")}
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                assert not families & {c for c in constants if isinstance(c, str)}, module


def test_a_package_says_what_it_is_and_imports_nothing() -> None:
    for path in PACKAGE.rglob("*/__init__.py"):
        docstring, *more = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), path
        # One is a public face besides: engines' users import from it, and it looks names up when
        # they are used, as `shardsurgeon` itself does.
        assert not more or path.parent.name == "serving", path


def test_the_engines_loaders_are_imported_when_they_are_used() -> None:
    code = (
        "import shardsurgeon.serving, sys\n"
        "assert 'shardsurgeon.serving.pretrained' not in sys.modules\n"
        "from shardsurgeon.serving import load_pruned\n"
        f"assert not {ENGINES} & sys.modules.keys()\n"
        "assert shardsurgeon.serving.__all__ == ['load_pruned']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_reads_like_a_table_of_contents() -> None:
    """Eleven packages, and beside them nothing of the domain."""
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    ranked = {name.removesuffix("*") for rank in RANKS for name in rank if name.endswith("*")}
    assert packages == ranked and len(packages) == 11
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__", "__main__", "_version", "errors", "reports", "units"}


def test_the_drawing_for_contributors_is_the_real_one() -> None:
    """Its lines are the ranks, in their order; folders are packages, and all say what they are."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^```layout\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [re.fullmatch(r"((?:\w+(?:/|\.py)  ?)+) *(\S.+)", one) for one in drawing.splitlines()]
    assert all(lines), drawing
    drawn = [re.findall(r"\w+(?:/|\.py)", line[1]) for line in lines if line]
    named = [[name.replace("/", "*").removesuffix(".py") for name in names] for names in drawn]
    assert named == RANKS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_too_long_to_read_in_one_sitting(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 490


def test_the_public_face_is_sorted_and_whole() -> None:
    assert shardsurgeon.__all__ == sorted(shardsurgeon.__all__)
    for name in shardsurgeon.__all__:
        assert getattr(shardsurgeon, name).__module__.startswith("shardsurgeon"), name


def test_public_functions_are_not_hidden_by_modules_of_their_name() -> None:
    rooms = ", ".join(f"shardsurgeon.{name}" for name in MODULES if name.startswith("operations."))
    code = (
        f"import {rooms}, shardsurgeon\n"
        "assert all(callable(getattr(shardsurgeon, n)) for n in shardsurgeon.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
