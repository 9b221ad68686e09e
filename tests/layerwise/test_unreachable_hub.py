"""Datasets of the Hub where no Hub answers: refused within seconds, or taken from the cache."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from huggingface_hub import close_session, constants

from shardsurgeon.errors import DatasetError
from shardsurgeon.layerwise.datasets import open_dataset, parse_spec
from shardsurgeon.storage.hub import reachability


class Server:
    """A port of this machine that counts connections; what becomes of them, a test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.kept: list[socket.socket] = []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)

    def take(self) -> None:
        """Take every connection and never answer."""
        self.socket.listen()

        def accept() -> None:
            while True:
                try:
                    self.kept.append(self.socket.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    close_session()
    made = Server(monkeypatch)
    monkeypatch.setattr(reachability, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(reachability, "_AGAIN_SECONDS", 0.01)
    yield made
    made.socket.close()
    for each in made.kept:
        each.close()
    close_session()


def refusal(capfd: pytest.CaptureFixture[str]) -> str:
    (part,) = parse_spec("org/name")
    begin = time.monotonic()
    with pytest.raises(DatasetError) as raised:
        open_dataset(part)
    # By itself the library takes 23 s.
    assert time.monotonic() - begin < 15
    assert capfd.readouterr() == ("", "")
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)
    return str(raised.value)


def test_a_hub_that_refuses_connections_is_refused_in_one_line(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capfd)
    assert line.startswith(f"org/name: {constants.ENDPOINT} cannot be reached (")
    assert "refused" in line
    assert line.endswith("), and no copy of it is in the cache; check the connection")


def test_a_hub_that_never_answers_is_asked_once(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    server.take()
    assert "cannot be reached (" in refusal(capfd)
    assert len(server.kept) == 1


def test_a_copy_in_the_cache_is_taken_without_asking(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached(*names: Any, **options: Any) -> Any:
        asked.append((names, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", cached)
    (part,) = parse_spec("org/name")
    assert len(open_dataset(part).records) == 1
    assert asked == [(("org/name", None), True, True)]
