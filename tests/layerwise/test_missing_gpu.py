"""A GPU that cannot be there is refused before torch is imported; one that may be there never."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise import settings
from shardsurgeon.layerwise.settings import refuse_missing_gpu

VERSION = """\
from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda}
hip: Optional[str] = {hip}
"""
BUILT = {"version": "2.13.0+cu130", "cuda": "'13.0'", "hip": "None"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine with torch for CUDA and without a GPU; its /dev."""
    device_files = tmp_path / "dev"
    device_files.mkdir()
    (device_files / "null").touch()
    with_torch(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(settings, "_CUDA_DRIVER", "libno-such-driver.so.1")
    monkeypatch.setattr(
        settings, "Path", lambda name: device_files if name == "/dev" else Path(name)
    )
    return device_files


def with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **built: str) -> None:
    """A torch that says so of itself, and is not imported."""
    (tmp_path / "version.py").write_text(VERSION.format(**BUILT | built))
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(settings, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_a_machine_without_a_driver_is_refused(machine: Path) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"--device {device}: this machine has no driver of"):
            refuse_missing_gpu(device)
    refuse_missing_gpu("cpu")


@pytest.mark.parametrize(
    "name", ["nvidiactl", "nvidia0", "nvhost-ctrl-gpu", "nvgpu", "nvmap", "kfd", "dxg"]
)
def test_a_file_of_a_driver_is_a_sign_of_a_gpu(machine: Path, name: str) -> None:
    (machine / name).touch()
    refuse_missing_gpu("cuda")


def test_a_driver_that_is_a_library_alone_is_a_sign(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_CUDA_DRIVER", None)  # the program itself, which is loaded
    refuse_missing_gpu("cuda")


def test_a_torch_without_cuda_is_refused_whatever_the_machine_has(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "nvidiactl").touch()
    monkeypatch.setattr(sys, "platform", "win32")
    with_torch(tmp_path, monkeypatch, version="2.13.0+cpu", cuda="None")
    with pytest.raises(UsageError, match=r"torch 2\.13\.0\+cpu is built without CUDA"):
        refuse_missing_gpu("cuda")


@pytest.mark.parametrize(
    "built",
    [
        {"version": "2.9.0a0+git1f0c9ad"},
        {"version": "2.1.0+metax3.0", "cuda": "None"},
        {"version": "2.9.0a0+145a3a7bdb.nv25.10"},
    ],
    ids=str,
)
def test_a_torch_of_other_makers_is_asked_itself(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: dict[str, str]
) -> None:
    with_torch(tmp_path, monkeypatch, **built)
    refuse_missing_gpu("cuda")


def test_what_is_not_known_is_left_to_torch(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    refuse_missing_gpu("cuda")
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'")
    refuse_missing_gpu("cuda")
    (tmp_path / "version.py").unlink()
    refuse_missing_gpu("cuda")
