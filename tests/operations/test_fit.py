"""Which counts fit: the arithmetic of one machine by hand, and what must hold for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardsurgeon
from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.tensor_parallel import Parallel
from shardsurgeon.errors import FamilyError, UsageError
from shardsurgeon.families.attention import UNDECLARED
from shardsurgeon.operations import prune
from shardsurgeon.operations.fit import fit
from shardsurgeon.pruning.fit import Fit
from shardsurgeon.pruning.machines import FitRequest, Machine, parse_machines, usual_machines
from shardsurgeon.pruning.request import Allocation, SelectionRequest
from tests.checkpoint.test_tensor_parallel import HIDDEN, VOCABULARY, by_hand, model

FIXTURES = Path(__file__).parents[2] / "fixtures"
KIMI, QWEN = FIXTURES / "kimi_k25", FIXTURES / "qwen3_moe"
MODEL = model()
# Two layers of (key + value) x 2 heads x 16 in two bytes, for one token.
TOKEN = 2 * 2 * 2 * 16 * 2
# 1 GiB, 8,192 tokens of 12 + 2 vectors, 256 tokens' logits.
OTHER = 2**30 + 8192 * HIDDEN * 2 * 14 + 256 * 4 * VOCABULARY


def machine(nbytes: int, gpus: int = 1) -> Machine:
    return Machine("made", gpus, nbytes)


def fitted(**request: Any) -> Fit:
    return Fit(MODEL, read_anatomy(MODEL), FitRequest(**request))


@pytest.mark.parametrize("kept", [2, 5, 8])
def test_what_the_engine_takes_less_weights_and_the_rest_is_for_the_cache(kept: int) -> None:
    memory = 2 * 2**30
    found = fitted(context=4096, sequences=4).on(machine(memory), [kept])
    (row,) = found.rows
    left = int(memory * 0.92) - OTHER - by_hand(1, kept)
    assert (found.other_nbytes, found.sequence_nbytes) == (OTHER, TOKEN * 4096)
    assert (row.weights_nbytes, row.cache_nbytes) == (by_hand(1, kept), left)
    assert row.tokens == left // TOKEN
    # What the model is made for, or the tokens of four sequences in blocks of 16.
    assert row.longest_context == min(65536, left // 4 // (16 * TOKEN) * 16)
    assert row.ratio == 1 - kept / 8


def test_a_sequence_fits_to_the_byte() -> None:
    need = OTHER + by_hand(1, 8) + 4 * 4096 * TOKEN
    # The engine takes 0.92 of the memory, rounded down.
    for memory, fits in ((-(-need * 100 // 92), True), (-(-need * 100 // 92) - 2, False)):
        (row,) = fitted(context=4096, sequences=4).on(machine(memory), [8]).rows
        assert row.fits is fits


def test_replicas_share_the_sequences() -> None:
    memory = 2 * 2**30
    shared = fitted(context=4096, sequences=5, tensor_parallel=2).on(machine(memory, 4), [8])
    assert (shared.tensor_parallel, shared.replicas) == (2, 2)
    (row,) = shared.rows
    left = int(memory * 0.92) - OTHER - by_hand(2, 8)
    # Three of the five on one of the two, whose GPUs have half of a token each.
    assert row.longest_context == min(65536, left // 3 // (8 * TOKEN) * 16)
    assert row.tokens == 2 * int(left / (TOKEN // 2 * 4096) * 4096)
    assert shared.flags == "--tensor-parallel-size 2 --data-parallel-size 2 --max-model-len 4096"


def test_experts_that_do_not_divide_by_the_ranks_are_said() -> None:
    found = fitted(expert_parallel=True, context=64).on(machine(2**31, 4), [6, 8])
    assert [row.note for row in found.rows] == ["6 experts do not divide by 4 ranks", None]
    assert "--enable-expert-parallel" in found.flags


def test_heads_that_do_not_divide_are_a_reason_and_no_row() -> None:
    found = fitted(context=64).on(machine(2**31, 3), [8])
    assert (found.rows, found.kept) == ((), None)
    assert found.problem == "8 attention heads do not divide by 3 ranks"


def test_experts_that_cannot_be_split_stay_whole() -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    made = model(dtype="F8_E4M3", **quantized)
    found = Fit(made, read_anatomy(made), FitRequest(context=64)).on(machine(2**31, 8), [8])
    assert found.problem is None and "--enable-expert-parallel" in found.flags
    assert found.note == (
        "experts stay whole: an expert's width 32 over 8 ranks is 4, not whole FP8 blocks of 8"
    )


def test_counts_are_multiples_that_the_router_can_choose_from() -> None:
    large = shardsurgeon.open_checkpoint(KIMI)
    counts = list(Fit(large, read_anatomy(large), FitRequest()).counts(1))
    assert counts == [8, 16, 24, 32]
    grouped = shardsurgeon.open_checkpoint(FIXTURES / "deepseek_v3")
    anatomy = read_anatomy(grouped)
    counts = list(Fit(grouped, anatomy, FitRequest()).counts(1))
    assert counts[-1] == anatomy.num_experts
    assert all(count % anatomy.n_group == 0 for count in counts)
    assert min(counts) >= anatomy.top_k


def test_the_usual_machines_are_those_that_people_ask_about() -> None:
    report = fit(MODEL)
    assert report.usual and len(report.machines) == 7 * 4 + 2
    assert [m.label for m in usual_machines()][:2] == ["1x24GB", "2x24GB"]
    assert report.context == 32768
    assert report.title == (
        "small: how many of 8 experts per layer fit, with 16 sequences of 32,768 tokens"
    )
    assert {each.kept for each in report.machines if not each.problem} == {8}


def test_scores_say_what_each_count_drops() -> None:
    report = shardsurgeon.fit(QWEN, QWEN / "scores.pt", gpus="1x24GB", context=1024)
    half, whole = report.machines[0].rows
    plan = shardsurgeon.plan(QWEN, QWEN / "scores.pt", keep=8).report
    assert half.saliency_dropped_mean == plan.saliency_dropped_mean
    assert (half.kept, whole.saliency_dropped_worst) == (8, 0.0)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("8x80GB", ("8x80GB", 8, int(80 * 2**30 * 0.98), False)),
        ("80gb", ("1x80GB", 1, int(80 * 2**30 * 0.98), False)),
        ("2 x 46068MiB", ("2x46068MiB", 2, 46068 * 2**20, False)),
        ("1x128GB-unified", ("1x128GB-unified", 1, 96 * 2**30, True)),
        ("4×141GiB", ("4x141GiB", 4, 141 * 2**30, False)),
    ],
)
def test_machines_are_read_as_vendors_name_them(words: str, found: tuple[Any, ...]) -> None:
    (machine,) = parse_machines(words)
    assert (machine.label, machine.gpus, machine.nbytes, machine.unified) == found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("8x80", "'8x80' is no machine"),
        ("H100", "'H100' is no machine"),
        ("", "'' is no machine"),
        ("8x80GB,", "'' is no machine"),
        ("0x80GB", "has 0 GPUs"),
        ("2000x80GB", "has 2,000 GPUs"),
        ("8x80000GB", "80000 GB is none that is sold"),
        ("1x80GB,80GB", "1x80GB is there twice"),
        ("-1x80GB", "is no machine"),
    ],
)
def test_words_that_are_no_machine_are_refused(words: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_machines(words)
    assert caught.value.where == "--gpus"


def test_modelopts_own_file_says_the_dtype_of_keys_and_values() -> None:
    said = {"hf_quant_config.json": {"quantization": {"kv_cache_quant_algo": "FP8"}}}
    assert fit(model(beside=said)).kv_dtype == "fp8"
    assert fit(model(beside={"other.json": said["hf_quant_config.json"]})).kv_dtype == "bfloat16"
    # Of a config that says how it is quantized, vLLM reads no other file.
    assert fit(model(beside=said, quantization_config={"quant_method": "fp8"})).kv_dtype != "fp8"


def test_what_a_model_is_not_made_for_is_refused() -> None:
    with pytest.raises(UsageError, match=r"65,537 tokens are more than the 65,536") as caught:
        fit(MODEL, FitRequest(context=65537))
    assert caught.value.where == "--context"
    assert fit(MODEL, FitRequest(context=65536)).context == 65536


@pytest.mark.parametrize("wrong", [{"context": 0}, {"sequences": 0}, {"kv_dtype": "int4"}])
def test_requests_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FitRequest(**wrong)


def test_a_model_of_unknown_attention_is_refused() -> None:
    named = model(layer_types=["full_attention", "sliding_attention"])
    anatomy = read_anatomy(named)
    unknown = replace(anatomy, family=replace(anatomy.family, attention=UNDECLARED))
    with pytest.raises(FamilyError, match="unknown attention"):
        Fit(named, unknown, FitRequest())


# --fit and --gpus of plan


def memory_for(kept: int) -> str:
    """A machine on which so many experts of the shipped kimi_k25 fit, and no more."""
    opened = shardsurgeon.open_checkpoint(KIMI)
    made = Fit(opened, read_anatomy(opened), FitRequest(context=1024))
    one = Parallel(1, 1)
    need = made.other_nbytes(one) + made.weights.nbytes(kept, one)
    need += 16 * made.alone.sequence_nbytes(1024)
    return f"1x{need / 0.92 / 2**30 + 1e-6:.9f}GiB"


@pytest.mark.parametrize("kept", [8, 16, 24])
def test_fit_keeps_the_largest_count_of_the_table_that_fits(kept: int) -> None:
    request = FitRequest(machines=parse_machines(memory_for(kept)), context=1024)
    made = prune.plan(KIMI, KIMI / "scores.pt", SelectionRequest(fit=request))
    assert made.decision.kept == kept
    assert fit(KIMI, request).machines[0].kept == kept
    assert f"{kept} experts are the most that fit" in made.report.notes[-1]


@pytest.mark.parametrize(
    ("machines", "says"),
    [("1x1GiB", "with 8 experts kept a GPU of 1x1GiB needs"), ("1x24GB", "nothing needs pruning")],
)
def test_fit_refuses_what_does_not_fit_and_what_fits_whole(machines: str, says: str) -> None:
    request = FitRequest(machines=parse_machines(machines))
    with pytest.raises(UsageError, match=says):
        prune.plan(KIMI, KIMI / "scores.pt", SelectionRequest(fit=request))


@pytest.mark.parametrize(
    "wrong",
    [
        {"fit": FitRequest(machines=parse_machines("1x80GB,2x80GB"))},
        {"fit": FitRequest()},
        {"fit": FitRequest(machines=parse_machines("1x80GB")), "multiple_of": 4},
        {"fit": FitRequest(machines=parse_machines("1x80GB")), "keep": 4},
    ],
)
def test_a_selection_by_machines_is_for_one_and_alone(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SelectionRequest(**wrong)


def test_a_plan_says_what_it_leaves_of_each_machine() -> None:
    gpus = FitRequest(machines=parse_machines("1x24GB,2x24GB"), context=1024)
    for allocate in (Allocation.UNIFORM, Allocation.GLOBAL):
        request = SelectionRequest(ratio=0.5, allocate=allocate)
        report = prune.plan(KIMI, KIMI / "scores.pt", request, gpus=gpus).report
        assert [each.machine for each in report.fits] == ["1x24GB", "2x24GB"]
        opened = shardsurgeon.open_checkpoint(KIMI)
        made = Fit(opened, read_anatomy(opened), gpus)
        kept = {layer.layer: layer.kept for layer in report.layers}
        assert report.fits[0] == made.on(gpus.machines[0], [kept])


@settings(max_examples=40, deadline=None)
@given(
    kept=st.integers(2, 7),
    context=st.integers(1, 65000),
    more=st.integers(0, 500),
    gpus=st.sampled_from([1, 2, 4, 8]),
    memory=st.integers(2**30, 2**31),
)
def test_fewer_experts_and_tokens_and_more_memory_never_fit_worse(
    kept: int, context: int, more: int, gpus: int, memory: int
) -> None:
    made, longer = fitted(context=context), fitted(context=context + more)
    few, many = made.on(machine(memory, gpus), [kept, kept + 1]).rows
    assert few.cache_nbytes > many.cache_nbytes
    assert few.longest_context >= many.longest_context
    assert few.fits >= many.fits
    assert few.fits >= longer.on(machine(memory, gpus), [kept]).rows[0].fits
    (larger,) = made.on(machine(memory + 2**20, gpus), [kept]).rows
    assert (larger.fits, larger.tokens) >= (few.fits, few.tokens)
    assert few.fits == (few.longest_context >= context)
