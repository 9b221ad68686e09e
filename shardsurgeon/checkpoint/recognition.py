"""Files beside the weights that are no part of the model, told by name and by content.

Most are told by their names (`files.why_left_behind`). Plans, score files and evaluations have any
name: they are recognised by how they begin, so that a remote source sends little. A file that the
model's configs name belongs, unless it is hidden or a secret.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from shardsurgeon.checkpoint.files import (
    CALIBRATION_FOLDER,
    NEVER,
    why_left_behind,
)
from shardsurgeon.storage.formats.strict_json import parse_for_a_hint
from shardsurgeon.storage.limits import TOKENIZER_CONFIG
from shardsurgeon.storage.source import Source, SourceFile
from shardsurgeon.storage.threads import map_in_threads

PLAN, SCORES, EVALUATION = "plan", "scores", "evaluation"
PAGE_MARK = b"<!-- shardsurgeon report -->"
"""What a page of `report` begins with, behind its doctype."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
# Plans and scores show what they are within so many bytes.
HEAD_NBYTES = 4096
_HEADS_AT_ONCE = 8

# Files that every model has, and shards, are not looked into.
_WELL_KNOWN = re.compile(
    r"(?:.*/)?(?:[^/]*(?:config(?:uration)?|processor)|tokenizer|vocab|special_tokens_map"
    r"|added_tokens|chat_template|tekken|modules|model_index)\.json"
    r"|(?:.*/)?(?:[^/]*-\d+-of-\d+|(?:[^/]*[-_])?model)\.safetensors|.*\.index\.json"
)
_MAY_BE_EITHER = (".json", ".jsonl", ".pt", ".npz", ".safetensors", ".html")

_OUR_PLAN = re.compile(rb'"kind"\s*:\s*"shardsurgeon-plan"|"num_experts_before"\s*:')
_OUR_EVALUATION = re.compile(rb'\{\s*"kind"\s*:\s*"evaluation"\s*,\s*"format"\s*:\s*\d')
_OUR_SCORES = re.compile(rb'"format"\s*:\s*\\?"shardsurgeon scores')
# What JSON of plans and scores is made of. A layer's name, and before a colon:
_LAYER_NAME = (
    rb'(?:(?:[^"\0]*\.)?layers?[._ ]?|L|mtp\.)?\d+'
    rb"(?:\.(?:mlp|moe|block_sparse_moe|feed_forward|ffn|mixer))?(?:\.experts)?"
)
_LAYER = rb'"' + _LAYER_NAME + rb'"\s*:\s*'
# Lists that begin with a whole number or with any number, and members that hold a single value.
_IDS = rb"\[\s*\d+\s*[,\]]"
_NUMBERS = rb"\[\s*-?(?:[\d.]+(?:e[-+]?\d+)?|nan|infinity)\s*[,\]]"
# (each is taken whole, so that hostile bytes take no more than a moment).
_SINGLE = rb'(?>"\w++"\s*+:\s*+(?:[^"{}\[\],\s]++|"[^"]*+")\s*+,\s*+)*'
_KEEPING = rb'"\w*(?:kept|keep|drop|retain|prun)\w*"\s*:\s*'
_METRIC = rb'"\w*(?:reap|ean|freq|score|sal|cnt|norm|activation|importance|rank)\w*"\s*:\s*'
_SCORING = rb'"(?:\w*rank\w*|scores|saliency|saliency_scores)"\s*:\s*'


def _below(word: bytes) -> re.Pattern[bytes]:
    """Layers, rows or records below a word, or the word below a layer or in its record."""
    return re.compile(
        word + rb"(?:\{\s*(?:" + _LAYER + rb'[\[{]|"per_layer")|\[\s*(?:\[|\{\s*"layer"))'
        rb"|" + _LAYER + rb"\{\s*" + _SINGLE + word + rb"\["
        rb'|"layer"\s*:\s*\d+\s*,\s*' + _SINGLE + word + rb"[\[\d]",
        re.IGNORECASE,
    )


