"""compressed-tensors tells stderr what it does, which is no matter of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from loguru import logger

    logger.disable("compressed_tensors")
    yield
    logger.enable("compressed_tensors")
