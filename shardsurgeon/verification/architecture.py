"""Whether transformers' model of the pruned config takes exactly these tensors.

Names and shapes answer that: the model is built on the meta device, and transformers' own loader
gets the checkpoint's tensors, quantized ones as the weights they stand for, without their values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint, with_family
from shardsurgeon.checkpoint.layer_consistency import require_complete
from shardsurgeon.checkpoint.quantization import read_weights
from shardsurgeon.checkpoint.quantization_schemes import Shape
from shardsurgeon.checkpoint.roles import Carried
from shardsurgeon.checkpoint.transformers_model import (
    OPTION,
    LoadResult,
    MetaModel,
    as_transformers_reads,
    engine_name,
    identity_experts,
    is_known,
    name_in_transformers,
)
from shardsurgeon.errors import FamilyError, InputError, UsageError
from shardsurgeon.families.schema import Family
from shardsurgeon.families.templates import pattern
from shardsurgeon.storage.formats.tensor_table import TensorRecord
from shardsurgeon.storage.source import Source
from shardsurgeon.verification.findings import ArchitectureReport, Findings

# Kinds of differences that leave a parameter without a value.
_UNFILLED = ("missing", "mismatched", "unbuilt")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")

AnyCheckpoint = Checkpoint | Source | str | PathLike[str]


def check_architecture(source: AnyCheckpoint, pruned: AnyCheckpoint) -> ArchitectureReport:
    """Whether the model that `pruned`'s config describes takes exactly its tensors.

    A difference that the source has as well was not made by pruning: its tensors are reported as
    not checked, but for those that leave a parameter without a value, which stay differences.
    Raises UsageError where transformers is not installed or cannot build the source's model, and
    whatever reading the source as a model raises.
    """
    before = _opened(source)
    anatomy = read_anatomy(before)
    original = meta_model = _meta_model(before, anatomy.family)
    findings, trial = Findings(), _Trial()
    try:
        after = with_family(_opened(pruned), anatomy.family)
        try:
            # Checks names and counts, also of tensors that transformers does not read.
            require_complete(read_anatomy(after).incomplete, None, after.location)
        except InputError as error:
            findings.add(error.where, error.problem)
        meta_model = _meta_model(after, anatomy.family)
        trial = _try(after, anatomy, meta_model)
    except InputError as error:
        # The pruned model is what is checked: if it cannot be read or built, that is a finding.
        findings.add(error.where, error.problem)
    known = _try(before, anatomy, original) if trial.found else _Trial()
    excused: set[str] = set()
    for (kind, name), text in sorted(trial.found.items()):
        if (kind, name) not in known.found:
            findings.add(name, text)
        elif kind.endswith(_UNFILLED):
            # Pruning did not do it, and the parameter has no value all the same.
            what = ": missing, in" if kind.endswith("missing") else ", in"
            findings.add(name, f"{text}{what} the source too")
        else:
            excused.add(name)
    return ArchitectureReport(
        engine=engine_name(),
        model_class=meta_model.model_class,
        parameters=len(meta_model.expected),
        tensors=trial.tensors,
        mtp_layers=tuple(trial.mtp_layers),
        unchecked=(
            *_summary(trial.unread),
            *_summary(excused, ": does not fit in the source either"),
        ),
        differences=findings.lines(),
    )


@dataclass
class _Trial:
    """How one checkpoint fits the model that transformers builds.

    identity_experts: how many experts without weights each layer has after the others; found:
    (kind of difference, name) → the difference in words; unread: tensors that transformers does
    not read; mtp_layers: MTP layers whose experts were compared with a main layer's.
    """

    tensors: int = 0
    identity_experts: int = 0
    found: dict[tuple[str, str], str] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    mtp_layers: list[int] = field(default_factory=list)

    def judge(self, fit: LoadResult, meta_model: MetaModel, place: str = "") -> None:
        """Note what does not fit. place: where, for messages; "" in the main model."""
        for name, (given, expected) in fit.mismatched.items():
            if self._lacks_identity_experts(given, expected):
                continue
            text = f"shape {list(given)}, and the config makes it {list(expected)}"
            self.note("mismatched", name, text, place)
        for name, reason in fit.conversion_errors.items():
            text = f"cannot be put together from the checkpoint's tensors: {reason}"
            self.note("unbuilt", name, text, place)
        for name in fit.surplus:
            text = f"is in the checkpoint, and {meta_model.model_class} has no place for it"
            self.note("surplus", name, text, place)

    def _lacks_identity_experts(self, given: Shape, expected: Shape) -> bool:
        """Whether transformers has weights for experts without any: that is not a difference."""
        rows = self.identity_experts
        return rows > 0 and expected == (given[0] + rows, *given[1:])

    def note(self, kind: str, name: str, text: str, place: str = "") -> None:
        """Add one difference."""
        self.found[place + kind, name] = place + text


def _opened(checkpoint: AnyCheckpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _meta_model(checkpoint: Checkpoint, family: Family) -> MetaModel:
    """The model of a checkpoint's config. Raises UsageError where transformers has none."""
    settings, view = checkpoint.settings, family.transformers
    config = as_transformers_reads(settings, view, is_known)
    if config is None:
        reason = view.unknown or f"it does not know model type {settings.get('model_type')!r}"
        problem = f"{engine_name()} cannot build {checkpoint.location}: {reason}"
        raise UsageError(OPTION, problem, "verify without it")
    return MetaModel(config, checkpoint.location)


