"""`calibrate` as it is typed and as it reports; the operation is a stand-in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.settings import Settings
from tests.cli.standins import CALIBRATED, FakeOperations, Run

LEAST = ("calibrate", "--dataset", "chats.jsonl", "-o", "scores.pt")

REPORT = """\
Kimi-K2.5: chats.jsonl:512

  samples       512 samples, 1,310,720 tokens in 4096.0 s (320 tokens/s)
  computed      in bfloat16 on cuda
  scored        60 MoE layers
  never routed  3 experts

Scores saved in scores.pt. Look at them, then prune:
  shardsurgeon scores show scores.pt
  shardsurgeon apply scores.pt --ratio 0.5
"""


def test_the_report_says_what_was_done_and_what_comes_next(run: Run) -> None:
    assert run(*LEAST).stdout == REPORT


def test_what_was_there_before_is_told_apart(run: Run, fake: FakeOperations) -> None:
    fake.calibrate = replace(
        CALIBRATED, total_samples=1024, layers=61, mtp_layers=1, layers_resumed=7, notes=("a note",)
    )
    told = " ".join(run(*LEAST).stdout.split())
    assert "in the file 1,024 samples" in told
    assert "61 MoE layers, 1 of them for next-token prediction, 7 by an earlier run" in told
    assert "note a note" in told


def test_json_is_the_report(run: Run) -> None:
    document = json.loads(run(*LEAST, "--json").stdout)
    assert document.items() >= {**asdict(CALIBRATED), "notes": []}.items()
    assert document["tokens_per_second"] == 320
    assert document == CALIBRATED.to_dict()


def test_words_become_a_request(run: Run, fake: FakeOperations) -> None:
    assert run(*LEAST).status == 0
    ((model, request, out), options) = fake.calls[0]
    assert (model, out) == (None, "scores.pt")
    assert request == CalibrationRequest("chats.jsonl", Settings())
    said = " ".join(("shardsurgeon", *LEAST))
    assert options == {"family": None, "restart": False, "force": False, "command": said}
    words = "m --samples 8 --max-length 16 --seed 7 --device cuda:1 --dtype float32 --batch-size 4"
    words += " --activation-budget 16GB --extend old.pt --share 2/3 --field body --restart --force"
    words += " --tokenizer t --trust-remote-code --family auto"
    assert run(*LEAST, *words.split()).status == 0
    ((model, request, _), options) = fake.calls[1]
    assert model == "m"
    assert request == CalibrationRequest(
        "chats.jsonl",
        Settings(device="cuda:1", dtype="float32", batch_size=4, seed=7),
        samples=8,
        max_length=16,
        share=(2, 3),
        extend="old.pt",
        activation_budget=16_000_000_000,
        field="body",
        tokenizer="t",
        trust_remote_code=True,
    )
    said += f" {words}"
    assert options == {"family": "auto", "restart": True, "force": True, "command": said}


def test_a_dataset_and_a_name_for_the_result_are_needed(run: Run) -> None:
    assert "'--dataset'" in run("calibrate", "-o", "scores.pt").stderr
    assert "'-o'" in run("calibrate", "--dataset", "a.txt").stderr
