"""What lies beside a pruned model: weights that a loader might take are found, others named."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardsurgeon.checkpoint.provenance import PROVENANCE_NAME
from shardsurgeon.operations import api
from shardsurgeon.verification.findings import VerifyReport
from shardsurgeon.verification.verify import verify_checkpoint

KIMI = Path(__file__).parents[2] / "fixtures" / "kimi_k25"
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prune, with checksums of its shards. Not to be changed."""
    out = tmp_path_factory.mktemp("strays") / "out"
    api.apply(api.plan(KIMI, KIMI / "scores.pt", ratio=0.5), out, checksums=True)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def verified(out: Path, sample: int | None = 1) -> VerifyReport:
    return verify_checkpoint(KIMI, out, sample=sample)


def write(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"weights")


def test_what_apply_wrote_is_known_without_a_word(made: Path) -> None:
    report = verified(made, sample=None)
    assert (report.differences, report.notes, report.verdict) == ((), (), "identical")


@pytest.mark.parametrize(
    "name",
    [
        *("model.h5", "tf_model.h5", "flax_model.msgpack", "model.onnx", "onnx/model.onnx_data"),
        *("model.pt", "weights.pt", "last.pt", "pytorch_model.bin", "PYTORCH_MODEL.BIN"),
        *("Model.Safetensors", "model-q4_k_m.gguf", "MODEL.GGUF", "consolidated.00.pth"),
        *("model.pdparams/x.tflite", "rust_model.ot", "model.ckpt", "saved_model.pb"),
        *("extra.safetensors", "model-00001-of-00006.safetensors", "sub/model.safetensors"),
        *("model-00006-of-00006.safetensors/readme.txt", "old.safetensors/model/part"),
        *("pytorch_model.bin.index.json", "model.safetensors.index.fp8.json", "x.index.json"),
        *("consolidated.safetensors.index.json", "model.npz", "adapter_model.safetensors"),
    ],
)
def test_weights_and_indexes_that_are_not_the_models_are_differences(copy: Path, name: str) -> None:
    write(copy, name)
    report = verified(copy)
    assert report.differences == (f"{name}: is a weight file that is not part of the model",)
    assert report.verdict == "differs"


def test_a_record_vouches_for_no_weights(copy: Path) -> None:
    """What `apply` writes is worked out from the source."""
    for name in ("extra.safetensors", "model.gguf"):
        write(copy, name)
        path = copy / PROVENANCE_NAME
        record = json.loads(path.read_bytes())
        record["files"][name] = 7
        path.write_text(json.dumps(record))
        assert (
            f"{name}: is a weight file that is not part of the model" in verified(copy).differences
        )


def test_an_index_beside_a_single_shard_is_not_the_models(tmp_path: Path) -> None:
    model = KIMI.parent / "qwen3_moe"
    plan = api.plan(model, model / "scores.pt", keep=8, max_shard_size="1GB", out=tmp_path / "out")
    api.apply(plan)
    assert verify_checkpoint(model, tmp_path / "out").verdict == "identical"
    names = {path.name: "model.safetensors" for path in (tmp_path / "out").glob("none")}
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    names = dict.fromkeys(json.loads(header[8 : 8 + length]), "model.safetensors")
    names.pop("__metadata__", None)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    found = verify_checkpoint(model, tmp_path / "out").differences
    assert "model.safetensors.index.json: is a weight file that is not part of the model" in found


def test_a_quantization_list_that_the_source_lacks_is_a_difference(copy: Path) -> None:
    (copy / "hf_quant_config.json").write_text("{}")
    expected = ("hf_quant_config.json: is a quantization list that the source has not",)
    assert verified(copy).differences == expected


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_and_called_like_weights_is_a_difference(copy: Path, kind: str) -> None:
    place = copy / "model-00006-of-00006.safetensors"
    if kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to(copy / "docs")
    else:
        os.mkfifo(place)
    (line,) = verified(copy).differences
    assert line.startswith(place.name) and line.endswith("is not part of the model")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")
def test_harmless_files_are_named_and_it_holds(copy: Path) -> None:
    for name in ("eval.json", "config_vllm.json", "calibration/more.pt", "wandb/run.yaml"):
        write(copy, name)
    os.mkfifo(copy / "pipe")
    (copy / "data").symlink_to(copy / "docs")
    write(copy, "z.txt")
    write(copy, "saliency.png")
    report = verified(copy, sample=None)
    assert report.verdict == "identical"
    assert report.notes == (
        "beside the model lie files that apply does not write: calibration/more.pt, "
        "config_vllm.json, data, eval.json, pipe and 3 more",
    )


