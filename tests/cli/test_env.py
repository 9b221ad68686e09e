"""`env`: what a report of a fault should say, and none of what is secret."""

from __future__ import annotations

import json
import sys

import pytest

import shardsurgeon
from tests.cli.standins import Run


def test_it_names_versions_and_machine(run: Run) -> None:
    report = json.loads(run("env", "--json").stdout)
    assert report["version"] == shardsurgeon.__version__
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "click", "huggingface_hub"} <= report["packages"].keys()
    assert report["cores"] >= 1
    for name in ("python", "system", "packages", "free space"):
        assert f"\n  {name} " in run("env").stdout


def test_secrets_are_only_said_to_be_set(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my secret")
    monkeypatch.setenv("HF_HUB_TOKEN_TWO", "my secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:my secret@host")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    variables = json.loads(run("env", "--json").stdout)["variables"]
    assert variables["HF_TOKEN"] == variables["HTTPS_PROXY"] == "(set)"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert "my secret" not in run("env").stdout
