"""The fixture `s3`, and the rule that tests with the marker `s3` run only where they are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.stores.server import LocalS3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect them unless `-m` names the marker."""
    if "s3" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("s3")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """The one server of a run."""
    from tests.support.stores.server import LocalS3

    server = LocalS3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """An empty S3 server that this process's clients find by their environment."""
    import s3fs  # type: ignore[import-untyped]

    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3_server.reset_counts()
    yield s3_server
    s3_server.clear()
    s3fs.S3FileSystem.clear_instance_cache()
