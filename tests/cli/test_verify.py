"""`verify`: identical or not, in words, JSON and status."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.verification.findings import ArchitectureReport
from tests.cli.standins import ROOT, VERIFIED, FakeOperations, Run

VERIFY = ("verify", "/models/Kimi-K2.5", "/models/Kimi-K2.5-REAP-65pct")
ALL = replace(VERIFIED, sampled=None, tensors_compared=74_210, bytes_compared=237_600_000_000)
FITS = ArchitectureReport(
    engine="transformers 5.23.0",
    model_class="DeepseekV3ForCausalLM",
    parameters=1_204,
    tensors=74_210,
    mtp_layers=(61,),
    unchecked=("model.layers.*.eh_proj.weight", "rotary.inv_freq (61 tensors)"),
    differences=(),
)
BROKEN = replace(ALL, differences=("a.weight: differs at byte 7", "b.weight: is missing"))


def test_the_words_reach_the_operation(run: Run, fake: FakeOperations) -> None:
    run(*VERIFY, "--sample", "3")
    run(*VERIFY, "--follow-links")
    folders = ("/models/Kimi-K2.5", "/models/Kimi-K2.5-REAP-65pct")
    plain = {"sample": None, "architecture": False, "family": None}
    assert fake.calls == [
        (folders, {**plain, "sample": 3, "follow_links": False}),
        (folders, {**plain, "follow_links": True}),
    ]


def test_a_proof_that_holds_is_status_0(run: Run, fake: FakeOperations) -> None:
    fake.verify = ALL
    ended = run(*VERIFY)
    assert ended.status == 0
    assert ended.stderr == ""
    assert ended.stdout == (
        "/models/Kimi-K2.5-REAP-65pct: identical\n"
        "\n"
        "  source        /models/Kimi-K2.5\n"
        "  structure     74,210 tensors, index, config, side files, metadata\n"
        "  bytes         237.6 GB of 74,210 tensors (all)\n"
    )


def test_a_sample_is_called_one(run: Run) -> None:
    assert (
        "  bytes         1.5 GB of 512 tensors (a sample of 8 per shard)\n" in run(*VERIFY).stdout
    )


def test_a_sample_without_a_difference_is_identical_as_far_as_sampled(
    run: Run, fake: FakeOperations
) -> None:
    fake.verify = replace(VERIFIED, complete=False, notes=("calibration/x was not compared",))
    ended = run(*VERIFY, "--sample", "8")
    assert (ended.status, ended.stderr) == (0, "")
    assert ended.stdout.startswith("/models/Kimi-K2.5-REAP-65pct: identical as far as sampled\n")
    assert ended.stdout.endswith("  note          calibration/x was not compared\n")
    said = json.loads(run(*VERIFY, "--sample", "8", "--json").stdout)
    assert said["verdict"] == "identical as far as sampled" and said["complete"] is False
    fake.verify = replace(fake.verify, differences=("a: is missing",))
    assert json.loads(run(*VERIFY, "--json").stdout)["verdict"] == "differs"
    fake.verify = ALL
    assert json.loads(run(*VERIFY, "--json").stdout)["verdict"] == "identical"


def test_differences_are_printed_and_end_with_status_1(run: Run, fake: FakeOperations) -> None:
    fake.verify = BROKEN
    ended = run(*VERIFY)
    assert ended.status == 1
    assert ended.stdout.startswith("/models/Kimi-K2.5-REAP-65pct: differs\n")
    assert ended.stdout.endswith("\n  a.weight: differs at byte 7\n  b.weight: is missing\n")
    expected = "/models/Kimi-K2.5-REAP-65pct: 2 differences from /models/Kimi-K2.5; see the report"
    assert ended.stderr == f"shardsurgeon: error: {expected}\n"


def test_differences_as_json_are_the_report_and_status_1(run: Run, fake: FakeOperations) -> None:
    fake.verify = BROKEN
    ended = run(*VERIFY, "--json")
    assert ended.status == 1
    document = json.loads(ended.stdout)
    assert document["differences"] == list(BROKEN.differences) and document["holds"] is False
    assert document.pop("error") == {
        "where": "/models/Kimi-K2.5-REAP-65pct",
        "problem": "2 differences from /models/Kimi-K2.5",
        "remedy": "see the report",
        "status": 1,
    }
    assert document == BROKEN.to_dict()


@pytest.mark.parametrize("sample", ["0", "-3"])
def test_a_sample_of_nothing_is_refused(run: Run, fake: FakeOperations, sample: str) -> None:
    ended = run(*VERIFY, "--sample", sample)
    assert ended.status == 2
    assert f"--sample: {sample} is less than 1" in ended.stderr
    assert fake.calls == []


def test_an_architecture_that_fits_is_said_in_words(run: Run, fake: FakeOperations) -> None:
    fake.verify = replace(ALL, architecture=FITS)
    ended = run(*VERIFY, "--architecture")
    assert fake.calls[0][1]["architecture"] is True
    assert ended.status == 0
    assert ended.stdout.endswith(
        "  architecture  74,210 tensors, 1,204 parameters and buffers of\n"
        "                DeepseekV3ForCausalLM, transformers 5.23.0\n"
        "  MTP layers    61: experts and routers, by the shapes of a main layer\n"
        "  not checked   model.layers.*.eh_proj.weight, rotary.inv_freq (61 tensors)\n"
    )


def test_an_architecture_that_does_not_fit_is_status_1(run: Run, fake: FakeOperations) -> None:
    bias = "gate.bias: shape [384], and the config makes it [135]"
    fake.verify = replace(ALL, architecture=replace(FITS, differences=(bias,)))
    ended = run(*VERIFY, "--architecture")
    assert ended.status == 1
    assert ended.stdout.startswith("/models/Kimi-K2.5-REAP-65pct: differs\n")
    assert ended.stdout.endswith(f"\n\n  {bias}\n")
    expected = "0 differences from /models/Kimi-K2.5, 1 difference from DeepseekV3ForCausalLM"
    assert expected in ended.stderr


def test_the_architecture_is_part_of_the_json(run: Run, fake: FakeOperations) -> None:
    assert json.loads(run(*VERIFY, "--json").stdout)["architecture"] is None
    fake.verify = replace(ALL, architecture=FITS)
    found = json.loads(run(*VERIFY, "--architecture", "--json").stdout)["architecture"]
    assert found == json.loads(json.dumps(asdict(FITS)))


@pytest.mark.parametrize(
    "package", ["torch", pytest.param("transformers", marks=pytest.mark.torch)]
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    folder = str(ROOT / "fixtures" / "qwen3_moe")
    pruned = str(ROOT / "fixtures" / "kimi_k25")
    assert main(["verify", folder, pruned, "--architecture"]) == 2
    assert capsys.readouterr().err == (
        f"shardsurgeon: error: --architecture: needs torch and transformers; {package} is not "
        "installed; in the clone of shardsurgeon, pip install '.[architecture]'\n"
    )
