"""What the cost model reads of a model, over fixtures whose configs say it too."""

from __future__ import annotations

import pytest

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.layerwise.memory import ModelSize, model_size
from tests.families.specimens import Specimen, specimen


def size_of(made: Specimen) -> ModelSize:
    checkpoint = made.checkpoint()
    return model_size(checkpoint, read_anatomy(checkpoint))


@pytest.mark.parametrize(
    ("name", "attends"),
    [
        # Which layers look back at all tokens before, from each config; MTP layers last.
        ("deepseek_v3", [1, 1, 1, 1]),
        ("qwen3_next", [0, 0, 0, 1, 1]),
        ("kimi_linear", [0, 0, 0, 1]),
        ("jamba", [0, 0, 1, 0]),
        ("nemotron_h", [0, 0, 1, 0, 1, 0]),
        ("lfm2_moe", [0, 1, 0]),
        ("minimax", [0, 1]),
        ("inkling", [1, 1, 1]),
    ],
)
def test_layers_that_look_back_at_no_token_multiply_no_pairs(name: str, attends: list[int]) -> None:
    size = size_of(specimen(name))
    each = size.query + size.value
    assert [layer.pairs for layer in size.layers] == [each * looks for looks in attends]


def test_an_indexer_computes_the_whole_square_of_tokens() -> None:
    size = size_of(specimen("glm_moe_dsa"))
    # Two heads of 16 + 8 for queries, of 16 for values; indexers of two heads of 16 in two layers.
    attention = 2 * (2 * 24 + 2 * 16)
    assert [layer.pairs for layer in size.layers] == [attention + 64] * 2 + [attention] * 2
    assert size.pair_nbytes == 2 * 2 * 4


def test_the_vocabulary_of_an_mtp_layer_is_no_product() -> None:
    made = specimen("deepseek_v3")
    lean = made
    for name in made.tensors:
        if name.startswith("model.layers.3.") and ("embed_tokens" in name or "head.head" in name):
            lean = lean.without(name)
    assert len(lean.tensors) == len(made.tensors) - 2
    assert size_of(made) == size_of(lean)


def test_a_head_is_as_wide_as_the_config_says_and_not_as_the_part_that_is_rotated() -> None:
    made = specimen("deepseek_v4")
    assert (made.config["head_dim"], made.config["qk_rope_head_dim"]) == (32, 8)
    size = size_of(made)
    assert (size.heads, size.query, size.value) == (4, 4 * 32, 4 * 32)
    latent = size_of(specimen("deepseek_v3"))
    assert (latent.heads, latent.query, latent.value) == (2, 2 * (16 + 8), 2 * 16)


def test_widths_are_found_under_the_names_of_older_models() -> None:
    assert (size_of(specimen("dbrx")).width, size_of(specimen("mistral_native")).width) == (64, 64)
