"""What each family's declaration says of attention, against the shapes of its tensors."""

from __future__ import annotations

import re

import pytest

from shardsurgeon.checkpoint.config import read_numbers
from shardsurgeon.checkpoint.kv_cache import KVCache, read_kv_cache
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.schema import family_for
from tests.families.specimens import builders, specimen

# Projections of a layer whose outputs are what it keeps, without quantized ones.
_KEPT = re.compile(r"layers\.(\d+)\.(?:\w+\.)*?((?:k|v)_proj|kv_a_proj_with_mqa)\.weight$")


def cache_of(name: str) -> KVCache:
    made = specimen(name)
    family = family_for(made.config, name, ())
    return read_kv_cache(family, made.config, read_numbers(family, made.config, name), name)


def rows_of(name: str) -> dict[int, list[int]]:
    """Layer → rows of its projections of keys, values and latents, as the headers have them."""
    rows: dict[int, list[int]] = {}
    towers = ("vision", "visual", "audio", "talker", "code2wav", "mtp", "qwen2")
    for tensor, (_, shape) in specimen(name).tensors.items():
        found = _KEPT.search(tensor)
        if found and len(shape) == 2 and not any(tower in tensor for tower in towers):
            rows.setdefault(int(found[1]), []).append(shape[0])
    return rows


@pytest.mark.parametrize("name", sorted(builders()))
def test_a_layer_keeps_as_much_as_its_projections_make(name: str) -> None:
    try:
        cache = cache_of(name)
    except FamilyError as error:
        assert "unknown attention" in error.problem
        return
    except ConfigError as error:
        # Of these the fixture's config is without the list that published ones have.
        assert name.startswith("cohere2_moe") and "does not say" in error.problem
        return
    assert cache.sequence_nbytes(1000) > 0
    found = rows_of(name)
    for number, layer in enumerate(cache.layers):
        kept = [each.row_nbytes for each in layer if not each.is_state]
        rows = found.get(number, [])
        if not kept or not rows or any(each.alignment > 1 for each in layer):
            continue
        # Gemma's full attention has one projection for both.
        both = 2 * rows[0] if len(rows) == 1 and len(layer) == 1 and "gemma" in name else sum(rows)
        assert sum(kept) >= 2 * both, (number, kept, rows)
        index = [each for each in specimen(name).tensors if f".{number}.self_attn.index" in each]
        assert index or sum(kept) == 2 * both, (number, kept, rows)
