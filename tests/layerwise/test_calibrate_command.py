"""`shardsurgeon calibrate`: what it reports and refuses, and `apply` with its scores."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import engine, settings
from shardsurgeon.layerwise import run as calibration
from shardsurgeon.layerwise.calibration_file import read_calibration
from shardsurgeon.layerwise.resume import Partial
from shardsurgeon.scores.files import read_scores
from tests.cli.report_schema import require_valid
from tests.cli.standins import in_python
from tests.layerwise.chats import FIXTURES, sums, words, write_chats
from tests.support.hub.models import add_fixture
from tests.support.hub.server import LocalHub

MODEL = "qwen3_moe"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / MODEL, tmp_path / "model"))


def test_calibrate_then_apply_then_transformers(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, out = tmp_path / "scores.pt", tmp_path / "pruned"
    assert main(words(MODEL, chats, scores)) == 0
    apply = ["apply", str(scores), "--model", str(FIXTURES / MODEL), "--ratio", "0.5"]
    assert main([*apply, "-o", str(out)]) == 0
    assert main(["verify", str(FIXTURES / MODEL), str(out)]) == 0
    original, pruned = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for place in (FIXTURES / MODEL, out)
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("the cat sat on a mat")["input_ids"]])
    kept = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_bytes())["layers"]
    for index, layer in enumerate(original.model.layers):
        layer.mlp.gate.register_forward_hook(only(kept[str(index)]["retained"]))
    with torch.no_grad():
        wanted, found = original(ids).logits, pruned(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def only(retained: list[int]) -> object:
    """A hook that lets a Qwen3 router choose among some experts only, by its own rule."""

    def hook(router: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> object:
        logits = outputs[0]
        masked = torch.full_like(logits, -torch.inf)
        masked[:, retained] = logits[:, retained]
        weights, index = masked.softmax(-1).topk(outputs[2].shape[-1])
        return masked, weights / weights.sum(-1, keepdim=True), index

    return hook


def test_the_report_and_the_file_describe_the_run(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.safetensors"
    spec = ["--dtype", "float32", "--batch-size", "3", "--samples", "6", "--json", "--progress"]
    assert main(words(MODEL, chats, out, *spec)) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    require_valid(report, "calibrate")
    assert "shardsurgeon: calibrating" in captured.err
    settings = read_calibration(out).settings
    samples = read_calibration(out).samples
    assert report["samples"] == len(samples) == 6
    assert report["tokens"] == sum(tokens for _, _, tokens in samples)
    assert max(tokens for _, _, tokens in samples) <= 48
    assert all(source.startswith("chats.jsonl@sha256:") for source, _, _ in samples)
    assert (report["layers"], report["layers_resumed"]) == (3, 0)
    assert settings["dataset"] == "chats.jsonl"  # and nothing of the folder that it lay in
    assert (settings["seed"], settings["max_length"]) == (42, 48)
    assert (settings["dtype"], settings["model"]) == ("float32", MODEL)
    assert settings["versions"]["torch"] == torch.__version__  # type: ignore[index,call-overload]
    tokens = {sums.total_tokens for sums in read_calibration(out).layers.values()}
    assert tokens == {report["tokens"]}
    assert "reap" in read_scores(out).layers[0]


def test_records_that_cannot_be_used_are_counted_in_the_file_and_the_report(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed, out = tmp_path / "mixed.jsonl", tmp_path / "scores.json"
    mixed.write_text('{"messages": []}\n{"text": null}\n' + chats.read_text())
    assert "--skip-invalid" in refused(capsys, words(MODEL, mixed, out))
    assert main(words(MODEL, mixed, out, "--skip-invalid", "--json")) == 0
    (note,) = [n for n in json.loads(capsys.readouterr().out)["notes"] if "invalid" in n]
    assert note.startswith("2 records left out as invalid: ")
    assert "0 its messages are empty" in note and "1 its text is null" in note
    skipped: Any = read_calibration(out).settings["skipped"]
    assert skipped["count"] == 2
    assert sorted(record[1:] for record in skipped["records"]) == [
        [0, "its messages are empty"],
        [1, "its text is null"],
    ]


def refused(capsys: pytest.CaptureFixture[str], command: list[str], status: int = 2) -> str:
    """The one line that a refused command prints; it leaves no OUT.partial."""
    capsys.readouterr()
    assert main(command) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    out = Path(command[command.index("-o") + 1])
    assert not Path(f"{out}.partial").exists()
    return captured.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-length", "50000"], "50,000 tokens are longer than the 40,960 that qwen3_moe"),
        (["--max-length", "0"], "--max-length: 0 is less than 1"),
        (["--samples", "13"], "has 12 records, of which 12 can be drawn; 13 samples were asked"),
        (["--device", "tpu"], "--device: 'tpu' is not a device"),
        (["--device", "cuda:97"], "--device"),
        (["--dtype", "int8"], "--dtype: 'int8' is none of bfloat16, float16, float32, float64"),
        (["--batch-size", "many"], "--batch-size: 'many' is not a number"),
        (["--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["--activation-budget", "much"], "--activation-budget: 'much' is not a size"),
        (["--share", "3/2"], "--share: '3/2' is not a share"),
        (["--share", "1/13"], "--share: 1/13 of 12 samples leaves some shares empty"),
        (["--field", "body"], "has no field 'body'; its fields: messages"),
        (["--extend", "none.pt"], "none.pt"),
        (["--tokenizer", "nowhere"], "nowhere has no tokenizer that transformers can read"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert says in refused(capsys, words(MODEL, chats, tmp_path / "scores.pt", *more))


def test_datasets_that_are_missing_or_empty_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.pt"
    assert "there is no such file" in refused(capsys, words(MODEL, tmp_path / "no.jsonl", out))
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in refused(capsys, words(MODEL, tmp_path / "empty.jsonl", out))


@pytest.mark.parametrize("name", ["scores", "scores.csv"])
def test_a_score_file_of_unknown_format_is_refused(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    refused(capsys, words(MODEL, chats, tmp_path / name))


def test_an_existing_file_is_not_overwritten(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.pt"
    out.write_text("mine")
    assert "exists" in refused(capsys, words(MODEL, chats, out))
    assert out.read_text() == "mine"


@pytest.mark.parametrize("more", [(), ("--extend", "first.pt"), ("--share", "1/2")])
def test_a_calibration_whose_result_is_there_is_done(
    tmp_path: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    fresh = write_chats(tmp_path / "fresh.jsonl", seed=2)
    assert main(words(MODEL, chats, Path("first.pt"))) == 0
    command = words(MODEL, fresh, Path("scores.pt"), *more)
    # A kill between the result and the end leaves the work beside it.
    with monkeypatch.context() as killed:
        killed.setattr(Partial, "clear", lambda self: None)
        assert main(command) == 0
    assert Path("scores.pt.partial").is_dir()
    before, stamp = Path("scores.pt").read_bytes(), Path("scores.pt").stat().st_mtime_ns
    monkeypatch.setattr(calibration, "_run_layers", never)
    capsys.readouterr()
    assert main(command) == main([*command, "--force", "--restart"]) == 0
    assert capsys.readouterr().out.count("3 MoE layers, 3 by an earlier run") == 2
    assert (Path("scores.pt").read_bytes(), Path("scores.pt").stat().st_mtime_ns) == (before, stamp)
    assert not Path("scores.pt.partial").exists()


def never(*arguments: object) -> None:
    raise AssertionError("a layer was run")


def test_another_calibration_makes_way_only_by_force_and_an_input_never(
    tmp_path: Path,
    model: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("scores.pt")
    command = words(MODEL, chats, out)
    command[1] = str(model)
    assert main(command) == 0
    first = out.read_bytes()
    # Another request, and the same one of a model whose weights were written anew.
    others = [[*command, "--seed", "7"], [*command, "--share", "1/2"], command]
    with monkeypatch.context() as stopped:
        stopped.setattr(calibration, "_run_layers", never)
        for number, other in enumerate(others):
            if number == 2:
                shard = model / "model-00001-of-00003.safetensors"
                os.utime(shard, ns=(1, 1))
            line = refused(capsys, other)
            assert "exists and holds something else; choose another -o" in line
            assert "replace a score file with --force" in line
        assert "is read by this command" in refused(
            capsys, [*command, "--extend", str(out), "--force"]
        )
        out.write_text("mine")
        assert "exists and holds something else" in refused(capsys, [*command, "--force"])
    out.write_bytes(first)
    assert main([*command, "--seed", "7", "--force"]) == 0
    assert out.read_bytes() != first


def test_a_model_on_the_hub_gives_the_sums_of_its_folder(
    tmp_path: Path, chats: Path, online: LocalHub
) -> None:
    add_fixture(online, MODEL, "org/model")
    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    assert main(words(MODEL, chats, here)) == 0
    command = words(MODEL, chats, there)
    command[1] = "org/model"
    assert main(command) == 0
    found, expected = sums(there), sums(here)
    assert found.keys() == expected.keys()
    for layer, accumulators in expected.items():
        for name, array in accumulators.arrays().items():
            assert found[layer].arrays()[name].tobytes() == array.tobytes(), (layer, name)


def test_a_model_on_the_hub_without_a_tokenizer_is_named_as_it_was_typed(
    tmp_path: Path, model: Path, chats: Path, online: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    online.add_model("org/mute", model)
    command = words(MODEL, chats, tmp_path / "scores.pt")
    command[1] = "org/mute"
    assert "hf://org/mute@" in refused(capsys, command)


def test_a_model_without_a_tokenizer_is_one_line(
    tmp_path: Path, model: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    command = words(MODEL, chats, tmp_path / "scores.pt")
    command[1] = str(model)
    assert "has no tokenizer that transformers can read" in refused(capsys, command)
    # That of another model with the same words will do.
    assert main([*command, "--tokenizer", str(FIXTURES / MODEL)]) == 0


def test_tokens_outside_the_vocabulary_are_one_line(
    tmp_path: Path, model: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    command = words(MODEL, chats, tmp_path / "scores.pt")
    command[1] = str(model)
    line = refused(capsys, command)
    assert "--tokenizer: gives token" in line and "and the model has 100" in line


def test_a_family_that_transformers_does_not_know_is_one_line(
    tmp_path: Path, model: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "hitherto_unknown"}))
    command = words(MODEL, chats, tmp_path / "scores.pt", "--family", "auto")
    command[1] = str(model)
    assert "hitherto_unknown" in refused(capsys, command)


def test_a_layer_that_does_not_fit_is_refused_before_anything_is_read(
    tmp_path: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shardsurgeon.layerwise import engine

    monkeypatch.setattr(engine, "free_memory", lambda device: 1000)
    line = refused(capsys, words(MODEL, chats, tmp_path / "scores.pt"))
    assert "one layer takes" in line and "1.0 kB are free" in line


@pytest.mark.parametrize("missing", ["torch", "transformers", "psutil", "datasets"])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    found = settings.importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name == missing:
            raise ModuleNotFoundError(name=missing)
        return found(name, package)

    monkeypatch.setattr(settings.importlib, "import_module", without)
    dataset = chats if missing != "datasets" else Path("org/name")
    line = refused(capsys, words(MODEL, dataset, tmp_path / "scores.pt"))
    assert f"needs {missing}, which is not installed" in line
    assert "pip install '.[calibrate]'" in line


def test_weights_that_change_on_the_way_make_no_scores(
    model: Path,
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    real = engine.calibrate_layers

    def then_touched(*given: object, **options: object) -> None:
        real(*given, **options)  # type: ignore[arg-type]
        before = shard.stat()
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(engine, "calibrate_layers", then_touched)
    command = words(str(model), chats, tmp_path / "scores.json")
    assert main(command) == 1
    assert f"{shard.name}: was touched since the run was planned" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()
    assert not (tmp_path / "scores.json.partial").exists()
    monkeypatch.undo()
    assert main(command) == 0


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(
    model: Path, tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    assert main(words(str(model), chats, tmp_path / "scores.json")) == 2
    assert "tokenizer.json: is a FIFO; put the file itself there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--max-length", "50000"],
        ["--samples", "13"],
        ["--share", "1/13"],
        ["--field", "body"],
        ["--extend", "none.pt"],
        ["--dataset", "no.jsonl"],
        ["--dataset", "a.csv:3"],
        ["-o", "scores.xyz"],
        ["--family", "none.toml"],
        ["nowhere"],
        pytest.param(
            ["--device", "cuda"],
            marks=pytest.mark.skipif(
                torch.version.cuda is not None or torch.version.hip is not None,
                reason="this torch is built for a GPU",
            ),
        ),
    ],
    ids=" ".join,
)
def test_what_can_be_refused_without_torch_is_refused_before_it_is_imported(
    tmp_path: Path, chats: Path, more: list[str]
) -> None:
    code = (
        "import sys; from shardsurgeon.cli.main import main\n"
        "status = main(sys.argv[1:]); found = {'torch', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(f'imported {found}' if found else 0 if status == 2 else 'no refusal')"
    )
    given = words(MODEL, chats, tmp_path / "scores.pt")
    if more == ["nowhere"]:
        given, more = ["calibrate", "nowhere", *given[2:]], []
    done = in_python(code, *given, *more, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
