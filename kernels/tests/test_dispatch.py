"""One function chooses, by device; a variable overrides it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from int4_layers import layer, same_bits

import shardsurgeon_kernels
from shardsurgeon_kernels import dequantize, dispatch, eager, implementation_name, native

CPU = torch.device("cpu")


def test_the_cpu_has_the_native_path_where_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    expected = native if native.available() else eager
    assert dispatch.choose(CPU) is expected


def test_a_device_without_kernels_has_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.choose(torch.device("mps")) is eager


@pytest.mark.parametrize("name", ["reference", "eager", "native"])
def test_the_variable_names_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, name)
    assert implementation_name(CPU) == name
    case = layer(5, 64, 32, torch.bfloat16)
    assert same_bits(dequantize(case.weight, torch.bfloat16), case.decompressed)


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'; it may be one of reference, eager, native"):
        implementation_name(CPU)


def test_importing_compiles_nothing_and_loads_no_triton() -> None:
    code = (
        "import sys, shardsurgeon_kernels as k; from shardsurgeon_kernels import native\n"
        "assert 'triton' not in sys.modules and native.build.cache_info().currsize == 0\n"
        "assert 'kernels' not in sys.modules and 'compressed_tensors' not in sys.modules"
    )
    home = str(Path(shardsurgeon_kernels.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": home}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
