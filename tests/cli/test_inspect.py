"""`inspect`: facts for people, and the contract's JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from shardsurgeon.operations.reports import PrunedReport
from tests.cli.standins import INSPECTED, FakeOperations, Run

CONTRACT_KEYS = {
    *("model_type", "architectures", "num_hidden_layers", "moe_layers", "mtp_layers"),
    *("num_experts", "top_k", "n_group", "topk_group", "expert_layout", "quantization"),
    *("shards", "tensors", "total_size", "expert_size", "sizes_at"),
}


def test_the_current_folder_is_the_default(run: Run, fake: FakeOperations) -> None:
    run("inspect")
    run("inspect", "/models/K2")
    assert [args for args, _ in fake.calls] == [(None,), ("/models/K2",)]


def test_json_is_one_document_with_the_keys_of_the_contract(run: Run) -> None:
    document = json.loads(run("inspect", "--json").stdout)
    assert set(document) >= CONTRACT_KEYS
    assert {key: document[key] for key in asdict(INSPECTED)} == json.loads(
        json.dumps(asdict(INSPECTED))
    )
    assert document["shares_at"]["0.5"] == pytest.approx(0.508, abs=0.001)
    assert document == INSPECTED.to_dict()


def test_the_report_reads_well(run: Run) -> None:
    assert run("inspect").stdout == (
        "Kimi-K2.5: kimi_k25\n"
        "\n"
        "  architecture  KimiK25ForConditionalGeneration\n"
        "  family        kimi_k25\n"
        "  layers        61\n"
        "  MoE layers    60 (1-60)\n"
        "  MTP layers    none with experts\n"
        "  experts       384 per MoE layer, 8 chosen per token\n"
        "  layout        per-expert\n"
        "  quantization  pack-quantized\n"
        "  tensors       208,235 in 64 shards\n"
        "  tensor data   594.1 GB\n"
        "  parameters    1,026.4B\n"
        "  one expert    25.1 MB in a layer, 1.5 GB over all layers\n"
        "\n"
        "  experts     tensor  share\n"
        "  removed  data left   left\n"
        "  -------  ---------  -----\n"
        "      25%   448.0 GB  75.4%\n"
        "      50%   302.0 GB  50.8%\n"
        "\n"
        "  kB, MB, GB, TB: powers of 1000 bytes; K, M, B: powers of 1000 parameters\n"
    )


def test_dtypes_and_active_parameters_are_said(run: Run, fake: FakeOperations) -> None:
    fake.inspect = replace(
        INSPECTED, active_parameters=32_900_000_000, dtypes={"I32": 540 * 10**9, "BF16": 54 * 10**9}
    )
    lines = run("inspect").stdout.splitlines()
    assert "  tensor data   594.1 GB: 540.0 GB I32, 54.0 GB BF16" in lines
    assert "  parameters    1,026.4B, 32.9B of them active per token" in lines
    fake.inspect = replace(INSPECTED, dtypes={"BF16": 594_100_000_000})
    assert "  tensor data   594.1 GB BF16" in run("inspect").stdout.splitlines()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "from Kimi-K2.5, which had 384 experts per MoE layer, by 65% (metric reap)"),
        ({"ratio": 0.125, "metric": None}, "per MoE layer, by 12.5% (a keep-list)"),
        ({"prunes": 2, "source": "half"}, "layer, in 2 prunes, the last of half, by 65% (metric"),
    ],
)
def test_a_pruned_model_is_said_to_be_one(
    run: Run, fake: FakeOperations, changed: dict[str, Any], line: str
) -> None:
    pruned = PrunedReport("Kimi-K2.5", 384, "Kimi-K2.5", "ratio", 0.65, "reap", 1)
    fake.inspect = replace(INSPECTED, pruned=replace(pruned, **changed))
    assert line in " ".join(run("inspect").stdout.split())
    said = json.loads(run("inspect", "--json").stdout)["pruned"]
    assert said == asdict(replace(pruned, **changed))


def test_groups_and_notes_are_told_where_there_are_any(run: Run, fake: FakeOperations) -> None:
    fake.inspect = replace(INSPECTED, n_group=8, topk_group=4, notes=("x.bin is left out",))
    lines = run("inspect").stdout.splitlines()
    assert "  groups        8, 4 of them chosen per token" in lines
    assert lines[-1] == "  note          x.bin is left out"
    said = json.loads(run("inspect", "--json").stdout)
    assert (said["n_group"], said["topk_group"]) == (8, 4)


def test_smallest_and_largest_are_told_where_experts_differ_in_size(
    run: Run, fake: FakeOperations
) -> None:
    sizes = {"smallest_expert_size": 8_200_000, "expert_size_over_layers": 508_900_000}
    fake.inspect = replace(INSPECTED, **sizes, smallest_expert_size_over_layers=508_900_000)
    assert (
        "  one expert    8.2 MB to 25.1 MB in a layer, 508.9 MB over all layers"
        in run("inspect").stdout.splitlines()
    )


def test_what_is_unknown_is_not_made_up(run: Run, fake: FakeOperations) -> None:
    fake.inspect = replace(
        INSPECTED, model_type=None, architectures=(), total_parameters=None, sizes_at={}
    )
    text = run("inspect").stdout
    assert text.startswith("Kimi-K2.5: kimi_k25\n")
    assert "parameters" not in text
    assert "removed" not in text