def _try(checkpoint: Checkpoint, anatomy: Anatomy, meta_model: MetaModel) -> _Trial:
    """Fit a checkpoint into a model. anatomy: the source's, whose names both share."""
    weights = read_weights(checkpoint.records, checkpoint.settings)
    family = anatomy.family
    identity = identity_experts(checkpoint.settings, family)
    trial = _Trial(tensors=checkpoint.num_tensors, identity_experts=identity)
    for name, problem in weights.problems.items():
        trial.note("storage", name, problem)
    mtp = {name for name, shape in weights.shapes.items() if _is_mtp(name, shape, anatomy)}
    main = {
        name_in_transformers(name, family.transformers): shape
        for name, shape in weights.shapes.items()
        if name not in mtp
    }
    fit = meta_model.fit(main)
    trial.judge(fit, meta_model)
    absent = [re.compile(pattern(name)) for name in family.transformers.absent]
    for name in fit.missing:
        if not any(regex.fullmatch(name) for regex in absent):
            text = f"{meta_model.model_class} expects it {list(meta_model.expected[name])}, and it "
            trial.note("missing", name, text + "is not in the checkpoint")
    trial.unread |= fit.unread | mtp
    _try_mtp_layers(weights.shapes, anatomy, meta_model, trial)
    return trial


def _is_mtp(name: str, shape: Shape, anatomy: Anatomy) -> bool:
    """Whether a tensor belongs to MTP layers, which transformers does not have."""
    place = anatomy.reader.place(name)
    if place is not None:
        return anatomy.reader.is_mtp(place[0])
    try:
        role = anatomy.role(TensorRecord(name, "", shape, 0, 0))
    except FamilyError:
        return False
    return isinstance(role, Carried) and role.mtp


def _try_mtp_layers(
    shapes: dict[str, Shape], anatomy: Anatomy, meta_model: MetaModel, trial: _Trial
) -> None:
    """Fit the MoE blocks of MTP layers in the place of a main layer's: they have the same form."""
    twin, reader, view = anatomy.main_layers[-1], anatomy.reader, anatomy.family.transformers
    blocks: dict[int, dict[str, str]] = {twin.index: {}}
    blocks |= {layer.index: {} for layer in anatomy.mtp_layers}
    for name in shapes:
        place = reader.place(name)
        if place is not None and place[0] in blocks and reader.in_block(name, place[1]):
            blocks[place[0]][name[place[1] :]] = name
    at = reader.place(twin.router)
    assert at is not None
    prefix = twin.router[: at[1]]

    def fit(block: dict[str, str]) -> LoadResult:
        return meta_model.fit(
            {
                name_in_transformers(prefix + rest, view): shapes[name]
                for rest, name in block.items()
            }
        )

    own = fit(blocks.pop(twin.index))
    for index, block in blocks.items():
        if not block:
            continue
        theirs, where = fit(block), f"in MTP layer {index} "
        trial.judge(theirs, meta_model, where)
        for name in own.filled - theirs.filled - theirs.conversion_errors.keys():
            trial.note("missing", name, f"is not there, and layer {twin.index} has it", where)
        trial.unread -= set(block.values())
        trial.mtp_layers.append(index)


def _summary(names: Iterable[str], why: str = "") -> tuple[str, ...]:
    """Names with `*` for their numbers, and how many tensors each stands for."""
    counts = Counter(_NUMBER.sub("*", name) for name in names)
    return tuple(
        name + (f" ({count:,} tensors)" if count > 1 else "") + why
        for name, count in sorted(counts.items())
    )
