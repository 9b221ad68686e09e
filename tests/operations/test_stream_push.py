"""`apply --stream-push`: shard after shard to the Hub, less disk than the model, nothing twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from shardsurgeon.errors import OutputError, SourceChangedError, UsageError, VerificationError
from shardsurgeon.execution.transfer import RangeTransfer
from shardsurgeon.execution.workers import Progress
from shardsurgeon.operations import api
from shardsurgeon.operations.apply import apply
from shardsurgeon.operations.request import Destination, RunOptions
from tests.operations.workbench import Shell, digests, downloaded, same_model, scores_of
from tests.support.hub.models import fixture_folder, write_checkpoint
from tests.support.hub.server import LocalHub

# The real program in a process of its own, stopped at many places, and a Hub of many requests.
pytestmark = pytest.mark.slow

FAMILY = "kimi_k25"


@pytest.fixture
def source(shell: Shell) -> LocalHub:
    shell.hub.add_model("org/Tiny", fixture_folder(FAMILY))
    return shell.hub


def words(*more: str, scores: str = scores_of(FAMILY), model: str = "org/Tiny") -> tuple[str, ...]:
    return ("apply", scores, "--model", model, "--ratio", "0.65", *more)


def local_prune(folder: Path, scores: str = scores_of(FAMILY)) -> dict[str, str]:
    """The prune of the same commit, downloaded whole and pruned here."""
    snapshot = snapshot_download("org/Tiny")
    api.apply(api.plan(snapshot, scores, ratio=0.65), folder)
    return digests(folder)


def test_the_repository_is_byte_identical_to_a_local_prune(
    shell: Shell, source: LocalHub, tmp_path: Path
) -> None:
    report = json.loads(shell.good(*words("--stream-push", "me/small", "--json")))
    there = digests(downloaded(source, "me/small", tmp_path / "there"))
    expected = local_prune(tmp_path / "local")
    same_model(there, expected)
    assert there["README.source.md"] == expected["README.md"]
    assert source.commits("me/small")[1:] == ["initial commit"]
    assert report["out"] is None
    assert report["push"]["commit"] == source.store.repositories["me/small"].branches["main"]
    assert report["verification"]["tensors_compared"] > 0
    assert set(source.uploads.values()) == {1}
    assert list(shell.folder.iterdir()) == []


def test_scores_that_change_during_the_run_reach_no_commit(
    shell: Shell, source: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.pt"
    raw = Path(scores_of(FAMILY)).read_bytes()
    scores.write_bytes(raw)
    pruning = api.plan("org/Tiny", scores, ratio=0.65, out=tmp_path / "out")

    def listen(progress: Progress) -> None:
        # Told more than once of as many shards, and of several at once.
        if progress.shards_done >= 1:
            scores.write_bytes(raw[::-1])

    monkeypatch.setenv("HF_TOKEN", source.token)
    with pytest.raises(SourceChangedError, match=r"scores\.pt: had SHA-256"):
        api.apply(pruning, stream_push="me/small", workers=1, on_progress=listen)
    assert source.commits("me/small") == ["initial commit"]


def test_the_report_names_the_repository(shell: Shell, source: LocalHub) -> None:
    said = shell.good(*words("--stream-push", "me/small"))
    assert "streamed" in said and "downloaded" in said and "me/small (new repository)" in said
    assert said.endswith("Serve:\n  vllm serve me/small --trust-remote-code\n")


def test_a_local_model_can_be_streamed_too(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    shell.good(*words("--stream-push", "me/small", model=str(fixture_folder(FAMILY))))
    same_model(digests(downloaded(shell.hub, "me/small", tmp_path / "there")), digests(pruned))


def test_the_result_can_stay_here_as_well(shell: Shell, source: LocalHub, tmp_path: Path) -> None:
    shell.good(*words("--push-to-hub", "me/small", "-o", "out"))
    there = digests(downloaded(source, "me/small", tmp_path / "there"))
    same_model(there, digests(shell.folder / "out"))
    assert there["README.source.md"] == digests(shell.folder / "out")["README.md"]


def test_the_line_that_compares_every_byte_can_be_typed(shell: Shell, source: LocalHub) -> None:
    said = shell.good(*words("-o", "out"))
    [line] = [line for line in said.splitlines() if line.startswith("  shardsurgeon verify ")]
    assert f"org/Tiny@{source.store.repositories['org/Tiny'].branches['main']} out" in line
    assert "identical" in shell.good(*line.split()[1:])


def test_a_pull_request_to_another_user(shell: Shell, source: LocalHub, tmp_path: Path) -> None:
    source.add_model("org/theirs", {"notes.txt": b"theirs"})
    said = shell.good(*words("--stream-push", "org/theirs", "--create-pr"))
    assert "(pull request)" in said and "vllm serve" not in said
    assert list(source.files("org/theirs")) == ["notes.txt"]
    there = digests(downloaded(source, "org/theirs", tmp_path / "there", "refs/pr/1"))
    del there["notes.txt"]
    same_model(there, local_prune(tmp_path / "local"))


# Interruptions


def partial(shell: Shell) -> Path:
    [place] = shell.folder.iterdir()
    assert place.name.endswith(".partial")
    return place


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("sent", [0, 1, 4])
def test_killed_it_goes_on_and_uploads_no_shard_twice(
    shell: Shell, source: LocalHub, sent: int, tmp_path: Path
) -> None:
    source.fault(r"PUT /upload/", skip=sent, do=lambda: process.kill())
    process = shell.start(*words("--stream-push", "me/small", "--workers", "1"))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    arrived = dict(source.uploads)
    assert source.commits("me/small") == ["initial commit"]
    shell.good(*words("--stream-push", "me/small"))
    assert {oid: source.uploads[oid] for oid in arrived} == dict.fromkeys(arrived, 1)
    same_model(
        digests(downloaded(source, "me/small", tmp_path / "there")),
        local_prune(tmp_path / "local"),
    )
    assert list(shell.folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_behind_the_commit_it_finds_it(shell: Shell, source: LocalHub) -> None:
    source.fault(r"GET /api/models/me/small/revision/[0-9a-f]{40}", do=lambda: process.kill())
    process = shell.start(*words("--stream-push", "me/small"))
    process.communicate(timeout=60)
    assert len(source.commits("me/small")) == 2
    uploads = dict(source.uploads)
    shell.good(*words("--stream-push", "me/small"))
    assert len(source.commits("me/small")) == 2
    assert source.uploads == uploads
    assert list(shell.folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_polite_stop_says_how_to_go_on(shell: Shell, source: LocalHub) -> None:
    source.fault(r"PUT /upload/", skip=2, do=lambda: process.send_signal(signal.SIGTERM))
    process = shell.start(*words("--stream-push", "me/small"))
    _, said = process.communicate(timeout=60)
    kept = r"[\d.]+ kB of [\d.]+ kB are sent or kept in \S+\.partial; the same command resumes"
    assert process.returncode == 143 and re.fullmatch(f"shardsurgeon: stopped; {kept}\n", said)
    shell.good(*words("--stream-push", "me/small"))
    assert set(source.uploads.values()) == {1}


def test_a_hub_that_fails_in_the_middle_loses_nothing(
    shell: Shell, source: LocalHub, tmp_path: Path
) -> None:
    source.fault(r"PUT /upload/", skip=3, times=None, status=403)
    line = shell.refused(*words("--stream-push", "me/small"))
    assert "HTTP 403" in line
    assert partial(shell)
    source.clear_faults()
    shell.good(*words("--stream-push", "me/small"))
    assert set(source.uploads.values()) == {1}
    same_model(
        digests(downloaded(source, "me/small", tmp_path / "there")),
        local_prune(tmp_path / "local"),
    )


def test_a_restart_of_the_server_in_the_middle(
    shell: Shell, source: LocalHub, tmp_path: Path
) -> None:
    source.fault(r"PUT /upload/", skip=2, do=source.restart)
    shell.good(*words("--stream-push", "me/small"))
    same_model(
        digests(downloaded(source, "me/small", tmp_path / "there")),
        local_prune(tmp_path / "local"),
    )


def test_shards_that_were_sent_elsewhere_are_not_taken_for_ours(
    shell: Shell, source: LocalHub
) -> None:
    source.fault(r"PUT /upload/", skip=3, times=None, status=403)
    shell.refused(*words("--stream-push", "me/small"))
    source.clear_faults()
    line = shell.refused(*words("--stream-push", "me/other"))
    assert "me/small" in line and "--restart" in line
    assert "interrupted run" in shell.refused(*words())
    shell.good(*words("--stream-push", "me/other", "--restart"))
    assert "model.safetensors.index.json" in source.files("me/other")


# Disk


def shards_in(folder: Path) -> dict[int, int]:
    """Inode → size of every shard below a folder."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        status = path.stat()
        found[status.st_ino] = status.st_size
    return found


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes of all shards below a folder, looked at again and again."""
    seen: list[int] = [0]
    stopped = threading.Event()

    def look() -> None:
        before: dict[int, int] = {}
        while not stopped.is_set():
            with suppress(OSError):  # a file or a folder that has just gone
                now = shards_in(folder)
                # What came and went while it was looked at was not there at one time.
                if now.keys() == before.keys():
                    seen.append(sum(now.values()))
                before = now
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


def test_the_disk_holds_no_more_than_the_budget(shell: Shell, tmp_path: Path) -> None:
    sample = write_checkpoint(tmp_path / "big", "int4", 30_000_000, shards=10)
    shell.hub.add_model("org/Tiny", sample.folder)
    scores = str(sample.scores)
    expected = local_prune(tmp_path / "local", scores)
    shards = [path.stat().st_size for path in (tmp_path / "local").glob("*.safetensors")]
    budget = 2 * max(shards) + 100_000
    assert budget < sum(shards) / 2
    shell.hub.reset_counts()
    with watched(shell.folder) as seen:
        more = ("--stream-push", "me/small", "--disk-budget", str(budget))
        report = json.loads(shell.good(*words(*more, "--json", scores=scores)))
    assert 0 < max(seen) <= budget
    fetched = shell.hub.sent(r"GET /(cdn/.*|.*/resolve/.*)")
    same_model(digests(downloaded(shell.hub, "me/small", tmp_path / "there")), expected)
    kept = sum(path.stat().st_size for path in (tmp_path / "local").rglob("*") if path.is_file())
    assert report["bytes_downloaded"] <= 1.02 * kept
    headers = sum(len(_header(path)) for path in sample.folder.glob("*.safetensors"))
    assert fetched <= 1.02 * kept + headers + 2 * _small(sample.folder)


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def _small(folder: Path) -> int:
    """What is read to plan: config, index and the like."""
    return sum(path.stat().st_size for path in folder.glob("*.json"))


def test_a_budget_below_one_shard_is_refused_with_the_number(
    shell: Shell, source: LocalHub
) -> None:
    line = shell.refused(*words("--stream-push", "me/small", "--disk-budget", "10kB"))
    assert "--disk-budget" in line and "--max-shard-size" in line
    assert source.uploads == {}
    assert not [request for request in source.requests if "repos/create" in request.path]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--disk-budget", "1GB"), "say where to with --stream-push"),
        (("--push-to-hub", "me/a", "--disk-budget", "1GB"), "say where to with --stream-push"),
        (("--push-to-hub", "me/a", "--stream-push", "me/b"), "one repository is enough"),
        (("--stream-push", "me/a", "--disk-budget", "lots"), "'lots' is not a size"),
        (("--private",), "--private: is about a push"),
        (("--no-card",), "--no-card: is about a push"),
        (("--revision", "x"), "--revision: is about a push"),
    ],
)
def test_words_that_do_not_fit(shell: Shell, more: tuple[str, ...], told: str) -> None:
    assert told in shell.refused(*words(*more))


def test_the_repository_may_be_named_twice(shell: Shell, source: LocalHub) -> None:
    shell.good(*words("--push-to-hub", "me/a", "--stream-push", "me/a"))
    assert len(source.commits("me/a")) == 2


def test_a_dry_run_touches_no_repository(shell: Shell, source: LocalHub) -> None:
    said = shell.good(*words("--stream-push", "me/small", "--dry-run"))
    assert said.endswith("Dry run: nothing was written.\n")
    assert "me/small" not in source.store.repositories


# Proof


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that is moved by a worker comes out another."""
    move = RangeTransfer.write

    def wrong(self: RangeTransfer, batch: object, path: Path, *rest: object) -> object:
        done = move(self, batch, path, *rest)  # type: ignore[arg-type]
        if path.name.endswith("2-of-00005.safetensors"):
            with path.open("r+b") as file:
                size = file.seek(0, 2)
                file.seek(size // 2)
                file.write(bytes(size - size // 2))
        return done

    monkeypatch.setattr(RangeTransfer, "write", wrong)


def test_a_shard_with_wrong_bytes_is_never_sent(
    shell: Shell, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    plan = api.plan(fixture_folder(FAMILY), scores_of(FAMILY), ratio=0.65, out=tmp_path / "out")
    with pytest.raises(VerificationError, match=r"00002-of-00005.*differs from"):
        api.apply(plan, stream_push="me/small")
    wrong = (tmp_path / "out.partial").rglob("*00002-of-00005.safetensors")
    sent = set(shell.hub.uploads)
    assert not sent & {digests(path.parent)[path.name] for path in wrong}
    assert shell.hub.commits("me/small") == ["initial commit"]


def test_what_does_not_hold_as_a_whole_is_not_committed(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(fixture_folder(FAMILY), scores_of(FAMILY), ratio=0.65, out=tmp_path / "out")
    generated_files = tuple(
        (name, data.replace(b'"total_size": ', b'"total_size": 1') if "index" in name else data)
        for name, data in plan.plan.generated_files
    )
    object.__setattr__(plan.plan, "generated_files", generated_files)
    with pytest.raises(VerificationError, match="total_size"):
        api.apply(plan, stream_push="me/small")
    assert shell.hub.commits("me/small") == ["initial commit"]
    # Whoever does not want to know is not told.
    api.apply(plan, stream_push="me/small", verify=False)
    assert len(shell.hub.commits("me/small")) == 2


# Python


def test_python_does_the_same(shell: Shell, pruned: Path, tmp_path: Path) -> None:
    plan = api.plan(fixture_folder(FAMILY), scores_of(FAMILY), ratio=0.65, out=tmp_path / "out")
    report = api.apply(plan, stream_push="me/small", disk_budget="1MB", private=True)
    assert report.out is None and report.push is not None
    same_model(digests(downloaded(shell.hub, "me/small", tmp_path / "there")), digests(pruned))
    with pytest.raises(UsageError, match="is not a repository id"):
        api.apply(plan, stream_push="a/b/c")


def test_what_is_done_stays_where_only_the_push_fails(shell: Shell, source: LocalHub) -> None:
    source.fault(r"POST .*/commit/", times=None, status=403)
    line = shell.refused(*words("--push-to-hub", "me/small", "-o", "out", "--private"))
    assert "out is complete" in line
    assert "`shardsurgeon push out me/small --private`" in line
    source.clear_faults()
    shell.good("push", "out", "me/small", "--private")
    assert set(source.uploads.values()) == {1}


def test_an_output_that_exists_is_refused_before_the_hub_is_asked(
    shell: Shell, pruned: Path
) -> None:
    plan = api.plan(fixture_folder(FAMILY), scores_of(FAMILY), ratio=0.65, out=pruned)
    with pytest.raises(OutputError, match="exists"):
        apply(plan, RunOptions(), Destination("me/small", stream=True))
    assert shell.hub.requests == []


def test_a_card_in_a_language_is_carried_over(shell: Shell, tmp_path: Path) -> None:
    sample = write_checkpoint(tmp_path / "model", "stacked", 20_000_000, shards=2)
    shell.hub.add_model("org/Tiny", sample.folder)
    shell.good(*words("--stream-push", "me/small", scores=str(sample.scores)))
    card = shell.hub.read("me/small", "README.md").decode()
    assert card.startswith("---\nbase_model:\n- org/Tiny\nbase_model_relation: finetune\n")
    assert "license: apache-2.0\n" in card and "- zh\n" in card
    assert subprocess.list2cmdline(["--ratio", "0.65"]) in card


def test_sampling_settings_of_a_far_model_are_pushed_and_checked(
    shell: Shell, source: LocalHub, tmp_path: Path
) -> None:
    ended = shell.here(*words("--stream-push", "me/small", "--sampling", "min_p=0.05"))
    assert ended.status == 0, ended.stderr
    there = downloaded(source, "me/small", tmp_path / "there")
    before = json.loads((fixture_folder(FAMILY) / "generation_config.json").read_bytes())
    written = json.loads((there / "generation_config.json").read_bytes())
    assert written == before | {"min_p": 0.05, "do_sample": True}
    assert api.verify("org/Tiny", there).differences == ()
    assert "`min_p` 0.05, `do_sample` true" in (there / "README.md").read_text()
