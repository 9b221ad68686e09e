"""`scores blend`: files that measured one part each become one, by weights or max-min."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import InputError, ScoreError, UsageError
from shardsurgeon.layerwise.calibration_file import merge
from shardsurgeon.operations.blend import blend_scores
from shardsurgeon.operations.scores import merge_scores
from shardsurgeon.scores.files import read_scores, write_scores
from shardsurgeon.scores.table import Fact
from tests.layerwise.files import calibration, mixed
from tests.operations.test_scores import observed


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("code", "chat", "math"), start=1):
        write_scores(f"{name}.npz", calibration(number).content())
    return tmp_path


def test_two_halves_of_equal_weight_are_the_merged_calibration() -> None:
    halves = ["code.npz", "chat.npz"]
    merge_scores(halves, "merged.npz")
    report = blend_scores(halves, "blend.npz", weights={"chat": 0.1, "code": 0.1})
    assert [(part.name, part.weight) for part in report.parts] == [("code", 1), ("chat", 1)]
    merged, blended = read_scores("merged.npz"), read_scores("blend.npz")
    # A file holds the mean of squared norms and not their sum, which alone could be weighed.
    weighed = tuple(metric for metric in merged.metrics if metric != "msan")
    assert report.metrics == weighed == blended.metrics
    assert blended.tokens == merged.tokens
    for layer, metrics in merged.layers.items():
        for metric, row in ((metric, metrics[metric]) for metric in weighed):
            np.testing.assert_array_equal(blended.layers[layer][metric], row)


def mix(name: str, *numbers: int) -> None:
    """One file of several datasets, of which each is a calibration of its own as well."""
    parts = [mixed(number, f"org/{'?abc'[number]}(train)") for number in numbers]
    for number, part in zip(numbers, parts, strict=True):
        write_scores(f"{'?abc'[number]}.npz", part.content())
    whole = merge(parts, name) if len(parts) > 1 else parts[0]
    write_scores(name, whole.content())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.permutations([1, 2, 3]), st.floats(1e-3, 1e3))
def test_parts_of_one_file_with_equal_weights_are_the_file(
    numbers: list[int], weight: float
) -> None:
    mix("mix.npz", *numbers)
    report = blend_scores(
        ["mix.npz"], "blend.npz", weights=dict.fromkeys("cab", weight), force=True
    )
    assert [(part.name, part.file) for part in report.parts] == [(n, "mix.npz") for n in "abc"]
    whole, blended = read_scores("mix.npz"), read_scores("blend.npz")
    assert blended.tokens == whole.tokens
    for layer, metrics in blended.layers.items():
        for metric, row in metrics.items():
            np.testing.assert_array_equal(whole.layers[layer][metric], row)


@pytest.mark.parametrize(
    "how",
    [
        {"weights": {"a": 2, "b": 1, "c": 0.5}, "keep": 2},
        {"objective": "max-min", "ratio": 0.5},
        {"objective": "max-min", "keep": 2, "metric": "ean_mean"},
    ],
)
def test_parts_of_one_file_blend_as_files_of_their_own(how: dict[str, Any]) -> None:
    mix("mix.npz", 1, 2, 3)
    one = blend_scores(["mix.npz"], "one.npz", **how)
    other = blend_scores(["a.npz", "b.npz", "c.npz"], "other.npz", **how)
    assert Path("one.npz").read_bytes() == Path("other.npz").read_bytes()
    assert one.worst == other.worst
    shares = {part.name: part.retained or 0 for part in one.parts}
    assert shares == {part.name: part.retained for part in other.parts}
    assert one.worst == min(shares, key=lambda name: shares[name])
    if "objective" in how:
        assert min(shares.values()) >= min(part.retained_equal or 0 for part in one.parts)


def test_the_parts_of_several_files_are_told_apart_by_their_files() -> None:
    mix("mix.npz", 1, 2)
    write_scores("more.npz", mixed(5, "org/a(train)", "org/d(train)").content())
    names = ["mix:a", "b", "more:a", "d", "code"]
    report = blend_scores(
        ["mix.npz", "more.npz", "code.npz"], "blend.npz", weights=dict.fromkeys(names, 1)
    )
    assert [part.name for part in report.parts] == names
    with pytest.raises(
        UsageError, match="'a' is no part; give one for each of mix:a, b, more:a, d"
    ):
        blend_scores(["mix.npz", "more.npz"], "blend.npz", weights={"a": 1})


def test_a_file_that_does_not_know_its_parts_is_no_blend() -> None:
    whole = mixed(1, "org/a(train)", "org/b(train)")
    layers = {layer: replace(sums, parts=None) for layer, sums in whole.layers.items()}
    write_scores("old.npz", replace(whole, layers=layers).content())
    says = "old.npz: does not keep the sums of its 2 datasets apart: an earlier .*; calibrate again"
    with pytest.raises(ScoreError, match=says):
        blend_scores(["old.npz"], "blend.npz", weights={"a": 1, "b": 1})
    # Beside another file it is one part, as a whole.
    report = blend_scores(["old.npz", "chat.npz"], "blend.npz", weights={"old": 1, "chat": 1})
    assert [part.name for part in report.parts] == ["old", "chat"]


def test_the_file_says_how_its_parts_weigh_and_repeats_itself_to_the_byte() -> None:
    weights = {"code": 2.0, "chat": 1.0}
    first = blend_scores(["code.npz", "chat.npz"], "one.npz", weights=weights)
    facts: dict[str, Fact] = {
        "method": "blend",
        "weights": "code=1.33333,chat=0.666667",
    }
    facts |= {"total_tokens": 200}
    assert read_scores("one.npz").facts == facts
    again = blend_scores(["code.npz", "chat.npz"], "one.npz", weights={"code": 20, "chat": 10})
    assert (first.written, again.written) == (True, False)


def test_max_min_reports_what_each_part_retains_and_what_it_would_with_equal_weights() -> None:
    files = ["code.npz", "chat.npz", "math.npz"]
    report = blend_scores(files, "best.npz", objective="max-min", ratio=0.5)
    assert report.kept == 3
    shares = [(part.retained or 0, part.retained_equal or 0) for part in report.parts]
    assert min(share for share, _ in shares) >= min(equal for _, equal in shares) > 0
    weights = {part.name: part.weight for part in report.parts}
    by_weights = blend_scores(files, "same.npz", weights=weights, keep=3)
    assert [part.retained for part in by_weights.parts] == [share for share, _ in shares]
    assert blend_scores(files, "none.npz", weights=weights).parts[0].retained is None


def test_files_of_one_name_are_called_by_their_folders() -> None:
    for number, name in enumerate(("code", "chat"), start=1):
        Path(name).mkdir()
        write_scores(f"{name}/scores.npz", calibration(number).content())
    files = ["code/scores.npz", "chat/scores.npz"]
    report = blend_scores(files, "blend.npz", weights={"code": 1, "chat": 3})
    assert [part.weight for part in report.parts] == [0.5, 1.5]


def test_files_of_reaps_observer_are_blended_by_category(tmp_path: Path) -> None:
    files = [tmp_path / name / "observations.pt" for name in ("code", "chat")]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        observed(file, seed)
    blend_scores(files, "blend.npz", weights={"code": 2, "chat": 1})
    parts, blended = [read_scores(file).layers for file in files], read_scores("blend.npz").layers
    for layer in (1, 2):
        sums, counts = (
            2 * parts[0][layer][metric] + parts[1][layer][metric]
            for metric in ("weighted_ean_sum", "expert_frequency")
        )
        assert counts[3] == 0 == blended[layer]["reap"][3]
        reached = counts > 0
        found = blended[layer]["reap"][reached]
        np.testing.assert_allclose(found, sums[reached] / counts[reached], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "neither says how the parts weigh: --weights, --objective"),
        ({"weights": {"code": 1}}, "--weights: has none for chat; give one for each of code, chat"),
        ({"weights": {"code": 1, "cat": 1}}, "--weights: 'cat' is no part; give one for each of"),
        ({"weights": {"code": 1, "chat": -1}}, "--weights: chat has -1; a weight is a number of 0"),
        ({"weights": {"code": "2", "chat": 1}}, "--weights: code has 2; a weight is a number"),
        ({"weights": {"code": 1, "chat": float("inf")}}, "--weights: chat has inf"),
        ({"weights": {"code": 0, "chat": 0}}, "--weights: every weight is 0"),
        ({"objective": "max-min"}, "--objective: max-min depends on how many experts stay"),
        ({"objective": "max-min", "keep": 6}, "--keep: 6 of 6 experts leaves nothing to choose"),
        ({"objective": "max-min", "keep": 3, "ratio": 0.5}, "--keep: is given beside --ratio"),
        ({"objective": "max-min", "keep": 3, "weights": {}}, "both say how the parts weigh"),
        ({"objective": "max-min", "ratio": 50.0}, "--ratio: "),
        ({"objective": "max-min", "keep": 3, "metric": "max_activations"}, "--metric: 'max_acti"),
    ],
)
def test_what_does_not_weigh_the_parts_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        blend_scores(["code.npz", "chat.npz"], "blend.npz", **options)
    assert says in str(caught.value)
    assert not Path("blend.npz").exists()


def test_files_that_do_not_add_up_are_refused() -> None:
    write_scores("other.npz", calibration(4, model="Other").content())
    write_scores("again.npz", calibration(5, samples=[["c4", 2, 60]]).content())
    sums = calibration(6).content()
    bare = {n: {"reap": of["reap"]} for n, of in sums.layers.items()}
    write_scores("bare.npz", type(sums)(layers=bare))
    for name, says in (
        ("other", "was made with model Other"),
        ("again", "1 of its 1 samples are in code.npz as well"),
        ("bare", "holds scores without the sums and counts"),
        ("nowhere", "nowhere.npz"),
    ):
        with pytest.raises(InputError, match=says):
            blend_scores(["code.npz", f"{name}.npz"], "b.npz", weights={"code": 1, name: 1})
    with pytest.raises(UsageError, match="1 part of the data; give a file of"):
        blend_scores(["code.npz"], "b.npz", weights={"code": 1})
    with pytest.raises(UsageError, match=r"code\.npz: is given twice"):
        blend_scores(["code.npz"] * 2, "b.npz", weights={"code": 1})
    assert not Path("b.npz").exists()
