"""The metadata file that records what was removed: its value, its bytes, and how it is read.

Every pruned checkpoint has it. `pruning.lineage` makes the value when a checkpoint is pruned;
`checkpoint` reads it when a pruned checkpoint is opened. No files are opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from shardsurgeon.checkpoint.files import CALIBRATION_FOLDER
from shardsurgeon.checkpoint.sampling import are_members
from shardsurgeon.errors import CheckpointError
from shardsurgeon.storage.formats.checksums import CHECKSUMS_KEY, with_checksums
from shardsurgeon.storage.formats.strict_json import (
    CheckedJson,
    brief,
    is_whole_number,
    parse_for_a_hint,
    parse_json,
)
from shardsurgeon.storage.limits import METADATA, require_json

PROVENANCE_NAME = f"{CALIBRATION_FOLDER}reap_pruning_metadata.json"
# 2 where layers have different numbers of experts: a reader that knows format 1 only must refuse
# such a file.
FORMATS = (1, 2)
METHOD = "reap"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?=/.|\Z)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "restore the file, or move it away to prune this checkpoint as if it were an original"


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """The checkpoint a prune started from; config_sha256: hex, of its config.json's bytes."""

    name: str
    revision: str | None
    config_sha256: str | None

    @property
    def repository(self) -> str | None:
        """`org/name` of a model on the Hub, be it in a folder of the repository; else None."""
        found = _REPOSITORY.match(self.name)
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Step:
    """One prune. Numbers of experts are those of the largest layers.

    ratio: the ratio asked for, or else the exact fraction removed; rounding: None unless a ratio
    was asked for; metric: None where a keep-list decided; selection: `ratio`, `keep`,
    `target-size` or `plan`; source: the checkpoint it was applied to; saliency_of: the other model
    whose plan was used and whose saliencies these are, None where they are the source's own;
    sampling: what the user had written into generation_config.json, by the keys there.
    """

    num_experts_before: int
    num_experts_after: int
    ratio: float
    rounding: str | None
    metric: str | None
    selection: str
    source: SourceIdentity
    saliency_of: SourceIdentity | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def fields(self) -> dict[str, object]:
        """As the file has them: without what is not said."""
        fields = asdict(self)
        if self.saliency_of is None:
            del fields["saliency_of"]
        if not self.sampling:
            del fields["sampling"]
        return fields


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What is left of one layer, in ids of the first, unpruned model.

    retained: ascending, retained[i] is now expert i; pruned: ascending, all the others;
    preserved: those of the retained that stay whatever their saliency; saliency: one finite
    value per original id, None where unknown; policy: what decided, `scores`, `router-norm`,
    `last` or `plan`.
    """

    retained: tuple[int, ...]
    pruned: tuple[int, ...]
    preserved: tuple[int, ...]
    saliency: tuple[float | None, ...]
    policy: str = "scores"

    @property
    def num_experts(self) -> int:
        """Experts of the layer in the first, unpruned model."""
        return len(self.retained) + len(self.pruned)

    def cut(self, ids: range) -> dict[str, float | None]:
        """The lowest retained and the highest pruned saliency among `ids`.

        Preserved experts and unknown values are left out; None where no value remains.
        """
        kept = frozenset(self.retained).difference(self.preserved)
        return {
            "min_retained_saliency": min(self._known(kept, ids), default=None),
            "max_pruned_saliency": max(self._known(frozenset(self.pruned), ids), default=None),
        }

    def _known(self, members: frozenset[int], ids: range) -> list[float]:
        values = ((old_id, self.saliency[old_id]) for old_id in ids)
        return [value for old_id, value in values if value is not None and old_id in members]


@dataclass(frozen=True, slots=True)
class Provenance:
    """The content of the file.

    num_experts_before: of the first, unpruned model; num_experts_after: now; both of the largest
    layers, dropped ones included, where layers differ. n_group: the router's groups; layers:
    layer → record; steps: every prune, first to last, at least one. Of the last prune: files: what
    it wrote beside this file, name → bytes, None in records of earlier versions; include, exclude:
    the globs that it was given; sha256: name → SHA-256 (hex) of those files, without the shards
    unless that was asked for, None in records of earlier versions and in plans.
    """

    num_experts_before: int
    num_experts_after: int
    n_group: int
    layers: dict[int, LayerRecord] = field(repr=False)
    steps: tuple[Step, ...]
    files: Mapping[str, int] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sha256: Mapping[str, str] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """What all prunes together have written into generation_config.json, by the keys there."""
        return {key: value for step in self.steps for key, value in step.sampling.items()}

    @property
    def ratio(self) -> float:
        """The ratio last asked for; where the last prune was not asked for by ratio, or removed
        another share than rounding gives, the fraction of the original experts that has been
        removed."""
        last = self.steps[-1]
        records = self.layers.values()
        gone = sum(len(record.pruned) for record in records)
        original = sum(record.num_experts for record in records)
        is_true = last.selection == "ratio" and rounding_alone(last.ratio, self._last_removed())
        return last.ratio if is_true else gone / original

    def _last_removed(self) -> list[tuple[int, int]]:
        """(experts before, experts removed) of layers in the last prune, as far as is known."""
        last = self.steps[-1]
        if self.is_uniform:
            return [(last.num_experts_before, last.num_experts_before - last.num_experts_after)]
        if len(self.steps) > 1:
            return []
        pruned = [record for record in self.layers.values() if record.policy != "keep"]
        return [(record.num_experts, len(record.pruned)) for record in pruned]

    @property
    def is_uniform(self) -> bool:
        """Whether every layer had, and has, as many experts as the largest ones."""
        counts = {(each.num_experts, len(each.retained)) for each in self.layers.values()}
        return counts == {(self.num_experts_before, self.num_experts_after)}

    def to_bytes(self) -> bytes:
        """The file: JSON, one line per layer and step, the same bytes for the same value."""
        last = self.steps[-1]
        head = {
            "format": FORMATS[0] if self.is_uniform else FORMATS[1],
            "method": METHOD,
            "metric": last.metric,
            "ratio": self.ratio,
            "rounding": last.rounding,
            "num_experts_before": self.num_experts_before,
            "num_experts_after": self.num_experts_after,
            # The ids below are the first model's, so it is the source that is named here.
            "source": asdict(self.steps[0].source),
            **({"include": self.include} if self.include else {}),
            **({"exclude": self.exclude} if self.exclude else {}),
        }
        lines = [f"  {_json(key)}: {_json(value)}" for key, value in head.items()]
        steps = ",\n".join(f"    {_json(step.fields())}" for step in self.steps)
        lines.append(f'  "steps": [\n{steps}\n  ]')
        if self.files is not None:
            files = ",\n".join(f"    {_json(k)}: {v}" for k, v in sorted(self.files.items()))
            lines.append(f'  "files": {{\n{files}\n  }}')
        layers = ",\n".join(
            f'    "{layer}": {_json(self._layer(record))}'
            for layer, record in sorted(self.layers.items())
        )
        lines.append(f'  "layers": {{\n{layers}\n  }}')
        document = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        return document if self.sha256 is None else with_checksums(document, self.sha256)

    def _layer(self, record: LayerRecord) -> dict[str, object]:
        own = record.num_experts != self.num_experts_before
        fields: dict[str, object] = {
            **({"num_experts_before": record.num_experts} if own else {}),
            "retained": record.retained,
            "pruned": record.pruned,
            "preserved": record.preserved,
            **record.cut(range(record.num_experts)),
            "policy": record.policy,
        }
        if self.n_group > 1:
            # Only within a group is retained >= pruned promised.
            size = record.num_experts // self.n_group
            groups = (range(g * size, (g + 1) * size) for g in range(self.n_group))
            fields["groups"] = [record.cut(ids) for ids in groups]
        return {**fields, "saliency": record.saliency}


def rounding_alone(ratio: float, removed: Iterable[tuple[int, int]]) -> bool:
    """Whether less than one expert lies between a ratio and what was removed, and not the
    multiple that a router's groups or --multiple-of ask for.

    removed: (experts before, experts removed) of every layer. On average over the layers, which
    may share one budget; no layer tells of no difference.
    """
    apart = [gone - ratio * before for before, gone in removed]
    return abs(sum(apart)) < max(len(apart), 1)


def is_foreign(raw: bytes) -> bool:
    """Whether the file was written by another tool: JSON that names no format of ours.

    Published prunes carry a file of this name that says other things.
    """
    top = parse_for_a_hint(raw, METADATA)
    return isinstance(top, dict) and "format" not in top


def parse_provenance(raw: bytes, where: str) -> Provenance:
    """Read the file back and check that it is whole.

    Every layer must name all original experts once and leave num_experts_after of them (in
    format 2 at most so many), and the steps must lead from the one count to the other. Raises
    CheckpointError, naming `where`.
    """
    return _Reader(where, CheckpointError, _REMEDY).provenance(raw)


class _Reader(CheckedJson):
    """The records of one file."""

    def provenance(self, raw: bytes) -> Provenance:
        top = self.top(raw)
        before = self.count(top, "num_experts_before", "")
        after = self.count(top, "num_experts_after", "")
        differ = top["format"] == FORMATS[1]
        if not 0 < after < before + differ:
            self.refuse(f"{after} of {before} experts are left, which prunes nothing")
        layers: dict[int, LayerRecord] = {}
        groups: set[int] = set()
        for key, fields in self.member(top, "layers", "").items():
            place = f"layers.{key[:40]}"
            if not (key.isascii() and key.isdigit() and key == str(int(key[:9]))):
                self.refuse(f"{place}: not a layer number")
            own = self.own_count(fields, place, before) if differ else before
            left = range(1 if differ else after, min(own, after) + 1)
            layers[int(key)] = self.layer(self.as_object(fields, place), place, own, left)
            groups.add(self.n_group(fields, place))
        if not layers:
            self.refuse("holds 0 layers")
        counts = {(each.num_experts, len(each.retained)) for each in layers.values()}
        if len(groups) > 1 or any(n % min(groups) for pair in counts for n in pair):
            numbers = sorted({n for pair in counts for n in pair}, reverse=True)
            fitted = " and ".join(map(str, numbers))
            self.refuse(f"{sorted(groups)} groups do not fit {fitted} experts")
        return Provenance(
            before,
            after,
            groups.pop(),
            layers,
            self.steps(top, before, after),
            self.files(top),
            self.globs(top, "include"),
            self.globs(top, "exclude"),
            self.sha256(top),
        )

    def files(self, top: dict[str, Any]) -> dict[str, int] | None:
        if "files" not in top:
            return None
        files = self.member(top, "files", "")
        for name, nbytes in files.items():
            if not is_whole_number(nbytes) or nbytes >> 63:
                self.refuse(f"files: {name[:40]} is not given a size in bytes")
        return files

    def sha256(self, top: dict[str, Any]) -> dict[str, str] | None:
        if CHECKSUMS_KEY not in top or "files" not in top:
            return None
        digests = self.member(top, CHECKSUMS_KEY, "")
        for name, digest in digests.items():
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                self.refuse(f"{CHECKSUMS_KEY}: {name[:40]} is not given a SHA-256")
            if name not in top["files"]:
                self.refuse(f"{CHECKSUMS_KEY}: {name[:40]} is none of the files")
        return digests

    def globs(self, top: dict[str, Any], key: str) -> tuple[str, ...]:
        value = top.get(key, [])
        if not isinstance(value, list) or not all(isinstance(glob, str) for glob in value):
            self.refuse(f"{key}: not a list of globs")
        return tuple(value)

    def top(self, raw: bytes) -> dict[str, Any]:
        require_json(raw, METADATA, self.where, CheckpointError, _REMEDY)
        try:
            top = self.as_object(parse_json(raw, METADATA), "the document")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(self.where, f"is not valid JSON ({error})", _REMEDY) from error
        if top.get("format") not in FORMATS or isinstance(top["format"], bool):
            found = json.dumps(top.get("format"))[:40]
            remedy = "update shardsurgeon, or move the file away if another tool wrote it"
            raise CheckpointError(self.where, f"format is {found}, known are 1 and 2", remedy)
        return top

    def own_count(self, fields: object, place: str, before: int) -> int:
        """A layer's original experts: its own number where it had fewer than the largest."""
        record = self.as_object(fields, place)
        if "num_experts_before" not in record:
            return before
        own = self.count(record, "num_experts_before", place)
        if own > before:
            self.refuse(f"{place}: {own} experts before, no layer had more than {before}")
        return own

    def layer(self, fields: dict[str, Any], place: str, before: int, left: range) -> LayerRecord:
        """left: how many may be retained."""
        retained = self.ids(fields, "retained", place)
        pruned = self.ids(fields, "pruned", place)
        preserved = self.ids(fields, "preserved", place) if "preserved" in fields else ()
        if len(retained) not in left or len(retained) + len(pruned) != before:
            found = f"{len(retained)} retained and {len(pruned)} pruned"
            which = "at most " if left.stop - left.start > 1 else ""
            expected = f"{which}{left[-1]} and {before - left[-1]}"
            self.refuse(f"{place}: {found} experts, expected {expected}")
        if sorted(retained + pruned) != list(range(before)):
            self.refuse(
                f"{place}: retained and pruned are not the ids 0 to {before - 1}, each once"
            )
        if not set(preserved) <= set(retained):
            self.refuse(f"{place}: preserved experts {preserved} are not all retained")
        policy = self.text(fields, "policy", place) if "policy" in fields else None
        saliency = self.saliency(fields, place, before)
        return LayerRecord(retained, pruned, preserved, saliency, policy or "scores")

    def saliency(self, fields: dict[str, Any], place: str, before: int) -> tuple[float | None, ...]:
        values = fields.get("saliency")
        if values is None:
            return (None,) * before
        if not isinstance(values, list) or len(values) != before:
            found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
            self.refuse(f"{place}.saliency: {found}, expected {before} values")
        return tuple(
            None if value is None else self.number(value, f"{place}.saliency[{old_id}]")
            for old_id, value in enumerate(values)
        )

    def n_group(self, fields: dict[str, Any], place: str) -> int:
        groups = fields.get("groups")
        if groups is None:
            return 1
        return len(self.items(groups, f"{place}.groups", "groups"))

    def steps(self, top: dict[str, Any], before: int, after: int) -> tuple[Step, ...]:
        if "steps" not in top:
            # A single prune may leave the list out: the top level says all of it.
            selection = "ratio" if top.get("rounding") is not None else "keep"
            return (self.step({**top, "selection": selection}, "the document"),)
        listed = self.items(top["steps"], "steps", "prunes")
        places = [f"steps[{i}]" for i in range(len(listed))]
        steps = [
            self.step(self.as_object(item, place), place)
            for item, place in zip(listed, places, strict=True)
        ]
        begins = [step.num_experts_before for step in steps]
        ends = [step.num_experts_after for step in steps]
        if begins != [before, *ends[:-1]] or ends[-1] != after:
            pairs = ", ".join(f"{b} to {e}" for b, e in zip(begins, ends, strict=True))
            self.refuse(f"steps: {pairs} do not lead from {before} to {after} experts")
        return tuple(steps)

    def step(self, fields: dict[str, Any], place: str) -> Step:
        other = self.member(fields, "saliency_of", place) if "saliency_of" in fields else None
        return Step(
            num_experts_before=self.count(fields, "num_experts_before", place),
            num_experts_after=self.count(fields, "num_experts_after", place),
            ratio=self.number(fields.get("ratio"), f"{place}.ratio"),
            rounding=self.text(fields, "rounding", place),
            metric=self.text(fields, "metric", place),
            selection=self.text(fields, "selection", place) or "keep",
            source=self.identity(self.member(fields, "source", place), f"{place}.source"),
            saliency_of=None if other is None else self.identity(other, f"{place}.saliency_of"),
            sampling=self.sampling(fields, place),
        )

    def sampling(self, fields: dict[str, Any], place: str) -> dict[str, Any]:
        if "sampling" not in fields:
            return {}
        members = self.member(fields, "sampling", place)
        if not are_members(members):
            problem = f"{place}.sampling: {brief(members)} are no settings to sample with"
            self.refuse(problem)
        return members

    def identity(self, fields: dict[str, Any], place: str) -> SourceIdentity:
        return SourceIdentity(
            name=self.text(fields, "name", place) or "",
            revision=self.text(fields, "revision", place),
            config_sha256=self.text(fields, "config_sha256", place),
        )

    def ids(self, fields: dict[str, Any], key: str, place: str) -> tuple[int, ...]:
        value = fields.get(key)
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            self.refuse(f"{place}.{key}: not a list of expert ids")
        if not _ascending(value):
            self.refuse(f"{place}.{key}: {len(value)} ids that do not ascend")
        return tuple(value)


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _ascending(ids: Sequence[int]) -> bool:
    return all(left < right for left, right in pairwise(ids))
