"""A dozen kills and one try of every other fault; `long.py` has hundreds of each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.catalogue import CATALOGUE, Entry, Unavailable
from tests.faults.trial import Bench

KILLS = 12

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits as POSIX has them")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), hidden=64, width=24)


@pytest.fixture(autouse=True)
def _empty_place(bench: Bench) -> Iterator[None]:
    yield
    bench.clear()


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_nothing_is_lost(entry: Entry, bench: Bench) -> None:
    tries = KILLS if entry is CATALOGUE[0] else 1
    try:
        ended = list(entry.attempt(bench, tries, random.Random(entry.name)))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert len(ended) == tries
