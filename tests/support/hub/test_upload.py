from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_session,
    snapshot_download,
)
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub
from tests.support.hub.test_download import contents

SHARD = bytes(range(256)) * 40
SHA256 = hashlib.sha256(SHARD).hexdigest()


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


@pytest.fixture
def mine(online: LocalHub) -> LocalHub:
    HfApi().create_repo("me/out")
    online.reset_counts()
    return online


def test_a_new_repository_begins_with_its_attributes(online: LocalHub) -> None:
    url = HfApi().create_repo("out", private=True)
    assert url.repo_id == "me/out"
    assert list(online.files("me/out")) == [".gitattributes"]
    assert HfApi().model_info("me/out").private
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_repo("me/out")
    assert HfApi().create_repo("me/out", exist_ok=True).repo_id == "me/out"
    HfApi().update_repo_settings("me/out", private=False)
    assert not HfApi().model_info("me/out").private
    HfApi().delete_repo("me/out")
    assert not HfApi().repo_exists("me/out")


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata")
def test_a_folder_arrives_byte_identical(mine: LocalHub) -> None:
    folder = fixture_folder("kimi_linear")
    HfApi().upload_folder(repo_id="me/out", folder_path=folder, commit_message="All of it")
    found = contents(Path(snapshot_download("me/out")))
    del found[".gitattributes"]
    assert found == contents(folder)
    assert mine.commits("me/out") == ["All of it", "initial commit"]
    objects = {path for path in mine.files("me/out") if path.endswith(".safetensors")}
    assert len(objects) == 4
    assert set(mine.uploads.values()) == {1}


def test_a_large_object_goes_in_parts(mine: LocalHub) -> None:
    mine.store.multipart_above, mine.store.part_nbytes = 1000, 4096
    HfApi().upload_file(path_or_fileobj=SHARD, path_in_repo="a.safetensors", repo_id="me/out")
    assert mine.read("me/out", "a.safetensors") == SHARD
    parts = [request for request in mine.requests if request.method == "PUT"]
    assert [part.bytes_received for part in parts] == [4096, 4096, 2048]
    assert not any(part.with_token for part in parts)
    assert mine.uploads == {SHA256: 1}


def test_nothing_is_uploaded_twice(mine: LocalHub) -> None:
    api = HfApi()
    api.upload_file(path_or_fileobj=SHARD, path_in_repo="a.safetensors", repo_id="me/out")
    again = api.upload_file(path_or_fileobj=SHARD, path_in_repo="a.safetensors", repo_id="me/out")
    api.upload_file(path_or_fileobj=SHARD, path_in_repo="b.safetensors", repo_id="me/out")
    assert mine.uploads == {SHA256: 1}
    # The second was no change at all.
    assert mine.store.repositories["me/out"].resolve("main").parent == again.oid
    api.create_repo("me/other")
    api.upload_file(path_or_fileobj=SHARD, path_in_repo="a.safetensors", repo_id="me/other")
    assert mine.uploads == {SHA256: 2}


def test_objects_may_be_sent_long_before_the_commit_that_names_them(mine: LocalHub) -> None:
    api = HfApi()
    early = add("a.safetensors", SHARD)
    api.preupload_lfs_files("me/out", [early])
    assert mine.uploads == {SHA256: 1}
    assert list(mine.files("me/out")) == [".gitattributes"]
    api.create_commit("me/out", [early, add("config.json", b"{}")], commit_message="One")
    assert mine.commits("me/out") == ["One", "initial commit"]
    assert mine.read("me/out", "a.safetensors") == SHARD
    assert mine.uploads == {SHA256: 1}


def test_a_pull_request_leaves_main_as_it_is(mine: LocalHub) -> None:
    before = mine.store.repositories["me/out"].branches["main"]
    made = HfApi().create_commit(
        "me/out", [add("a.safetensors", SHARD)], commit_message="Proposal", create_pr=True
    )
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert mine.store.repositories["me/out"].branches == {"main": before}
    assert mine.read("me/out", "a.safetensors", "refs/pr/1") == SHARD
    HfApi().create_commit(
        "me/out", [add("x.txt", b"x")], commit_message="More", revision="refs/pr/1"
    )
    assert mine.commits("me/out", "refs/pr/1") == ["More", "Proposal", "initial commit"]


