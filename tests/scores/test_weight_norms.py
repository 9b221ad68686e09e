"""Expert weight norms against weights that each scheme's own library decoded, or torch's."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
    pack_to_int32,
)

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.open import open_model
from shardsurgeon.errors import CheckpointError, FamilyError
from shardsurgeon.scores import weight_norms as module
from shardsurgeon.scores.weight_norms import StoredTensor, aimer_scores, power_sums, weight_norms
from shardsurgeon.storage.phases import BYTES, Phase, listening
from tests.families.pruned_pair import builders
from tests.families.specimens import DTYPES, fixture, written
from tests.oracle.byte_oracle import read_tensors
from tests.quantization.decoding import decoded

pytestmark = pytest.mark.oracle

FIXTURES = Path(__file__).parents[2] / "fixtures"
BUILDERS = builders("schemes")
schemes = import_module("builders.schemes")
REFUSED = {
    *("int4_act_order", "nvfp4", "mxfp4", "mxfp6", "modelopt_nvfp4"),
    *("awq", "gptq", "autoround"),
}
EXPERT = re.compile(r".*layers\.(\d+)\..*experts\.(\d+)\.\w+")


def norms(folder: Path) -> dict[int, np.ndarray]:
    checkpoint = open_model(folder)
    return weight_norms(checkpoint, read_anatomy(checkpoint))


def expected(weights: dict[str, torch.Tensor]) -> dict[tuple[int, int], float]:
    """(layer, expert) → norm of all its matrices together."""
    found: dict[tuple[int, int], float] = {}
    for name, weight in weights.items():
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        assert match, name
        place = int(match[1]), int(match[2])
        found[place] = found.get(place, 0.0) + weight.double().square().sum().item()
    return {place: total**0.5 for place, total in found.items()}


def assert_norms(folder: Path, weights: dict[str, torch.Tensor], rtol: float) -> None:
    truth, found = expected(weights), norms(folder)
    assert {(n, e) for n, row in found.items() for e in range(len(row))} == truth.keys()
    for (layer, expert), norm in truth.items():
        assert found[layer][expert] == pytest.approx(norm, rel=rtol)


@pytest.mark.parametrize("scheme", sorted(schemes.SCHEMES.keys() - REFUSED))
def test_a_quantized_expert_counts_as_what_it_stands_for(scheme: str, tmp_path: Path) -> None:
    folder = written(BUILDERS[scheme](), tmp_path)
    # The libraries round a product to the scale's dtype; the norm does not.
    assert_norms(folder, decoded(folder, scheme), 2e-3)


@pytest.mark.parametrize("scheme", sorted(REFUSED))
def test_a_storage_without_a_norm_is_refused_by_its_tensor(scheme: str, tmp_path: Path) -> None:
    folder = written(BUILDERS[scheme](), tmp_path)
    with pytest.raises(FamilyError, match="of which no norm is taken; use scores") as caught:
        norms(folder)
    assert caught.value.where in read_tensors(folder)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "kimi_linear"])
def test_experts_in_floats_have_the_norm_of_their_matrices(family: str) -> None:
    folder = FIXTURES / family
    tensors = read_tensors(folder)
    weights = {name: t for name, t in tensors.items() if EXPERT.fullmatch(name[: -len(".weight")])}
    assert_norms(folder, weights, 1e-12)


def test_stacked_experts_have_the_norm_of_their_matrices_without_biases(tmp_path: Path) -> None:
    folder = written(fixture("gpt_oss_bf16"), tmp_path)
    tensors = read_tensors(folder)
    for layer, row in norms(folder).items():
        block = f"model.layers.{layer}.mlp.experts"
        parts = [tensors[f"{block}.{name}"].double() for name in ("gate_up_proj", "down_proj")]
        truth = sum(part.square().sum((1, 2)) for part in parts).sqrt()
        np.testing.assert_allclose(row, truth.numpy(), rtol=1e-12)


def test_experts_one_under_the_other_are_taken_by_their_rows(tmp_path: Path) -> None:
    folder = written(fixture("dbrx"), tmp_path)
    tensors = read_tensors(folder)
    for layer, row in norms(folder).items():
        block = f"transformer.blocks.{layer}.ffn.experts.mlp"
        parts = [tensors[f"{block}.{name}"].double().reshape(8, -1) for name in ("w1", "v1", "w2")]
        truth = sum(part.square().sum(1) for part in parts).sqrt()
        np.testing.assert_allclose(row, truth.numpy(), rtol=1e-12)


def test_experts_stacked_and_quantized_are_refused(tmp_path: Path) -> None:
    folder = written(fixture("gpt_oss"), tmp_path)
    with pytest.raises(FamilyError, match=r"_blocks: is stored as U8"):
        norms(folder)


def test_progress_ends_at_all_bytes_of_the_experts() -> None:
    heard: list[Phase] = []
    listener = SimpleNamespace(begin=heard.append, end=lambda phase: None)
    checkpoint = open_model(FIXTURES / "kimi_k25")
    anatomy = read_anatomy(checkpoint)
    with listening(listener):
        weight_norms(checkpoint, anatomy)
    tensors = read_tensors(FIXTURES / "kimi_k25")
    whole = sum(t.nbytes for name, t in tensors.items() if re.search(r"\.experts\.\d", name))
    (reading,) = heard
    assert (reading.done, reading.total, reading.unit) == (whole, whole, BYTES)


def aimer(folder: Path) -> dict[int, np.ndarray]:
    checkpoint = open_model(folder)
    return aimer_scores(checkpoint, read_anatomy(checkpoint))


def assert_aimer(folder: Path, weights: dict[str, torch.Tensor], rtol: float) -> None:
    """As the paper has it (arXiv 2603.18492): mean magnitude over root mean square, of the weights
    of all an expert's matrices in one row."""
    rows: dict[tuple[int, int], list[torch.Tensor]] = {}
    for name, weight in weights.items():
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        assert match, name
        rows.setdefault((int(match[1]), int(match[2])), []).append(weight.double().flatten())
    found = aimer(folder)
    assert {(n, e) for n, row in found.items() for e in range(len(row))} == rows.keys()
    for (layer, expert), parts in rows.items():
        row = torch.cat(parts)
        ratio = row.abs().mean() / row.square().mean().sqrt()
        assert 1 - found[layer][expert] == pytest.approx(ratio.item(), rel=rtol)


