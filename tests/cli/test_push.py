"""`push`, and the words of a push behind `apply`: what is handed on, what is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shardsurgeon.operations.request import Destination, RunOptions
from tests.cli.standins import APPLIED, PUSHED, FakeOperations, Run

APPLY = ("apply", "scores.pt", "--ratio", "0.65")


def test_the_plain_command_hands_on_its_defaults(run: Run, fake: FakeOperations) -> None:
    assert run("push", "out", "me/x").status == 0
    [(args, options)] = fake.calls
    assert args == ("out", Destination("me/x"))
    assert options == {
        "family": None,
        "include": (),
        "exclude": (),
        "follow_links": False,
        "dry_run": False,
        "disk_budget": None,
        "command": "shardsurgeon push out me/x",
    }


def test_every_option_reaches_the_operation(run: Run, fake: FakeOperations) -> None:
    more = ("--private", "--revision", "dev", "--create-pr", "--card", "c.md", "--family", "auto")
    more += ("--include", "eval/*", "--include", "a.md", "--exclude", "LICENSE")
    more += ("--disk-budget", "20GB", "--follow-links")
    run("push", "out", "me/x", *more, "--progress")
    [(args, options)] = fake.calls
    assert args[1] == Destination("me/x", True, "dev", True, "c.md", True)
    assert options == {
        "family": "auto",
        "follow_links": True,
        "include": ("eval/*", "a.md"),
        "exclude": ("LICENSE",),
        "dry_run": False,
        "disk_budget": 20_000_000_000,
        "command": options["command"],
    }
    assert options["command"].startswith("shardsurgeon push out me/x --private ")
    run("push", "out", "me/x", "--no-card")
    assert fake.calls[1][0][1] == Destination("me/x", with_card=False)


def test_the_report(run: Run) -> None:
    said = run("push", "out", "me/Kimi-K2.5-REAP-65pct").stdout
    assert said == (
        "out: pushed to me/Kimi-K2.5-REAP-65pct\n"
        "\n"
        "  pushed        74 files, 200.0 GB in 2000.0 s\n"
        "  sent          150.0 GB\n"
        "  to            https://huggingface.co/me/Kimi-K2.5-REAP-65pct (new repository)\n"
        "  visibility    public\n"
        "  commit        0123456789abcdef0123456789abcdef01234567\n"
        "\n"
        "Serve:\n"
        "  vllm serve me/Kimi-K2.5-REAP-65pct\n"
    )


def test_a_branch_is_served_by_its_name(run: Run, fake: FakeOperations) -> None:
    words = (*(PUSHED.serve or ()), "--revision", "65 pct")
    fake.push = replace(PUSHED, revision="65 pct", created=False, serve=words)
    assert "--revision '65 pct'\n" in run("push", "out", "me/x").stdout


def test_a_pull_request_is_not_served_yet(run: Run, fake: FakeOperations) -> None:
    url = "https://huggingface.co/org/x/discussions/7"
    fake.push = replace(PUSHED, revision=None, pull_request=url, url=url, created=False, serve=None)
    said = run("push", "out", "me/x").stdout
    assert f"{url} (pull request)" in said
    assert "vllm serve" not in said


def test_what_was_removed_and_what_the_hub_said_is_told(run: Run, fake: FakeOperations) -> None:
    fake.push = replace(
        PUSHED,
        removed=("model.safetensors",),
        replaced=("README.md", "config.json"),
        others=("notes.txt",),
        notes=("no licence",),
        left=("a.log", "x/b", "x/c"),
        sent=0,
        private=True,
    )
    said = run("push", "out", "me/x").stdout
    assert "  sent          nothing: it was all there\n" in said
    assert "  visibility    private\n" in said
    assert "  replaced      README.md, config.json (2)\n" in said
    assert "  stays there   notes.txt (1)\n" in said
    assert "  left here     a.log, x/ (3)\n" in said
    assert "removed       an earlier model's model.safetensors" in said
    assert "note          no licence" in said


def test_json_is_the_report(run: Run) -> None:
    assert json.loads(run("push", "out", "me/x", "--json").stdout)["repo_id"] == PUSHED.repo_id


def test_apply_without_a_repository_pushes_nothing(run: Run, fake: FakeOperations) -> None:
    run(*APPLY)
    assert fake.calls[-1][0][2] is None


@pytest.mark.parametrize(
    ("words", "stream", "budget"),
    [
        (("--push-to-hub", "me/x"), False, None),
        (("--stream-push", "me/x"), True, None),
        (("--stream-push", "me/x", "--disk-budget", "20GB"), True, 20 * 10**9),
        (("--push-to-hub", "me/x", "--stream-push", "me/x"), True, None),
    ],
)
def test_apply_hands_on_where_to_push(
    run: Run, fake: FakeOperations, words: tuple[str, ...], stream: bool, budget: int | None
) -> None:
    run(*APPLY, *words, "--private", "--no-verify")
    _, ((_, options, destination), _) = fake.calls
    assert destination == Destination("me/x", True, stream=stream, disk_budget=budget)
    assert options == RunOptions(verify=False)


def test_the_report_of_a_push_behind_apply(run: Run, fake: FakeOperations) -> None:
    fake.apply = replace(APPLIED, push=PUSHED, serve=PUSHED.serve)
    said = run(*APPLY, "--push-to-hub", "me/x").stdout
    assert "written       /models/Kimi-K2.5-REAP-65pct: 72 files" in said
    assert "pushed        74 files, 200.0 GB" in said
    assert said.endswith("Serve:\n  vllm serve me/Kimi-K2.5-REAP-65pct\n")


def test_the_report_of_a_streamed_push(run: Run, fake: FakeOperations) -> None:
    fake.apply = replace(
        APPLIED, out=None, push=PUSHED, bytes_downloaded=201_000_000_000, serve=PUSHED.serve
    )
    said = run(*APPLY, "--stream-push", "me/x").stdout
    assert "streamed      72 files, 200.0 GB in 400.0 s" in said
    assert "downloaded    201.0 GB" in said
    assert "Compare every byte" not in said
    assert said.endswith("\n\nServe:\n  vllm serve me/Kimi-K2.5-REAP-65pct\n")


def test_nothing_is_served_from_a_pull_request_alone(run: Run, fake: FakeOperations) -> None:
    pushed = replace(PUSHED, revision=None, pull_request="https://hub/1", serve=None)
    fake.apply = replace(APPLIED, out=None, push=pushed, serve=None)
    assert "Serve" not in run(*APPLY, "--stream-push", "me/x").stdout
