"""A dozen kills and one try of every other fault; `long.py` has many of each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults import network
from tests.faults.bench import RemoteBench, StreamBench
from tests.faults.catalogue import CATALOGUE, Entry, Unavailable
from tests.faults.odd_files import ODD_FILES
from tests.faults.places import PLACES
from tests.faults.streams import SENDINGS, TERMINALS
from tests.faults.trial import Bench

KILLS = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals and limits as POSIX has them"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), hidden=64, width=24)


@pytest.fixture(scope="module")
def remote_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = RemoteBench(tmp_path_factory.mktemp("remote"), hidden=64, width=24)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def stream_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = StreamBench(tmp_path_factory.mktemp("stream"), hidden=64, width=24)
    yield bench
    bench.close()


def nothing_is_lost(entry: Entry, bench: Bench) -> None:
    tries = KILLS if entry is CATALOGUE[0] else 1
    try:
        ended = list(entry.attempt(bench, tries, random.Random(entry.name)))
    except Unavailable as reason:
        pytest.skip(str(reason))
    finally:
        bench.clear()
    assert len(ended) == tries


LOCAL = [*CATALOGUE, *ODD_FILES, *TERMINALS, *PLACES]


@pytest.mark.parametrize("entry", LOCAL, ids=lambda entry: entry.name)
def test_nothing_is_lost(entry: Entry, bench: Bench) -> None:
    nothing_is_lost(entry, bench)


@pytest.mark.parametrize("entry", network.DOWNLOADS, ids=lambda entry: entry.name)
def test_nothing_is_lost_on_the_way_here(entry: Entry, remote_bench: Bench) -> None:
    nothing_is_lost(entry, remote_bench)


@pytest.mark.parametrize("entry", [*network.SENDINGS, *SENDINGS], ids=lambda entry: entry.name)
def test_nothing_is_lost_on_the_way_out(entry: Entry, stream_bench: Bench) -> None:
    nothing_is_lost(entry, stream_bench)
