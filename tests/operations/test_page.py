"""The page of `report`: one file, its numbers those of its files, and nothing in it that acts."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.cli.main import main
from shardsurgeon.errors import (
    CheckpointError,
    InputError,
    KeepListError,
    OutputError,
    ScoreError,
    UsageError,
    install,
)
from shardsurgeon.operations.page import report_page
from shardsurgeon.operations.page_html import Point, Series, curve
from shardsurgeon.pruning.keep_lists import KeepList, LayerKeep
from shardsurgeon.units import format_size
from tests.operations.workbench import scores_of
from tests.support import pages
from tests.support.hub.models import fixture_folder

VALUES = pages.saliencies(4, 16)
KEEP = pages.keep_list(VALUES, 6, preserved=2)
MODEL, SCORES = fixture_folder("kimi_k25"), scores_of("kimi_k25")
# Attributes that make a browser fetch something, or run it.
FETCHING = {"src", "href", "action", "data", "poster", "srcset", "background", "formaction"}


class Elements(HTMLParser):
    """The tags of a page with their attributes, and the text outside of scripts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found[-1:] and self.found[-1][0] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return pages.lay_plan(tmp_path / "plan.json", KEEP, kept=6)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return pages.lay_scores(tmp_path / "scores.json", VALUES)


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    document: dict[str, Any] = json.loads(found[1])
    return document


def text_of(page: Path) -> str:
    return " ".join(" ".join(Elements(page).texts).split())


def with_everything(plan: Path, scores: Path, folder: Path) -> Path:
    (folder / "evaluation.json").write_bytes(pages.evaluation(KEEP).file())
    out = folder / "report.html"
    report_page(
        plan,
        out,
        scores=scores,
        evaluation=folder / "evaluation.json",
        probe=pages.lay_probe(folder / "probe.json"),
        fit=pages.MACHINES,
    )
    return out


def test_the_numbers_in_the_page_are_those_of_plan_and_scores(
    plan: Path, scores: Path, tmp_path: Path
) -> None:
    page = embedded(with_everything(plan, scores, tmp_path))
    planned = json.loads(plan.read_text())["layers"]
    scored = json.loads(scores.read_text())
    assert [str(layer["layer"]) for layer in page["layers"]] == list(planned)
    for layer in page["layers"]:
        said = planned[str(layer["layer"])]
        assert {key: layer[key] for key in said} == said
        assert layer["frequency"] == scored[str(layer["layer"])]["expert_frequency"]


