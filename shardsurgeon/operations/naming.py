"""What the result is called, and where it may not go."""

from __future__ import annotations

from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import OutputError
from shardsurgeon.pruning.counts import SelectionRequest
from shardsurgeon.pruning.keeplists import KeepList


def default_out(checkpoint: Checkpoint, request: SelectionRequest, keep: KeepList) -> Path:
    """`<model name>-REAP-65pct`, or `-REAP-134e` where no ratio was given.

    Where layers keep different numbers it is their mean, and `-nonuniform` follows. In the current
    folder; where that is the model itself, beside the model, because nothing is ever written into
    a source. Raises OutputError where that would be inside a Hub cache.
    """
    counts = [len(layer.retained) for layer in keep.layers.values()]
    what = (
        f"{round(sum(counts) / len(counts))}e"
        if request.ratio is None
        else f"{_percent(request.ratio)}pct"
    )
    what += "" if keep.is_uniform else "-nonuniform"
    name = f"{checkpoint.source.name}-REAP-{what}"
    folder = Path.cwd()
    home = _home(checkpoint)
    if home is not None and folder.is_relative_to(home):
        folder = home.parent
        if checkpoint.source.revision is not None:
            raise OutputError(
                folder / name, "would be inside the Hub's cache", "say where to write with -o"
            )
    return folder / name


def require_apart(checkpoint: Checkpoint, out: Path) -> None:
    """Raise OutputError where the output would lie inside the source, or the other way."""
    home = _home(checkpoint)
    if home is None:
        return
    target = out.absolute().parent.resolve() / out.name
    if target == home:
        raise OutputError(out, "is the source itself", "choose another -o")
    if target.is_relative_to(home):
        raise OutputError(out, f"is inside the source {home}", "choose another -o")
    if home.is_relative_to(target):
        raise OutputError(out, f"contains the source {home}", "choose another -o")


def _home(checkpoint: Checkpoint) -> Path | None:
    """The source's folder on this machine, if it has one."""
    path = checkpoint.source.local_path("config.json")
    # Not resolved as a file: in a Hub cache config.json is a link to somewhere else.
    return None if path is None else path.absolute().parent.resolve()


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.6g}"
