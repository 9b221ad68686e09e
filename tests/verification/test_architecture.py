"""Every fixture, pruned, fits the model that transformers builds from its config; spoiled, not.

The fixtures are pruned by the real planner and executor. Families that transformers cannot build
are listed with the words in which the check says so. Of what it builds it may leave out towers
for images and sound; of experts and routers nothing goes unchecked but two router biases of
DeepSeek-V4's vision files, one for images and one in hash layers, which it does not have.
"""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from shardsurgeon.checkpoint.anatomy import read_anatomy
from shardsurgeon.checkpoint.checkpoint import open_checkpoint
from shardsurgeon.cli.main import main
from shardsurgeon.errors import FamilyError, UsageError
from shardsurgeon.operations import api
from shardsurgeon.verification.architecture import check_architecture
from shardsurgeon.verification.findings import ArchitectureReport
from tests.families.specimens import FIXTURES, Specimen, builders, fixture, specimen
from tests.oracle.byte_oracle import read_config

pytestmark = pytest.mark.oracle

NOT_BUILT = {
    "bailing_moe": "it has no model for Ling 1 and 2, which run by remote code",
    "bailing_moe_v2": "it has no model for Ling 1 and 2, which run by remote code",
    "sarvam_mla": "it has no model for Sarvam, which runs by remote code",
    "sarvam_moe": "it has no model for Sarvam, which runs by remote code",
    "longcat_flash_ngram": "it has no model with embeddings of n-grams; vLLM has",
    "step3_text": "it has no model for Step-3, which runs by remote code; vLLM has",
    "step3_vl": "it has no model for Step-3, which runs by remote code; vLLM has",
    "step5": "it has no model for Step-5, which runs by remote code",
    "arctic": "it has no model for Arctic, which runs by remote code",
    "grok1": "it has no model for Grok, which runs by remote code",
    "grok2": "it has no model for Grok, which runs by remote code",
    "minimax_m1": "minimax_m1",
    "mistral_native": "it does not read Mistral's own format; vLLM does",
    "kimi_k3": "it has no model for Kimi-K3's latent experts; vLLM has",
    "nemotron_h_puzzle": "it has no model whose layers differ in their experts; vLLM has",
    "hunyuan_v1_moe_lists": "Field 'num_experts' expected int, got list",
    "kimi_vl": "it has no model for Kimi-VL, only for the text model inside",
    "deepseek_vl2": "it does not know model type 'deepseek_vl_v2'",
    "deepseek_ocr": "it does not know model type 'deepseek_vl_v2'",
    "deepseek_v41": "it has no model for DeepSeek-V4.1; vLLM has",
    "deepseek_v41_even": "it has no model for DeepSeek-V4.1; vLLM has",
    "internvl_qwen3_moe": "it does not know model type 'internvl_chat'",
    "internvl_gpt_oss": "it does not know model type 'internvl_chat'",
    "interns1": "it does not know model type 'interns1'",
    "ovis2_6_moe": "it does not know model type 'ovis2_6_moe'",
}
# Stored in a way that transformers does not read, the source as well.
NOT_READABLE = {"inkling_nvfp4"}
# What transformers' class lacks of a published checkpoint, beside MTP layers.
NOT_READ = re.compile(
    r"(model\.)?(visual|vision|linear_proj|audio_encoder|speech_embeddings|aligner|image_start)\b"
    r"|layers\.\*\.mlp\.gate\.(bias_vl|e_score_correction_bias)\b"
)
# Fixtures that hold the text model of a wrapper alone: what else it has is missing in them.
TEXT_ALONE = {"diffusion_gemma", "inkling", "mistral_large4", "unlimited_ocr"}
EITHER = ": does not fit in the source either"


@dataclass(frozen=True)
class Pair:
    """A fixture's folder and its pruned copy's."""

    source: Path
    folder: Path

    def pruned(self) -> Specimen:
        """The pruned checkpoint's headers and config, to be spoiled."""
        tensors = {}
        for file in self.folder.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118 (an open file is no dict)
                    part = shard.get_slice(name)
                    tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
        return Specimen(tensors, read_config(self.folder))

    def check(self, pruned: Specimen) -> ArchitectureReport:
        return check_architecture(self.source, pruned.checkpoint())


