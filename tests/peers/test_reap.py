"""Our selection against the REAP reference code's, re-derived here from its rules with torch.

The rules, of `prune.py` and `model_util.py` of the reference:
- int(experts * ratio) experts go from every layer, those of the lowest metric by torch.topk;
- super experts: over the `max_activations` of all layers the threshold is the larger of the
  99.5 % quantile and a tenth of the maximum; what is above it in the first 75 % of the layers
  gets +inf for its metric.
Score files are written by torch in the observer's form. Where we differ on purpose, a test says
how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shardsurgeon.checkpoint.anatomy import Anatomy, read_anatomy
from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import UsageError
from shardsurgeon.pruning.decide import Decision, decide
from shardsurgeon.pruning.request import SelectionRequest
from shardsurgeon.scores.files import read_scores
from tests.families.specimens import Specimen

pytestmark = pytest.mark.oracle

Observed = dict[int, dict[str, torch.Tensor]]
Retained = dict[int, list[int]]

METRICS = [
    *("reap", "ean_sum", "ean_mean", "weighted_ean_sum"),
    *("expert_frequency", "weighted_expert_frequency_sum"),
]
# What the reference marks super experts in; not the plain frequency.
MARKED = [metric for metric in METRICS if metric != "expert_frequency"]

some = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


# The reference's rules


def reference(
    observed: Observed, ratio: float, metric: str, marked: Mapping[int, list[int]] | None = None
) -> Retained:
    """Layer → ids that stay. marked: layer → super experts."""
    experts = len(next(iter(observed.values()))["expert_frequency"])
    retained = {}
    for layer, metrics in observed.items():
        values = metrics[metric].clone()
        if marked and metric in MARKED:
            values[marked.get(layer, [])] = float("inf")
        pruned = torch.topk(values, int(experts * ratio), largest=False).indices.tolist()
        retained[layer] = [expert for expert in range(experts) if expert not in pruned]
    return retained


def super_experts_by_row(observed: Observed) -> dict[int, list[int]]:
    """Row of the observer's table → super experts."""
    rows = torch.stack([metrics["max_activations"] for metrics in observed.values()])
    threshold = max(torch.quantile(rows.flatten(), 0.995).item(), rows.max().item() / 10)
    return {
        row: torch.nonzero(rows[row] > threshold).flatten().tolist()
        for row in range(int(len(rows) * 0.75))
    }


def as_meant(observed: Observed) -> dict[int, list[int]]:
    """Layer → super experts, each row being its own layer's."""
    layers = list(observed)
    return {layers[row]: ids for row, ids in super_experts_by_row(observed).items()}


# A model and its scores


def model(layers: int, experts: int, dense: int = 0) -> tuple[Checkpoint, Anatomy]:
    """GLM-4.5's names, one group; its first `dense` of `layers` layers have no experts."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(dense, layers):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = ("BF16", (experts, 16))
        for expert in range(experts):
            tensors[f"{block}.experts.{expert}.up_proj.weight"] = ("BF16", (4, 16))
    config: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": layers,
    }
    checkpoint = Specimen(tensors, config).checkpoint()
    return checkpoint, read_anatomy(checkpoint)


def observe(seed: int, layers: range, experts: int, *, never_routed: int = 0) -> Observed:
    """A random observer file: every value of a metric is another one, but for the zeros of
    experts that no token reached."""
    rng = np.random.default_rng(seed)
    observed: Observed = {}
    for layer in layers:
        metrics: dict[str, torch.Tensor] = {"total_tokens": torch.tensor(4096)}
        reached = np.ones(experts)
        reached[rng.permutation(experts)[:never_routed]] = 0
        for metric in METRICS:
            # A permutation of different numbers: ties are tested on their own.
            values = (rng.permutation(experts) + 1) * rng.uniform(0.5, 2.0) * reached
            metrics[metric] = torch.from_numpy(values)
        for metric in ("reap", "ean_mean"):
            metrics[metric] = metrics[metric].float()
        frequency = rng.permutation(experts) + 1
        metrics["expert_frequency"] = torch.from_numpy(frequency * reached.astype(np.int64))
        peaks = rng.lognormal(0.0, 1.0, experts) * reached
        peaks[rng.integers(experts)] *= rng.choice([1.0, 40.0])
        metrics["max_activations"] = torch.from_numpy(peaks).float()
        metrics["pairwise_expert_frequency"] = torch.zeros(experts, experts, dtype=torch.int64)
        observed[layer] = metrics
    return observed


def decision(
    folder: Path, observed: Observed, model_: tuple[Checkpoint, Anatomy], **words: Any
) -> Decision:
    """Ours, by the way of the command: the file as torch saves it, read without torch."""
    file = folder / "observer.pt"
    torch.save(observed, file)
    request = SelectionRequest(**words)
    return decide(*model_, read_scores(file), request, lambda counts: 0)


def retained(decided: Decision) -> Retained:
    return {layer: list(keep.retained) for layer, keep in decided.keep.layers.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, float]:
    """(first MoE layer, layers, experts, ratio), the ratio removing one and leaving two, as
    many as this family's router compares."""
    dense, moe = draw(st.integers(0, 3)), draw(st.integers(1, 9))
    experts = draw(st.integers(3, 40))
    ratio = draw(
        st.one_of(
            st.integers(1, 99).map(lambda n: n / 100), st.floats(0.001, 0.999, allow_nan=False)
        )
    )
    assume(1 <= int(experts * ratio) <= experts - 2)
    return dense, dense + moe, experts, ratio


