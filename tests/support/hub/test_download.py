from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, HfFileSystem, get_session, hf_hub_url

from tests.support.hub.models import add_fixture, fixture_folder
from tests.support.hub.server import LocalHub
from tests.support.hub.wire import Request

SHARD = bytes(range(256)) * 40
FILES = {"config.json": b'{"a": 1}\n', "model.safetensors": SHARD, "sub/notes.txt": b"text\n"}


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_snapshot_is_byte_identical_to_what_was_put_in(online: LocalHub) -> None:
    commit = add_fixture(online, "kimi_linear", "org/tiny")
    snapshot = Path(huggingface_hub.snapshot_download("org/tiny"))
    assert contents(snapshot) == contents(fixture_folder("kimi_linear"))
    assert snapshot.name == commit


def test_a_process_of_its_own_needs_the_environment_only(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add_model("me/tiny", FILES, private=True)
    script = "import huggingface_hub as h; print(h.HfApi().model_info('me/tiny').sha)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **hub.environment(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == commit


def test_facts_of_a_file_are_those_of_its_bytes(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    info = HfApi().model_info("org/tiny", files_metadata=True)
    facts = {one.rfilename: one for one in info.siblings or []}
    shard, config = facts["model.safetensors"], facts["config.json"]
    assert shard.lfs is not None
    assert (shard.size, shard.lfs.sha256) == (len(SHARD), hashlib.sha256(SHARD).hexdigest())
    assert config.lfs is None
    # git hash-object of the nine bytes.
    assert config.blob_id == hashlib.sha1(b'blob 9\0{"a": 1}\n').hexdigest()


def test_a_long_tree_comes_page_by_page(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    online.store.page_length = 2
    entries = list(HfApi().list_repo_tree("org/tiny", recursive=True))
    assert [entry.path for entry in entries] == [
        "config.json",
        "model.safetensors",
        "sub",
        "sub/notes.txt",
    ]
    assert [request.path for request in online.requests] == ["/api/models/org/tiny/tree/main"] * 2


def test_a_tree_may_be_asked_for_level_by_level(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    api = HfApi()
    top = [entry.path for entry in api.list_repo_tree("org/tiny")]
    below = [entry.path for entry in api.list_repo_tree("org/tiny", "sub", expand=True)]
    assert (top, below) == (["config.json", "model.safetensors", "sub"], ["sub/notes.txt"])
    paths = api.get_paths_info("org/tiny", ["sub", "config.json", "missing"])
    assert [path.path for path in paths] == ["sub", "config.json"]


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("0-0", 0, 1), ("100-199", 100, 200), ("10000-", 10000, 10240), ("-16", 10224, 10240)],
)
def test_a_range_brings_those_bytes_and_no_others(
    online: LocalHub, asked: str, begin: int, end: int
) -> None:
    online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "model.safetensors")
    answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
    assert (answer.status_code, answer.content) == (206, SHARD[begin:end])
    assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{len(SHARD)}"
    assert online.sent("GET /cdn/") == end - begin


def test_a_range_beyond_the_end_is_416(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "model.safetensors")
    answer = get_session().get(url, headers={"Range": f"bytes={len(SHARD)}-"})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(SHARD)}"


def test_metadata_stands_on_the_redirect_and_not_in_storage(online: LocalHub) -> None:
    commit = online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "model.safetensors")
    redirect = get_session().head(url, follow_redirects=False)
    storage = get_session().head(redirect.headers["Location"])
    etag = f'"{hashlib.sha256(SHARD).hexdigest()}"'
    assert redirect.status_code == 302
    assert redirect.headers["X-Linked-Etag"] == etag
    assert redirect.headers["X-Linked-Size"] == str(len(SHARD))
    assert redirect.headers["X-Repo-Commit"] == commit
    assert "X-Repo-Commit" not in storage.headers
    assert len(storage.headers["ETag"]) == len(etag)
    assert storage.headers["ETag"] != etag


