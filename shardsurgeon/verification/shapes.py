"""Which dimension of a cut tensor counts the experts, worked out from shapes alone.

A declaration that names another dimension is obeyed by the planner and by the pairing of tensors
alike: a bias [experts, outputs] with as many outputs as experts would lose outputs and keep the
shape that both expect. So its declared dimension is not asked for here. Experts are counted in the
first dimension of that length; where several have it, in the one that the tensors of the same
layer with only one are cut along. Where a dimension holds several rows of each expert, no dimension
before it counts experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.roles import Sliced
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.pairs import Pair, Rows, ShardPairs
from shardsurgeon.verification.record import RetainedIds

Shape = tuple[int, ...]


def check_shapes(
    anatomy: Anatomy, keeps: RetainedIds, pairs: Mapping[str, ShardPairs], findings: Findings
) -> None:
    """Every tensor with rows of experts has lost rows of experts, and nothing else."""
    cuts: dict[tuple[int, bool], list[tuple[Pair, int, int]]] = defaultdict(list)
    cut = (pair for each in pairs.values() for pair in each.cut())
    for pair in (pair for pair in cut if isinstance(pair.cut, Rows)):
        role = anatomy.role(pair.source_record)
        if isinstance(role, Sliced):
            before = anatomy.reader.experts_of(role.layer) + role.tail
            after = len(keeps.retained[role.layer]) + role.tail
            cuts[role.layer, role.is_router].append((pair, before, after))
    for members in cuts.values():
        shapes = [(pair.source_record.shape, before) for pair, before, _ in members]
        known = [_counting(shape, before) for shape, before in shapes if len(shape) > 1]
        sure = [axes[0] for axes in known if len(axes) == 1]
        for pair, before, after in members:
            problem = cut_problem(pair.source_record.shape, pair.record.shape, before, after, sure)
            if problem is not None:
                findings.add(f"{pair.file} {pair.name}", problem)


def cut_problem(
    old: Shape, new: Shape, before: int, after: int, others: list[int] | tuple[int, ...] = ()
) -> str | None:
    """What is wrong with a tensor of rows of `before` experts that is to have those of `after`.

    others: the dimensions along which tensors of its layer count experts, where there is no doubt.
    """
    cut = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if sizes[0] != sizes[1]]
    if len(old) == len(new) and not cut and before == after:
        return None
    exact = _counting(old, before)
    flat = [axis for axis, size in enumerate(old) if size and size % before == 0]
    if cut and cut[0] in exact:
        right = next((axis for axis in others if axis in exact), exact[0])
    else:
        # Rows of several per expert come first, or they are something else.
        right = min([*flat, *exact], default=-1)
    if right < 0:
        return f"has no dimension that counts {before} experts: {list(old)}"
    expected = (*old[:right], old[right] // before * after, *old[right + 1 :])
    if new == expected:
        return None
    lost = f"{list(old)} became {list(new)}"
    return f"{lost}; its experts are counted in dimension {right}, expected {list(expected)}"


def _counting(shape: Shape, experts: int) -> list[int]:
    """The dimensions that are as long as there are experts."""
    return [axis for axis, size in enumerate(shape) if size == experts]
