"""Every error a user can meet, and the exit status each one ends the command with.

    ShardSurgeonError
    ├── InputError   (2)  the files or the options given cannot be used
    │   ├── UsageError          options contradict each other or the model
    │   ├── CheckpointError     a checkpoint folder is incomplete or inconsistent
    │   │   ├── HeaderError     a safetensors header breaks its format
    │   │   ├── IndexFileError  model.safetensors.index.json and the shards disagree
    │   │   └── ConfigError     config.json is missing, broken or lacks what is needed
    │   ├── FamilyError         the model's family is unsupported, or it is not laid out so
    │   │   └── UndeclaredFamilyError  no declaration fits, and guessing leaves doubts
    │   ├── ScoreError          a score file is unreadable or does not fit the model
    │   ├── KeepListError       a keep-list file is unreadable or does not fit the model
    │   ├── DatasetError        a calibration dataset is missing, empty, or unreadable
    │   └── OutputError         the output folder exists, or belongs to another run
    └── WorkError    (1)  the request was right but the work failed
        ├── SourceChangedError  a shard is no longer what it was when it was planned
        ├── SourceReadError     a shard could not be read
        ├── NetworkError        the network gave up
        ├── OutputWriteError    the output could not be written
        ├── PublishError        the result could not be published
        └── VerificationError   the result does not match its source

Each prints as one line: where, what is wrong in numbers, what to do.
"""

from __future__ import annotations

import re
from os import PathLike, fspath

# What a terminal would obey, or show in another order.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# A token of the Hub, what stands behind the word for it in a header, a signature in an address.
_SECRET = re.compile(
    r"((?-i:hf_))[A-Za-z0-9]{16,}"
    # With a digit in it, so that no word of a sentence is taken for one.
    r"|((?:bearer|basic)\s+)(?=[\w.~+/-]*\d)[\w.~+/=-]{8,}"
    r"|([?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|signature|sig|token|access_token|policy)=)[^&\s\"'\\]+",
    re.IGNORECASE,
)


# Secrets that look like nothing in particular: the token in use, the login of an address.
_IN_USE: set[str] = set()
_SHORTEST_SECRET = 8


def keep_secret(secret: str | None) -> None:
    """From now on no printed text has this one in it. One of a few letters is not kept: words
    would have it in them.
    """
    if secret and len(secret) >= _SHORTEST_SECRET:
        _IN_USE.add(secret)


def redacted(text: str) -> str:
    """Text with three stars for every token and signature in it."""
    for secret in _IN_USE:
        text = re.sub(re.escape(secret), "***", text, flags=re.IGNORECASE)
    return _SECRET.sub(lambda found: f"{next(filter(None, found.groups()))}***", text)


def printable(text: str) -> str:
    """Text from files and servers as it may be shown to a person, control characters escaped."""
    return redacted(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))


def install(extra: str) -> str:
    """The remedy where a package is missing that an extra of pyproject.toml brings.

    The one place that says where from: until there is a release, from the clone.
    """
    return f"in the clone of shardsurgeon, pip install '.[{extra}]'"


class ShardSurgeonError(Exception):
    """The base of every error that shardsurgeon raises on purpose.

    where, problem, remedy: the parts of the message; exit_status: what the command ends with.

    >>> try:
    ...     shardsurgeon.inspect("nowhere")
    ... except shardsurgeon.ShardSurgeonError as error:
    ...     print(error.where, "|", error.problem, "|", error.exit_status)
    nowhere | there is no such folder | 2
    """

    exit_status = 1

    def __init__(self, where: str | PathLike[str], problem: str, remedy: str = "") -> None:
        """Keep the three parts of the line apart.

        where: the file, folder or option concerned; problem: what is wrong, in numbers;
        remedy: what the user can do about it, or "" where the problem says it all.
        """
        self.where = fspath(where)
        self.problem = problem
        self.remedy = remedy
        super().__init__(self._line())

    def reword(self, where: str, problem: str, remedy: str) -> None:
        """Say the same in other words."""
        self.where, self.problem, self.remedy = where, problem, remedy
        self.args = (self._line(),)

    def __reduce__(self) -> tuple[object, ...]:
        """What makes it anew in another process: its parts, and what else it carries."""
        return type(self), (self.where, self.problem, self.remedy), self.__dict__

    def _line(self) -> str:
        line = f"{self.where}: {self.problem}" if self.where else self.problem
        line += f"; {self.remedy}" if self.remedy else ""
        return printable(" ".join(line.split()))


class InputError(ShardSurgeonError):
    """The files or the options given cannot be used; exit status 2.

    >>> shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=1.5)
    Traceback (most recent call last):
    shardsurgeon.errors.UsageError: ratio: 1.5 is not between 0 and 1; give the fraction ...
    """

    exit_status = 2


class UsageError(InputError):
    """Options contradict each other or the model."""


class CheckpointError(InputError):
    """A checkpoint folder is incomplete or inconsistent."""


class HeaderError(CheckpointError):
    """A safetensors header breaks its format."""


class IndexFileError(CheckpointError):
    """The index and the shards disagree, or the index is broken."""


class ConfigError(CheckpointError):
    """config.json is missing, broken or lacks what is needed."""


class FamilyError(InputError):
    """The model's family is not supported, or it is not laid out as its family says."""


class UndeclaredFamilyError(FamilyError):
    """No declaration fits the model; skeleton: the TOML of one, as far as it can be guessed."""

    def __init__(
        self,
        where: str | PathLike[str],
        problem: str,
        remedy: str = "",
        *,
        skeleton: str = "",
    ) -> None:
        """Keep the skeleton beside the message, to be printed after it."""
        super().__init__(where, problem, remedy)
        self.skeleton = skeleton


class ScoreError(InputError):
    """A score file is unreadable or does not fit the model."""


class KeepListError(InputError):
    """A keep-list file is unreadable or does not fit the model."""


class DatasetError(InputError):
    """A calibration dataset is missing, empty, or unreadable."""


class OutputError(InputError):
    """The output folder exists, or belongs to another run."""


class WorkError(ShardSurgeonError):
    """The request was right but the work failed: a full disk, a lost connection; exit status 1.

    >>> plan = shardsurgeon.plan("fixtures/kimi_k25", "fixtures/kimi_k25/scores.pt", ratio=0.65)
    >>> import os
    >>> os.utime("fixtures/kimi_k25/model-00001-of-000005.safetensors")
    >>> try:
    ...     shardsurgeon.apply(plan, "small")
    ... except shardsurgeon.WorkError as error:
    ...     print(type(error).__name__)
    SourceChangedError
    """

    exit_status = 1


class SourceChangedError(WorkError):
    """A shard is no longer what it was when it was planned."""


class SourceReadError(WorkError):
    """A shard could not be read."""


class NetworkError(WorkError):
    """The network failed: too many tries in a row brought no byte."""


class OutputWriteError(WorkError):
    """The output could not be written."""


class PublishError(WorkError):
    """The result could not be published."""


class VerificationError(WorkError):
    """The result does not match its source."""
