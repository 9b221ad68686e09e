"""What the commands report, as plain frozen values. `--json` prints exactly these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from shardsurgeon._version import __version__
from shardsurgeon.layerwise.parts import PartReport
from shardsurgeon.pruning.analysis import ShownLayerReport, SuggestedCut
from shardsurgeon.pruning.report import PlanReport
from shardsurgeon.reports import Report
from shardsurgeon.units import counted
from shardsurgeon.verification.findings import VerifyReport


@dataclass(frozen=True, slots=True)
class PrunedReport:
    """How a model was pruned. origin: the first, unpruned model; num_experts: how many it had.

    Of the last prune: source: the model that was pruned; selection: `ratio`, `keep`, `target-size`
    or `plan`; ratio: asked for, or else the fraction removed; metric: None for a keep-list.
    prunes: how many there were.
    """

    origin: str
    num_experts: int
    source: str
    selection: str
    ratio: float
    metric: str | None
    prunes: int


@dataclass(frozen=True, slots=True)
class ViewReport:
    """What the shards of a view are made of. source: the model whose bytes they are, as it can be
    named again; files, nbytes: those of its files that are used, and their size in bytes.
    """

    source: str
    files: int
    nbytes: int


@dataclass(frozen=True, slots=True, repr=False)
class InspectReport(Report):
    """What a model is made of. Sizes in bytes.

    total_size: tensor data of the whole model; expert_size, smallest_expert_size: the largest and
    the smallest expert of any layer; expert_size_over_layers, smallest_expert_size_over_layers: one
    expert of every layer, the largest and the smallest of each; sizes_at: ratio removed (as text) →
    tensor data that would stay, at most. num_experts: of the largest
    layers; num_experts_per_layer: MoE layer → its experts, where they differ. incomplete_experts:
    layer → experts that lack a tensor which others have, where there are any. active_parameters:
    of total_parameters those that one token meets: all but MTP layers and the experts that are not
    chosen for it; None where packing hides them. dtypes: dtype → bytes of tensor data, most first.
    pruned: what made it, None for a model that was not pruned. view: what its shards are made of
    where it is a view, None where they are files.

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
    active_parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    pruned: PrunedReport | None = None
    view: ViewReport | None = None

    figures: ClassVar[tuple[str, ...]] = ("shares_at",)

    @property
    def title(self) -> str:
        """`Kimi-K2.5: kimi_k25`."""
        return f"{self.name}: {self.model_type or self.family}"

    @property
    def shares_at(self) -> dict[str, float]:
        """Ratio removed (as text) → share of the tensor data that would stay."""
        return {ratio: nbytes / self.total_size for ratio, nbytes in self.sizes_at.items()}


@dataclass(frozen=True, slots=True, repr=False)
class PushReport(Report):
    """What a push did. Sizes in bytes.

    url: where to look at it, the pull request where one was opened; revision: the branch, None
    where that is a pull request; commit: its hash; files, nbytes: of the model there; removed:
    names of an earlier model's weights that the commit took out; notes: what the Hub said; left:
    files of the folder that were not pushed; private: whether only its owners see the repository,
    None where the Hub does not say it; sent: bytes of files that travelled (where Xet sends them,
    at most); replaced: files there that have other bytes now; others: files there that are no part
    of the model, and stay; dry_run: whether all this would be, and commit is empty; serve: the
    words of the command that serves it, None where no engine is known to, or where it is in a pull
    request.

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
    serve: tuple[str, ...] | None = None
    private: bool | None = None
    sent: int = 0
    replaced: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def title(self) -> str:
        """`pushed to me/Kimi-K2.5-REAP-65pct`; `would be pushed to …` of a dry run."""
        return f"{'would be pushed' if self.dry_run else 'pushed'} to {self.repo_id}"


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where a push would go to. url: its page; revision: the branch; created: whether the
    repository is still to be made; private: whether only its owners see it, None where a new
    repository's organization decides; pull_request: whether one would be opened.
    """

    repo_id: str
    url: str
    revision: str
    created: bool
    private: bool | None
    pull_request: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a run would stop at: the three parts of its line, and its exit status."""

    where: str
    problem: str
    remedy: str
    status: int


@dataclass(frozen=True, slots=True, repr=False)
class ApplyReport(Report):
    """What apply did. out: the finished folder, None after a dry run or where none stayed here.

    bytes_copied: moved by this run; bytes_shared: what it did not move, because the disk has it
    once for the model and the result; bytes_resumed: found finished from an interrupted one;
    bytes_downloaded: what came over the network; push: where it was pushed to, if it was;
    source: the model that was pruned, as it can be named again; family: what --family said; serve:
    the words of the command that serves it, None where no engine is known to; view: whether what
    was written is a view. Of a
    dry run, whose plan counts the disk that is still needed and free: target: the repository that
    a push would go to, None without a push, and where it could not be looked at; refusal: what the
    run would stop at, None where nothing stands in its way.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> report = shardsurgeon.apply(plan, "small", verify=False)
    >>> report.bytes_copied + report.bytes_shared, report.bytes_resumed, report.verification
    (592821, 0, None)
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
    target: PushTarget | None = None
    refusal: Refusal | None = None
    serve: tuple[str, ...] | None = None
    view: bool = False
    bytes_shared: int = 0

    figures: ClassVar[tuple[str, ...]] = ("bytes_per_second",)

    @property
    def title(self) -> str:
        """That of its plan."""
        return self.plan.title

    @property
    def bytes_per_second(self) -> int:
        """How fast this run copied and shared, 0 where it had nothing to do."""
        return int((self.bytes_copied + self.bytes_shared) / max(self.seconds, 0.001))


