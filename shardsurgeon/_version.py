"""The version: read by the build, by `--version`, and written into records and cards."""

from __future__ import annotations

__version__ = "0.1.0"
