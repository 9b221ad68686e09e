"""Answers of one vLLM engine without a server, run in its environment: `offline.py OUT ENGINE`.

ENGINE: what `vllm.LLM` takes, as JSON. Prompts come on stdin, lists of token ids as JSON. OUT gets,
as JSON, the engine's log-probabilities of the whole vocabulary at every place of each prompt and
the greedy tokens behind it, floats by their bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    out, engine = Path(sys.argv[1]), json.loads(sys.argv[2])
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    llm = LLM(**engine)
    sampling = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=-1
    )
    answers = [_answer(result) for result in llm.generate(prompts, sampling, use_tqdm=False)]
    out.write_text(json.dumps(answers))


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
