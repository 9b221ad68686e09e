"""What a model's layers take, by its headers, and what memory is free. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import config_section
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced, Surplus
from shardsurgeon.layerwise.settings import missing_packages, require
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable

OUTSIDE = -1
"""The layer number of tensors that are in no layer."""

# Names that models have for one thing.
_WIDTH = ("hidden_size", "d_model", "dim", "n_embd")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
# A layer without any of these attends to nothing; some models have no folder for attention.
_ATTENTION = re.compile(
    r"\b((self_)?(attn|attention)|k_proj|kv_a_proj\w*|qkv(_proj)?|wk|wkv)\b", re.I
)
# What a recurrent layer has besides: its state takes no pairs of tokens.
_RECURRENT = re.compile(r"\b(A_log|slope_rate)\b")
_RECURRENT_TYPES = re.compile(r"linear|mamba|conv|recurrent")
_INDEXER = re.compile(r"\bindexer\b|\bindex_\w+_proj\b")
# What an MTP layer has of its own, or shares, to look tokens up and to name them.
_VOCABULARY = re.compile(r"(^|\.)(embed\w*|tok_emb|(shared_)?head|output)\.weight$")


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One decoder layer.

    index: its number; is_mtp: whether it predicts tokens further ahead; dense: parameters outside
    of experts; experts: how many it has, 0 in a dense layer; stored: bytes of all of them, as
    they lie on disk; expert: parameters of one; stays_packed: whether products take them as they
    are stored; pairs: numbers multiplied for each token and each one before it, 0 in a layer that
    looks back at none or is recurrent.
    """

    index: int
    is_mtp: bool
    dense: int
    experts: int
    stored: int
    expert: int
    stays_packed: bool = False
    pairs: int = 0

    def ready(self, itemsize: int) -> int:
        """Bytes of all experts, ready to compute in a dtype of this size."""
        return self.stored if self.stays_packed else self.experts * self.expert * itemsize


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the cost model knows of a model.

    layers: ascending, MTP layers last; outside: parameters in no layer that a run holds, which
    excludes embeddings; top_k: experts of a token; width: of a hidden state; streams: hidden
    states of a token; query, value: the widths of all heads together; heads: their number;
    pair_nbytes: bytes that each pair of tokens takes while a layer computes.
    """

    layers: tuple[LayerSize, ...]
    outside: int
    top_k: int
    width: int
    streams: int
    query: int
    value: int
    heads: int
    pair_nbytes: int = 0

    @property
    def moe_layers(self) -> tuple[LayerSize, ...]:
        """The layers that have experts."""
        return tuple(layer for layer in self.layers if layer.experts)

    @property
    def state(self) -> int:
        """Numbers of a token's hidden state."""
        return self.width * self.streams

    @property
    def token(self) -> int:
        """Numbers of one token while its layer computes: queries, keys and values, and their
        rotated copies; the hidden state, as it is, normalized, routed and summed."""
        return 6 * max(self.query, self.value) + (4 + 4 * self.streams) * self.width

    @property
    def waiting(self) -> int:
        """Numbers of one token that waits for experts: its residual, their input and output, the
        shared experts' output, and both once more where batches are joined."""
        return (6 + 2 * self.streams) * self.width

    @property
    def row(self) -> int:
        """Numbers of one token inside of an expert: three matrices of its input width by its
        inner width make an expert."""
        largest = max(layer.expert for layer in self.layers)
        return largest // max(self.width, 1) + 3 * self.width


