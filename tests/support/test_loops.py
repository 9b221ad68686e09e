"""Which tests the loops leave out: found in the source, without importing anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.loops import HEAVY, ROOT, functions, needs_torch, parsed

MODULES = sorted(
    path for folder in ("tests", "kernels/tests") for path in (ROOT / folder).rglob("test_*.py")
)


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("import torch\n", True),
        ("from transformers import AutoModel\n", True),
        ("import safetensors.torch\n", True),
        ("from safetensors.torch import save\n", True),
        ("import safetensors.numpy\n", False),
        ("try:\n    import datasets\nexcept ImportError:\n    pass\n", True),
        ("class A:\n    import torch\n", True),
        ("def test():\n    import torch\n", False),
        ("if TYPE_CHECKING:\n    import torch\n", False),
        ("from tests.oracle import byte_oracle\n", True),
        ("from tests.oracle.byte_oracle import read_config\n", True),
        ("from tests.support import tiny\n", False),
        ("from int4_layers import layer\n", True),
        ("from shardsurgeon.layerwise.engine import score\n", True),
        ("from shardsurgeon.layerwise.accumulators import Accumulators\n", False),
        ("import shardsurgeon\n", False),
        ("import shardsurgeon_kernels\n", True),
    ],
)
def test_a_module_needs_torch_where_its_import_leads_there(
    tmp_path: Path, source: str, needs: bool
) -> None:
    path = tmp_path / "test_something.py"
    path.write_text(source)
    assert needs_torch(path) == needs


def test_markers_are_those_of_the_function_its_class_and_its_module(tmp_path: Path) -> None:
    path = tmp_path / "test_something.py"
    path.write_text(
        "import pytest\n"
        "@pytest.mark.slow\n"
        "def test_a(): ...\n"
        "class TestB:\n"
        "    @pytest.mark.torch\n"
        "    @pytest.mark.parametrize('x', [1])\n"
        "    def test_b(self): ...\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.torch)])\n"
        "def test_c(): ...\n"
    )
    assert functions(path) == [{"slow"}, set(), {"torch", "parametrize"}]
    other = tmp_path / "test_other.py"
    other.write_text("pytestmark = pytest.mark.slow\ndef test_a(): ...\n")
    assert functions(other) == [{"slow"}]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_that_imports_torch_inside_of_itself_says_so(path: Path) -> None:
    """Where its module is imported without torch."""
    if needs_torch(path):
        return
    for node in parsed(path).body:
        if "pytestmark" in ast.unparse(node) and "mark.torch" in ast.unparse(node):
            return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names = {
                name
                for inner in ast.walk(node)
                if isinstance(inner, ast.Import | ast.ImportFrom)
                for name in [getattr(inner, "module", None), *(one.name for one in inner.names)]
                if name
            }
            heavy = {name.split(".")[0] for name in names} & HEAVY
            marked = any("mark.torch" in ast.unparse(one) for one in node.decorator_list)
            assert marked or not heavy, node.name
