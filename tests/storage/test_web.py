"""A folder of a web server as a source: what is found without a listing, and what is read.

The server is the local Hub's, asked as any web server: without a login, by its addresses.
"""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.checkpoint.files import QUANTIZATION_FILES
from shardsurgeon.errors import (
    CheckpointError,
    IndexFileError,
    NetworkError,
    SourceChangedError,
    SourceReadError,
    UsageError,
)
from shardsurgeon.storage.formats.index import INDEX_NAME
from shardsurgeon.storage.retry import RetryPolicy
from shardsurgeon.storage.web import WebSource
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
WEIGHTS = (FOLDER / SHARD).read_bytes()
QUICK = RetryPolicy(first_wait=0.01, longest_wait=0.02)


@pytest.fixture
def address(hub: LocalHub) -> str:
    hub.add_model("org/tiny", FOLDER)
    return f"{hub.endpoint}/org/tiny/resolve/main"


def test_a_model_is_found_by_its_index_its_config_and_the_usual_names(address: str) -> None:
    source = WebSource(address)
    there = {p.relative_to(FOLDER).as_posix(): p for p in FOLDER.rglob("*") if p.is_file()}
    hidden = {"figures/README.md", "scores.pt"}
    assert {file.name: file.nbytes for file in source.list()} == {
        name: path.stat().st_size for name, path in there.items() if name not in hidden
    }
    assert [file.name for file in source.list()] == sorted(there.keys() - hidden)
    assert "modeling_kimi.py" in there  # named by config.json's auto_map
    assert (source.name, source.revision, source.is_remote) == ("main", None, True)


def test_every_list_of_a_quantization_is_looked_for(hub: LocalHub) -> None:
    files = dict.fromkeys(QUANTIZATION_FILES, b"{}")
    hub.add_model("org/lists", {**files, "config.json": b"{}"})
    source = WebSource(f"{hub.endpoint}/org/lists/resolve/main")
    assert {file.name for file in source.list()} == {*files, "config.json"}


def test_a_vocabulary_that_the_tokenizer_config_names_is_found(hub: LocalHub) -> None:
    said = {
        "vocab_file": "own.tiktoken",
        "merges_file": None,
        "spm_file": "/home/me/x",
        "n_file": {},
    }
    files = {"own.tiktoken": b"x", "tokenizer_config.json": json.dumps(said).encode()}
    hub.add_model("org/named", {**files, "config.json": b"{}"})
    source = WebSource(f"{hub.endpoint}/org/named/resolve/main")
    assert {file.name for file in source.list()} == {*files, "config.json"}


def test_that_there_is_no_listing_is_said_with_what_was_found(address: str) -> None:
    (note,) = open_checkpoint(address).notes
    assert note.startswith(f"{address} cannot be listed: beside the weights ")
    assert "tokenizer_config.json" in note
    assert "SHARD" not in note


def test_headers_and_json_are_all_that_travels(hub: LocalHub, address: str) -> None:
    assert open_checkpoint(address).num_tensors == 223
    headers = sum(
        9 + int.from_bytes(path.read_bytes()[:8], "little")  # and the byte that found it
        for path in FOLDER.glob("*.safetensors")
    )
    # What is found as a redirect to storage is a shard or the tokenizer's model.
    assert headers <= hub.sent(r"GET /cdn/") <= headers + 10


def test_ranges_are_read_exactly(address: str) -> None:
    source = WebSource(address)
    assert source.read(SHARD, 1000, 2000) == WEIGHTS[1000:2000]
    assert b"".join(source.stream(SHARD, 0, len(WEIGHTS))) == WEIGHTS
    assert source.local_path(SHARD) is None
    with pytest.raises(SourceReadError, match="there is no such file"):
        source.read("missing", 0, 1)
    with pytest.raises(SourceReadError, match="ends at byte"):
        source.read(SHARD, 0, len(WEIGHTS) + 1)


def test_a_shard_stands_for_its_folder_and_a_query_goes_along(hub: LocalHub, address: str) -> None:
    source = WebSource(f"{address}/{SHARD}?download=true&sig=secret")
    assert source.read("config.json", 0, 1) == b"{"
    assert source.location == address
    assert "secret" not in "".join(source.notes)


