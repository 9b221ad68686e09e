"""Tiny prunes to publish, commands in processes of their own, and what a repository holds."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from shardsurgeon.cli.main import main
from tests.support.hub.models import ROOT, fixture_folder
from tests.support.hub.server import LocalHub

# What a push adds, renames or finds there.
OWN = {"README.md", "README.source.md", ".gitattributes", "calibration/saliency.png"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


class Shell:
    """A folder to run commands in, with a login for one Hub."""

    def __init__(self, hub: LocalHub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.home = folder.parent / f"{folder.name}-home"
        self.home.mkdir()
        self.environment = {
            **os.environ,
            **hub.environment(self.home),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
        }

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "shardsurgeon", *words],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **variables: str) -> Ended:
        process = self.start(*words, **variables)
        stdout, stderr = process.communicate(timeout=120)
        return Ended(process.returncode, stdout, stderr)

    def good(self, *words: str, **variables: str) -> str:
        """The report of a command that ends well and says nothing on stderr."""
        ended = self._ended(*words, **variables)
        assert (ended.status, ended.stderr) == (0, ""), ended.stderr
        return ended.stdout

    def here(self, *words: str) -> Ended:
        """The command in this process, which is quicker; its login is the same."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with chdir(self.folder), redirect_stdout(stdout), redirect_stderr(stderr):
            status = main(words)
        return Ended(status, stdout.getvalue(), stderr.getvalue())

    def _ended(self, *words: str, **variables: str) -> Ended:
        """The command, in a process of its own only where it needs other variables."""
        return self.run(*words, **variables) if variables else self.here(*words)

    def refused(self, *words: str, status: int = 2, **variables: str) -> str:
        """The one line of a command that ends badly."""
        ended = self._ended(*words, **variables)
        assert ended.status == status, ended.stderr
        assert ended.stdout == ""
        assert ended.stderr.startswith("shardsurgeon: ") and ended.stderr.count("\n") == 1, (
            ended.stderr
        )
        return ended.stderr


def scores_of(family: str) -> str:
    return str(fixture_folder(family) / "scores.pt")


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder and the digest of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def downloaded(hub: LocalHub, repo_id: str, folder: Path, revision: str | None = None) -> Path:
    """A repository as huggingface_hub's own download gives it."""
    shutil.rmtree(folder, ignore_errors=True)
    snapshot_download(
        repo_id, revision=revision, local_dir=folder, endpoint=hub.endpoint, token=hub.token
    )
    return folder


def same_model(published: Mapping[str, str], pruned: Mapping[str, str]) -> None:
    """A repository holds a prune, byte for byte; what a push adds is left out."""
    left = {name: digest for name, digest in published.items() if name not in OWN}
    right = {name: digest for name, digest in pruned.items() if name not in OWN}
    assert left == right
