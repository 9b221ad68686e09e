"""Nothing, under torchvision's name: vLLM imports it to serve text and never calls it then.

There is no CPU build of torchvision, and vLLM's module for Qwen3.5 imports the image processors
of its vision tower even where that tower is not loaded. Every name exists here and may be
imported; calling one is an error.
"""

from __future__ import annotations

import sys
from typing import Any

__version__ = "0"


class _Absent(type):
    """The type of every name in this package."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        child = _Absent(name, (), {})
        setattr(cls, name, child)
        return child

    def __call__(cls, *arguments: object, **options: object) -> Any:
        raise RuntimeError(f"torchvision is not installed; {cls.__name__} was called")


io = _Absent("io", (), {})
transforms = _Absent("transforms", (), {})

for _name, _module in {
    "io": io,
    "transforms": transforms,
    "transforms.functional": transforms.functional,
    "transforms.v2": transforms.v2,
    "transforms.v2.functional": transforms.v2.functional,
}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
