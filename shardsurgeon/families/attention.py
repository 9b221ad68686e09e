"""What a family file may say of attention: which layers remember what of the tokens before."""

from __future__ import annotations

from dataclasses import dataclass

# What a layer may keep: `checkpoint.kv_cache` has a formula for each. Several are joined by `+`.
CACHES = frozenset(
    {
        *("heads", "window", "chunk", "mla", "indexer", "index_keys", "compressed", "none"),
        *("mamba1", "mamba2", "delta_net", "kda", "lightning", "short_conv"),
    }
)
# The numbers that the formulas take → the keys of config.json that have them in most families.
USUAL_KEYS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "chunk": "attention_chunk_size",
    "latent": "kv_lora_rank",
    "rope": "qk_rope_head_dim",
    "nope": "qk_nope_head_dim",
    "index_dim": "index_head_dim",
    "key_heads": "linear_num_key_heads",
    "key_dim": "linear_key_head_dim",
    "value_heads": "linear_num_value_heads",
    "value_dim": "linear_value_head_dim",
    "conv": "linear_conv_kernel_dim",
    "context": "max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class AttentionKeys:
    """Which layer keeps what in the KV cache, and where config.json has the numbers for it.

    A cache is one of CACHES, or several joined by `+`. For a layer the first of these counts
    that the config has:

    layers: dotted paths, from the family's `at`, of a list or text with an entry per layer, or of
    one entry for all; kinds: entry → cache (`true` and `null` are written so).
    listed: path of a list of layer numbers, from 1 → cache of these layers.
    nth, nth_usual, nth_offset: every how many layers one keeps `nth_cache`: the key, the number
    where the config does not say it, the key of which one it is (from 0; else it is the last).
    every: cache of all other layers. mtp: of MTP layers, where it is another.

    keys: number of a formula, or `cache.number` → path in the config, where it is not in
    USUAL_KEYS; usual: number of a formula → what it is where the config does not have its key.
    shared: key of how many layers at the end use the cache of an earlier one.
    window_also: tokens more than the window that engines keep; stored: dtype of keys and values
    where engines have but one for the family. state: dtype of recurrent states
    where no key `state_dtype` says it; "" for the dtype of the model.
    unknown: why it is not known what the layers keep.
    """

    every: str = ""
    layers: tuple[str, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()
    listed: tuple[tuple[str, str], ...] = ()
    nth: str = ""
    nth_usual: int = 0
    nth_offset: str = ""
    nth_cache: str = "heads"
    mtp: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    usual: tuple[tuple[str, str], ...] = ()
    shared: str = ""
    window_also: int = 0
    stored: str = ""
    state: str = ""
    unknown: str = ""

    def caches(self) -> frozenset[str]:
        """Every cache that is named, taken apart."""
        named = [self.every, self.nth_cache, self.mtp]
        named += [cache for _, cache in (*self.kinds, *self.listed)]
        return frozenset(part for name in named if name for part in name.split("+"))

    def paths(self, cache: str, number: str) -> tuple[str, ...]:
        """Where a config may have a number of a formula, the most particular place first."""
        own = dict(self.keys)
        found = own.get(f"{cache}.{number}"), own.get(number), USUAL_KEYS.get(number)
        return tuple(filter(None, found))


UNDECLARED = AttentionKeys()
