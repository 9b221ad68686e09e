"""What a plan would do, as the report that people decide from.

Numbers per layer and in total, and notes: on what the user should know before applying the plan.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.checkpoint.roles import ExpertTensor
from shardsurgeon.checkpoint.sampling import GENERATION_CONFIG_NAME, OPTION
from shardsurgeon.checkpoint.side_files import side_files
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.plan import Plan
from shardsurgeon.pruning.analysis import profile
from shardsurgeon.pruning.config_edits import partial_lists, stale_counts
from shardsurgeon.pruning.decide import Decision
from shardsurgeon.pruning.fit import MachineFit
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.pruning.layer_counts import (
    published_counts_note,
    says_per_layer,
    unequal_note,
)
from shardsurgeon.pruning.output_files import total_parameters
from shardsurgeon.pruning.request import MtpPolicy, SelectionRequest
from shardsurgeon.pruning.selection import dropped_share, saliency_cut
from shardsurgeon.reports import Report
from shardsurgeon.units import format_size

# Rest of an expert tensor's name, dtype and shape.
_Kind = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer of a plan.

    min_retained_saliency, max_pruned_saliency: at the cut, preserved experts left out; None
    where there is no saliency. saliency_dropped: share of the layer's saliency that goes, 0 to
    1; saliency_dropped_uniform: the same had every layer kept as many, None without
    --allocate. policy: where the choice comes from (`scores`, `router-norm`, `last`, `plan`).
    profile: the saliencies from the highest down, as `analysis.profile` gives them.
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
    profile: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation measured of a plan, on its data.

    candidate: what the plan is called there; dataset; tokens: that were predicted.
    perplexity_before: the whole model's; perplexity_ratio: the plan's by that; kl_mean, kl_p99: of
    the plan's predictions from the whole model's, in nats per token; agreement: share of tokens
    with the same first choice; worst_part: the part of the data whose mean KL is largest, None
    where there is one part.
    """

    candidate: str
    dataset: str
    tokens: int
    perplexity_before: float
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    agreement: float
    worst_part: str | None


