"""Whether the layers and experts of a model have what the others have.

An engine leaves a missing scale or router bias uninitialised, so a layer that lost one is refused.
An expert may lack one, as those do which calibration never reached, if it is pruned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from shardsurgeon.errors import FamilyError

# Layer → expert → the name of a tensor that it lacks and others have.
Incomplete = Mapping[int, Mapping[int, str]]


def require_complete(
    incomplete: Incomplete, stay: Mapping[int, Collection[int]] | None, location: str
) -> None:
    """Raise FamilyError for an expert that is to stay and lacks a tensor that the others have.

    stay: layer → the experts that stay, none of a layer that is not in it; None for all.
    """
    found = {
        (layer, expert): lacks
        for layer, experts in incomplete.items()
        for expert, lacks in experts.items()
        if stay is None or expert in stay.get(layer, ())
    }
    if found:
        (layer, expert), lacks = min(found.items())
        others = f", and {len(found) - 1} more experts so" if len(found) > 1 else ""
        raise FamilyError(
            location,
            f"layer {layer} is to keep expert {expert}, and its tensor {lacks} is missing{others}",
            "experts that stay need the same tensors: prune it, or fetch the checkpoint again",
        )


@dataclass(slots=True)
class LayerTensors:
    """The tensors of one layer's MoE block, by their names behind `prefix`.

    An expert's number stands as `{}`. routers: what chooses experts; weights: name → dtype of
    everything else.
    """

    prefix: str
    routers: set[str] = field(default_factory=set)
    weights: dict[str, str] = field(default_factory=dict)

    def name(self, rest: str) -> str:
        """The whole name of one of its tensors; of expert 0 where it is every expert's."""
        return self.prefix + rest.replace("{}", "0")


def check_layers_consistent(
    blocks: Mapping[int, LayerTensors],
    main: Callable[[int], bool],
    varies: Callable[[str], bool],
    location: str,
) -> None:
    """Refuse an MoE layer that lacks what the others have.

    main: whether a layer's number is one of the main model's; an MTP layer may be stored in
    another way. varies: names of router tensors that only some layers have. Raises FamilyError
    naming the first tensor that is missing.
    """
    routers = {n: frozenset((name, "") for name in block.routers) for n, block in blocks.items()}
    weights = {n: frozenset(block.weights.items()) for n, block in blocks.items()}
    for kinds in (routers, weights):
        for layer, other in _pairs(kinds):
            extra, lacks = kinds[layer] - kinds[other], kinds[other] - kinds[layer]
            missing = sorted(name for name, _ in lacks if not varies(name))
            if missing and not extra:
                problem = f"is missing: layer {other} has one, layer {layer} not"
                raise _unlike(location, f"tensor {blocks[layer].name(missing[0])} {problem}")
    of_main = {layer: kind for layer, kind in weights.items() if main(layer)}
    for layer, other in _pairs(of_main):
        extra, lacks = of_main[layer] - of_main[other], of_main[other] - of_main[layer]
        # Another quantization has other names and dtypes; the same dtypes are renamed tensors.
        if Counter(dtype for _, dtype in extra) == Counter(dtype for _, dtype in lacks):
            mine, theirs = blocks[layer].name(min(extra)[0]), blocks[other].name(min(lacks)[0])
            problem = f"layer {layer} has {mine} where layer {other} has {theirs}"
            raise _unlike(location, problem)


_Kind = frozenset[tuple[str, str]]


def _pairs(kinds: Mapping[int, _Kind]) -> Iterator[tuple[int, int]]:
    """(layer, another that differs from it), one pair for each two kinds of layers."""
    examples: dict[_Kind, int] = {}
    for layer, kind in sorted(kinds.items()):
        examples.setdefault(kind, layer)
    for mine, layer in examples.items():
        for theirs, other in examples.items():
            if mine != theirs:
                yield layer, other


def _unlike(location: str, problem: str) -> FamilyError:
    remedy = "MoE layers need the same tensors; fetch the checkpoint again"
    return FamilyError(location, problem, remedy)