def test_cards_and_what_the_hub_adds_are_nobodys_business(copy: Path) -> None:
    (copy / "README.md").rename(copy / "README.source.md")
    (copy / "README.md").write_text("a card")
    write(copy, ".gitattributes")
    for name in ("saliency.png", "damage.png", "saliency-2.png"):
        write(copy, f"calibration/{name}")
    write(copy, ".git/objects/pack.bin")
    assert verified(copy).differences == verified(copy, None).notes == ()


# What the record lists


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def recorded(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        content = json.loads((out / PROVENANCE_NAME).read_bytes())
        change(content)
        (out / PROVENANCE_NAME).write_text(json.dumps(content))

    return spoil


NOT_IT = "is not what apply wrote: it has SHA-256"
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a score file that is gone": (
        lambda out: (out / "calibration" / "scores.pt").unlink(),
        "calibration/scores.pt: is missing, apply wrote it",
    ),
    "a longer score file": (
        lambda out: (out / "calibration" / "scores.pt").write_bytes(
            (KIMI / "scores.pt").read_bytes() + b"x"
        ),
        "calibration/scores.pt: ",
    ),
    "a config with other white space": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text() + "\n"),
        "config.json: has ",
    ),
    "an index with other white space": (
        lambda out: (out / "model.safetensors.index.json").write_bytes(
            (out / "model.safetensors.index.json").read_bytes().replace(b'": "', b'" :"', 1)
        ),
        f"model.safetensors.index.json: {NOT_IT}",
    ),
    "a file that the record forgot": (
        recorded(lambda c: [c[key].pop("config.json") for key in ("files", "sha256")]),
        f"{PROVENANCE_NAME}: does not list config.json among the files",
    ),
    "a shard that the record forgot": (
        recorded(lambda c: [c[key].pop(SHARD) for key in ("files", "sha256")]),
        f"{PROVENANCE_NAME}: does not list {SHARD} among the files",
    ),
    "a digest that the record forgot": (
        recorded(lambda c: c["sha256"].pop("tokenizer.json")),
        f"{PROVENANCE_NAME}: does not list the SHA-256 of tokenizer.json",
    ),
    "another digest of a side file": (
        recorded(lambda c: c["sha256"].update({"tokenizer.json": "0" * 64})),
        f"tokenizer.json: {NOT_IT}",
    ),
    "another digest of a shard": (
        recorded(lambda c: c["sha256"].update({SHARD: "0" * 64})),
        f"{SHARD}: {NOT_IT}",
    ),
    "another size of a shard": (
        recorded(lambda c: c["files"].update({SHARD: 7})),
        f"{SHARD}: has ",
    ),
    "a file of the list that never was": (
        recorded(lambda c: c["files"].update({"notes.txt": 7})),
        "notes.txt: is missing, apply wrote it",
    ),
}


@pytest.mark.parametrize("defect", SPOILED)
def test_what_differs_from_the_list_is_found_and_named(copy: Path, defect: str) -> None:
    spoil, says = SPOILED[defect]
    spoil(copy)
    found = verified(copy, sample=None).differences
    assert any(line.startswith(says) for line in found), found


def test_one_defect_is_one_line(copy: Path) -> None:
    flip(copy / "tokenizer.json")
    (copy / "LICENSE").unlink()
    flip(copy / SHARD)
    found = verified(copy, sample=None).differences
    assert sorted(line.partition(":")[0].split()[0] for line in found) == [
        "LICENSE",
        SHARD,
        "tokenizer.json",
    ]


def test_a_sample_says_that_it_is_one_and_what_it_left_out(copy: Path) -> None:
    report = verified(copy)
    assert (report.verdict, report.complete) == ("identical as far as sampled", False)
    assert report.notes == ("not compared: the recorded SHA-256 of 5 shards",)
    assert verified(copy, sample=10_000).verdict == "identical"


def test_what_apply_checks_of_its_own_result_is_a_sample(tmp_path: Path) -> None:
    plan = api.plan(KIMI, KIMI / "scores.pt", ratio=0.5)
    report = api.apply(plan, tmp_path / "out").verification
    assert report is not None and report.verdict == "identical as far as sampled"


def test_a_record_of_an_earlier_version_says_what_was_not_compared(copy: Path) -> None:
    recorded(lambda c: c.pop("sha256"))(copy)
    assert verified(copy, None).notes == (
        f"{PROVENANCE_NAME} is of an earlier version and lists no SHA-256 of files",
    )
    recorded(lambda c: c.pop("files"))(copy)
    (copy / "calibration" / "later.pt").write_bytes(b"scores")
    report = verified(copy, None)
    assert report.verdict == "identical"
    assert report.notes == (
        "more than one file beside the record says where its saliencies are from",
        f"{PROVENANCE_NAME} is of an earlier version and lists no files",
    )
