"""`evaluate` from a command line to its file: resumed, repeated, refused, and read again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shardsurgeon.cli.main import main
from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise import saving
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.forward import LayerRunner
from shardsurgeon.operations.evaluation_report import read_evaluation
from tests.cli.standins import in_python
from tests.families.specimens import fixture, written
from tests.layerwise.chats import FIXTURES, write_chats

pytestmark = pytest.mark.torch

MODEL = FIXTURES / "qwen3_moe"

# Runs a command and kills itself at the n-th call of a method of the runner or the store.
KILLED = """
import os, signal, sys
from shardsurgeon.layerwise import saving
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.forward import LayerRunner
from shardsurgeon.cli.main import main

saving.SAVE_SECONDS, saving.SAVED_SHARE = 0, 1  # with every layer
name, call = sys.argv[1], int(sys.argv[2])
owner = LayerRunner if name == "logits" else ActivationStore
method, calls = getattr(owner, name), []

def killing(self, *arguments):
    calls.append(name)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *arguments)

setattr(owner, name, killing)
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 8)


def words(out: Path, data: Path | str, *more: str, model: Path = MODEL) -> list[str]:
    """A command line of two candidates."""
    scores = [] if "--plan" in more else [str(model / "scores.pt"), "--ratio", "0.25,0.5"]
    options = ["--samples", "8"] if "--samples" not in more and ":" not in str(data) else []
    options += ["--max-length", "48", "--dtype", "float32", "-o", str(out)]
    return ["evaluate", str(model), *scores, "--dataset", str(data), *options, *more]


def numbers(path: Path) -> dict[str, Any]:
    """What a file says, but for what differs from run to run."""
    found: dict[str, Any] = json.loads(path.read_text())
    return {k: v for k, v in found.items() if k not in ("seconds", "layers_resumed", "out")}


@pytest.fixture(scope="module")
def uninterrupted(chats: Path) -> dict[str, Any]:
    out = chats.with_name("whole.json")
    assert main(words(out, chats)) == 0
    return numbers(out)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("name", "call"), [("keep", 4), ("logits", 2)])
