"""What each GPU holds: nothing is lost, nothing that is split is copied, and the sums by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.checkpoint.tensor_parallel import (
    GpuWeights,
    Parallel,
    block_problem,
    gpu_weights,
)
from shardsurgeon.errors import UsageError
from tests.support.hollow import HollowSource, Spec, shard, whole

HIDDEN, INNER, EXPERTS, LAYERS, VOCABULARY = 64, 32, 8, 2, 100
HEADS, KV_HEADS, DIM = 8, 2, 16


def model(
    *extra: Spec,
    layers: int = LAYERS,
    dtype: str = "BF16",
    beside: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Checkpoint:
    """A qwen3_moe of these sizes, without its bytes."""
    specs: list[Spec] = [
        ("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)),
        ("lm_head.weight", "BF16", (VOCABULARY, HIDDEN)),
        ("model.norm.weight", "BF16", (HIDDEN,)),
        *extra,
    ]
    for n in range(layers):
        at = f"model.layers.{n}"
        specs += [
            (f"{at}.self_attn.q_proj.weight", "BF16", (HEADS * DIM, HIDDEN)),
            (f"{at}.self_attn.k_proj.weight", "BF16", (KV_HEADS * DIM, HIDDEN)),
            (f"{at}.self_attn.v_proj.weight", "BF16", (KV_HEADS * DIM, HIDDEN)),
            (f"{at}.self_attn.o_proj.weight", "BF16", (HIDDEN, HEADS * DIM)),
            (f"{at}.input_layernorm.weight", "BF16", (HIDDEN,)),
            (f"{at}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)),
        ]
        for expert in range(EXPERTS):
            for part in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, INNER) if part == "down_proj" else (INNER, HIDDEN)
                specs.append((f"{at}.mlp.experts.{expert}.{part}.weight", dtype, shape))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 65536,
        **settings,
    }

    files = {"config.json": whole(json.dumps(config).encode()), "model.safetensors": shard(specs)}
    for name, content in (beside or {}).items():
        files[name] = whole(json.dumps(content).encode())
    return open_checkpoint(HollowSource("small", files))


def weights(made: Checkpoint) -> GpuWeights:
    return gpu_weights(made, read_anatomy(made))


def by_hand(ranks: int, kept: int, ranks_of_experts: int | None = None) -> int:
    """The bytes of `model` on one of so many GPUs."""
    rows = -(-128 // ranks)  # of 100, rounded up to a multiple of 64
    attention = 2 * HEADS * DIM * HIDDEN // ranks + 2 * KV_HEADS * DIM * HIDDEN // min(
        ranks, KV_HEADS
    )
    expert = 3 * HIDDEN * INNER
    experts = kept * expert // ranks
    if ranks_of_experts is not None:
        experts = -(-kept // ranks_of_experts) * expert
    layer = attention + HIDDEN + kept * HIDDEN + experts
    return 2 * (2 * rows * HIDDEN + HIDDEN + LAYERS * layer)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kept", [2, 5, 8])
def test_each_gpu_has_its_part_and_copies_of_the_rest(ranks: int, kept: int) -> None:
    found = weights(model())
    assert found.nbytes(kept, Parallel(ranks, ranks)) == by_hand(ranks, kept)


@pytest.mark.parametrize(("kept", "gpus", "tensor"), [(8, 8, 8), (6, 4, 4), (8, 8, 2), (5, 2, 1)])
def test_expert_parallel_gives_whole_experts_to_all_gpus(kept: int, gpus: int, tensor: int) -> None:
    found = weights(model())
    parallel = Parallel(gpus, tensor, experts=True)
    assert found.nbytes(kept, parallel) == by_hand(tensor, kept, ranks_of_experts=gpus)


def test_layers_may_keep_different_numbers() -> None:
    found = weights(model())
    one = Parallel(1, 1)
    both = found.nbytes({0: 3, 1: 5}, one)
    assert both == (found.nbytes(3, one) + found.nbytes(5, one)) // 2


def test_a_tied_head_is_not_loaded() -> None:
    tied = weights(model(tie_word_embeddings=True)).nbytes(8, Parallel(1, 1))
    assert by_hand(1, 8) - tied == 128 * HIDDEN * 2


def test_down_projections_to_a_latent_and_small_gates_are_whole() -> None:
    plain = weights(model())
    for name in (
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "model.layers.0.self_attn.indexer.wq_b.weight",
    ):
        found = weights(model((name, "BF16", (32, 32))))
        assert found.whole - plain.whole == 2048, name
    split = weights(model(("model.layers.0.self_attn.q_b_proj.weight", "BF16", (32, 32))))
    assert (split.whole, split.split - plain.split) == (plain.whole, 2048)


def test_a_fused_projection_gives_each_gpu_a_kv_head() -> None:
    rows = (HEADS + 2 * KV_HEADS) * DIM
    name = "model.layers.0.self_attn.qkv_proj.weight"
    found = weights(model((name, "BF16", (rows, HIDDEN))))
    more = found.nbytes(8, Parallel(8, 8)) - by_hand(8, 8)
    assert more == (1 + 2) * DIM * HIDDEN * 2


def test_ranks_divide_the_gpus() -> None:
    with pytest.raises(UsageError, match="3 ranks do not divide 8 GPUs"):
        Parallel(8, 3)


def test_experts_in_fp8_blocks_are_not_split_within_a_block() -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    made = model(dtype="F8_E4M3", **quantized)
    anatomy = read_anatomy(made)
    assert block_problem(made, anatomy, Parallel(4, 4)) is None
    problem = block_problem(made, anatomy, Parallel(8, 8))
    assert problem == "an expert's width 32 over 8 ranks is 4, not whole FP8 blocks of 8"
    assert block_problem(made, anatomy, Parallel(8, 8, experts=True)) is None


@settings(max_examples=60, deadline=None)
@given(
    kept=st.integers(1, 7),
    ranks=st.sampled_from([1, 2, 4, 8]),
    experts=st.booleans(),
)
def test_more_experts_weigh_more_and_more_ranks_less(kept: int, ranks: int, experts: bool) -> None:
    parallel = Parallel(ranks, ranks, experts)
    assert FOUND.nbytes(kept, parallel) <= FOUND.nbytes(kept + 1, parallel)
    doubled = replace(parallel, gpus=2 * ranks, tensor=2 * ranks)
    assert FOUND.nbytes(kept, doubled) <= FOUND.nbytes(kept, parallel)
    assert ranks * FOUND.nbytes(kept, parallel) >= FOUND.nbytes(kept, Parallel(1, 1))


FOUND = weights(model())