def test_it_is_one_file_that_asks_the_network_for_nothing(
    plan: Path, scores: Path, tmp_path: Path
) -> None:
    page = with_everything(plan, scores, tmp_path)
    elements = Elements(page).found
    assert {"link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in elements
    } <= {"form"}
    for _, attributes in elements:
        assert not FETCHING & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    text = page.read_text(encoding="utf-8")
    assert "@import" not in text and "url(" not in text
    policy = next(a["content"] for t, a in elements if t == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'")


def test_a_full_size_page_is_far_below_six_megabytes(tmp_path: Path) -> None:
    values = pages.saliencies(60, 384)
    plan = pages.lay_plan(tmp_path / "plan.json", pages.keep_list(values, 135))
    scores = pages.lay_scores(tmp_path / "scores.json", values)
    report = report_page(plan, tmp_path / "report.html", scores=scores)
    assert report.nbytes == (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_hostile_text_stays_text_wherever_it_stands(scores: Path, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\u2028'\""
    plan = pages.lay_plan(tmp_path / "plan.json", KEEP, hostile)
    found = json.loads(pages.evaluation(KEEP).file())
    for key in ("model", "dataset", "dtype", "device"):
        found[key] = hostile
    found["notes"] = [hostile]
    for candidate in found["candidates"]:
        candidate["name"] += hostile
    (tmp_path / "e.json").write_text(json.dumps(found))
    probe = json.loads(pages.lay_probe(tmp_path / "probe.json").read_text())
    for setting in probe["settings"]:
        setting["name"] = hostile
        for failure in setting["failures"]:
            failure["kind"] = hostile
    (tmp_path / "probe.json").write_text(json.dumps(probe | {"model": hostile, "url": hostile}))
    out = tmp_path / "report.html"
    files = {"evaluation": tmp_path / "e.json", "probe": tmp_path / "probe.json"}
    report_page(plan, out, scores=scores, **files)
    tags = [tag for tag, _ in Elements(out).found]
    assert tags.count("script") == 2 and "img" not in tags
    assert "alert(1)" in text_of(out) and embedded(out)["model"].startswith("</script>")


def test_secrets_are_redacted(tmp_path: Path) -> None:
    token = "hf_" + "a1" * 16
    plan = pages.lay_plan(tmp_path / "plan.json", KEEP, f"model-{token}")
    report_page(plan, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert token not in text and "hf_***" in text


def test_no_folder_of_the_machine_stands_on_a_page_that_is_sent(
    plan: Path, scores: Path, tmp_path: Path
) -> None:
    found = json.loads(pages.evaluation(KEEP).file()) | {"dataset": f"{tmp_path}/a.jsonl:64,org/b"}
    (tmp_path / "e.json").write_text(json.dumps(found))
    report_page(plan, tmp_path / "r.html", scores=scores, evaluation=tmp_path / "e.json")
    assert str(tmp_path) not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "shardsurgeon plan scores.json --ratio 0.65" in text_of(tmp_path / "r.html")
    assert "--dataset a.jsonl:64,org/b -o e.json" in text_of(tmp_path / "r.html")


def test_what_was_measured_stands_on_the_page(plan: Path, scores: Path, tmp_path: Path) -> None:
    page = with_everything(plan, scores, tmp_path)
    text = text_of(page)
    for said in (
        *("6.12 → 8.391", "0.371 nats", "0.65 (this page)", "+37.1 %", "90,000 tokens of 128"),
        *("31 of 1,000", "3.10 % [2.19 %, 4.37 %]", "+2.70 % [+1.60 %, +3.99 %]", "undecided"),
        *("8 x 80 GB", "240,128 tokens", "shardsurgeon evaluate", "--allocate global"),
    ):
        assert said in text, said
    assert "the evaluation did not measure" not in text.lower()


def test_an_evaluation_of_other_keep_lists_is_said_to_be_one(plan: Path, tmp_path: Path) -> None:
    other = pages.keep_list(VALUES, 7)
    (tmp_path / "e.json").write_bytes(pages.evaluation(other).file())
    report_page(plan, tmp_path / "r.html", evaluation=tmp_path / "e.json")
    assert "The evaluation did not measure the keep-lists of this page." in text_of(
        tmp_path / "r.html"
    )


def test_without_an_evaluation_the_curve_is_the_saliency_that_goes(
    plan: Path, tmp_path: Path
) -> None:
    report_page(plan, tmp_path / "r.html")
    text = text_of(tmp_path / "r.html")
    assert "A share of saliency is no accuracy" in text
    lost = np.sort(VALUES, axis=1).cumsum(axis=1) / VALUES.sum(axis=1, keepdims=True)
    assert f"50%: {100 * lost[:, 7].mean():.1f} %" in text


@pytest.mark.parametrize("family", ["kimi_k25", "deepseek_v3", "qwen3_5_moe"])
def test_a_pruned_folder_and_its_plan_say_the_same(family: str, tmp_path: Path) -> None:
    model, scores = fixture_folder(family), scores_of(family)
    pruning = shardsurgeon.plan(model, scores, ratio=0.5)
    pruning.write_plan(tmp_path / "plan.json")
    shardsurgeon.apply(pruning, tmp_path / "out")
    planned = report_page(tmp_path / "plan.json", tmp_path / "a.html", scores=scores, model=model)
    pruned = report_page(tmp_path / "out", tmp_path / "b.html")
    assert planned.holds == pruned.holds and planned.notes == pruned.notes == ()
    one, other = embedded(tmp_path / "a.html"), embedded(tmp_path / "b.html")
    assert one["layers"] == other["layers"]
    before, after = pruning.report.total_size_before, pruning.report.total_size_after
    said = f"{format_size(before)} → {format_size(after)}"
    assert said in text_of(tmp_path / "a.html") and said in text_of(tmp_path / "b.html")


def test_the_same_files_give_the_same_bytes_and_another_report_stays(
    plan: Path, scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert report_page(plan, out, scores=scores).written
    assert not report_page(plan, out, scores=scores).written
    with pytest.raises(OutputError, match="replace a report with --force"):
        report_page(plan, out)
    assert report_page(plan, out, force=True).written
    (tmp_path / "mine.html").write_text("<!doctype html><p>mine")
    with pytest.raises(OutputError, match="holds something else; choose another -o"):
        report_page(plan, tmp_path / "mine.html", force=True)
    with pytest.raises(OutputError, match="is read by this command"):
        report_page(plan, plan, force=True)


def test_a_page_in_the_models_folder_is_no_part_of_the_model(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    shardsurgeon.plan(model, SCORES, ratio=0.5).write_plan(tmp_path / "plan.json")
    report_page(tmp_path / "plan.json", model / "report.html")
    (model / "about.html").write_text("<!doctype html><p>the model")
    found = shardsurgeon.plan(model, SCORES, ratio=0.5).report
    assert found.left_behind["report.html"] == "report"
    assert "about.html" in found.carried_along


def _other_model(folder: Path) -> dict[str, Any]:
    (folder / "e.json").write_bytes(pages.evaluation(KEEP, "d" * 64).file())
    return {"evaluation": folder / "e.json"}


def _other_scores(folder: Path) -> dict[str, Any]:
    return {"scores": pages.lay_scores(folder / "s.json", pages.saliencies(4, 16, seed=7))}


def _fewer_layers(folder: Path) -> dict[str, Any]:
    return {"scores": pages.lay_scores(folder / "s.json", VALUES[:3])}


def _more_experts(folder: Path) -> dict[str, Any]:
    return {"scores": pages.lay_scores(folder / "s.json", pages.saliencies(4, 32))}


def _other_metric(folder: Path) -> dict[str, Any]:
    rows = {str(n): {"ean_sum": row.tolist()} for n, row in enumerate(VALUES, start=1)}
    (folder / "s.json").write_text(json.dumps(rows))
    return {"scores": folder / "s.json"}


def _no_probe(folder: Path) -> dict[str, Any]:
    (folder / "p.json").write_text("{}")
    return {"probe": folder / "p.json"}


def _broken_probe(folder: Path) -> dict[str, Any]:
    found = json.loads(pages.lay_probe(folder / "p.json").read_text())
    del found["settings"][0]["failures"][0]["low"]
    (folder / "p.json").write_text(json.dumps(found))
    return {"probe": folder / "p.json"}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (_other_model, ScoreError, "config.json has sha256 dddddddddddd…, that of Kimi-K2.5 has"),
        (_other_scores, ScoreError, "layer 1, expert 0: its saliency is"),
        (_fewer_layers, ScoreError, "plan.json: lacks layer 4"),
        (_more_experts, ScoreError, "has 32 experts in layer 1"),
        (_other_metric, ScoreError, "has no metric 'reap', only ean_sum"),
        (_no_probe, UsageError, "is no report of a probe"),
        (_broken_probe, UsageError, "is not what a probe wrote"),
        (lambda folder: {"scores": folder / "none.pt"}, ScoreError, "there is no such file"),
        (lambda folder: {"evaluation": folder / "none.json"}, ScoreError, "there is no such file"),
        (lambda folder: {"model": MODEL}, KeepListError, "was made for Kimi-K2.5, whose"),
    ],
)
def test_what_does_not_belong_to_the_plan_is_refused_and_nothing_written(
    plan: Path, tmp_path: Path, given: Any, error: type[InputError], says: str
) -> None:
    files = given(tmp_path)
    with pytest.raises(error) as caught:
        report_page(plan, tmp_path / "r.html", **files)
    assert says in str(caught.value)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"layers": {"1": {"kept": [0, 1]}}}', "is no plan that was saved here"),
        (b"[", "the plan is not JSON"),
        (
            b'{"kind": "shardsurgeon-plan", "format": 1, "num_experts": 4, "layers": {}}',
            "lists no layer",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(KeepListError, match=says):
        report_page(tmp_path / "plan.json", tmp_path / "r.html")


def test_what_is_no_plan_and_no_folder_is_refused(tmp_path: Path, scores: Path) -> None:
    with pytest.raises(KeepListError, match="holds scores, no plan; give it with --scores"):
        report_page(scores, tmp_path / "r.html")
    with pytest.raises(KeepListError, match="there is no such file or folder; give a file of"):
        report_page("nowhere", tmp_path / "r.html")


def test_a_folder_that_is_no_prune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no record of a prune"):
        report_page(MODEL, tmp_path / "r.html")


def test_a_pruned_folder_takes_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5), tmp_path / "out")
    words = ["report", str(tmp_path / "out"), "-o", str(tmp_path / "r.html")]
    assert main([*words, "--model", str(MODEL)]) == 2
    assert "--model: gives sizes to a plan" in capsys.readouterr().err
    monkeypatch.setenv("SHARDSURGEON_MODEL", str(MODEL))
    assert main(words) == 0


def test_a_curve_keeps_within_its_axes_whatever_it_is_given() -> None:
    wild = [Point(-1.0, 0.0, "a"), Point(0.5, float("inf"), "b"), Point(9.0, 1e300, "c")]
    for points in ([], wild, wild[:1]):
        drawing = curve([Series("all", points)], "KL", lambda share: 1e12 * (1 - share))
        assert "nan" not in drawing and "inf" not in drawing


def test_the_extra_that_draws_is_one_of_the_project() -> None:
    assert install("report").endswith("pip install '.[report]'")


def test_a_pruned_folder_brings_its_own_scores_and_evaluation(tmp_path: Path) -> None:
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5), tmp_path / "out")
    pruned = shardsurgeon.open_checkpoint(tmp_path / "out")
    record = pruned.provenance
    assert record is not None
    digest = str(record.steps[0].source.config_sha256)
    kept = KeepList(32, {n: LayerKeep(x.retained, x.pruned) for n, x in record.layers.items()})
    beside = tmp_path / "out" / "calibration" / "evaluation.json"
    for sha256, measured in ((digest, True), ("d" * 64, False)):
        beside.write_bytes(pages.evaluation(kept, sha256).file())
        report_page(tmp_path / "out", tmp_path / "r.html", force=True)
        assert ("0.65 (this page)" in text_of(tmp_path / "r.html")) is measured
        assert all(layer["frequency"] for layer in embedded(tmp_path / "r.html")["layers"])


def test_a_page_with_machines_is_made_again_by_the_command_that_it_prints(tmp_path: Path) -> None:
    folder = Path("fixtures/kimi_k25").resolve()
    plan = tmp_path / "keep.json"
    shardsurgeon.plan(folder, folder / "scores.pt", keep=16).write_plan(plan)
    out = tmp_path / "report.html"
    shardsurgeon.report(
        plan, out, gpus="1x24GB,2x24GB", context=4096, expert_parallel=True, model=folder
    )
    assert "Where it fits" in text_of(out)
    (command,) = re.findall(r"shardsurgeon (report .*) -o report.html", text_of(out))
    words = [*command.replace("--model kimi_k25", f"--model {folder}").split(), "-o", "again.html"]
    assert "--gpus 1x24GB,2x24GB --context 4096 --expert-parallel" in command
    with chdir(tmp_path):
        assert main(words) == 0
    assert (tmp_path / "again.html").read_bytes() == out.read_bytes()