Pairs = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A fixture by name, pruned by half, once."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = FIXTURES / name
            if not source.is_dir():
                with warnings.catch_warnings():
                    # transformers' warnings about the published configs do not concern these tests.
                    warnings.simplefilter("ignore")
                    source = written(name, folder)
            plan = api.plan(source, source / "scores.pt", ratio=0.5, out=folder / "pruned")
            api.apply(plan, verify=False)
            made[name] = Pair(source, folder / "pruned")
        return made[name]

    return pair


def mtp_layers(name: str) -> int:
    """MTP layers that a fixture's config counts; 0 for what is refused."""
    try:
        return read_anatomy(specimen(name).checkpoint()).num_mtp_layers
    except FamilyError:
        return 0


def written(name: str, folder: Path) -> Path:
    path: Path = importlib.import_module("builders.folder").write(fixture(name), folder)
    return path


@pytest.mark.parametrize(
    "name", sorted(builders().keys() - NOT_BUILT.keys() - NOT_READABLE - TEXT_ALONE)
)
def test_a_pruned_checkpoint_fits_its_config(name: str, pairs: Pairs) -> None:
    pair = pairs(name)
    report = check_architecture(pair.source, pair.folder)
    assert report.differences == ()
    left_out = [line for line in report.unchecked if line.endswith(EITHER)]
    assert [line for line in left_out if not NOT_READ.match(line)] == []
    assert report.engine.startswith("transformers 5.")


@pytest.mark.parametrize("name", sorted(NOT_READABLE))
def test_what_transformers_cannot_read_is_said_to_be_so_of_the_source_too(
    name: str, pairs: Pairs
) -> None:
    report = check_architecture(pairs(name).source, pairs(name).folder)
    assert report.differences
    assert all(".experts." in line and "in the source too" in line for line in report.differences)


WITH_MTP = {name for name in builders() if mtp_layers(name)}


@pytest.mark.parametrize("name", sorted(WITH_MTP - NOT_BUILT.keys() - NOT_READABLE - TEXT_ALONE))
def test_a_checkpoint_whose_mtp_layers_are_dropped_fits_its_config(
    name: str, tmp_path: Path
) -> None:
    source = written(name, tmp_path / "source")
    out = tmp_path / "out"
    api.apply(api.plan(source, source / "scores.pt", ratio=0.5, mtp="drop", out=out))
    assert check_architecture(source, out).differences == ()


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_transformers_cannot_build_is_said_to_be_so(name: str, tmp_path: Path) -> None:
    source = written(name, tmp_path)
    with pytest.raises(UsageError, match=re.escape(NOT_BUILT[name])) as refused:
        check_architecture(source, source)
    assert refused.value.where == "--architecture"
    assert "\n" not in str(refused.value)


def test_the_report_says_what_was_built_and_what_was_not_looked_at(pairs: Pairs) -> None:
    pair = pairs("deepseek_v3")
    report = check_architecture(pair.source, pair.folder)
    assert report.model_class == "DeepseekV3ForCausalLM"
    # 3 layers, one of them dense; 4 groups of experts are what 2 stacked parameters hold.
    assert report.parameters == 47
    assert report.tensors == open_checkpoint(pair.folder).num_tensors
    assert report.mtp_layers == (3,)
    assert "model.layers.*.eh_proj.weight" in report.unchecked
    assert not any("mlp" in line for line in report.unchecked)


def test_a_model_that_was_not_pruned_fits_too(pairs: Pairs) -> None:
    source = pairs("qwen3_moe").source
    assert check_architecture(source, source).differences == ()


# Spoiled results. V3 has 24 experts and keeps 12; layer 3 is its MTP layer.
V3 = "model.layers.1.mlp"
STACKED = f"{V3}.experts.gate_up_proj"


def test_the_config_of_the_original_beside_pruned_weights_is_found(pairs: Pairs) -> None:
    pair = pairs("deepseek_v3")
    pruned = Specimen(pair.pruned().tensors, read_config(pair.source))
    report = pair.check(pruned)
    assert f"{STACKED}: shape [12, 48, 64], and the config makes it [24, 48, 64]" in (
        report.differences
    )
    for part in ("weight", "e_score_correction_bias"):
        assert any(line.startswith(f"{V3}.gate.{part}: shape [12") for line in report.differences)


@pytest.mark.parametrize("count", [7, 9])
def test_a_wrong_count_in_the_config_is_found(pairs: Pairs, count: int) -> None:
    pair = pairs("qwen3_moe")
    key = "num_experts"
    report = pair.check(pair.pruned().configured((key,), count))
    name = "model.layers.0.mlp.gate.weight"
    assert f"{name}: shape [8, 64], and the config makes it [{count}, 64]" in report.differences


