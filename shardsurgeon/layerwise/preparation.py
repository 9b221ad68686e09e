"""What a calibration needs before it computes: defaults of the model, samples, an earlier file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import config_section
from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import (
    COUNTED,
    Calibration,
    read_calibration,
    require_alike,
)
from shardsurgeon.layerwise.datasets import DEFAULT_SAMPLES, parse_spec
from shardsurgeon.layerwise.dtype_choice import possible_dtypes
from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.samples import (
    Drawn,
    Sample,
    SamplingOptions,
    draw_samples,
    open_datasets,
)
from shardsurgeon.layerwise.settings import DTYPES, load_packages
from shardsurgeon.layerwise.tokenizer import Tokenizer, tokenizer_folder
from shardsurgeon.storage.phases import phase

DEFAULT_MAX_LENGTH = 2048

_POSITIONS = ("max_position_embeddings", "model_max_length", "max_sequence_length", "seq_length")
_DTYPE = ("dtype", "torch_dtype")
_FALLBACK_DTYPE = "bfloat16"
_ANEW = "calibrate anew, then `scores merge --mixed` adds them up"


def with_defaults(
    request: CalibrationRequest, checkpoint: Checkpoint, anatomy: Anatomy
) -> CalibrationRequest:
    """The request with a length of samples."""
    return replace(request, max_length=_sample_length(checkpoint, anatomy, request.max_length))


def with_dtype(request: CalibrationRequest, dtype: str) -> CalibrationRequest:
    """The request with a dtype."""
    return replace(request, settings=replace(request.settings, dtype=dtype))


def dtypes_of(
    request: CalibrationRequest,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    earlier: Calibration | None,
) -> tuple[str, ...]:
    """The dtypes that the request may be computed in; one that extends a file takes that file's.

    Raises ScoreError where they would be mixed with others.
    """
    asked = request.settings.dtype
    before = () if earlier is None else earlier.dtypes
    if asked is None and len(before) == 1 and before[0] in DTYPES:
        asked = before[0]
    possible = possible_dtypes(asked, _own_dtype(checkpoint, anatomy), request.settings.device)
    if earlier is not None and before and before != possible:
        problem = f"was made with --dtype {', '.join(before)}, this calibration with "
        problem += " or ".join(possible)
        remedy = _ANEW if len(before) > 1 else f"leave --dtype out, or {_ANEW}"
        raise ScoreError(earlier.origin, problem, remedy)
    return possible


def _sample_length(checkpoint: Checkpoint, anatomy: Anatomy, asked: int | None) -> int:
    """Tokens that a sample is cut to. Raises UsageError where the model allows fewer."""
    allowed = next(_numbers(checkpoint, anatomy, _POSITIONS), None)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, allowed or DEFAULT_MAX_LENGTH)
    if allowed is not None and asked > allowed:
        problem = f"samples of {asked:,} tokens are longer than the {allowed:,} that "
        problem += f"{checkpoint.source.name} allows"
        raise UsageError("--max-length", problem, f"give {allowed} or less")
    return asked


def _own_dtype(checkpoint: Checkpoint, anatomy: Anatomy) -> str:
    """The dtype that the config names, or bfloat16 where it is none of DTYPES."""
    named = (value for value in _values(checkpoint, anatomy, _DTYPE) if value in DTYPES)
    return str(next(named, _FALLBACK_DTYPE))


def earlier_calibration(request: CalibrationRequest, checkpoint: Checkpoint) -> Calibration | None:
    """The calibration to extend, if any. Raises ScoreError where it is of another model."""
    if request.extend is None:
        return None
    earlier = read_calibration(request.extend)
    made = earlier.settings.get("config_sha256")
    if made != checkpoint.config_sha256:
        problem = f"was made for {earlier.settings.get('model')}, config {str(made)[:12]}; "
        problem += f"{checkpoint.location} has config {checkpoint.config_sha256[:12]}"
        raise ScoreError(request.extend, problem, "extend with the model that it was made for")
    # What the merge at the end would refuse, after hours.
    here = {"model": checkpoint.source.name, "revision": checkpoint.source.revision}
    for key, now in here.items():
        before = earlier.settings.get(key)
        if before != now and (key == "model" or None not in (before, now)):
            problem = f"was made with {key} {before}, this one is {now}"
            add_up = "`scores merge --same-model`" if key == "model" else "`scores merge`"
            raise ScoreError(request.extend, problem, f"calibrate anew, then {add_up} adds them up")
    try:
        require_alike(earlier, {COUNTED: request.tokens})
    except ScoreError as error:
        raise ScoreError(error.where, error.problem, _ANEW) from error
    return earlier


def drawn_samples(
    request: CalibrationRequest,
    checkpoint: Checkpoint,
    earlier: Calibration | None,
    *,
    answers: bool = False,
) -> Drawn:
    """The samples of this run; of a share, those of the share alone. answers: whether answers
    that records bring are forced."""
    assert request.max_length is not None
    parts = parse_spec(request.dataset, request.samples)
    taken = frozenset(sample[:2] for sample in earlier.samples) if earlier else frozenset()
    options = SamplingOptions(
        request.settings.seed,
        request.max_length,
        request.field,
        taken,
        request.skip_invalid,
        request.tokens,
        request.pack,
        answers,
    )
    with phase("opening the dataset"):
        datasets = open_datasets(parts, options)
    # From here on it takes long, whatever else may be wrong with the request.
    load_packages()
    from shardsurgeon.layerwise.devices import require_device

    require_device(request.settings.device)
    drawn = draw_samples(datasets, _tokenizer(request, checkpoint), options)
    if request.share is None:
        return drawn
    k, n = request.share
    return replace(drawn, samples=drawn.samples[k - 1 :: n])


def check_share(request: CalibrationRequest) -> None:
    """Raise UsageError where some shares of the samples would be empty."""
    if request.share is None:
        return
    k, n = request.share
    samples = len(longest_samples(replace(request, share=None, max_length=1)))
    if samples < n:
        problem = f"{k}/{n} of {samples:,} samples leaves some shares empty"
        raise UsageError("--share", problem, "make fewer shares")


def longest_samples(request: CalibrationRequest) -> list[int]:
    """Tokens of each sample, where each is as long as it may be."""
    assert request.max_length is not None
    count = request.samples or DEFAULT_SAMPLES
    if request.dataset:
        count = sum(part.count or 0 for part in parse_spec(request.dataset, request.samples))
    k, n = request.share or (1, 1)
    return [request.max_length] * len(range(k - 1, count, n))


def _tokenizer(request: CalibrationRequest, checkpoint: Checkpoint) -> Tokenizer:
    trust = request.trust_remote_code
    if request.tokenizer:
        return Tokenizer(request.tokenizer, trust_remote_code=trust)
    with tokenizer_folder(checkpoint.source) as folder:
        return Tokenizer(folder, name=checkpoint.location, trust_remote_code=trust)


def check_vocabulary(checkpoint: Checkpoint, anatomy: Anatomy, samples: Sequence[Sample]) -> None:
    """Raise UsageError where a sample has a token outside the model's vocabulary."""
    size = next(_numbers(checkpoint, anatomy, ("vocab_size",)), None)
    for sample in samples:
        highest = int(sample.ids.max())
        if size is not None and highest >= size:
            problem = f"gives token {highest:,} in {sample.source}, record {sample.index:,}, and "
            problem += f"the model has {size:,}"
            raise UsageError("--tokenizer", problem, "give the tokenizer of this model")


def _numbers(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[int]:
    for value in _values(checkpoint, anatomy, keys):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _values(checkpoint: Checkpoint, anatomy: Anatomy, keys: Sequence[str]) -> Iterator[object]:
    """Values of the keys in the config: in the language model's sections first, then at the top."""
    for at in (*anatomy.family.config.at, ""):
        section = config_section(checkpoint.settings, at) or {}
        yield from (section[key] for key in keys if key in section)
