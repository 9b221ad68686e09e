"""Keep-lists: which experts of every layer stay, chosen here or read from a file.

A keep-list is what selection decides and planning obeys. A file can bring one made elsewhere; our
own file, plan.json, is written here and read back the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from shardsurgeon.checkpoint.layer_names import Layer, layer_number, listed_layers
from shardsurgeon.errors import KeepListError
from shardsurgeon.pruning.keep_list_files import PLAN_FORMAT, PLAN_KIND
from shardsurgeon.pruning.keep_list_shapes import Ids, KeepListFile

_SAME_EVERYWHERE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class LayerKeep:
    """Which experts of one layer stay and go; ids of the checkpoint as it is now, ascending.

    preserved: those of the retained that stay whatever their saliency; saliency: one value per
    expert, None for an expert without one.
    """

    retained: tuple[int, ...]
    pruned: tuple[int, ...]
    preserved: tuple[int, ...] = ()
    saliency: tuple[float | None, ...] | None = field(default=None, repr=False)

    @property
    def num_experts(self) -> int:
        """Experts of the layer before."""
        return len(self.retained) + len(self.pruned)


@dataclass(frozen=True, slots=True)
class KeepList:
    """layer → its keep-list; num_experts: experts per layer before, of the largest layers.

    apart: layers whose number of experts the config says on its own, MTP layers of some families.
    """

    num_experts: int
    layers: dict[int, LayerKeep] = field(repr=False)
    apart: frozenset[int] = frozenset()

    @property
    def kept(self) -> int:
        """Experts that the largest layers keep, of those not apart."""
        return max(len(keep.retained) for n, keep in self.layers.items() if n not in self.apart)

    @property
    def most(self) -> int:
        """Experts that any layer keeps at most."""
        return max(len(keep.retained) for keep in self.layers.values())

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps the same number, and those apart one of their own."""
        counts = {(n in self.apart, len(keep.retained)) for n, keep in self.layers.items()}
        return len(counts) == len({apart for apart, _ in counts})


def keep_sha256(keep: KeepList, layers: Iterable[int]) -> str:
    """SHA-256 of what some layers keep, as hexadecimal digits: the same for the same choice, made
    in whatever way."""
    return retained_sha256({layer: keep.layers[layer].retained for layer in layers})


def retained_sha256(retained: Mapping[int, Sequence[int]]) -> str:
    """The same of the experts that layers retain, by layer."""
    kept = {str(layer): retained[layer] for layer in sorted(retained)}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def resolve(
    file: KeepListFile,
    layers: Sequence[int],
    num_experts: int,
    mtp_layers: Sequence[int] = (),
    *,
    num_layers: int | None = None,
    per_layer: Mapping[int, int] = _SAME_EVERYWHERE,
    apart: frozenset[int] = frozenset(),
) -> KeepList:
    """The keep-list that a file means for a model.

    layers: the model's MoE layers, all of which the file must list; mtp_layers: its MTP layers
    with experts, which the file may leave out; num_layers: the number of the first MTP layer
    (None: the first of mtp_layers); per_layer: the experts of layers that have fewer than
    num_experts; apart: as in KeepList. How many experts stay may differ between layers: that is
    for the caller to judge (`check_uniform`). Raises KeepListError for missing and surplus layers,
    ids beyond the experts, and layers without survivors.
    """
    if file.num_experts not in (None, num_experts):
        raise KeepListError(
            file.origin,
            f"is for {file.num_experts} experts per layer, the model has {num_experts}",
            "use a keep-list made for this model",
        )
    listed = _by_number(_with_names(file, layers), mtp_layers, num_layers)
    if file.mtp_like_first:
        first = listed[min(listed)]
        listed = {**dict.fromkeys(mtp_layers, first), **listed}
    _require_layers(file.origin, listed, layers, mtp_layers)
    return KeepList(
        num_experts,
        {
            number: _layer_keep(file, number, listed[number], per_layer.get(number, num_experts))
            for number in sorted(listed)
        },
        apart.intersection(listed),
    )


