"""What the commands report, as plain frozen values. `--json` prints exactly these."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardsurgeon.pruning.analysis import ShownLayerReport, SuggestedCut
from shardsurgeon.pruning.report import PlanReport
from shardsurgeon.verification.findings import VerifyReport


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What a model is made of. Sizes in bytes.

    total_size: tensor data of the whole model; expert_size, smallest_expert_size: the largest and
    the smallest expert of any layer; expert_size_over_layers, smallest_expert_size_over_layers: one
    expert of every layer, the largest and the smallest of each; sizes_at: ratio removed (as text) →
    tensor data that would stay, at most. num_experts: of the largest
    layers; num_experts_per_layer: MoE layer → its experts, where they differ. incomplete_experts:
    layer → experts that lack a tensor which others have, where there are any.

    >>> report = shardsurgeon.inspect("fixtures/kimi_k25")
    >>> report.total_size, report.expert_size, report.sizes_at["0.5"]
    (657568, 3612, 484192)
    """

    name: str
    model_type: str | None
    architectures: tuple[str, ...]
    family: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    expert_layout: str
    quantization: str | None
    shards: int
    tensors: int
    total_size: int
    total_parameters: int | None
    expert_size: int
    smallest_expert_size: int
    expert_size_over_layers: int
    smallest_expert_size_over_layers: int
    sizes_at: dict[str, int]
    notes: tuple[str, ...]
    num_experts_per_layer: dict[int, int] | None = None
    incomplete_experts: dict[int, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did. Sizes in bytes.

    url: where to look at it, the pull request where one was opened; revision: the branch, None
    where that is a pull request; commit: its hash; files, nbytes: of the model there; removed:
    names of an earlier model's weights that the commit took out; notes: what the Hub said; left:
    files of the folder that were not pushed.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> report = shardsurgeon.apply(plan, "small", push_to_hub="me/small").push
    >>> report.revision, report.pull_request, report.removed
    ('main', None, ())
    """

    repo_id: str
    url: str
    revision: str | None
    commit: str
    pull_request: str | None
    created: bool
    files: int
    nbytes: int
    removed: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...]
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What apply did. out: the finished folder, None after a dry run or where none stayed here.

    bytes_copied: moved by this run; bytes_resumed: found finished from an interrupted one;
    bytes_downloaded: what came over the network; push: where it was pushed to, if it was;
    source: the model that was pruned, as it can be named again; family: what --family said.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> report = shardsurgeon.apply(plan, "small", verify=False)
    >>> report.bytes_copied, report.bytes_resumed, report.verification
    (589597, 0, None)
    """

    plan: PlanReport
    dry_run: bool
    out: str | None
    files: int
    bytes_copied: int
    bytes_resumed: int
    seconds: float
    verification: VerifyReport | None
    bytes_downloaded: int = 0
    push: PushReport | None = None
    source: str = ""
    family: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreLayerReport:
    """One MoE layer of a score table: its number, and the range of its experts' scores."""

    layer: int
    is_mtp: bool
    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class RouterScoresReport:
    """Scores taken from a model's routers. out: the score file, which holds one `metric`.

    written: False where the file held these scores already.
    """

    model: str
    norm: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str
    written: bool = True


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Scores made without running the model. out: the score file, which holds one `metric`.

    method: `expert-weight-norm` or `random`; seed: of random scores; written: False where the file
    held these scores already.
    """

    model: str
    method: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str
    seed: int | None = None
    written: bool = True


@dataclass(frozen=True, slots=True)
class ScoresReport:
    """What a score file says. model: the model it was looked at with, None without one.

    metric: the one shown, of `metrics`; super_experts_known: whether the file has what they are
    told by; facts: small values beside the scores; calibration: settings of the run that made
    it, with the number of samples in place of their list, None without accumulators; notes: why
    `plan` would refuse the metric.
    """

    file: str
    model: str | None
    metric: str
    metrics: tuple[str, ...]
    num_experts: int
    layers: tuple[ShownLayerReport, ...]
    cuts: tuple[SuggestedCut, ...]
    super_experts_known: bool
    facts: dict[str, str | int | float | bool] = field(default_factory=dict)
    calibration: dict[str, object] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WrittenScoresReport:
    """A score file that was converted or merged.

    inputs: the files it came from; layers, metrics: what it holds; samples, tokens: of the
    calibration in it, None without one; written: False where the file held this already.
    """

    inputs: tuple[str, ...]
    out: str
    layers: int
    metrics: tuple[str, ...]
    samples: int | None
    tokens: int | None
    written: bool = True
