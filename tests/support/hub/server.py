"""The local Hub: an HTTP server on the loopback address, and what tests do with it.

Two ports, one for the Hub and one for its storage, because clients must not carry a token from one
to the other. The state outlives `restart`, the ports too.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette

from tests.support.hub.access import Account
from tests.support.hub.api import ApiRoutes
from tests.support.hub.contents import (
    SAMPLE_NBYTES,
    Blob,
    Content,
    belongs_in_lfs,
    content_sha256,
    lfs_blob,
    regular_blob,
)
from tests.support.hub.faults import Fault
from tests.support.hub.files import FileRoutes
from tests.support.hub.refusals import Refusal
from tests.support.hub.store import Store, answer_refusal
from tests.support.hub.uploads import UploadRoutes
from tests.support.hub.wire import CuttingServer, Link, Request, Wire

HOST = "127.0.0.1"
# They look like what secret scanners and redactors know as a token.
TOKEN = "hf_" + "LocalTestsWriteTokenOfMe" + "0" * 10
READ_TOKEN = "hf_" + "LocalTestsReadTokenOfMe" + "0" * 11
STRANGER_TOKEN = "hf_" + "LocalTestsTokenOfStranger" + "0" * 9


class LocalHub:
    """A Hub of its own for a test. `folder` takes what is uploaded.

    Users: `me` (tokens `token` and, without the right to write, `read_token`), who may also write
    to the organization `team`, and `stranger` (`stranger_token`).
    """

    token = TOKEN
    read_token = READ_TOKEN
    stranger_token = STRANGER_TOKEN

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.store.accounts = {
            TOKEN: Account("me", ("team",)),
            READ_TOKEN: Account("me", ("team",), may_write=False),
            STRANGER_TOKEN: Account("stranger"),
        }
        routes = [
            *ApiRoutes(self.store).routes,
            *UploadRoutes(self.store).routes,
            *FileRoutes(self.store).routes,
        ]
        app = Starlette(routes=routes, exception_handlers={Refusal: answer_refusal})
        self._wire = Wire(app)
        # A fault may restart the server while a test ends.
        self._lock = threading.RLock()
        self._server: CuttingServer | None = None
        self._thread: threading.Thread | None = None
        self._ports = (0, 0)

    # --- the server ---

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return self.store.hub_url

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process whose huggingface_hub is to talk to this Hub.

        home: where it keeps its cache. The constants of huggingface_hub are read from the
        environment when it is imported, so these work for a new process only.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # There is no xet storage here; with hf_xet installed uploads would insist on it.
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    def start(self) -> None:
        """Serve, unless it does. From the second time on, on the same ports."""
        with self._lock:
            if self._server is not None:
                return
            sockets = [_listen(port) for port in self._ports]
            ports = [one.getsockname()[1] for one in sockets]
            self._ports = (ports[0], ports[1])
            self.store.hub_url, self.store.cdn_url = (f"http://{HOST}:{port}" for port in ports)
            self._server = CuttingServer(self._wire)
            self._thread = threading.Thread(target=self._server.run, args=(sockets,), daemon=True)
            self._thread.start()
            while not self._server.started:
                if not self._thread.is_alive():
                    raise RuntimeError("the local Hub did not start")
                time.sleep(0.005)

    def stop(self, *, wait: bool = True) -> None:
        """Cut every connection and stop listening; `wait` until that is done."""
        with self._lock:
            if self._server is None or self._thread is None:
                return
            self._server.should_exit = self._server.force_exit = True
            if wait:
                self._thread.join()
            self._server = self._thread = None

    def restart(self, down: float = 0.0) -> None:
        """Stop, be away for so many seconds, and come back."""
        with self._lock:
            self.stop()
            time.sleep(down)
            self.start()

    # --- repositories ---

    def add_model(
        self,
        id: str,
        folder: Path | Mapping[str, Content],
        *,
        private: bool = False,
        gated: bool = False,
        hashed: bool = True,
    ) -> str:
        """Make a repository of a folder's files, which are served from there; returns the commit.

        hashed: False invents the hashes of LFS objects instead of reading them, for checkpoints of
        hundreds of gigabytes.
        """
        repository = self.store.create(id, private=private, gated=gated)
        tree = _tree(folder, hashed=hashed)
        return repository.commit("main", tree, "Upload", author=id.split("/")[0]).id

    def commit(self, id: str, changes: Mapping[str, Content | None], revision: str = "main") -> str:
        """Commit on the server's side, as another user would; None deletes. Returns the commit."""
        repository = self.store.repositories[id]
        with repository.lock:
            tree = dict(repository.resolve(revision).tree)
            for path, content in changes.items():
                tree.pop(path, None)
                if content is not None:
                    tree[path] = _blob(path, content, hashed=True)
            return repository.commit(revision, tree, "Upstream change", author="upstream").id

    def branch(self, id: str, name: str, revision: str = "main") -> None:
        """Give a revision a name."""
        repository = self.store.repositories[id]
        repository.branches[name] = repository.resolve(revision).id

    def files(self, id: str, revision: str = "main") -> dict[str, Content]:
        """What a revision holds: bytes, or where they lie."""
        tree = self.store.repositories[id].resolve(revision).tree
        return {path: blob.content for path, blob in tree.items()}

    def read(self, id: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes."""
        return self.store.repositories[id].file(revision, path)[1].read()

    def commits(self, id: str, revision: str = "main") -> list[str]:
        """The titles of its commits, newest first."""
        return [commit.title for commit in self.store.repositories[id].log(revision)]

    def swap_file(self, id: str, path: str, content: Content, revision: str = "main") -> None:
        """Change a file without a commit: its etag, size and links are others from now on."""
        repository = self.store.repositories[id]
        commit, old = repository.file(revision, path)
        new = commit.tree[path] = _blob(path, content, hashed=True)
        if old.sha256 is not None:
            repository.objects.pop(old.sha256, None)
        if new.sha256 is not None:
            repository.objects[new.sha256] = new

    def swap_object(self, id: str, path: str, content: Content, revision: str = "main") -> None:
        """Change what storage has behind the links of a file; the Hub itself does not know."""
        repository = self.store.repositories[id]
        old = repository.file(revision, path)[1]
        assert old.sha256 is not None, f"{path} is not an LFS object"
        repository.objects[old.sha256] = _blob(path, content, hashed=True)

    def expire_links(self) -> None:
        """Storage refuses every link that was given out until now."""
        self.store.expire_links()

    # --- faults and the link ---

    def fault(self, on: str, **how: object) -> Fault:
        """Let requests fail; the fields of `Fault` say which and how."""
        return self._wire.faults.add(Fault(on, **how))  # type: ignore[arg-type]

    def clear_faults(self) -> None:
        """No more of them."""
        self._wire.faults.clear()

    def limit_bandwidth(self, bytes_per_second: float | None, latency: float = 0.0) -> None:
        """Shape the link: so much each way for all connections together; None lifts it.

        latency: seconds before each answer.
        """
        self._wire.down = Link(bytes_per_second) if bytes_per_second else None
        self._wire.up = Link(bytes_per_second) if bytes_per_second else None
        self._wire.latency = latency

    # --- accounting ---

    @property
    def requests(self) -> list[Request]:
        """Every request since the last `reset_counts`, in order of arrival."""
        return self._wire.requests()

    @property
    def uploads(self) -> Counter[str]:
        """How often each LFS object, by its sha256, arrived in full."""
        return Counter(self.store.uploads)

    def sent(self, pattern: str = "") -> int:
        """Bytes of answers to requests whose `METHOD /path` the pattern is found in."""
        return self._wire.total(pattern, "sent")

    def received(self, pattern: str = "") -> int:
        """Bytes of the bodies of such requests."""
        return self._wire.total(pattern, "received")

    def reset_counts(self) -> None:
        """Count from zero."""
        self._wire.reset()
        self.store.uploads.clear()


def _listen(port: int) -> socket.socket:
    # Named TCP, or asyncio leaves out TCP_NODELAY and every answer takes 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":
        # Elsewhere it would let two servers share a port; there it lets one come back to its own.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen(128)
    return listener


def _tree(folder: Path | Mapping[str, Content], *, hashed: bool) -> dict[str, Blob]:
    if isinstance(folder, Path):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        folder = {path.relative_to(folder).as_posix(): path for path in paths}
    return {path: _blob(path, content, hashed=hashed) for path, content in folder.items()}


def _blob(path: str, content: Content, *, hashed: bool) -> Blob:
    if isinstance(content, bytes):
        size, sample = len(content), content[:SAMPLE_NBYTES]
    else:
        size = content.stat().st_size
        with content.open("rb") as file:
            sample = file.read(SAMPLE_NBYTES)
    if not belongs_in_lfs(path, size, sample, None):
        return regular_blob(content if isinstance(content, bytes) else content.read_bytes())
    sha256 = content_sha256(content if hashed else f"{path} {size}".encode())
    return lfs_blob(content, size, sha256)
