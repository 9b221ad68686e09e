"""Which families are served, with which settings, and how close the answers must be."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

STAND_INS = Path(__file__).with_name("stand_ins")


@dataclass(frozen=True)
class Case:
    """One family and how vLLM's CPU build is to run it.

    tolerance: the largest difference of a log-probability, over the whole vocabulary, that
    `share` of the places must keep to. greedy: whether the greedy tokens must be equal.
    arguments: for the server, beside those that every family has. stand_ins: whether the server
    finds modules of `stand_ins/` in place of packages that have no CPU build.
    """

    family: str
    dtype: str = "float32"
    tolerance: float = 2e-5
    share: float = 1.0
    greedy: bool = True
    arguments: tuple[str, ...] = ()
    stand_ins: bool = False

    @property
    def settings(self) -> str:
        """What is not stock, as the results table says it."""
        words = [f"`{shlex.join(self.arguments)}`"] if self.arguments else []
        if self.stand_ins:
            words.append("stand-in for torchvision")
        return ", ".join(words) or "stock"


CASES: dict[str, Case] = {
    case.family: case
    for case in (
        Case("qwen3_moe"),
        Case("mixtral"),
        Case("glm4_moe"),
        Case("olmoe"),
        Case("gpt_oss"),
        Case("llama4"),
        # Its CPU rotary kernel mishandles the three-dimensional tensors of latent attention, and
        # the attention that it prefers on a CPU with AMX has no float32.
        Case(
            "deepseek_v3",
            arguments=(
                *("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}'),
                *("--attention-backend", "CPU_MLA"),
            ),
        ),
        # Its linear attention runs in bfloat16 only, where two experts that score almost the same
        # change places with a rounding: such a place is far off, so the bound is one for nine
        # places of ten, and a greedy continuation may part. transformers in bfloat16 is as far
        # from its own float32.
        Case(
            "qwen3_5_moe",
            dtype="bfloat16",
            tolerance=5e-2,
            share=0.9,
            greedy=False,
            arguments=("--language-model-only",),
            stand_ins=True,
        ),
    )
}

NOT_SERVED: dict[str, str] = {
    "ernie4_5_moe": "runs, but the CPU router drops the correction bias: wrong answers",
    "kimi_k2": "no CPU kernel for INT4 experts with group size 32 and sigmoid routing",
    "kimi_k25": "no CPU kernel for INT4 experts with group size 32 and sigmoid routing",
    "kimi_linear": "its delta attention has a GPU kernel only",
    "minimax_m2": "the CPU router accepts softmax scores only",
}
"""Families that the stock CPU build of vLLM 0.32 cannot serve correctly, and what it lacks."""
