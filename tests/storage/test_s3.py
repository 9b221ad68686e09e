"""A bucket of a real S3 server as a source, by s3fs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.errors import CheckpointError, NetworkError, SourceReadError
from shardsurgeon.storage.object_store import StoreSource
from shardsurgeon.storage.retry import RetryPolicy
from tests.support.hub.models import fixture_folder

if TYPE_CHECKING:
    from tests.support.stores.server import LocalS3

pytestmark = pytest.mark.s3

URL = "s3://models/org/tiny"
SHARD = "model-00002-of-00004.safetensors"
FOLDER = fixture_folder("kimi_linear")
WEIGHTS = (FOLDER / SHARD).read_bytes()
QUICK = RetryPolicy(tries=2, first_wait=0.001)


def test_opening_a_model_transfers_its_headers_and_json_and_nothing_else(s3: LocalS3) -> None:
    s3.put_folder(URL, FOLDER)
    s3.reset_counts()
    assert open_checkpoint(URL).num_tensors == 223
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in FOLDER.glob("*.safetensors")
    )
    assert s3.sent(r"GET /models/org/tiny/.*\.safetensors$") == headers
    json = sum((FOLDER / n).stat().st_size for n in ("config.json", "model.safetensors.index.json"))
    assert s3.sent(r"GET /models/org/tiny/.*\.json$") == json


def test_a_folder_is_listed_and_read_by_ranges(s3: LocalS3) -> None:
    s3.put_folder(URL, FOLDER)
    s3.put(f"{URL}/folder/", b"")  # as consoles mark folders
    source = StoreSource(URL)
    files = {p.relative_to(FOLDER).as_posix(): p for p in FOLDER.rglob("*") if p.is_file()}
    listed = {file.name: file.nbytes for file in source.list()}
    assert listed == {name: files[name].stat().st_size for name in sorted(files)}
    assert source.name == "tiny"
    s3.reset_counts()
    assert source.read(SHARD, 1000, 2000) == WEIGHTS[1000:2000]
    assert s3.sent() == 1000
    assert b"".join(source.stream(SHARD, 0, len(WEIGHTS))) == WEIGHTS


def test_the_stamp_is_the_etag_of_now(s3: LocalS3) -> None:
    s3.put_folder(URL, FOLDER)
    source = StoreSource(URL)
    before = {file.name: file.stamp for file in source.list()}
    s3.put(f"{URL}/{SHARD}", WEIGHTS)
    assert {file.name: file.stamp for file in source.list()} == before
    s3.put(f"{URL}/{SHARD}", bytes(b ^ 1 for b in WEIGHTS))
    after = {file.name: file.stamp for file in source.list()}
    assert {name for name in after if after[name] != before[name]} == {SHARD}


def test_what_is_missing_or_cut_short_is_said_by_name(s3: LocalS3) -> None:
    s3.put_folder(URL, FOLDER)
    source = StoreSource(URL, QUICK)
    source.list()
    s3.put(f"{URL}/{SHARD}", WEIGHTS[:50])
    with pytest.raises(SourceReadError, match=f"{SHARD}: ends at byte 50, byte 100 was expected"):
        source.read(SHARD, 0, 100)
    with pytest.raises(SourceReadError, match="there is no such file"):
        source.read("missing", 0, 1)
    for place in ("s3://models/org/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(CheckpointError, match="there is no such folder, or it is empty"):
            StoreSource(place, QUICK).list()


def test_without_a_login_it_is_said_how_to_get_one(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CheckpointError, match=r"the store refuses access \(.*check the login"):
        StoreSource(URL, QUICK).list()


def test_a_server_that_is_not_there_is_given_up(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(NetworkError, match=r"s3://models/org/tiny: gave up after 2 tries"):
        StoreSource(URL, QUICK).list()