def model_size(checkpoint: Checkpoint, anatomy: Anatomy) -> ModelSize:
    """Read a model's sizes from its headers and its config."""
    config = _Numbers(checkpoint.settings, anatomy)
    heads, width = config.number(*_HEADS), config.number(*_WIDTH)
    latent = config.number("qk_nope_head_dim")
    split = latent + config.number("qk_rope_head_dim") if latent else 0
    head = split or config.number("head_dim") or (width // heads if heads else 0)
    query = heads * max(head, 1)
    value = heads * (config.number("v_head_dim") or max(head, 1))
    places = _by_layer(checkpoint, anatomy)
    outside = [record for record in places.pop(OUTSIDE, []) if len(record.shape) < 2]
    layers = tuple(
        _layer(index, places[index], anatomy, config, query + value) for index in sorted(places)
    )
    # Indexers compute the scores of all pairs in float32, and once more without the negative ones.
    indexed = any(layer.pairs > 2 * (query + value) for layer in layers)
    return ModelSize(
        layers=layers,
        outside=_parameters(outside, checkpoint.settings),
        top_k=anatomy.top_k,
        width=width,
        streams=max(1, config.number("hc_mult")),
        query=query,
        value=value,
        heads=heads,
        pair_nbytes=2 * 4 * config.number("index_n_heads") if indexed else 0,
    )


def _by_layer(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[int, list[TensorRecord]]:
    """Layer → its tensors; those of no layer, and of layers without a number, under OUTSIDE."""
    layers: dict[int, list[TensorRecord]] = {}
    for record in checkpoint.records:
        place = anatomy.reader.place(record.name)
        layers.setdefault(place[0] if place else OUTSIDE, []).append(record)
    return layers


def _layer(
    index: int, records: Sequence[TensorRecord], anatomy: Anatomy, config: _Numbers, attention: int
) -> LayerSize:
    """attention: numbers that are multiplied for each pair of tokens."""
    of_experts: list[TensorRecord] = []
    others: list[TensorRecord] = []
    is_mtp = anatomy.reader.is_mtp(index)
    for record in records:
        role = anatomy.reader.role(record)
        own = isinstance(role, ExpertTensor) or (isinstance(role, Sliced) and not role.is_router)
        if own:
            of_experts.append(record)
        elif not isinstance(role, Surplus) and not (is_mtp and _VOCABULARY.search(record.name)):
            others.append(record)
    experts = anatomy.experts_per_layer.get(index, 0)
    return LayerSize(
        index=index,
        is_mtp=is_mtp,
        dense=_parameters(others, config.settings),
        experts=experts,
        stored=sum(record.nbytes for record in of_experts),
        expert=_parameters(of_experts, config.settings) // max(experts, 1),
        stays_packed=any(map(_is_packed_int4, of_experts)),
        pairs=_pairs(index, [record.name for record in others], config, attention),
    )


def _is_packed_int4(record: TensorRecord) -> bool:
    """Whether the kernels multiply by it: eight values in a word, as in compressed-tensors."""
    return record.name.endswith("_packed") and record.dtype == "I32" and len(record.shape) == 2


def _pairs(index: int, names: Sequence[str], config: _Numbers, attention: int) -> int:
    """Numbers that a layer multiplies for each pair of tokens, one of which looks back."""
    recurrent = any(map(_RECURRENT.search, names)) or _RECURRENT_TYPES.search(config.kind(index))
    if recurrent or not any(map(_ATTENTION.search, names)):
        return 0
    if not config.number("index_topk"):
        return attention
    # A mask of the model's own: both halves of the square are computed, by the indexer too.
    scores = config.number("index_n_heads") * config.number("index_head_dim")
    return 2 * (attention + (scores if any(map(_INDEXER.search, names)) else 0))


def _parameters(records: Sequence[TensorRecord], config: Mapping[str, Any]) -> int:
    """Parameters, or as many as their bytes allow where packing hides the number."""
    known = count_parameters([TensorTable.of(records)], config)
    return 2 * sum(record.nbytes for record in records) if known is None else known


class _Numbers:
    """Counts of a config, from the language model's sections first."""

    def __init__(self, settings: Mapping[str, Any], anatomy: Anatomy) -> None:
        self.settings = settings
        self._sections = [
            config_section(settings, at) or {} for at in (*anatomy.family.config.at, "")
        ]

    def number(self, *keys: str) -> int:
        """The number under the first key that has one, 0 where none has."""
        for section in self._sections:
            for key in keys:
                value = section.get(key)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return 0

    def kind(self, layer: int) -> str:
        """What the config calls a layer, such as `linear_attention`; empty where it does not."""
        for section in self._sections:
            kinds = section.get("layer_types")
            if isinstance(kinds, list) and layer < len(kinds):
                return str(kinds[layer])
        return ""


def largest_group(size: ModelSize, groups: Iterable[range]) -> int:
    """Parameters outside of experts of the largest group of layers that run together."""
    dense = {layer.index: layer.dense for layer in size.layers}
    single = max(dense.values())
    return max((sum(dense.get(layer, 0) for layer in group) for group in groups), default=single)


def free_memory(device: str) -> int:
    """Bytes that may still be allocated on a device.

    For `cpu` that is what the system has available, or less where the process's control group
    (of a container, say) has a limit.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    available = _available()
    left = _left_in_control_group()
    return available if left is None else min(available, left)


def _available() -> int:
    """Bytes that the system can give. Raises UsageError where it takes psutil to know."""
    if "psutil" in missing_packages():
        with suppress(OSError, ValueError, KeyError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
            return int(kilobytes) << 10
    return int(require("psutil").virtual_memory().available)


def program_memory(device: str) -> int:
    """Bytes of the device's memory that this program has by now; 0 on a GPU."""
    if device != "cpu":
        return 0
    return int(require("psutil").Process().memory_info().rss)


def _left_in_control_group() -> int | None:
    """Bytes left under the memory limit of Linux control groups, which psutil does not know.

    None where there is no limit. The two versions of control groups differ in their file names.
    """
    folder = Path("/sys/fs/cgroup")
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            stat = (folder / limit).with_name("memory.stat").read_text()
            # Cached file pages count as used, and are freed when memory is asked for.
            cached = dict(line.split() for line in stat.splitlines()).get(cache, 0)
            return max(0, left + int(cached))
        except (OSError, ValueError):
            continue
    return None
