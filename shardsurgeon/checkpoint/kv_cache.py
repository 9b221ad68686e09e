"""What an engine keeps of a sequence: the KV cache and the states of every layer, in bytes. Pure.

From config.json and the family's declaration of its attention. The formulas are those of vLLM
0.32, and a test compares them with its KV cache specs; `serving_memory.md` gives each with its
source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from shardsurgeon.checkpoint.config import Numbers, config_section, quantization_sections
from shardsurgeon.errors import ConfigError, FamilyError
from shardsurgeon.families.attention import UNDECLARED, AttentionKeys
from shardsurgeon.families.schema import Family
from shardsurgeon.storage.formats.strict_json import brief

# Tokens of one block of the cache, where a layer does not set another number (vLLM's default).
BLOCK_TOKENS = 16
_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float8_e4m3fn": 1}
# Of the index keys of sparse attention: one scale in float32 for so many numbers in FP8.
_SCALED = 128
# Bytes per token of sparse latent attention in FP8 (`fp8_ds_mla`), with scales and rotary part.
_SPARSE_FP8, _COMPRESSED_FP8 = 656, 584


@dataclass(frozen=True, slots=True)
class Cache:
    """What one layer keeps in one place, on one GPU.

    row_nbytes: of one row; tokens_per_row: how many tokens it stands for. window: tokens before
    the newest that are kept, None for all of them; is_state: one row, whatever was said before.
    block: tokens per block where the layer sets it; alignment: what a block's bytes are a multiple
    of; slack: blocks more than the tokens need, of a window that begins within one.
    """

    row_nbytes: int
    tokens_per_row: int = 1
    window: int | None = None
    is_state: bool = False
    block: int | None = None
    alignment: int = 1
    slack: int = 0

    def sequence_nbytes(self, tokens: int, block: int = BLOCK_TOKENS) -> int:
        """Bytes of a sequence of so many tokens, in whole blocks."""
        if self.is_state:
            return self.row_nbytes
        size = self.block or block
        page = self.row_nbytes * size // self.tokens_per_row
        page = -(-page // self.alignment) * self.alignment
        if self.window is None:
            return -(-tokens // size) * page
        # The window, and the token that is computed.
        return (-(-min(self.window, tokens) // size) + self.slack) * page


@dataclass(frozen=True, slots=True)
class KVCache:
    """What all layers keep on one GPU.

    layers: of each decoder layer, MTP layers behind; context: the most tokens that the model is
    made for, None where the config does not say it; dtype: of keys and values.
    """

    layers: tuple[tuple[Cache, ...], ...]
    context: int | None
    dtype: str

    def sequence_nbytes(self, tokens: int, block: int = BLOCK_TOKENS) -> int:
        """Bytes on each GPU of one sequence of so many tokens."""
        caches = (cache for layer in self.layers for cache in layer)
        return sum(cache.sequence_nbytes(tokens, block) for cache in caches)

    @property
    def token_nbytes(self) -> float:
        """Bytes on each GPU that one more token of a long sequence takes."""
        rows = (c for layer in self.layers for c in layer if not c.is_state and c.window is None)
        return sum(cache.row_nbytes / cache.tokens_per_row for cache in rows)

    @property
    def state_nbytes(self) -> int:
        """Bytes on each GPU of the states of one sequence, whatever its length."""
        return sum(c.row_nbytes for layer in self.layers for c in layer if c.is_state)


def read_kv_cache(
    family: Family,
    config: Mapping[str, Any],
    numbers: Numbers,
    where: str,
    *,
    ranks: int = 1,
    dtype: str = "auto",
    mtp: bool = False,
    beside: Mapping[str, Any] | None = None,
) -> KVCache:
    """What every layer of a model keeps, on each of `ranks` GPUs that share each layer's heads.

    dtype: `auto` as the checkpoint says, or `fp8`; mtp: with the MTP layers; beside: as of
    `stored_dtype`. Raises FamilyError where
    it is not known what the family's layers keep, ConfigError, naming `where`, for a number that
    is missing or does not divide by the ranks.
    """
    attention = family.attention
    if attention == UNDECLARED or attention.unknown:
        why = attention.unknown or f"no declaration says what layers of {family.name} keep"
        raise FamilyError(where, f"unknown attention: {why}", "its KV cache is not guessed")
    section = text_section(family, config)
    stored = stored_dtype(config, beside) if dtype == "auto" else dtype
    stored = attention.stored or stored
    model = _model_dtype(section, config)
    reader = _Reader(attention, section, where, ranks, model, stored)
    count = numbers.num_layers + (numbers.mtp_layers if mtp else 0)
    kinds = list(_kinds(attention, section, numbers.num_layers, count, where))
    return KVCache(
        layers=tuple(
            tuple(chain.from_iterable(_FORMULAS[p](reader.of(n, p)) for p in kind.split("+")))
            for n, kind in enumerate(kinds)
        ),
        context=reader.of(0, "heads").find("context"),
        dtype=stored or model,
    )


def text_section(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about the text model: the first that counts layers."""
    sections = [s for s in (config_section(config, at) for at in family.config.at) if s is not None]
    names = [name.split(".")[0] for name in family.config.num_layers]
    return next((s for s in sections if any(name in s for name in names)), config)


