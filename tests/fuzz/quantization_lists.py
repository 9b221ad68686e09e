"""Random quantization lists in each engine's spelling: their meaning survives, or they are refused.

The bytes choose an engine, which experts stay, and entries made of pieces of names and patterns.
What is accepted is read by the engines' own rules (`tests.support.engines`), before and after, for
every module that is left; and the verifier, whose reading is another, must agree.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import ConfigError
from shardsurgeon.pruning.config_edits import pruned_config
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.quantization_lists import ListCheck
from shardsurgeon.verification.record import RetainedIds
from tests.support import tiny
from tests.support.engines import SCHEMES, differing, section_of

EXPERTS, KEPT, MTP = 14, 4, 3
METHODS = list(SCHEMES)
# What happened to the inputs so far, for who asks.
TALLY: Counter[str] = Counter()

PIECES = [
    *("re:", "-:", "+:", "^", "$", ".", r"\.", "[.]", ".*", ".+", "*", "?", "|", "(", ")", "(?:"),
    *("[0-9]", "[0-9]+", r"\d", r"\d+", r"\d{2}", r"\w+", "[^.]+", "[1-4]", "(?!", "{1,2}", "+"),
    *(
        "model",
        "layers",
        "mlp",
        "experts",
        "e.perts",
        r"exp\w+",
        "shared_experts",
        "gate",
        "lm_head",
    ),
    *(
        "up_proj",
        "down_proj",
        "(up|down)_proj",
        "_proj",
        "self_attn",
        "o_proj",
        "eh_proj",
        "Linear",
    ),
    *(str(number) for number in range(EXPERTS)),
    "model.layers.",
    r"model\.layers\.",
    ".mlp.experts.",
    r"\.mlp\.experts\.",
    r"re:.*layers\.",
    *(".up_proj", r"\.up_proj", r"re:.*\.", "*.", ".*.", r"\..*", "experts.", r"experts\."),
]
_END = len(PIECES)


def modules() -> list[str]:
    """Of a DeepSeek-V3: dense layer 0, MoE layers 1 and 2, an MTP layer 3."""
    found = ["model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"]
    found += [f"model.layers.{MTP}.eh_proj"]
    for layer in range(MTP + 1):
        found.append(f"model.layers.{layer}.self_attn.o_proj")
        if layer:
            stem = f"model.layers.{layer}.mlp"
            found += [f"{stem}.gate", f"{stem}.shared_experts.up_proj"]
            parts = ("up_proj", "down_proj")
            found += [f"{stem}.experts.{e}.{part}" for e in range(EXPERTS) for part in parts]
    return found


@cache
def model() -> tuple[Checkpoint, Anatomy]:
    """The checkpoint without a quantization section."""
    weights: tiny.Tensors = {
        f"{name}.weight": np.zeros((EXPERTS if name.endswith(".gate") else 1, 2), "f4")
        for name in modules()
    }
    content = tiny.config(n_routed_experts=EXPERTS, quantization_config={})
    source = tiny.MemorySource(tiny.files(content, weights), name="tiny")
    checkpoint = open_checkpoint(source)
    return checkpoint, read_anatomy(checkpoint)


def left(retained: dict[int, tuple[int, ...]]) -> dict[str, str]:
    """Module of the source → the same one of the result."""
    found = {}
    for name in modules():
        parts = name.split(".")
        layer = int(parts[2]) if len(parts) > 3 else -1
        if layer == MTP and MTP not in retained:
            continue
        if parts[4:5] == ["experts"]:
            if int(parts[5]) not in retained[layer]:
                continue
            parts[5] = str(retained[layer].index(int(parts[5])))
        found[name] = ".".join(parts)
    return found


def entries_of(data: bytes) -> Iterator[tuple[str, int]]:
    """(entry, value); a byte beyond the pieces ends an entry."""
    pieces: list[str] = []
    for byte in data[:400]:
        if byte % (_END + 3) >= _END:
            if pieces:
                yield "".join(pieces), byte % 3
            pieces = []
        else:
            pieces.append(PIECES[byte % (_END + 3)])
    if pieces:
        yield "".join(pieces), 0


def run(data: bytes, _: Path) -> None:
    """Prune a model with the list that the bytes describe; raise where its meaning changed."""
    if len(data) < 6:
        return
    method = METHODS[data[0] % len(METHODS)]
    drop_mtp = bool(data[1] & 1)
    numbers = np.random.default_rng(list(data[2:5]))
    layers = (1, 2) if drop_mtp else (1, 2, MTP)
    same = tuple(sorted(map(int, numbers.choice(EXPERTS, KEPT, replace=False))))
    retained = {
        n: same
        if data[1] & 2
        else tuple(sorted(map(int, numbers.choice(EXPERTS, KEPT, replace=False))))
        for n in layers
    }
    found = dict(entries_of(data[5:]))
    judge(method, section_of(method, list(found), list(found.values())), retained)


def pruned(
    method: str, before: dict[str, Any], retained: dict[int, tuple[int, ...]]
) -> dict[str, Any]:
    """What a section becomes. Raises ConfigError where it is refused."""
    key = _key(method)
    drop_mtp = MTP not in retained
    text = pruned_config(
        with_section(method, before), model()[1], keep_list(retained), drop_mtp=drop_mtp
    )
    section: dict[str, Any] = json.loads(text)[key]
    return section


def with_section(method: str, section: dict[str, Any]) -> Checkpoint:
    """The model with a quantization section."""
    content = tiny.config(n_routed_experts=EXPERTS, **{_key(method): section})
    config = Document.parse(json.dumps(content).encode(), "config.json")
    return replace(model()[0], config=config)


def keep_list(retained: dict[int, tuple[int, ...]]) -> KeepList:
    """Of layer → ids that stay."""
    everyone = set(range(EXPERTS))
    return KeepList(
        EXPERTS,
        {n: LayerKeep(ids, tuple(sorted(everyone - {*ids}))) for n, ids in retained.items()},
    )


def _key(method: str) -> str:
    return "quantization" if method == "mlx" else "quantization_config"


def verified(
    method: str,
    before: dict[str, Any],
    after: dict[str, Any],
    retained: dict[int, tuple[int, ...]],
) -> tuple[str, ...]:
    """What the verifier finds wrong with a section after a prune."""
    findings = Findings()
    checkpoint, anatomy = with_section(method, before), model()[1]
    lists = ListCheck(checkpoint, anatomy, RetainedIds(retained), mtp_dropped=MTP not in retained)
    lists.check("config.json", before, after, findings)
    return findings.lines()


def judge(method: str, before: dict[str, Any], retained: dict[int, tuple[int, ...]]) -> None:
    """Raise AssertionError where a section is accepted and then means something else."""
    try:
        after = pruned(method, before, retained)
    except ConfigError:
        TALLY["refused"] += 1
        return
    TALLY["accepted"] += 1
    wrong = differing(method, before, after, left(retained))
    assert not wrong, f"{before} became {after}: {wrong[:3]}"
    found = verified(method, before, after, retained)
    assert not found, f"{before} became {after}: {found}"


def seeds() -> list[bytes]:
    """A list of each engine."""
    words = {piece: number for number, piece in enumerate(PIECES)}
    texts = [
        [r"re:.*layers\.", "1", r"\..*", r"\.", "5", r"\.", "(up|down)_proj"],
        ["model.layers.", "2", ".mlp.experts.", "12", ".up_proj"],
        ["*.", "5", ".*."],
        [r"re:.*\.", "e.perts", r"\.", "1", r"\..*"],
        ["-:", r"model\.layers\.", "1", r"\.mlp\.experts\.", "3", r"\..*"],
        ["experts.", "1", ".up_proj"],
    ]
    body = b"".join(bytes([*(words[word] for word in text), _END]) for text in texts)
    return [bytes([number, number & 3, 1, 2, number]) + body for number in range(len(METHODS))]
