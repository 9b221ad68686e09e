"""What the model's config allows: how long a sample may be, which tokens there are.

Asked by `run`. Read where the family keeps its numbers, in the spellings that configs use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint, config_section
from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.samples import Sample
from shardsurgeon.layerwise.settings import DTYPES

DEFAULT_MAX_LENGTH = 2048

_POSITIONS = ("max_position_embeddings", "model_max_length", "max_sequence_length", "seq_length")
_DTYPE = ("dtype", "torch_dtype")
_FALLBACK_DTYPE = "bfloat16"


def sample_length(checkpoint: Checkpoint, anatomy: Anatomy, asked: int | None) -> int:
    """Tokens that a sample is cut to. Raises UsageError where the model allows fewer."""
    allowed = next(_numbers(checkpoint, anatomy, _POSITIONS), None)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, allowed or DEFAULT_MAX_LENGTH)
    if allowed is not None and asked > allowed:
        problem = f"samples of {asked:,} tokens are longer than the {allowed:,} that "
        problem += f"{checkpoint.source.name} allows"
        raise UsageError("--max-length", problem, f"give {allowed} or less")
    return asked


def check_vocabulary(checkpoint: Checkpoint, anatomy: Anatomy, samples: Sequence[Sample]) -> None:
    """Raise UsageError where a sample has a token that the model does not know."""
    size = next(_numbers(checkpoint, anatomy, ("vocab_size",)), None)
    for sample in samples:
        highest = int(sample.ids.max())
        if size is not None and highest >= size:
            problem = f"gives token {highest:,} in {sample.source}, record {sample.index:,}, and "
            problem += f"the model has {size:,}"
            raise UsageError("--tokenizer", problem, "give the tokenizer of this model")


def own_dtype(checkpoint: Checkpoint, anatomy: Anatomy) -> str:
    """The dtype that the config says the model is of; bfloat16 where it says none of ours."""
    said = (value for value in _values(checkpoint, anatomy, _DTYPE) if value in DTYPES)
    return str(next(said, _FALLBACK_DTYPE))


def _numbers(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[int]:
    for value in _values(checkpoint, anatomy, keys):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _values(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[object]:
    """Values of the keys, in the sections of the language model first, then at the top."""
    for at in (*anatomy.family.config.at, ""):
        section = config_section(checkpoint.settings, at) or {}
        yield from (section[key] for key in keys if key in section)
