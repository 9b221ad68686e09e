"""The Hub as a source: what is asked of it, what travels, and what it is pinned to."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants, hf_hub_download

from shardsurgeon.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shardsurgeon.errors import OutputError, SourceChangedError, SourceReadError
from shardsurgeon.operations.api import apply, plan, verify
from shardsurgeon.storage.hub.source import HubSource
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
WEIGHTS = (FOLDER / SHARD).read_bytes()


@pytest.fixture
def tiny(online: LocalHub) -> LocalHub:
    online.add_model("org/tiny", FOLDER)
    return online


def asked(hub: LocalHub, word: str) -> int:
    return sum(word in request.path for request in hub.requests)


def test_opening_a_model_transfers_its_headers_and_json_and_nothing_else(tiny: LocalHub) -> None:
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.num_tensors == 223
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in FOLDER.glob("*.safetensors")
    )
    json = sum((FOLDER / n).stat().st_size for n in ("config.json", "model.safetensors.index.json"))
    assert tiny.sent(r"GET /cdn/") == headers
    assert tiny.sent(r"GET /api/resolve-cache/") == json
    assert tiny.sent() - headers - json < 5_000  # the listing


def test_a_model_is_listed_as_its_commit_has_it(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    there = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*")}
    there = {name: path for name, path in there.items() if path.is_file()}
    listed = {file.name: file.nbytes for file in source.list()}
    assert listed == {name: path.stat().st_size for name, path in sorted(there.items())}
    assert list(listed) == sorted(listed)
    stamps = {file.name: file.stamp for file in source.list()}
    info = HfApi().model_info("org/tiny", files_metadata=True)
    by_name = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    assert stamps[SHARD] == by_name[SHARD].lfs.sha256
    assert stamps["config.json"] == by_name["config.json"].blob_id
    assert (source.name, source.revision, source.is_remote) == ("tiny", info.sha, True)
    assert source.location == f"hf://org/tiny@{info.sha[:12]}"


def test_ranges_are_read_exactly(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    tiny.reset_counts()
    assert source.read(SHARD, 1000, 2000) == WEIGHTS[1000:2000]
    assert b"".join(source.stream(SHARD, 7, len(WEIGHTS))) == WEIGHTS[7:]
    assert source.read(SHARD, 5, 5) == b""
    assert source.read("config.json", 0, 10) == (FOLDER / "config.json").read_bytes()[:10]
    assert tiny.sent() == 1000 + len(WEIGHTS) - 7 + 10


def test_a_result_on_the_hub_is_verified_by_one_request_for_many_tensors(
    online: LocalHub, tmp_path: Path
) -> None:
    """Two for each shard's header, one for everything in it: there are far more tensors."""
    written = plan(FOLDER, FOLDER / "scores.pt", ratio=0.5, out=tmp_path / "out")
    shards = apply(written).plan.shards_after
    online.add_model("org/pruned", tmp_path / "out")
    online.reset_counts()
    report = verify(FOLDER, "org/pruned")
    assert report.holds, report.differences
    assert report.tensors_compared > 100
    large_side_files = 3
    assert asked(online, "/cdn/") <= 3 * shards + large_side_files


