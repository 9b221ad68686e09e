"""Which files of a pruned model are pushed, under which names, and that none tells a secret.

What `apply` recorded as written is pushed, and the card; what lies beside it stays. A folder
without such a record is judged by the rule for the files beside a model. Names, the beginnings of
tokens and keys: what is looked for is what people leave in such folders, not every secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.checkpoint.files import CARD_NAME, SECRET, set_aside, why_left_behind
from shardsurgeon.checkpoint.side_files import matches, side_files
from shardsurgeon.errors import UsageError
from shardsurgeon.execution.outputs import output_sizes
from shardsurgeon.execution.plan import Plan
from shardsurgeon.storage.files import reading
from shardsurgeon.storage.hub.upload import Content
from shardsurgeon.storage.source import Source, SourceFile, require_plain, unusual
from shardsurgeon.storage.threads import map_in_threads

_MAX_TEXT_NBYTES = 1 << 20
_READS_AT_ONCE = 8
# Vocabularies hold everything that looks like a token; weights, scores and images are no text.
_NOT_SEARCHED = re.compile(
    r"(?:.*/)?(?:[^/]*tokenizer\.json|vocab\.\w+|merges\.txt|tekken\.json"
    r"|.*\.(?:tiktoken|model|safetensors|pt|pth|npz|png|jpe?g|gif|webp|pdf|mp[34]|wav))",
    re.IGNORECASE,
)
_TELLING = {
    "a Hugging Face token": rb"\bhf_(?!([xX0])\1+\b)[A-Za-z0-9]{24,}",
    "an API key": rb"(?<![\w-])sk-(?:[a-z]+\d*-)*(?!([xX0])\1+\b)[A-Za-z0-9_]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "a Slack token": rb"\bxox[abprs]-[\w-]{10,}",
    "a Google API key": rb"\bAIza[\w-]{35}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a folder that are pushed, and the names of those that are not."""

    files: tuple[SourceFile, ...]
    left: tuple[str, ...]


def select_files(
    pruned: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Selection:
    """Choose what is pushed of a pruned model's folder.

    include: globs of files that are pushed too; exclude: globs of files that stay. Raises
    UsageError for one that fits nothing, for the exclusion of what a model needs, and for a name
    that no repository can have; CheckpointError for a file that is a link out of the folder, a
    shard excepted, or no file.
    """
    record = pruned.provenance
    written = record.files if record is not None else None
    needed = {*pruned.rewritten, *(shard.file for shard in pruned.shards)}
    ours = {CARD_NAME, *needed}
    ours.update(side_files(pruned).carried if written is None else written)
    there = {file.name for file in pruned.files}
    for option, globs, names in (
        ("--include", include, there | pruned.odd.keys()),
        ("--exclude", exclude, there | pruned.odd.keys() | ours),
    ):
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                problem = f"{glob} fits none of the {len(there)} files"
                raise UsageError(option, problem, "globs are of paths in the model's folder")
    for name in sorted(needed & there):
        if matches(name, exclude):
            problem = f"would leave {name} here, without which this is no model"
            raise UsageError("--exclude", problem, "give a narrower glob")

    def is_chosen(name: str) -> bool:
        return (name in ours or matches(name, include)) and not matches(name, exclude)

    require_plain(pruned.source, filter(is_chosen, pruned.odd))
    chosen = [file for file in pruned.files if is_chosen(file.name)]
    require_names(file.name for file in chosen)
    left = {*there, *pruned.odd} - {file.name for file in chosen}
    return Selection(tuple(chosen), tuple(sorted(left)))


def files_to_publish(
    folder: Path, names: Iterable[str], card: Mapping[str, bytes]
) -> dict[str, Content]:
    """The chosen files of a folder by their names in the repository.

    card: README.md and its pictures; the folder's own is then named README.source.md, and an
    earlier one of that name README.source-2.md. Empty: every file keeps its name.
    """
    files: dict[str, Content] = {name: folder / name for name in names}
    if not card:
        return files
    moving, name = files.get(CARD_NAME), set_aside(CARD_NAME)
    files |= card
    while moving is not None and name is not None:
        files[name], moving = moving, files.get(name)
        name = set_aside(name)
    return files


def refuse_secrets(source: Source, files: Iterable[SourceFile]) -> None:
    """Raise UsageError where a file is a secret by its name, or a small text file holds one.

    What is found is named by its kind and line and never shown.
    """
    texts = []
    for file in files:
        if why_left_behind(file.name) == SECRET:
            where, problem = f"{source.location}/{file.name}", "is a file of secrets by its name"
            raise UsageError(where, problem, "leave it here: take it out of --include")
        if 0 < file.nbytes <= _MAX_TEXT_NBYTES and not _NOT_SEARCHED.fullmatch(file.name):
            texts.append(file)

    def search(file: SourceFile) -> None:
        raw = source.read(file.name, 0, file.nbytes)
        refuse_secret(raw, f"{source.location}/{file.name}")

    map_in_threads(search, texts, _READS_AT_ONCE if source.is_remote else 1, "secrets")


def require_names(names: Iterable[str]) -> None:
    """Raise UsageError for the name of a file that no repository can have: it is no text."""
    for name in names:
        if (what := unusual(name)) is not None:
            problem = f"is a {what}, and the Hub takes none such"
            raise UsageError(name, problem, "rename it, or leave it behind (apply --exclude)")


def refuse_planned_secrets(plan: Plan, source: Source) -> None:
    """Raise UsageError where the result of a plan would hold a secret, or a file of a name that no
    repository can have. Reads its small files."""
    require_names(output_sizes(plan))
    copied = set(plan.copied_files)
    refuse_secrets(source, [file for file in plan.source_files if file.name in copied])
    contents: dict[str, bytes] = dict(plan.generated_files)
    for _, path, _ in plan.score_files:
        with reading(path):
            small = Path(path).stat().st_size <= _MAX_TEXT_NBYTES
            contents[path] = Path(path).read_bytes() if small else b""
    for name, raw in contents.items():
        if not _NOT_SEARCHED.fullmatch(name):
            refuse_secret(raw, name)


def refuse_secret(raw: bytes, where: str) -> None:
    """Raise UsageError, naming `where`, for text that holds a token or a key."""
    if b"\0" in raw[:1024]:
        return
    for kind, pattern in _TELLING.items():
        if found := re.search(pattern, raw):
            line = raw.count(b"\n", 0, found.start()) + 1
            problem = f"line {line} holds what looks like {kind}"
            remedy = "take it out, or leave the file behind (apply --exclude)"
            raise UsageError(where, problem, remedy)
