"""The pytest fixtures `hub` and `online`, known to all tests by tests/conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.hub.server import LocalHub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A local Hub without a repository."""
    from tests.support.hub.server import LocalHub

    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    hub.start()
    yield hub
    hub.stop(wait=False)  # waiting would cost a fifth of a second


@pytest.fixture
def online(
    hub: LocalHub, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> LocalHub:
    """The same Hub, and this process's huggingface_hub talks to it, logged in as `me`.

    The settings are those that the environment makes in a new process; the library's code is
    its own.
    """
    home = tmp_path_factory.mktemp("home")
    set_up(hub.environment(home), monkeypatch)
    return hub


def set_up(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring variables, and the constants that were read from them at import, into force."""
    from huggingface_hub import HfFileSystem, close_session, constants

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    endpoint, home = environment["HF_ENDPOINT"], Path(environment["HF_HOME"])
    values: dict[str, object] = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": environment["HF_HUB_OFFLINE"] == "1",
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": environment["HF_HUB_CACHE"],
        "HF_TOKEN_PATH": environment["HF_TOKEN_PATH"],
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for constant, setting in values.items():
        monkeypatch.setattr(constants, constant, setting)
    # A connection kept from an earlier test leads to a server that has ended.
    close_session()
    HfFileSystem.clear_instance_cache()
