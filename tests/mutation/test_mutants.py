"""Which changes are made to a module, and a run over a toy tree, from the first test to the sum."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.mutants import mutants

ROOT = Path(__file__).parents[2]


def changes(source: str) -> set[str]:
    return {f"{one.before} -> {one.after}" for one in mutants("toy.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("x = a < b", {"a < b -> a <= b"}),
        (
            "x = a is None != b",
            {"a is None != b -> a is not None != b"} | {"a is None != b -> a is None == b"},
        ),
        ("x = a and not b", {"a and not b -> a or not b", "not b -> b"}),
        ("x = a - b // c", {"a - b // c -> a + b // c", "b // c -> b * c"}),
        ("x += y", {"x += y -> x -= y"}),
        ("f(2, deep=True)", {"2 -> 3", "2 -> 1", "True -> False", "f(2, deep=True) -> pass"}),
        ("x = min(sorted(a))", {"min(sorted(a)) -> max(sorted(a))", "sorted(a) -> list(a)"}),
        (
            "x = math.lcm(a, b)",
            {"math.lcm(a, b) -> math.gcd(a, b)", "math.lcm(a, b) -> math.prod([a, b])"},
        ),
        ("x = a[b:c]", {"a[b:c] -> a[:c]", "a[b:c] -> a[b:]"}),
        ("x = [y for y in z if y]", {"y -> True"}),
        ("x = a if b else c", {"b -> True", "b -> False"}),
        ("if a:\n    f()", {"a -> True", "a -> False"}),
        ("if a:\n    x = b\n    raise c", {"a -> True", "a -> False", "raise c -> pass"}),
        ("def f() -> list[int]:\n    return a", {"return a -> return []"}),
        ("def f() -> bool:\n    return a", {"return a -> return not (a)"}),
        (
            "def f(a: int = 0) -> int | None:\n    return a",
            {"return a -> return None", "0 -> 1", "0 -> -1"},
        ),
        ('"""Words."""\nproblem = f"{a + b}" if c else ""\n', set()),
        ("def __repr__(self) -> str:\n    return 1", set()),
    ],
)
def test_one_small_thing_is_changed_at_a_time(source: str, made: set[str]) -> None:
    assert changes(source) == made


def test_every_mutant_is_the_module_with_one_change_in_its_place() -> None:
    source = "# héllo\nif a:  # ü\n    x = f'{1 + 1}' * 2  # é\n"
    found = [one.applied(source.encode()).decode() for one in mutants("toy.py", source.encode())]
    assert source.replace("if a", "if (True)") in found
    assert source.replace("* 2 ", "* (3) ") in found
    assert all("1 + 1" in text and text != source for text in found)


def test_a_mutant_keeps_its_name_and_its_place_in_the_sample_when_the_code_around_it_moves() -> (
    None
):
    source = b"def f(a):\n    return a[1:1]\n"
    before = mutants("toy.py", source)
    after = mutants("toy.py", b"import x\n\n\ny = x + 2\n" + source)
    names = {one.name for one in before}
    assert len(names) == len(before)
    kept = [one for one in after if one.function == "f"]
    assert [one.name for one in kept] == [one.name for one in before]
    assert [one.rank(7) for one in kept] == [one.rank(7) for one in before]
    assert [one.rank(8) for one in kept] != [one.rank(7) for one in kept]
    assert [one.line for one in kept] != [one.line for one in before]


TOY = """\
def clipped(value: int, most: int) -> int:
    if value > most:
        return most
    return value


def unseen(value: int) -> int:
    return value
"""
TESTS = """\
from shardsurgeon.pruning.toy import clipped


def test_a_value_is_clipped() -> None:
    assert clipped(4, 3) == 3
    assert clipped(2, 3) == 2
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree with one module and one test of it."""
    root = tmp_path / "toy"
    files = {
        "shardsurgeon/pruning/toy.py": TOY,
        "tests/pruning/test_toy.py": TESTS,
        "shardsurgeon/__init__.py": "",
        "shardsurgeon/pruning/__init__.py": "",
        "conftest.py": 'pytest_plugins = ["tests.support.loops"]\n',
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow: s", "torch: t"]\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("mutation/mutants.py", "mutation/run.py", "mutation/trial.py", "support/loops.py"):
        (root / "tests" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "tests" / name, root / "tests" / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def run(toy: Path, *words: str) -> str:
    command = [sys.executable, "tests/mutation/run.py", "--sample", "0", *words]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=toy, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_run_tells_what_the_tests_notice_and_goes_on_where_it_was(toy: Path) -> None:
    before = {path: path.read_bytes() for path in toy.rglob("*.py")}
    names = run(toy, "--list").splitlines()
    said = run(toy)
    results = [json.loads(line) for line in (toy / "mutation.jsonl").read_text().splitlines()]
    assert sorted(one["name"] for one in results) == sorted(names)
    alive = {one["name"].rpartition(" | ")[2] for one in results if not one["by"]}
    # At the limit both answers are the same; nobody calls the other function.
    assert alive == {"value > most -> value >= most", "return value -> return 0"}
    assert {one["by"] for one in results} == {
        "",
        "tests/pruning/test_toy.py::test_a_value_is_clipped",
    }
    assert f"all: {len(names)} mutants, {len(names) - 2} killed" in said
    assert {path: path.read_bytes() for path in toy.rglob("*.py")} == before
    # What has a result is not run again, but for those that are to be.
    assert "SURVIVED" not in run(toy)
    calls = "\n    assert clipped(3, 3) == 3 and unseen(2) == 2\n"
    tests = TESTS.replace("import clipped", "import clipped, unseen") + calls
    (toy / "tests" / "pruning" / "test_toy.py").write_text(tests)
    said = run(toy, "--again")
    assert "1 survived" in said and said.endswith("value > most -> value >= most\n")