_NAMED_KEEP_LIST, _NAMED_TABLE = _below(_KEEPING), _below(_SCORING)
_OF_LAYERS = rb"\{\s*" + _SINGLE + rb'(?:"(?:layers|arm\w*|\w*experts?)"\s*:\s*\{\s*)?' + _LAYER
_KEEP_LIST = re.compile(_OF_LAYERS + _IDS, re.IGNORECASE)
_TABLE = re.compile(
    _OF_LAYERS + rb"(?:" + _NUMBERS + rb"|\{\s*" + _SINGLE + _METRIC + _NUMBERS + rb")"
    rb"|\[\s*" + _NUMBERS,
    re.IGNORECASE,
)
_RECORDS = re.compile(
    rb'"layer"\s*:\s*\d+\s*,\s*' + _SINGLE + rb'"(?:expert"\s*:\s*\d|reap"\s*:\s*\[)', re.IGNORECASE
)
_METRICS = (
    rb"expert_frequency|ean_sum|ean_mean|max_activations|msan|saliency|router_l\d|weight_l\d"
    rb"|one_minus_aimer|reap"
)
# In torch.save's pickle: a dict whose first key is a layer, or the name of a metric.
_PICKLED = re.compile(
    rb"\x80.\}q.\(?(?:K|X.\0\0\0" + _LAYER_NAME + rb"q)"
    rb"|X.\0\0\0(?:" + _METRICS + rb"|scores)",
    re.DOTALL,
)
# A table of rows and nothing else may be anything: then the file's name must say what it is.
_ROWS_ONLY = re.compile(rb"(?:\s*\[\s*\[)|.*?data\.pkl.*?\x80.ctorch\._utils\n", re.DOTALL)
_NAMED_SCORES = re.compile(r"score|salien|reap|importance|keep|drop_?map", re.IGNORECASE)
_ARRAY = re.compile(rb"(?:accumulators\.)?layers\.\d+\.|\d+\.npy|(?:scores|" + _METRICS + rb")")
_TENSOR = re.compile(rb'"(?:accumulators\.)?layers\.\d+\.(?:' + _METRICS + rb"|weighted_)")


def sort_out(
    source: Source, files: Sequence[SourceFile], config: Mapping[str, object]
) -> dict[str, str]:
    """Of the files beside the weights, those that are no part of the model → why.

    Of a remote source the beginnings of JSON files of no usual name, and of files that can hold
    scores, are read; the tokenizer's config only where it could make a difference.
    """
    found = {file.name: why for file in files if (why := why_left_behind(file.name))}
    doubtful = [
        file
        for file in files
        if file.name.lower().endswith(_MAY_BE_EITHER)
        and file.name not in found
        and not (file.name.startswith(CALIBRATION_FOLDER) or _WELL_KNOWN.fullmatch(file.name))
    ]
    for file, kind in zip(doubtful, _kinds(source, doubtful), strict=True):
        if kind is not None:
            found[file.name] = kind
    if any(why not in NEVER for why in found.values()):
        named = named_by_configs(source, files, config)
        found = {name: why for name, why in found.items() if why in NEVER or name not in named}
    return found


def named_by_configs(
    source: Source, files: Collection[SourceFile], config: Mapping[str, object]
) -> set[str]:
    """Every text in the model's config and the tokenizer's: the files that they name among them."""
    return {*_texts(config), *_texts(_tokenizer_config(source, files))}


def recognised(name: str, head: bytes) -> str | None:
    """`plan`, `scores` or `evaluation` for a file that begins so, whatever it is called, `report`
    for a page; else None."""
    if _ROWS_ONLY.match(head):
        return SCORES if _NAMED_SCORES.search(name.rpartition("/")[2]) else None
    suffix = name.lower().rpartition(".")[2]
    if suffix == "html":
        return "report" if PAGE_MARK in head else None
    if suffix == "pt":
        is_scores = b"data.pkl" in head and _PICKLED.search(head)
    elif suffix == "npz":
        is_scores = head.startswith(b"PK") and _ARRAY.match(head, 30)
    elif suffix == "safetensors":
        is_scores = _OUR_SCORES.search(head) or _TENSOR.search(head)
    else:
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if _OUR_EVALUATION.match(text):
            return EVALUATION
        if _OUR_PLAN.search(text) or _KEEP_LIST.match(text) or _NAMED_KEEP_LIST.search(text):
            return PLAN
        ours = _OUR_SCORES.search(text) or _RECORDS.search(text)
        is_scores = ours or _TABLE.match(text) or _NAMED_TABLE.search(text)
    return SCORES if is_scores else None


def kind_of(path: Path) -> str | None:
    """`plan`, `scores`, `evaluation` or `report` for a file on this machine, whatever it is called;
    None for any other file, a pipe, and what cannot be read."""
    name = path.name
    if not name.lower().endswith(_MAY_BE_EITHER) or is_well_known(name) or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return recognised(name, file.read(HEAD_NBYTES))
    except OSError:
        return None


def is_well_known(name: str) -> bool:
    """Whether a file is called as those that models have: a config, a tokenizer, a shard, …"""
    return _WELL_KNOWN.fullmatch(name) is not None


def _kinds(source: Source, files: Sequence[SourceFile]) -> list[str | None]:
    def kind(file: SourceFile) -> str | None:
        return recognised(file.name, source.read(file.name, 0, min(file.nbytes, HEAD_NBYTES)))

    if not source.is_remote:
        return [kind(file) for file in files]
    return list(map_in_threads(kind, files, _HEADS_AT_ONCE, "heads"))


def _tokenizer_config(source: Source, files: Collection[SourceFile]) -> object:
    for file in files:
        if file.name == _TOKENIZER_CONFIG and file.nbytes <= TOKENIZER_CONFIG.nbytes:
            return parse_for_a_hint(source.read(file.name, 0, file.nbytes), TOKENIZER_CONFIG)
    return None


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, str):
            yield item.removeprefix("./")
        elif isinstance(item, Mapping):
            open_values += item.values()
        elif isinstance(item, list):
            open_values += item
