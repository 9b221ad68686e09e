"""What a plan.json says of the model that it was made for, and whether another one will do. Pure.

One plan may serve a quantization of its model, or a fine-tune; their configs differ, and what
decides how experts are built and chosen does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import config_section
from shardsurgeon.errors import KeepListError
from shardsurgeon.storage.formats.strict_json import brief

# Sizes of a config that no quantization and no fine-tune changes.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_hidden_size",
    "hidden_dim",
    "num_attention_heads",
)
_FLOATS = ("BF16", "F16", "F32")
_REMEDY = "use a plan made for this model, or for a quantization or a fine-tune of it"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model that a plan was made for.

    name, config_sha256: as in `SourceIdentity`; facts: what `facts_of` gave, empty in plans of
    earlier versions.
    """

    name: str
    config_sha256: str
    facts: Mapping[str, object] = field(default_factory=dict)


def facts_of(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, object]:
    """Name → value of what must be the same in a model that shares a plan."""
    found: dict[str, object] = {
        "model_type": checkpoint.settings.get("model_type"),
        "num_layers": anatomy.num_layers,
        "top_k": anatomy.top_k,
        "n_group": anatomy.n_group,
        "topk_group": anatomy.topk_group,
    }
    router = anatomy.layers[0].router
    record = next(record for record in checkpoint.records if record.name == router)
    if record.dtype in _FLOATS:
        found["router_width"] = record.shape[-1]
    for at in anatomy.family.config.at:
        section = config_section(checkpoint.settings, at) or {}
        sizes = {key: section.get(key) for key in _SIZES}
        found |= {key: size for key, size in sizes.items() if type(size) is int}
    return found


def other_model(
    planned: PlannedModel | None, checkpoint: Checkpoint, anatomy: Anatomy, origin: str
) -> PlannedModel | None:
    """The model that a plan was made for, where it is not this one; None where it is.

    origin: the plan, for messages. Raises KeepListError, with the fact that differs, where its
    experts cannot be compared with this model's.
    """
    first = checkpoint.provenance.steps[0].source if checkpoint.provenance is not None else None
    own = {checkpoint.config_sha256, first.config_sha256 if first is not None else None}
    if planned is None or planned.config_sha256 in own:
        return None
    here = facts_of(checkpoint, anatomy)
    for key, value in here.items():
        said = planned.facts.get(key, value)
        if said != value:
            problem = f"was made for {planned.name}, whose {key} is {brief(said)}, and "
            problem += f"{checkpoint.source.name} has {value}"
            raise KeepListError(origin, problem, _REMEDY)
    return planned