def stored_dtype(config: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """`fp8` where a checkpoint is calibrated for keys and values in FP8, "" where not.

    As vLLM reads it: `kv_cache_scheme`, or ModelOpt's `kv_cache_quant_algo`. beside: the content of
    hf_quant_config.json, which says it where the config says nothing of quantization.
    """
    said_in_config = [section for _, section in quantization_sections(config)]
    for section in said_in_config or [beside or {}]:
        inner = section.get("quantization")
        for said in (section, inner if isinstance(inner, Mapping) else {}):
            scheme = said.get("kv_cache_scheme")
            if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8:
                return "fp8"
            if str(said.get("kv_cache_quant_algo")).lower() == "fp8":
                return "fp8"
    return ""


def _model_dtype(section: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The dtype that engines compute in: the config's, and bfloat16 for float32."""
    said = (part.get(key) for part in (section, config) for key in ("dtype", "torch_dtype"))
    name = next((str(value) for value in said if value), "bfloat16").removeprefix("torch.")
    return name if _NBYTES.get(name) == 2 else "bfloat16"


def value_at(section: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted path, None where there is none."""
    node: Any = section
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _has(section: Mapping[str, Any], dotted: str) -> bool:
    outer, _, key = dotted.rpartition(".")
    return key in (config_section(section, outer) or {})


def _kinds(
    attention: AttentionKeys, section: Mapping[str, Any], layers: int, count: int, where: str
) -> Iterator[str]:
    """What each layer keeps, by the first part of the declaration that the config has."""
    found = (value_at(section, path) for path in attention.layers)
    entries = next((value for value in found if value is not None), None)
    listed = {cache: value_at(section, path) for path, cache in attention.listed}
    said = value_at(section, attention.nth) if attention.nth else None
    step = said if type(said) is int and said > 0 else attention.nth_usual
    offset = value_at(section, attention.nth_offset) if attention.nth_offset else None
    own = layers - (value_at(section, attention.shared) or 0) if attention.shared else layers
    kind = ""
    for n in range(count):
        if own <= n < layers:
            kind = "none"
        elif entries is not None and (not isinstance(entries, list | str) or n < len(entries)):
            entry = entries[n] if isinstance(entries, list | str) else entries
            word = json.dumps(entry) if isinstance(entry, bool) else str(entry)
            found_kind = dict(attention.kinds).get(word)
            if found_kind is None:
                problem = f"layer {n} is {brief(entry)}, which is no known attention"
                raise ConfigError(where, problem, "its KV cache is not guessed")
            kind = found_kind
        elif n >= layers:
            kind = attention.mtp or attention.every or kind
        elif any(isinstance(numbers, list) and n + 1 in numbers for numbers in listed.values()):
            kind = next(c for c, numbers in listed.items() if numbers and n + 1 in numbers)
        elif step and n % step == (step - 1 if offset is None else offset):
            kind = attention.nth_cache
        elif attention.every:
            kind = attention.every
        else:
            missing = " or ".join((*attention.layers, *(path for path, _ in attention.listed)))
            raise ConfigError(where, f"does not say what layer {n} keeps: has no {missing}")
        yield kind


@dataclass(frozen=True, slots=True)
class _Reader:
    """The numbers of one layer's formula."""

    attention: AttentionKeys
    section: Mapping[str, Any]
    where: str
    ranks: int
    model: str
    stored: str
    layer: int = 0
    cache: str = ""

    def of(self, layer: int, cache: str) -> _Reader:
        """The same for one cache of one layer."""
        return replace(self, layer=layer, cache=cache)

    def find(self, number: str) -> int | None:
        """A number of the formula, None where the config has none; of lists, the layer's own."""
        for path in self.attention.paths(self.cache, number):
            value = value_at(self.section, path)
            if isinstance(value, list):
                value = value[self.layer] if self.layer < len(value) else None
            if value is None or value is False:
                continue
            if type(value) is not int or value < 0:
                problem = f"{path} is {brief(value)}, expected a whole number"
                raise ConfigError(self.where, problem)
            return value
        usual = dict(self.attention.usual).get(number)
        absent = not any(_has(self.section, p) for p in self.attention.paths(self.cache, number))
        return int(usual) if usual and absent else None

    def get(self, number: str, usual: int | None = None) -> int:
        """A number of the formula, `usual` where the config has none."""
        found = self.find(number)
        if found is None and usual is None:
            paths = " or ".join(self.attention.paths(self.cache, number)) or number
            raise ConfigError(self.where, f"has no {paths}, which the KV cache needs")
        return found if found is not None else usual or 0

    def share(self, number: int, what: str) -> int:
        """What one GPU has of so many heads or channels, which engines only split evenly."""
        if number % self.ranks:
            problem = f"{number} {what} do not divide by {self.ranks} ranks"
            raise ConfigError(self.where, problem, "take another number of ranks")
        return number // self.ranks

    @property
    def nbytes(self) -> int:
        """Bytes of one number of keys and values."""
        return 1 if self.stored == "fp8" else _NBYTES[self.model]

    @property
    def model_nbytes(self) -> int:
        return _NBYTES[self.model]

    @property
    def state_nbytes(self) -> int:
        """Bytes of one number of a recurrent state."""
        paths = self.attention.paths(self.cache, "state_dtype")
        said = next((v for p in paths if (v := value_at(self.section, p))), self.attention.state)
        return _NBYTES.get(str(said), self.model_nbytes)

    def head_row(self) -> int:
        """Bytes of one token's keys and values, in this GPU's heads."""
        heads = self.get("heads")
        head_dim = self.find("head_dim") or self.get("hidden") // heads
        kv_heads = self.get("kv_heads", heads)
        self.share(heads, "attention heads")
        if kv_heads % self.ranks and self.ranks % kv_heads:
            problem = f"{kv_heads} KV heads neither divide by {self.ranks} ranks nor the reverse"
            raise ConfigError(self.where, problem, "take another number of ranks")
        width = head_dim + self.get("value_head_dim", head_dim)
        return max(1, kv_heads // self.ranks) * width * self.nbytes


def _heads(layer: _Reader) -> list[Cache]:
    # A window that the config gives for all layers; of null and 0 there is none.
    return [Cache(layer.head_row())]


def _window(layer: _Reader) -> list[Cache]:
    window = layer.find("window")
    if not window:
        return [Cache(layer.head_row())]
    return [Cache(layer.head_row(), window=window + layer.attention.window_also, slack=1)]


def _chunk(layer: _Reader) -> list[Cache]:
    chunk = layer.find("chunk")
    return [Cache(layer.head_row(), window=chunk + 1 if chunk else None)]


def _mla(layer: _Reader) -> list[Cache]:
    """One vector for all heads, on every GPU; some models of these families have plain heads."""
    if not layer.find("latent") and not layer.find("nope"):
        return _heads(layer)
    layer.share(layer.get("heads"), "attention heads")
    width = layer.get("latent") + layer.get("rope", 0)
    sparse = layer.find("index_dim") and layer.stored == "fp8"
    return [Cache(_SPARSE_FP8 if sparse else width * layer.nbytes)]


def _indexer(layer: _Reader) -> list[Cache]:
    """Keys of sparse attention in FP8; some layers use the choice of an earlier one."""
    pattern = value_at(layer.section, "index_topk_pattern")
    step = value_at(layer.section, "index_topk_freq") or 1
    offset = value_at(layer.section, "index_skip_topk_offset")
    first = (2 if offset is None else offset) - 1
    if isinstance(pattern, list | str) and layer.layer < len(pattern):
        skipped = pattern[layer.layer] == "S"
    else:
        skipped = max(layer.layer - first, 0) % step != 0
    return [] if skipped else [Cache(_index_row(layer.get("index_dim")))]


def _index_row(dim: int) -> int:
    return dim + dim // _SCALED * 4


def _index_keys(layer: _Reader) -> list[Cache]:
    """Keys of block-sparse attention, one vector per token, in bfloat16."""
    return [Cache(layer.get("index_dim") * 2)]


def _compressed(layer: _Reader) -> list[Cache]:
    """DeepSeek-V4: a window of tokens; beside it one row for every 4 or 128 tokens, and what is
    being compressed, in float32; index keys for every 4."""
    ratio = value_at(layer.section, "compress_ratios")[layer.layer]
    align, row = 576, _COMPRESSED_FP8
    window = Cache(row, window=layer.get("window"), block=64, alignment=align, slack=1)
    if ratio <= 1:
        return [window]
    if ratio not in (4, 128):
        raise ConfigError(layer.where, f"compresses {ratio} tokens to one, expected 4 or 128")
    dim, index = layer.get("head_dim"), layer.get("index_dim")
    overlap = 2 if ratio == 4 else 1
    kept = Cache(row, tokens_per_row=ratio, block=256, alignment=align)

    def pending(width: int) -> Cache:
        rows, block = overlap * ratio, 4 if ratio == 4 else 8
        row = 2 * overlap * width * 4
        return Cache(row, window=rows, block=block, alignment=align, slack=1)

    if ratio == 128:
        return [window, kept, pending(dim)]
    keys = Cache(_index_row(index), tokens_per_row=ratio, block=256, alignment=align)
    return [window, kept, pending(dim), keys, pending(index)]


def _mamba1(layer: _Reader) -> list[Cache]:
    channels = layer.share(layer.get("expand") * layer.get("hidden"), "channels")
    conv = channels * (layer.get("conv") - 1) * layer.model_nbytes
    return [Cache(conv + channels * layer.get("states") * layer.state_nbytes, is_state=True)]


def _mamba2(layer: _Reader) -> list[Cache]:
    heads, dim, states = layer.get("state_heads"), layer.get("state_dim"), layer.get("states")
    groups = layer.get("groups")
    # A group that heads of several GPUs use is on each of them.
    groups += 0 if groups % layer.ranks == 0 else layer.ranks - groups
    channels = layer.share(heads * dim + 2 * groups * states, "channels")
    conv = channels * (layer.get("conv") - 1) * layer.model_nbytes
    own = layer.share(heads, "state heads")
    return [Cache(conv + own * dim * states * layer.state_nbytes, is_state=True)]


def _delta_net(layer: _Reader) -> list[Cache]:
    keys, values = layer.get("key_heads"), layer.get("value_heads")
    key_dim, value_dim = layer.get("key_dim"), layer.get("value_dim")
    channels = layer.share(2 * keys * key_dim + values * value_dim, "channels")
    conv = channels * (layer.get("conv") - 1) * layer.model_nbytes
    own = layer.share(values, "value heads")
    return [Cache(conv + own * value_dim * key_dim * layer.state_nbytes, is_state=True)]


def _kda(layer: _Reader) -> list[Cache]:
    heads, dim = layer.get("state_heads"), layer.get("state_dim")
    own = layer.share(heads, "state heads")
    conv = 3 * own * dim * (layer.get("conv") - 1) * layer.model_nbytes
    return [Cache(conv + own * dim * dim * _NBYTES["float32"], is_state=True)]


def _lightning(layer: _Reader) -> list[Cache]:
    heads = layer.get("heads")
    dim = layer.find("head_dim") or layer.get("hidden") // heads
    own = layer.share(heads, "attention heads")
    return [Cache(own * dim * dim * layer.state_nbytes, is_state=True)]


def _short_conv(layer: _Reader) -> list[Cache]:
    channels = layer.share(layer.get("channels", layer.get("hidden")), "channels")
    return [Cache(channels * (layer.get("conv") - 1) * layer.model_nbytes, is_state=True)]


def _none(layer: _Reader) -> list[Cache]:
    del layer
    return []


_FORMULAS: Mapping[str, Callable[[_Reader], list[Cache]]] = {
    "heads": _heads,
    "window": _window,
    "chunk": _chunk,
    "mla": _mla,
    "indexer": _indexer,
    "index_keys": _index_keys,
    "compressed": _compressed,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "delta_net": _delta_net,
    "kda": _kda,
    "lightning": _lightning,
    "short_conv": _short_conv,
    "none": _none,
}