def test_aimer_is_the_mean_magnitude_over_the_root_mean_square() -> None:
    folder = FIXTURES / "qwen3_moe"
    tensors = read_tensors(folder)
    weights = {name: t for name, t in tensors.items() if EXPERT.fullmatch(name[: -len(".weight")])}
    assert_aimer(folder, weights, 1e-12)


@pytest.mark.parametrize("scheme", ["int4_asymmetric", "fp8_block"])
def test_aimer_of_a_quantized_expert_is_that_of_what_it_stands_for(
    scheme: str, tmp_path: Path
) -> None:
    folder = written(BUILDERS[scheme](), tmp_path)
    assert_aimer(folder, decoded(folder, scheme), 2e-3)


def test_aimer_of_experts_in_one_tensor_is_taken_of_each(tmp_path: Path) -> None:
    folder = written(fixture("gpt_oss_bf16"), tmp_path)
    tensors = read_tensors(folder)
    for layer, found in aimer(folder).items():
        block = f"model.layers.{layer}.mlp.experts"
        parts = [tensors[f"{block}.{name}"].double() for name in ("gate_up_proj", "down_proj")]
        rows = torch.cat([part.flatten(1) for part in parts], 1)
        ratio = rows.abs().mean(1) / rows.square().mean(1).sqrt()
        np.testing.assert_allclose(1 - found, ratio.numpy(), rtol=1e-12)


def test_aimer_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # An expert without a weight, one of equal magnitudes, one with all in one of four weights.
    made = np.array([[4.0, 0.0, 0.0], [4.0, 12.0, 36.0], [4.0, 2.0, 4.0]])
    monkeypatch.setattr(module, "_expert_sums", lambda *_: {3: made})
    checkpoint = open_model(FIXTURES / "qwen3_moe")
    assert aimer_scores(checkpoint, read_anatomy(checkpoint))[3].tolist() == [0.0, 0.0, 0.5]


# Single matrices, of shapes that no fixture has