class _Locked(BaseHTTPRequestHandler):
    """Has one file, for who has the password."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Basic " + b64encode(b"user:hidden").decode()
        there = self.path == "/tiny/config.json"
        self.send_response(401 if not known else 200 if there else 404)
        self.send_header("Content-Length", "2" if known and there else "0")
        self.end_headers()
        self.wfile.write(b"{}" if known and there else b"")

    def log_message(self, *words: object) -> None:
        pass


def test_passwords_are_used_and_not_shown() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        source = WebSource(f"http://user:hidden@{host}/tiny")
        assert source.location == f"http://{host}/tiny"
        assert source.read("config.json", 0, 2) == b"{}"
        with pytest.raises(CheckpointError, match=r"tiny: there is no config\.json") as caught:
            WebSource(f"http://user:wrong@{host}/tiny")
        assert "wrong" not in str(caught.value)
        server.shutdown()


def test_a_model_without_an_index_is_one_file(hub: LocalHub) -> None:
    hub.add_model("org/one", {"config.json": b"{}", "model.safetensors": b"weights"})
    source = WebSource(f"{hub.endpoint}/org/one/resolve/main/")
    assert [file.name for file in source.list()] == ["config.json", "model.safetensors"]


def test_a_shard_that_is_not_there_is_named(hub: LocalHub, address: str) -> None:
    hub.commit("org/tiny", {SHARD: None})
    with pytest.raises(IndexFileError, match=f"names the shard {SHARD}, which is not there"):
        open_checkpoint(address)


def test_an_index_of_many_shards_that_are_not_there_is_not_asked_for_them_all(
    hub: LocalHub,
) -> None:
    shards = [f"model-{number}-of-3000.safetensors" for number in range(1, 3001)]
    index = {"weight_map": {f"tensor{n}": name for n, name in enumerate(shards)} | {"x": ["no"]}}
    held = {"config.json": b"{}", INDEX_NAME: json.dumps(index).encode()}
    for name in shards[:20]:
        held[name] = b"weights"
    hub.add_model("org/many", held)
    hub.reset_counts()
    source = WebSource(f"{hub.endpoint}/org/many/resolve/main")
    found = [file.name for file in source.list() if file.name.endswith(".safetensors")]
    assert sorted(found) == sorted(shards[:20])
    probes = {request.path for request in hub.requests if "-of-3000" in request.path}
    assert 21 <= len({path.rpartition("/")[2] for path in probes}) < 60


def test_the_first_shard_that_is_not_there_is_the_one_that_is_named(hub: LocalHub) -> None:
    index = json.loads((FOLDER / INDEX_NAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    held = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    del held[names[1]], held[names[3]]
    hub.add_model("org/holes", held)
    with pytest.raises(IndexFileError, match=f"names the shard {names[1]}, which is not there"):
        open_checkpoint(f"{hub.endpoint}/org/holes/resolve/main")


def test_an_index_cannot_name_what_lies_outside(hub: LocalHub) -> None:
    index = json.dumps({"weight_map": {"a": "../secret", "b": "/etc/x", "c": 7}})
    files = {"config.json": b"{}", "model.safetensors.index.json": index.encode()}
    hub.add_model("org/evil", files)
    WebSource(f"{hub.endpoint}/org/evil/resolve/main")
    assert not [request for request in hub.requests if "secret" in request.path]


@pytest.mark.parametrize("more", [b"", b"more"], ids=["as-long", "longer"])
def test_a_file_that_changes_is_refused_by_name(hub: LocalHub, address: str, more: bytes) -> None:
    source = WebSource(address)
    hub.commit("org/tiny", {SHARD: bytes(b ^ 1 for b in WEIGHTS) + more})
    with pytest.raises(SourceChangedError, match=SHARD):
        source.read(SHARD, 0, 100)


def test_a_bad_network_is_survived_byte_for_byte(hub: LocalHub, address: str) -> None:
    hub.fault(r"GET /cdn/", status=503, every=3, times=4)
    hub.fault(r"GET /cdn/", cut_after=10_000, times=5)
    source = WebSource(address, QUICK)
    assert b"".join(source.stream(SHARD, 0, len(WEIGHTS))) == WEIGHTS


def test_a_server_without_ranges_is_refused_for_big_files(
    hub: LocalHub, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsurgeon.storage.http._WHOLE_NBYTES", 100_000)
    source = WebSource(address)
    hub.fault(r"GET /cdn/", ignore_range=True, times=None)
    with pytest.raises(SourceReadError, match="sends whole files only; download the model"):
        source.read(SHARD, 0, 8)


def test_a_folder_without_a_model_is_refused(hub: LocalHub) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json, or it may not be read"):
        WebSource(f"{hub.endpoint}/org/nothing/resolve/main")


def test_an_address_without_a_server_is_refused(hub: LocalHub) -> None:
    with pytest.raises(UsageError, match="names no server"):
        WebSource("https:///models/tiny")
    with pytest.raises(UsageError, match="is not an address"):
        WebSource("https://[half/models/tiny")
    hub.stop()
    with pytest.raises(NetworkError, match="gave up after 4 tries"):
        WebSource(f"{hub.endpoint}/org/tiny", QUICK)
