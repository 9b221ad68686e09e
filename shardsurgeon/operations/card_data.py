"""The facts of a model card, gathered from a pruned checkpoint and its records."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import counts_no_mtp
from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER, CARD_NAME, EVALUATION_NAME
from shardsurgeon.checkpoint.provenance import Provenance
from shardsurgeon.checkpoint.quantization import count_parameters
from shardsurgeon.checkpoint.roles import ExpertTensor, Sliced
from shardsurgeon.errors import InputError
from shardsurgeon.families.schema import architectures_of
from shardsurgeon.operations.evaluation_report import (
    CandidateDamage,
    EvaluationReport,
    candidate_of,
    read_evaluation,
)
from shardsurgeon.operations.serving import Serving, serving_of
from shardsurgeon.pruning.keep_lists import retained_sha256
from shardsurgeon.pruning.layer_counts import engines_on_unequal, list_of_counts
from shardsurgeon.scores.files import read_scores
from shardsurgeon.storage.formats.index import HUGGING_FACE
from shardsurgeon.storage.formats.tensor_table import TensorRecord, TensorTable
from shardsurgeon.storage.limits import CARD, MAX_CARD_METADATA, read_limited

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a model is: bytes of tensor data; parameters, None where packing hides them."""

    nbytes: int
    parameters: int | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A score file in the model's folder: its name there, and the facts beside its scores."""

    file: str
    facts: Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an evaluation in the model's folder measured of it; file: its name there."""

    file: str
    evaluation: EvaluationReport
    found: CandidateDamage


@dataclass(frozen=True, slots=True)
class Loading:
    """How libraries load the model.

    auto_class: of transformers, which `processor` reads the inputs for, both "" where it does not
    read the model; serving: how engines do.
    """

    auto_class: str
    processor: str
    serving: Serving


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the card of a pruned model is written from.

    before: the first, unpruned model, without MTP layers that were dropped. mtp_removed: whether
    the config counts 0 MTP layers. uniform: as
    `Anatomy.is_uniform`. counts_list: the key of the list of counts per layer; engines: what stock
    engines do where they differ. source_card: the metadata of the source's own card, None where
    it had no card.
    """

    provenance: Provenance
    before: Extent
    after: Extent
    layers: int
    mtp_layers: tuple[int, ...]
    mtp_removed: bool
    uniform: bool
    counts_list: str
    engines: str
    loading: Loading
    calibrations: tuple[Calibration, ...]
    costs: tuple[Cost, ...]
    source_card: Mapping[str, Any] | None


def model_facts(
    pruned: Checkpoint, anatomy: Anatomy, provenance: Provenance, folder: Path
) -> ModelFacts:
    """Gather the facts; folder: has the pruned model's small files."""
    config = pruned.settings
    records = [record for shard in pruned.shards for record in shard.header.tensors]
    left = {layer: len(record.retained) for layer, record in provenance.layers.items()}
    uniform = anatomy.is_uniform(left)
    serving = serving_of(pruned, anatomy, left)
    return ModelFacts(
        provenance=provenance,
        before=_extent(_unpruned(anatomy, provenance, records), config),
        after=_extent(records, config),
        layers=len(provenance.layers),
        mtp_layers=tuple(layer.index for layer in anatomy.mtp_layers),
        mtp_removed=counts_no_mtp(anatomy.family, config),
        uniform=uniform,
        counts_list=list_of_counts(config, anatomy),
        engines=engines_on_unequal(config, anatomy),
        loading=_loading(pruned, serving),
        calibrations=tuple(_calibrations(pruned, folder)),
        costs=tuple(_costs(pruned, anatomy, provenance, folder)),
        source_card=_source_card(folder / CARD_NAME),
    )


def _extent(records: list[TensorRecord], config: Mapping[str, Any]) -> Extent:
    return Extent(
        sum(record.nbytes for record in records),
        count_parameters([TensorTable.of(records)], config),
    )


