"""Reports of a full-size prune, and operations that answer with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shardsurgeon.layerwise.damage import Damage, LayerDamage
from shardsurgeon.layerwise.estimate import CalibrationEstimate, Estimate
from shardsurgeon.layerwise.request import CalibrationReport
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    PartDamage,
)
from shardsurgeon.operations.fit import FitReport
from shardsurgeon.operations.materialize import MaterializeReport
from shardsurgeon.operations.page import PageReport
from shardsurgeon.operations.plots import PlotReport
from shardsurgeon.operations.probe_report import (
    OriginalReport,
    ProbeReport,
    RefusedReport,
    SettingReport,
    failure,
)
from shardsurgeon.operations.prompts import Sampling
from shardsurgeon.operations.reports import (
    ApplyReport,
    BaselineReport,
    BlendPartReport,
    BlendReport,
    InspectReport,
    PushReport,
    RouterScoresReport,
    ScoreLayerReport,
    ScoresReport,
    WrittenScoresReport,
)
from shardsurgeon.pruning.agreement import ComparedLayerReport, ComparisonReport, OverlapReport
from shardsurgeon.pruning.analysis import Gap, ShownLayerReport, SuggestedCut
from shardsurgeon.pruning.fit import FitRow, MachineFit
from shardsurgeon.pruning.report import LayerReport, PlanReport
from shardsurgeon.verification.findings import VerifyReport

INSPECTED = InspectReport(
    name="Kimi-K2.5",
    model_type="kimi_k25",
    architectures=("KimiK25ForConditionalGeneration",),
    family="kimi_k25",
    num_hidden_layers=61,
    moe_layers=tuple(range(1, 61)),
    mtp_layers=(),
    num_experts=384,
    top_k=8,
    n_group=1,
    topk_group=1,
    expert_layout="per-expert",
    quantization="pack-quantized",
    shards=64,
    tensors=208_235,
    total_size=594_100_000_000,
    total_parameters=1_026_400_000_000,
    expert_size=25_100_000,
    smallest_expert_size=25_100_000,
    expert_size_over_layers=1_506_000_000,
    smallest_expert_size_over_layers=1_506_000_000,
    sizes_at={"0.25": 448_000_000_000, "0.5": 302_000_000_000},
    notes=(),
)


def layer(number: int, **facts: Any) -> LayerReport:
    """A layer that keeps 135 of 384, with the facts that a test changes."""
    usual = LayerReport(number, False, 135, 249, 0, 0, 0.5, 0.25, 0.125, "scores")
    return replace(usual, **facts)


PLANNED = PlanReport(
    model="Kimi-K2.5",
    selection="ratio",
    ratio=0.65,
    rounding="floor",
    metric="reap",
    num_experts_before=384,
    num_experts_after=135,
    layers=(layer(1), layer(2, saliency_dropped=0.375, max_pruned_saliency=0.4375)),
    mtp_dropped=False,
    total_size_before=594_000_000_000,
    total_size_after=237_600_000_000,
    total_parameters_before=1_000_000_000_000,
    total_parameters_after=372_000_000_000,
    shards_before=64,
    shards_after=64,
    space_needed=238_000_000_000,
    out="/models/Kimi-K2.5-REAP-65pct",
    notes=(),
)

VERIFIED = VerifyReport(
    source="/models/Kimi-K2.5",
    pruned="/models/Kimi-K2.5-REAP-65pct",
    sampled=8,
    tensors=74_210,
    tensors_compared=512,
    bytes_compared=1_500_000_000,
    differences=(),
)

APPLIED = ApplyReport(
    plan=PLANNED,
    dry_run=False,
    out="/models/Kimi-K2.5-REAP-65pct",
    files=72,
    bytes_copied=200_000_000_000,
    bytes_resumed=0,
    seconds=400.0,
    verification=VERIFIED,
    serve=("vllm", "serve", "/models/Kimi-K2.5-REAP-65pct"),
)

PUSHED = PushReport(
    repo_id="me/Kimi-K2.5-REAP-65pct",
    url="https://huggingface.co/me/Kimi-K2.5-REAP-65pct",
    revision="main",
    commit="0123456789abcdef0123456789abcdef01234567",
    pull_request=None,
    created=True,
    files=74,
    nbytes=200_000_500_000,
    removed=(),
    seconds=2000.0,
    notes=(),
    serve=("vllm", "serve", "me/Kimi-K2.5-REAP-65pct"),
    private=False,
    sent=150_000_000_000,
)

MATERIALIZED = MaterializeReport(
    view="Kimi-K2.5-REAP-65pct-view",
    out="/models/Kimi-K2.5-REAP-65pct",
    source="/models/Kimi-K2.5",
    files=74,
    nbytes=200_000_500_000,
    bytes_copied=200_000_500_000,
    bytes_resumed=0,
    seconds=400.0,
    verification=VERIFIED,
    serve=("vllm", "serve", "/models/Kimi-K2.5-REAP-65pct"),
)

SCORED = RouterScoresReport(
    model="GLM-4.5",
    norm="l2",
    metric="router_l2",
    num_experts=160,
    layers=(
        ScoreLayerReport(1, False, 0.5, 0.75, 1.25),
        ScoreLayerReport(92, True, 0.0625, 0.125, 10.0),
    ),
    out="scores.safetensors",
)

WEIGHED = BaselineReport(
    model="GLM-4.5",
    method="expert-weight-norm",
    metric="weight_l2",
    num_experts=160,
    layers=SCORED.layers,
    out="weights.safetensors",
)

SHOWN = ScoresReport(
    file="scores.pt",
    model=None,
    metric="reap",
    metrics=("ean_mean", "max_activations", "reap"),
    num_experts=160,
    layers=(
        ShownLayerReport(
            layer=1,
            is_mtp=None,
            num_experts=160,
            min=0.0,
            median=0.25,
            max=8.5,
            never_routed=(3, 77),
            super_experts=(4,),
            preserved=(4, 9),
            removable={"0.01": 4, "0.05": 17, "0.1": 31, "0.25": 66},
            gap=Gap(23, 1.3125),
        ),
        ShownLayerReport(92, True, 160, None, None, None, (), (), (), {}, None),
    ),
    cuts=(
        SuggestedCut(0.01, 0.0, 0, 160, 0.0, 0.0, 1),
        SuggestedCut(0.25, 0.4125, 66, 94, 0.25, 0.2515, 1),
    ),
    super_experts_known=True,
    facts={"total_tokens": 4096},
    calibration={"model": "GLM-4.5", "dataset": "c4:2", "samples": 1024, "tokens": 4096},
)

WRITTEN = WrittenScoresReport(("a.pt", "b.pt"), "both.pt", 89, ("ean_mean", "reap"), 1024, 1)

BLENDED = BlendReport(
    out="scores.pt",
    objective="max-min",
    metric="reap",
    kept=80,
    parts=(
        BlendPartReport("code", "code.pt", 4 / 3, 0.8125, 0.75),
        BlendPartReport("chat", "chat.pt", 2 / 3, 0.8, 0.9),
    ),
    layers=89,
    metrics=("ean_mean", "reap"),
)


def compared(layer: int | str, spearman: float | None) -> ComparedLayerReport:
    overlaps = {"0.25": OverlapReport(120, 0.8125, 0.684), "0.5": OverlapReport(80, 0.5, 1 / 3)}
    return ComparedLayerReport(layer, 160, spearman, None, overlaps)


COMPARED = ComparisonReport(
    a="scores.pt",
    b="router.json",
    metric_a="reap",
    metric_b="router_l2",
    ratios=(0.25, 0.5),
    layers=(compared(1, -0.00004), compared(2, 0.98765)),
    mean=compared("mean", 0.4938),
    only_b=(92,),
)

PLOTTED = PlotReport("picture.png", "scores.pt", "reap", 60, 384, 249, 0)

SCORE_OPERATIONS = {
    "show_scores": SHOWN,
    "plot_scores": PLOTTED,
    "compare_scores": COMPARED,
    "convert_scores": WRITTEN,
    "merge_scores": WRITTEN,
    "blend_scores": BLENDED,
    "scores_from_router": SCORED,
    "scores_from_weights": WEIGHED,
    "scores_random": replace(WEIGHED, method="random", metric="random", seed=42),
}

CALIBRATED = CalibrationReport(
    model="Kimi-K2.5",
    out="scores.pt",
    dataset="chats.jsonl:512",
    samples=512,
    tokens=1_310_720,
    counted_tokens=1_310_720,
    total_samples=512,
    layers=60,
    mtp_layers=0,
    layers_resumed=0,
    never_routed=3,
    dtype="bfloat16",
    dtype_reason=None,
    device="cuda",
    seconds=4096.0,
    notes=(),
)

ESTIMATED = CalibrationEstimate(
    model="Kimi-K2.5",
    dataset="",
    samples=1024,
    tokens=16_777_216,
    drawn=False,
    max_length=16_384,
    layers=61,
    moe_layers=60,
    flops=1_367_000_000_000_000_000,
    device="cpu",
    here=None,
    machines=(
        Estimate(
            machine="1 x H200",
            devices=1,
            dtype="bfloat16",
            device_free_nbytes=138_000_000_000,
            host_free_nbytes=486_000_000_000,
            flops=4e14,
            link=5e10,
            disk=5e9,
            hold="layer",
            group=384,
            ahead=True,
            batch_size=1,
            chunk_tokens=16_384,
            readings=1,
            states="host",
            seconds=3418.1,
            bound_by="computing",
            seconds_computing=3418.1,
            seconds_weights=11.8,
            seconds_states=293.4,
            seconds_disk=262.2,
            seconds_saving=144.3,
            weights_nbytes=589_500_000_000,
            disk_nbytes=1_311_000_000_000,
            states_nbytes=29_343_000_000_000,
            state_nbytes=240_500_000_000,
            saved_nbytes=721_500_000_000,
            saves=3,
            device_nbytes=82_100_000_000,
            host_nbytes=240_500_000_000,
        ),
    ),
    notes=("a note",),
)

PROBED = ProbeReport(
    out="probe.json",
    url="http://gpu:8000/v1",
    model="K2.5-72",
    prompts="chats.jsonl",
    records=1000,
    samples=2000,
    seed=42,
    detect=0.02,
    prompts_sha256="0123456789abcdef",
    request="fedcba9876543210",
    answers_file="probe.answers.jsonl",
    original=OriginalReport("http://gpu:8001/v1", "K2.5", "probe.original.answers.jsonl"),
    settings=(
        SettingReport(
            "base",
            asdict(Sampling()),
            1999,
            1,
            (
                failure("loops", 144, 1999, (72, 2000), None, 0.02),
                failure("cut by length", 160, 1999, (150, 2000), None, 0.02),
                failure("empty", 0, 1999, (1, 2000), None, 0.02),
            ),
        ),
        SettingReport(
            "min_p=0.05",
            asdict(Sampling(min_p=0.05)),
            2000,
            0,
            (failure("loops", 60, 2000, (70, 2000), (144, 1999), 0.02),),
        ),
    ),
    refusals=(RefusedReport("http://gpu:8000/v1", "chats.jsonl, record 7", "400 Bad Request"),),
)

PAGED = PageReport(
    out="report.html",
    model="Kimi-K2.5",
    layers=60,
    num_experts=384,
    holds=("map", "cost", "layers", "origin", "again"),
    nbytes=769_000,
    notes=("a note",),
)


def damage(perplexity: float, kl: float, agreement: float) -> Damage:
    """Of so many tokens that no other stand-in has."""
    return Damage(65_536, perplexity, kl, kl * 4, kl * 8, agreement)


def candidate(name: str, kept: int, kl: float, worst: str | None = "chat.jsonl") -> CandidateDamage:
    """A candidate on two parts, code and chat, with a layer."""
    found = damage(8.0 + kl, kl, 0.75)
    parts = tuple(PartDamage(part, 256, found) for part in ("code.jsonl", "chat.jsonl"))
    layers = (LayerDamage(0, 0.125, 0.9921875, None), LayerDamage(1, 0.25, 0.96875, 0.375))
    digest = f"{kept:064x}"
    return CandidateDamage(
        name, kept, 1 - kept / 384, digest, found, (8 + kl) / 8, parts, worst, layers
    )


_WHOLE = damage(8.0, 0.0, 1.0)
EVALUATED = EvaluationReport(
    model="Kimi-K2.5",
    revision=None,
    config_sha256="c" * 64,
    run="d" * 64,
    out="evaluation.json",
    dataset="code.jsonl:256,chat.jsonl:256",
    samples=512,
    tokens=1_310_720,
    predicted=65_536,
    num_experts=384,
    original=_WHOLE,
    original_parts=tuple(PartDamage(p, 256, _WHOLE) for p in ("code.jsonl", "chat.jsonl")),
    candidates=(candidate("0.5", 192, 0.5), candidate("0.65", 135, 1.0)),
    dtype="bfloat16",
    device="cuda",
    layers_resumed=0,
    seconds=4096.0,
    notes=("a note",),
)


ROOM = FitRow(
    kept=112,
    ratio=0.5625,
    weights_nbytes=61_200_000_000,
    cache_nbytes=9_800_000_000,
    tokens=571_000,
    longest_context=34_900,
    fits=True,
)
FITTED = FitReport(
    name="Kimi-K2.5",
    family="kimi_k25",
    num_experts=384,
    context=32768,
    longest_context=262_144,
    sequences=16,
    kv_dtype="bfloat16",
    token_nbytes=70_272.0,
    state_nbytes=0,
    sequence_nbytes=2_302_672_896,
    expert_parallel=False,
    usual=True,
    machines=(
        MachineFit(
            machine="4x80GB",
            gpus=4,
            gpu_nbytes=84_181_155_840,
            tensor_parallel=4,
            replicas=1,
            sequence_nbytes=2_302_672_896,
            other_nbytes=4_000_000_000,
            rows=(ROOM, replace(ROOM, kept=120, fits=False, note="a note")),
            kept=112,
            problem=None,
            flags="--tensor-parallel-size 4 --max-model-len 32768",
        ),
    ),
)


@dataclass
class FakeOperations:
    """What each operation answers (an exception is raised, a function called), and the calls."""

    inspect: Any = INSPECTED
    fit: Any = FITTED
    plan: Any = PLANNED
    apply: Any = APPLIED
    verify: Any = VERIFIED
    calibrate: Any = CALIBRATED
    rehearse: Any = ESTIMATED
    materialize: Any = MATERIALIZED
    push: Any = PUSHED
    evaluate: Any = EVALUATED
    probe: Any = PROBED
    report_page: Any = PAGED
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def answer(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            self.calls.append((args, options))
            value = SCORE_OPERATIONS[name] if name in SCORE_OPERATIONS else getattr(self, name)
            if isinstance(value, BaseException):
                raise value
            if callable(value):
                value = value(*args, **options)
            return FakePruning(value, args, options) if name == "plan" else value

        return operation

    def compare(self, model: Any, scores: Any, requests: Any, **options: Any) -> list[PlanReport]:
        plan = self.answer("plan")
        return [plan(model, scores, request, **options).report for request in requests]


@dataclass
class FakePruning:
    """What `plan` answers, and what `apply` is then given: how it was planned, and its report."""

    report: PlanReport
    args: tuple[Any, ...]
    options: dict[str, Any]

    def save_plan(self, path: str, *, force: bool = False) -> bool:
        Path(path).write_text("keep-lists")
        return True

    def serve_planned(self, path: str) -> tuple[str, ...]:
        return "vllm", "serve", "MODEL", "--model-loader-extra-config", json.dumps({"plan": path})


@dataclass
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


ROOT = Path(__file__).parents[2]


def in_python(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with this package importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, text=True, **options)


def lay_recipes(folder: Path) -> None:
    """Recipes under the names that help texts and documents give them."""
    for name in ("", "pruned/calibration", "Kimi-K2.5-REAP-65pct/calibration"):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.toml").write_text('[apply]\nscores = "scores.pt"\nratio = 0.65\n')
