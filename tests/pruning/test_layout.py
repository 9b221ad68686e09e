"""The order of tensors in an output shard: valid and never worse than simple, for any columns;
and nearly all shared for the files that models come in."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardsurgeon.pruning.layout import Layout, lay_out, shared_nbytes

BLOCK = 4096
# Sections in the order of the safetensors library: wider dtypes first.
WIDTHS = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F8": 1, "U8": 1}

Column = NDArray[np.int64]
Row = tuple[int, int, int, int]


class Columns(NamedTuple):
    nbytes: Column
    width: Column
    phase: Column
    gain: Column


class Tensor(NamedTuple):
    """Of a source. expert: whose it is; kept: its size in the result, where it is sliced."""

    name: str
    dtype: str
    nbytes: int
    expert: int | None = None
    kept: int | None = None


def columns(rows: Iterable[Row]) -> Columns:
    """Columns of rows of nbytes, width, phase and gain."""
    table = np.array(list(rows), dtype=np.int64).reshape(-1, 4)
    return Columns(*(np.ascontiguousarray(column) for column in table.T))


def shared_by_hand(layout: Layout, given: Columns) -> int:
    """What a file in this order shares, byte for byte where it lies; checks that it is valid."""
    assert sorted(layout.order.tolist()) == list(range(len(given.nbytes)))
    if layout.start is None:
        at, shares = 0, False
    else:
        assert 0 <= layout.start < BLOCK and layout.start % 8 == 0
        at, shares = layout.start, True
    shared = 0
    for place in layout.order.tolist():
        assert at % given.width[place] == 0
        if shares and at % BLOCK == given.phase[place]:
            shared += int(given.gain[place])
        at += int(given.nbytes[place])
    return shared


def simple_share(given: Columns) -> int:
    """What wider dtypes first, then source order, share with the best of all starts."""
    order = sorted(range(len(given.nbytes)), key=lambda place: -given.width[place])
    shares: dict[int, int] = {}
    at = 0
    for place in order:
        if given.phase[place] >= 0:
            start = (int(given.phase[place]) - at) % BLOCK
            shares[start] = shares.get(start, 0) + int(given.gain[place])
        at += int(given.nbytes[place])
    return max((share for start, share in shares.items() if start % 8 == 0), default=0)


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    """Tensors of a few sizes, as models have them, or of all sizes; phases also misaligned."""
    few = draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=4))
    sizes = st.one_of(
        st.sampled_from(few), st.integers(0, 40), st.integers(0, 20_000), st.just(5 * BLOCK)
    )
    phases = st.one_of(
        st.just(-1),
        st.integers(0, BLOCK - 1),
        st.integers(0, 31).map(lambda step: step * 8),
        st.integers(0, 7).map(lambda step: step * 512 + 4),
    )
    rows = []
    for nbytes, width, phase in draw(
        st.lists(st.tuples(sizes, st.sampled_from([1, 2, 4, 8]), phases), max_size=40)
    ):
        gain = draw(st.sampled_from([BLOCK, 3 * BLOCK, 1000 * BLOCK])) if phase >= 0 else 0
        rows.append((nbytes // width * width, width, phase, gain))
    return rows


@given(any_rows())
@example([])
@example([(8, 8, -1, 0), (4096, 1, 3, 4096)])
@example([(6, 2, -1, 0), (4096, 2, 6, 4096), (4, 4, -1, 0), (4096, 8, 8, 4096)])
def test_any_tensors_make_a_valid_file_that_shares_no_less_than_a_simple_one(
    rows: list[Row],
) -> None:
    given = columns(rows)
    layout = lay_out(*given)
    shared = shared_by_hand(layout, given)
    assert shared == shared_nbytes(
        layout.order, layout.start, given.nbytes, given.phase, given.gain
    )
    assert shared >= simple_share(given)
    assert (layout.start is None) == (shared == 0)


@given(any_rows(), st.randoms(use_true_random=False))
def test_the_order_that_tensors_come_in_is_undone_by_their_place_in_the_source(
    rows: list[Row], chance: random.Random
) -> None:
    keyed = list(enumerate(rows))
    chance.shuffle(keyed)
    keyed.sort()
    first, second = lay_out(*columns(rows)), lay_out(*columns(row for _, row in keyed))
    assert (first.order == second.order).all() and first.start == second.start


@given(any_rows(), st.integers(0, BLOCK // 8 - 1))
def test_a_shard_that_loses_nothing_keeps_its_order(rows: list[Row], start: int) -> None:
    tensors = [
        Tensor(str(place), {8: "I64", 4: "F32", 2: "BF16", 1: "U8"}[width], nbytes)
        for place, (nbytes, width, _, _) in enumerate(rows)
    ]
    given = columns(pruned(sectioned(tensors), [], start * 8))
    layout = lay_out(*given)
    assert shared_by_hand(layout, given) == given.gain.sum()
    assert (layout.order == np.arange(len(rows))).all() or layout.start is None


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 511)), max_size=100),
    st.sampled_from([8, 24, 4088, 3 * BLOCK - 8]),
)
def test_as_many_small_tensors_as_the_circle_has_steps_reach_every_phase(
    large: list[tuple[int, int]], filler: int
) -> None:
    rows = [(2 * BLOCK, width, step * 8, BLOCK) for width, step in large]
    given = columns(rows + [(filler, 4, -1, 0)] * 511)
    assert shared_by_hand(lay_out(*given), given) == given.gain.sum()


def test_nothing_to_share_leaves_the_simple_order_and_the_start_open() -> None:
    # Misaligned to its dtype, and of no block: neither can be shared.
    given = columns([(4, 2, -1, 0), (8, 8, -1, 0), (8192, 2, 3, 4096), (4096, 4, 8, 0)])
    layout = lay_out(*given)
    assert layout.order.tolist() == [1, 3, 0, 2] and layout.start is None
    assert shared_nbytes(layout.order, None, given.nbytes, given.phase, given.gain) == 0


def test_what_an_order_shares_depends_on_where_its_data_begins() -> None:
    given = columns([(8, 4, -1, 0), (4096, 4, 16, 4096), (8192, 4, 16, 8192), (4096, 4, 8, 1)])
    order = np.arange(4)
    shares = [
        shared_nbytes(order, start, given.nbytes, given.phase, given.gain) for start in (0, 8)
    ]
    assert shares == [1, 4096 + 8192]


def test_tensors_of_one_phase_are_one_run_in_source_order() -> None:
    given = columns([(4096, 2, phase, 4096) for phase in (8, 0, 8, 0, 8)] + [(8, 2, -1, 0)])
    layout = lay_out(*given)
    assert layout.order.tolist() == [1, 3, 5, 0, 2, 4] and layout.start == 0


def test_where_fillers_are_too_few_the_most_bytes_are_reached() -> None:
    phases = {0: 5, 8: 1, 16: 6, 24: 6, 2048: 9}
    rows = [(BLOCK, 1, phase, size * BLOCK) for phase, size in phases.items()]
    given = columns([*rows, (8, 1, -1, 0), (8, 1, -1, 0)])
    assert shared_by_hand(lay_out(*given), given) == (1 + 6 + 6) * BLOCK
    # Without any, the heaviest phase.
    given = columns(rows)
    assert shared_by_hand(lay_out(*given), given) == 9 * BLOCK


def test_small_tensors_of_several_sizes_are_summed_up() -> None:
    rows = [(BLOCK, 1, phase, BLOCK) for phase in (8, 8 + 1120 + 2688)]
    given = columns([*rows, (1120, 4, -1, 0), (64, 4, -1, 0), (2688, 4, -1, 0)])
    assert shared_by_hand(lay_out(*given), given) == 2 * BLOCK


def test_a_first_phase_that_no_header_reaches_is_reached_by_small_tensors() -> None:
    given = columns([(BLOCK, 4, 20, BLOCK), (4, 2, -1, 0)])
    layout = lay_out(*given)
    assert layout.order.tolist() == [1, 0] and layout.start == 16


def test_rare_sizes_are_kept_for_what_only_they_reach() -> None:
    # 512 is one step of the rare size away from 0, but then nothing leads back to 16.
    rows = [(BLOCK, 1, phase, BLOCK) for phase in (0, 16, 32, 32 + 512)] + [(BLOCK, 1, 512, 1)]
    given = columns([*rows, (512, 2, -1, 0), *[(8, 2, -1, 0)] * 10])
    assert shared_by_hand(lay_out(*given), given) == 4 * BLOCK


def test_a_tensor_of_broken_blocks_is_followed_by_what_stood_behind_it() -> None:
    rows = [(BLOCK + 512, 2, 0, BLOCK), (BLOCK, 2, 1024, BLOCK), (BLOCK, 2, 512, BLOCK)]
    given = columns([*rows, (512, 2, -1, 0)])
    layout = lay_out(*given)
    assert layout.order.tolist() == [0, 2, 3, 1] and layout.start == 0


def test_small_tensors_left_over_in_a_wide_section_help_in_a_narrower_one() -> None:
    # Phases of 4 modulo 8 lie in the second section, behind the wide dtype's.
    rows = [(BLOCK, 8, 8, 1), (BLOCK, 8, 24, 1), (BLOCK, 1, 28, 1), (BLOCK, 1, 540, 1)]
    given = columns([*rows, (16, 4, -1, 0), (4, 4, -1, 0), (512, 4, -1, 0)])
    assert shared_by_hand(lay_out(*given), given) == 4


def test_a_section_leaves_as_many_small_tensors_as_it_can_to_the_next() -> None:
    # From 0 upwards 4088 is 511 steps away; from 4088 upwards 0 is one.
    rows = [(BLOCK, 8, 0, 1), (BLOCK, 8, 4088, 1), (BLOCK, 1, 4, 1), (BLOCK, 1, 20, 1)]
    # So many tensors that only one beginning is tried.
    others = [(BLOCK, 4, -1, 0)] * 500
    given = columns([*rows, *others, (4, 4, -1, 0), *[(8, 4, -1, 0)] * 511])
    assert shared_by_hand(lay_out(*given), given) == 4


def test_what_leaves_the_position_comes_before_what_moves_it() -> None:
    rows = [(BLOCK + 512, 2, 8, BLOCK), (BLOCK, 2, 8, BLOCK), (BLOCK, 2, 520, BLOCK)]
    given = columns(rows)
    layout = lay_out(*given)
    assert layout.order.tolist() == [1, 0, 2]


def test_of_orders_that_share_alike_the_one_of_the_source_is_taken() -> None:
    given = columns([(BLOCK, 2, 0, BLOCK), (BLOCK, 4, 0, BLOCK)])
    assert lay_out(*given).order.tolist() == [0, 1]


# Files that models come in, one layer each ---------------------------------------------------


def sectioned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """As the safetensors library saves them."""
    dtypes = list(WIDTHS)
    return sorted(tensors, key=lambda tensor: (dtypes.index(tensor.dtype), tensor.name))


def pruned(tensors: Iterable[Tensor], lost: Collection[int], start: int) -> Iterator[Row]:
    """The rows of what is kept of a file whose data begins at start."""
    begin = start
    for tensor in tensors:
        end, width = begin + tensor.nbytes, WIDTHS[tensor.dtype]
        if tensor.expert not in lost:
            # Of a sliced tensor about as many blocks as it keeps bytes.
            nbytes = tensor.nbytes if tensor.kept is None else tensor.kept
            blocks = max(0, end // BLOCK + -begin // BLOCK)
            gain = min(blocks, nbytes // BLOCK) * BLOCK if begin % width == 0 else 0
            yield nbytes, width, begin % BLOCK if gain else -1, gain
        begin = end


def kimi_k2(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    """INT4 of compressed-tensors: an 8-byte shape beside every weight."""
    for expert in range(experts):
        for projection in ("down", "gate", "up"):
            weight = f"{layer}.mlp.experts.{expert}.{projection}_proj.weight_"
            yield Tensor(weight + "packed", "I32", 7168 * 2048 // 2, expert)
            yield Tensor(weight + "scale", "BF16", 7168 * 2048 // 32 * 2, expert)
            yield Tensor(weight + "shape", "I32", 8, expert)
    yield Tensor(f"{layer}.mlp.shared_experts.down_proj.weight", "BF16", 7168 * 2048 * 2)
    yield from deepseek_router(layer, experts, kept)
    yield from norms(layer, 7168)
    yield Tensor(f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", 1024)
    yield Tensor(f"{layer}.self_attn.kv_a_proj_with_mqa.weight", "BF16", 576 * 7168 * 2)
    yield Tensor(f"{layer}.self_attn.o_proj.weight", "BF16", 7168 * 8192 * 2)
    yield Tensor(f"{layer}.self_attn.q_a_layernorm.weight", "BF16", 3072)
    yield Tensor(f"{layer}.self_attn.q_a_proj.weight", "BF16", 1536 * 7168 * 2)


def qwen3(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    """bf16, a tensor per expert and projection."""
    for expert in range(experts):
        for projection in ("down", "gate", "up"):
            name = f"{layer}.mlp.experts.{expert}.{projection}_proj.weight"
            yield Tensor(name, "BF16", 4096 * 1536 * 2, expert)
    yield Tensor(f"{layer}.mlp.gate.weight", "BF16", experts * 8192, kept=kept * 8192)
    yield from norms(layer, 4096)
    for name, nbytes in (("k_norm", 256), ("k_proj", 4 << 20), ("o_proj", 64 << 20)):
        yield Tensor(f"{layer}.self_attn.{name}.weight", "BF16", nbytes)
    for name, nbytes in (("q_norm", 256), ("q_proj", 64 << 20), ("v_proj", 4 << 20)):
        yield Tensor(f"{layer}.self_attn.{name}.weight", "BF16", nbytes)


def gpt_oss(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    """bf16, experts stacked in one tensor, rows that are no whole blocks, biases."""
    row, stacks = 2880 * 2, f"{layer}.mlp.experts."
    for name, size in (("down_proj", 2880 * row), ("gate_up_proj", 5760 * row)):
        yield Tensor(stacks + name, "BF16", experts * size, kept=kept * size)
    for name, size in (("down_proj_bias", row), ("gate_up_proj_bias", 2 * row)):
        yield Tensor(stacks + name, "BF16", experts * size, kept=kept * size)
    yield Tensor(f"{layer}.mlp.router.bias", "BF16", experts * 2, kept=kept * 2)
    yield Tensor(f"{layer}.mlp.router.weight", "BF16", experts * row, kept=kept * row)
    yield from norms(layer, 2880)
    for name, rows in (("k", 512), ("o", 2880), ("q", 4096), ("v", 512)):
        yield Tensor(f"{layer}.self_attn.{name}_proj.bias", "BF16", rows * 2)
        yield Tensor(f"{layer}.self_attn.{name}_proj.weight", "BF16", 2880 * 4096 * 2)
    yield Tensor(f"{layer}.self_attn.sinks", "BF16", 128)


def deepseek_v3(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    """FP8 in blocks of 128 by 128, each with a scale."""
    weights = [
        (f"mlp.experts.{expert}.{projection}_proj", 2048, 7168, expert)
        for expert in range(experts)
        for projection in ("down", "gate", "up")
    ]
    weights += [
        ("mlp.shared_experts.down_proj", 7168, 2048, None),
        ("self_attn.kv_a_proj_with_mqa", 576, 7168, None),
        ("self_attn.kv_b_proj", 32768, 512, None),
        ("self_attn.o_proj", 7168, 16384, None),
        ("self_attn.q_a_proj", 1536, 7168, None),
        ("self_attn.q_b_proj", 24576, 1536, None),
    ]
    for name, rows, columns, expert in weights:
        yield Tensor(f"{layer}.{name}.weight", "F8", rows * columns, expert)
        blocks = -(-rows // 128) * -(-columns // 128)
        yield Tensor(f"{layer}.{name}.weight_scale_inv", "F32", blocks * 4, expert)
    yield from deepseek_router(layer, experts, kept)
    yield from norms(layer, 7168)
    yield Tensor(f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", 1024)
    yield Tensor(f"{layer}.self_attn.q_a_layernorm.weight", "BF16", 3072)


def nvfp4(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    """Two 4-byte scalars beside every weight and its scales; an odd number in all."""
    for expert in range(experts):
        for projection in ("down", "gate", "up"):
            name = f"{layer}.mlp.experts.{expert}.{projection}_proj."
            yield Tensor(name + "input_scale", "F32", 4, expert)
            yield Tensor(name + "weight", "U8", 7168 * 2048 // 2, expert)
            yield Tensor(name + "weight_scale", "F8", 7168 * 2048 // 16, expert)
            yield Tensor(name + "weight_scale_2", "F32", 4, expert)
    yield from deepseek_router(layer, experts, kept)
    yield from norms(layer, 7168)
    yield Tensor(f"{layer}.self_attn.k_proj.k_scale", "F32", 4)
    yield Tensor(f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", 1024)
    yield Tensor(f"{layer}.self_attn.o_proj.weight", "BF16", 7168 * 16384 * 2)


def deepseek_router(layer: str, experts: int, kept: int) -> Iterator[Tensor]:
    yield Tensor(f"{layer}.mlp.gate.weight", "BF16", experts * 14336, kept=kept * 14336)
    yield Tensor(f"{layer}.mlp.gate.e_score_correction_bias", "F32", experts * 4, kept=kept * 4)


def norms(layer: str, hidden: int) -> Iterator[Tensor]:
    yield Tensor(f"{layer}.input_layernorm.weight", "BF16", hidden * 2)
    yield Tensor(f"{layer}.post_attention_layernorm.weight", "BF16", hidden * 2)


Model = Callable[[str, int, int], Iterator[Tensor]]


def shard_of(
    model: Model, experts: int, kept: int, *, layers: int, in_sections: bool, files: int = 1
) -> Columns:
    """What is left of files of so many layers each, other experts lost in each file."""
    rows: list[Row] = []
    for file in range(files):
        lost = random.Random(file).sample(range(experts), experts - kept)
        tensors: list[Tensor] = []
        for layer in range(layers):
            # In the order of names within a layer, or over all layers in sections.
            name = f"model.layers.{file * layers + layer:02}"
            tensors += sorted(model(name, experts, kept))
        rows += pruned(sectioned(tensors) if in_sections else tensors, lost, 9872 + 1000 * file)
    return columns(rows)


@pytest.mark.parametrize("in_sections", [True, False], ids=["in sections", "in layers"])
@pytest.mark.parametrize("ratio", [0.5, 0.65], ids=["half", "two thirds"])
@pytest.mark.parametrize(
    ("model", "experts", "layers"),
    [(qwen3, 128, 2), (gpt_oss, 128, 3), (deepseek_v3, 256, 1), (nvfp4, 256, 2)],
)
def test_nearly_all_of_a_large_shard_is_shared(
    model: Model, experts: int, layers: int, ratio: float, in_sections: bool
) -> None:
    kept = experts - int(experts * ratio)
    given = shard_of(model, experts, kept, layers=layers, in_sections=in_sections)
    assert shared_by_hand(lay_out(*given), given) >= 0.99 * given.nbytes.sum()


@pytest.mark.parametrize("in_sections", [True, False], ids=["in sections", "in layers"])
def test_shapes_of_half_the_experts_close_the_circle(in_sections: bool) -> None:
    given = shard_of(kimi_k2, 384, 192, layers=1, in_sections=in_sections)
    assert len(np.unique(given.phase)) > 300
    assert shared_by_hand(lay_out(*given), given) >= 0.99 * given.nbytes.sum()
    assert simple_share(given) < 0.2 * given.nbytes.sum()


@pytest.mark.parametrize("in_sections", [True, False], ids=["in sections", "in layers"])
def test_shapes_of_a_third_of_the_experts_close_it_for_two_source_shards(
    in_sections: bool,
) -> None:
    one, two = (
        shard_of(kimi_k2, 384, 134, layers=1, in_sections=in_sections, files=files)
        for files in (1, 2)
    )
    assert shared_by_hand(lay_out(*one), one) >= 0.8 * one.nbytes.sum()
    assert shared_by_hand(lay_out(*two), two) >= 0.99 * two.nbytes.sum()


@pytest.mark.parametrize("in_sections", [True, False], ids=["in sections", "in layers"])
def test_a_shard_of_few_fillers_is_walked_from_several_beginnings(in_sections: bool) -> None:
    given = shard_of(gpt_oss, 32, 16, layers=7, in_sections=in_sections)
    assert shared_by_hand(lay_out(*given), given) >= 0.98 * given.nbytes.sum()
