"""One count of bytes for all uploads, by whichever of the Hub's two ways they go."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, _commit_api, utils
from huggingface_hub.utils import _xet, logging

from shardsurgeon.storage.hub.repository import Repository, to_upload_ahead
from shardsurgeon.storage.hub.sent_bytes import SentBytes, xet_counted
from shardsurgeon.storage.hub.upload import publish, silence_hub
from shardsurgeon.storage.phases import Phase, listening
from tests.support.hub.server import LocalHub

NBYTES = 3_000_000


class Steps(Phase):
    """A phase that remembers how it was counted."""

    def __init__(self) -> None:
        super().__init__("uploading", NBYTES, "B")
        self.steps: list[int] = []

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        self.steps.append(count)

    __slots__ = ("steps",)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(os.urandom(NBYTES))
    return path


@pytest.fixture
def mine(online: LocalHub) -> LocalHub:
    HfApi().create_repo("me/out")
    online.reset_counts()
    return online


def test_an_upload_counts_while_it_goes(mine: LocalHub, file: Path) -> None:
    at = Steps()
    Repository("me/out").upload("model-1.safetensors", file, at)
    assert at.done == NBYTES and len(at.steps) > 10


def test_what_is_sent_a_second_time_is_counted_once(mine: LocalHub, file: Path) -> None:
    mine.fault(r"PUT /upload/", status=500)
    at = Steps()
    Repository("me/out").upload("model-1.safetensors", file, at)
    assert sum("/upload/" in request.path for request in mine.requests) == 2
    assert at.done == NBYTES


def test_what_the_hub_has_already_counts_as_done(mine: LocalHub, file: Path) -> None:
    repository = Repository("me/out")
    repository.upload("model-1.safetensors", file)
    at = Steps()
    repository.upload("model-1.safetensors", file, at)
    assert at.steps == [NBYTES]


class Phases:
    """The phases of a push, as a listener is told them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def begin(self, phase: Phase) -> None:
        """Nothing is counted yet."""

    def end(self, phase: Phase) -> None:
        """What it came to."""
        self.seen.append((phase.name, phase.done, phase.total))


def test_a_push_has_one_count_for_all_shards(mine: LocalHub, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model-2.safetensors"
    other.write_bytes(b"x" * 1000)
    files = {path.name: path for path in (file, other)} | {"config.json": b"{}"}
    phases = Phases()
    with silence_hub(), listening(phases):
        publish(Repository("me/out"), files, {})
    total = NBYTES + 1000
    assert phases.seen == [("uploading", total, total), ("committing", 0, 0)]


def test_xet_counts_for_the_same_phase(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names in huggingface_hub are private: this says whether they still mean the same."""
    told: list[Any] = []

    class Session:
        @contextmanager
        def new_upload_commit(self, *, progress_callback: Any, **options: Any) -> Any:
            told.append(progress_callback)
            yield SimpleNamespace(start_upload_file=self.start)

        def start(self, path: str, *, sha256: object) -> object:
            for done in (NBYTES // 3, NBYTES // 2, NBYTES // 4):
                told[0](SimpleNamespace(total_bytes_completed=done), {})
            return SimpleNamespace(result=lambda: None)

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(_xet, "get_xet_session", Session)
    at, addition = Steps(), to_upload_ahead("model-1.safetensors", file)
    assert addition.upload_info.sha256
    before = utils.are_progress_bars_disabled
    with xet_counted(), SentBytes(at):
        _commit_api._upload_xet_files(
            additions=[addition], repo_type="model", repo_id="me/out", headers={}
        )
    assert at.steps == [NBYTES // 3, NBYTES // 2 - NBYTES // 3]
    assert utils.are_progress_bars_disabled is before


@pytest.mark.parametrize(("failure", "silent"), [(KeyboardInterrupt, True), (ValueError, False)])
def test_uploads_that_outlive_a_signal_stay_silent(
    failure: type[BaseException], silent: bool
) -> None:
    before = logging.get_verbosity()
    try:
        with pytest.raises(failure), silence_hub():
            raise failure
        assert logging.get_verbosity() == (logging.CRITICAL if silent else before)
    finally:
        logging.set_verbosity(before)