def _unpruned(
    anatomy: Anatomy, provenance: Provenance, records: list[TensorRecord]
) -> list[TensorRecord]:
    """The tensors as they were with all the experts of the first model.

    Experts of a layer have the same tensors, so a survivor stands for each that was pruned. Only
    names, shapes and sizes are meaningful; begin and end are not.
    """
    whole = []
    for record in records:
        role = anatomy.role(record)
        gone = 0
        if isinstance(role, ExpertTensor | Sliced) and role.layer in provenance.layers:
            gone = len(provenance.layers[role.layer].pruned)
        if isinstance(role, Sliced):
            whole.append(_longer(record, role.axis, gone * role.each))
            continue
        whole.append(record)
        if isinstance(role, ExpertTensor) and role.expert == 0:
            left = len(provenance.layers[role.layer].retained) if gone else 0
            names = (role.renamed(record.name, left + more) for more in range(gone))
            whole += [record._replace(name=name) for name in names]
    return whole


def _longer(record: TensorRecord, axis: int, more: int) -> TensorRecord:
    rows = record.shape[axis]
    shape = (*record.shape[:axis], rows + more, *record.shape[axis + 1 :])
    end = record.begin + record.nbytes // rows * (rows + more)
    return record._replace(shape=shape, end=end)


def _loading(pruned: Checkpoint, serving: Serving) -> Loading:
    config = pruned.settings
    if pruned.names != HUGGING_FACE or serving.is_mlx:
        return Loading("", "", serving)
    code = config.get("auto_map")
    code = code if isinstance(code, Mapping) else _NOTHING
    architecture = next(iter(architectures_of(config, pruned.config_place)), "")
    has_vision = architecture.endswith("ForConditionalGeneration")
    auto = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    # The card has it in a snippet of code, which no config may write.
    offered = [name for name in code if name.startswith("AutoModel") and name.isidentifier()]
    if offered and auto not in offered:
        # A class for a task, AutoModelForX, has a longer name than plain AutoModel.
        auto = max(offered, key=len)
    return Loading(
        auto_class=auto,
        processor="AutoProcessor" if has_vision else "AutoTokenizer",
        serving=serving,
    )


def _calibrations(pruned: Checkpoint, folder: Path) -> Iterator[Calibration]:
    """The score files in calibration/, which may also hold keep-lists and records."""
    for file in pruned.files:
        if file.name.startswith(CALIBRATION_FOLDER) and file.name not in pruned.odd:
            try:
                scores = read_scores(folder / file.name)
            except InputError:
                continue
            yield Calibration(file.name, scores.facts)


def _costs(
    pruned: Checkpoint, anatomy: Anatomy, provenance: Provenance, folder: Path
) -> Iterator[Cost]:
    """What evaluations of the first, unpruned model say of this one.

    Those of a model in the middle of a chain of prunes are passed over: they count in its ids.
    """
    main = [layer.index for layer in anatomy.main_layers]
    retained = {layer: record.retained for layer, record in provenance.layers.items()}
    digest = retained_sha256({layer: retained.get(layer, ()) for layer in main})
    for file in pruned.files:
        if not file.name.startswith(EVALUATION_NAME.removesuffix(".json")):
            continue
        try:
            evaluation = read_evaluation(folder / file.name)
        except InputError:
            continue
        found = candidate_of(evaluation, digest)
        source = provenance.steps[0].source
        if found is not None and evaluation.config_sha256 == source.config_sha256:
            yield Cost(file.name, evaluation, found)


def _source_card(path: Path) -> Mapping[str, Any] | None:
    """The metadata of a card; empty where it cannot be read, None where there is no card."""
    if not path.is_file():
        return None
    try:
        raw = read_limited(path, CARD, InputError)
    except InputError:
        return _NOTHING
    return metadata_of(raw.decode("utf-8-sig", "replace"))


def metadata_of(text: str) -> Mapping[str, Any]:
    """The YAML between the first two `---` lines of a card; empty where it cannot be read."""
    text = text.lstrip()
    if not text.startswith("---") or text.find("\n---") > MAX_CARD_METADATA:
        return _NOTHING
    try:
        with warnings.catch_warnings(action="ignore"):
            data: Any = ModelCard(text, ignore_metadata_errors=True).data
            found = data.to_dict()
    except Exception:  # foreign YAML fails in many ways, and a card is written without it
        return _NOTHING
    return {key: value for key, value in found.items() if isinstance(key, str)}
