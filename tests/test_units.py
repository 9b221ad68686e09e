"""Sizes and ratios as people type them: what is meant, and what is asked back."""

from __future__ import annotations

import pytest

from shardsurgeon.errors import UsageError
from shardsurgeon.units import parse_ratios, parse_size, require_ratios


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0.65", (0.65,)),
        (".65", (0.65,)),
        ("65%", (0.65,)),
        (" 65 % ", (0.65,)),
        ("12.5%", (0.125,)),
        ("0.5%", (0.005,)),
        ("6.5e-1", (0.65,)),
        ("0.5,0.65,0.75", (0.5, 0.65, 0.75)),
        ("50%, 65%,0.75", (0.5, 0.65, 0.75)),
    ],
)
def test_a_ratio_is_a_fraction_or_a_percentage(text: str, ratios: tuple[float, ...]) -> None:
    assert parse_ratios(text) == ratios


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("65", "--ratio: 65 is not between 0 and 1; did you mean 0.65?"),
        ("50,65", "--ratio: 50 is not between 0 and 1; did you mean 0.5,0.65?"),
        ("0.5,65", "--ratio: 65 is not between 0 and 1; did you mean 0.5,0.65?"),
        ("12.5", "did you mean 0.125?"),
        ("-0.5", "--ratio: -0.5 is not between 0 and 1; did you mean 0.5?"),
        ("0,65", "'0,65' has a decimal comma, and commas separate ratios; did you mean 0.65?"),
        (",65", "did you mean 0.65?"),
        ("0,5,0,65,0,75", "did you mean 0.5,0.65,0.75?"),
        ("0,5; 0,65", "did you mean 0.5,0.65?"),
        ("0", "0 is not between 0 and 1; give the fraction of the experts to remove"),
        ("0,0", "give the fraction of the experts to remove"),
        ("0%", "give the fraction of the experts to remove"),
        ("1", "1 is not between 0 and 1; give the fraction of the experts to remove"),
        ("100%", "give the fraction of the experts to remove"),
        ("165%", "give the fraction of the experts to remove"),
        ("nan", "nan is not between 0 and 1"),
        ("half", "'half' is not a number; write it like 0.65 or 65%"),
        ("0.5,", "is not a number"),
        ("", "is not a number"),
        ("%", "is not a number"),
        ("0.5 0.65", "is not a number"),
        ("1/2", "is not a number"),
        ("\u0660.\u0665", "is not a number"),
    ],
)
def test_a_slip_in_a_ratio_is_answered_with_what_was_meant(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ratios(text)
    assert says in str(caught.value)


def test_numbers_are_held_to_the_same_rule() -> None:
    require_ratios((0.25, 0.999))
    with pytest.raises(UsageError, match=r"ratio: 65 is not .*; did you mean 0\.65\?"):
        require_ratios((65.0,), "ratio")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *((text, 10**9) for text in ("1GB", "1gb", "1 GB", "1g", "1G", " 1.0 g ", "1000MB")),
        *((text, 2**30) for text in ("1GiB", "1gib", "1 Gi", "1gi", "1024MiB")),
        ("1.5GiB", 3 * 2**29),
        (".5k", 500),
        ("12B", 12),
        ("123456789", 123_456_789),
    ],
)
def test_a_size_has_a_unit_by_a_letter_or_more(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("122", "--x: 122 alone is bytes; did you mean 122GB?"),
        ("1,5GB", "--x: '1,5GB' is not a size; did you mean 1.5GB?"),
        (",5 TB", "did you mean 0.5 TB?"),
        ("lots", "--x: 'lots' is not a size; write it like 122GB, 5GiB or 500MB"),
        ("0", "'0' is not a size"),
        ("-5GB", "'-5GB' is not a size"),
        ("5 GBB", "is not a size"),
        ("GB", "is not a size"),
        ("", "is not a size"),
    ],
)
def test_a_slip_in_a_size_is_answered_with_what_was_meant(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, "--x")
    assert says in str(caught.value)