@dataclass(frozen=True, slots=True)
class ScoreLayerReport:
    """One MoE layer of a score table: its number, and the range of its experts' scores."""

    layer: int
    is_mtp: bool
    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True, repr=False)
class RouterScoresReport(Report):
    """Scores taken from a model's routers. out: the score file, which holds one `metric`.

    written: False where the file held these scores already.

    >>> report = shardsurgeon.scores_from_router("fixtures/qwen3_moe", "router.npz", norm="l1")
    >>> report.metric, report.layers[0].layer, report.written
    ('router_l1', 0, True)
    """

    model: str
    norm: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str
    written: bool = True

    @property
    def title(self) -> str:
        """`Kimi-K2.5: router_l2 of 384 experts in 60 routers`."""
        scored = counted(len(self.layers), "router")
        return f"{self.model}: {self.metric} of {self.num_experts} experts in {scored}"


@dataclass(frozen=True, slots=True, repr=False)
class BaselineReport(Report):
    """Scores made without running the model. out: the score file, which holds one `metric`.

    method: `expert-weight-norm`, `aimer` or `random`; seed: of random scores; written: False where
    the file held these scores already.

    >>> report = shardsurgeon.scores_from_weights("fixtures/qwen3_moe", "weights.npz")
    >>> report.method, report.num_experts, report.seed
    ('expert-weight-norm', 16, None)
    """

    model: str
    method: str
    metric: str
    num_experts: int
    layers: tuple[ScoreLayerReport, ...]
    out: str
    seed: int | None = None
    written: bool = True

    @property
    def title(self) -> str:
        """`Kimi-K2.5: weight_l2 of 384 experts in 60 layers`."""
        scored = counted(len(self.layers), "layer")
        return f"{self.model}: {self.metric} of {self.num_experts} experts in {scored}"


@dataclass(frozen=True, slots=True)
class ShownPartReport:
    """One dataset of a mix, as PartReport has it, and how the scores of all serve it.

    retained: ratio removed (as text) → the share of the part's own saliency that the experts have
    which stay when the file's scores choose, the mean over the layers; None where a saliency is
    below 0 or none is above.
    """

    name: str
    source: str
    records: int
    tokens: int
    retained: dict[str, float | None]


