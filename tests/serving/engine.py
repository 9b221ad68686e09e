"""vLLM's OpenAI-compatible server on this machine, for one checkpoint, and what it answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HOST = "127.0.0.1"
STARTS_WITHIN_S = 600.0
ANSWERS_WITHIN_S = 300.0
STOPS_WITHIN_S = 60.0

# No proxy stands between two programs on one machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt.

    prompt: natural log-probabilities `[prompt tokens - 1, vocabulary]`, row i for the token
    behind prompt token i. tokens: the greedy continuation. chosen: its log-probabilities.
    """

    prompt: torch.Tensor
    tokens: tuple[int, ...]
    chosen: torch.Tensor


class Server:
    """A running server; `serving` makes one."""

    def __init__(self, port: int) -> None:
        self.address = f"http://{HOST}:{port}"

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """The log-probabilities of every token at every place of `prompt`, and what follows."""
        request = {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            # The whole vocabulary.
            "prompt_logprobs": -1,
            "return_token_ids": True,
        }
        (choice,) = self._post("/v1/completions", request)["choices"]
        first, *rows = choice["prompt_logprobs"]
        assert first is None
        assert len(rows) == len(prompt) - 1
        logprobs = torch.stack([_row(row) for row in rows])
        chosen = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float64)
        return Answer(logprobs, tuple(choice["token_ids"]), chosen)

    def chat(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The only choice of an answer to messages."""
        choice: Mapping[str, Any]
        (choice,) = self._post("/v1/chat/completions", request)["choices"]
        return choice

    def healthy(self) -> bool:
        try:
            with _opener.open(f"{self.address}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _opener.open(request, timeout=ANSWERS_WITHIN_S) as response:
            return json.load(response)


def _row(row: Mapping[str, Mapping[str, Any]]) -> torch.Tensor:
    """token id → {"logprob": …} as one row of the whole vocabulary."""
    assert sorted(map(int, row)) == list(range(len(row)))
    values = [row[str(token)]["logprob"] for token in range(len(row))]
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def serving(
    python: Path, folder: Path, arguments: Sequence[str], import_path: Path | None, log: Path
) -> Iterator[Server]:
    """Serve the checkpoint in `folder` until the block ends.

    python: an interpreter that has vLLM. import_path: a folder that it searches for modules
    first. log: where the server's output goes.
    """
    port = _free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "tiny"),
        *("--host", HOST, "--port", str(port)),
        *("--enforce-eager", "--max-model-len", "128", "--max-logprobs", "-1"),
        # Sampling as asked for in the request, whatever generation_config.json says.
        *("--generation-config", "vllm"),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=_surroundings(import_path),
            start_new_session=True,
        )
        try:
            server = Server(port)
            _wait_until_healthy(server, process, log)
            yield server
        finally:
            _stop(process)


def _surroundings(import_path: Path | None) -> dict[str, str]:
    """This process's environment variables, with what the server needs."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if import_path is not None:
        variables["PYTHONPATH"] = str(import_path)
    return variables | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not server.healthy():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"the server did not start; the end of {log}:\n{tail}")
        time.sleep(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as its manual says, and its whole process group if it lingers."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
