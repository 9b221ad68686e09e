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
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_layers import FLOATS, Layer, ends_of, layer, layers, same_bits, stack
from torch import Tensor

import shardsurgeon_kernels
from shardsurgeon_kernels import PackedInt4, PackedInt4Stack, dispatch, pack, reference

pytestmark = pytest.mark.triton

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALVES = (torch.bfloat16, torch.float16)
W = TypeVar("W", PackedInt4, PackedInt4Stack)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed; the GPU kernels are not tested")
    from shardsurgeon_kernels import gpu

    return gpu


def on_device(weight: W, device: torch.device = DEVICE) -> W:
    zero_point = None if weight.zero_point is None else weight.zero_point.to(device)
    tensors = weight.packed.to(device), weight.scale.to(device), zero_point
    return type(weight)(*tensors, weight.shape, weight.group_size)


def expected_weight(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The reference's weight, with the interpreter's cut in bfloat16 where it makes the weight."""
    cuts_words = weight.groups > 1 and weight.columns_per_scale % 8 != 0
    if ON_GPU or dtype is not torch.bfloat16 or cuts_words:
        return reference.dequantize(weight, dtype)
    bits = reference.dequantize(weight, torch.float32).view(torch.int32) & -65536
    return bits.view(torch.float32).to(torch.bfloat16)


def assert_fused(gpu: ModuleType, case: Layer, tokens: int, bias: Tensor | None) -> None:
    dtype = case.weight.scale.dtype
    x = torch.randn(tokens, case.weight.shape[1], generator=torch.Generator().manual_seed(tokens))
    x = x.to(dtype)
    on_gpu = None if bias is None else bias.to(DEVICE)
    y = gpu.linear(x.to(DEVICE), on_device(case.weight), on_gpu).cpu()
    assert_close(y, x, expected_weight(case.weight, dtype), bias)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is the product within two roundings to its dtype and a float32 sum's errors."""
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = 2 * torch.finfo(y.dtype).eps * exact.abs() + 2.0**-20 * size
    assert y.dtype is x.dtype
    assert bool(((y.double() - exact).abs() <= allowed).all())


def assert_grouped(gpu: ModuleType, weights: PackedInt4Stack, x: Tensor, counts: list[int]) -> None:
    ends = ends_of(counts)
    y = gpu.grouped_linear(x.to(DEVICE), on_device(weights), ends.to(DEVICE)).cpu()
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(begin, end)
        assert_close(y[rows], x[rows], expected_weight(weights[expert], x.dtype), None)
        begin = end
    assert not y[begin:].any()


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


GROUPS = [(32, True), (None, False), (12, False)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("group_size", "asymmetric"), GROUPS)
@pytest.mark.parametrize("counts", [[3, 0, 21, 1, 0], [0, 0, 25, 0, 0], [2, 0, 0, 0, 5]])
def test_rows_sorted_by_expert_meet_its_packed_weight(
    gpu: ModuleType,
    counts: list[int],
    group_size: int | None,
    asymmetric: bool,
    dtype: torch.dtype,
) -> None:
    # 70 rows in blocks of 64, 24 words in blocks of 16: all last blocks are partly empty.
    weights = stack(5, 70, 192, group_size, dtype, asymmetric=asymmetric).weights
    x = torch.randn(26, 192, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert_grouped(gpu, weights, x, counts)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("counts", [[3, 0, 140, 1, 0], [0, 144, 0, 0, 0]])
def test_many_rows_meet_weights_dequantized_two_experts_at_a_time(
    gpu: ModuleType, counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "FUSED_TOKENS", 16)
    monkeypatch.setattr(gpu, "SCRATCH_NBYTES", 2 * 140 * 96 * dtype.itemsize + 1)
    weights = stack(5, 140, 96, 32, dtype, asymmetric=True).weights
    x = torch.randn(150, 96, generator=torch.Generator().manual_seed(6)).to(dtype)
    assert_grouped(gpu, weights, x, counts)


@pytest.mark.parametrize("fused_tokens", [0, 128])
def test_the_number_of_programs_changes_no_bit(
    gpu: ModuleType, fused_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "FUSED_TOKENS", fused_tokens)
    weights = on_device(stack(3, 200, 64, 32, torch.float16).weights)
    x = torch.randn(90, 64, generator=torch.Generator().manual_seed(7)).half().to(DEVICE)
    ends = ends_of([40, 1, 49]).to(DEVICE)
    found = []
    for programs in (1, 3, 100):
        monkeypatch.setattr(gpu, "_processors", lambda device, programs=programs: programs)
        found.append(gpu.grouped_linear(x, weights, ends))
    assert all(same_bits(found[0], other) for other in found[1:])


def test_ends_that_pass_the_last_row_lead_nowhere(gpu: ModuleType) -> None:
    weights = on_device(stack(3, 10, 64, 32, torch.float16).weights)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(8)).half().to(DEVICE)
    wild = torch.tensor([4, 2, 1 << 30], dtype=torch.int32, device=DEVICE)
    tame = torch.tensor([4, 4, 9], dtype=torch.int32, device=DEVICE)
    y = gpu.grouped_linear(x, weights, wild)
    assert same_bits(y[:2], gpu.grouped_linear(x, weights, tame)[:2])
    assert y.shape == (9, 10)


@pytest.mark.parametrize("shape", [(0, 64), (7, 0)])
def test_nothing_times_anything_is_nothing(gpu: ModuleType, shape: tuple[int, int]) -> None:
    rows, columns = shape
    packed = torch.zeros(2, 10, columns // 8, dtype=torch.int32, device=DEVICE)
    scale = torch.ones(2, 10, columns // 32, device=DEVICE)
    weights = PackedInt4Stack(packed, scale, None, (2, 10, columns), 32)
    x = torch.ones(rows, columns, dtype=torch.float16, device=DEVICE)
    assert gpu.grouped_linear(x, weights, ends_of([0, rows]).to(DEVICE)).equal(
        x.new_zeros(rows, 10)
    )


class Recorder:
    """Stands for a kernel and keeps the grids that it is launched on."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **constants: None


@pytest.mark.parametrize(
    ("dtype", "group_size", "tokens", "launches"),
    [
        (torch.bfloat16, 32, 512, (0, 1)),
        (torch.float16, None, 513, (2, 2)),
        (torch.float32, 32, 1, (2, 2)),
        (torch.bfloat16, 12, 1, (0, 2)),
    ],
)
def test_the_host_never_asks_how_many_rows_an_expert_has(
    gpu: ModuleType,
    dtype: torch.dtype,
    group_size: int | None,
    tokens: int,
    launches: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tensors of the meta device have no values: whoever reads one fails.
    dequantizations, products = Recorder(), Recorder()
    monkeypatch.setattr(gpu, "dequantize_kernel", dequantizations)
    monkeypatch.setattr(gpu, "grouped_kernel", products)
    monkeypatch.setattr(gpu, "SCRATCH_NBYTES", 2 * 16 * 96 * dtype.itemsize)
    meta = torch.device("meta")
    weights = on_device(stack(4, 16, 96, group_size, dtype).weights, meta)
    ends = torch.empty(4, dtype=torch.int32, device=meta)
    with pytest.raises((NotImplementedError, RuntimeError)):
        ends.tolist()
    y = gpu.grouped_linear(torch.empty(tokens, 96, dtype=dtype, device=meta), weights, ends)
    assert y.shape == (tokens, 16)
    assert (len(dequantizations.grids), len(products.grids)) == launches


@pytest.mark.skipif(not ON_GPU, reason="no GPU: only read, with tensors that have no values")
@pytest.mark.parametrize("tokens", [100, 1000])
def test_the_gpu_is_never_waited_for(gpu: ModuleType, tokens: int) -> None:
    weights = on_device(stack(4, 64, 96, 32, torch.bfloat16, asymmetric=True).weights)
    x = torch.randn(tokens, 96).bfloat16().to(DEVICE)
    ends = ends_of([tokens, 0, 0, 0]).to(DEVICE)
    gpu.grouped_linear(x, weights, ends)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.grouped_linear(x, weights, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("architecture", [80, 90, 100])
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
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, *_ in lines}) == 16
    for name, registers, spilled, shared in lines:
        assert int(registers) <= 255, name
        # A register or two at the seams are no matter; in the loop they would be hundreds.
        assert int(spilled) <= 64, name
        # What the smallest of these GPUs' siblings (sm_86, sm_89) have for one block.
        assert int(shared) <= 99 << 10, name
