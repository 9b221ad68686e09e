"""Answers of vLLM engines without a server, run in its environment: `offline.py OUT ENGINE...`.

ENGINE: what `vllm.LLM` takes, as JSON. Prompts come on stdin, lists of token ids as JSON. OUT gets,
as JSON, for each engine and prompt: the log-probabilities of the whole vocabulary at every place,
the greedy tokens behind it and theirs, floats by their bits. The engines run one after the other,
in one process where they have one rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Tensor parallel ranks are processes all the same.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    out = Path(sys.argv[1])
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    answers = []
    for engine in sys.argv[2:]:
        answers.append(_answers(json.loads(engine), prompts))
        cleanup_dist_env_and_memory()
    out.write_text(json.dumps(answers))


def _answers(engine: dict[str, Any], prompts: list[Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    sampling = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=-1
    )
    answers = [_answer(result) for result in llm.generate(prompts, sampling, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    return answers


def _answer(result: Any) -> dict[str, Any]:
    rows = [
        [row[token].logprob.hex() for token in range(len(row))]
        for row in result.prompt_logprobs[1:]
    ]
    (said,) = result.outputs
    chosen = [
        row[token].logprob.hex() for row, token in zip(said.logprobs, said.token_ids, strict=True)
    ]
    return {"prompt": rows, "tokens": list(said.token_ids), "chosen": chosen}


if __name__ == "__main__":
    main()
