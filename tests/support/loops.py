"""The three loops of tests: what `--loop quick`, `full` and `long` choose.

quick, the default: what needs neither torch nor minutes. The same tests in every environment:
    those that need torch stay out where it is installed, too.
full: that and what needs torch, or is slow: kills, faults, pushes cut at random, sampled.
long: the same with every sample taken.

A test needs torch where its module imports torch, or a package that does, directly or through
our own modules; that is read from the source, because without torch such a module cannot be
imported. Where only one test of a module does, it says so with the marker `torch` and imports
inside of itself.

What is asked for by name is run in every loop: a file named on the command line, as far as torch
is installed, and the tests of a marker that `-m` names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOPS = ("quick", "full", "long")
# Which markers a loop leaves out.
LEFT_OUT = {"quick": ("torch", "slow"), "full": (), "long": ()}
# Markers of tests that all need torch: who asks for one of them asks for torch.
WITH_TORCH = {"oracle", "serving", "triton"}
# torch, and what imports it or is installed for the same tests only.
HEAVY = {
    "compressed_tensors",
    "datasets",
    "loguru",
    "matplotlib",
    "nbclient",
    "nbformat",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}
# As `pythonpath` in pyproject.toml.
IMPORT_FOLDERS = (ROOT, ROOT / "kernels", ROOT / "kernels" / "tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--loop`."""
    parser.addoption("--loop", choices=LOOPS, default="quick", help="which tests are run")


@pytest.fixture(scope="session")
def loop(request: pytest.FixtureRequest) -> str:
    """The loop's name, for tests that sample less or more."""
    return str(request.config.getoption("loop"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import, in the quick loop, a test module that needs torch."""
    if "torch" not in left_out(config) or not is_test(collection_path):
        return None
    return needs_torch(collection_path) or None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every test of a module that needs torch the marker, for `-m`."""
    if needs_torch(item.path):
        item.add_marker("torch")


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Deselect the tests that the loop leaves out, unless their file was named."""
    markers = left_out(config)
    of_named = markers & {"torch"} if find_spec("torch") is None else set()
    others = {
        item
        for item in items
        for out in [of_named if session.isinitpath(item.path) else markers]
        if any(map(item.get_closest_marker, out))
    }
    if others:
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]


def pytest_report_header(config: pytest.Config) -> str:
    """Say what the loop leaves out."""
    return summary(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say it at the end where `-q` has left the header out."""
    if config.option.verbose < 0 and left_out(config):
        terminalreporter.write_line(summary(config))


def left_out(config: pytest.Config) -> set[str]:
    """The markers that this run leaves out."""
    asked = set(re.findall(r"(?<!not )\b\w+", config.option.markexpr))
    if asked & WITH_TORCH:
        asked.add("torch")
    return set(LEFT_OUT[config.getoption("loop")]) - asked


def summary(config: pytest.Config) -> str:
    """What is left out, counted from the source: what is not imported counts too."""
    loop = config.getoption("loop")
    counts = {marker: 0 for marker in LEFT_OUT[loop] if marker in left_out(config)}
    for folder in config.getini("testpaths"):
        for path in sorted((ROOT / folder).rglob("test_*.py")):
            for markers in functions(path):
                for marker in counts:
                    if marker in markers:
                        counts[marker] += 1
                        break
    told = {"torch": "need torch", "slow": "are slow"}
    said = [f"{count} test functions {told[marker]}" for marker, count in counts.items() if count]
    if not said:
        return f"{loop} loop"
    more = "pip install -e '.[test]', then --loop full"
    return f"{loop} loop: {' and '.join(said)}, they are left out ({more})"


def is_test(path: Path) -> bool:
    """Whether pytest would collect this file."""
    return path.name.startswith("test_") and path.suffix == ".py"


def functions(path: Path) -> list[set[str]]:
    """The markers of a test module's functions, as far as the source shows them."""
    of_all = {"torch"} if needs_torch(path) else set()
    found = []
    top = parsed(path).body
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    for node in [*top, *(inner for one in classes for inner in one.body)]:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            of_all |= _markers(node.value)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.append(set().union(*map(_markers, filter(_is_plain, node.decorator_list))))
    return [markers | of_all for markers in found]


def _is_plain(decorator: ast.expr) -> bool:
    """Whether a decorator marks all cases of a test, not one of its parameters."""
    return "pytest.param(" not in ast.unparse(decorator)


def _markers(node: ast.expr) -> set[str]:
    """The names behind `pytest.mark.` in an expression."""
    return {
        one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute)
        and isinstance(one.value, ast.Attribute)
        and one.value.attr == "mark"
    }


@cache
def needs_torch(path: Path) -> bool:
    """Whether importing a file imports torch, or one of the packages that need it."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported(file):
            if name.split(".")[0] in HEAVY or name.startswith("safetensors.torch"):
                return True
            todo += own_files(name)
    return False


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that a file imports when it is imported itself."""
    names: set[str] = set()
    for node in _run_at_import(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module of it.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that are not in a function, nor for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.expr):
            continue
        yield child
        yield from _run_at_import(child)


@cache
def own_files(name: str) -> tuple[Path, ...]:
    """The file of one of our modules, and the `__init__.py` of the packages it is in."""
    parts = name.split(".")
    found = []
    for folder in IMPORT_FOLDERS:
        for depth in range(1, len(parts) + 1):
            stem = folder.joinpath(*parts[:depth])
            found += [stem.with_suffix(".py"), stem / "__init__.py"]
    return tuple(path for path in found if path.is_file())


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))
