"""What vLLM itself plans for a model: its KV cache specs and its parameters, from config.json.

Run by the interpreter of the serving environment, which has no shardsurgeon:

    python specs.py RANKS FOLDER ...

The model is built on the meta device, so that no memory is taken and no weight is read, on as many
processes as there are ranks; the first one prints a line of JSON per folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

TOKENS = (100, 1000, 4096)
BLOCK = 16


def specs(folder: str, ranks: int) -> dict[str, Any]:
    """The model's caches, one request's bytes for so many tokens, and its parameters' bytes."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else "uni",
        block_size=BLOCK,
        max_model_len=max(TOKENS),
        enable_prefix_caching=False,
        language_model_only=True,
        trust_remote_code=False,
    )
    config = arguments.create_engine_config()
    config.parallel_config.rank = int(os.environ["RANK"])
    # The CPU platform computes every recurrent state in float32; GPUs do as the model says.
    config.cache_config.mamba_ssm_cache_dtype = "auto"
    config.model_config.config_updated = False
    config.try_verify_and_update_config()
    model_dtype = config.model_config.dtype
    settings = set_current_vllm_config(config), set_default_torch_dtype(model_dtype)
    with settings[0], settings[1], torch.device("meta"):
        model = initialize_model(config)
    layers = config.compilation_config.static_forward_context
    found = {
        name: layer.get_kv_cache_spec(config)
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase)
        and not getattr(layer, "kv_sharing_target_layer_name", None)
    }
    found = {name: spec for name, spec in found.items() if spec is not None}
    return {
        "caches": {
            name: [type(spec).__name__, spec.block_size, spec.real_page_size_bytes]
            for name, spec in found.items()
        },
        "sequence": {tokens: _sequence(config, list(found.values()), tokens) for tokens in TOKENS},
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "dtype": str(model_dtype),
    }


def _sequence(config: Any, found: list[Any], tokens: int) -> int:
    """Bytes of a request of so many tokens of which one is being computed, without padding."""
    total = 0
    for spec in found:
        if hasattr(spec, "max_admission_blocks_per_request"):
            blocks = spec.max_admission_blocks_per_request(1, tokens)
        elif hasattr(spec, "shapes"):
            blocks = 1
        else:
            blocks = -(-tokens // spec.block_size)
        total += blocks * spec.real_page_size_bytes
    return total


def main() -> None:
    """Print what vLLM plans for each folder, or why it builds no model of it."""
    ranks, folders = int(sys.argv[1]), sys.argv[2:]
    if "RANK" not in os.environ:
        import subprocess

        with tempfile.TemporaryDirectory() as scratch:
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:]],
                    env={**os.environ, "RANK": str(rank), "STORE": f"{scratch}/store"},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                )
                for rank in range(ranks)
            ]
            sys.exit(max(process.wait() for process in processes))
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            ranks, int(os.environ["RANK"]), f"file://{os.environ['STORE']}", 0, "gloo"
        )
        initialize_model_parallel(ranks)
    for folder in folders:
        try:
            found = specs(folder, ranks)
        except Exception as error:  # of any kind: it is shown, and the test decides
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