def test_a_killed_run_resumes_to_the_same_numbers(
    tmp_path: Path, chats: Path, uninterrupted: dict[str, Any], name: str, call: int
) -> None:
    out = tmp_path / "e.json"
    done = in_python(KILLED, name, str(call), *words(out, chats), stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert main(words(out, chats)) == 0
    assert numbers(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def interrupt(monkeypatch: pytest.MonkeyPatch, command: list[str], owner: Any, name: str) -> None:
    """Stop the command, as Ctrl-C would, where a method is called."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stop)
        assert main(command) == 130


@pytest.mark.parametrize(("seconds", "resumed"), [(0, 3), (1 << 40, 0)])
def test_layers_count_as_resumed_where_their_output_was_saved(
    tmp_path: Path,
    chats: Path,
    uninterrupted: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    resumed: int,
) -> None:
    """Stopped in the head: what left the last layer is on disk, or is computed again."""
    monkeypatch.setattr(saving, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)
    out, offer = tmp_path / "e.json", saving.Saver.offer
    with monkeypatch.context() as patched:
        # Every save is waited for: the next one is not left out.
        patched.setattr(saving.Saver, "offer", lambda self, *a: (offer(self, *a), self._wait())[0])
        interrupt(monkeypatch, words(out, chats), LayerRunner, "logits")
    assert main(words(out, chats)) == 0
    assert numbers(out) == uninterrupted
    assert json.loads(out.read_text())["layers_resumed"] == resumed


@pytest.mark.parametrize("raw", ["{}", "[", '{"compared": [0.5], "gates": null}'])
def test_a_broken_layer_is_refused(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raw: str,
) -> None:
    out = tmp_path / "e.json"
    interrupt(monkeypatch, words(out, chats), LayerRunner, "logits")
    (tmp_path / "e.json.partial" / "files" / "layer-00001.json").write_text(raw)
    line = refused(capsys, words(out, chats), out)
    assert "layer-00001.json: is not what an evaluation wrote" in line and "--restart" in line
    assert main([*words(out, chats), "--restart"]) == 0


def test_the_same_command_again_runs_nothing_and_another_one_is_refused(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "e.json"
    assert main(words(out, chats)) == 0
    before = out.read_bytes()
    interrupted = monkeypatch.context()
    with interrupted as patched:
        patched.setattr(ActivationStore, "arrange", None)
        assert main(words(out, chats)) == 0
        capsys.readouterr()
        assert main([*words(out, chats), "--seed", "3"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "e.json" in line and "--force" in line
    assert out.read_bytes() == before
    assert main([*words(out, chats), "--seed", "3", "--force"]) == 0
    assert out.read_bytes() != before


def refused(capsys: pytest.CaptureFixture[str], command: list[str], out: Path) -> str:
    """The one line of a command that writes nothing."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    assert sorted(out.parent.iterdir()) == before
    assert main([*command, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"] and sorted(out.parent.iterdir()) == before
    return said.err


def test_data_that_are_too_few_are_refused(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    line = refused(capsys, words(out, f"{chats}:1"), out)
    assert "to predict in 1 sample, and a 99th percentile takes 100" in line
    # Of one part among several.
    other = write_chats(tmp_path / "other.jsonl", 8, seed=2)
    line = refused(capsys, words(out, f"{chats}:8,{other}:1"), out)
    assert "other has" in line and "99th percentile" in line


def test_bad_records_and_bad_requests_get_one_line(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"foo": 1}\n' * 8)
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({n: {"kept": [*range(40)], "keep": 40} for n in range(3)}))
    data = ["--dataset", str(chats), "--samples", "8", "-o", str(out)]
    scores = str(MODEL / "scores.pt")
    for command, says in [
        (words(out, bad), "no field that is known"),
        (["evaluate", str(MODEL), scores, *data], "nothing says what to evaluate"),
        ([*words(out, chats)[:3], "--ratio", "0.5,0.5", *data], "given twice"),
        (words(out, chats, "--metric", "nonsense"), "nonsense"),
        (["evaluate", str(MODEL), str(tmp_path / "none.pt"), "--ratio", "0.5", *data], "none.pt"),
        (["evaluate", str(MODEL), "--ratio", "0.5", *data], "scores"),
        (["evaluate", scores, scores, "--ratio", "0.5", *data], "scores.pt"),
        (["evaluate", str(MODEL), "--plan", str(keep), *data], "keep.json"),
        (["evaluate", str(MODEL), "--plan", str(tmp_path / "no.json"), *data], "no.json"),
        (["evaluate", str(MODEL), scores, "--plan", str(keep), *data], "is not used"),
    ]:
        assert says.lower() in refused(capsys, command, out).lower()


def test_a_plan_of_another_model_is_refused(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "e.json", tmp_path / "plan.json"
    other = FIXTURES / "deepseek_v3"
    scores = str(other / "scores.pt")
    assert main(["plan", "--model", str(other), scores, "--ratio", "0.5", "-o", str(plan)]) == 0
    assert "plan.json" in refused(capsys, words(out, chats, "--plan", str(plan)), out)


def test_what_lies_there_is_not_replaced(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    for more in ([], ["--force"]):
        assert "notes.json" in refused(capsys, words(out, chats, *more), out)
    assert out.read_text() == '{"mine": 1}'
    assert main(words(chats, chats, "--force")) == 2


def test_a_model_without_a_head_is_refused(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(fixture("openai_privacy_filter"), tmp_path / "models")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL / name, model / name)
    out = tmp_path / "e.json"
    line = refused(capsys, words(out, chats, model=model), out)
    assert "has no head that predicts tokens" in line


def test_unequal_keep_lists_are_measured_without_more_words(tmp_path: Path, chats: Path) -> None:
    keep, out = tmp_path / "keep.json", tmp_path / "e.json"
    keep.write_text(
        json.dumps({n: {"kept": [*range(k)], "keep": k} for n, k in enumerate((16, 8, 5))})
    )
    assert main(words(out, chats, "--plan", str(keep))) == 0
    (found,) = read_evaluation(out).candidates
    assert found.removed == pytest.approx(1 - 29 / 48)
    assert found.layers[0].lost_weight == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.update(original=None),
        lambda found: found.update(format=2),
        lambda found: found.update(candidates={}),
        lambda found: found.update(candidates=[[]]),
        lambda found: found.update(tokens="many"),
        lambda found: found.update(notes=5),
        lambda found: found["candidates"][0].update(layers=[{}]),
        lambda found: found["candidates"][0].update(removed="0.5"),
        lambda found: found["original"].update(kl_mean=[[[[]]]]),
        lambda found: found["original"].update(accepted=7),
        lambda found: found["original"].update(tokens=1.5),
        lambda found: found["original"].update(agreement=float("nan")),
        lambda found: found["original"].update(agreement=float("inf")),
        lambda found: found["candidates"][0].update(name=None),
        lambda found: found["candidates"][0].update(parts=3),
        lambda found: found.pop("run"),
    ],
)
def test_a_file_that_no_evaluation_wrote_is_refused(
    tmp_path: Path, uninterrupted: dict[str, Any], chats: Path, spoil: Any
) -> None:
    path = tmp_path / "e.json"
    found = json.loads(chats.with_name("whole.json").read_text())
    path.write_text(json.dumps(found))
    assert read_evaluation(path).to_dict() == found
    spoil(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ScoreError, match=r"e\.json"):
        read_evaluation(path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"kind": "scores"}', b"[" * 100_000, b"\xff"])
def test_what_is_no_evaluation_at_all_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "e.json"
    path.write_bytes(raw)
    with pytest.raises(ScoreError, match=r"e\.json"):
        read_evaluation(path)


def test_only_the_tokens_of_answers_are_predicted_and_texts_have_none(
    tmp_path: Path, chats: Path
) -> None:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "e.json"
    said = "the cat sat on a mat while far stars burned and nobody knew why it mattered"
    records = [
        {"prompt": f"why {n}", "completion": said, "reasoning": "stars " * n} for n in range(8)
    ]
    answers.write_text("\n".join(map(json.dumps, records)))
    assert main(words(out, f"{chats}:8,{answers}:8", "--max-length", "200")) == 0
    report = read_evaluation(out)
    texts, forced = report.original_parts
    assert texts.damage.accepted is None
    found = forced.damage.accepted
    assert found is not None and found.answers == 8
    encode = AutoTokenizer.from_pretrained(MODEL).encode
    lengths = []
    for record in records:
        thought = str(record["reasoning"])
        before = f"<think>\n{thought}\n</think>\n\n" if thought else ""
        lengths.append(len(encode(before + said, add_special_tokens=False)))
    assert forced.damage.tokens == sum(lengths)
    assert found.length == pytest.approx(sum(lengths) / 8)
    assert report.predicted == texts.damage.tokens + forced.damage.tokens
    # Of all samples, those that force an answer alone.
    assert report.original.accepted == found
    for candidate in report.candidates:
        assert candidate.parts[0].damage.accepted is None
        assert candidate.damage.accepted == candidate.parts[1].damage.accepted
        # What a layer does on all tokens is the mean of what it does on each part's.
        weights = [part.damage.tokens for part in candidate.parts]
        for layer, *own in zip(
            candidate.layers, *(part.layers for part in candidate.parts), strict=True
        ):
            for name in ("relative_error", "cosine"):
                values = [getattr(each, name) for each in own]
                mean = np.average(values, weights=weights)
                assert getattr(layer, name) == pytest.approx(mean, rel=1e-12)
            assert layer.lost_weight is not None
            assert {each.layer for each in own} == {layer.layer}
            lost = [each.lost_weight or 0.0 for each in own]
            assert min(lost) <= layer.lost_weight <= max(lost)
        assert candidate.worst_part in (texts.name, forced.name)
