"""The GPU kernels: on the GPU where there is one, else through Triton's interpreter.

The interpreter runs the same programs in numpy, with two differences in bfloat16: it cuts off
where a GPU rounds, and multiplies in float32. Expectations follow it. That the kernels compile
for real GPUs is tested as well; it needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_layers import FLOATS, Layer, layer, layers, same_bits
from torch import Tensor

import shardsurgeon_kernels
from shardsurgeon_kernels import PackedInt4, dispatch, pack, reference

pytestmark = pytest.mark.triton

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed; the GPU kernels are not tested")
    from shardsurgeon_kernels import gpu

    return gpu


def on_device(weight: PackedInt4) -> PackedInt4:
    zero_point = None if weight.zero_point is None else weight.zero_point.to(DEVICE)
    tensors = weight.packed.to(DEVICE), weight.scale.to(DEVICE), zero_point
    return PackedInt4(*tensors, weight.shape, weight.group_size)


def expected_weight(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The reference's weight, with the interpreter's cut in bfloat16."""
    if ON_GPU or dtype is not torch.bfloat16:
        return reference.dequantize(weight, dtype)
    bits = reference.dequantize(weight, torch.float32).view(torch.int32) & -65536
    return bits.view(torch.float32).to(torch.bfloat16)


def assert_fused(gpu: ModuleType, case: Layer, tokens: int, bias: Tensor | None) -> None:
    dtype = case.weight.scale.dtype
    x = torch.randn(tokens, case.weight.shape[1], generator=torch.Generator().manual_seed(tokens))
    x = x.to(dtype)
    on_gpu = None if bias is None else bias.to(DEVICE)
    y = gpu.linear(x.to(DEVICE), on_device(case.weight), on_gpu).cpu()
    weight = expected_weight(case.weight, dtype).double()
    exact = x.double() @ weight.t()
    size = x.double().abs() @ weight.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = 2 * torch.finfo(dtype).eps * exact.abs() + 2.0**-20 * size
    assert y.dtype is dtype
    assert bool(((y.double() - exact).abs() <= allowed).all())


@settings(max_examples=40)
@given(case=layers())
def test_dequantization_equals_the_reference_bit_for_bit(gpu: ModuleType, case: Layer) -> None:
    for dtype in FLOATS:
        found = gpu.dequantize(on_device(case.weight), dtype).cpu()
        assert same_bits(found, expected_weight(case.weight, dtype))


@settings(max_examples=40)
@given(case=layers(HALVES), tokens=st.integers(1, 40), with_bias=st.booleans())
def test_the_fused_product_is_exact_but_for_rounding(
    gpu: ModuleType, case: Layer, tokens: int, with_bias: bool
) -> None:
    bias = torch.linspace(-1, 1, case.weight.shape[0]).to(case.weight.scale.dtype)
    assert_fused(gpu, case, tokens, bias if with_bias else None)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 128])
def test_a_split_sum_over_several_row_blocks_is_whole(
    gpu: ModuleType, tokens: int, dtype: torch.dtype
) -> None:
    # 72 words in blocks of 16: the last block and the last split are partly empty.
    assert gpu.tiles_for(tokens, 70, 72).splits > 1
    assert_fused(gpu, layer(70, 576, 32, dtype, asymmetric=True), tokens, None)


def test_more_tokens_go_through_the_dequantized_weight(gpu: ModuleType) -> None:
    assert_fused(gpu, layer(40, 64, 32, torch.float16), gpu.FUSED_TOKENS + 1, None)


@pytest.mark.parametrize("group_size", [4, 12])
def test_groups_that_cut_words_take_the_eager_path(gpu: ModuleType, group_size: int) -> None:
    values = (torch.arange(96).view(2, 48) * 5 % 16 - 8).to(torch.int8)
    scale = torch.linspace(1, 2, 2 * 48 // group_size).view(2, -1).to(torch.float16)
    weight = PackedInt4(pack(values), scale, None, (2, 48), group_size)
    found = gpu.dequantize(on_device(weight), torch.float16).cpu()
    assert same_bits(found, reference.dequantize(weight, torch.float16))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_any_leading_dimensions_are_kept(gpu: ModuleType, leading: tuple[int, ...]) -> None:
    weight = on_device(layer(10, 64, 32, torch.float16).weight)
    x = torch.ones(*leading, 64, dtype=torch.float16, device=DEVICE)
    assert gpu.linear(x, weight).shape == (*leading, 10)


@given(tokens=st.integers(1, 200), rows=st.integers(1, 9000), words=st.integers(1, 3000))
def test_tiles_cover_every_word_once(gpu: ModuleType, tokens: int, rows: int, words: int) -> None:
    tiles = gpu.tiles_for(tokens, rows, words)
    assert tiles.words_per_split % tiles.words == 0
    assert (tiles.splits - 1) * tiles.words_per_split < words
    assert tiles.splits * tiles.words_per_split >= words


def test_the_dispatch_knows_it_by_name(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.choose(DEVICE) is gpu


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_gpus_within_their_means(architecture: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; nothing is compiled")
    home = str(Path(shardsurgeon_kernels.__file__).parent.parent)
    paths = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])
    # In a process of its own: this one interprets.
    environment = os.environ | {
        "PYTHONPATH": paths,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert len(lines) == 8
    # What the smallest of these GPUs' siblings (sm_86, sm_89) have for one block.
    assert all(int(shared) <= 99 << 10 for shared in lines.values())