def write_plan(
    keep_list: KeepList,
    *,
    selection: Mapping[str, object],
    source: Mapping[str, object],
    model: Mapping[str, object],
) -> bytes:
    """plan.json, one line per layer, the same bytes for the same arguments.

    selection: how it was asked for, in the command's words; source: the model's name and the
    sha256 of its config; model: what `plan_model.facts_of` says of it. `read_keeplist` reads it
    back; saliencies that JSON has no number for
    (+inf, NaN) become null.
    """
    head: dict[str, object] = {
        "format": PLAN_FORMAT,
        "kind": PLAN_KIND,
        "num_experts": keep_list.num_experts,
        "selection": selection,
        "source": source,
        "model": model,
    }
    lines = [f"  {_json(key)}: {_json(value)}" for key, value in head.items()]
    layers = ",\n".join(
        f'    "{number}": {_json({**_own_count(keep_list, keep), **_fields(keep)})}'
        for number, keep in sorted(keep_list.layers.items())
    )
    lines.append(f'  "layers": {{\n{layers}\n  }}')
    # Bytes of a name that are no text become escapes, which JSON has for them.
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "backslashreplace")


def _own_count(keep_list: KeepList, keep: LayerKeep) -> dict[str, object]:
    """What a layer says of its experts before where it has fewer than others."""
    if keep.num_experts == keep_list.num_experts:
        return {}
    return {"num_experts_before": keep.num_experts}


def _fields(keep: LayerKeep) -> dict[str, object]:
    saliency = keep.saliency
    return {
        "retained": keep.retained,
        "pruned": keep.pruned,
        "preserved": keep.preserved,
        "saliency": None if saliency is None else [_finite(value) for value in saliency],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _with_names(file: KeepListFile, layers: Sequence[int]) -> KeepListFile:
    """The file with its rows, where it names no layers, as the lists of the model's MoE layers."""
    if not file.rows:
        return file
    if len(file.rows) != len(layers):
        problem = f"lists {len(file.rows)} layers without names, the model has {len(layers)} MoE "
        remedy = "name the layers ({layer: [ids]}) or use a keep-list made for this model"
        raise KeepListError(file.origin, f"{problem}layers", remedy)
    return replace(file, layers=dict(zip(layers, file.rows, strict=True)), rows=())


def _by_number(
    file: KeepListFile, mtp_layers: Sequence[int], num_layers: int | None
) -> dict[int, tuple[Layer, Ids]]:
    """Layer number → the file's name for it and its ids."""
    first_mtp = num_layers if num_layers is not None else min(mtp_layers, default=None)
    listed: dict[int, tuple[Layer, Ids]] = {}
    for layer, ids in file.layers.items():
        if isinstance(layer, str) and first_mtp is None:
            problem = f"lists layer {layer}, the model has no MTP layer with experts"
            raise KeepListError(file.origin, problem, "remove it from the list")
        number = layer_number(layer, first_mtp or 0, mtp_layers)
        if number in listed:
            problem = f"lists layer {number} twice, also as {layer}"
            raise KeepListError(file.origin, problem, "keep the one that is meant")
        listed[number] = layer, ids
    return listed


def _require_layers(
    origin: str, listed: Iterable[int], layers: Sequence[int], mtp_layers: Sequence[int]
) -> None:
    missing = set(layers).difference(listed)
    surplus = set(listed).difference(layers, mtp_layers)
    remedy = "use a keep-list made for this model"
    if missing:
        raise KeepListError(origin, f"has no list for MoE layer {listed_layers(missing)}", remedy)
    if surplus:
        problem = f"lists layer {listed_layers(surplus)}, which has no experts in the model"
        raise KeepListError(origin, problem, remedy)


def _layer_keep(
    file: KeepListFile, number: int, listed: tuple[Layer, Ids], num_experts: int
) -> LayerKeep:
    layer, ids = listed
    if ids and ids[-1] >= num_experts:
        raise KeepListError(
            file.origin,
            f"layer {number} lists expert {ids[-1]}, the model has {num_experts} per layer",
            "use a keep-list made for this model",
        )
    said = file.per_layer.get(layer, num_experts)
    if said != num_experts:
        problem = f"layer {number} is for {said} experts, the model has {num_experts} there"
        raise KeepListError(file.origin, problem, "use a keep-list made for this model")
    others = tuple(sorted(set(range(num_experts)).difference(ids)))
    retained, pruned = (ids, others) if file.meaning == "kept" else (others, ids)
    if not retained:
        raise KeepListError(file.origin, f"layer {number} drops all {num_experts} experts")
    return LayerKeep(retained, pruned, file.preserved.get(layer, ()), file.saliency.get(layer))
