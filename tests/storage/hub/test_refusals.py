"""What the Hub says no to: one line, what to do, exit status 2, and never a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import constants

from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import CheckpointError, InputError, UsageError
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

FOLDER = fixture_folder("kimi_linear")
Change = Callable[[pytest.MonkeyPatch], None]


def token(value: str) -> Change:
    return lambda patch: patch.setenv("HF_TOKEN", value)


def endpoint(value: str) -> Change:
    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(constants, "ENDPOINT", value)

    return change


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


STRANGER = token(LocalHub.stranger_token)
WRONG = "hf_" + "x" * 34


@pytest.mark.parametrize(
    ("model", "change", "kind", "says"),
    [
        ("hf://org/nothing", nothing, CheckpointError, r"has no such model that this login may"),
        ("hf://org/nothing", token(""), CheckpointError, r"without a login; .*`hf auth login`"),
        ("org/nothing", nothing, CheckpointError, r"^org/nothing: is not a folder here, and http"),
        ("org/tiny@v9", nothing, CheckpointError, r"no revision v9; name a branch, a tag or"),
        ("me/private", STRANGER, CheckpointError, r"has no such model that this login may see"),
        ("me/private", token(""), CheckpointError, r"if it is private, log in with `hf auth"),
        (
            "me/gated",
            STRANGER,
            CheckpointError,
            r"config\.json: is gated.*accept its conditions at ",
        ),
        ("me/gated", token(""), CheckpointError, r"me/gated, then log in with `hf auth login`"),
        ("org/tiny", token(WRONG), InputError, r"does not accept the token.*HF_TOKEN, or log in"),
        ("org/tiny", token("hf_ token"), UsageError, r"^HF_TOKEN: the token holds characters"),
        ("org/tiny", token("hf_tokén"), UsageError, r"^HF_TOKEN: the token holds characters"),
        ("org/tiny", endpoint("hub.local"), UsageError, r"^HF_ENDPOINT: 'hub\.local' is not a web"),
        (
            "hf://org/tiny/sub/folder",
            nothing,
            CheckpointError,
            r"/sub/folder: there is no such folder in the repository",
        ),
        ("hf://datasets/org/x", nothing, UsageError, r"is not a model on the Hub; write it like"),
        ("hf://datasets/org/tiny", nothing, UsageError, r"is not a model on the Hub"),
        ("hf://or--g/tiny", nothing, UsageError, r"is not the name of a repository"),
        (
            "org/pickled",
            nothing,
            CheckpointError,
            r"holds no \.safetensors file, only \.bin, \.gguf",
        ),
    ],
)
def test_one_line_and_what_to_do(
    online: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    change: Change,
    kind: type[InputError],
    says: str,
) -> None:
    online.add_model("org/tiny", FOLDER)
    online.add_model("org/pickled", {"README.md": b"", "a.bin": b"weights", "b.gguf": b"weights"})
    online.add_model("me/private", FOLDER, private=True)
    online.add_model("me/gated", FOLDER, gated=True)
    change(monkeypatch)
    with pytest.raises(kind, match=says):
        open_checkpoint(model)
    monkeypatch.setenv("SHARDSURGEON_DEBUG", "1")
    assert main(["inspect", model]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for secret in (online.token, online.stranger_token, WRONG):
        assert secret not in said.err
    monkeypatch.delenv("SHARDSURGEON_DEBUG")
    assert main(["inspect", model]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_login_that_may_read_a_private_or_gated_model_reads_it(online: LocalHub) -> None:
    online.add_model("me/private", FOLDER, private=True)
    online.add_model("me/gated", FOLDER, gated=True)
    for model in ("me/private", "hf://me/gated@main"):
        assert open_checkpoint(model).num_tensors == 223


def test_a_place_that_is_no_hub_is_told_from_one(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{online.endpoint}/somewhere")
    with pytest.raises(CheckpointError, match=r"does not answer as a Hub does.*check HF_ENDPOINT"):
        open_checkpoint("hf://org/tiny")