@dataclass(frozen=True, slots=True, repr=False)
class PlanReport(Report):
    """What a prune would do. Sizes in bytes of tensor data; space_needed in bytes on disk.

    ratio: as asked for, None where the selection was no ratio. num_experts_before, _after: of the
    largest layers, where layers differ. allocate: how the counts were shared out, `uniform`,
    `global` or `waterfill`; stock_engines: whether stock vLLM reads the counts that result.
    parameters: None where the storage format hides them. carried_along: the files beside the
    weights that are copied; left_behind: those that are not → why. saliency_of: the other model
    whose plan this is and whose saliencies these are, None where they are this model's own.
    space_free: bytes free where the result would go, None where nobody looked. measured: what an
    evaluation says of it, None where none was given or it measured other prunes. fits: what is
    left of the machines that were named, a row each. hf_overrides: what vLLM is told, in its
    --hf-overrides, to serve the model itself with this plan; None where that cannot say it all.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> layer = plan.report.layers[0]
    >>> layer.layer, layer.kept, layer.pruned, round(layer.saliency_dropped, 3)
    (1, 12, 20, 0.434)
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
    carried_along: tuple[str, ...] = ()
    left_behind: Mapping[str, str] = field(default_factory=dict)
    saliency_of: str | None = None
    # Of the disk in that moment: no two looks at it need agree.
    space_free: int | None = field(default=None, compare=False)
    measured: Measured | None = None
    fits: tuple[MachineFit, ...] = ()
    hf_overrides: Mapping[str, object] | None = None

    figures: ClassVar[tuple[str, ...]] = (
        *("kept_least", "kept_most", "share_left", "narrowest_cut"),
        *("saliency_dropped_mean", "saliency_dropped_worst", "saliency_dropped_worst_layer"),
        *("saliency_dropped_uniform_mean", "saliency_dropped_uniform_worst"),
        "saliency_dropped_uniform_worst_layer",
    )

    @property
    def title(self) -> str:
        """`Kimi-K2.5: keep 135 of 384 experts in each of 60 MoE layers`, or `96 to 212 of 384`."""
        kept = _extremes(layer.kept for layer in self.layers)
        before = _extremes(layer.kept + layer.pruned for layer in self.layers)
        every = f"each of {len(self.layers)} MoE layers"
        return f"{self.model}: keep {kept} of {before} experts in {every}"

    def to_dict(self) -> dict[str, Any]:
        """The document of `plan --json`, which has a list of plans however many there are."""
        return PlansReport((self,)).to_dict()

    @property
    def kept_least(self) -> int:
        """Experts kept in the layer that keeps the fewest."""
        return min(layer.kept for layer in self.layers)

    @property
    def kept_most(self) -> int:
        """Experts kept in the layer that keeps the most."""
        return max(layer.kept for layer in self.layers)

    @property
    def share_left(self) -> float | None:
        """Tensor data after, as a share of that before."""
        return self.total_size_after / self.total_size_before if self.total_size_before else None

    @property
    def narrowest_cut(self) -> float | None:
        """The smallest gap at any layer's cut, as a share of its lowest kept saliency."""
        gaps = [
            1 - layer.max_pruned_saliency / layer.min_retained_saliency
            for layer in self._scored
            if layer.max_pruned_saliency is not None and layer.min_retained_saliency
        ]
        return min(gaps, default=None)

    @property
    def saliency_dropped_mean(self) -> float | None:
        """Share of a layer's saliency that goes, on average; layers without saliency left out."""
        return _mean(layer.saliency_dropped for layer in self._scored)

    @property
    def saliency_dropped_worst(self) -> float | None:
        """The largest share that a layer loses."""
        return _worst((layer.saliency_dropped, layer.layer) for layer in self._scored)[0]

    @property
    def saliency_dropped_worst_layer(self) -> int | None:
        """The layer that loses it."""
        return _worst((layer.saliency_dropped, layer.layer) for layer in self._scored)[1]

    @property
    def saliency_dropped_uniform_mean(self) -> float | None:
        """What would go on average had every layer kept as many; None without --allocate."""
        return _mean(layer.saliency_dropped_uniform for layer in self.layers)

    @property
    def saliency_dropped_uniform_worst(self) -> float | None:
        """The largest share that a layer would then lose."""
        return _worst((layer.saliency_dropped_uniform, layer.layer) for layer in self.layers)[0]

    @property
    def saliency_dropped_uniform_worst_layer(self) -> int | None:
        """The layer that would lose it."""
        return _worst((layer.saliency_dropped_uniform, layer.layer) for layer in self.layers)[1]

    @property
    def _scored(self) -> list[LayerReport]:
        """Without the layers that were chosen by router norms, having no saliency."""
        return [layer for layer in self.layers if layer.policy != MtpPolicy.ROUTER_NORM]


@dataclass(frozen=True, slots=True, repr=False)
class PlansReport(Report):
    """Plans of one model, one for each ratio that was asked for: what `plan --json` prints."""

    plans: tuple[PlanReport, ...]

    @property
    def title(self) -> str:
        """Of a single plan its own."""
        if len(self.plans) == 1:
            return self.plans[0].title
        return f"{self.plans[0].model}: {len(self.plans)} ratios compared"


def _extremes(counts: Iterable[int]) -> str:
    ends = sorted(counts)
    return str(ends[0]) if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _worst(shares: Iterable[tuple[float | None, int]]) -> tuple[float, int] | tuple[None, None]:
    """The largest share and the layer it is of; of equal ones the last layer."""
    known = [(share, layer) for share, layer in shares if share is not None]
    return max(known, default=(None, None))


