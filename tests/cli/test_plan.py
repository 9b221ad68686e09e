"""`plan`: words to requests, one plan in full, several side by side."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from shardsurgeon.pruning.request import Allocation, MtpPolicy, Rounding, SelectionRequest
from tests.cli.standins import APPLIED, PLANNED, FakeOperations, Run, layer


def asked(fake: FakeOperations, run: Run, *words: str) -> SelectionRequest:
    ended = run("plan", "scores.pt", *words)
    assert ended.status == 0, ended.stderr
    request = fake.calls[-1][0][2]
    assert isinstance(request, SelectionRequest)
    return request


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (("--ratio", "0.65"), SelectionRequest(ratio=0.65)),
        (("--keep", "72"), SelectionRequest(keep=72)),
        (("--target-size", "122GB"), SelectionRequest(target_size=122 * 10**9)),
        (("--target-size", "1.5GiB"), SelectionRequest(target_size=3 * 2**29)),
        (("--target-size", "122g"), SelectionRequest(target_size=122 * 10**9)),
        (("--ratio", "65%"), SelectionRequest(ratio=0.65)),
        (("--keep", " 72 "), SelectionRequest(keep=72)),
        (("--plan", "keep.json"), SelectionRequest(plan_file="keep.json")),
        (
            ("--ratio", "0.65", "--rounding", "nearest"),
            SelectionRequest(ratio=0.65, rounding=Rounding.NEAREST),
        ),
        (("--keep", "72", "--multiple-of", "8"), SelectionRequest(keep=72, multiple_of=8)),
        (("--keep", "72", "--metric", "ean_sum"), SelectionRequest(keep=72, metric="ean_sum")),
        (
            ("--keep", "72", "--include", "a*", "--include", "b", "--exclude", "c"),
            SelectionRequest(keep=72, include=("a*", "b"), exclude=("c",)),
        ),
        (
            ("--keep", "72", "--preserve-super-experts"),
            SelectionRequest(keep=72, preserve_super_experts=True),
        ),
        (("--keep", "72", "--mtp", "drop"), SelectionRequest(keep=72, mtp=MtpPolicy.DROP)),
        (
            ("--ratio", "0.5", "--allocate", "global"),
            SelectionRequest(ratio=0.5, allocate=Allocation.GLOBAL),
        ),
        (
            ("--ratio", "0.5", "--allocate", "waterfill"),
            SelectionRequest(ratio=0.5, allocate=Allocation.WATERFILL),
        ),
        (
            ("--plan", "keep.json", "--allow-nonuniform"),
            SelectionRequest(plan_file="keep.json", allow_nonuniform=True),
        ),
    ],
)
def test_the_words_become_one_frozen_request(
    run: Run, fake: FakeOperations, words: tuple[str, ...], request_: SelectionRequest
) -> None:
    assert asked(fake, run, *words) == request_


def test_model_and_scores_are_handed_on(run: Run, fake: FakeOperations) -> None:
    run("plan", "scores.pt", "--model", "/models/K2", "--keep", "8")
    run("plan", "--plan", "keep.json")
    assert [args[:2] for args, _ in fake.calls] == [("/models/K2", "scores.pt"), (None, None)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--ratio, --keep, --target-size, --fit, --plan"),
        (("--ratio", "0.5", "--keep", "8"), "--ratio, --keep"),
        (("--ratio", "65"), "65 is not between 0 and 1; did you mean 0.65?"),
        (("--ratio", "0,65"), "did you mean 0.65?"),
        (("--ratio", "nan"), "nan is not between 0 and 1"),
        (("--ratio", "half"), "'half' is not a number"),
        (("--ratio", "0.5,"), "'0.5,' is not a number"),
        (("--ratio", "0.5,1.5"), "1.5 is not between 0 and 1"),
        (("--keep", "0"), "--keep: 0 is less than 1"),
        (("--keep", "-5"), "--keep: -5 is less than 1"),
        (("--keep", "many"), "--keep: 'many' is not a number of experts; write it like 72"),
        (("--keep", "0.65"), "did you mean --ratio 0.35, which keeps 65 % of them?"),
        (("--keep", "65%"), "did you mean --ratio 0.35, which keeps 65 % of them?"),
        (("--keep", "72.5"), "'72.5' is not a number of experts"),
        (("--keep", "0.5,0.6"), "is not a number of experts; write it like 72"),
        (("--target-size", "122"), "did you mean 122GB?"),
        (("--target-size", "big"), "--target-size: 'big' is not a size"),
        (("--keep", "8", "--rounding", "ceil"), "--rounding"),
        (("--plan", "keep.json", "--metric", "reap"), "--metric"),
        (("--plan", "keep.json", "--allocate", "global"), "leave out --allocate"),
        (("--ratio", "0.5,0.65", "-o", "plan.json"), "2 ratios"),
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_any_file_is_read(
    run: Run, fake: FakeOperations, words: tuple[str, ...], told: str
) -> None:
    ended = run("plan", "scores.pt", *words)
    assert ended.status == 2
    assert told in ended.stderr
    assert fake.calls == []


def test_a_plan_in_full(run: Run) -> None:
    assert run("plan", "scores.pt", "--ratio", "0.65").stdout == (
        "Kimi-K2.5: keep 135 of 384 experts in each of 2 MoE layers\n"
        "\n"
        "                       lowest  highest  saliency\n"
        "  layer  kept  pruned    kept   pruned   dropped\n"
        "  -----  ----  ------  ------  -------  --------\n"
        "      1   135     249     0.5     0.25     12.5%\n"
        "      2   135     249     0.5   0.4375     37.5%\n"
        "  saliency dropped: share of a layer's saliency that goes with its experts\n"
        "  a share of saliency is no accuracy; this measures what a prune costs:\n"
        "    shardsurgeon evaluate scores.pt --ratio 0.65 --dataset DATA -o evaluation.json\n"
        "  kB, MB, GB, TB: powers of 1000 bytes; K, M, B: powers of 1000 parameters\n"
        "\n"
        "  chosen by     --ratio 0.65, rounding floor, metric reap\n"
        "  saliency      25.0% dropped on average, 37.5% at worst (layer 2)\n"
        "  tensor data   594.0 GB -> 237.6 GB (40.0%)\n"
        "  parameters    1,000.0B -> 372.0B (37.2%)\n"
        "  shards        64 -> 64\n"
        "  free space    238.0 GB needed\n"
        "  output        /models/Kimi-K2.5-REAP-65pct\n"
    )


def test_a_plan_with_everything_to_say_fits_80_columns(run: Run, fake: FakeOperations) -> None:
    layers = [
        layer(n, preserved=1, never_routed=22, min_retained_saliency=-1.2345e-05)
        for n in range(1, 61)
    ]
    mtp = layer(61, is_mtp=True, policy="router-norm", saliency_dropped=None)
    fake.plan = replace(PLANNED, layers=(*layers, mtp), mtp_dropped=True, notes=("word " * 40,))
    # But for the command to copy, which is on a line of its own however long it gets.
    words = ("plan", "scores.pt", "--ratio", "0.65", "--evaluation", "e.json")
    lines = run(*words, "--layers").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith(" scores") for line in lines) == 60
    row = next(line for line in lines if line.lstrip().startswith("61*"))
    assert row.split() == ["61*", "135", "249", "0", "0", "0.5", "0.25", "-", "router-norm"]
    assert "  * next-token-prediction layer" in lines
    short = run(*words).stdout.splitlines()
    assert max(map(len, short)) <= 80
    assert row.split() in map(str.split, short) and len(short) < len(lines) - 45


def test_many_layers_are_shown_by_their_spread_and_the_worst_five(
    run: Run, fake: FakeOperations
) -> None:
    # Every share from 0.00 to 0.99 once, in no order.
    layers = tuple(
        layer(n, kept=100 + n % 2, saliency_dropped=(37 * n % 101 - 1) / 100) for n in range(1, 101)
    )
    mtp = layer(101, is_mtp=True, policy="router-norm", saliency_dropped=0.999)
    fake.plan = replace(PLANNED, layers=(*layers, mtp))
    words = ("plan", "scores.pt", "--ratio", "0.65")
    table = [line.split() for line in run(*words).stdout.splitlines()[5:]]
    shares = {cells[0]: cells[5] for cells in table[:12] if len(cells) > 5}
    spread = {"lowest": "0.0%", "25%": "24.8%", "median": "49.5%", "75%": "74.2%"}
    assert shares == spread | {"highest": "99.0%"} | {
        # 37 n is 100, 99, 98, 97, 96 modulo 101.
        "30": "99.0%",
        "60": "98.0%",
        "90": "97.0%",
        "19": "96.0%",
        "49": "95.0%",
        "101*": "99.9%",
    }
    kept = {cells[0]: cells[1] for cells in table[:5]}
    assert kept == {
        "lowest": "100",
        "25%": "100",
        "median": "100.5",
        "75%": "101",
        "highest": "101",
    }
    text = run(*words).stdout
    assert "  the 5 that lose most of 101 layers; `shardsurgeon plan --layers` shows each\n" in text
    every = run(*words, "--layers").stdout
    assert sum(line.endswith(" scores") for line in every.splitlines()) == 100
    assert len(json.loads(run(*words, "--json").stdout)["plans"][0]["layers"]) == 101


def test_a_dry_run_shows_the_same_summary(run: Run, fake: FakeOperations) -> None:
    layers = tuple(layer(n) for n in range(1, 61))
    fake.apply = replace(APPLIED, plan=replace(PLANNED, layers=layers), dry_run=True)
    assert (
        "`shardsurgeon plan --layers` shows each"
        in run("apply", "scores.pt", "--ratio", "0.65", "--dry-run").stdout
    )


def test_router_norms_do_not_count_as_saliency_in_the_totals(
    run: Run, fake: FakeOperations
) -> None:
    mtp = layer(3, is_mtp=True, policy="router-norm", saliency_dropped=0.9)
    fake.plan = replace(PLANNED, layers=(*PLANNED.layers, mtp))
    text = run("plan", "scores.pt", "--ratio", "0.65").stdout
    assert "  saliency      25.0% dropped on average, 37.5% at worst (layer 2)\n" in text


def test_a_keep_list_without_saliency_has_no_saliency_columns(
    run: Run, fake: FakeOperations
) -> None:
    bare = {"min_retained_saliency": None, "max_pruned_saliency": None, "saliency_dropped": None}
    fake.plan = replace(
        PLANNED,
        selection="plan",
        ratio=None,
        rounding=None,
        metric=None,
        layers=(layer(1, policy="plan", **bare),),
        total_parameters_before=None,
        total_parameters_after=None,
    )
    text = run("plan", "--plan", "keep.json").stdout
    assert "saliency" not in text
    assert "parameters" not in text
    assert "  chosen by     --plan\n" in text
    assert "      1   135     249    plan\n" in text


def test_a_global_allocation_is_shown_beside_the_uniform_one(
    run: Run, fake: FakeOperations
) -> None:
    layers = (
        layer(1, kept=96, pruned=288, saliency_dropped=0.25, saliency_dropped_uniform=0.125),
        layer(2, kept=174, pruned=210, saliency_dropped=0.125, saliency_dropped_uniform=0.375),
    )
    fake.plan = replace(PLANNED, layers=layers, num_experts_after=174, allocate="global")
    lines = run("plan", "scores.pt", "--ratio", "0.65", "--allocate", "global").stdout.split("\n")
    assert lines[0] == "Kimi-K2.5: keep 96 to 174 of 384 experts in each of 2 MoE layers"
    assert lines[2:7] == [
        "                       lowest  highest  saliency  dropped,",
        "  layer  kept  pruned    kept   pruned   dropped  if equal",
        "  -----  ----  ------  ------  -------  --------  --------",
        "      1    96     288     0.5     0.25     25.0%     12.5%",
        "      2   174     210     0.5     0.25     12.5%     37.5%",
    ]
    assert lines[12:15] == [
        "  chosen by     --ratio 0.65, rounding floor, metric reap, --allocate global",
        "  saliency      18.8% dropped on average, 25.0% at worst (layer 1)",
        "  if equal      25.0% dropped on average, 37.5% at worst (layer 2)",
    ]


def test_several_ratios_are_compared_a_line_each(run: Run, fake: FakeOperations) -> None:
    fake.plan = lambda model, scores, request, **_: replace(PLANNED, ratio=request.ratio)
    assert run("plan", "scores.pt", "--ratio", "0.5,0.65").stdout == (
        "Kimi-K2.5: 2 ratios compared\n"
        "\n"
        "  now           384 experts in each of 2 MoE layers, 594.0 GB of tensor data,\n"
        "                1,000.0B parameters\n"
        "\n"
        "                                              saliency\n"
        "                 tensor  share                 dropped            narrowest\n"
        "  ratio  kept      data   left  parameters  on average  at worst        cut\n"
        "  -----  ----  --------  -----  ----------  ----------  --------  ---------\n"
        "    0.5   135  237.6 GB  40.0%      372.0B       25.0%     37.5%      12.5%\n"
        "   0.65   135  237.6 GB  40.0%      372.0B       25.0%     37.5%      12.5%\n"
        "\n"
        "  saliency dropped: share of a layer's saliency that goes with its experts\n"
        "  a share of saliency is no accuracy; this measures what a prune costs:\n"
        "    shardsurgeon evaluate scores.pt --ratio 0.5,0.65 --dataset DATA -o evaluation.json\n"
        "  narrowest cut: how far the highest pruned saliency stays below the lowest kept\n"
        "  kB, MB, GB, TB: powers of 1000 bytes; K, M, B: powers of 1000 parameters\n"
    )


LEFT = dict.fromkeys([".env", "train.log", "wandb/run-1/a", "wandb/b", "docs/x.log"], "log")


def test_what_is_carried_along_and_left_behind_is_said(run: Run, fake: FakeOperations) -> None:
    fake.plan = replace(PLANNED, carried_along=("LICENSE", "docs/a.md"), left_behind=LEFT)
    fake.apply = replace(APPLIED, plan=fake.plan)
    for command in ("plan", "apply"):
        said = run(command, "scores.pt", "--ratio", "0.65").stdout
        assert (
            "  carried along 2 files\n  left behind   .env, train.log, wandb/, docs/x.log (5)\n"
        ) in said
    (document,) = json.loads(run("plan", "scores.pt", "--ratio", "0.65", "--json").stdout)["plans"]
    assert document["left_behind"] == LEFT
    assert document["carried_along"] == ["LICENSE", "docs/a.md"]


def test_of_many_files_left_behind_some_are_named_and_all_are_counted(
    run: Run, fake: FakeOperations
) -> None:
    left = {f"{number}.log": "log" for number in range(11)}
    fake.plan = replace(PLANNED, left_behind=left)
    said = run("plan", "scores.pt", "--ratio", "0.65").stdout
    assert "7.log, 3 more (11)" in " ".join(said.split())
    assert "8.log" not in said and "carried along" not in said


def test_a_note_that_several_plans_share_is_told_once(run: Run, fake: FakeOperations) -> None:
    fake.plan = replace(PLANNED, notes=("x.bin is left out",))
    assert run("plan", "scores.pt", "--ratio", "0.5,0.65").stdout.count("x.bin is left out") == 1


@pytest.mark.parametrize("ratios", ["0.65", "0.5,0.65,0.75"])
def test_json_has_a_list_of_plans_however_many_there_are(
    ratios: str, run: Run, fake: FakeOperations
) -> None:
    fake.plan = lambda model, scores, request, **_: replace(PLANNED, ratio=request.ratio)
    document = json.loads(run("plan", "scores.pt", "--ratio", ratios, "--json").stdout)
    assert list(document) == ["schema", "version", "plans"]
    assert [plan["ratio"] for plan in document["plans"]] == [*map(float, ratios.split(","))]
    assert all(plan["num_experts_after"] == 135 for plan in document["plans"])
    assert document["plans"][0]["layers"][1]["saliency_dropped"] == 0.375


def test_the_figures_of_the_table_are_in_the_json(run: Run, fake: FakeOperations) -> None:
    scored = [
        layer(1, saliency_dropped=0.25, min_retained_saliency=0.5, max_pruned_saliency=0.25),
        layer(2, saliency_dropped=0.5, kept=96, min_retained_saliency=1.0, max_pruned_saliency=0.9),
        layer(61, policy="router-norm", saliency_dropped=None),
    ]
    fake.plan = replace(PLANNED, layers=tuple(scored))
    (plan,) = json.loads(run("plan", "scores.pt", "--ratio", "0.65", "--json").stdout)["plans"]
    assert (plan["kept_least"], plan["kept_most"], plan["share_left"]) == (96, 135, 0.4)
    assert (plan["saliency_dropped_mean"], plan["saliency_dropped_worst"]) == (0.375, 0.5)
    assert plan["saliency_dropped_worst_layer"] == 2
    assert plan["narrowest_cut"] == pytest.approx(0.1)
    assert plan["saliency_dropped_uniform_mean"] is None


def test_a_number_that_json_lacks_becomes_null(run: Run, fake: FakeOperations) -> None:
    fake.plan = replace(PLANNED, layers=(layer(1, min_retained_saliency=float("inf")),))
    text = run("plan", "scores.pt", "--ratio", "0.65", "--json").stdout
    (plan,) = json.loads(text)["plans"]
    assert plan["layers"][0]["min_retained_saliency"] is None
    assert "Infinity" not in text


def test_the_plan_file_is_written_and_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ended = run("plan", "scores.pt", "--ratio", "0.65", "-o", str(path))
    assert Path(path).read_text() == "keep-lists"
    saved, head, command = ended.stdout.splitlines()[-3:]
    assert saved == f"Keep-lists saved in {path}."
    assert head == "Serve it without writing a model:"
    assert shlex.split(command)[-1] == json.dumps({"plan": str(path)})


def test_with_json_the_plan_file_is_written_and_stdout_stays_one_document(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    ended = run("plan", "scores.pt", "--ratio", "0.65", "-o", str(path), "--json")
    assert path.exists()
    json.loads(ended.stdout)
