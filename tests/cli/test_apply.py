"""`apply`: its words and its report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shardsurgeon.operations.request import RunOptions
from shardsurgeon.pruning.request import SelectionRequest
from tests.cli.standins import APPLIED, PLANNED, VERIFIED, FakeOperations, Run

APPLY = ("apply", "scores.pt", "--ratio", "0.65")


def test_the_plain_command_hands_on_its_defaults(run: Run, fake: FakeOperations) -> None:
    run(*APPLY)
    planned, ((pruning, options, destination), _) = fake.calls
    assert planned == (
        (None, "scores.pt", SelectionRequest(ratio=0.65)),
        {
            "out": None,
            "max_shard_nbytes": None,
            "family": None,
            "follow_links": False,
            "recipe": None,
            "evaluation": None,
        },
    )
    assert (pruning.args, pruning.options) == planned
    assert (options, destination) == (RunOptions(), None)


def test_every_option_reaches_the_operation(run: Run, fake: FakeOperations) -> None:
    words = ("--model", "/m", "-o", "/out", "--max-shard-size", "5GB", "--workers", "3")
    words += ("--family", "auto", "--follow-links", "--checksums", "--evaluation", "e.json")
    run(*APPLY, *words, "--no-verify", "--dry-run", "--restart")
    (args, planned), ((_, options, _), _) = fake.calls
    assert args[0] == "/m"
    opening = {"family": "auto", "follow_links": True, "recipe": None, "evaluation": "e.json"}
    assert planned == {"out": "/out", "max_shard_nbytes": 5 * 10**9, **opening}
    expected = RunOptions(3, verify=False, dry_run=True, restart=True, checksums=True)
    assert options == expected


def test_sampling_settings_of_one_option_or_several_reach_the_operation(
    run: Run, fake: FakeOperations
) -> None:
    run(*APPLY, "--sampling", "min-p=0.05, top_k=20", "--sampling", "repetition_penalty=1.1")
    (_, _, request), _ = fake.calls[0]
    assert request.sampling == {"min_p": 0.05, "top_k": 20, "repetition_penalty": 1.1}
    assert (request.ratio, fake.calls[0][1]["out"]) == (0.65, None)


def test_the_shard_size_may_be_the_sources(run: Run, fake: FakeOperations) -> None:
    run(*APPLY, "--max-shard-size", "source")
    assert fake.calls[0][1]["max_shard_nbytes"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ratio", "0.5,0.65"), "2 ratios at once; give one; `shardsurgeon plan` compares"),
        (("--keep", "9", "--max-shard-size", "all"), "--max-shard-size: 'all' is not a size"),
        (("--keep", "9", "--workers", "-1"), "--workers: -1 is less than 0"),
        (("--keep", "9", "--sampling", "min_p"), "--sampling: 'min_p' is not NAME=NUMBER; write"),
        (("--keep", "9", "--sampling", "min_p=.1,"), "--sampling: '' is not NAME=NUMBER"),
        (("--keep", "9", "--sampling", "min_p=2"), "--sampling: min_p is 2; give between 0 and 1"),
        (("--keep", "9", "--sampling", "top_k=nan"), "--sampling: top_k is nan; give a whole"),
        (("--keep", "9", "--sampling", "a=1"), "--sampling: 'a' is no setting; choose temperature"),
        (
            ("--keep", "9", "--sampling", "min_p=0.1", "--sampling", "min-p=0.2"),
            "--sampling: min_p stands there twice; say it once",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_file_is_read(
    run: Run, fake: FakeOperations, words: tuple[str, ...], told: str
) -> None:
    ended = run("apply", "scores.pt", *words)
    assert ended.status == 2
    assert told in ended.stderr
    assert fake.calls == []


def test_the_report_says_what_was_done_and_what_comes_next(run: Run) -> None:
    assert run(*APPLY).stdout == (
        "Kimi-K2.5: keep 135 of 384 experts in each of 2 MoE layers\n"
        "\n"
        "  chosen by     --ratio 0.65, rounding floor, metric reap\n"
        "  saliency      25.0% dropped on average, 37.5% at worst (layer 2)\n"
        "  tensor data   594.0 GB -> 237.6 GB (40.0%)\n"
        "  parameters    1,000.0B -> 372.0B (37.2%)\n"
        "  shards        64 -> 64\n"
        "  written       /models/Kimi-K2.5-REAP-65pct: 72 files, 200.0 GB in 400.0 s\n"
        "                (500.0 MB/s)\n"
        "  checked       structure of all 74,210 tensors, bytes of 512 sampled (1.5 GB)\n"
        "\n"
        "Compare every byte:\n"
        "  shardsurgeon verify /models/Kimi-K2.5 /models/Kimi-K2.5-REAP-65pct\n"
        "Serve:\n"
        "  vllm serve /models/Kimi-K2.5-REAP-65pct\n"
    )


def test_a_resumed_run_says_how_much_was_there(run: Run, fake: FakeOperations) -> None:
    fake.apply = replace(APPLIED, bytes_resumed=37_000_000_000)
    text = " ".join(run(*APPLY).stdout.split())
    assert "(500.0 MB/s), 37.0 GB by an earlier run" in text


@pytest.mark.parametrize("copied", [1_200_000_000, 0])
def test_what_was_shared_is_told_beside_what_was_copied(
    fake: FakeOperations, run: Run, copied: int
) -> None:
    done = {"bytes_copied": copied, "bytes_shared": 208_300_000_000, "seconds": 8.2}
    fake.apply = replace(APPLIED, **done)  # type: ignore[arg-type]
    text = run(*APPLY).stdout
    said = "1.2 GB" if copied else "0 B"
    assert f": 72 files, shared 208.3 GB, copied {said} in 8.2 s checked" in " ".join(text.split())
    document = json.loads(run(*APPLY, "--json").stdout)
    assert done.items() <= document.items()
    assert document["bytes_per_second"] == int((copied + 208_300_000_000) / 8.2)


def test_without_a_check_the_report_says_so(run: Run, fake: FakeOperations) -> None:
    fake.apply = replace(APPLIED, verification=None, source="/models/Kimi-K2.5")
    lines = run(*APPLY).stdout.splitlines()
    assert "  checked       nothing (--no-verify)" in lines
    assert "  shardsurgeon verify /models/Kimi-K2.5 /models/Kimi-K2.5-REAP-65pct" in lines


def test_a_source_without_a_name_is_compared_by_no_command(run: Run, fake: FakeOperations) -> None:
    fake.apply = replace(APPLIED, verification=None)
    assert "shardsurgeon verify" not in run(*APPLY).stdout


@pytest.mark.skipif("os.name == 'nt'", reason="another shell, other quotes")
def test_commands_to_copy_are_quoted(run: Run, fake: FakeOperations) -> None:
    words = ("vllm", "serve", "/my models/small", "--trust-remote-code")
    fake.apply = replace(APPLIED, out="/my models/small", serve=words)
    said = run(*APPLY, "--family", "my family.toml").stdout
    assert "  vllm serve '/my models/small' --trust-remote-code\n" in said
    assert "  shardsurgeon verify /models/Kimi-K2.5 '/my models/small'\n" in said


def test_what_no_engine_is_known_to_serve_is_not_offered_to_be_served(
    run: Run, fake: FakeOperations
) -> None:
    fake.apply = replace(APPLIED, serve=None)
    assert "vllm serve" not in run(*APPLY).stdout


def test_a_dry_run_shows_the_plan_in_full_and_says_that_nothing_was_written(
    run: Run, fake: FakeOperations
) -> None:
    fake.apply = replace(APPLIED, dry_run=True, out=None, verification=None)
    text = run(*APPLY, "--dry-run").stdout
    assert "      1   135     249     0.5     0.25     12.5%\n" in text
    assert "  free space    238.0 GB needed\n" in text
    assert text.endswith("\nDry run: nothing was written.\n")
    assert "vllm" not in text


def test_json_is_the_report(run: Run) -> None:
    document = json.loads(run(*APPLY, "--json").stdout)
    assert document["out"] == "/models/Kimi-K2.5-REAP-65pct"
    assert document["plan"]["num_experts_after"] == PLANNED.num_experts_after
    assert document["verification"]["tensors"] == VERIFIED.tensors
    assert document["bytes_per_second"] == 500_000_000
    assert document == APPLIED.to_dict()