def plan_report(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    request: SelectionRequest,
    decision: Decision,
    plan: Plan,
    out: str,
) -> PlanReport:
    """The report of a plan.

    decision, plan: of this checkpoint and this request; out: the folder or repository that the
    result would go to, as messages name it. Raises ConfigError where a quantization list cannot
    follow its experts.
    """
    config = checkpoint.settings
    tables = [shard.tensors for shard in plan.shards]
    return PlanReport(
        model=checkpoint.source.name,
        selection=request.selection,
        ratio=request.ratio,
        rounding=request.effective_rounding,
        metric=decision.metric,
        num_experts_before=anatomy.num_experts,
        num_experts_after=decision.kept,
        layers=tuple(
            _layer_report(layer, keep, anatomy, decision)
            for layer, keep in sorted(decision.keep.layers.items())
        ),
        mtp_dropped=decision.drop_mtp and anatomy.mtp_nbytes > 0,
        total_size_before=checkpoint.total_size,
        total_size_after=sum(int(table.nbytes.sum()) for table in tables),
        total_parameters_before=count_parameters(checkpoint.tables, config),
        total_parameters_after=count_parameters(tables, config),
        shards_before=len(checkpoint.shards),
        shards_after=len(plan.shards),
        space_needed=sum(output_sizes(plan).values()),
        out=out,
        allocate=request.allocate,
        stock_engines=decision.keep.is_uniform or says_per_layer(config, anatomy) != "",
        notes=(
            *checkpoint.notes,
            *published_counts_note(config, anatomy),
            *decision.notes,
            *_group_limited(anatomy),
            *unequal_note(config, anatomy, decision.keep),
            *mixed_precision_notes(checkpoint, anatomy, decision.keep),
            *_rewritten(plan),
            *_uncounted(checkpoint, plan),
            *_sampling(plan),
            *stale_counts(checkpoint, anatomy, plan.copied_files),
            *([] if decision.drop_mtp else absent_mtp_notes(anatomy)),
            *_weights_in_folders(checkpoint, plan),
        ),
        carried_along=plan.copied_files,
        left_behind=_left_behind(checkpoint, request, plan),
        saliency_of=decision.made_for.name if decision.made_for is not None else None,
    )


def _layer_report(layer: int, keep: LayerKeep, anatomy: Anatomy, decision: Decision) -> LayerReport:
    min_retained, max_pruned = saliency_cut(keep)
    uniform = decision.uniform.layers.get(layer) if decision.uniform is not None else None
    return LayerReport(
        layer=layer,
        is_mtp=layer >= anatomy.num_layers,
        kept=len(keep.retained),
        pruned=len(keep.pruned),
        preserved=len(keep.preserved),
        never_routed=len(decision.never_routed.get(layer, ())),
        min_retained_saliency=min_retained,
        max_pruned_saliency=max_pruned,
        saliency_dropped=dropped_share(keep),
        policy=decision.policies.get(layer, "scores"),
        saliency_dropped_uniform=None if uniform is None else dropped_share(uniform),
        profile="" if keep.saliency is None else profile(np.array(keep.saliency, dtype=float)),
    )


def _group_limited(anatomy: Anatomy) -> list[str]:
    if anatomy.n_group == 1:
        return []
    return [
        f"every one of the router's {anatomy.n_group} groups keeps its own best experts, so the "
        "lowest kept may be below the highest pruned of another group"
    ]


def _rewritten(plan: Plan) -> list[str]:
    """Names the tensors that are not copies of the source's bytes."""
    names = [name for shard in plan.shards for name in shard.rewritten()]
    what = "hold expert counts or ids and get new values"
    return [f"{len(names)} tensors {what}: {', '.join(names)}"] if names else []


