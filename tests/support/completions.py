"""A scripted server of chat completions on the loopback address, and what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (the body of a question) → what is answered: a text, a message, or (status, body, content type).
Script = Callable[[dict[str, Any]], Any]


def prompt_of(question: dict[str, Any]) -> str:
    """What the last message of a question says."""
    text: str = question["messages"][-1]["content"]
    return text


class ScriptedServer:
    """Answers questions as a script says. questions: all that came; keys: their Authorization."""

    def __init__(self, script: Script, models: Any = ("tiny",), port: int = 0) -> None:
        """models: those that /v1/models lists, or a (status, body, content type) in its place."""
        self.script, self.models = script, models
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._noting = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer._note(self.headers.get("Authorization"))
                if isinstance(outer.models, tuple) and isinstance(outer.models[0], int):
                    self.send(*outer.models)
                else:
                    listed = [{"id": name, "object": "model"} for name in outer.models]
                    self.send(200, {"object": "list", "data": listed})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    self.send(404, {"detail": "Not Found"})
                    return
                outer._note(self.headers.get("Authorization"), body)
                found = outer.script(body)
                if isinstance(found, tuple):
                    self.send(*found)
                    return
                message = found if isinstance(found, dict) else {"content": found}
                reason = message.pop("finish_reason", "stop")
                choice = {"index": 0, "message": message, "finish_reason": reason}
                self.send(200, {"model": body["model"], "choices": [choice]})

            def send(self, status: int, body: Any, kind: str = "application/json") -> None:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if status in (301, 302, 307, 308):
                    self.send_header("Location", raw.decode().strip('"'))
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, *words: Any) -> None:
                """A client that goes away is none of the server's errors."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        """What was asked, in the order in which it came."""
        return [prompt_of(question) for question in self.questions]

    def _note(self, key: str | None, question: dict[str, Any] | None = None) -> None:
        with self._noting:
            self.keys.append(key)
            if question is not None:
                self.questions.append(question)