@some
@given(case=cases(), seed=st.integers(0, 2**32), metric=st.sampled_from(METRICS))
def test_the_same_experts_stay(
    tmp_path: Path, case: tuple[int, int, int, float], seed: int, metric: str
) -> None:
    dense, layers, experts, ratio = case
    observed = observe(seed, range(dense, layers), experts)
    decided = decision(
        tmp_path, observed, model(layers, experts, dense), ratio=ratio, metric=metric
    )
    assert retained(decided) == reference(observed, ratio, metric)


def test_reap_is_the_default_metric(tmp_path: Path) -> None:
    observed = observe(1, range(4), 16)
    decided = decision(tmp_path, observed, model(4, 16), ratio=0.5)
    assert decided.metric == "reap"
    assert retained(decided) == reference(observed, 0.5, "reap")


@pytest.mark.parametrize(
    ("experts", "ratio", "removed"),
    [(256, 0.30, 76), (256, 0.20, 51), (384, 0.50, 192), (384, 0.65, 249), (100, 0.29, 28)],
)
def test_the_number_removed_is_the_references_int(
    experts: int, ratio: float, removed: int, tmp_path: Path
) -> None:
    """The last one is 28.999999999999996 in floats."""
    assert int(experts * ratio) == removed
    observed = observe(2, range(2), experts)
    decided = decision(tmp_path, observed, model(2, experts), ratio=ratio)
    assert decided.kept == experts - removed
    assert retained(decided) == reference(observed, ratio, "reap")


@some
@given(
    layers=st.integers(1, 12),
    experts=st.integers(8, 40),
    seed=st.integers(0, 2**32),
    metric=st.sampled_from(MARKED),
)
def test_super_experts_are_the_same_and_stay(
    tmp_path: Path, layers: int, experts: int, seed: int, metric: str
) -> None:
    """Every layer has experts, so that a row of its table is the layer of that number."""
    observed = observe(seed, range(layers), experts)
    marked = super_experts_by_row(observed)
    kept = experts - int(experts * 0.5)
    assume(all(len(ids) <= kept for ids in marked.values()))
    decided = decision(
        tmp_path,
        observed,
        model(layers, experts),
        ratio=0.5,
        metric=metric,
        preserve_super_experts=True,
    )
    assert retained(decided) == reference(observed, 0.5, metric, marked)
    found = {layer: list(keep.preserved) for layer, keep in decided.keep.layers.items()}
    assert found == {layer: marked.get(layer, []) for layer in range(layers)}


def one_extreme(layer: int, expert: int, dense: int) -> Observed:
    """8 layers of 10 experts behind the dense ones, one with a huge activation and no merit."""
    observed = observe(3, range(dense, dense + 8), 10)
    for metrics in observed.values():
        metrics["max_activations"] = torch.linspace(1.0, 2.0, 10)
    observed[layer]["max_activations"][expert] = 1000.0
    observed[layer]["reap"] = torch.arange(1, 11).roll(expert).float()
    return observed


def test_super_experts_of_the_last_quarter_of_the_layers_are_not_preserved(tmp_path: Path) -> None:
    for layer, stays in ((5, True), (6, False)):
        observed = one_extreme(layer, 4, dense=0)
        decided = decision(tmp_path, observed, model(8, 10), ratio=0.5, preserve_super_experts=True)
        assert (4 in decided.keep.layers[layer].retained) is stays
        assert retained(decided) == reference(observed, 0.5, "reap", super_experts_by_row(observed))


def test_behind_dense_layers_the_reference_marks_in_another_layer_and_we_do_not(
    tmp_path: Path,
) -> None:
    """It looks its rows up by layer number: behind 3 dense layers, what it found in layer 5 it
    marks in layer 2, which has no experts, and what it found in layer 7 in layer 4."""
    dense = 3
    observed = one_extreme(7, 4, dense)
    decided = decision(
        tmp_path, observed, model(11, 10, dense), ratio=0.5, preserve_super_experts=True
    )
    assert retained(decided) == reference(observed, 0.5, "reap", as_meant(observed))
    assert decided.keep.layers[7].preserved == (4,)

    as_written = reference(observed, 0.5, "reap", super_experts_by_row(observed))
    assert super_experts_by_row(observed)[7 - dense] == [4]
    assert 4 not in as_written[7]
    assert 4 in as_written[7 - dense]
    different = {layer for layer in as_written if as_written[layer] != retained(decided)[layer]}
    assert different <= {7, 7 - dense}
    assert 7 in different