def _uncounted(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Says that a number of the index is left out: it cannot be made anew."""
    said = (checkpoint.index_metadata or {}).get("total_parameters")
    if said is None or len(plan.shards) == 1:
        return []
    if total_parameters(checkpoint, plan.shards) is not None:
        return []
    what = "the way the weights are packed hides how many parameters they are"
    return [f"total_parameters is left out of {checkpoint.names.index}: {what}"]


def _sampling(plan: Plan) -> list[str]:
    """Says what engines will sample with, where the user asked for it."""
    asked = dict(plan.asked).get(OPTION)
    return [f"{GENERATION_CONFIG_NAME} gets {asked}"] if asked else []


def absent_mtp_notes(anatomy: Anatomy) -> list[str]:
    """Says that the config promises MTP layers of which there are no tensors."""
    absent, counted = anatomy.absent_mtp_layers, anatomy.num_mtp_layers
    if not absent:
        return []
    layers = "1 MTP layer" if counted == 1 else f"{counted} MTP layers"
    return [
        f"config.json counts {layers} ({' or '.join(anatomy.family.config.mtp_layers)}), the "
        f"shards have {counted - absent or 'none'}: an engine that is to predict further tokens "
        "will miss them; `apply --mtp drop` sets the count to 0"
    ]


def _weights_in_folders(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """What a user may not expect to be copied: weights that are no part of this checkpoint."""
    folders: dict[str, int] = {}
    carried = {name for name in plan.copied_files if not name.startswith(CALIBRATION_FOLDER)}
    for file in checkpoint.files:
        folder, below, _ = file.name.partition("/")
        if below and file.name in carried and file.name.endswith(".safetensors"):
            folders[folder] = folders.get(folder, 0) + file.nbytes
    return [
        f"{folder}/ has {format_size(nbytes)} of weights, which are carried along as they are; "
        f"--exclude {folder} leaves them behind"
        for folder, nbytes in folders.items()
    ]


def _left_behind(checkpoint: Checkpoint, request: SelectionRequest, plan: Plan) -> dict[str, str]:
    """Without the score file of this run, which goes to calibration/."""
    given = {os.path.realpath(path) for _, path, _ in plan.score_files}
    left = side_files(checkpoint, request.include, request.exclude).left
    paths = {name: checkpoint.source.local_path(name) for name in left}
    return {
        name: left[name]
        for name, path in paths.items()
        if not path or os.path.realpath(path) not in given
    }


def mixed_precision_notes(checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList) -> list[str]:
    """One note per layer whose survivors differ in dtype or shape, and per quantization list that
    names some of a layer's survivors only.

    Raises ConfigError as `pruned_config` does.
    """
    kinds = _kinds(checkpoint, anatomy, keep)
    layers = [_note(layer, kinds[layer], keep.layers[layer].retained) for layer in sorted(kinds)]
    return [*filter(None, layers), *partial_lists(checkpoint, anatomy, keep)]


def _kinds(
    checkpoint: Checkpoint, anatomy: Anatomy, keep: KeepList
) -> dict[int, dict[_Kind, set[int]]]:
    """Uneven layer → how its survivors' tensors are stored → the survivors stored so."""
    found: dict[int, dict[_Kind, set[int]]] = {}
    survivors = {
        layer: set(keep.layers[layer].retained) for layer in anatomy.uneven & {*keep.layers}
    }
    if not survivors:
        return found
    for shard in checkpoint.shards:
        for record in shard.header.tensors:
            role = anatomy.role(record)
            if isinstance(role, ExpertTensor) and role.expert in survivors.get(role.layer, ()):
                kind = record.name[role.end :], record.dtype, record.shape
                found.setdefault(role.layer, {}).setdefault(kind, set()).add(role.expert)
    return found


def _note(layer: int, kinds: dict[_Kind, set[int]], retained: tuple[int, ...]) -> str:
    """A note if not every survivor has every kind of tensor, else ""."""
    uneven = [kind for kind, experts in kinds.items() if len(experts) < len(retained)]
    if not uneven:
        return ""
    # Shown is the kind of the expert that becomes expert 0, where it is one of the odd ones.
    (rest, dtype, shape) = next((k for k in uneven if retained[0] in kinds[k]), uneven[0])
    alike = len(kinds[rest, dtype, shape])
    return (
        f"the survivors of layer {layer} are not stored alike: {rest.lstrip('.')} is {dtype} "
        f"{list(shape)} in {alike} of {len(retained)}; engines read a layer's quantization from "
        f"its expert 0, which was {retained[0]}"
    )
