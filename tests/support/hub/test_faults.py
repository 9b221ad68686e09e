from __future__ import annotations

import hashlib
import random
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError

from tests.support.hub.server import LocalHub

# The HTTP library of huggingface_hub: httpx with its version 1, httpx2 with its version 2.
httpx = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

SHARD = random.Random(1).randbytes(1 << 20)
FILES = {"config.json": b"{}", "model.safetensors": SHARD}
NAME = "model.safetensors"


@pytest.fixture
def shop(online: LocalHub) -> LocalHub:
    online.add_model("org/tiny", FILES)
    return online


def ranged(begin: int, end: int) -> Any:
    headers = {"Range": f"bytes={begin}-{end - 1}"}
    return get_session().get(hf_hub_url("org/tiny", NAME), headers=headers)


def test_a_connection_is_cut_after_so_many_bytes(shop: LocalHub) -> None:
    shop.fault("GET /cdn/", cut_after=300_000)
    got = b""
    with (
        pytest.raises(httpx.RemoteProtocolError),
        get_session().stream("GET", hf_hub_url("org/tiny", NAME)) as answer,
    ):
        for piece in answer.iter_bytes():
            got += piece
    assert got == SHARD[:300_000]
    assert (shop.requests[-1].status, shop.sent("GET /cdn/")) == (200, 300_000)
    assert ranged(0, 5).content == SHARD[:5]


def test_a_connection_may_also_be_reset(shop: LocalHub) -> None:
    shop.fault("GET /cdn/", cut_after=300_000, reset=True)
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        ranged(0, len(SHARD))


