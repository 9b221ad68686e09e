"""A Hub that lies, drips, echoes or makes no sense: one line, nothing believed, no token told."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from shardsurgeon import errors
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import (
    CheckpointError,
    NetworkError,
    ShardSurgeonError,
    SourceChangedError,
    SourceReadError,
)
from shardsurgeon.storage.hub.listing import parse_listing
from shardsurgeon.storage.hub.source import HubSource
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
QUICK = RetryPolicy(
    tries=3, first_wait=0.01, longest_wait=0.02, least_rate=1000.0, window=0.3, slow_windows=2
)
LISTING = r"GET /api/models/org/tiny"
SHA1, SHA256 = "a" * 40, "b" * 64


@pytest.fixture
def tiny(online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    online.add_model("org/tiny", FOLDER)
    monkeypatch.setattr(errors, "_IN_USE", set())
    return online


def listing(*siblings: object, **more: object) -> bytes:
    return json.dumps({"sha": SHA1, "siblings": list(siblings), **more}).encode()


def sibling(name: object = "a.bin", **changed: object) -> dict[str, object]:
    return {"rfilename": name, "size": 5, "blobId": SHA1, **changed}


SENSELESS = {
    "nothing": b"",
    "not UTF-8": b'{"sha": "\xff"}',
    "not JSON": b"<html>Please log in</html>",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "a key twice": b'{"sha": null, "sha": null}',
    "a number of 5,000 digits": b'{"siblings": [{"rfilename": "a", "size": %b}]}' % (b"9" * 5000),
    "files that are no list": listing(siblings={"a": 1}),
    "a commit that is a number": listing(sha=7),
    "a commit that is text": listing(sha="main\n"),
    "a file that is text": listing("config.json"),
    "a file that is null": listing(None),
    "no name": listing({"size": 5, "blobId": SHA1}),
    "a name that is a number": listing(sibling(5)),
    "a lone surrogate": listing(sibling("\ud800.json")),
    "an empty name": listing(sibling("")),
    "a name that leads out": listing(sibling("../a")),
    "an absolute name": listing(sibling("/etc/passwd")),
    "a name of 5,000 letters": listing(sibling("a" * 5000)),
    "a name twice": listing(sibling("a"), sibling("a")),
    "a token as a name": listing(sibling(f"{LocalHub.token}.json")),
    "no size": listing(sibling(size=None)),
    "a negative size": listing(sibling(size=-1)),
    "a size as text": listing(sibling(size="5")),
    "a size that is no digit": listing(sibling(size="²")),
    "a size as a float": listing(sibling(size=5.0)),
    "a size that is true": listing(sibling(size=True)),
    "a size beyond all disks": listing(sibling(size=10**30)),
    "no hash": listing(sibling(blobId=None)),
    "a hash that is a number": listing(sibling(blobId=5)),
    "a hash that is short": listing(sibling(blobId="abc")),
    "lfs that is text": listing(sibling(lfs="x")),
    "lfs without a hash": listing(sibling(lfs={"size": 5})),
    "lfs with a hash of another kind": listing(sibling(lfs={"sha256": SHA1})),
    "lfs with a list": listing(sibling(lfs=[SHA256])),
}


@pytest.mark.parametrize("kind", SENSELESS)
def test_an_answer_that_is_no_listing_is_refused_with_a_sentence(
    tiny: LocalHub, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tiny.fault(LISTING, status=200, body=SENSELESS[kind], times=None)
    assert main(["inspect", "hf://org/tiny"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "does not answer as a Hub does" in said.err or "leads out of" in said.err
    assert "bug" not in said.err and LocalHub.token not in said.err


def test_a_listing_is_taken_as_it_is() -> None:
    large = {"sha256": SHA256, "size": 5, "pointerSize": 100}
    found = parse_listing(listing(sibling("b"), sibling("a", lfs=large), more=1), "x")
    assert list(found.files) == ["a", "b"]
    assert (found.files["a"].digest, found.files["a"].is_large) == (SHA256, True)
    assert (found.files["b"].digest, found.files["b"].is_large) == (SHA1, False)
    assert parse_listing(b"{}", "x").files == {}


def test_a_listing_is_read_up_to_a_limit_and_takes_no_more_memory(tiny: LocalHub) -> None:
    """Of files without an end, as a server may claim them."""
    one = json.dumps(sibling("a" * 40)).encode() + b","
    tiny.fault(LISTING, status=200, body=b'{"siblings":[' + one * (200 << 20 >> 7), times=None)
    tracemalloc.start()
    with pytest.raises(NetworkError, match="answers with more than 12,582,912 bytes"):
        HubSource("org/tiny", policy=QUICK)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The server is in this process too: what it sends is counted as well, once.
    assert peak < 700 << 20


ANSWERS: list[tuple[int, bytes]] = [
    (status, body)
    for status in (400, 401, 403, 404, 418, 451)
    for body in (
        *(b"", b"[]", b"null", b'"x"', b"7", b'{"error": {"a": []}}', b'{"error": [[], {}]}'),
        *(b'{"errors": 5}', b'{"errors": [5]}', b'{"errors": ["message"]}', b"\xff\xfe"),
        *(b"[" * 60_000, b'{"error": ' + b"9" * 5000 + b"}", b"x" * (1 << 20)),
    )
]


@pytest.mark.parametrize("on", [LISTING, r"GET /org/tiny/resolve/.*/config\.json"])
@pytest.mark.parametrize("message", ["no", "n\xb7\x97"], ids=["ascii", "latin-1"])
def test_a_refusal_of_any_shape_is_a_sentence(
    tiny: LocalHub, capsys: pytest.CaptureFixture[str], on: str, message: str
) -> None:
    for status, body in ANSWERS:
        tiny.clear_faults()
        named = {"X-Error-Message": message}
        tiny.fault(on, status=status, body=body, headers=named, times=None)
        assert main(["inspect", "hf://org/tiny"]) in (1, 2)
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1, (status, body[:40], said.err)
        assert "bug" not in said.err and len(said.err) < 700, (status, body[:40], said.err)


def other(name: str) -> bytes:
    """As many bytes, other ones."""
    content = (FOLDER / name).read_bytes()
    return content[:10] + bytes([content[10] ^ 1]) + content[11:]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tiktoken.model"])
def test_other_bytes_of_the_same_size_are_found_in_a_file_that_is_read_whole(
    tiny: LocalHub, name: str
) -> None:
    content = (FOLDER / name).read_bytes()
    changed = other(name)
    assert len(changed) == len(content) and changed != content
    source = HubSource("org/tiny", policy=QUICK)
    assert source.read(name, 0, len(content)) == content
    tiny.fault(r"GET /(cdn|api/resolve-cache)/", rewrite=lambda body: changed, times=None)
    listed = next(file.stamp for file in source.list() if file.name == name)
    by = "sha256" if len(listed) == 64 else "sha1"
    says = rf"{name}: other bytes came than the Hub lists \(expected {by} {listed[:12]}, found "
    with pytest.raises(SourceReadError, match=says) as caught:
        list(source.stream(name, 0, len(content)))
    assert caught.value.exit_status == 1


def test_the_hashes_are_those_of_git_and_of_the_content(tiny: LocalHub) -> None:
    files = {file.name: file for file in HubSource("org/tiny").list()}
    config = (FOLDER / "config.json").read_bytes()
    git = hashlib.sha1(b"blob " + str(len(config)).encode() + b"\0" + config)
    assert files["config.json"].stamp == git.hexdigest()
    assert files[SHARD].stamp == hashlib.sha256((FOLDER / SHARD).read_bytes()).hexdigest()


def test_an_apply_over_changed_side_files_leaves_no_output(
    tiny: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = other("tokenizer_config.json")
    on = r"GET /api/resolve-cache/.*tokenizer_config"
    tiny.fault(on, rewrite=lambda body: changed, times=None)
    out = tmp_path / "out"
    words = [str(FOLDER / "scores.pt"), "--model", "org/tiny", "--ratio", "0.5", "-o", str(out)]
    assert main(["apply", *words]) == 1
    assert "tokenizer_config.json: other bytes came than the Hub lists" in capsys.readouterr().err
    assert not out.exists()
    tiny.clear_faults()
    assert main(["apply", *words]) == 0
    assert (out / "tokenizer_config.json").read_bytes() == (
        FOLDER / "tokenizer_config.json"
    ).read_bytes()


LIES: dict[str, tuple[str, dict[str, Any], type[ShardSurgeonError], str]] = {
    "a size on the redirect": (
        r"GET /org/tiny/resolve/",
        {"headers": {"X-Linked-Size": "7"}},
        SourceChangedError,
        "had [0-9,]+ bytes when it was listed, has 7",
    ),
    "a hash on the redirect": (
        r"GET /org/tiny/resolve/",
        {"headers": {"X-Linked-Etag": f'"{SHA256}"'}},
        SourceChangedError,
        "had hash .* when it was listed",
    ),
    "a range": (
        r"GET /cdn/",
        {"headers": {"Content-Range": "bytes 7-17/18"}},
        SourceChangedError,
        "had [0-9,]+ bytes when it was listed, has 18",
    ),
    "an encoding": (
        r"GET /cdn/",
        {"headers": {"Content-Encoding": "gzip"}},
        SourceReadError,
        "comes encoded",
    ),
    "another scheme": (
        r"GET /org/tiny/resolve/",
        {"headers": {"Location": "file:///etc/passwd"}},
        NetworkError,
        "leads to file:, which is not followed",
    ),
    "no server": (
        r"GET /org/tiny/resolve/",
        {"headers": {"Location": "https://[x"}},
        NetworkError,
        "which is no address",
    ),
    "itself": (
        r"GET /org/tiny/resolve/",
        {"headers": {"Location": f"/org/tiny/resolve/main/{SHARD}"}},
        NetworkError,
        "leads to more than 10 other addresses",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_lie_in_a_header_is_refused_at_once(tiny: LocalHub, kind: str) -> None:
    on, how, error, says = LIES[kind]
    source = HubSource("org/tiny")
    tiny.fault(on, times=None, **how)
    begun = time.monotonic()
    with pytest.raises(error, match=says):
        source.read(SHARD, 0, 100)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("size", ["²", "9" * 5000, "-5", ""])
def test_a_size_that_is_no_number_says_nothing(tiny: LocalHub, size: str) -> None:
    source = HubSource("org/tiny", policy=QUICK)
    tiny.fault(r"GET /org/tiny/resolve/", headers={"X-Linked-Size": size}, times=None)
    assert source.read(SHARD, 0, 8) == (FOLDER / SHARD).read_bytes()[:8]


@pytest.mark.parametrize("on", [r"GET /cdn/", r"GET /api/models/", r"GET /api/resolve-cache/"])
def test_a_hub_that_drips_is_left_after_a_few_tries(tiny: LocalHub, on: str) -> None:
    tiny.fault(on, drip=0.02, times=None)
    begun = time.monotonic()
    with pytest.raises(NetworkError, match="less than 1,000 bytes a second came for 0 s"):
        source = HubSource("org/tiny", policy=QUICK)
        source.read("config.json" if "cache" in on else SHARD, 0, 1000)
    assert time.monotonic() - begun < 30
    assert 2 <= sum("GET " + r.path > "" for r in tiny.requests) < 20


def test_a_hub_that_drips_once_is_asked_again(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=QUICK)
    tiny.fault(r"GET /cdn/", drip=0.02)
    assert source.read(SHARD, 0, 9000) == (FOLDER / SHARD).read_bytes()[:9000]


def test_storage_that_refuses_links_is_not_asked_ten_times(tiny: LocalHub) -> None:
    source = HubSource("org/tiny", policy=RetryPolicy(first_wait=0.01))
    tiny.fault(r"GET /cdn/", status=404, times=None)
    with pytest.raises(NetworkError, match="gave up after 3 tries in a row"):
        source.read(SHARD, 0, 100)


# --- the token ---

ECHOES: dict[str, tuple[str, dict[str, Any]]] = {
    "an error": (LISTING, {"status": 403, "body": b'{"error": "no: Bearer {token}"}'}),
    "an error for a file": (
        r"GET /org/tiny/resolve/",
        {"status": 403, "body": b'{"error": "Authorization: Bearer {token}"}'},
    ),
    "a plain error": (LISTING, {"status": 418, "body": b"{token}"}),
    "a header": (LISTING, {"status": 400, "headers": {"X-Error-Message": "{token}"}}),
    "a redirect": (
        r"GET /org/tiny/resolve/",
        {"status": 302, "headers": {"Location": "file://{token}/{token}"}},
    ),
    "a host": (
        r"GET /org/tiny/resolve/",
        {"status": 302, "headers": {"Location": "ftp://{token}.example/"}},
    ),
    "a scheme": (
        r"GET /org/tiny/resolve/",
        {"status": 302, "headers": {"Location": "{token}:x"}},
    ),
    "a long error": (
        LISTING,
        {"status": 400, "body": b'{"error": "' + b"no " * 61 + b'{token}"}'},
    ),
    "an ETag": (r"GET /org/tiny/resolve/", {"headers": {"X-Linked-Etag": '"{token}"'}}),
    "a file": (r"GET /api/resolve-cache/", {"status": 200, "body": b'{"a": "{token}"}'}),
    "the commit": (LISTING, {"status": 200, "body": b'{"sha": "{token}", "siblings": []}'}),
    "a file name": (
        LISTING,
        {
            "status": 200,
            "body": b'{"sha": null, "siblings": [{"rfilename": "{token}", "size": 1, "blobId": "'
            + SHA1.encode()
            + b'"}]}',
        },
    ),
    "what is not JSON": (LISTING, {"status": 200, "body": b"{token}"}),
    "a bad header": (LISTING, {"headers": {"Content-Encoding": "{token}"}}),
}


@pytest.mark.parametrize("plain", [False, True], ids=["of-the-hub", "of-any-look"])
@pytest.mark.parametrize("kind", ECHOES)
def test_a_token_that_comes_back_is_told_to_nobody(
    tiny: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    plain: bool,
) -> None:
    """Neither on the screen, nor in the traceback that is asked for, nor on the disk."""
    token = tiny.token
    if plain:  # as other Hubs give them out
        token = "Opensesame-opensesame"
        tiny.store.accounts[token] = tiny.store.accounts[tiny.token]
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("SHARDSURGEON_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    on, how = ECHOES[kind]
    tiny.fault(on, times=None, **how)
    for words in (["inspect", "--json"], ["apply", "--ratio", "0.5", "-o", "out"]):
        more = [str(FOLDER / "scores.pt")] if words[0] == "apply" else []
        model = ["--model", "hf://org/tiny"] if more else ["hf://org/tiny"]
        assert main([words[0], *more, *model, *words[1:]]) in (1, 2)
        said = capsys.readouterr()
        told = (said.out + said.err).lower()
        assert token.lower() not in told and token[:12].lower() not in told
    assert_not_on_disk(tmp_path, token)


def assert_not_on_disk(folder: Path, token: str) -> None:
    for path in folder.rglob("*"):
        assert token not in path.name
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path


def test_a_token_in_the_name_that_storage_gives_a_file_gets_into_no_journal(
    tiny: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is cut off leaves its journal; one that ends, its record."""
    named = {"ETag": f'"{tiny.token}"', "Last-Modified": tiny.token, "Server": tiny.token}
    tiny.fault(r"GET /cdn/.*00004-of", skip=3, status=404, headers=named, times=None)
    tiny.fault(r"GET /", headers=named, times=None)
    out = tmp_path / "out"
    words = [str(FOLDER / "scores.pt"), "--model", "org/tiny", "--ratio", "0.5", "-o", str(out)]
    main(["apply", *words, "--json"])
    said = capsys.readouterr()
    assert tiny.token not in said.out + said.err
    assert any(tmp_path.rglob("*"))
    assert_not_on_disk(tmp_path, tiny.token)


def test_a_command_says_on_stderr_that_it_waits_for_whom_and_why(
    tiny: LocalHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.storage.retry._waiting", lambda seconds: iter(()))
    tiny.fault(LISTING, status=429, retry_after=120)
    assert main(["inspect", "hf://org/tiny", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_experts"] > 0
    (line,) = said.err.splitlines()
    assert line.startswith("shardsurgeon: hf://org/tiny: waiting 12")
    assert line.endswith(" s (429 Too Many Requests as the server asks)")


def test_an_endpoint_that_is_no_hub_names_itself(
    tiny: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.fault(LISTING, status=200, body=b"<html>hotel</html>", times=None)
    says = rf"{constants.ENDPOINT} does not answer as a Hub does: its listing is not JSON"
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint("hf://org/tiny")
