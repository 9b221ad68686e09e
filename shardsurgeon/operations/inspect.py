"""`inspect`: what a model is made of, from headers and JSON only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.checkpoint.open import reopened
from shardsurgeon.checkpoint.provenance import Provenance
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.checkpoint.roles import Carried, ExpertTensor, Sliced
from shardsurgeon.errors import UsageError
from shardsurgeon.families.schema import architectures_of
from shardsurgeon.operations.reports import InspectReport, PrunedReport, ViewReport
from shardsurgeon.pruning.config_edits import quantization_name, side_file_quantization
from shardsurgeon.pruning.counts import uniform_counts
from shardsurgeon.pruning.layer_counts import published_counts_note
from shardsurgeon.pruning.report import absent_mtp_notes
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.pruning.routing import main_facts, routing_facts
from shardsurgeon.pruning.selection import mtp_counts
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.limits import CONFIG
from shardsurgeon.storage.open import address_of
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.source import Source
from shardsurgeon.storage.view import ViewSource
from shardsurgeon.units import number_ranges

RATIOS_SHOWN = (0.25, 0.5, 0.65, 0.75)


def inspect(
    model: str | PathLike[str] | Checkpoint | None = None, *, family: str | None = None
) -> InspectReport:
    """What a model is made of: layers, experts, sizes. Reads headers and JSON only.

    model: a folder or an address (`org/name`, `s3://…`), an opened checkpoint, None for the current
    folder; family: a file with the model's declaration, `auto` to read a model of no declared
    family, neither with an opened checkpoint. Raises
    CheckpointError and its children where it cannot be read, FamilyError where it is of no
    supported family.

    >>> report = shardsurgeon.inspect("fixtures/kimi_k25")
    >>> report.family, report.num_experts, report.moe_layers
    ('kimi_k25', 32, (1, 2, 3))
    """
    checkpoint = reopened(model, family, follow_links=True)
    with phase("finding experts"):
        return _report(checkpoint)


def _report(checkpoint: Checkpoint) -> InspectReport:
    anatomy = read_anatomy(checkpoint)
    config = checkpoint.settings
    smallest, largest = anatomy.expert_nbytes
    least, most = anatomy.expert_nbytes_over_layers
    records = [record for shard in checkpoint.shards for record in shard.header.tensors]
    return InspectReport(
        name=checkpoint.source.name,
        model_type=config.get("model_type"),
        architectures=architectures_of(config, checkpoint.config_place),
        family=anatomy.family.name,
        num_hidden_layers=anatomy.num_layers,
        moe_layers=tuple(layer.index for layer in anatomy.main_layers),
        mtp_layers=tuple(layer.index for layer in anatomy.mtp_layers),
        num_experts=anatomy.num_experts,
        top_k=anatomy.top_k,
        n_group=anatomy.n_group,
        topk_group=anatomy.topk_group,
        expert_layout=anatomy.layout,
        quantization=quantization_name(config) or _said_beside(checkpoint),
        shards=len(checkpoint.shards),
        tensors=checkpoint.num_tensors,
        total_size=checkpoint.total_size,
        total_parameters=count_parameters(checkpoint.tables, config),
        expert_size=largest,
        smallest_expert_size=smallest,
        expert_size_over_layers=most,
        smallest_expert_size_over_layers=least,
        sizes_at=_sizes_at(anatomy),
        notes=(
            *checkpoint.notes,
            *published_counts_note(config, anatomy),
            *absent_mtp_notes(anatomy),
            *_differing(anatomy),
        ),
        incomplete_experts={n: tuple(sorted(found)) for n, found in anatomy.incomplete.items()}
        or None,
        num_experts_per_layer=None if _alike(anatomy) else anatomy.experts_per_layer,
        active_parameters=_active_parameters(records, anatomy, config),
        dtypes=_dtypes(records),
        pruned=_pruned(checkpoint.provenance),
        view=_view(checkpoint.source),
    )


def _active_parameters(
    records: Iterable[TensorRecord], anatomy: Anatomy, config: Mapping[str, Any]
) -> int | None:
    """Parameters that one token meets, None where packing hides them."""
    always: list[TensorRecord] = []
    experts: dict[int, list[TensorRecord]] = {layer.index: [] for layer in anatomy.main_layers}
    for record in records:
        role = anatomy.role(record)
        if isinstance(role, Carried):
            always.extend([] if role.mtp else [record])
        elif role.layer in experts:
            chosen = isinstance(role, ExpertTensor) or (
                isinstance(role, Sliced) and not role.is_router
            )
            (experts[role.layer] if chosen else always).append(record)
    total = count_parameters([TensorTable.of(always)], config)
    for layer, found in experts.items():
        every = count_parameters([TensorTable.of(found)], config)
        if total is None or every is None:
            return None
        total += every * anatomy.top_k // anatomy.experts_per_layer[layer]
    return total


def _dtypes(records: Iterable[TensorRecord]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for record in records:
        sizes[record.dtype] = sizes.get(record.dtype, 0) + record.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _pruned(record: Provenance | None) -> PrunedReport | None:
    if record is None:
        return None
    first, last = record.steps[0], record.steps[-1]
    return PrunedReport(
        origin=first.source.name,
        num_experts=record.num_experts_before,
        source=last.source.name,
        selection=last.selection,
        ratio=last.ratio,
        metric=last.metric,
        prunes=len(record.steps),
    )


def _view(source: Source) -> ViewReport | None:
    if not isinstance(source, ViewSource):
        return None
    files = source.origin_files
    return ViewReport(address_of(source.origin), len(files), sum(file.nbytes for file in files))


def _said_beside(checkpoint: Checkpoint) -> str | None:
    """The quantization that a file beside config.json says."""
    present = {file.name: file for file in checkpoint.files}
    for name in QUANTIZATION_FILES:
        if name in present:
            raw = checkpoint.read_file(name, CONFIG)
            document = Document.parse(raw, f"{checkpoint.location}/{name}")
            if said := side_file_quantization(name, document.value):
                return said
    return None


def _sizes_at(anatomy: Anatomy) -> dict[str, int]:
    """Ratio → bytes, for the ratios that this model's routing allows."""
    sizes = {}
    for ratio in RATIOS_SHOWN:
        try:
            kept = uniform_counts(SelectionRequest(ratio=ratio), main_facts(anatomy)).kept
        except UsageError:
            continue
        mtp = mtp_counts(anatomy, routing_facts(anatomy), kept)
        sizes[str(ratio)] = anatomy.total_nbytes({**kept, **mtp})
    return sizes


def _differing(anatomy: Anatomy) -> list[str]:
    """What a user must know of the sizes left where the experts of a layer differ in size."""
    layers = [layer.index for layer in anatomy.layers if len(set(layer.expert_nbytes)) > 1]
    if not layers:
        return []
    differ = f"experts of layer {number_ranges(layers)} differ in size"
    return [f"{differ}: the tensor data left is at most this, `plan` says how much it is"]


def _alike(anatomy: Anatomy) -> bool:
    """Whether all MoE layers have the same number of experts."""
    return len(set(anatomy.experts_per_layer.values())) == 1
