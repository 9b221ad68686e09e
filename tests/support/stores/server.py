"""An S3 server on the loopback address: moto behind werkzeug, with its bytes counted."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import boto3  # type: ignore[import-untyped]
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

HOST = "127.0.0.1"


class Request(NamedTuple):
    """A request as it was answered; bytes are those of the answer's body."""

    method: str
    path: str
    status: int
    bytes_sent: int
    range: str | None


class Quiet(WSGIRequestHandler):
    """Logs nothing, and lets a client keep its connection."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *args: object) -> None:
        pass


class LocalS3:
    """An S3 server of its own. Urls are `s3://bucket/key`; a bucket is made when it is needed."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._requests: list[Request] = []
        self._server = make_server(HOST, 0, self._counted, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://{HOST}:{self._server.server_port}"

    def stop(self) -> None:
        """Close it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables for a process whose S3 clients are to talk to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Whatever the user has set up does not count.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def put(self, url: str, content: bytes) -> None:
        """Store an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        client = self._client()
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=content)

    def put_folder(self, url: str, folder: Path) -> None:
        """Store all files of a folder below a url."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def read(self, url: str) -> bytes:
        """An object's bytes."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        content: bytes = self._client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def clear(self) -> None:
        """Forget all buckets and what was counted."""
        client = self._client()
        for bucket in client.list_buckets()["Buckets"]:
            for item in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
                client.delete_object(Bucket=bucket["Name"], Key=item["Key"])
            client.delete_bucket(Bucket=bucket["Name"])
        self.reset_counts()

    @property
    def requests(self) -> list[Request]:
        """Every answered request since the last `reset_counts`."""
        return list(self._requests)

    def sent(self, pattern: str = "") -> int:
        """Bytes of answers to requests whose `METHOD /path` the pattern is found in."""
        return sum(
            request.bytes_sent
            for request in self.requests
            if re.search(pattern, f"{request.method} {request.path}")
        )

    def reset_counts(self) -> None:
        """Count from zero."""
        self._requests = []

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="tests",
            aws_secret_access_key="tests",
            region_name="us-east-1",
        )

    def _counted(
        self, environ: dict[str, Any], start_response: Callable[..., object]
    ) -> Iterable[bytes]:
        """The server's application, and a line in the book about what it said."""
        statuses: list[int] = []

        def start(status: str, headers: list[tuple[str, str]], *rest: object) -> object:
            statuses.append(int(status.split()[0]))
            return start_response(status, headers, *rest)

        body = b"".join(self._app(environ, start))
        self._requests.append(
            Request(
                environ["REQUEST_METHOD"],
                environ["PATH_INFO"],
                statuses[-1],
                len(body),
                environ.get("HTTP_RANGE"),
            )
        )
        return [body]