def test_a_token_reaches_the_hub_and_never_its_storage(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    huggingface_hub.hf_hub_download("org/tiny", "model.safetensors")
    with_token = {request.path.split("/")[1]: request.with_token for request in online.requests}
    assert with_token == {"org": True, "cdn": False}
    url = hf_hub_url("org/tiny", "model.safetensors")
    place = get_session().head(url, follow_redirects=False).headers["Location"]
    twice = get_session().get(place, headers={"Authorization": f"Bearer {online.token}"})
    assert twice.status_code == 400


def test_a_text_file_comes_compressed_and_whole_to_who_allows_it(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "config.json")
    headers = {"Range": "bytes=0-3", "Accept-Encoding": "gzip"}
    with get_session().stream("GET", url, headers=headers) as answer:
        assert answer.status_code == 200
        assert "Content-Length" not in answer.headers
        assert gzip.decompress(b"".join(answer.iter_raw())) == FILES["config.json"]
    plain = get_session().get(url, headers={"Range": "bytes=0-3", "Accept-Encoding": "identity"})
    assert (plain.status_code, plain.content) == (206, FILES["config.json"][:4])


def test_every_kind_of_revision_is_understood(online: LocalHub) -> None:
    first = online.add_model("org/tiny", FILES)
    second = online.commit("org/tiny", {"config.json": b"{}"})
    online.branch("org/tiny", "feature/old", first)
    online.store.repositories["org/tiny"].tags["v1"] = first
    online.store.repositories["org/tiny"].pulls[1] = second
    api = HfApi()
    named = {name: api.model_info("org/tiny", revision=name).sha for name in (first[:8], "v1")}
    named |= {
        name: api.model_info("org/tiny", revision=name).sha
        for name in ("feature/old", "refs/pr/1", "main", first)
    }
    assert named == {
        first[:8]: first,
        "v1": first,
        "feature/old": first,
        "refs/pr/1": second,
        "main": second,
        first: first,
    }
    old = huggingface_hub.hf_hub_download("org/tiny", "config.json", revision="feature/old")
    assert Path(old).read_bytes() == FILES["config.json"]
    refs = api.list_repo_refs("org/tiny", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "feature/old"]
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]


def test_the_file_system_reads_ranges(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    files = HfFileSystem(endpoint=online.endpoint, skip_instance_cache=True)
    assert files.cat_file("org/tiny/model.safetensors", start=5, end=9) == SHARD[5:9]
    assert files.info("org/tiny/model.safetensors")["size"] == len(SHARD)


def test_the_card_is_read_as_the_hub_reads_it(online: LocalHub) -> None:
    card = b"---\nlicense: mit\npipeline_tag: text-generation\ntags:\n- moe\n---\n# A model\n"
    online.add_model("org/tiny", {**FILES, "README.md": card})
    info = HfApi().model_info("org/tiny")
    assert (info.pipeline_tag, info.tags) == ("text-generation", ["moe"])
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert online.read("org/tiny", "README.md") == card


def test_requests_are_told_with_their_bytes(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "model.safetensors")
    get_session().get(url, headers={"Range": "bytes=0-7"})
    sha256 = hashlib.sha256(SHARD).hexdigest()
    assert online.requests == [
        Request("GET", "/org/tiny/resolve/main/model.safetensors", 302, 0, 0, "bytes=0-7", False),
        Request("GET", f"/cdn/org/tiny/{sha256}/model.safetensors", 206, 8, 0, "bytes=0-7", False),
    ]
    assert (online.sent(), online.sent("HEAD"), online.received()) == (8, 0, 0)
    online.reset_counts()
    assert online.requests == []


def test_hashes_of_a_huge_checkpoint_need_not_be_read(hub: LocalHub, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    hub.add_model("org/huge", tmp_path, hashed=False)
    assert hub.files("org/huge") == {"model.safetensors": tmp_path / "model.safetensors"}


def test_an_index_in_a_repository_is_served_as_it_was_written(online: LocalHub) -> None:
    index = json.dumps({"weight_map": {"a": "model.safetensors"}}, indent=2).encode()
    online.add_model("org/tiny", {**FILES, "model.safetensors.index.json": index})
    found = huggingface_hub.hf_hub_download("org/tiny", "model.safetensors.index.json")
    assert Path(found).read_bytes() == index
