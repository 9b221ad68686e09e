"""Every fault of the network: the rows of the fault table that need a server.

As in `catalogue`, whose rows need none. What the network does wrong for a moment must be
survived by the same run; what it does wrong for good is told, and the next run goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.bench import BYTES, RemoteBench, StreamBench
from tests.faults.catalogue import Attempt, Entry, spread
from tests.faults.trial import Bench, Ended

_SHARD = "model-00002-of-000004.safetensors"
Arrange = Callable[[RemoteBench, int, random.Random], None]


def _remote(bench: Bench) -> RemoteBench:
    assert isinstance(bench, RemoteBench)
    return bench


def disturbed(
    arrange: Arrange,
    statuses: set[int],
    says: str = "",
    *,
    at: str = "GET /cdn/",
    rerun: tuple[str, ...] = (),
    **settings: Any,
) -> Attempt:
    """Something is arranged to happen at one of the requests `at`; it may or may not end the run.

    arrange: is given the bench, how many of those requests are to pass first, and random numbers.
    """

    def attempt(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
        remote = _remote(bench)
        count = remote.requests_of(at)
        for skip in spread(count, tries, numbers):
            arrange(remote, skip - 1, numbers)
            ended = remote.run_soon(settings)
            remote.require(ended.status in statuses, f"status is not in {statuses}", ended)
            if ended.status:
                remote.require_told(ended, statuses, says)
                remote.require_no_out(ended)
            remote.require_source(ended)
            remote.mend()
            remote.require_finishes(*rerun if ended.status else ())
            remote.clear()
            yield ended

    return attempt


def cut(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
    """Answers end too early, by FIN or by RST."""
    longest = bench.model.joinpath(_SHARD).stat().st_size // 10
    for reset in (False, True):
        every, times = numbers.randint(3, 9), 8
        cut_after = lambda: int(longest * numbers.random() ** 2)  # noqa: E731
        bench.hub.fault(BYTES, cut_after=cut_after, every=every, times=times, reset=reset)


def busy(status: int, retry_after: int) -> Arrange:
    """The Hub, and its storage, want to be left alone for a while."""

    def arrange(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
        how: dict[str, Any] = {"status": status, "retry_after": retry_after}
        bench.hub.fault("GET /", skip=skip, every=numbers.randint(1, 3), times=4, **how)
        bench.hub.fault("GET /", **how)

    return arrange


def happens(do: Callable[[RemoteBench], Any]) -> Arrange:
    """Something happens on the server's side while a request waits for it."""

    def arrange(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
        bench.hub.fault("GET /cdn/", skip=skip, do=lambda: do(bench))

    return arrange


def commit_upstream(bench: RemoteBench) -> None:
    """Somebody pushes other weights and another config."""
    shard = bench.model.joinpath(_SHARD).read_bytes()
    changes = {_SHARD: shard[::-1], "config.json": b"{}", "tokenizer.json": None}
    bench.hub.commit(bench.id, changes)


def changed_shard(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """A shard becomes another under the same name: on the Hub, or in its storage only."""
    remote = _remote(bench)
    path = remote.model / _SHARD
    others = [path.read_bytes()[::-1], path.read_bytes()[:-100]]
    swaps = [remote.hub.swap_file, remote.hub.swap_object]
    for number in range(tries):
        swap, other = swaps[number % 2], others[number // 2 % 2]
        # From the begin: a change behind the last range that is asked for has no effect.
        skip = numbers.randint(0, 4)

        def change(swap: Callable[..., None] = swap, other: bytes = other) -> None:
            swap(remote.id, _SHARD, other)

        remote.hub.fault(f"GET /cdn/.*{_SHARD}", skip=skip, do=change)
        try:
            ended = remote.run()
        finally:
            remote.hub.swap_file(remote.id, _SHARD, path)
            remote.mend()
        # Storage that drops what the Hub no longer names has nothing to compare with.
        says = rf"{_SHARD}: (had (hash|etag|[\d,]+ bytes)|is no longer there)"
        remote.require_told(ended, {1}, says)
        remote.require_no_out(ended)
        remote.require_finishes("--restart")
        remote.clear()
        yield ended


def kills_of_downloads(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """SIGKILL, twice in a row; what was noted by then does not travel again."""
    remote = _remote(bench)
    ended = remote.run("--no-verify")
    remote.require(ended.status == 0, "the undisturbed run failed", ended)
    whole, own = remote.bytes_sent(), 1 << 16
    remote.clear()
    for place in spread(whole, tries, numbers):
        remote.hub.limit_bandwidth(whole / 2)
        for share in (place / whole, numbers.random()):
            remote.hub.reset_counts()
            enough = share * (whole - remote.noted())
            due = lambda: remote.bytes_sent() >= enough  # noqa: B023, E731
            ended = remote.kill_when(due, "--no-verify")
            if ended.status == 0:
                break
            remote.require_told(ended, {137}, "")
            remote.require_no_out(ended)
        remote.mend()
        remote.hub.reset_counts()
        done = remote.noted()
        remote.require_finishes("--no-verify")
        again = remote.bytes_sent()
        most = (whole - done) * 1.01 + own
        remote.require(again <= most, f"{again:,} bytes travelled, {done:,} were there", ended)
        remote.clear()
        yield ended


def kills_while_sending(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """SIGKILL while shards are fetched and sent; no shard is sent twice."""
    remote = _remote(bench)
    ended = remote.run()
    remote.require(ended.status == 0, "the undisturbed run failed", ended)

    def travelled() -> int:
        return remote.bytes_sent() + remote.hub.received("PUT /")

    whole = travelled()
    remote.clear()
    for place in spread(whole, tries, numbers):
        remote.hub.limit_bandwidth(whole / 3)
        due = lambda: travelled() >= place  # noqa: B023, E731
        ended = remote.kill_when(due)
        if ended.status:
            remote.require_told(ended, {137}, "")
        remote.mend()
        remote.require_no_out(ended)
        remote.require_finishes()
        remote.clear()
        yield ended


def cut_uploads(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
    """Uploads end too early, storage is busy, and the answer to the commit is lost."""
    longest = bench.model.joinpath(_SHARD).stat().st_size // 2
    cut_after = lambda: int(longest * numbers.random())  # noqa: E731
    bench.hub.fault("PUT /", skip=skip, cut_upload_after=cut_after)
    bench.hub.fault("PUT /", status=503, retry_after=0)
    bench.hub.fault("POST .*/commit/", lose_answer=numbers.random() < 0.5, times=1)


def drips(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
    """A connection, or every one from now on, brings a byte now and then."""
    times = numbers.choice([1, None])
    bench.hub.fault(numbers.choice(["GET /cdn/", "GET /"]), skip=skip, drip=0.1, times=times)


def lies(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
    """What the Hub or its storage says of sizes and bytes is not so."""
    name = numbers.choice(["tokenizer.json", "config.json", _SHARD])
    size = bench.model.joinpath(name).stat().st_size
    listed = (b'"size":%d' % size, b'"size":%d' % (size + numbers.choice([-1, 1, 3 << 30])))
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("GET /api/models/", {"rewrite": lambda body: body.replace(*listed)}),
        (f"GET /org/.*/{name}", {"headers": {"X-Linked-Size": str(size + 1)}}),
        ("GET /cdn/", {"skip": skip, "headers": {"Content-Range": "bytes 0-9/10"}}),
        ("GET /cdn/", {"skip": skip, "shift_range": 8}),
        # As many bytes, other ones, of a file that is read whole.
        (
            "GET /api/resolve-cache/.*/config.json",
            {"rewrite": lambda body: body[:9] + bytes([body[9] ^ 1]) + body[10:]},
        ),
    ]
    on, how = numbers.choice(kinds)
    bench.hub.fault(on, times=None, **how)


def leads_elsewhere(bench: RemoteBench, skip: int, numbers: random.Random) -> None:
    """Files are said to lie where no server is."""
    places = ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[x", "", f"/{bench.id}/{_SHARD}"]
    how = {"status": 302, "headers": {"Location": numbers.choice(places)}}
    bench.hub.fault(f"GET /{bench.id}/", skip=skip, times=None, **how)


def echoes(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """The server sends the token back: in words, names and files; it gets nowhere."""
    remote = _remote(bench)
    count = remote.requests_of("GET /")
    everywhere = dict.fromkeys(("ETag", "X-Linked-Etag", "X-Error-Message", "Server"), "{token}")
    kinds: list[dict[str, Any]] = [
        {"status": 403, "body": b'{"error": "Bearer {token}"}', "headers": everywhere},
        {"status": 302, "headers": {"Location": "ftp://{token}/"}},
        {"status": 200, "body": b'{"a": "{token}"}'},
        {"headers": everywhere},
    ]
    for skip in spread(count, tries, numbers):
        remote.hub.fault("GET /", skip=skip - 1, times=None, **numbers.choice(kinds))
        ended = remote.run_soon({"hasty": True})
        if ended.status:
            remote.require_told(ended, {1, 2}, "")
            remote.require_no_out(ended)
        remote.require(remote.hub.token not in ended.stderr, "the token is told", ended)
        for path in filter(Path.is_file, remote.place.rglob("*")):
            kept = remote.hub.token.encode() in path.read_bytes() or remote.hub.token in path.name
            remote.require(not kept, f"{path} holds the token", ended)
        remote.require_source(ended)
        remote.mend()
        remote.require_finishes(*(("--restart",) if ended.status else ()))
        remote.clear()
        yield ended


DOWNLOADS = [
    Entry("SIGKILL while downloading", kills_of_downloads, 20),
    Entry("connections cut at random", disturbed(cut, {0}), 20),
    Entry("429 with Retry-After", disturbed(busy(429, 1), {0}), 10),
    Entry("503 with Retry-After", disturbed(busy(503, 1), {0}), 10),
    Entry(
        "the server restarts",
        disturbed(happens(lambda bench: bench.hub.restart()), {0}),
        10,
    ),
    Entry(
        "signed links expire",
        disturbed(happens(lambda bench: bench.hub.expire_links()), {0}),
        10,
    ),
    Entry("a commit upstream during the run", disturbed(happens(commit_upstream), {0}), 10),
    Entry("a shard's etag changes", changed_shard, 10),
    Entry(
        "the server is gone for good",
        disturbed(
            happens(lambda bench: bench.hub.stop()),
            {1},
            "gave up after .* tries.*run the same command again",
            hasty=True,
        ),
        10,
    ),
    Entry(
        "a server that drips",
        disturbed(drips, {0, 1}, "less than 1,024 bytes a second came", hasty=True, window=1.0),
        10,
    ),
    Entry(
        "a server that lies about sizes and bytes",
        disturbed(
            lies,
            {0, 1},
            "when it was listed|another range than|other bytes came than the Hub lists",
            rerun=("--restart",),
            hasty=True,
        ),
        20,
    ),
    Entry(
        "a server that redirects elsewhere",
        disturbed(
            leads_elsewhere,
            {1},
            "which is not followed|which is no address|leads to more than 10",
            at="GET /org/tiny/resolve/",
        ),
        10,
    ),
    Entry("a server that echoes the token", echoes, 20),
]
SENDINGS = [
    Entry("SIGKILL while shards are sent (`--stream-push`)", kills_while_sending, 20),
    Entry(
        "uploads cut at random (`--stream-push`)",
        disturbed(cut_uploads, {0, 1}, "run the same command again", at="PUT /"),
        10,
    ),
]
BENCHES = [(RemoteBench, DOWNLOADS), (StreamBench, SENDINGS)]
