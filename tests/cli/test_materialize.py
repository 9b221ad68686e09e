"""`materialize` from words to the operation, and from its report to lines."""

from __future__ import annotations

import json
from dataclasses import replace

from shardsurgeon.cli.main import Stopped
from shardsurgeon.operations.reports import Refusal
from shardsurgeon.operations.request import RunOptions
from tests.cli.standins import MATERIALIZED, FakeOperations, Run


def test_the_plain_command_hands_on_its_defaults(run: Run, fake: FakeOperations) -> None:
    assert run("materialize", "small-view").status == 0
    [(args, options)] = fake.calls
    assert args == ("small-view", None, RunOptions(command="shardsurgeon materialize small-view"))
    assert options == {"allow_nonuniform": False, "family": None, "follow_links": False}


def test_every_option_reaches_the_operation(run: Run, fake: FakeOperations) -> None:
    more = ("-o", "out", "--dry-run", "--restart", "-j", "3", "--no-verify", "--checksums")
    more += ("--allow-nonuniform",)
    said = run("materialize", "small-view", *more, "--family", "auto", "--follow-links").stdout
    [(args, options)] = fake.calls
    assert args == (
        "small-view",
        "out",
        RunOptions(workers=3, verify=False, dry_run=True, restart=True, checksums=True),
    )
    assert options == {"allow_nonuniform": True, "family": "auto", "follow_links": True}
    assert " --follow-links\n" in said


def test_the_report_says_what_was_written_and_checked(run: Run) -> None:
    assert run("materialize", "small-view").stdout == (
        "Kimi-K2.5-REAP-65pct-view -> /models/Kimi-K2.5-REAP-65pct\n"
        "\n"
        "  source        /models/Kimi-K2.5\n"
        "  written       /models/Kimi-K2.5-REAP-65pct: 74 files, 200.0 GB in 400.0 s\n"
        "                (500.0 MB/s)\n"
        "  checked       structure of all 74,210 tensors, bytes of 512 sampled (1.5 GB)\n"
        "\n"
        "Compare every byte:\n"
        "  shardsurgeon verify /models/Kimi-K2.5 /models/Kimi-K2.5-REAP-65pct\n"
        "Serve:\n"
        "  vllm serve /models/Kimi-K2.5-REAP-65pct\n"
    )


def test_without_a_check_it_says_so(run: Run, fake: FakeOperations) -> None:
    fake.materialize = replace(MATERIALIZED, verification=None, serve=None, family="my.toml")
    said = run("materialize", "small-view", "--no-verify").stdout
    assert "\n  checked       nothing (--no-verify)\n" in said
    assert said.endswith(" /models/Kimi-K2.5-REAP-65pct --family my.toml\n")


def test_a_dry_run_names_the_place_and_the_disk(run: Run, fake: FakeOperations) -> None:
    fake.materialize = replace(
        MATERIALIZED, dry_run=True, space_needed=200_000_500_000, space_free=10**12, serve=None
    )
    said = run("materialize", "small-view", "--dry-run").stdout
    assert "\n  to write      /models/Kimi-K2.5-REAP-65pct: 74 files, 200.0 GB\n" in said
    assert "\n  disk          200.0 GB needed, 1.0 TB free\n" in said
    assert said.endswith("\n\nDry run: nothing was written.\n")


def test_what_a_dry_run_would_stop_at_is_its_end(run: Run, fake: FakeOperations) -> None:
    refusal = Refusal("/models/x", "exists", "choose another -o", 2)
    fake.materialize = replace(MATERIALIZED, dry_run=True, refusal=refusal)
    ended = run("materialize", "small-view", "--dry-run")
    assert ended.status == 2
    assert ended.stdout.endswith("Dry run: nothing was written; the run would stop at once.\n")
    assert ended.stderr == "shardsurgeon: error: /models/x: exists; choose another -o\n"


def test_the_document_is_the_report(run: Run) -> None:
    document = json.loads(run("materialize", "small-view", "--json").stdout)
    assert document["out"] == MATERIALIZED.out
    assert document["bytes_per_second"] == 500_001_250


def test_a_run_that_is_stopped_says_how_to_go_on(run: Run, fake: FakeOperations) -> None:
    fake.materialize = Stopped(143)
    ended = run("materialize", "small-view")
    assert ended.status == 143
    assert ended.stderr == "shardsurgeon: stopped; the same command resumes\n"
