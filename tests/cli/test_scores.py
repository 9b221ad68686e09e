"""`scores …`: words handed on, tables for people, one document for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from shardsurgeon.cli.scores import from_router_command, from_weights_command
from shardsurgeon.scores.router_norms import RouterNorm
from shardsurgeon.scores.weight_norms import WeightCriterion
from tests.cli.standins import SCORE_OPERATIONS, SCORED, FakeOperations, Run

WORDS = ("scores", "from-router", "-o", "scores.safetensors")
EVERY = {
    "show_scores": ("show", "scores.pt"),
    "plot_scores": ("plot", "scores.pt", "--ratio", "0.65", "-o", "picture.png"),
    "compare_scores": ("compare", "scores.pt", "router.json"),
    "convert_scores": ("convert", "a.pt", "-o", "b.json"),
    "merge_scores": ("merge", "a.pt", "b.pt", "-o", "both.pt"),
    "blend_scores": (
        *("blend", "code.pt", "chat.pt", "--objective", "max-min", "--keep", "80"),
        *("-o", "scores.pt"),
    ),
    "scores_from_router": ("from-router", "-o", "scores.safetensors"),
    "scores_from_weights": ("from-weights", "-o", "weights.safetensors"),
    "scores_random": ("random", "-o", "random.safetensors"),
}

BLEND = {
    **dict.fromkeys(("weights", "objective", "keep", "ratio")),
    "metric": "reap",
    **dict.fromkeys(("same_model", "mixed", "force"), False),
}


@pytest.mark.parametrize(
    ("words", "handed"),
    [
        (WORDS, ((None, "scores.safetensors"), {"norm": "l2", "family": None, "force": False})),
        (
            ("scores", "from-router", "/models/K2", "--norm", "l1", "-o", "s.json"),
            (("/models/K2", "s.json"), {"norm": "l1", "family": None, "force": False}),
        ),
        (
            ("scores", "from-weights", "/models/K2", "--no-progress", "-o", "s.json"),
            (("/models/K2", "s.json"), {"criterion": "norm", "family": None, "force": False}),
        ),
        (
            ("scores", "from-weights", "--criterion", "aimer", "-o", "s.json"),
            ((None, "s.json"), {"criterion": "aimer", "family": None, "force": False}),
        ),
        (
            ("scores", "random", "-o", "s.npz"),
            ((None, "s.npz"), {"seed": 42, "family": None, "force": False}),
        ),
        (
            ("scores", "random", "/models/K2", "--seed", "7", "-o", "s.npz", "--force"),
            (("/models/K2", "s.npz"), {"seed": 7, "family": None, "force": True}),
        ),
        (("scores", "show", "s.pt"), (("s.pt", None), {"metric": None, "family": None})),
        (
            ("scores", "show", "s.pt", "--model", "/models/K2", "--metric", "ean_sum"),
            (("s.pt", "/models/K2"), {"metric": "ean_sum", "family": None}),
        ),
        (
            ("scores", "plot", "s.pt", "-r", "65%", "--evaluation", "e.json", "-o", "p.svg"),
            (
                ("s.pt", "p.svg"),
                {"ratio": 0.65, "evaluation": "e.json", "metric": None, "force": False},
            ),
        ),
        (
            ("scores", "convert", "a.pt", "-o", "b.json"),
            (("a.pt", "b.json"), {"model": None, "family": None, "force": False}),
        ),
        (
            ("scores", "merge", "a.pt", "b.pt", "-o", "c.pt"),
            ((("a.pt", "b.pt"), "c.pt"), {"same_model": False, "mixed": False, "force": False}),
        ),
        (
            ("scores", "merge", "--same-model", "a.pt", "b.pt", "-o", "c.pt"),
            ((("a.pt", "b.pt"), "c.pt"), {"same_model": True, "mixed": False, "force": False}),
        ),
        (
            ("scores", "blend", "a.pt", "b.pt", "--weights", "a=2, b=0.5", "-o", "c.pt"),
            ((("a.pt", "b.pt"), "c.pt"), BLEND | {"weights": {"a": 2.0, "b": 0.5}}),
        ),
        (
            ("scores", *EVERY["blend_scores"], "--metric", "ean_sum", "--mixed", "--force"),
            (
                (("code.pt", "chat.pt"), "scores.pt"),
                BLEND
                | {"objective": "max-min", "keep": 80, "metric": "ean_sum"}
                | {"mixed": True, "force": True},
            ),
        ),
        (
            ("scores", "compare", "a.pt", "b.pt"),
            (("a.pt", "b.pt"), {"ratios": (0.25, 0.5), "metrics": ()}),
        ),
        (
            ("scores", "compare", "a.pt", "b.pt", "--ratio", "0.3", "--metric", "reap,ean_sum"),
            (("a.pt", "b.pt"), {"ratios": (0.3,), "metrics": ("reap", "ean_sum")}),
        ),
    ],
)
def test_the_words_are_handed_on(
    run: Run, fake: FakeOperations, words: tuple[str, ...], handed: object
) -> None:
    assert run(*words).status == 0
    assert fake.calls == [handed]


def test_the_norms_offered_are_those_there_are() -> None:
    (choice,) = (p.type for p in from_router_command.params if p.name == "norm")
    assert set(choice.choices) == set(RouterNorm)  # type: ignore[attr-defined]
    (choice,) = (p.type for p in from_weights_command.params if p.name == "criterion")
    assert set(choice.choices) == set(WeightCriterion)  # type: ignore[attr-defined]


def test_the_report_reads_well(run: Run) -> None:
    assert run(*WORDS).stdout == (
        "GLM-4.5: router_l2 of 160 experts in 2 routers\n"
        "\n"
        "  layer  lowest  median  highest\n"
        "  -----  ------  ------  -------\n"
        "      1     0.5    0.75     1.25\n"
        "    92*  0.0625   0.125       10\n"
        "  * next-token-prediction layer\n"
        "\n"
        "Scores saved in scores.safetensors.\n"
    )
    assert run("scores", *EVERY["scores_from_weights"]).stdout.startswith(
        "GLM-4.5: weight_l2 of 160 experts in 2 layers\n"
    )


def test_what_a_file_says_reads_well(run: Run) -> None:
    assert run("scores", "show", "scores.pt").stdout == (
        "scores.pt: reap of 160 experts in 2 layers\n"
        "  metrics       ean_mean, max_activations, reap\n"
        "  beside        total_tokens 4096\n"
        "  calibration   1,024 samples, 4,096 tokens, model GLM-4.5, dataset c4:2\n"
        "\n"
        "                                   never         can go  can go    widest\n"
        "  layer  lowest  median  highest  routed  super   at 5%  at 25%       gap\n"
        "  -----  ------  ------  -------  ------  -----  ------  ------  --------\n"
        "      1       0    0.25      8.5       2      2      17      66  23 x1.31\n"
        "    92*       -       -        -       0      0       -       -         -\n"
        "  * next-token-prediction layer\n"
        "  widest gap: experts below it, and how many times as high the next score is\n"
        "  a share of saliency is no accuracy; this measures what a prune costs:\n"
        "    shardsurgeon evaluate scores.pt --ratio 0.25,0.5 --dataset DATA -o evaluation.json\n"
        "\n"
        "Cuts alike in every layer, by the mean share of a layer's saliency that goes:\n"
        "                                 lost in the\n"
        "  at most  --ratio  kept   lost  worst layer\n"
        "  -------  -------  ----  -----  -----------\n"
        "     1.0%        -   160   0.0%     0.0% (1)\n"
        "    25.0%   0.4125    94  25.0%    25.1% (1)\n"
    )


def test_a_comparison_reads_well(run: Run) -> None:
    assert run("scores", "compare", "scores.pt", "router.json").stdout == (
        "2 layers of 160 experts\n"
        "  A             reap of scores.pt\n"
        "  B             router_l2 of router.json\n"
        "\n"
        "                              share  Jaccard   share  Jaccard\n"
        "  layer  Spearman  Kendall  at 0.25  at 0.25  at 0.5   at 0.5\n"
        "  -----  --------  -------  -------  -------  ------  -------\n"
        "      1     0.000        -    81.2%    68.4%   50.0%    33.3%\n"
        "      2     0.988        -    81.2%    68.4%   50.0%    33.3%\n"
        "   mean     0.494        -    81.2%    68.4%   50.0%    33.3%\n"
        "  only in B     layer 92\n"
    )


def test_a_merge_reads_well(run: Run) -> None:
    assert run("scores", "merge", "a.pt", "b.pt", "-o", "both.pt").stdout == (
        "a.pt + b.pt -> both.pt\n"
        "  layers        89\n"
        "  metrics       ean_mean, reap\n"
        "  calibration   1,024 samples, 1 token\n"
    )


def test_a_blend_reads_well(run: Run) -> None:
    assert run("scores", *EVERY["blend_scores"]).stdout == (
        "code x 1.33 + chat x 0.667 -> scores.pt\n"
        "  layers        89\n"
        "  metrics       ean_mean, reap\n"
        "\n"
        "Retained shares of reap with 80 experts kept:\n"
        "                          with equal\n"
        "  part  weight  retained     weights\n"
        "  ----  ------  --------  ----------\n"
        "  code   1.333     81.2%       75.0%\n"
        "  chat  0.6667     80.0%       90.0%\n"
        "  worst part    chat\n"
    )


@pytest.mark.parametrize("operation", EVERY)
def test_json_is_the_report(run: Run, operation: str) -> None:
    document = json.loads(run("scores", *EVERY[operation], "--json").stdout)
    report: Any = SCORE_OPERATIONS[operation]
    assert document.items() >= json.loads(json.dumps(asdict(report))).items()
    assert document == report.to_dict()
    assert EVERY.keys() == SCORE_OPERATIONS.keys()
    assert SCORE_OPERATIONS["scores_from_router"] is SCORED


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("scores", "from-router"), "'-o'"),
        ((*WORDS, "--norm", "l3"), "'l2', 'l1'"),
        (("scores", "form-router"), "'form-router'"),
        (("scores", "show"), "'FILE'"),
        (("scores", "compare", "a.pt"), "'B'"),
        (("scores", "compare", "a.pt", "b.pt", "--ratio", "half"), "'half' is not a number"),
        (("scores", "merge", "-o", "c.pt"), "'FILE FILE...'"),
        (("scores", "blend", "a", "b", "-o", "c.pt", "--weights", "a"), "'a' is not NAME=NUMBER"),
        (("scores", "blend", "a", "b", "-o", "c.pt", "--weights", "a=1,a=2"), "names a again"),
        (("scores", "blend", "a", "b", "-o", "c.pt", "--ratio", "0.1,0.2"), "2 ratios at once"),
        (("scores", "random", "-o", "s.json", "--seed", "x"), "'x'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, words: tuple[str, ...], told: str) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