@pytest.mark.slow
def test_downloads_survive_cuts_at_random_places(shop: LocalHub) -> None:
    dice = random.Random(2)
    fault = shop.fault("GET /cdn/", cut_after=lambda: dice.randrange(len(SHARD)), times=2)
    assert Path(hf_hub_download("org/tiny", NAME)).read_bytes() == SHARD
    assert fault.struck == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 429, "retry_after": 0},
        {"status": 429, "ratelimit_reset": 0},
        {"status": 503, "retry_after": 0},
    ],
)
def test_a_server_may_ask_for_patience(shop: LocalHub, answer: dict[str, int]) -> None:
    path = HfApi().upload_file if answer["status"] == 503 else None
    HfApi().create_repo("me/out")
    fault = shop.fault("POST /api/models/me/out/preupload" if path else "GET /cdn/", **answer)
    if path:
        path(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/out")
        assert shop.read("me/out", "x") == b"x"
    else:
        assert Path(hf_hub_download("org/tiny", NAME)).read_bytes() == SHARD
    assert fault.struck == 1
    assert [r.status for r in shop.requests if r.status >= 400] == [answer["status"]]


def test_every_third_request_may_fail_for_ever(shop: LocalHub) -> None:
    shop.fault("GET /cdn/", status=500, skip=1, every=3, times=None)
    statuses = [ranged(0, 9).status_code for _ in range(8)]
    assert statuses == [206, 500, 206, 206, 500, 206, 206, 500]
    shop.clear_faults()
    assert ranged(0, 9).status_code == 206


def test_a_range_may_be_ignored_or_another(shop: LocalHub) -> None:
    shop.fault("/cdn/", ignore_range=True)
    shop.fault("/cdn/", shift_range=7)
    whole, shifted = ranged(100, 200), ranged(100, 200)
    assert (whole.status_code, whole.content) == (200, SHARD)
    assert (shifted.status_code, shifted.content) == (206, SHARD[107:207])
    assert shifted.headers["Content-Range"] == f"bytes 107-206/{len(SHARD)}"


def test_a_restart_keeps_ports_and_repositories(shop: LocalHub) -> None:
    endpoint = shop.endpoint
    shop.limit_bandwidth(1e6)
    shop.fault("GET /cdn/", skip=1, do=shop.restart)
    with get_session().stream("GET", hf_hub_url("org/tiny", NAME)) as answer:
        # The second request brings the server down, and the first with it.
        with pytest.raises(httpx.TransportError):
            ranged(0, 1)
        with pytest.raises(httpx.TransportError):
            answer.read()
    shop.limit_bandwidth(None)
    # Waits for the restart to be over.
    shop.start()
    assert shop.endpoint == endpoint
    assert ranged(0, 100).content == SHARD[:100]


def test_a_stopped_server_refuses_connections(shop: LocalHub) -> None:
    shop.stop()
    with pytest.raises(httpx.ConnectError):
        ranged(0, 1)
    shop.start()
    assert ranged(0, 1).content == SHARD[:1]


def test_an_upload_that_is_cut_is_sent_again_and_counted_once(online: LocalHub) -> None:
    HfApi().create_repo("me/out")
    online.fault("PUT /upload/", cut_upload_after=100_000)
    HfApi().upload_file(path_or_fileobj=SHARD, path_in_repo=NAME, repo_id="me/out")
    assert online.read("me/out", NAME) == SHARD
    assert online.uploads == {hashlib.sha256(SHARD).hexdigest(): 1}
    puts = [request for request in online.requests if request.method == "PUT"]
    assert [put.status for put in puts] == [0, 200]
    assert puts[0].bytes_received < len(SHARD)


def test_a_commit_whose_answer_is_lost_has_been_made(online: LocalHub) -> None:
    HfApi().create_repo("me/out")
    online.fault("POST .*/commit/", lose_answer=True)
    operations = [CommitOperationAdd("x.txt", b"x")]
    with pytest.raises(httpx.RemoteProtocolError):
        HfApi().create_commit("me/out", operations, commit_message="Once")
    assert online.commits("me/out") == ["Once", "initial commit"]


def test_a_change_upstream_in_the_middle_has_no_effect_on_a_pinned_snapshot(
    shop: LocalHub,
) -> None:
    fault = shop.fault(
        "HEAD .*model", do=lambda: shop.commit("org/tiny", {NAME: b"new", "config.json": None})
    )
    snapshot = Path(snapshot_download("org/tiny"))
    assert fault.struck == 1
    assert (snapshot / NAME).read_bytes() == SHARD
    assert (snapshot / "config.json").read_bytes() == b"{}"
    assert list(shop.files("org/tiny")) == [NAME]


def test_a_swapped_file_has_another_etag_in_the_same_commit(shop: LocalHub) -> None:
    url = hf_hub_url("org/tiny", NAME)
    before = get_session().head(url, follow_redirects=False).headers
    shop.swap_file("org/tiny", NAME, SHARD[::-1])
    after = get_session().head(url, follow_redirects=False).headers
    assert before["X-Repo-Commit"] == after["X-Repo-Commit"]
    assert before["X-Linked-Etag"] != after["X-Linked-Etag"]
    assert get_session().get(before["Location"]).status_code == 404
    assert ranged(0, 10).content == SHARD[::-1][:10]


def test_a_swapped_object_shows_in_the_etag_of_storage_only(shop: LocalHub) -> None:
    url = hf_hub_url("org/tiny", NAME)
    before = get_session().head(url, follow_redirects=False).headers
    etag = get_session().head(before["Location"]).headers["ETag"]
    shop.swap_object("org/tiny", NAME, SHARD[::-1])
    after = get_session().head(url, follow_redirects=False).headers
    assert before["X-Linked-Etag"] == after["X-Linked-Etag"]
    answer = get_session().get(before["Location"])
    assert answer.content == SHARD[::-1]
    assert answer.headers["ETag"] != etag


def test_all_connections_share_the_bandwidth(shop: LocalHub) -> None:
    shop.limit_bandwidth(4 * len(SHARD))
    begin = time.monotonic()
    snapshot_download("org/tiny")
    assert time.monotonic() - begin > 0.25
    shop.limit_bandwidth(None, latency=0.05)
    begin = time.monotonic()
    # A redirect and the bytes.
    ranged(0, 1)
    assert time.monotonic() - begin > 0.1


def test_one_answer_may_trickle_or_be_late(shop: LocalHub) -> None:
    shop.fault("GET /cdn/", bytes_per_second=1e6)
    shop.fault("GET /cdn/", delay=0.1)
    for nbytes in (100_000, 1):
        begin = time.monotonic()
        assert ranged(0, nbytes).content == SHARD[:nbytes]
        assert time.monotonic() - begin > 0.1


def test_a_fault_strikes_what_its_pattern_says_and_nothing_else(shop: LocalHub) -> None:
    shop.fault("GET /api/models/org/tiny/tree", status=502, times=None)
    assert HfApi().model_info("org/tiny").sha
    tree = f"{shop.endpoint}/api/models/org/tiny/tree/main"
    assert get_session().get(tree).status_code == 502
