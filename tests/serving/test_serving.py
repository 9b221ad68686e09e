"""vLLM answers for a pruned checkpoint as transformers does, and as the masked original.

Not part of the default run: `pytest -m serving` runs it. It installs vLLM's CPU build first,
unless SHARDSURGEON_SERVING_VENV names an environment that has it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shardsurgeon.operations.serving import Serving, serve_words
from tests.serving import reference
from tests.serving.cases import CASES
from tests.serving.environment import default_folder, environment
from tests.serving.proof import (
    NEW_TOKENS,
    distance,
    prompts,
    prove,
    pruned_checkpoint,
    served_answers,
)

pytestmark = [
    pytest.mark.serving,
    # A published key that transformers reads but calls old.
    pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="session")
def engine() -> Path:
    """An interpreter that has vLLM."""
    named = os.environ.get("SHARDSURGEON_SERVING_VENV")
    return environment(Path(named) if named else default_folder()).python


@pytest.mark.parametrize("family", CASES)
def test_vllm_answers_as_transformers_and_as_the_masked_original(
    family: str, engine: Path, tmp_path: Path
) -> None:
    result = prove(CASES[family], engine, tmp_path)
    assert result.passed, result


def test_vllm_serves_experts_in_the_wrong_order_and_the_comparison_sees_it(
    engine: Path, tmp_path: Path
) -> None:
    case = CASES["qwen3_moe"]
    folder = pruned_checkpoint(case.family, tmp_path).folder
    right = reference.answers(folder, prompts(), NEW_TOKENS)
    swap_two_experts(folder)
    wrong = served_answers(case, engine, folder, tmp_path / "server.log")
    assert distance(wrong, right, case.share).at_share > 100 * case.tolerance


def swap_two_experts(folder: Path) -> None:
    """Give expert 0 of layer 1 the number 1, and expert 1 the number 0."""

    def other(found: re.Match[str]) -> str:
        return f"{found[1]}{1 - int(found[2])}."

    for shard in folder.glob("*.safetensors"):
        tensors = {
            re.sub(r"(layers\.1\.mlp\.experts\.)([01])\.", other, name): tensor
            for name, tensor in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})


def test_vllm_takes_the_command_that_reports_print(engine: Path) -> None:
    words = serve_words("me/small", "65pct", Serving(True, False, True, remote_code=True))
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.openai.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "print(json.dumps([found.model_tag, found.revision, found.trust_remote_code]))\n"
    )
    done = subprocess.run(
        [engine, "-c", code, *words[2:]], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["me/small", "65pct", True]
