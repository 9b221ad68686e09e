"""What Python callers may give, what they are told in whose words, and what a bar shows."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import shardsurgeon
from shardsurgeon.cli.evaluate import evaluate_command
from shardsurgeon.errors import InputError, OutputError, ScoreError, UsageError
from shardsurgeon.operations import python_calls
from shardsurgeon.operations.python_calls import in_python
from shardsurgeon.operations.score_api import Dtype
from shardsurgeon.pruning.request import Allocation, Lists, MtpPolicy, Rounding
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

MODEL = fixture_folder("kimi_k25")
FILE = scores_of("kimi_k25")


@pytest.fixture(scope="module")
def checkpoint() -> shardsurgeon.Checkpoint:
    return shardsurgeon.open_checkpoint(MODEL)


@pytest.fixture(scope="module")
def reap() -> dict[int, Any]:
    """Layer → REAP's saliencies, as the file has them."""
    _, layers = shardsurgeon.read_scores(FILE).select("reap")
    return {int(layer): np.array(row) for layer, row in layers.items()}


def kept(plan: shardsurgeon.Pruning) -> dict[int, tuple[int, ...]]:
    return {layer: keep.retained for layer, keep in plan.decision.keep.layers.items()}


# Scores without a file

SHAPES: dict[str, Callable[[dict[int, Any]], Any]] = {
    "dict of arrays": lambda reap: reap,
    "dict of lists": lambda reap: {layer: row.tolist() for layer, row in reap.items()},
    "numpy's numbers as keys": lambda reap: {np.int64(n): row for n, row in reap.items()},
    "names as keys": lambda reap: {f"model.layers.{n}.mlp": row for n, row in reap.items()},
    "metrics": lambda reap: {n: {"reap": row, "x": row * 0} for n, row in reap.items()},
    "under a name": lambda reap: {"scores": reap, "dataset": "chats"},
    "2-D array": lambda reap: np.stack([*reap.values()]),
    "list of arrays": lambda reap: [*reap.values()],
    "list of lists": lambda reap: [row.tolist() for row in reap.values()],
    "what read_scores gives": lambda reap: shardsurgeon.read_scores(reap),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_in_memory_choose_as_the_file_does(
    shape: str, checkpoint: shardsurgeon.Checkpoint, reap: dict[int, Any]
) -> None:
    given = SHAPES[shape](reap)
    plan = shardsurgeon.plan(checkpoint, given, ratio=0.65)
    assert kept(plan) == kept(shardsurgeon.plan(MODEL, FILE, ratio=0.65))


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
def test_tensors_of_torch_are_scores_too(
    kind: str, checkpoint: shardsurgeon.Checkpoint, reap: dict[int, Any]
) -> None:
    import torch

    # Places in the order of saliency: few enough for bfloat16 to tell them apart.
    order = {n: row.argsort() for n, row in reap.items()}
    dtype = getattr(torch, kind)
    exact = {n: torch.tensor(ids.argsort() / 32).to(dtype) for n, ids in order.items()}
    for given in (exact, torch.stack([*exact.values()]).requires_grad_(), [*exact.values()]):
        plan = shardsurgeon.plan(checkpoint, given, keep=8)
        assert kept(plan) == {n: tuple(sorted(ids[-8:].tolist())) for n, ids in order.items()}


def test_an_array_that_is_given_stays_as_it_is(reap: dict[int, Any]) -> None:
    array = np.stack([*reap.values()])
    before = array.copy()
    scores = shardsurgeon.read_scores(array)
    assert array.flags.writeable
    array[:] = 0
    assert np.array_equal(scores.rows["saliency"], before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.ones(32), "the table has shape [32]"),
        (np.ones((3, 32), bool), "holds true and false"),
        (np.ones((3, 32), complex), "holds complex numbers"),
        (np.full((3, 32), "a"), "holds text"),
        ({1: None}, "layer 1"),
        ({1: {"reap": object()}}, "layer 1"),
        ({"x": [1.0]}, "names no layer"),
        ({}, "no key names a layer"),
        ([], "shape"),
        (np.ones((2, 32)), "its table has 2 rows, the model has 3 MoE layers"),
    ],
)
def test_what_is_no_table_of_scores_is_refused(
    given: Any, says: str, checkpoint: shardsurgeon.Checkpoint
) -> None:
    with pytest.raises(ScoreError) as caught:
        shardsurgeon.plan(checkpoint, given, keep=8)
    assert caught.value.where == "scores" and says in str(caught.value)


