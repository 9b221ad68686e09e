"""Score files onto the disk, in every format; for `.pt` by torch, which nothing else here needs.

The last step of whatever makes scores: a calibration, a merge, a baseline, a conversion.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shardsurgeon.errors import OutputError, UsageError
from shardsurgeon.scores.scorefiles import (
    ScoreContent,
    as_tree,
    check_score_file_name,
    is_torch_file,
    score_file,
)
from shardsurgeon.storage.durable import write_file

# A sample is several steps of a pickle, and whoever reads one safely bounds its steps.
MOST_SAMPLES_IN_PT = 100_000


def check_out(out: str | os.PathLike[str]) -> None:
    """Check, before any work, that a score file can be written there.

    Raises OutputError where the name is taken, UsageError where its ending is none of a score
    file, or one that needs torch and there is no torch.
    """
    check_score_file_name(out)
    if is_torch_file(out) and find_spec("torch") is None:
        remedy = "install shardsurgeon[torch], or give a name that ends in .safetensors"
        raise UsageError(out, "writing this format needs torch, which is not installed", remedy)
    if os.path.lexists(out):
        raise OutputError(out, "exists", "choose another -o or remove it")


def check_samples(out: str | os.PathLike[str], samples: int) -> None:
    """Check that a score file of that name can list so many samples. Raises UsageError."""
    if is_torch_file(out) and samples > MOST_SAMPLES_IN_PT:
        problem = f"a .pt file lists at most {MOST_SAMPLES_IN_PT:,} samples, these are {samples:,}"
        raise UsageError(out, problem, "give a name that ends in .safetensors")


def write_scores(out: str | os.PathLike[str], content: ScoreContent) -> None:
    """Write a score file, whole or not at all; a file of that name is replaced.

    The ending says the format, as `check_out` allows it. Raises OutputWriteError, and
    UsageError for more samples than the format's reader takes.
    """
    listed = (content.calibration or {}).get("samples")
    check_samples(out, len(listed) if isinstance(listed, list) else 0)
    data = _torch_file(content) if is_torch_file(out) else score_file(out, content)
    write_file(Path(out), data)


def _torch_file(content: ScoreContent) -> bytes:
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        return value

    buffer = io.BytesIO()
    torch.save(tensors(as_tree(content)), buffer)
    return buffer.getvalue()
