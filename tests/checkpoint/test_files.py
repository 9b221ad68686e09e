"""Files of a model told apart by their names."""

from __future__ import annotations

import pytest

from shardsurgeon.checkpoint.config import quantization_sections
from shardsurgeon.checkpoint.files import (
    other_formats,
    root_safetensors,
    set_aside,
    why_left_behind,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("README.md", "README.source.md"),
        ("README.source.md", "README.source-2.md"),
        ("README.source-2.md", "README.source-3.md"),
        ("docs/README.md", None),
        ("config.json", None),
    ],
)
def test_a_card_of_the_source_gets_a_name_that_is_free(name: str, expected: str | None) -> None:
    assert set_aside(name) == expected


BELONGS = {
    "written anew": "config.json model.safetensors.index.json hf_quant_config.json",
    "tokenizer": "tokenizer.json tokenizer_config.json tokenizer.model tiktoken.model vocab.json"
    " merges.txt vocab.bin qwen.tiktoken spiece.model bpe_simple_vocab_16e6.txt.gz tokens.txt"
    " tekken.json special_tokens_map.json added_tokens.json",
    "settings": "generation_config.json chat_template.jinja chat_templates/tool_use.jinja"
    " preprocessor_config.json processor_config.json configuration.json recipe.yaml",
    "code": "modeling_kimi.py optimizer.py kv_cache/paged.py env.py adapter.py log.py",
    "parts": "scheduler/scheduler_config.json vision/model.safetensors vision/config.json"
    " talker/model-00001-of-00002.safetensors talker/model.safetensors.index.json talker/spk.pt"
    " speech_tokenizer.pt",
    "documents": "README.md LICENSE NOTICE.txt docs/guide.md figures/banner.png demo.mp4 paper.pdf"
    " requirements.txt environment.yml",
    "unknown": "something.unknown notes/whatever.json",
    "earlier prunes": "calibration/scores.pt calibration/scores.pth calibration/a.bin",
}


@pytest.mark.parametrize("name", " ".join(BELONGS.values()).split())
def test_what_a_model_needs_or_no_rule_knows_is_carried_along(name: str) -> None:
    assert why_left_behind(name) is None


LEFT = {
    "secret": ".env .env.local prod.env token.txt hf_token api_key.txt id_rsa server.pem"
    " .netrc sub/.env .huggingface/token secrets.yaml credentials.json calibration/.env",
    "hidden": ".gitattributes .gitignore .DS_Store .idea/x.xml sub/.ipynb_checkpoints/a.ipynb ._x",
    "log": "train.log nohup.out slurm-12.out run.log.1 logs/a.txt sub/RUN.LOG core.123"
    " events.out.tfevents.17 calibration/run.log",
    "cache": "cache/x.bin triton_cache/a.so __pycache__/m.pyc m.pyc Thumbs.db node_modules/a/b.js",
    "experiment folder": "wandb/run-1/files/config.yaml runs/a mlruns/0/meta.yaml tensorboard/x",
    "partial work": "a.tmp model-00001-of-00002.safetensors.part x.incomplete OUT.partial/files/a"
    " tmp/x.json .cache.lock.swp.lock a.lock",
    "backup": "config.json.bak config.json.orig model.old a.bak2 README.md~ model.zip all.tar.gz",
    "training state": "optimizer.pt scheduler.pt rng_state_0.pth training_args.bin latest"
    " trainer_state.json checkpoint-500/model.safetensors global_step10/zero.pt zero_to_fp32.py",
    "adapter": "adapter_config.json adapter_model.safetensors lora/adapter_model.bin"
    " adapters.safetensors",
    "other weights": "pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json gguf/model.gguf"
    " tf_model.h5 tf_model.h5.index.json flax_model.msgpack model.onnx model.onnx_data last.ckpt"
    " consolidated.safetensors consolidated.safetensors.index.json consolidated.00.pth"
    " original/params.json metal/model.bin model.pt weights.npz rust_model.ot"
    " vision/pytorch_model.bin model.fp16.index.json",
    "Mistral's params.json": "params.json",
}


@pytest.mark.parametrize(
    ("why", "name"), [(why, name) for why, names in LEFT.items() for name in names.split()]
)
def test_what_is_no_part_of_a_model_is_left_behind_and_why(why: str, name: str) -> None:
    found = why_left_behind(name)
    assert found == why or (found == "hidden" and "/." in f"/{name}")


@pytest.mark.parametrize("name", ["original", "latest.json", "sub/params.json", "wandb", "runs.md"])
def test_a_name_that_only_resembles_is_carried_along(name: str) -> None:
    assert why_left_behind(name) is None


def test_the_main_weights_are_the_safetensors_files_at_the_top() -> None:
    names = ["b.safetensors", "a.safetensors", "consolidated.safetensors", "x/c.safetensors"]
    assert root_safetensors(names) == ["a.safetensors", "b.safetensors"]
    assert other_formats(["a.bin", "b/c.gguf", "d.json", "e"]) == [".bin", ".gguf"]


def test_quantization_is_found_wherever_a_config_has_it() -> None:
    inner = {"bits": 4, "compression_config": {"format": "dense"}}
    config = {
        "quantization_config": {},
        "text_config": {"quantization_config": inner},
        "list": [{"quantization_config": {"bits": 8}}],
    }
    path = ("text_config", "quantization_config")
    found = [(path, inner), ((*path, "compression_config"), {"format": "dense"})]
    assert list(quantization_sections(config)) == found
