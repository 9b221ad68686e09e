"""Plans, evaluations and probes of any size, for tests of pages and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shardsurgeon.layerwise.damage import Damage, LayerDamage
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    PartDamage,
)
from shardsurgeon.operations.page_html import Table
from shardsurgeon.operations.probe_report import OriginalReport, ProbeReport, SettingReport, failure
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep, keep_sha256, write_plan

CONFIG_SHA256 = "c" * 64


def saliencies(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """float64 [layers, experts], heavy-tailed as REAP's are, and larger in later layers."""
    drawn = np.random.default_rng(seed).lognormal(0.0, 0.7, (layers, experts))
    return drawn * np.geomspace(0.02, 0.4, layers)[:, None]


def keep_list(values: np.ndarray, kept: int, preserved: int = 0) -> KeepList:
    """The highest of each layer; in the first, the lowest `preserved` ones stay as well."""
    layers = {}
    for number, row in enumerate(values, start=1):
        order = np.argsort(-row, kind="stable").tolist()
        special = order[-preserved:] if preserved and number == 1 else []
        stay = sorted([*order[: kept - len(special)], *special])
        gone = sorted(set(range(len(row))) - set(stay))
        layers[number] = LayerKeep(
            tuple(stay), tuple(gone), tuple(sorted(special)), tuple(row.tolist())
        )
    return KeepList(values.shape[1], layers)


def lay_plan(path: Path, keep: KeepList, name: str = "Kimi-K2.5", kept: int = 135) -> Path:
    """A plan.json as `plan -o` writes it."""
    asked = {"selection": "ratio", "ratio": 0.65, "rounding": "floor", "metric": "reap"}
    asked |= {"kept": kept, "allocate": "uniform", "mtp": "router-norm"}
    facts = {"model_type": "kimi_k25", "num_layers": 61, "top_k": 8, "n_group": 1}
    source = {"name": name, "config_sha256": CONFIG_SHA256}
    path.write_bytes(write_plan(keep, selection=asked, source=source, model=facts))
    return path


def lay_scores(path: Path, values: np.ndarray) -> Path:
    """A score file of a metric and how often each expert was routed to."""
    tokens = np.random.default_rng(1).integers(0, 100_000, values.shape)
    layers = {
        str(number): {"reap": row.tolist(), "expert_frequency": times.tolist()}
        for number, (row, times) in enumerate(zip(values, tokens, strict=True), start=1)
    }
    path.write_text(json.dumps(layers))
    return path


def evaluation(keep: KeepList, digest: str = CONFIG_SHA256) -> EvaluationReport:
    """Of four ratios in two ways; the one of 0.65 is of `keep`."""
    whole = Damage(90_000, 6.12, 0.0, 0.0, 0.0, 1.0)
    found = []
    for ratio, kl in ((0.25, 0.031), (0.5, 0.142), (0.65, 0.371), (0.75, 0.9)):
        for way, worse in (("", 1.0), (" global", 0.92)):
            damage = Damage(90_000, 6.12 * (1 + kl * worse), kl * worse, 3 * kl, 7 * kl, 1 - kl / 3)
            mine = ratio == 0.65 and not way
            sha256 = keep_sha256(keep, keep.layers) if mine else "0" * 64
            layers = tuple(LayerDamage(n, kl / 9, 1 - kl / 9, kl / 4) for n in keep.layers)
            part = PartDamage("chats", 128, damage)
            kept = round(keep.num_experts * (1 - ratio))
            found.append(
                CandidateDamage(
                    f"{ratio:g}{way}", kept, ratio, sha256, damage, 1 + kl, (part,), None, layers
                )
            )
    return EvaluationReport(
        *("Kimi-K2.5", None, digest, "run", "evaluation.json", "chats.jsonl", 128, 100_000),
        *(90_000, keep.num_experts, whole, (PartDamage("chats", 128, whole),), tuple(found)),
        *("float32", "cpu", 0, 12.5, ()),
    )


def probe(model: str = "K2.5-72") -> ProbeReport:
    """Of two settings, compared with the original's answers."""
    plain = (
        failure("loops", 31, 1000, original=(4, 1000)),
        failure("cut", 58, 1000, original=(49, 1000), detect=0.02),
        failure("empty", 0, 1000, original=(0, 1000), detect=0.02),
    )
    cool = (failure("loops", 12, 1000, base=(31, 1000)), failure("cut", 44, 1000))
    settings = (
        SettingReport("base", {}, 1000, 0, plain),
        SettingReport("repetition-penalty 1.05", {"repetition_penalty": 1.05}, 1000, 0, cool),
    )
    return ProbeReport(
        *("probe.json", "http://127.0.0.1:8000/v1", model, "chats.jsonl", 250, 1000, 42, 0.02),
        *("1f0c", "9ad2", "probe.answers.jsonl"),
        *(OriginalReport("http://127.0.0.1:8001/v1", "Kimi-K2.5"), settings, ()),
    )


def lay_probe(path: Path, found: ProbeReport | None = None) -> Path:
    """A probe's file."""
    path.write_text(json.dumps((found or probe()).to_dict()))
    return path


MACHINES = Table(
    ["kept", "weights", "8 x 80 GB", "4 x 141 GB"],
    [["192", "301.2 GB", "240,128 tokens", "201,344 tokens"], ["288", "447.7 GB", "-", "-"]],
    ["tokens of KV cache that are left"],
)
