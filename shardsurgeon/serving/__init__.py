"""Pruned models that no one wrote: views, and plans of a model, loaded by engines as they are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardsurgeon.serving.pretrained import load_pruned as load_pruned

__all__ = ["load_pruned"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: nothing that prunes needs it.
    if name != "load_pruned":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardsurgeon.serving.pretrained import load_pruned

    return load_pruned
