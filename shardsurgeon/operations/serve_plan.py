"""The command with which vLLM serves a model as a plan leaves it, while nothing is written."""

from __future__ import annotations

from shardsurgeon.operations.prune import Pruning
from shardsurgeon.operations.serving import serve_words
from shardsurgeon.pruning.request import MtpPolicy
from shardsurgeon.storage.open import hub_name


def serve_planned(pruning: Pruning, plan_file: str) -> tuple[str, ...] | None:
    """The command that serves the model itself as a saved plan leaves it, None where there is none.

    `Pruning.overrides` says why there is none of a model that a view can be made of.
    """
    source, serving = pruning.checkpoint.source, pruning.serving
    name = hub_name(source)
    is_read = name.count("/") == 1 if name else not source.is_remote
    if not is_read or not serving.by_vllm or pruning.overrides.problem:
        return None
    told = {"plan": plan_file}
    if pruning.request.mtp is not MtpPolicy.ROUTER_NORM:
        told["mtp"] = pruning.request.mtp.value
    return serve_words(
        name or source.location,
        source.revision if name else None,
        serving,
        planned=told,
        overrides=pruning.overrides.values,
    )
