"""Files of a model told apart by their names."""

from __future__ import annotations

import pytest

from shardsurgeon.checkpoint.config import quantization_sections
from shardsurgeon.checkpoint.files import (
    is_other_weight_format,
    other_formats,
    root_safetensors,
    set_aside,
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


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("pytorch_model-00001-of-00002.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("gguf/model.gguf", True),
        ("consolidated.safetensors", True),
        ("original/params.json", True),
        ("original", False),
        ("model.safetensors", False),
        ("speech_tokenizer.pt", False),
        ("tokenizer.json", False),
    ],
)
def test_weights_in_another_format_are_left_behind(name: str, other: bool) -> None:
    assert is_other_weight_format(name) is other


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
