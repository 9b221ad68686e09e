"""Merged calibrations have the sums of one, in any order; others are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shardsurgeon.errors import ScoreError, UsageError
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.calibration_file import Calibration, merge
from tests.layerwise.files import calibration, sums


def test_accumulators_are_added_and_samples_put_together() -> None:
    parts = [calibration(1), calibration(2), calibration(3)]
    merged = merge(parts, "all.pt")
    assert merged.origin == "all.pt"
    assert merged.samples == [("c4", n, 40 if n % 2 else 60) for n in range(2, 8)]
    for layer in (1, 2, 5):
        for name, found in merged.layers[layer].arrays().items():
            values = [part.layers[layer].arrays()[name] for part in parts]
            expected = np.max(values, 0) if name == "max_activation" else np.sum(values, 0)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    counts = merged.layers[5].counts
    total = np.sum([part.layers[5].weighted_norm_sum for part in parts], 0)
    expected = np.divide(total, counts, out=np.zeros(6), where=counts > 0)
    np.testing.assert_allclose(merged.layers[5].metrics()["reap"], expected, rtol=1e-12)


def test_the_order_of_the_parts_does_not_matter_to_the_last_bit() -> None:
    parts = [calibration(1), calibration(2, seed=7), calibration(3)]
    merged = [merge(order, "all.pt") for order in itertools.permutations(parts)]
    for other in merged[1:]:
        assert other.settings == merged[0].settings
        for layer in (1, 2, 5):
            for name, array in merged[0].layers[layer].arrays().items():
                assert other.layers[layer].arrays()[name].tobytes() == array.tobytes()


def test_a_merge_of_a_merge_equals_one_of_all_parts() -> None:
    a, b, c = calibration(1), calibration(2, seed=7), calibration(3, dataset="code:2")
    once, twice = merge([a, b, c], "s.pt"), merge([merge([b, c], "bc.pt"), a], "s.pt")
    assert twice.settings == once.settings
    for layer in (1, 2, 5):
        for name, array in once.layers[layer].arrays().items():
            found = twice.layers[layer].arrays()[name]
            np.testing.assert_allclose(found, array, rtol=1e-12, atol=0)


def test_the_parts_are_not_changed() -> None:
    parts = [calibration(1), calibration(2)]
    merge(parts, "s.pt")
    assert parts[0].settings == calibration(1).settings
    for part, seed in zip(parts, (1, 2), strict=True):
        for layer, before in calibration(seed).layers.items():
            np.testing.assert_array_equal(part.layers[layer].norm_sum, before.norm_sum)


def test_settings_that_differ_are_listed_for_each_part() -> None:
    settings = merge([calibration(1), calibration(2, seed=7)], "s.pt").settings
    assert {key: settings[key] for key in ("model", "dataset", "config_sha256")} == {
        "model": "Tiny",
        "dataset": "c4:2",
        "config_sha256": "ab" * 32,
    }
    assert "seed" not in settings
    assert settings["parts"] == [
        {"dataset": "c4:2", "samples": 2, "seed": seed, "versions": {"torch": "2.13"}}
        for seed in (42, 7)
    ]


def test_a_revision_that_only_one_part_has_is_kept() -> None:
    merged = merge([calibration(1), calibration(2, revision="abc")], "s.pt")
    assert merged.settings["revision"] == "abc"


def with_layers(layers: dict[int, Accumulators]) -> Calibration:
    made = calibration(2)
    return Calibration(made.origin, layers, made.settings)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            calibration(2, model="Other"),
            "made with model Other, 1.pt with Tiny; `scores merge --same-model`",
        ),
        (calibration(2, config_sha256="cd"), "made with config_sha256 cd, 1.pt with abab"),
        (with_layers({1: sums(1), 2: sums(2)}), "0 experts in layer 5, 1.pt has 6 experts"),
        (
            with_layers({1: sums(1), 2: sums(2, experts=4), 5: sums(5)}),
            "4 experts in layer 2, 1.pt has 6",
        ),
        (
            calibration(2, [["c4", 3, 40], ["c4", 9, 50]]),
            r"1 of its 2 samples are in 1.pt as well, such as c4\[3\]",
        ),
        (calibration(1), r"2 of its 2 samples are in 1.pt as well, such as c4\[2\]"),
    ],
)
def test_what_cannot_be_added_is_refused_with_both_files(other: Calibration, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        merge([calibration(1), other], "s.pt")


def test_revisions_that_differ_are_two_models() -> None:
    with pytest.raises(ScoreError, match=r"made with revision b, .* with a"):
        merge([calibration(1, revision="a"), calibration(2, revision="b")], "s.pt")


def test_one_model_under_two_names_is_accepted_on_request() -> None:
    parts = [calibration(1), calibration(2, model="Other")]
    assert len(merge(parts, "s.pt", any_name=True).samples) == 4


def test_one_file_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="at least two"):
        merge([calibration(1)], "s.pt")


def test_samples_shared_by_copies_of_one_dataset_are_found() -> None:
    def over(number: int, source: str) -> Calibration:
        return calibration(number, [[source, 3, 60], [source, 7 + number, 40]])

    parts = [
        over(1, "chats@sha256:1f0c9ad2b4e6(train)"),
        over(2, "copy@sha256:1f0c9ad2b4e6(train)"),
    ]
    with pytest.raises(ScoreError, match=r"1 of its 2 samples are in 1.pt as well, such as copy@"):
        merge(parts, "s.pt")
    for other in ("chats@sha256:1f0c9ad2b4e6(test)", "chats@sha256:2f0c9ad2b4e6(train)", "chats"):
        merged = merge([parts[0], over(2, other)], "s.pt")
        assert len(merged.samples) == 4


def test_sums_over_other_tokens_are_added_on_request_alone() -> None:
    # A file that does not say it is from the time when all tokens counted.
    old, everything = calibration(1), calibration(2, counted="all")
    answers, more = calibration(3, counted="assistant"), calibration(4, counted="assistant")
    says = r"3\.pt: was made with --tokens assistant, 1\.pt with all; .*`scores merge --mixed`"
    with pytest.raises(ScoreError, match=says):
        merge([old, everything, answers], "s.pt")
    assert merge([old, everything], "s.pt").settings.get("counted") is None
    assert merge([answers, more], "s.pt").settings["counted"] == "assistant"
    mixed = merge([everything, answers], "s.pt", mixed=True)
    assert "counted" not in mixed.settings
    with pytest.raises(
        ScoreError, match=r"4\.pt: was made with --tokens assistant, s\.pt with all"
    ):
        merge([mixed, more], "t.pt")
    assert len(merge([mixed, more], "t.pt", mixed=True).samples) == 6
    # Two halves of one mixture are no more alike than the mixture itself.
    other = merge(
        [calibration(5, counted="all"), calibration(6, counted="assistant")], "o.pt", mixed=True
    )
    with pytest.raises(ScoreError, match="--mixed"):
        merge([mixed, other], "t.pt")


def test_windows_are_counted_part_by_part() -> None:
    packed, more = calibration(1, windows=1), calibration(2, windows=1)
    assert packed.num_samples == 1
    merged = merge([packed, more], "s.pt")
    assert (merged.num_samples, len(merged.samples)) == (2, 4)
    assert "windows" not in merged.settings
    assert merge([merged, calibration(3)], "t.pt").num_samples == 4
    # A file says what it likes.
    for claimed in (-3, 10**5000, "2", None, True, 3):
        assert calibration(1, windows=claimed).num_samples in (1, 2)
