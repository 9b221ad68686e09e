"""Which files of a folder reach the Hub, and that no secret does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.errors import UsageError
from shardsurgeon.operations import api
from shardsurgeon.operations.push_files import refuse_secret, refuse_secrets
from shardsurgeon.storage.source import MemorySource
from tests.operations.workbench import OWN, Shell, digests, scores_of
from tests.support.hub.models import fixture_folder

# Put together here, so that no scanner takes this file for one that tells a secret.
BODY = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0"
TOKENS = {
    "hf_" + BODY + "dEfG": "a Hugging Face token",
    "sk-" + BODY: "an API key",
    "sk-proj-" + BODY: "an API key",
    "sk-ant-api03-" + BODY: "an API key",
    "AKIA" + "IOSFODNN7EXAMPLE": "an AWS key",
    "ghp_" + BODY + "123456": "a GitHub token",
    "github_pat_" + BODY: "a GitHub token",
    "glpat-" + BODY: "a GitLab token",
    "xoxb-" + BODY: "a Slack token",
    "AIza" + BODY + "12345": "a Google API key",
    "-----BEGIN OPENSSH " + "PRIVATE KEY-----": "a private key",
}


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    """A prune with what people leave in its folder."""
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (out / ".env").write_text("x")
    (out / "eval.json").write_text("{}")
    (out / "wandb").mkdir()
    (out / "wandb" / "a.yaml").write_text("x")
    return out


def pushed(shell: Shell, *words: str) -> dict[str, object]:
    report: dict[str, object] = json.loads(shell.good("push", *words, "--json"))
    return report


def test_what_apply_did_not_write_stays_and_is_named(shell: Shell, folder: Path) -> None:
    before = digests(folder)
    report = pushed(shell, str(folder), "me/tiny")
    assert report["left"] == [".env", "eval.json", "wandb/a.yaml"]
    there = set(shell.hub.files("me/tiny"))
    assert there - OWN == before.keys() - OWN - {*report["left"]}  # type: ignore[misc]
    assert digests(folder) == before
    said = shell.good("push", str(folder), "me/tiny")
    assert "  left here     .env, eval.json, wandb/ (3)\n" in said


def test_include_pushes_more(shell: Shell, folder: Path) -> None:
    report = pushed(shell, str(folder), "me/tiny", "--include", "eval*", "--include", "wandb")
    assert report["left"] == [".env"]
    assert {"eval.json", "wandb/a.yaml"} <= set(shell.hub.files("me/tiny"))
    line = shell.refused("push", str(folder), "me/tiny", "--include", "evals*")
    assert "--include: evals* fits none of the" in line


def test_a_card_edited_by_hand_is_pushed_as_it_is(shell: Shell, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert pushed(shell, str(folder), "me/tiny", "--no-card")["notes"] == []
    assert b"Mine." in shell.hub.read("me/tiny", "README.md")


def test_a_folder_of_an_earlier_version_is_judged_by_the_rule(shell: Shell, folder: Path) -> None:
    path = folder / PROVENANCE_NAME
    record = json.loads(path.read_bytes())
    del record["files"]
    path.write_text(json.dumps(record))
    assert pushed(shell, str(folder), "me/tiny")["left"] == [".env", "wandb/a.yaml"]
    assert "eval.json" in shell.hub.files("me/tiny")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md"])
def test_a_secret_is_refused_before_there_is_a_repository(
    shell: Shell, folder: Path, name: str
) -> None:
    token = next(iter(TOKENS))
    (folder / name).write_text(f"one\ntwo {token}\n")
    line = shell.refused("push", str(folder), "me/tiny", "--include", name)
    assert f"{name}: line 2 holds what looks like a Hugging Face token" in line
    assert token not in line
    assert "me/tiny" not in shell.hub.store.repositories


def test_a_file_of_secrets_is_refused_whoever_asks_for_it(shell: Shell, folder: Path) -> None:
    line = shell.refused("push", str(folder), "me/tiny", "--include", ".env")
    assert ".env: is a file of secrets by its name" in line
    assert "me/tiny" not in shell.hub.store.repositories


def test_a_card_of_ones_own_is_searched_too(shell: Shell, folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"---\nlicense: mit\n---\n{next(iter(TOKENS))}\n")
    assert "card.md: line 4 holds" in shell.refused(
        "push", str(folder), "me/tiny", "--card", str(card)
    )
    assert "me/tiny" not in shell.hub.store.repositories


@pytest.mark.parametrize("way", ["--push-to-hub", "--stream-push"])
@pytest.mark.parametrize("where", ["here", "there"])
def test_apply_refuses_a_secret_before_the_long_work(
    shell: Shell, tmp_path: Path, way: str, where: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixture_folder("kimi_k25"), model)
    (model / "run.sh").write_text(f"export HF_TOKEN={next(iter(TOKENS))}\n")
    shell.hub.add_model("org/Tiny", model)
    given = str(model) if where == "here" else "org/Tiny"
    line = shell.refused(
        *("apply", scores_of("kimi_k25"), "--model", given, "--ratio", "0.65"),
        *(way, "me/small", "-o", "out"),
    )
    assert "run.sh: line 1 holds what looks like a Hugging Face token" in line
    assert "me/small" not in shell.hub.store.repositories
    assert list(shell.folder.iterdir()) == []


def test_what_was_included_for_the_folder_is_still_no_secret_to_push(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fixture_folder("kimi_k25"), model)
    (model / ".env").write_text("x")
    plan = api.plan(model, model / "scores.pt", ratio=0.65, out=tmp_path / "out", include=[".env"])
    with pytest.raises(UsageError, match=r"\.env: is a file of secrets"):
        api.apply(plan, push_to_hub="me/small")
    assert not (tmp_path / "out").exists()
    api.apply(plan)
    assert (tmp_path / "out" / ".env").is_file()


def test_the_card_repeats_the_globs(shell: Shell) -> None:
    model = fixture_folder("kimi_k25")
    said = ("--include", "scores.pt", "--exclude", "docs/*")
    words = ("apply", scores_of("kimi_k25"), "--model", str(model), "--ratio", "0.65", *said)
    shell.good(*words, "-o", "out", "--push-to-hub", "me/one")
    shell.good("push", "out", "me/two")
    for repo_id in ("me/one", "me/two"):
        card = shell.hub.read(repo_id, "README.md").decode()
        assert "--include=scores.pt '--exclude=docs/*'" in card
        assert "docs/deploy_guidance.md" not in shell.hub.files(repo_id)


@pytest.mark.parametrize(("token", "kind"), TOKENS.items())
def test_a_token_is_named_by_its_kind_and_line_and_not_shown(token: str, kind: str) -> None:
    for text in (token, f"KEY={token}\n", f'\n{{"key": "{token}"}}', f"a\n'{token}' b"):
        with pytest.raises(UsageError, match=f"holds what looks like {kind}") as refused:
            refuse_secret(text.encode(), "a.txt")
        assert BODY not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "from transformers import hf_hub_download_with_a_long_name_of_words",
        "risk-assessment-framework-evaluation-of-everything",
        "sk-learn-compatible-estimators-for-all",
        "a git hash 0123456789abcdef0123456789abcdef01234567",
        "the words PRIVATE KEY and AKIA",
        "binary \0 hf_" + BODY + "dEfG",
    ],
)
def test_what_only_resembles_a_secret_is_pushed(text: str) -> None:
    refuse_secret(text.encode(), "a.txt")


def test_vocabularies_and_large_files_are_not_searched() -> None:
    token = next(iter(TOKENS)).encode()
    names = ["tokenizer.json", "vocab.json", "merges.txt", "sub/qwen.tiktoken", "tekken.json"]
    source = MemorySource(
        {**dict.fromkeys(names, token), "big.txt": token + b" " * (1 << 20), "none.txt": b""}
    )
    refuse_secrets(source, source.list())
    with pytest.raises(UsageError, match=r"memory/a\.py: line 1"):
        source = MemorySource({"a.py": token})
        refuse_secrets(source, source.list())