@some
@given(case=cases(), seed=st.integers(0, 2**32))
def test_behind_dense_layers_ours_is_what_the_reference_means(
    tmp_path: Path, case: tuple[int, int, int, float], seed: int
) -> None:
    dense, layers, experts, ratio = case
    observed = observe(seed, range(dense, layers), experts)
    marked = as_meant(observed)
    kept = experts - int(experts * ratio)
    assume(all(len(ids) <= kept for ids in marked.values()))
    decided = decision(
        tmp_path,
        observed,
        model(layers, experts, dense),
        ratio=ratio,
        preserve_super_experts=True,
    )
    assert retained(decided) == reference(observed, ratio, "reap", marked)


def test_under_the_plain_frequency_the_reference_forgets_super_experts_and_we_do_not(
    tmp_path: Path,
) -> None:
    observed = one_extreme(2, 4, dense=0)
    observed[2]["expert_frequency"] = torch.arange(1, 11).roll(4)
    decided = decision(
        tmp_path,
        observed,
        model(8, 10),
        ratio=0.5,
        metric="expert_frequency",
        preserve_super_experts=True,
    )
    marked = super_experts_by_row(observed)
    assert marked[2] == [4]
    assert 4 not in reference(observed, 0.5, "expert_frequency", marked)[2]
    assert 4 in decided.keep.layers[2].retained


@some
@given(case=cases(), seed=st.integers(0, 2**32), data=st.data())
def test_infinite_saliency_in_the_file_preserves(
    tmp_path: Path, case: tuple[int, int, int, float], seed: int, data: st.DataObject
) -> None:
    dense, layers, experts, ratio = case
    observed = observe(seed, range(dense, layers), experts)
    kept = experts - int(experts * ratio)
    for metrics in observed.values():
        marked = data.draw(st.sets(st.integers(0, experts - 1), max_size=kept))
        metrics["reap"][list(marked)] = float("inf")
    decided = decision(tmp_path, observed, model(layers, experts, dense), ratio=ratio)
    assert retained(decided) == reference(observed, ratio, "reap")


@some
@given(case=cases(), seed=st.integers(0, 2**32), data=st.data())
def test_experts_that_no_token_reached_go_first(
    tmp_path: Path, case: tuple[int, int, int, float], seed: int, data: st.DataObject
) -> None:
    """The observer leaves 0 for them. As many as go are no tie at the cut."""
    dense, layers, experts, ratio = case
    unreached = data.draw(st.integers(0, int(experts * ratio)))
    observed = observe(seed, range(dense, layers), experts, never_routed=unreached)
    decided = decision(tmp_path, observed, model(layers, experts, dense), ratio=ratio)
    assert retained(decided) == reference(observed, ratio, "reap")
    for layer, keep in decided.keep.layers.items():
        nobody = torch.nonzero(observed[layer]["expert_frequency"] == 0).flatten().tolist()
        assert set(nobody) <= set(keep.pruned)
        assert list(decided.never_routed.get(layer, ())) == nobody


def test_a_mean_over_no_tokens_goes_first_where_the_reference_would_keep_it(
    tmp_path: Path,
) -> None:
    """0/0 is NaN, which torch.topk takes for the greatest of all."""
    observed = observe(4, range(2), 12, never_routed=2)
    for metrics in observed.values():
        metrics["reap"][metrics["expert_frequency"] == 0] = float("nan")
    decided = decision(tmp_path, observed, model(2, 12), ratio=0.5)
    for layer, kept in reference(observed, 0.5, "reap").items():
        nobody = set(decided.never_routed[layer])
        assert len(nobody) == 2
        assert nobody <= set(kept)
        assert nobody <= set(decided.keep.layers[layer].pruned)


@some
@given(seed=st.integers(0, 2**32), experts=st.integers(4, 40))
def test_ties_keep_the_lower_ids_and_the_same_saliency_as_the_reference(
    tmp_path: Path, seed: int, experts: int
) -> None:
    """Which of several equals torch.topk gives is its own affair; ours is a rule."""
    observed = observe(seed, range(2), experts)
    for metrics in observed.values():
        metrics["reap"] = (metrics["reap"] / metrics["reap"].max() * 3).round()
    decided = decision(tmp_path, observed, model(2, experts), ratio=0.5)
    for layer, kept in reference(observed, 0.5, "reap").items():
        values, mine = observed[layer]["reap"], list(decided.keep.layers[layer].retained)
        assert sorted(values[mine].tolist()) == sorted(values[kept].tolist())
        cut = values[mine].min()
        equals = torch.nonzero(values == cut).flatten().tolist()
        chosen = [expert for expert in mine if values[expert] == cut]
        assert chosen == equals[: len(chosen)]


def test_more_preserved_experts_than_may_stay_are_refused_where_the_reference_drops_some(
    tmp_path: Path,
) -> None:
    observed = observe(5, range(1), 8)
    observed[0]["reap"][:5] = float("inf")
    kept = reference(observed, 0.5, "reap")[0]
    assert len(kept) == 4 < len(torch.nonzero(observed[0]["reap"].isinf()))
    with pytest.raises(UsageError, match="5 experts are preserved, 4 may be kept"):
        decision(tmp_path, observed, model(1, 8), ratio=0.5)
