"""Which file of a model is what, by its name: weights, quantization lists, records, the card.

config.json and the index are named in `storage.formats.index`, which storage needs as well, and
the record of earlier prunes in `provenance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Side files that repeat the quantization lists of config.json.
QUANTIZATION_FILES = (
    "hf_quant_config.json",  # ModelOpt
    "quantize_config.json",  # GPTQ
    "quant_config.json",  # AWQ
    "quantization_config.json",  # AutoRound
)
# Where a pruned model carries its record and the scores or keep-list that it was made with.
CALIBRATION_FOLDER = "calibration/"
SINGLE_SHARD = "model.safetensors"

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
_SET_ASIDE = re.compile(r"README\.source(?:-(\d+))?\.md")

_OTHER_WEIGHTS = (".bin", ".pth", ".gguf", ".bin.index.json")
# A model with weights in these only cannot be opened. Beside safetensors, those of them that
# _OTHER_WEIGHTS does not have are copied like any other file.
_OTHER_FORMATS = frozenset({".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack"})


def set_aside(name: str) -> str | None:
    """The name that a card of the source gets in a pruned model, which has a card of its own.

    README.md becomes README.source.md, that README.source-2.md, and so on; None for any other
    file.
    """
    if name == CARD_NAME:
        return SOURCE_CARD_NAME
    found = _SET_ASIDE.fullmatch(name)
    return f"README.source-{int(found[1] or 1) + 1}.md" if found else None


def is_other_weight_format(name: str) -> bool:
    """Whether a file holds the weights in another format, which pruning leaves behind."""
    folder, _, rest = name.partition("/")
    base = name.rpartition("/")[2]
    return (
        base.endswith(_OTHER_WEIGHTS)
        or base.startswith("consolidated")
        or (folder == "original" and bool(rest))
    )


def root_safetensors(names: Iterable[str]) -> list[str]:
    """The safetensors files at the top, sorted; `consolidated` ones are in Mistral's own format."""
    return sorted(
        name
        for name in names
        if "/" not in name and name.endswith(".safetensors") and not name.startswith("consolidated")
    )


def other_formats(names: Iterable[str]) -> list[str]:
    """The suffixes, sorted, of files that are known as weights in another format."""
    return sorted({"." + name.rpartition(".")[2] for name in names} & _OTHER_FORMATS)