# Ratios


@pytest.mark.parametrize("ratio", ["65%", "0.65", np.float64(0.65), 0.65])
def test_a_ratio_is_a_number_or_a_text(ratio: Any, checkpoint: shardsurgeon.Checkpoint) -> None:
    assert shardsurgeon.plan(checkpoint, FILE, ratio=ratio).report.num_experts_after == 12


@pytest.mark.parametrize("ratios", [[0.25, "50%"], (0.25, 0.5), np.array([0.25, 0.5])])
@pytest.mark.parametrize("opened", [True, False])
def test_of_a_list_of_ratios_the_plans_are_a_list(
    ratios: Any, opened: bool, checkpoint: shardsurgeon.Checkpoint
) -> None:
    plans = shardsurgeon.plan(checkpoint if opened else MODEL, FILE, ratio=ratios)
    assert [plan.report.num_experts_after for plan in plans] == [24, 16]
    assert [plan.out.name for plan in plans] == ["kimi_k25-REAP-25pct", "kimi_k25-REAP-50pct"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"ratio": 65}, "ratio: 65 is not between 0 and 1; did you mean 0.65?"),
        ({"ratio": "much"}, "ratio: 'much' is not a number"),
        ({"ratio": "0.5,0.6"}, "ratio: '0.5,0.6' is 2 ratios; give [0.5, 0.6]"),
        ({"ratio": []}, "ratio: is an empty list"),
        ({"ratio": [0.5, 0.6], "out": "x"}, "out: one folder cannot hold the models of 2 ratios"),
    ],
)
def test_a_ratio_that_is_none_is_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        shardsurgeon.plan(MODEL, FILE, **words)
    assert str(caught.value).startswith(says)


def test_keywords_of_a_calibration_become_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardsurgeon.layerwise import run
    from shardsurgeon.layerwise.request import CalibrationRequest
    from shardsurgeon.layerwise.settings import Settings

    asked: list[Any] = []
    monkeypatch.setattr(run, "calibrate", lambda *given, **named: asked.append(given))
    chosen: dict[str, Any] = {
        "samples": 8,
        "max_length": 16,
        "share": (2, 3),
        "extend": "old.pt",
        "field": "body",
        "tokenizer": "t",
        "trust_remote_code": True,
        "pack": True,
        "tokens": "assistant",
        "skip_invalid": True,
    }
    shardsurgeon.calibrate(
        MODEL, "a.txt", "s.npz", activation_budget="1GB", dtype="float32", **chosen
    )
    settings = Settings(dtype="float32")
    request = CalibrationRequest("a.txt", settings, activation_budget=10**9, **chosen)
    assert asked[0][1] == request
    with pytest.raises(UsageError, match="tokens"):
        shardsurgeon.calibrate(MODEL, "a.txt", "s.npz", tokens="users")  # type: ignore[arg-type]


# Arguments of wrong types

WRONG: dict[str, tuple[Any, ...]] = {
    "open_checkpoint": (3,),
    "open_view": (MODEL, "jax"),
    "read_scores": (3,),
    "plan": (MODEL, 3),
    "apply": ("model",),
    "probe": ("http://localhost:8000/v1", 3, "probe.json"),
    "materialize": ("small-view", 3),
    "push": (MODEL, 3),
    "verify": (MODEL, None),
    "inspect": (3,),
    "fit": (3,),
    "calibrate": (MODEL, 3, "out.npz"),
    "estimate_calibration": (MODEL, 3),
    "evaluate": (MODEL, 3),
    "read_evaluation": (None,),
    "show_scores": (None,),
    "plot_scores": (FILE, None),
    "report": ("plan.json", 3),
    "compare_scores": (FILE, 3),
    "convert_scores": (FILE, None),
    "blend_scores": (FILE, "out.npz"),
    "merge_scores": (FILE, "out.npz"),
    "scores_from_router": (MODEL, 3),
    "scores_from_weights": (MODEL, 3),
    "scores_random": (MODEL, 3),
}


