"""int4.c: every variant of its look-ups, and a machine without a compiler."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from int4_layers import FLOATS, layer, same_bits

from shardsurgeon_kernels import dispatch, eager, native


@pytest.fixture(autouse=True)
def built_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    native.build.cache_clear()
    yield
    native.build.cache_clear()


@pytest.fixture
def compile_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Take instruction sets away from whatever native.py compiles for."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")

    def choose(flags: str) -> None:
        # Last, as -march=native would bring back what an earlier flag takes away.
        wrapper = tmp_path / "cc-without"
        wrapper.write_text(f'#!/bin/sh\nexec cc "$@" {flags}\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("CC", str(wrapper))
        assert native.reason().startswith(str(wrapper))

    return choose


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="x86-64 variants")
@pytest.mark.parametrize("without", ["", "-mno-avx512f", "-mno-avx2", "-mno-avx"])
def test_every_instruction_set_gives_the_same_bits(
    without: str, compile_without: Callable[[str], None]
) -> None:
    compile_without(without)
    for dtype in FLOATS:
        for columns, group_size in [(128, 32), (120, 40), (64, None), (61, None)]:
            case = layer(11, columns, group_size, dtype, asymmetric=True)
            assert same_bits(native.dequantize(case.weight, dtype), case.decompressed)
            if dtype in native.WIDE_KINDS:
                held = torch.empty(11, columns)
                rows = native._rows_of(case.weight, dtype)
                assert rows is not None
                rows.write(0, held, native.WIDE_KINDS[dtype])
                assert same_bits(held, case.decompressed.float())


def test_without_a_compiler_the_eager_path_is_chosen_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not native.available()
    assert native.reason().startswith("no C compiler found")
    assert dispatch.choose(torch.device("cpu")) is eager
    case = layer(5, 64, 32, torch.bfloat16)
    assert same_bits(native.dequantize(case.weight, torch.bfloat16), case.decompressed)


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(native, "FLAGS", (["--no-such-option"],))
    assert not native.available()
    assert "no-such-option" in native.reason().partition(": ")[2]


def test_openmp_is_left_out_where_the_compiler_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip(native.reason())
    native.build.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (["--no-such-option"], []))
    assert native.available()
    assert native.reason().endswith("-shared")
    case = layer(300, 512, 32, torch.bfloat16)
    assert same_bits(native.dequantize(case.weight, torch.bfloat16), case.decompressed)
