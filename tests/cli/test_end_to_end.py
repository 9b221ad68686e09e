"""The user's lines on a shipped checkpoint, in a process of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.standins import ROOT, in_python

FIXTURE = ROOT / "fixtures" / "kimi_k25"
FORBIDDEN = {"torch", "transformers"}

# Prints, behind a line of its own, the top-level modules that the command imported.
CODE = (
    "import json, sys; from shardsurgeon.cli.main import main; status = main(sys.argv[1:]);"
    "print('IMPORTED', *sorted({name.partition('.')[0] for name in sys.modules}));"
    "sys.exit(status)"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(FIXTURE, folder / "kimi_k25")
    return folder


def shardsurgeon(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = in_python(CODE, *words, cwd=folder, capture_output=True)
    done.stdout, _, imported = done.stdout.rpartition("IMPORTED")
    assert set(imported.split()) & FORBIDDEN == set(), words
    return done


@pytest.fixture(scope="module")
def pruned(models: Path) -> Path:
    """The line that must always work, typed inside the model's folder."""
    done = shardsurgeon(models / "kimi_k25", "apply", "scores.pt", "--ratio", "0.65")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "keep 12 of 32 experts in each of 3 MoE layers" in done.stdout
    assert "structure of all" in done.stdout
    return models / "kimi_k25-REAP-65pct"


def test_the_users_line_writes_beside_the_model_and_leaves_the_source_alone(
    models: Path, pruned: Path
) -> None:
    assert {path.name for path in models.iterdir()} == {"kimi_k25", "kimi_k25-REAP-65pct"}
    config = json.loads((pruned / "config.json").read_text())
    assert config["text_config"]["n_routed_experts"] == 12
    for path in FIXTURE.rglob("*"):
        if path.is_file():
            assert (models / "kimi_k25" / path.relative_to(FIXTURE)).read_bytes() == (
                path.read_bytes()
            )


def test_verify_proves_it(models: Path, pruned: Path) -> None:
    done = shardsurgeon(models, "verify", "kimi_k25", pruned.name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kimi_k25-REAP-65pct: identical\n")


def test_verify_finds_a_changed_byte(models: Path, pruned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pruned, broken)
    shard = next(broken.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = shardsurgeon(models, "verify", "kimi_k25", str(broken), "--json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["differences"]


def test_inspect_of_the_result_names_the_new_count(models: Path, pruned: Path) -> None:
    done = shardsurgeon(models, "inspect", pruned.name, "--json")
    assert json.loads(done.stdout)["num_experts"] == 12


def test_an_existing_output_is_done_or_refused_in_one_line(models: Path, pruned: Path) -> None:
    again = ("apply", "scores.pt", "--ratio", "0.65")
    assert shardsurgeon(models / "kimi_k25", *again).returncode == 0
    (pruned / "LICENSE").write_text("mine")
    done = shardsurgeon(models / "kimi_k25", *again)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "kimi_k25-REAP-65pct" in done.stderr


def test_a_saved_plan_applies_to_the_same_bytes(models: Path, pruned: Path, tmp_path: Path) -> None:
    plan = str(tmp_path / "plan.json")
    model = ("--model", str(models / "kimi_k25"))
    scores = str(FIXTURE / "scores.pt")
    done = shardsurgeon(tmp_path, "plan", scores, *model, "--ratio", "0.65", "-o", plan)
    assert done.returncode == 0, done.stderr
    done = shardsurgeon(tmp_path, "apply", "--plan", plan, *model, "-o", "again")
    assert done.returncode == 0, done.stderr
    for path in pruned.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_dry_run_writes_nothing(models: Path, tmp_path: Path) -> None:
    scores = str(FIXTURE / "scores.pt")
    done = shardsurgeon(
        tmp_path, "apply", scores, "--model", str(FIXTURE), "--keep", "8", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Dry run: nothing was written.\n")
    assert list(tmp_path.iterdir()) == []


def test_several_ratios_as_json(models: Path) -> None:
    done = shardsurgeon(models / "kimi_k25", "plan", "scores.pt", "--ratio", "0.5,0.75", "--json")
    plans = json.loads(done.stdout)["plans"]
    assert [plan["num_experts_after"] for plan in plans] == [16, 8]
