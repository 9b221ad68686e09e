"""`calibrate` as it is typed and as it reports; the operation is a stand-in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.settings import Settings
from tests.cli.standins import CALIBRATED, ESTIMATED, FakeOperations, Run

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


def test_a_dtype_that_was_picked_says_why(run: Run, fake: FakeOperations) -> None:
    why = "8.9 x faster here than the model's bfloat16"
    fake.calibrate = replace(CALIBRATED, dtype="float32", dtype_reason=why, device="cpu")
    assert f"  computed      in float32 on cpu: {why}\n" in run(*LEAST).stdout


def test_what_was_there_before_is_told_apart(run: Run, fake: FakeOperations) -> None:
    fake.calibrate = replace(
        CALIBRATED, total_samples=1024, layers=61, mtp_layers=1, layers_resumed=7, notes=("a note",)
    )
    told = " ".join(run(*LEAST).stdout.split())
    assert "in the file 1,024 samples" in told
    assert "61 MoE layers, 1 of them for next-token prediction, 7 by an earlier run" in told
    assert "note a note" in told


def test_tokens_that_do_not_count_are_told_apart(run: Run, fake: FakeOperations) -> None:
    fake.calibrate = replace(CALIBRATED, counted_tokens=310_720)
    told = " ".join(run(*LEAST).stdout.split())
    assert "512 samples, 1,310,720 tokens in" in told and "counted 310,720 tokens" in told


def test_json_is_the_report(run: Run) -> None:
    document = json.loads(run(*LEAST, "--json").stdout)
    assert document.items() >= {**asdict(CALIBRATED), "notes": [], "parts": []}.items()
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
    words += " --memory 40GB --activation-budget 16GB --extend old.pt --share 2/3 --field body"
    words += " --restart --force --tokenizer t --trust-remote-code --family auto"
    words += " --pack --tokens assistant --skip-invalid"
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
        memory=40_000_000_000,
        skip_invalid=True,
        tokens="assistant",
        pack=True,
    )
    said += f" {words}"
    assert options == {"family": "auto", "restart": True, "force": True, "command": said}


def test_a_dataset_and_a_name_for_the_result_are_needed(run: Run) -> None:
    assert "'--dataset'" in run("calibrate", "-o", "scores.pt").stderr
    assert "'-o'" in run("calibrate", "--dataset", "a.txt").stderr


DRY = """\
Kimi-K2.5: 1,024 samples, at most 16,777,216 tokens

  samples       not drawn: 16,384 tokens each is the most there can be
  computed      61 layers, 60 with experts: 1.37 EFLOP
  note          a note

Estimated, not measured: bytes and operations are counted, speeds assumed.

   machine  in all  products  weights  states   disk  saves   bound by
  --------  ------  --------  -------  ------  -----  -----  ---------
  1 x H200  57 min    57 min     12 s   5 min  4 min      3  computing
  weights, states: over the link, the states both ways at once; disk: weights,
  states in a file, and saves of states for a run that is interrupted

   machine  experts  read   weights  states    moved   device      host
  --------  -------  ----  --------  ------  -------  -------  --------
  1 x H200    layer   1 x  589.5 GB    host  29.3 TB  82.1 GB  240.5 GB
  experts of a layer: all stay ready (layer) or as they are stored, or come in
  groups; read: how often each is; weights: that each device reads; moved: states

  1 x H200      400 TFLOP/s, disk 5.0 GB/s, link 50.0 GB/s, bfloat16; 138.0 GB
                free, 486.0 GB on the host

Dry run: nothing was written.
"""


def test_a_dry_run_needs_a_model_alone_and_says_that_it_estimates(
    run: Run, fake: FakeOperations
) -> None:
    ended = run("calibrate", "m", "--dry-run", "--memory", "40GB")
    assert (ended.status, ended.stdout) == (0, DRY)
    ((model, request, out), options) = fake.calls[0]
    assert (model, out, options) == ("m", None, {"family": None, "force": False})
    assert request == CalibrationRequest("", Settings(), memory=40_000_000_000)
    assert json.loads(run(*LEAST, "--dry-run", "--json").stdout) == ESTIMATED.to_dict()
    ((_, request, out), _) = fake.calls[1]
    assert (request.dataset, out) == ("chats.jsonl", "scores.pt")


def test_a_dry_run_ends_as_the_run_would_where_a_layer_does_not_fit(
    run: Run, fake: FakeOperations
) -> None:
    small = replace(ESTIMATED.machines[0], problem="1 MB is too small", remedy="give more")
    fake.rehearse = replace(ESTIMATED, here=small, machines=(*ESTIMATED.machines, small))
    ended = run("calibrate", "--dry-run")
    assert ended.status == 2
    assert "here          138.0 GB free: 1 MB is too small" in ended.stdout
    assert "does not fit: 1 MB is too small; give more" in ended.stdout
    assert "57 min" in ended.stdout and "the run would stop at once" in ended.stdout
    assert ended.stderr == "shardsurgeon: error: --device cpu: 1 MB is too small; give more\n"
    document = json.loads(run("calibrate", "--dry-run", "--json").stdout)
    assert document["error"]["status"] == 2 and len(document["machines"]) == 2
