"""What holds for every test: no network, and property tests that fail for their property only."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

# A slow machine is no counterexample.
settings.register_profile("shardsurgeon", deadline=None)
settings.load_profile("shardsurgeon")
