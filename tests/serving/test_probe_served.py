"""`probe` asks a real vLLM: what it sends is taken, and what comes back is read.

Not part of the default run: `pytest -m serving` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.errors import NetworkError
from shardsurgeon.operations.probe import ProbeRequest, probe
from shardsurgeon.operations.probe_report import ProbeReport
from shardsurgeon.operations.prompts import Sampling
from tests.serving.engine import Server, serving
from tests.serving.proof import pruned_checkpoint
from tests.serving.test_serving import engine as engine

pytestmark = pytest.mark.serving

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("served")
    folder = pruned_checkpoint("qwen3_moe", work).folder
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    words = ["--dtype", "float32", "--max-model-len", "1024"]
    with serving(engine, folder, words, None, work / "server.log") as found:
        yield found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def probed(server: Server, records: list[Any], base: Sampling, **options: Any) -> ProbeReport:
    lines = [json.dumps(record) for record in records]
    Path("prompts.jsonl").write_text("\n".join(lines))
    request = ProbeRequest(f"prompts.jsonl:{len(records)}", base=base, **options)
    return probe(server.address, request, "probe.json")


def counts(report: ProbeReport, setting: int = 0) -> dict[str, int]:
    return {each.kind: each.count for each in report.settings[setting].failures}


def answers() -> dict[tuple[str, str], dict[str, Any]]:
    lines = Path("probe.answers.jsonl").read_text(encoding="utf-8").splitlines()
    found = map(json.loads, lines)
    return {(each["setting"], each["prompt"]): each for each in found}


def test_answers_are_the_servers_under_the_sampling_that_is_said(server: Server) -> None:
    records = [{"text": f"What is {number}?"} for number in range(8)]
    single = {"temperature": 1, "top_k": 1}
    hot = {"temperature": 1, "min_p": 0.001, "repetition_penalty": 1.3, "top_k": 400}
    greedy = Sampling(temperature=0, max_tokens=30)
    report = probed(server, records, greedy, others=[single, hot])
    assert (report.model, report.url) == ("tiny", f"{server.address}/v1")
    found, cut = answers(), 0
    for (setting, prompt), answer in found.items():
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
        body |= {"temperature": 0, "max_tokens": 30, "seed": 42 + answer["index"]}
        said = server.chat({**body, **(hot if "min_p" in setting else {})})
        assert said["message"]["content"] == answer["completion"]
        assert said["finish_reason"] == answer["finish_reason"]
        cut += said["finish_reason"] == "length" and setting == "base"
        # The only token that top_k leaves is the greedy one.
        if setting == "temperature=1,top_k=1":
            assert answer["completion"] == found["base", prompt]["completion"]
    assert counts(report)["cut by length"] == cut > 0
    # Sampled answers are others, to each prompt.
    heated = {setting for setting, _ in found if "min_p" in setting}.pop()
    assert all(
        found[heated, each["text"]]["completion"] != found["base", each["text"]]["completion"]
        for each in records
    )


def test_a_prompt_that_is_too_long_is_refused_by_name_and_the_others_are_answered(
    server: Server,
) -> None:
    records = [{"text": "Hello."}, {"text": "so long " * 2000}]
    report = probed(server, records, Sampling(max_tokens=8))
    assert (report.settings[0].answers, report.settings[0].refused) == (1, 1)
    (refused,) = report.refusals
    assert refused.record.endswith("record 1") and refused.said.startswith("400 Bad Request: ")


def test_tools_without_a_parser_are_refused_in_the_servers_words(server: Server) -> None:
    record = {"messages": [{"role": "user", "content": "Rain?"}], "tools": TOOLS}
    with pytest.raises(NetworkError, match="enable-auto-tool-choice"):
        probed(server, [record], Sampling(max_tokens=8))
