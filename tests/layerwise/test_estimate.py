"""What a calibration takes, on paper: numbers worked out by hand, and what must hold for any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import UsageError
from shardsurgeon.layerwise.estimate import Wishes, estimate, estimates
from shardsurgeon.layerwise.machines import MACHINES, Machine
from shardsurgeon.layerwise.memory import LayerSize, ModelSize
from shardsurgeon.layerwise.schedule import (
    SAVED_SHARE,
    Hold,
    Limits,
    Place,
    Schedule,
    chunks,
    costs,
    make_schedule,
    products,
)

GB = 10**9
H200, H100, CARD, CPU = MACHINES
RECIPE = [16_384] * 1024
BF16 = Wishes("bfloat16")


def kimi() -> ModelSize:
    """Kimi-K2.5 from its config, parameter by parameter."""
    hidden, inner, heads, nope, rope, value = 7168, 2048, 64, 128, 64, 128
    expert = 3 * hidden * inner
    attention = hidden * 1536 + 1536 * heads * (nope + rope)
    attention += hidden * (512 + rope) + 512 * heads * (nope + value) + heads * value * hidden
    # Four bits each, and a scale of two bytes for every 32.
    stored = 384 * expert * (16 + 2) // 32
    pairs = heads * (nope + rope) + heads * value
    dense = LayerSize(0, False, attention + 3 * hidden * 18_432, 0, 0, 0, pairs=pairs)
    layers = [
        LayerSize(
            *(number, False, attention + expert + 384 * hidden, 384, stored, expert, True),
            pairs=pairs,
        )
        for number in range(1, 61)
    ]
    return ModelSize((dense, *layers), hidden, 8, hidden, 1, heads * (nope + rope), 8192, heads)


def test_the_recipe_of_kimi_takes_an_hour_on_one_h200_and_minutes_on_eight_h100() -> None:
    size = kimi()
    # Of 32.8 billion parameters that a token meets 2.3 are of the vocabulary, which no layer has;
    # and half of all pairs in 61 layers.
    linear = 2 * 30.5e9 * 1024 * 16_384
    attention = 61 * 20_480 * 1024 * 16_384**2
    assert products(size, RECIPE) == pytest.approx(linear + attention, rel=0.02)
    assert products(size, RECIPE) == pytest.approx(1.4e18, rel=0.05)
    one = estimate(size, RECIPE, H200, BF16)
    assert one.bound_by == "computing" and one.readings == 1 and one.states == "host"
    assert one.seconds == pytest.approx(3600, rel=0.1)
    assert one.seconds_weights == pytest.approx(11, rel=0.1)
    assert one.state_nbytes == 1024 * 16_384 * 7168 * 2
    # 240 GB in and 240 GB out of each of 61 layers: ten minutes in all, both ways at once.
    assert one.states_nbytes == 2 * 61 * one.state_nbytes
    assert one.seconds_states == pytest.approx(300, rel=0.05)
    eight = estimate(size, RECIPE, H100, BF16)
    assert eight.seconds == pytest.approx(7.5 * 60, rel=0.1)
    # Each device reads all weights, and the disk gives them once.
    assert eight.weights_nbytes == one.weights_nbytes == pytest.approx(590 * GB, rel=0.01)
    assert eight.disk_nbytes == pytest.approx(590 * GB, rel=0.01)
    assert eight.states_nbytes == one.states_nbytes


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_saved_states_are_a_twentieth_of_what_moves_at_most(machine: Machine) -> None:
    found = estimate(kimi(), RECIPE, machine, BF16)
    assert found.readings == 1
    moved = found.states_nbytes + found.weights_nbytes  # type: ignore[operator]
    assert found.saved_nbytes <= SAVED_SHARE * moved  # type: ignore[operator]
    if found.states == "file":
        assert found.saves == 0
    # However long it takes, that much of the time is the most.
    saving = estimate(kimi(), RECIPE, replace(H200, flops=100e12), BF16)
    assert saving.saves and saving.saves <= saving.seconds / 600  # type: ignore[operator]
    assert saving.seconds_saving <= SAVED_SHARE * saving.seconds  # type: ignore[operator]


def test_what_does_not_fit_is_said_and_the_other_machines_are_not_lost() -> None:
    wide = replace(kimi(), pair_nbytes=256)
    found = estimates(wide, RECIPE, BF16, "cpu")
    fits = {machine.machine: machine.problem == "" for machine in found.machines}
    assert fits == {H200.name: True, H100.name: False, CARD.name: False, CPU.name: True}
    problem = found.machines[1].problem
    assert "a batch of 1 of 16,384 tokens" in problem and "77.0 GB are free" in problem
    assert found.machines[1].seconds is None
    assert "smaller --max-length" in found.machines[1].remedy


def test_a_bound_on_memory_is_for_this_machine_alone() -> None:
    found = estimates(kimi(), [64] * 4, replace(BF16, memory=10**6), "cpu")
    assert found.here is not None and "1.0 MB are free" in found.here.problem
    assert not any(machine.problem for machine in found.machines)


def test_experts_that_come_several_times_come_from_memory_where_a_layer_fits_there() -> None:
    tight = replace(H200, device_memory=9 * GB, host_memory=60 * GB)
    short = [4096] * 64
    found = estimate(kimi(), short, tight, BF16)
    assert found.hold == "groups" and found.readings > 1  # type: ignore[operator]
    assert found.disk_nbytes == pytest.approx(590 * GB, rel=0.01)
    poor = estimate(kimi(), short, replace(tight, host_memory=9 * GB), BF16)
    assert poor.disk_nbytes >= poor.readings * 570 * GB  # type: ignore[operator]


def test_weights_that_cannot_arrive_ahead_are_waited_for() -> None:
    ahead = estimate(kimi(), RECIPE, H200, BF16)
    behind = estimate(kimi(), RECIPE, replace(H200, device_memory=24 * GB), BF16)
    assert (ahead.ahead, behind.ahead, behind.hold) == (True, False, "layer")
    # From the disk, at 5 GB/s.
    assert behind.seconds - ahead.seconds == pytest.approx(590 / 5, rel=0.01)  # type: ignore[operator]


def test_states_on_the_device_cross_no_link() -> None:
    found = estimate(kimi(), [512] * 16, H200, BF16)
    assert (found.states, found.states_nbytes, found.seconds_states) == ("device", 0, 0)


@st.composite
def models(draw: st.DrawFn) -> ModelSize:
    """A model of any shape, from tiny to large."""
    width = draw(st.sampled_from([64, 1024, 7168]))
    heads = draw(st.sampled_from([2, 64]))
    experts = draw(st.integers(1, 512))
    expert = 3 * width * draw(st.integers(8, 4096))
    stored = expert * experts * draw(st.sampled_from([1, 2, 4])) // 2
    pairs = draw(st.sampled_from([0, 2 * heads * 128]))
    packed = draw(st.booleans())
    layers = tuple(
        LayerSize(number, False, 4 * width * width, experts, stored, expert, packed, pairs)
        for number in range(draw(st.integers(1, 4)))
    )
    top_k = draw(st.integers(1, experts))
    return ModelSize(layers, width, top_k, width, 1, heads * 128, heads * 128, heads)


LENGTHS = st.lists(st.integers(1, 20_000), min_size=1, max_size=40)
MEMORY = st.integers(20, 42).flatmap(lambda power: st.integers(2**power, 2 ** (power + 1)))


def taken(size: ModelSize, lengths: list[int], limits: Limits) -> tuple[Schedule, int] | None:
    """The schedule and the bytes of experts that it reads, None where nothing fits."""
    try:
        schedule = make_schedule(size, lengths, limits)
    except UsageError as error:
        assert "are free" in error.problem and error.remedy
        return None
    cut = chunks(lengths, schedule, mixed=True)
    assert sorted(position for chunk in cut for batch in chunk for position in batch) == list(
        range(len(lengths))
    )
    return schedule, costs(size, lengths, schedule, limits.itemsize, len(cut)).experts


@settings(max_examples=150)
@given(models(), LENGTHS, MEMORY, MEMORY, st.booleans(), st.floats(1, 50))
def test_a_schedule_fits_its_limits_and_more_memory_reads_no_more(
    size: ModelSize, lengths: list[int], device: int, host: int, on_gpu: bool, more: float
) -> None:
    host = host if on_gpu else device
    limits = Limits(2, on_gpu, device, host)
    found = taken(size, lengths, limits)
    larger = replace(limits, device_free=int(device * more), host_free=int(host * more))
    roomier = taken(size, lengths, larger)
    if found is None:
        return
    schedule, nbytes = found
    assert schedule.device_nbytes <= device and schedule.host_nbytes <= host
    assert 1 <= schedule.group <= max(layer.experts for layer in size.layers)
    assert (schedule.hold is Hold.GROUPS) or nbytes == sum(layer.stored for layer in size.layers)
    assert schedule.states is not Place.DEVICE or on_gpu
    assert roomier is not None and roomier[1] <= nbytes


@settings(max_examples=60)
@given(models(), LENGTHS, st.floats(1, 20))
def test_a_faster_machine_and_fewer_samples_take_no_longer(
    size: ModelSize, lengths: list[int], faster: float
) -> None:
    before = estimate(size, lengths, H200, BF16)
    if before.problem:
        return
    assert before.seconds is not None and math.isfinite(before.seconds)
    parts = (before.seconds_computing, before.seconds_weights, before.seconds_states)
    assert all(part is not None and 0 <= part <= before.seconds for part in parts)
    quick = replace(H200, flops=H200.flops * faster, link=H200.link * faster)
    assert estimate(size, lengths, quick, BF16).seconds <= before.seconds  # type: ignore[operator]
    fewer = estimate(size, lengths[:1], H200, BF16)
    assert fewer.seconds_computing <= before.seconds_computing  # type: ignore[operator]
