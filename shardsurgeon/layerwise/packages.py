"""The heavy packages of a calibration, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from shardsurgeon.errors import UsageError

INSTALL = "pip install 'shardsurgeon[calibrate]'"
_NEEDED = ("torch", "transformers")


def require(name: str) -> Any:
    """Import a package. Raises UsageError, saying what to install, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise UsageError(
            "calibrate", f"needs {missing}, which is not installed", INSTALL
        ) from error


def require_packages() -> None:
    """Raise UsageError where a package that every calibration needs is missing."""
    for name in _NEEDED:
        require(name)


def versions() -> dict[str, str]:
    """Package → version, of those that the numbers of a calibration depend on."""
    return {name: str(require(name).__version__) for name in _NEEDED}
