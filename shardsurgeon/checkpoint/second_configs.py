"""Configs beside a model's own: those that say the same of its experts, in its family's keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import read_numbers
from shardsurgeon.errors import ConfigError
from shardsurgeon.storage.formats.json_edit import Document
from shardsurgeon.storage.limits import OTHER_JSON

_NAMED = re.compile(r"(?:.*/)?[^/]*(?:config|params)[^/]*\.json", re.IGNORECASE)


def other_configs(checkpoint: Checkpoint, names: Iterable[str]) -> Iterable[tuple[str, Document]]:
    """(name, content) of the files called `names` that are configs by their names, and objects.

    Raises SourceReadError.
    """
    sizes = {file.name: file.nbytes for file in checkpoint.files}
    for name in names:
        if not _NAMED.fullmatch(name) or sizes[name] > OTHER_JSON.nbytes:
            continue
        try:
            document = Document.parse(checkpoint.read_file(name, OTHER_JSON), name)
        except ConfigError:
            continue  # a file for which nothing here answers
        if isinstance(document.value, Mapping):
            yield name, document


def second_configs(
    checkpoint: Checkpoint, anatomy: Anatomy, names: Iterable[str]
) -> dict[str, Document]:
    """Name → content of those that say what config.json says: the same type, layers and counts.

    What is changed in config.json is changed in them. A config in a folder with weights of its own
    is about those. Raises SourceReadError.
    """
    weights = (f.name for f in checkpoint.files if f.name.endswith(".safetensors"))
    taken = {name.rpartition("/")[0] for name in weights} - {""}
    own = read_numbers(anatomy.family, checkpoint.settings, checkpoint.config_place)
    kind = checkpoint.settings.get("model_type")
    found = {}
    for name, document in other_configs(checkpoint, names):
        settings = document.value
        assert isinstance(settings, Mapping)
        try:
            said = read_numbers(anatomy.family, settings, name)
        except ConfigError:
            continue
        if name.rpartition("/")[0] in taken:
            continue
        if said == own and settings.get("model_type", kind) == kind:
            found[name] = document
    return found
