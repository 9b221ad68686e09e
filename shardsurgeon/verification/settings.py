"""config.json and the files beside the weights: what may differ from the source, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from shardsurgeon.anatomy import Anatomy
from shardsurgeon.checkpoint import CONFIG_NAME, Checkpoint
from shardsurgeon.formats.index import INDEX_NAME
from shardsurgeon.provenance import PROVENANCE_NAME
from shardsurgeon.verification.expertcounts import ExpectedCounts, Path
from shardsurgeon.verification.findings import Findings
from shardsurgeon.verification.lineage import Keeps

_BLOCK = 1 << 20
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_NAMED_EXPERT = re.compile(
    r"(?:^|[.\\])(mtp[.\\]+)?(?:layers|blocks)[.\\]+(\d+)[.\\].*?experts([.\\]+)(\d+)(?!\d)"
)
_NOT_COPIED = re.compile(
    r".*\.(?:bin|pth|gguf|bin\.index\.json)|(?:.*/)?consolidated[^/]*|original/.*"
)


class _Gone(Exception):
    """The entry named an expert that is pruned."""


def check_settings(
    source: Checkpoint,
    anatomy: Anatomy,
    pruned: Checkpoint,
    keeps: Keeps,
    mtp_dropped: bool,
    findings: Findings,
) -> None:
    """config.json and quantization files say the new counts and are otherwise the source's."""
    expected = _Expected(source.settings, anatomy, keeps, mtp_dropped)
    config = expected.config(source.settings, ())
    _compare(CONFIG_NAME, "", config, pruned.settings, findings)
    there = {file.name: file.nbytes for file in pruned.files}
    for file in source.files:
        if file.name not in _QUANTIZATION_FILES:
            continue
        if file.name not in there:
            findings.add(file.name, "is missing")
            continue
        before = json.loads(source.source.read(file.name, 0, file.nbytes))
        after = json.loads(pruned.source.read(file.name, 0, there[file.name]))
        _compare(file.name, "", expected.quantization(before), after, findings)


class _Expected:
    """What a JSON value of the source must have become."""

    def __init__(
        self, config: Mapping[str, Any], anatomy: Anatomy, keeps: Keeps, mtp_dropped: bool
    ) -> None:
        keys = anatomy.family.config
        self._anatomy = anatomy
        self._keeps = keeps
        self._counts = ExpectedCounts(config, anatomy, keeps, mtp_dropped)
        self._mtp = set(keys.mtp_layers) if mtp_dropped else set()
        self._elsewhere = {tuple(dotted.split(".")) for dotted in keys.elsewhere}

    def config(self, value: Any, path: Path) -> Any:
        if path in self._elsewhere:
            return value
        if path and path[-1] in _QUANTIZATION_KEYS:
            return self.quantization(value)
        if isinstance(value, dict):
            members = {key: self.config(inner, (*path, key)) for key, inner in value.items()}
            return members | self._counts.added(path, value)
        if isinstance(value, list):
            items = self._counts.elements(path, value)
            return [self.config(inner, (*path, number)) for number, inner in enumerate(items)]
        if type(value) is int and path:
            count = self._counts.of(path, value)
            if count is not None:
                return count
            if path[-1] in self._mtp:
                return 0
        return value

    def quantization(self, value: Any) -> Any:
        if isinstance(value, dict):
            return dict(self._members(value))
        if isinstance(value, list):
            return list(self._items(value))
        return value

    def _members(self, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, inner in value.items():
            try:
                yield self._renumbered(key), self.quantization(inner)
            except _Gone:
                continue

    def _items(self, value: list[Any]) -> Iterator[Any]:
        for inner in value:
            try:
                yield (
                    self._renumbered(inner) if isinstance(inner, str) else self.quantization(inner)
                )
            except _Gone:
                continue

    def _renumbered(self, text: str) -> str:
        named = _NAMED_EXPERT.search(text)
        if named is None:
            return text
        layer = int(named[2]) + (self._anatomy.num_layers if named[1] else 0)
        retained = self._keeps.retained.get(layer)
        if retained is None:
            return text
        old_id = int(named[4])
        if old_id not in retained:
            raise _Gone
        return text[: named.start(4)] + str(retained.index(old_id)) + text[named.end(4) :]


def _compare(where: str, path: str, expected: Any, found: Any, findings: Findings) -> None:
    """Note where two JSON values differ; the order of keys counts."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [key for key in expected if key not in found]:
            findings.add(where, f"{path}{key} is missing")
        for key in [key for key in found if key not in expected]:
            findings.add(where, f"{path}{key} was added")
        if expected.keys() == found.keys() and list(expected) != list(found):
            findings.add(where, f"the keys of {path or 'the top'} are in another order")
        for key in [key for key in expected if key in found]:
            _compare(where, f"{path}{key}.", expected[key], found[key], findings)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for position, (left, right) in enumerate(zip(expected, found, strict=True)):
            _compare(where, f"{path}{position}.", left, right, findings)
    elif not _same(expected, found):
        shown = f"{_brief(found)}, expected {_brief(expected)}"
        findings.add(where, f"{path.rstrip('.') or 'the document'} is {shown}")


def _same(left: Any, right: Any) -> bool:
    # NaN, which some configs hold, equals itself here.
    return type(left) is type(right) and (left == right or (left != left and right != right))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_side_files(source: Checkpoint, pruned: Checkpoint, findings: Findings) -> None:
    """Tokenizer, remote code and whatever else lay beside the weights is there, byte for byte."""
    there = {file.name: file.nbytes for file in pruned.files}
    weights = {shard.file for shard in source.shards} | set(source.unindexed)
    written = {CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, *_QUANTIZATION_FILES}
    for file in source.files:
        if file.name in weights | written or _NOT_COPIED.fullmatch(file.name):
            continue
        # The score file of a run goes to calibration/ only, also when it lay in the model.
        moved = f"calibration/{file.name.rpartition('/')[2]}"
        names = [name for name in (file.name, moved) if name in there]
        if not names:
            findings.add(file.name, "is missing")
        elif not any(_same_file(source, file.name, pruned, name, there) for name in names):
            findings.add(file.name, "is not the source's, byte for byte")


def _same_file(
    source: Checkpoint, name: str, pruned: Checkpoint, copy: str, there: dict[str, int]
) -> bool:
    nbytes = next(file.nbytes for file in source.files if file.name == name)
    if there[copy] != nbytes:
        return False
    for begin in range(0, nbytes, _BLOCK):
        end = min(begin + _BLOCK, nbytes)
        if source.source.read(name, begin, end) != pruned.source.read(copy, begin, end):
            return False
    return True
