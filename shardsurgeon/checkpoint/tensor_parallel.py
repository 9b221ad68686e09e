"""What each GPU holds of a model's weights: what tensor parallelism splits, what it copies. Pure.

From the headers. Experts are split like all large matrices, or, with expert parallelism, go
whole to one rank each. `serving_memory.md` has the rules with their source in vLLM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import quantization_sections
from shardsurgeon.checkpoint.kv_cache import text_section, value_at
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced
from shardsurgeon.errors import UsageError
from shardsurgeon.storage.formats.tensor_table import TensorRecord

# Matrices that engines put whole on every GPU: down-projections to a latent, small gates, norms;
# and everything of these modules.
_WHOLE = re.compile(
    r"(q_a_proj|kv_a_proj_with_mqa|wkv_a_with_mqa|wq_a|wkv|f_a_proj|g_a_proj|index_[qk]_proj|gate"
    r"|router|shared_expert_gate|hc_\w+|\w*norm\w*|eh_proj|e_proj|h_proj|rotary_emb|patch_embed\w*"
    r"|pos_emb\w*|position_embedding\w*|\w*conv1d)"
)
_WHOLE_MODULES = re.compile(r"\.(indexer|compressor|patch_embed\w*)\.")
# A parameter of a linear module: the weight, its scales, its bias.
_PARAMETER = re.compile(r"(q?weight|scale|bias|qzeros|scales|input)\w*")
_KEYS_OR_VALUES = re.compile(r"\.(k_proj|v_proj|wk|wv|key|value)\.")
_FUSED = re.compile(r"\.(query_key_value|Wqkv|qkv_proj|qkv)\.")
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed|head|tok_emb|output)\."
)
# vLLM's vocabulary has a multiple of so many rows.
_VOCABULARY_ROWS = 64


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many GPUs share the layers, and the experts.

    gpus: in all; tensor: that split each matrix, the others are replicas of these; experts:
    whether whole experts go to one of all the GPUs each.
    """

    gpus: int
    tensor: int
    experts: bool = False

    def __post_init__(self) -> None:
        if min(self.gpus, self.tensor) < 1 or self.gpus % self.tensor:
            problem = f"{self.tensor} ranks do not divide {self.gpus} GPUs"
            raise UsageError("GPUs", problem, "take a divisor of the number of GPUs")

    @property
    def replicas(self) -> int:
        """How many engines serve sequences of their own."""
        return self.gpus // self.tensor

    @property
    def ranks_of_experts(self) -> int:
        """Over how many ranks the experts are spread."""
        return self.gpus if self.experts else self.tensor


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """A model's weights, by how engines divide them. In bytes of the whole model.

    split: evenly; whole: on every GPU; keys: of the projections of keys and values, (KV heads,
    bytes); fused: of those with the queries', (heads, KV heads, bytes); vocabulary: (rows, bytes
    of a row). experts: MoE layer → bytes of each expert but for its row of the router, largest
    first; routers: MoE layer → bytes of such a row, which every GPU has. latent: bytes of the
    copies of the latent's up-projections that engines keep for decoding.
    """

    split: int = 0
    whole: int = 0
    keys: tuple[tuple[int, int], ...] = ()
    fused: tuple[tuple[int, int, int], ...] = ()
    vocabulary: tuple[tuple[int, int], ...] = ()
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    routers: Mapping[int, int] = field(default_factory=dict, repr=False)
    latent: int = 0

    def nbytes(self, kept: int | Mapping[int, int], parallel: Parallel) -> int:
        """Bytes on the fullest GPU with `kept` experts per layer, or kept[layer]."""
        ranks = parallel.tensor
        total = self.whole + -(-self.split // ranks)
        for kv_heads, nbytes in self.keys:
            total += -(-nbytes // min(ranks, kv_heads))
        for heads, kv_heads, nbytes in self.fused:
            own = heads // ranks + 2 * max(1, kv_heads // ranks)
            total += -(-nbytes * own // (heads + 2 * kv_heads))
        for rows, row in self.vocabulary:
            padded = -(-rows // _VOCABULARY_ROWS) * _VOCABULARY_ROWS
            total += -(-padded // ranks) * row
        return total + self.expert_nbytes(kept, parallel)

    def expert_nbytes(self, kept: int | Mapping[int, int], parallel: Parallel) -> int:
        """Of these, the bytes of experts and routers."""
        total = 0
        for layer, sizes in self.experts.items():
            count = min(kept if isinstance(kept, int) else kept[layer], len(sizes))
            total += count * self.routers.get(layer, 0)
            if parallel.experts:
                total += sum(sizes[: -(-count // parallel.ranks_of_experts)])
            else:
                total += -(-sum(sizes[:count]) // parallel.tensor)
        return total


def gpu_weights(checkpoint: Checkpoint, anatomy: Anatomy, *, mtp: bool = False) -> GpuWeights:
    """How a model's weights are divided. mtp: with the MTP layers, loaded on request alone."""
    section = text_section(anatomy.family, checkpoint.settings)
    attention = anatomy.family.attention

    def number(name: str) -> int:
        values = (value_at(section, path) for path in attention.paths("heads", name))
        return next((value for value in values if type(value) is int), 0)

    heads = number("heads") or 1
    kv_heads = number("kv_heads") or heads
    tied = section.get("tie_word_embeddings", checkpoint.settings.get("tie_word_embeddings"))
    whole = split = latent = 0
    keys: dict[int, int] = {}
    fused, vocabulary = 0, []
    routers: dict[int, int] = {}
    for record in _records(checkpoint, anatomy, mtp, routers):
        name = record.name
        if tied and re.search(r"(^|\.)lm_head\.", name):
            continue
        if _is_vocabulary(record, section.get("vocab_size")):
            vocabulary.append((record.shape[0], record.nbytes // record.shape[0]))
        elif len(record.shape) < 2 or _is_whole(name):
            whole += record.nbytes
        elif _KEYS_OR_VALUES.search(name):
            keys[kv_heads] = keys.get(kv_heads, 0) + record.nbytes
        elif _FUSED.search(name) and "visual" not in name and "vision" not in name:
            fused += record.nbytes
        else:
            split += record.nbytes
        if name.endswith("kv_b_proj.weight"):
            latent += 2 * math.prod(record.shape)
    return GpuWeights(
        split=split,
        whole=whole,
        keys=tuple(keys.items()),
        fused=((heads, kv_heads, fused),) if fused else (),
        vocabulary=tuple(vocabulary),
        experts={
            layer.index: tuple(
                size - routers.get(layer.index, 0)
                for size in sorted(layer.expert_nbytes, reverse=True)
            )
            for layer in anatomy.layers
            if mtp or not layer.is_mtp
        },
        routers=routers,
        latent=latent,
    )


def _records(
    checkpoint: Checkpoint, anatomy: Anatomy, mtp: bool, routers: dict[int, int]
) -> Iterator[TensorRecord]:
    """Every tensor that no expert owns a part of; the rows of routers are added to `routers`."""
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, Sliced) and role.is_router:
                row = record.nbytes // (record.shape[role.axis] // role.each)
                routers[role.layer] = routers.get(role.layer, 0) + row
            if isinstance(role, ExpertTensor | Sliced):
                continue
            of_mtp = role.mtp if isinstance(role, Carried) else anatomy.reader.is_mtp(role.layer)
            if mtp or not of_mtp:
                yield record


def _is_whole(name: str) -> bool:
    """Whether every GPU holds all of a matrix: by its module's name, or one above."""
    module, last = ("", *name.split("."))[-2:]
    if module.isdecimal() or not _PARAMETER.fullmatch(last):
        module = last  # a parameter of the layer itself
    return bool(_WHOLE.fullmatch(module) or _WHOLE_MODULES.search(f".{name}"))


def _is_vocabulary(record: TensorRecord, size: object) -> bool:
    return (
        len(record.shape) == 2
        and _VOCABULARY.search(record.name) is not None
        and (record.shape[0] == size or record.shape[0] > 4 * record.shape[1])
    )


def block_problem(checkpoint: Checkpoint, anatomy: Anatomy, parallel: Parallel) -> str | None:
    """Why experts in FP8 blocks cannot be split over the ranks, None where they can.

    vLLM refuses an expert whose part on a GPU is not whole blocks.
    """
    sections = (section for _, section in quantization_sections(checkpoint.settings))
    block = next((b for s in sections if isinstance(b := s.get("weight_block_size"), list)), None)
    if parallel.experts or not block or type(block[0]) is not int:
        return None
    hidden = text_section(anatomy.family, checkpoint.settings).get("hidden_size")
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            if record.dtype != "F8_E4M3" or len(record.shape) != 2:
                continue
            if not isinstance(anatomy.role(record), ExpertTensor):
                continue
            inner = next((n for n in record.shape if n != hidden), 0)
            if inner % (block[0] * parallel.tensor):
                each = inner / parallel.tensor
                problem = f"an expert's width {inner} over {parallel.tensor} ranks is {each:g}, "
                return f"{problem}not whole FP8 blocks of {block[0]}"
            return None
    return None
