"""What a model keeps of a sequence: numbers worked out by hand, and what must hold for any config.

`tests/serving/test_specs.py` compares with vLLM's own specs where its CPU build is installed.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.config import Numbers
from shardsurgeon.checkpoint.kv_cache import KVCache, read_kv_cache, stored_dtype
from shardsurgeon.checkpoint.roles import ExpertCounts
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.attention import CACHES
from shardsurgeon.families.schema import all_families, parse_family

FAMILIES = {family.name: family for family in all_families()}


def numbers(layers: int, mtp: int = 0) -> Numbers:
    return Numbers(layers, ExpertCounts(8, {}, 8), False, 2, 1, 1, mtp, 0)


def kept(family: str, layers: int, config: dict[str, Any], **options: Any) -> KVCache:
    """What the layers of a family keep, by a config that says only what matters."""
    of = numbers(layers, options.pop("mtp_layers", 0))
    return read_kv_cache(FAMILIES[family], config, of, "config.json", **options)


HEADS = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 4096}
LATENT = {
    "num_attention_heads": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
}


def test_heads_keep_a_key_and_a_value_each() -> None:
    # 94 layers x (key + value) x 4 heads x 128 x 2 bytes
    cache = kept("qwen3_moe", 94, HEADS)
    assert cache.token_nbytes == 192_512
    assert cache.sequence_nbytes(32768) == 192_512 * 32768


def test_ranks_share_heads_until_each_has_one_and_then_copy_it() -> None:
    of_ranks = {n: kept("qwen3_moe", 94, HEADS, ranks=n).token_nbytes for n in (1, 2, 4, 8)}
    assert of_ranks == {1: 192_512, 2: 96_256, 4: 48_128, 8: 48_128}


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "problem"),
    [(4, 3, "64 attention heads"), (5, 2, "5 KV heads"), (6, 4, "6 KV heads")],
)
def test_ranks_that_engines_refuse_are_refused(kv_heads: int, ranks: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        kept("qwen3_moe", 2, HEADS | {"num_key_value_heads": kv_heads}, ranks=ranks)


def test_the_head_size_is_the_hidden_size_by_heads_where_a_config_has_none() -> None:
    config = HEADS | {"head_dim": None, "hidden_size": 6144, "num_attention_heads": 48}
    # 56 layers x 2 x 4 x 128 x 2
    assert kept("mixtral", 56, config).token_nbytes == 114_688


def test_a_latent_is_one_vector_on_every_rank() -> None:
    for ranks in (1, 8):
        assert kept("deepseek_v3", 61, LATENT, ranks=ranks).token_nbytes == 61 * 576 * 2


def test_sparse_attention_keeps_keys_in_fp8_with_a_scale() -> None:
    # 576 x 2 of the latent, 128 + 4 of the index
    cache = kept("deepseek_v32", 61, LATENT | {"index_head_dim": 128})
    assert cache.token_nbytes == 61 * (1152 + 132)
    # In FP8 the latent is 512 bytes, 4 scales of 4 and 64 numbers of 2.
    cache = kept("deepseek_v32", 61, LATENT | {"index_head_dim": 128}, dtype="fp8")
    assert cache.token_nbytes == 61 * (512 + 16 + 128 + 132)


def test_layers_that_use_the_choice_of_another_keep_no_index() -> None:
    shared = {"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_head_dim": 128}
    cache = kept("glm_moe_dsa", 78, LATENT | shared)
    # Layers 0, 1, 2 and from there every fourth: 2, 6, ..., 74.
    assert cache.token_nbytes == 78 * 1152 + (3 + 18) * 132
    said = LATENT | {"index_head_dim": 128, "index_topk_pattern": "FSSF"}
    assert [len(layer) for layer in kept("glm_moe_dsa", 4, said).layers] == [2, 1, 1, 2]


def test_a_window_keeps_its_tokens_and_the_block_it_begins_in() -> None:
    config = HEADS | {
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    cache = kept("gpt_oss", 36, config)
    row = 2 * 8 * 64 * 2
    assert cache.token_nbytes == 18 * row
    assert cache.sequence_nbytes(131_072) == 18 * row * (131_072 + 128 + 16)
    # Shorter than the window: 6 blocks of 16 and one more.
    assert cache.sequence_nbytes(96) == 18 * row * (96 + 96 + 16)
    # Without the list every second layer has a window, the first does.
    assert kept("gpt_oss", 36, {k: v for k, v in config.items() if k != "layer_types"}) == cache


def test_a_window_may_have_other_heads() -> None:
    config = HEADS | {
        "hybrid_layer_pattern": [0, 1],
        "v_head_dim": 128,
        "head_dim": 192,
        "swa_num_key_value_heads": 8,
        "swa_head_dim": 192,
        "swa_v_head_dim": 128,
        "swa_num_attention_heads": 64,
        "sliding_window_size": 128,
    }
    (full,), (window,) = kept("mimo_v2_flash", 2, config).layers
    assert (full.row_nbytes, full.window) == (4 * (192 + 128) * 2, None)
    assert (window.row_nbytes, window.window) == (8 * (192 + 128) * 2, 128)


def test_layers_that_share_a_cache_have_none() -> None:
    config = HEADS | {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 3}
    assert [len(layer) for layer in kept("gemma4", 4, config).layers] == [1, 0, 0, 0]


def test_chunks_end_where_the_next_begins() -> None:
    cache = kept("llama4", 48, HEADS | {"num_key_value_heads": 8})
    row = 2 * 8 * 128 * 2
    assert cache.token_nbytes == 12 * row
    # 8,192 tokens and the one that is computed, in blocks of 16.
    assert cache.sequence_nbytes(100_000) == 12 * row * 100_000 + 36 * row * (8192 + 16)
    assert kept("llama4", 4, HEADS | {"attention_chunk_size": None}).sequence_nbytes(
        10_000
    ) == 4 * 10_000 * (2 * 4 * 128 * 2)


def test_a_delta_net_has_a_state_that_does_not_grow() -> None:
    config = HEADS | {
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 15,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_key_value_heads": 2,
        "mamba_ssm_dtype": "float32",
    }
    cache = kept("qwen3_5_moe", 60, config)
    conv, state = (2 * 16 * 128 + 64 * 128) * 3 * 2, 64 * 128 * 128 * 4
    assert cache.state_nbytes == 45 * (conv + state) == 192_061_440
    assert cache.token_nbytes == 15 * 2 * 2 * 256 * 2
    in_two = kept("qwen3_5_moe", 60, config, ranks=2)
    assert (in_two.state_nbytes, in_two.token_nbytes) == (96_030_720, cache.token_nbytes / 2)


def test_mamba_states_are_in_the_dtype_that_a_config_says() -> None:
    config = HEADS | {
        "hybrid_override_pattern": "ME*E",
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "num_key_value_heads": 2,
        "num_attention_heads": 32,
    }
    conv, state = (128 * 64 + 2 * 8 * 128) * 3 * 2, 128 * 64 * 128
    assert kept("nemotron_h", 4, config).state_nbytes == conv + state * 4
    half = kept("nemotron_h", 4, config | {"mamba_ssm_cache_dtype": "bfloat16"})
    assert half.state_nbytes == conv + state * 2
    assert [len(layer) for layer in half.layers] == [1, 0, 1, 0]
    # On 16 ranks each of the 8 groups is there twice.
    many = kept("nemotron_h", 4, config, ranks=16)
    assert many.state_nbytes == (128 * 64 + 2 * 16 * 128) // 16 * 3 * 2 + state // 16 * 4


def test_kimi_delta_attention_is_listed_by_numbers_from_one() -> None:
    linear = {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 32, "head_dim": 128}
    config = LATENT | {"linear_attn_config": {**linear, "short_conv_kernel_size": 4}}
    cache = kept("kimi_linear", 4, config)
    assert cache.state_nbytes == 3 * (3 * 32 * 128 * 3 * 2 + 32 * 128 * 128 * 4)
    assert cache.token_nbytes == 576 * 2


def test_a_short_convolution_keeps_its_last_inputs() -> None:
    config = HEADS | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    assert kept("lfm2_moe", 2, config).state_nbytes == 4096 * 2 * 2


def test_compressed_tokens_are_one_row_for_four_or_many() -> None:
    config = HEADS | {
        "compress_ratios": [0, 4, 128],
        "head_dim": 512,
        "sliding_window": 128,
        "index_head_dim": 128,
        "num_key_value_heads": 1,
    }
    cache = kept("deepseek_v4", 3, config)
    assert [len(layer) for layer in cache.layers] == [1, 5, 3]
    # 584 bytes for 4 and for 128 tokens, 132 of index keys for 4.
    assert cache.token_nbytes == 584 / 4 + 132 / 4 + 584 / 128
    (window,) = cache.layers[0]
    # Three blocks of 64 rows, each of them a multiple of 576 bytes.
    assert window.sequence_nbytes(100_000) == 3 * 37_440
    with pytest.raises(ConfigError, match="layer 1 is 8"):
        kept("deepseek_v4", 3, config | {"compress_ratios": [0, 8, 128]})


def test_mtp_layers_are_counted_on_request() -> None:
    assert len(kept("deepseek_v3", 3, LATENT, mtp_layers=1).layers) == 3
    with_mtp = kept("deepseek_v3", 3, LATENT, mtp_layers=1, mtp=True)
    assert with_mtp.token_nbytes == 4 * 1152


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({}, ""),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}, "fp8"),
        ({"quantization_config": {"kv_cache_scheme": None}}, ""),
        ({"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, "fp8"),
        ({"text_config": {"quantization_config": {"kv_cache_quant_algo": "fp8"}}}, "fp8"),
    ],
)
def test_the_dtype_is_what_the_checkpoint_was_calibrated_for(
    config: dict[str, Any], stored: str
) -> None:
    assert stored_dtype(config) == stored


def test_fp8_halves_keys_and_values_and_no_states() -> None:
    half, whole = (kept("qwen3_moe", 2, HEADS, dtype=dtype) for dtype in ("fp8", "auto"))
    assert half.token_nbytes == whole.token_nbytes / 2
    assert (half.dtype, whole.dtype) == ("fp8", "bfloat16")
    assert kept("qwen3_moe", 2, HEADS | {"torch_dtype": "float16"}).dtype == "float16"


@pytest.mark.parametrize("family", ["minimax", "inkling", "deepseek_v41"])
def test_unknown_attention_is_said_not_guessed(family: str) -> None:
    with pytest.raises(FamilyError, match="unknown attention"):
        kept(family, 2, HEADS)


def test_a_kind_of_layer_that_nobody_declared_is_refused() -> None:
    config = HEADS | {"layer_types": ["full_attention", "ring_attention"]}
    with pytest.raises(ConfigError, match="layer 1 is 'ring_attention'"):
        kept("gemma4", 2, config)
    with pytest.raises(ConfigError, match="has no layer_types"):
        kept("gemma4", 2, HEADS)


@pytest.mark.parametrize("wrong", ["4", -1, 2.5])
def test_a_number_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads is"):
        kept("qwen3_moe", 2, HEADS | {"num_key_value_heads": wrong})


def test_a_number_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="has no hidden_size"):
        kept("qwen3_moe", 2, {"num_attention_heads": 4})


def test_a_declaration_names_caches_that_there_are() -> None:
    named = {cache for family in FAMILIES.values() for cache in family.attention.caches()}
    assert named <= CACHES
    with pytest.raises(FamilyError, match="'head' is no cache"):
        parse_family('like = "qwen3_moe"\nfacts = ""\n[attention]\nevery = "head"\n', "own.toml")


def test_attention_is_not_inherited() -> None:
    own = parse_family('like = "deepseek_v3"\nfacts = "mine"\n', "own.toml")
    with pytest.raises(FamilyError, match="no declaration says what layers of own keep"):
        read_kv_cache(own, LATENT, numbers(2), "config.json")


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=5
    ),
    window=st.integers(1, 5000),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([64, 128]),
    tokens=st.integers(0, 20_000),
    more=st.integers(0, 5000),
    ranks=st.sampled_from([1, 2, 4, 8]),
)
def test_more_tokens_take_no_less_and_more_ranks_no_more(
    kinds: list[str], window: int, kv_heads: int, head_dim: int, tokens: int, more: int, ranks: int
) -> None:
    config = {
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "layer_types": kinds,
        "sliding_window": window,
    }
    alone, shared = (kept("laguna", len(kinds), config, ranks=n) for n in (1, ranks))
    assert shared.sequence_nbytes(tokens) <= shared.sequence_nbytes(tokens + more)
    assert shared.sequence_nbytes(tokens) <= alone.sequence_nbytes(tokens)
    # Together the ranks have all of it.
    assert shared.sequence_nbytes(tokens) * ranks >= alone.sequence_nbytes(tokens)
    # A window never takes more than all tokens and a block.
    full = kept("laguna", len(kinds), {**config, "sliding_window": None})
    block = 16 * sum(each.row_nbytes for layer in full.layers for each in layer)
    assert alone.sequence_nbytes(tokens) <= full.sequence_nbytes(tokens) + block


def test_a_declaration_of_ones_own_may_name_lightning_attention() -> None:
    text = 'like = "mixtral"\nfacts = ""\n[attention]\nevery = "lightning"\nnth = "group"\n'
    own = parse_family(text, "own.toml")
    cache = read_kv_cache(own, HEADS | {"group": 4}, numbers(8), "config.json", ranks=2)
    # Six layers of eight: half of 64 heads, a square of 128 numbers each.
    assert cache.state_nbytes == 6 * 32 * 128 * 128 * 2
    assert cache.token_nbytes == 2 * 2 * 2 * 128 * 2


def test_mamba_of_the_first_kind_has_a_state_per_channel() -> None:
    config = HEADS | {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_expand": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "num_attention_heads": 32,
    }
    cache = kept("jamba", 4, config)
    assert [len(layer) and layer[0].is_state for layer in cache.layers] == [True, True, False, True]
    assert cache.state_nbytes == 3 * 2 * 4096 * (3 + 16) * 2