@pytest.mark.parametrize("part", ["weight", "e_score_correction_bias"])
def test_a_router_tensor_that_was_not_sliced_is_found(pairs: Pairs, part: str) -> None:
    pair = pairs("deepseek_v3")
    pruned, name = pair.pruned(), f"{V3}.gate.{part}"
    dtype, (rows, *rest) = pruned.tensors[name]
    report = pair.check(pruned.having(name, dtype, 2 * rows, *rest))
    shapes = f"shape {[24, *rest]}, and the config makes it {[12, *rest]}"
    assert f"{name}: {shapes}" in report.differences


@pytest.mark.parametrize(("part", "built"), [("up", "gate_up_proj"), ("down", "down_proj")])
def test_a_missing_projection_of_one_expert_is_found(pairs: Pairs, part: str, built: str) -> None:
    pair = pairs("deepseek_v3")
    report = pair.check(pair.pruned().without(f"{V3}.experts.5.{part}_proj.weight"))
    assert any(f"{V3}.experts.5" in line for line in report.differences)
    assert any(line.startswith(f"{V3}.experts.{built}: ") for line in report.differences)


def test_a_surplus_expert_is_found(pairs: Pairs) -> None:
    pair = pairs("deepseek_v3")
    pruned = pair.pruned()
    for part in ("gate", "up", "down"):
        old = pruned.tensors[f"{V3}.experts.11.{part}_proj.weight"]
        pruned = pruned.having(f"{V3}.experts.12.{part}_proj.weight", old[0], *old[1])
    report = pair.check(pruned)
    assert f"{STACKED}: shape [13, 48, 64], and the config makes it [12, 48, 64]" in (
        report.differences
    )


def test_experts_that_were_not_renumbered_are_found(pairs: Pairs) -> None:
    """transformers itself stacks them in sorted order without a word."""
    pair = pairs("qwen3_moe")
    pruned = pair.pruned()
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.{{}}.{part}_proj.weight"
        pruned = pruned.renamed(name.format(7), name.format(8))
    (found,) = pair.check(pruned).differences
    assert "model.layers.1" in found


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("deepseek_v3", "model.layers.3.mlp.gate.weight"),
        ("qwen3_5_moe", "mtp.layers.0.mlp.gate.weight"),
        ("deepseek_v4", "mtp.0.ffn.gate.weight"),
    ],
)
def test_an_mtp_router_that_was_not_sliced_is_found(pairs: Pairs, name: str, tensor: str) -> None:
    pair = pairs(name)
    pruned = pair.pruned()
    dtype, (rows, width) = pruned.tensors[tensor]
    report = pair.check(pruned.having(tensor, dtype, 2 * rows, width))
    shapes = f"shape {[2 * rows, width]}, and the config makes it {[rows, width]}"
    assert any("in MTP layer" in line and shapes in line for line in report.differences)


def test_an_mtp_expert_that_is_not_there_is_found(pairs: Pairs) -> None:
    """Qwen3.5 has them one by one, beside stacked experts in its main layers."""
    pair = pairs("qwen3_5_moe")
    pruned = pair.pruned()
    for part in ("gate", "up", "down"):
        pruned = pruned.without(f"mtp.layers.0.mlp.experts.3.{part}_proj.weight")
    report = pair.check(pruned)
    assert any("in MTP layer 4 shape [7" in line for line in report.differences)


def test_a_scale_that_does_not_fit_is_found(pairs: Pairs) -> None:
    pair = pairs("kimi_k25")
    pruned = pair.pruned()
    name = "language_model.model.layers.1.mlp.experts.2.down_proj.weight_scale"
    dtype, (rows, groups) = pruned.tensors[name]
    report = pair.check(pruned.having(name, dtype, rows - 1, groups))
    assert any(
        line.startswith(f"{name}: shape {[rows - 1, groups]}") for line in report.differences
    )


