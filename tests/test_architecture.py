"""The direction of imports, the public face, and what the light commands may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardsurgeon

PACKAGE = Path(shardsurgeon.__file__).parent

# From the street to the cellar: a module may import from lines below its own, and its own line
# only where it says so with a star.
LINES = [
    ["__main__"],
    ["cli*"],
    ["api"],
    ["publishing"],
    ["operations", "scoreoperations"],
    ["calibration*"],
    ["architecture*", "hub*", "planreport", "assembly", "proving"],
    ["execution", "verification*", "finishing", "naming", "mixedprecision"],
    ["smallfiles"],
    ["filling", "outlets"],
    ["job", "leftovers"],
    ["copying", "crew", "workplace", "unchanged", "decision", "planning", "modelconfig", "sizing"],
    ["scorecomparison"],
    ["downloads", "mtplayers", "scoreviews"],
    ["moves"],
    ["lineage", "selection", "allocation", "routerscores", "weightnorms", "quantlists"],
    ["cuts", "rankings"],
    ["journal", "surgeryplan", "scores", "scorefiles", "keeplists", "progress", "reports"],
    ["scoretables", "keepfiles"],
    ["anatomy", "opening"],
    ["likely", "confignumbers", "origins"],
    ["checkpoint", "roles", "blocks", "parameters", "counts", "idtables", "storedweights"],
    ["provenance", "families*", "sources*", "cardnames"],
    ["formats*", "durable", "layernames", "quantnames"],
    ["system"],
    ["units"],
    ["errors", "__init__"],
]
# The module and the wing that may import torch and transformers, and only inside functions.
ENGINE_ROOMS = ("architecture.blueprint", "calibration.")
ENGINES = {"torch", "transformers"}
NO_FILES = ["selection", "planning", "moves", "anatomy", "roles", "modelconfig", "surgeryplan"]
NO_FILES += ["cuts", "rankings", "scoreviews", "scorecomparison"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    return found


def outside_imports(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    return {name.split(".")[0] for name in names}


def line_of(module: str) -> tuple[int, bool]:
    room = module.split(".")[0]
    for number, line in enumerate(LINES):
        if room in line or module in line:
            return number, False
        if f"{room}*" in line:
            return number, True
    raise AssertionError(f"{module} stands in no line of LINES: give it its place")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_imports_go_down_only(module: str) -> None:
    line, may_stay = line_of(module)
    room = module.split(".")[0]
    for other in imports(MODULES[module]):
        below, _ = line_of(other)
        same_room = may_stay and other.split(".")[0] == room
        assert below > line or same_room, f"{module} imports {other}, which is not below it"


def test_the_verifier_shares_nothing_with_the_planner() -> None:
    seen: set[str] = set()
    todo = [name for name in MODULES if name.split(".")[0] == "verification"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += imports(MODULES[module])
    assert not seen & {"planning", "surgeryplan", "execution", "modelconfig", "finishing"}


def test_the_executor_knows_no_experts() -> None:
    seen: set[str] = set()
    todo = ["execution"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += imports(MODULES[module])
    assert not seen & {"anatomy", "roles", "families.schema", "checkpoint"}


@pytest.mark.parametrize("module", NO_FILES)
def test_what_decides_touches_no_files(module: str) -> None:
    names = {
        node.func.id
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "open" not in names
    assert not outside_imports(MODULES[module]) & {"os", "io", "shutil", "time", "pathlib"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_and_foreign_libraries_stay_in_their_rooms(module: str) -> None:
    found = outside_imports(MODULES[module])
    assert not found & ENGINES or module.startswith(ENGINE_ROOMS)
    if not module.startswith("cli"):
        assert not found & {"click", "tqdm"}
    if not module.startswith(("sources.", "hub.")):
        assert not found & {"huggingface_hub", "fsspec"}


def test_no_command_imports_an_engine_before_it_is_asked_to() -> None:
    rooms = "shardsurgeon.operations, shardsurgeon.scoreoperations"
    code = f"import {rooms}, sys; assert not {ENGINES} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_family_is_named_outside_its_own_file() -> None:
    families = {path.stem for path in (PACKAGE / "families").glob("*.toml")}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                assert not families & {c for c in constants if isinstance(c, str)}, module


def test_the_public_face_is_sorted_and_whole() -> None:
    assert shardsurgeon.__all__ == sorted(shardsurgeon.__all__)
    for name in shardsurgeon.__all__:
        assert getattr(shardsurgeon, name).__module__.startswith("shardsurgeon"), name


def test_public_functions_are_not_hidden_by_modules_of_their_name() -> None:
    code = (
        "import shardsurgeon.api, shardsurgeon.operations, shardsurgeon\n"
        "assert all(callable(getattr(shardsurgeon, n)) for n in shardsurgeon.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
