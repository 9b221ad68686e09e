"""What holds for every test: no network, and property tests that fail for their property only."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

# The local Hub, `hub` and `online`, and the S3 server, `s3`: for tests in every folder.
pytest_plugins = ["tests.support.hub.fixture", "tests.support.stores.fixture"]

# A slow machine is no counterexample.
settings.register_profile("shardsurgeon", deadline=None)
settings.load_profile("shardsurgeon")
