"""Whether vLLM is known to serve a pruned model, and the command that does: for cards and reports.

Imported by every `apply`, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shardsurgeon.checkpoint.anatomy import Anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.config import MLX_QUANTIZATION_KEY
from shardsurgeon.checkpoint.layouts import is_named_by_mlx
from shardsurgeon.errors import UsageError
from shardsurgeon.families.schema import all_families
from shardsurgeon.pruning.layer_counts import engines_on_unequal, says_per_layer
from shardsurgeon.storage.formats.index import HUGGING_FACE


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served.

    stock_engines: whether stock vLLM reads its expert counts; is_mlx: whether it is in MLX's
    layout; is_proven: whether more than the bytes is proven for its family; remote_code: whether
    the code of the model comes with it.
    """

    stock_engines: bool
    is_mlx: bool
    is_proven: bool
    remote_code: bool

    @property
    def by_vllm(self) -> bool:
        """Whether a command that serves it may be shown."""
        return self.stock_engines and self.is_proven and not self.is_mlx


def serving_of(model: Checkpoint, anatomy: Anatomy, kept: Mapping[int, int]) -> Serving:
    """How a model is served that keeps so many experts in each layer (layer → count).

    model: the pruned one, or the one that it is made of, which say the same.
    """
    config = model.settings
    return Serving(
        stock_engines=anatomy.is_uniform(kept) or says_per_layer(config, anatomy) != "",
        is_mlx=_is_mlx(model),
        # Of a declaration that did not come with the program, nothing is.
        is_proven=anatomy.family in all_families() and not anatomy.family.only_bytes,
        remote_code=model.names == HUGGING_FACE
        and isinstance(config.get("auto_map"), Mapping)
        and bool(config["auto_map"]),
    )


def not_for_stock_engines(
    model: Checkpoint, anatomy: Anatomy, counts: Collection[int], remedy: str
) -> UsageError:
    """The error for shards of a model whose layers keep different numbers of experts.

    model, anatomy: the pruned one, or the one that it is made of; counts: of the layers.
    """
    engines = engines_on_unequal(model.settings, anatomy)
    problem = f"is needed: layers keep {min(counts)} to {max(counts)} experts, and {engines}"
    return UsageError("--allow-nonuniform", problem, remedy)


def serve_words(
    place: str,
    revision: str | None,
    serving: Serving,
    *,
    view: bool = False,
    planned: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> tuple[str, ...]:
    """The command that serves a model, as words.

    place: a folder or a repository; revision: its branch, None for main; view: whether the folder
    is one. planned: of a model that is to be served as a plan leaves it, what our loader is told;
    overrides: what is then different in its config.
    """
    words = ["vllm", "serve", place]
    words += ["--revision", revision] if revision else []
    words += ["--trust-remote-code"] if serving.remote_code else []
    words += ["--load-format", "shardsurgeon"] if view or planned else []
    words += ["--model-loader-extra-config", json.dumps(planned)] if planned else []
    words += ["--hf-overrides", json.dumps(overrides)] if overrides else []
    return tuple(words)


def _is_mlx(model: Checkpoint) -> bool:
    if MLX_QUANTIZATION_KEY in model.settings:
        return True
    headers = (shard.header for shard in model.shards)
    return any(
        (header.metadata or {}).get("format") == "mlx"
        or any(is_named_by_mlx(record.name) for record in header.tensors)
        for header in headers
    )
