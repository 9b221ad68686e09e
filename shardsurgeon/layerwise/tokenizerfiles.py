"""A model's tokenizer as a folder, which is how transformers reads one, wherever the model lies.

`run` opens the tokenizer from here; the weights are read through the source itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from shardsurgeon.checkpoint.checkpoint import CONFIG_NAME
from shardsurgeon.storage.base import Source
from shardsurgeon.storage.durable import writing
from shardsurgeon.storage.formats.index import INDEX_NAME

# Vocabularies, merges, templates and the code of some tokenizers; sizes from sentencepiece
# models down. Weights have other endings.
_ENDINGS = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")


@contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path]:
    """The model's own folder or, where it is far, copies of its small files for a while.

    Raises what reading the source raises, and OutputWriteError where there is no room for them.
    """
    config = source.local_path(CONFIG_NAME)
    if config is not None:
        yield config.parent
        return
    with TemporaryDirectory() as name:
        for file in source.list():
            if "/" not in file.name and file.name.endswith(_ENDINGS) and file.name != INDEX_NAME:
                copy = Path(name, file.name)
                with writing(copy):
                    copy.write_bytes(source.read(file.name, 0, file.nbytes))
        yield Path(name)
