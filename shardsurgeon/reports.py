"""What the commands have to say, as plain frozen values. `--json` prints exactly these."""

from __future__ import annotations

from dataclasses import dataclass


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