def test_stacked_experts_that_were_not_sliced_are_found(pairs: Pairs) -> None:
    pair = pairs("gpt_oss")
    pruned = pair.pruned()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for part in ("blocks", "scales"):
        dtype, (experts, *rest) = pruned.tensors[f"{name}_{part}"]
        pruned = pruned.having(f"{name}_{part}", dtype, 2 * experts, *rest)
    report = pair.check(pruned)
    assert f"{name}: shape [8, 64, 64], and the config makes it [4, 64, 64]" in report.differences


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "expects it [64, "),
        ("model.norm.weight", "expects it [64], and it is not in the checkpoint"),
    ],
)
def test_a_tensor_far_from_the_experts_that_is_not_there_is_found(
    pairs: Pairs, tensor: str, words: str
) -> None:
    pair = pairs("qwen3_moe")
    (found,) = pair.check(pair.pruned().without(tensor)).differences
    assert found.startswith(f"{tensor}: Qwen3MoeForCausalLM {words}")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("deepseek_v3", r".*\.gate\.e_score_correction_bias"),
        ("deepseek_v3", r".*\.input_layernorm\.weight"),
        ("deepseek_v3", r".*\.shared_experts\.down_proj\.weight"),
        ("gpt_oss", r".*\.mlp\.experts\.down_proj_bias"),
        ("qwen3_moe", r"model\.norm\.weight"),
    ],
)
def test_what_the_source_lacks_too_is_found_and_said_to_be_so(
    name: str, lost: str, pairs: Pairs
) -> None:
    pair = pairs(name)
    whole = Pair(pair.source, pair.source).pruned()
    gone = [tensor for tensor in pair.pruned().tensors if re.fullmatch(lost, tensor)]
    source, pruned = whole, pair.pruned()
    for tensor in gone:
        source, pruned = source.without(tensor), pruned.without(tensor)
    report = check_architecture(source.checkpoint(), pruned.checkpoint())
    assert gone and report.differences
    assert all("in the source too" in line for line in report.differences)
    named = {line.partition(":")[0] for line in report.differences}
    assert named & set(gone) or all(".experts" in line for line in named)


def test_a_shape_that_is_wrong_in_the_source_too_is_found(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    wrong = ("model.norm.weight", "BF16", 63)
    source = Pair(pair.source, pair.source).pruned().having(*wrong)
    report = check_architecture(source.checkpoint(), pair.pruned().having(*wrong).checkpoint())
    (found,) = report.differences
    assert found == (
        "model.norm.weight: shape [63], and the config makes it [64], in the source too"
    )


def test_a_tensor_that_nothing_takes_is_found(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    report = pair.check(pair.pruned().having("model.extra.weight", "BF16", 3, 3))
    place = "is in the checkpoint, and Qwen3MoeForCausalLM has no place for it"
    assert report.differences == (f"model.extra.weight: {place}",)


def test_a_config_that_can_no_longer_be_built_is_found(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    report = pair.check(pair.pruned().configured(("num_hidden_layers",), "two"))
    assert any("num_hidden_layers" in line for line in report.differences)


def test_a_folder_that_cannot_be_read_is_found(pairs: Pairs, tmp_path: Path) -> None:
    report = check_architecture(pairs("qwen3_moe").source, tmp_path)
    (found,) = report.differences
    assert "config.json: no such file" in found


def test_layers_that_keep_different_numbers_are_no_model_of_transformers(pairs: Pairs) -> None:
    """What the config says per layer is for engines that read it: transformers does not."""
    pair = pairs("qwen3_moe")
    pruned = pair.pruned().configured(("num_routed_experts_per_layer",), [8, 7, 8])
    for part in ("gate", "up", "down"):
        pruned = pruned.without(f"model.layers.1.mlp.experts.7.{part}_proj.weight")
    pruned = pruned.having("model.layers.1.mlp.gate.weight", "BF16", 7, 64)
    report = pair.check(pruned)
    name = "model.layers.1.mlp.gate.weight"
    assert f"{name}: shape [7, 64], and the config makes it [8, 64]" in report.differences
    assert all(line.startswith("model.layers.1.mlp.") for line in report.differences)
    # What is written beside the list stops it before it looks at a tensor.
    stopped = pruned.configured(("per_layer_config",), {"1": {"num_local_experts": 7}})
    (found,) = pair.check(stopped).differences
    assert "cannot build" in found and "'num_local_experts' is a per-layer attribute" in found


def test_the_command_checks_it_after_the_bytes(
    pairs: Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = pairs("kimi_k25")
    assert main(["verify", str(pair.source), str(pair.folder), "--architecture"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert ": identical\n" in printed.out
    assert "Kimi_K25ForConditionalGeneration" in printed.out


def test_the_command_refuses_what_it_cannot_check_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(written("bailing_moe", tmp_path))
    other = shutil.copytree(source, tmp_path / "other")
    assert main(["verify", source, str(other), "--architecture"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("shardsurgeon: error: --architecture: transformers 5.")
    assert printed.err.count("\n") == 1