NEEDED = {"evaluate": {"dataset": "chats.txt", "out": "e.json"}}


def test_every_public_function_refuses_wrong_types_and_names_the_argument() -> None:
    functions = [name for name in shardsurgeon.__all__ if name[0].islower()]
    assert set(functions) == WRONG.keys()
    for name, arguments in WRONG.items():
        with pytest.raises(UsageError) as caught:
            getattr(shardsurgeon, name)(*arguments, **NEEDED.get(name, {}))
        assert caught.value.remedy.startswith("give "), name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"keep": "12"}, "keep: '12' is text; give a whole number"),
        ({"keep": 12.0}, "keep: 12.0 is a number; give a whole number"),
        ({"keep": True}, "keep: True is a bool; give a whole number"),
        ({"keep": 12, "mtp": "none"}, "mtp: 'none' is none of router-norm, last, keep, drop"),
        ({"keep": 12, "rounding": 3}, "rounding: 3 is a whole number; give one of floor, nearest,"),
        ({"keep": 12, "include": 3}, "include: 3 is a whole number; give text or a list"),
        ({"keep": 12, "exclude": [3]}, "exclude: [3] is a list; give text or a list"),
        ({"keep": 12, "out": 3}, "out: 3 is a whole number; give a path"),
        ({"keep": 12, "allow_nonuniform": "yes"}, "allow_nonuniform: 'yes' is text; give True or"),
        ({"target_size": []}, "target_size: [] is a list; give a whole number or text"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(words: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        shardsurgeon.plan(MODEL, FILE, **words)
    assert str(caught.value).startswith(says)


def test_numbers_of_numpy_are_numbers(checkpoint: shardsurgeon.Checkpoint) -> None:
    report = shardsurgeon.plan(checkpoint, FILE, keep=np.int32(12)).report
    assert report.num_experts_after == 12
    assert report.to_dict()["plans"][0]["num_experts_after"] == 12


def test_one_glob_is_as_good_as_a_list_of_one(checkpoint: shardsurgeon.Checkpoint) -> None:
    left = [
        shardsurgeon.plan(checkpoint, FILE, keep=12, exclude=globs).report.left_behind
        for globs in ("docs/*", ["docs/*"])
    ]
    assert left[0] == left[1] and "docs/deploy_guidance.md" in left[0]


def test_a_keyword_that_there_is_not_is_a_type_error_as_always_in_python() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'ration'"):
        shardsurgeon.plan(MODEL, FILE, ration=0.5)  # type: ignore[call-overload]


def test_the_words_that_types_list_are_those_of_the_command_line() -> None:
    from shardsurgeon.layerwise.settings import DTYPES

    for names, kind in (
        (python_calls.RoundingName, Rounding),
        (python_calls.MtpName, MtpPolicy),
        (python_calls.AllocationName, Allocation),
        (python_calls.ListsName, Lists),
    ):
        assert [*get_args(names)] == [str(each) for each in kind]
    assert get_args(Dtype) == DTYPES


# Messages


@pytest.mark.parametrize(
    ("said", "in_words"),
    [
        ("choose another -o", "choose another out="),
        ("give one of --ratio, --keep, --plan", "give one of ratio=, keep=, plan_file="),
        ("say --lists kept or --lists dropped", 'say lists="kept" or lists="dropped"'),
        ("run it again with --restart", "run it again with restart=True"),
        ("correct the card, or push with --no-card", "correct the card, or push with card=False"),
        ("--push-to-hub REPO_ID pushes", "push_to_hub=REPO_ID pushes"),
        ("give --max-shard-size 5GB, --ratio 0.5.", 'give max_shard_size="5GB", ratio=0.5.'),
        ("--exclude a_b.json leaves it behind", 'exclude="a_b.json" leaves it behind'),
        ("give it as SCORES, with --ratio", "give it as scores, with ratio="),
        ("`shardsurgeon plan --ratio 0.5` says", "`shardsurgeon plan --ratio 0.5` says"),
        ("pass --unknown-option or x--keep", "pass --unknown-option or x--keep"),
        ("a-out.json has -operation", "a-out.json has -operation"),
    ],
)
def test_a_message_says_keywords_where_the_command_line_has_options(
    said: str, in_words: str
) -> None:
    assert in_python(said) == in_words


def test_errors_of_the_functions_speak_python(tmp_path: Path) -> None:
    plan = shardsurgeon.plan(MODEL, FILE, keep=12, out=tmp_path / "out")
    there = tmp_path / "random.npz"
    shardsurgeon.scores_random(MODEL, there, seed=1)
    calls: list[tuple[type[InputError], Callable[[], object], str]] = [
        (UsageError, lambda: shardsurgeon.plan(MODEL, FILE, ratio=1.5), "ratio: 1.5 is not"),
        (UsageError, lambda: shardsurgeon.plan(MODEL, FILE), "give one of ratio=, keep="),
        (OutputError, lambda: shardsurgeon.apply(plan, MODEL), "choose another out="),
        (OutputError, lambda: plan.write_plan(MODEL / "config.json"), "choose another path="),
        (OutputError, lambda: shardsurgeon.scores_random(MODEL, there), "force=True"),
        (UsageError, lambda: shardsurgeon.scores_random(MODEL, "x.npz", seed=-1), "seed: -1"),
        (UsageError, lambda: shardsurgeon.apply(plan, workers=-1), "workers: -1 is not"),
    ]
    for kind, call, says in calls:
        with pytest.raises(kind) as caught:
            call()
        assert says in str(caught.value)
        assert "--" not in str(caught.value) and " -o" not in str(caught.value)


# Bars


def test_progress_shows_a_bar_of_the_bytes(tmp_path: Path) -> None:
    plan = shardsurgeon.plan(MODEL, FILE, ratio=0.65)
    seen: list[int] = []
    with redirect_stderr(io.StringIO()) as said:
        shardsurgeon.apply(
            plan, tmp_path / "out", progress=True, on_progress=lambda now: seen.append(now.done)
        )
    assert "5/5 shards" in said.getvalue() and "100%" in said.getvalue() and seen[-1] > 500_000
    with redirect_stderr(io.StringIO()) as said:
        assert shardsurgeon.verify(MODEL, tmp_path / "out", progress=True).holds
    assert "100%" in said.getvalue()
    with redirect_stderr(io.StringIO()) as said:
        shardsurgeon.verify(MODEL, tmp_path / "out")
        shardsurgeon.scores_from_weights(MODEL, tmp_path / "quiet.npz")
    assert said.getvalue() == ""
    with redirect_stderr(io.StringIO()) as said:
        shardsurgeon.scores_from_weights(MODEL, tmp_path / "weights.npz", progress=True)
    assert "100%" in said.getvalue()


def test_an_evaluation_may_be_asked_for_as_a_calibration_and_as_on_the_command_line() -> None:
    asked = inspect.signature(shardsurgeon.evaluate).parameters
    calibrated = inspect.signature(shardsurgeon.calibrate).parameters
    # What is about sums that are added up, and what says what is measured.
    sums = {"extend", "share", "pack"}
    prunes = {"scores", "ratio", "keep", "plan_files", "metric", "allocate", "lists"}
    assert asked.keys() - calibrated.keys() == prunes
    assert calibrated.keys() - asked.keys() == sums
    same = asked.keys() - prunes - {"dataset", "out"}
    assert {name: asked[name].default for name in same} == {
        name: calibrated[name].default for name in same
    }
    shown = {"as_json", "verbose", "quiet", "layers"}
    typed = {each.name for each in evaluate_command.params} - shown
    assert typed - {"words"} | {"scores", "on_progress"} == asked.keys()


def test_an_estimate_is_of_everything_that_a_calibration_may_be_asked_for() -> None:
    asked, estimated = (
        set(inspect.signature(call).parameters)
        for call in (shardsurgeon.calibrate, shardsurgeon.estimate_calibration)
    )
    # What says where the scores go, and who is told.
    assert asked - estimated == {"out", "restart", "force", "on_progress"}
    assert estimated <= asked
