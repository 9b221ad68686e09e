"""What the commands have to say, as plain frozen values. `--json` prints exactly these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What a model is made of. Sizes in bytes.

    total_size: tensor data of the whole model; expert_size: one expert of one layer;
    sizes_at: ratio removed (as text) → tensor data that would stay. num_experts: of the largest
    layers; num_experts_per_layer: MoE layer → its experts, where they differ.
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
    sizes_at: dict[str, int]
    notes: tuple[str, ...]
    num_experts_per_layer: dict[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer of a plan.

    min_retained_saliency, max_pruned_saliency: at the cut, preserved experts left out; None
    where there is no saliency. saliency_dropped: share of the layer's saliency that goes, 0 to
    1; saliency_dropped_uniform: the same had every layer kept as many, None without --allocate
    global. policy: where the choice comes from (`scores`, `router-norm`, `last`, `plan`).
    """

    layer: int
    is_mtp: bool
    kept: int
    pruned: int
    preserved: int
    never_routed: int
    min_retained_saliency: float | None
    max_pruned_saliency: float | None
    saliency_dropped: float | None
    policy: str
    saliency_dropped_uniform: float | None = None


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a prune would do. Sizes in bytes of tensor data; space_needed in bytes on disk.

    ratio: as asked for, None where the selection was no ratio. num_experts_before, _after: of the
    largest layers, where layers differ. allocate: how the counts were shared out, `uniform` or
    `global`; stock_engines: whether stock vLLM reads the counts that result. parameters: None
    where the storage format hides them.
    """

    model: str
    selection: str
    ratio: float | None
    rounding: str | None
    metric: str | None
    num_experts_before: int
    num_experts_after: int
    layers: tuple[LayerReport, ...]
    mtp_dropped: bool
    total_size_before: int
    total_size_after: int
    total_parameters_before: int | None
    total_parameters_after: int | None
    shards_before: int
    shards_after: int
    space_needed: int
    out: str
    notes: tuple[str, ...]
    allocate: str = "uniform"
    stock_engines: bool = True


@dataclass(frozen=True, slots=True)
class ArchitectureReport:
    """How a pruned checkpoint fits the model that an engine builds from its config.

    engine: name and version; model_class: what it built; parameters: how many parameters and
    buffers that expects; tensors: how many the checkpoint holds; mtp_layers: MTP layers whose
    experts were compared with a main layer's, because the engine does not read them;
    unchecked: tensors that the engine does not read, layer and expert numbers as `*`;
    differences: the first ones, one clear line each.
    """

    engine: str
    model_class: str
    parameters: int
    tensors: int
    mtp_layers: tuple[int, ...]
    unchecked: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification compared. differences: the first ones, one clear line each.

    sampled: tensors per shard whose bytes were compared, None for all of them.
    architecture: None where it was not asked for.
    """

    source: str
    pruned: str
    sampled: int | None
    tensors: int
    tensors_compared: int
    bytes_compared: int
    differences: tuple[str, ...]
    architecture: ArchitectureReport | None = None

    @property
    def all_differences(self) -> tuple[str, ...]:
        """Those from the source, then those from what the engine builds."""
        built = self.architecture.differences if self.architecture is not None else ()
        return self.differences + built

    @property
    def holds(self) -> bool:
        """Whether no difference was found."""
        return not self.all_differences


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did. Sizes in bytes.

    url: where to look at it, the pull request where one was opened; revision: the branch, None
    where that is a pull request; commit: its hash; files, nbytes: of the model there; removed:
    names of an earlier model's weights that the commit took out; notes: what the Hub said.
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


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What apply did. out: the finished folder, None after a dry run or where none stayed here.

    bytes_copied: moved by this run; bytes_resumed: found finished from an interrupted one;
    bytes_downloaded: what came over the network; push: where it was pushed to, if it was;
    source: the model that was pruned, as it can be named again.
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
    """Scores taken from a model's routers. out: the score file, which holds one `metric`."""

    model: str
    norm: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Scores made without running the model. out: the score file, which holds one `metric`.

    method: `expert-weight-norm` or `random`; seed: of random scores.
    """

    model: str
    method: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GapReport:
    """The widest gap in a layer's order of saliency.

    removed: experts below it; factor: the saliency above it over the one below, infinite (in
    JSON null) above a zero.
    """

    removed: int
    factor: float


@dataclass(frozen=True, slots=True)
class ShownLayerReport:
    """One layer of a score file.

    layer: its number, or as the file names it; is_mtp: None where no model says it. min, median,
    max: over finite scores, None without any. never_routed: ids that no token reached;
    super_experts, preserved: ids with extreme activations, and those that the file marks with
    +inf. removable: share of the saliency (as text) → experts that can go at no more than that
    cost; empty where shares mean nothing.
    """

    layer: int | str
    is_mtp: bool | None
    num_experts: int
    min: float | None
    median: float | None
    max: float | None
    never_routed: tuple[int, ...]
    super_experts: tuple[int, ...]
    preserved: tuple[int, ...]
    removable: dict[str, int]
    gap: GapReport | None


@dataclass(frozen=True, slots=True)
class CutReport:
    """The largest cut, alike in every layer, that costs a mean share of at most `limit`.

    ratio: for `--ratio`; removed, kept: experts of the largest layers; mean_lost, worst_lost:
    share of the saliency that goes, over all layers and in `worst_layer`.
    """

    limit: float
    ratio: float
    removed: int
    kept: int
    mean_lost: float
    worst_lost: float
    worst_layer: int | str


@dataclass(frozen=True, slots=True)
class ScoresReport:
    """What a score file says. model: the model it was looked at with, None without one.

    metric: the one shown, of `metrics`; super_experts_known: whether the file has what they are
    told by; facts: small values beside the scores; calibration: settings of the run that made
    it, with the number of samples in place of their list, None without accumulators.
    """

    file: str
    model: str | None
    metric: str
    metrics: tuple[str, ...]
    num_experts: int
    layers: tuple[ShownLayerReport, ...]
    cuts: tuple[CutReport, ...]
    super_experts_known: bool
    facts: dict[str, str | int | float | bool] = field(default_factory=dict)
    calibration: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class WrittenScoresReport:
    """A score file that was converted or merged.

    inputs: the files it came from; layers, metrics: what it holds; samples, tokens: of the
    calibration in it, None without one.
    """

    inputs: tuple[str, ...]
    out: str
    layers: int
    metrics: tuple[str, ...]
    samples: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """What the keep-lists of two score files share at one ratio.

    kept: experts in each list; share: of a list in the other; jaccard: common / in either. A mean
    over layers has kept None where layers differ.
    """

    kept: int | None
    share: float
    jaccard: float


@dataclass(frozen=True, slots=True)
class ComparedLayerReport:
    """How two score files agree in one layer; a correlation is None where a file ranks nothing.

    overlaps: ratio (as text) → the keep-lists.
    """

    layer: int | str
    num_experts: int
    spearman: float | None
    kendall: float | None
    overlaps: dict[str, OverlapReport]


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """How two score files agree in the layers that both have.

    mean: over those, its `layer` is "mean"; only_a, only_b: layers of one file alone.
    """

    a: str
    b: str
    metric_a: str
    metric_b: str
    ratios: tuple[float, ...]
    layers: tuple[ComparedLayerReport, ...]
    mean: ComparedLayerReport
    only_a: tuple[int | str, ...] = ()
    only_b: tuple[int | str, ...] = ()