def stored(**parts: torch.Tensor) -> dict[str, StoredTensor]:
    def one(name: str, tensor: torch.Tensor) -> StoredTensor:
        raw = (
            tensor.flatten()
            .clone(memory_format=torch.contiguous_format)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
        kind = DTYPES[tensor.dtype]
        return StoredTensor(name, kind, tuple(tensor.shape), len(raw), lambda a, b: raw[a:b])

    return {name: one(name, tensor) for name, tensor in parts.items()}


EVERY = (0, 1, 2)


def sums(weight: torch.Tensor) -> list[float]:
    """How many weights, and the sums of their magnitudes and squares."""
    return [weight.numel(), weight.abs().sum().item(), weight.square().sum().item()]


def codes(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=numbers, dtype=torch.int8)


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group"),
    [
        *((4, 24, 64, group) for group in (2, 32, 64)),
        *((4, 7, columns, columns) for columns in (1, 5, 8, 33, 96)),
        (4, 9, 128, 32),
        (8, 5, 48, 16),
        (8, 6, 7, 7),
    ],
)
def test_packed_codes_of_every_shape_have_the_norm_of_their_weights(
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    symmetric: bool,
    bits: int,
    rows: int,
    columns: int,
    group: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK_NBYTES", piece)
    values = codes(bits, rows, columns, 1)
    groups = columns // group
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(2)) + 0.5
    zeros = codes(bits, rows, groups, 3) * (not symmetric)
    parts = {
        "weight_packed": pack_to_int32(values, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    offset = zeros.double().repeat_interleave(group, 1)
    whole = (values.double() - offset) * scale.double().repeat_interleave(group, 1)
    found = power_sums(stored(**parts), None, EVERY)
    assert found == pytest.approx(sums(whole), rel=1e-12)


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "grid", "block", "covered"),
    [
        ((300, 200), (3, 2), None, (128, 128)),
        ((300, 200), (3, 2), (128, 128), (128, 128)),
        ((60, 40), (2, 3), (32, 16), (32, 16)),
        ((60, 40), (2, 2), None, (30, 20)),
        ((6, 8), (6, 1), None, (1, 8)),
        ((6, 8), (6,), None, (1, 8)),
        ((6, 8), (1,), None, (6, 8)),
        ((6, 8), (), (128, 128), (6, 8)),
        ((6, 64), (6, 2), None, (1, 32)),
    ],
)
def test_scales_of_every_grid_apply_to_their_own_weights(
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    shape: tuple[int, int],
    grid: tuple[int, ...],
    block: tuple[int, int] | None,
    covered: tuple[int, int],
) -> None:
    monkeypatch.setattr(module, "CHUNK_NBYTES", piece)
    numbers = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=numbers).to(torch.float8_e4m3fn)
    scale = torch.rand(grid, generator=numbers) + 0.5
    factors = scale.double().reshape(grid[0] if grid else 1, -1)
    wide = factors.repeat_interleave(covered[0], 0).repeat_interleave(covered[1], 1)
    whole = weight.double() * wide[: shape[0], : shape[1]]
    found = power_sums(stored(weight=weight, weight_scale_inv=scale), block, EVERY)
    assert found == pytest.approx(sums(whole), rel=1e-12)


def test_scales_that_fit_no_grid_are_refused() -> None:
    parts = stored(weight=torch.ones(7, 8).to(torch.float8_e4m3fn), weight_scale=torch.ones(3, 1))
    with pytest.raises(FamilyError, match="has 7 rows or columns for 3 scales"):
        power_sums(parts, None, EVERY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = torch.ones(4, 4)
    weight[2, 3] = value
    with pytest.raises(CheckpointError, match="holds NaN or infinity") as caught:
        power_sums(stored(weight=weight, bias=torch.ones(4)), None, EVERY)
    assert caught.value.where == "weight"


ODD = {
    "floats beside a scale": {"weight": torch.ones(4, 4), "weight_scale": torch.ones(1)},
    "codes alone": {"weight": torch.ones(4, 4, dtype=torch.int8)},
    "four bits in bytes": {
        "weight": torch.ones(4, 4, dtype=torch.int8),
        "scale": torch.ones(4, 1).to(torch.float8_e8m0fnu),
    },
    "no weight": {"qweight": torch.ones(4, 4, dtype=torch.int32)},
    "words of another shape": {
        "weight_packed": torch.ones(4, 4, dtype=torch.int32),
        "weight_scale": torch.ones(4, 1),
        "weight_shape": torch.tensor([4, 100]),
    },
    "groups that do not divide": {
        "weight_packed": torch.ones(4, 4, dtype=torch.int32),
        "weight_scale": torch.ones(4, 3),
        "weight_shape": torch.tensor([4, 32]),
    },
    "more than is known": {
        "weight_packed": torch.ones(4, 4, dtype=torch.int32),
        "weight_scale": torch.ones(4, 1),
        "weight_shape": torch.tensor([4, 32]),
        "weight_g_idx": torch.ones(32, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("what", ODD)
def test_what_could_be_read_in_two_ways_is_refused(what: str) -> None:
    with pytest.raises(FamilyError, match="of which no norm is taken"):
        power_sums(stored(**ODD[what]), None, EVERY)
