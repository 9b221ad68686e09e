from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub.fixture import set_up
from tests.support.hub.server import LocalHub

FILES = {"config.json": b"{}", "model.safetensors": bytes(100)}


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def api(hub: LocalHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def test_the_token_tells_who_one_is(online: LocalHub) -> None:
    me = HfApi().whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("me", ["team"])
    assert me["auth"]["accessToken"]["role"] == "write"
    assert api(online, online.stranger_token).whoami()["name"] == "stranger"


def test_a_wrong_token_is_401_everywhere(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    wrong = api(online, "hf_wrong")
    for call in (wrong.whoami, lambda: wrong.model_info("org/tiny")):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status(error) == 401
        assert not isinstance(error.value, RepositoryNotFoundError)


def test_a_private_repository_looks_missing_to_others(online: LocalHub) -> None:
    online.add_model("me/secret", FILES, private=True)
    for token, expected in ((online.stranger_token, 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api(online, token).model_info("me/secret")
        assert status(error) == expected
        assert not api(online, token).repo_exists("me/secret")
    assert api(online, online.read_token).model_info("me/secret").private
    assert HfApi().repo_exists("me/secret")


def test_a_gated_repository_lists_its_files_and_keeps_them(online: LocalHub) -> None:
    online.add_model("org/gated", FILES, gated=True)
    assert HfApi().model_info("org/gated").gated == "manual"
    assert HfApi().list_repo_files("org/gated") == ["config.json", "model.safetensors"]
    for token, expected in ((online.token, 403), (False, 401)):
        with pytest.raises(GatedRepoError) as error:
            huggingface_hub.hf_hub_download("org/gated", "config.json", token=token)
        assert status(error) == expected
    online.store.repositories["org/gated"].accepted.add("me")
    assert Path(huggingface_hub.hf_hub_download("org/gated", "config.json")).read_bytes() == b"{}"


def test_what_does_not_exist_is_told_apart(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("org/tiny", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.snapshot_download("org/tiny", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("org/tiny", "none.json")
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree("org/tiny", "none"))


def test_writing_needs_the_right_to(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    cases = [
        (online.token, "other/new"),
        (online.read_token, "me/new"),
        (online.stranger_token, "me/new"),
    ]
    for token, id in cases:
        with pytest.raises(HfHubHTTPError) as error:
            api(online, token).create_repo(id)
        assert status(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        api(online, False).create_repo("me/new")
    assert status(error) == 401
    with pytest.raises(HfHubHTTPError) as error:
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/tiny")
    assert status(error) == 403


def test_offline_nothing_is_asked_and_the_cache_still_serves(
    online: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.add_model("org/tiny", FILES)
    home = online.environment(tmp_path)
    set_up(home, monkeypatch)
    kept = huggingface_hub.hf_hub_download("org/tiny", "config.json")
    set_up({**home, "HF_HUB_OFFLINE": "1"}, monkeypatch)
    online.reset_counts()
    assert huggingface_hub.hf_hub_download("org/tiny", "config.json") == kept
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("org/tiny", "model.safetensors")
    assert online.requests == []


def test_an_old_link_is_refused_and_a_new_one_works(online: LocalHub) -> None:
    online.add_model("org/tiny", FILES)
    url = hf_hub_url("org/tiny", "model.safetensors")
    link = get_session().head(url, follow_redirects=False).headers["Location"]
    online.expire_links()
    assert get_session().get(link).status_code == 403
    assert get_session().get(url).content == FILES["model.safetensors"]
    assert get_session().get(link.replace("model.", "other.")).status_code == 403
