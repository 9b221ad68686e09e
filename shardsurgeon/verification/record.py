"""The record that a prune leaves: which experts were kept, and their saliencies.

It is read first: tensors and config are compared with its keep-lists, in the source's numbering.
What the record says about itself must be true as well; its other fields, `record_fields` checks.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME, Provenance
from shardsurgeon.verification.findings import Findings


@dataclass(frozen=True, slots=True)
class RetainedIds:
    """The keep-lists, in expert ids of the source.

    retained: layer → ids, retained[layer][new_id] is the source's number of what is now expert
    new_id.
    """

    retained: dict[int, tuple[int, ...]]

    def shared_counts(self, anatomy: Anatomy) -> set[int]:
        """How many experts are left in the layers that the config's one count speaks of.

        MTP layers are built with it too, so that where main layers agree theirs is what it must be.
        """
        left = {
            layer: len(ids) for layer, ids in self.retained.items() if layer not in anatomy.apart
        }
        main = {count for layer, count in left.items() if layer < anatomy.num_layers}
        return main if len(main) == 1 else set(left.values())


def read_keeps(
    source: Checkpoint, anatomy: Anatomy, pruned: Checkpoint, findings: Findings
) -> RetainedIds | None:
    """The keep-lists of a pruned checkpoint; None where its record is missing or useless.

    The metadata counts in ids of the first, unpruned model. Where the source is a pruned model
    itself, its own metadata translates them.
    """
    record = pruned.provenance
    if record is None:
        findings.add(PROVENANCE_NAME, "is missing: nothing says which experts were kept")
        return None
    earlier = source.provenance
    _check_steps(source, anatomy, record, findings)
    original = anatomy.num_experts if earlier is None else earlier.num_experts_before
    if record.num_experts_before != original:
        findings.add(
            PROVENANCE_NAME,
            f"speaks of a model of {record.num_experts_before} experts, "
            f"the source goes back to one of {original}",
        )
        return None
    retained, counts = {}, anatomy.experts_per_layer
    for layer in (each.index for each in anatomy.layers if each.index in record.layers):
        ids = record.layers[layer].retained
        first = earlier.layers.get(layer) if earlier is not None else None
        had = counts[layer] if first is None else first.num_experts
        if record.layers[layer].num_experts != had:
            problem = f"speaks of {record.layers[layer].num_experts} experts, there were {had}"
            findings.add(f"{PROVENANCE_NAME} layers.{layer}", problem)
            continue
        if earlier is None:
            retained[layer] = ids
        elif layer in earlier.layers:
            present = {
                old_id: number for number, old_id in enumerate(earlier.layers[layer].retained)
            }
            if gone := [old_id for old_id in ids if old_id not in present]:
                problem = f"keeps expert {gone[0]} of the original, which the source has not"
                findings.add(f"{PROVENANCE_NAME} layers.{layer}", problem)
                continue
            retained[layer] = tuple(present[old_id] for old_id in ids)
        else:
            findings.add(f"{PROVENANCE_NAME} layers.{layer}", "is not in the source's own metadata")
    return RetainedIds(retained)


def check_layers(
    anatomy: Anatomy, pruned: Checkpoint, keeps: RetainedIds, mtp_dropped: bool, findings: Findings
) -> None:
    """Every MoE layer has a keep-list that its router can work with, and nothing else has one."""
    record = pruned.provenance
    recorded = set() if record is None else set(record.layers)
    expected = {layer.index for layer in anatomy.layers if not (mtp_dropped and layer.is_mtp)}
    for layer in sorted(expected - recorded):
        findings.add(PROVENANCE_NAME, f"has no entry for MoE layer {layer}")
    for layer in sorted(recorded - expected):
        findings.add(PROVENANCE_NAME, f"has an entry for layer {layer}, which has no experts")
    for layer, experts in anatomy.incomplete.items():
        for old_id in experts.keys() & set(keeps.retained.get(layer, ())):
            problem = f"keeps expert {old_id}, whose tensor {experts[old_id]} the source lacks"
            findings.add(f"{PROVENANCE_NAME} layers.{layer}", problem)
    groups, before = anatomy.n_group, anatomy.experts_per_layer
    fewest = min(keeps.retained.items(), key=lambda item: len(item[1]), default=None)
    if fewest is not None and len(fewest[1]) < min(anatomy.top_k, before[fewest[0]]):
        problem = f"{len(fewest[1])} experts are left in layer {fewest[0]}, the router chooses "
        findings.add(PROVENANCE_NAME, f"{problem}{anatomy.top_k} for each token")
    most = max(keeps.shared_counts(anatomy), default=0)
    for mtp in anatomy.mtp_layers:
        left = len(keeps.retained.get(mtp.index, range(most)))
        if left != most and anatomy.shares_count(mtp):
            problem = f"{left} experts are left in MTP layer {mtp.index}, the config says {most}"
            findings.add(PROVENANCE_NAME, problem)
    for layer, retained in keeps.retained.items() if groups > 1 else ():
        size = before[layer] // groups
        counts = [sum(old_id // size == group for old_id in retained) for group in range(groups)]
        if len(set(counts)) > 1:
            problem = (
                f"keeps {min(counts)} to {max(counts)} experts per router group, not equally many"
            )
            findings.add(f"{PROVENANCE_NAME} layers.{layer}", problem)


def _check_steps(
    source: Checkpoint, anatomy: Anatomy, record: Provenance, findings: Findings
) -> None:
    """The recorded prunes continue those of the source."""
    before = () if source.provenance is None else source.provenance.steps
    if record.steps[: len(before)] != before or len(record.steps) <= len(before):
        problem = f"records {len(record.steps)} prunes that do not go on from the source's own"
        findings.add(PROVENANCE_NAME, f"{problem} {len(before)}")
        return
    step = record.steps[len(before)]
    if step.num_experts_before != anatomy.num_experts:
        problem = f"says it was pruned from {step.num_experts_before} experts"
        findings.add(PROVENANCE_NAME, f"{problem}, the source has {anatomy.num_experts}")
    made_from = step.source.config_sha256
    if made_from not in (None, source.config_sha256):
        findings.add(
            PROVENANCE_NAME,
            f"was pruned from a model whose config.json has sha256 {str(made_from)[:12]}…, "
            f"the source's has {source.config_sha256[:12]}…",
        )