@dataclass(frozen=True, slots=True, repr=False)
class ScoresReport(Report):
    """What a score file says. model: the model it was looked at with, None without one.

    metric: the one shown, of `metrics`; super_experts_known: whether the file has what they are
    told by; facts: small values beside the scores; calibration: settings of the run that made
    it, with the number of samples in place of their list, None without accumulators; notes: why
    `plan` would refuse the metric; parts: the datasets whose sums it keeps apart, where there are
    several.

    >>> report = shardsurgeon.show_scores("fixtures/kimi_k25/scores.pt", "fixtures/kimi_k25")
    >>> report.title
    'fixtures/kimi_k25/scores.pt: reap of 32 experts in 3 layers for kimi_k25'
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
    parts: tuple[ShownPartReport, ...] = ()

    @property
    def title(self) -> str:
        """`scores.pt: reap of 384 experts in 60 layers`, and the model if there is one."""
        of_model = f" for {self.model}" if self.model is not None else ""
        layers = counted(len(self.layers), "layer")
        return f"{self.file}: {self.metric} of {self.num_experts} experts in {layers}{of_model}"


@dataclass(frozen=True, slots=True, repr=False)
class WrittenScoresReport(Report):
    """A score file that was converted or merged.

    inputs: the files it came from; layers, metrics: what it holds; samples, tokens: of the
    calibration in it, None without one; written: False where the file held this already; parts:
    the datasets whose sums it keeps apart, where there are several.

    >>> shardsurgeon.convert_scores("fixtures/kimi_k25/scores.pt", "scores.json")
    fixtures/kimi_k25/scores.pt -> scores.json
    """

    inputs: tuple[str, ...]
    out: str
    layers: int
    metrics: tuple[str, ...]
    samples: int | None
    tokens: int | None
    written: bool = True
    parts: tuple[PartReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """`a.pt + b.pt -> both.pt`."""
        there = "" if self.written else ": there already"
        return f"{' + '.join(self.inputs)} -> {self.out}{there}"


@dataclass(frozen=True, slots=True, repr=False)
class BlendPartReport:
    """A part of a blend. file: the one that it is in, wholly or as one of several.

    weight: how often each of its tokens counts, 1 on average over the parts that count; retained,
    retained_equal: the share of its own saliency that the experts kept have under these weights,
    and under equal ones, None where no count is given.
    """

    name: str
    file: str
    weight: float
    retained: float | None = None
    retained_equal: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class BlendReport(Report):
    """One saliency of several parts of the data.

    objective: `weights` or `max-min`; metric: the one that shares are of; kept: how many experts
    stay in the largest layer, None where no count is given; metrics, layers: what the file holds;
    written: False where it held this already; worst: the part that retains least, None where no
    count is given.

    >>> import json
    >>> for name, sums in {"code": [3, 1, 2], "chat": [1, 4, 2]}.items():
    ...     layer = {"expert_frequency": [2] * 3, "ean_sum": sums, "weighted_ean_sum": sums}
    ...     with open(f"{name}.json", "w") as file:
    ...         json.dump({"1": layer}, file)
    >>> files, weights = ["code.json", "chat.json"], {"code": 2, "chat": 1}
    >>> shardsurgeon.blend_scores(files, "blend.npz", weights=weights, keep=1)
    code x 1.33 + chat x 0.667 -> blend.npz
    """

    out: str
    objective: str
    metric: str
    kept: int | None
    parts: tuple[BlendPartReport, ...]
    layers: int
    metrics: tuple[str, ...]
    written: bool = True

    figures: ClassVar[tuple[str, ...]] = ("worst",)

    @property
    def worst(self) -> str | None:
        """The first of those that retain least."""
        shares = {part.name: part.retained for part in self.parts if part.retained is not None}
        return min(shares, key=lambda name: shares[name], default=None)

    @property
    def title(self) -> str:
        """`code x 1.33 + chat x 0.667 -> scores.pt`."""
        there = "" if self.written else ": there already"
        named = " + ".join(f"{part.name} x {part.weight:.3g}" for part in self.parts)
        return f"{named} -> {self.out}{there}"


@dataclass(frozen=True, slots=True, repr=False)
class RunReport(Report):
    """What the commands of a recipe report. steps: name of the command → its report."""

    recipe: str
    steps: dict[str, Report]

    @property
    def title(self) -> str:
        """`recipe.toml: calibrate, apply, push`."""
        return f"{self.recipe}: {', '.join(self.steps) or 'nothing left to do'}"


@dataclass(frozen=True, slots=True, repr=False)
class EnvReport(Report):
    """What a report of a fault should say of the machine.

    cores: that this process may use; memory: of the machine, free_space: in the current folder, in
    bytes, None where the system does not say; packages: name → version of those that are installed;
    variables: name → value of those of the environment that matter, `(set)` where it may be secret.
    """

    python: str
    system: str
    encoding: str
    cores: int
    memory: int | None
    free_space: int | None
    packages: dict[str, str]
    variables: dict[str, str]

    @property
    def title(self) -> str:
        """`shardsurgeon 1.0`."""
        return f"shardsurgeon {__version__}"