def test_who_may_only_read_may_still_propose(online: LocalHub) -> None:
    online.add_model("org/tiny", {"config.json": b"{}"})
    operations = [add("a.safetensors", SHARD)]
    made = HfApi().create_commit("org/tiny", operations, commit_message="Mine", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert online.read("org/tiny", "a.safetensors", "refs/pr/1") == SHARD


def test_a_branch_takes_commits_of_its_own(mine: LocalHub) -> None:
    api = HfApi()
    with pytest.raises(HfHubHTTPError, match="404"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/out", revision="dev/1")
    api.create_branch("me/out", branch="dev/1")
    api.create_branch("me/out", branch="dev/1", exist_ok=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/out", revision="dev/1")
    assert list(mine.files("me/out", "dev/1")) == [".gitattributes", "x"]
    assert list(mine.files("me/out")) == [".gitattributes"]
    api.create_tag("me/out", tag="v1", revision="dev/1")
    assert api.file_exists("me/out", "x", revision="v1")
    api.delete_tag("me/out", tag="v1")
    api.delete_branch("me/out", branch="dev/1")
    assert not api.revision_exists("me/out", "dev/1")


def test_files_can_be_copied_and_deleted(mine: LocalHub) -> None:
    api = HfApi()
    start = [add("a.safetensors", SHARD), add("old/x.txt", b"x"), add("y.txt", b"y")]
    api.create_commit("me/out", start, commit_message="Start")
    operations: list[CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationCopy("a.safetensors", "b.safetensors"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("y.txt"),
    ]
    api.create_commit("me/out", operations, commit_message="Tidy")
    assert list(mine.files("me/out")) == [".gitattributes", "a.safetensors", "b.safetensors"]
    with pytest.raises(HfHubHTTPError, match="404"):
        api.delete_file("y.txt", "me/out")


def test_a_commit_upon_an_outdated_state_is_refused(mine: LocalHub) -> None:
    api = HfApi()
    old = api.model_info("me/out").sha
    mine.commit("me/out", {"theirs.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            "me/out", [add("mine.txt", b"2")], commit_message="Late", parent_commit=old
        )
    assert "mine.txt" not in mine.files("me/out")


def test_a_commit_names_only_what_has_arrived(mine: LocalHub) -> None:
    lines = (
        b'{"key": "header", "value": {"summary": "Bold"}}\n'
        b'{"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": "%s"}}\n'
    )
    answer = get_session().post(
        f"{mine.endpoint}/api/models/me/out/commit/main",
        content=lines % (b"0" * 64),
        headers={"Authorization": f"Bearer {mine.token}"},
    )
    assert answer.status_code == 400
    assert mine.commits("me/out") == ["initial commit"]


def test_bytes_with_another_hash_are_not_kept(mine: LocalHub) -> None:
    batch = {"operation": "upload", "objects": [{"oid": SHA256, "size": len(SHARD)}]}
    url = f"{mine.endpoint}/me/out.git/info/lfs/objects/batch"
    headers = {"Authorization": f"Bearer {mine.token}"}
    told = get_session().post(url, json=batch, headers=headers).json()
    link = told["objects"][0]["actions"]["upload"]["href"]
    assert get_session().put(link, content=SHARD[:-1]).status_code == 400
    assert mine.uploads == {}


def test_a_broken_card_is_refused_before_anything_is_sent(mine: LocalHub) -> None:
    broken = add("README.md", b"---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata") as error:
        HfApi().create_commit("me/out", [broken, add("a.pt", SHARD)], commit_message="Card")
    assert isinstance(error.value.__cause__, BadRequestError)
    assert mine.uploads == {}


def test_attributes_of_the_repository_tell_what_is_large(mine: LocalHub) -> None:
    mine.commit("me/out", {".gitattributes": b"*.special filter=lfs diff=lfs -text\n"})
    additions = [
        add("a.special", b"text"),
        add("b.safetensors", b"text"),
        add("binary.dat", b"a\0b"),
        add("empty.special", b""),
    ]
    HfApi().create_commit("me/out", additions, commit_message="All")
    tree = mine.store.repositories["me/out"].resolve("main").tree
    large = [path for path, blob in tree.items() if blob.sha256 is not None]
    assert large == ["a.special", "binary.dat"]