def test_a_result_whose_architecture_is_verified_is_opened_once(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []
    monkeypatch.setattr(
        "shardsurgeon.operations.verify.check_architecture",
        lambda before, after: taken.append(after),
    )
    online.add_model("org/same", FOLDER)
    online.reset_counts()
    verify(FOLDER, "org/same", sample=1, architecture=True)
    assert [type(after) for after in taken] == [Checkpoint]
    assert asked(online, "/resolve-cache/") > 0
    headers = 2 * len(list(FOLDER.glob("*.safetensors")))
    assert asked(online, "/cdn/") == headers  # it has no record, so no bytes are compared


def test_what_is_not_there_is_said_before_anything_is_asked(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    tiny.reset_counts()
    with pytest.raises(SourceReadError, match=r"missing\.json: there is no such file"):
        source.read("missing.json", 0, 1)
    with pytest.raises(SourceReadError, match=f"ends at byte {len(WEIGHTS):,}, byte"):
        source.read(SHARD, 0, len(WEIGHTS) + 1)
    assert not tiny.requests


def test_the_hub_is_asked_once_per_file_and_storage_never_sees_the_token(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    for begin in range(0, 5000, 1000):
        source.read(SHARD, begin, begin + 1000)
    assert asked(tiny, "/resolve/") == 1
    storage = [request for request in tiny.requests if request.path.startswith("/cdn/")]
    assert len(storage) == 5
    assert not any(request.with_token for request in storage)
    assert all(r.with_token for r in tiny.requests if not r.path.startswith("/cdn/"))


def test_an_expired_link_is_asked_for_again(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    source.read(SHARD, 0, 10)
    tiny.expire_links()
    assert source.read(SHARD, 10, 500) == WEIGHTS[10:500]
    assert asked(tiny, "/resolve/") == 2


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1"])
def test_a_revision_is_pinned_to_its_commit(tiny: LocalHub, revision: str | None) -> None:
    if revision not in (None, "main"):
        tiny.branch("org/tiny", revision)
    source = HubSource("org/tiny", revision)
    before = source.list()
    tiny.commit("org/tiny", {SHARD: b"other weights", "config.json": b"{}"})
    assert source.read(SHARD, 0, 100) == WEIGHTS[:100]
    assert source.list() == before
    assert HubSource("org/tiny").list() != before


@pytest.mark.parametrize("name", [SHARD, "config.json"])
@pytest.mark.parametrize("more", [b"", b"more"], ids=["as-long", "longer"])
def test_a_file_that_changes_in_its_commit_is_refused_by_name(
    tiny: LocalHub, name: str, more: bytes
) -> None:
    source = HubSource("org/tiny")
    content = bytes(b ^ 1 for b in (FOLDER / name).read_bytes()) + more
    tiny.swap_file("org/tiny", name, content)
    with pytest.raises(SourceChangedError, match=f"{name}: had hash .* when it was listed"):
        source.read(name, 0, 100)


@pytest.mark.parametrize("more", [b"", b"more"], ids=["as-long", "longer"])
def test_an_object_that_changes_behind_its_link_is_refused_by_name(
    tiny: LocalHub, more: bytes
) -> None:
    source = HubSource("org/tiny")
    source.read(SHARD, 0, 100)
    tiny.swap_object("org/tiny", SHARD, bytes(b ^ 1 for b in WEIGHTS) + more)
    with pytest.raises(SourceChangedError, match=SHARD):
        source.read(SHARD, 100, 200)


def test_an_object_of_another_size_is_refused_at_the_first_range(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    tiny.swap_object("org/tiny", SHARD, WEIGHTS + b"more")
    with pytest.raises(SourceChangedError, match=f"had {len(WEIGHTS):,} bytes when it was listed"):
        source.read(SHARD, 0, 100)


def test_a_file_in_the_local_cache_is_read_from_there(tiny: LocalHub) -> None:
    path = Path(hf_hub_download("org/tiny", SHARD))
    source = HubSource("org/tiny")
    tiny.reset_counts()
    assert source.local_path(SHARD) == path
    assert source.read(SHARD, 3, 300) == b"".join(source.stream(SHARD, 3, 300)) == WEIGHTS[3:300]
    assert source.local_path("config.json") is None
    assert source.local_path("missing") is None
    assert not tiny.requests


def test_a_file_of_another_commit_or_size_in_the_local_cache_is_not_used(tiny: LocalHub) -> None:
    path = Path(hf_hub_download("org/tiny", SHARD))
    tiny.commit("org/tiny", {"config.json": b"{}"})
    newer = HubSource("org/tiny")
    assert newer.local_path(SHARD) is None
    older = HubSource("org/tiny", path.parent.name)
    path.write_bytes(WEIGHTS[:-1])
    assert older.local_path(SHARD) is None
    assert older.read(SHARD, 0, 100) == WEIGHTS[:100]


def test_leftovers_of_tools_are_not_listed(online: LocalHub) -> None:
    online.add_model("org/tiny", {"config.json": b"{}", ".cache/x": b"x", "a/__pycache__/y": b"y"})
    assert [file.name for file in HubSource("org/tiny").list()] == ["config.json"]


def test_the_shared_session_may_be_closed_at_any_time(tiny: LocalHub) -> None:
    source = HubSource("org/tiny")
    pieces = source.stream(SHARD, 0, len(WEIGHTS))
    begin = next(pieces)
    close_session()
    assert begin + b"".join(pieces) == WEIGHTS


class _Mirror(BaseHTTPRequestHandler):
    """Sends everybody on to the Hub; remembers nothing."""

    hub = ""

    def do_GET(self) -> None:
        self.send_response(308)
        self.send_header("Location", self.hub + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_a_mirror_may_send_on_to_the_hub_and_the_token_stays_with_it(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Handler", (_Mirror,), {"hub": tiny.endpoint})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{mirror.server_port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
        )
        assert HubSource("org/tiny").read(SHARD, 0, 100) == WEIGHTS[:100]
        close_session()
        mirror.shutdown()
    assert not any(request.with_token for request in tiny.requests)


@pytest.mark.parametrize("cached", [False, True])
def test_the_result_is_named_after_the_repository_in_the_current_folder(
    tiny: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    if cached:
        hf_hub_download("org/tiny", "config.json")
    monkeypatch.chdir(tmp_path)
    pruning = plan("org/tiny", FOLDER / "scores.pt", ratio=0.5)
    assert pruning.out == tmp_path / "tiny-REAP-50pct"
    assert tiny.sent(r"GET /cdn/") < 40_000


def test_a_result_inside_the_cached_snapshot_is_refused(tiny: LocalHub) -> None:
    snapshot = Path(hf_hub_download("org/tiny", "config.json")).parent
    with pytest.raises(OutputError, match="is inside the source"):
        plan("org/tiny", FOLDER / "scores.pt", ratio=0.5, out=snapshot / "out")
