"""Answers on disk, a line each as they come, so that no question is asked twice.

A line is known by what was asked, down to the sampling, and of whom. So an answer stays good for
every request that would ask the same, one for more answers too. A line that a kill cut short is
dropped; at the end the lines are put in the order of the questions.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from shardsurgeon.errors import OutputError
from shardsurgeon.storage.completions import Reply
from shardsurgeon.storage.files import read_exact, reading, require_folder_of, write_all, writing
from shardsurgeon.storage.system import default_system

_ID_DIGITS = 24
_OTHER_WORK = "choose another -o, or discard them with --force"


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a server is asked. body: of the request; record: its number in the dataset `source`.

    setting: which of the sampling settings it is asked with; index: the how-many-th of it; prompt:
    the text that a record holds, None for a conversation; id: a digest of the body and the server.
    """

    body: Mapping[str, Any]
    source: str
    record: int
    setting: str
    index: int
    prompt: str | None
    id: str

    @property
    def where(self) -> str:
        """The record, as messages name it."""
        return f"{self.source}, record {self.record:,}"

    @property
    def tools(self) -> Sequence[Any] | None:
        """The tools that may be called."""
        return self.body.get("tools")


def question_id(location: str, body: Mapping[str, Any]) -> str:
    """What tells one question from all others. location: of the server that is asked."""
    text = json.dumps([location, body], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


class KeptAnswers:
    """A file of answers, open to be added to. Safe for several threads; a context that closes it.

    Holds in memory where each answer lies, not the answers.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        """restart: discard the answers that are there.

        Raises OutputError for a file that holds something else than answers, or that another
        process is adding to.
        """
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._system, self._writing = default_system(), threading.Lock()
        require_folder_of(path)
        with writing(path):
            if path.exists() and not path.is_file():
                raise OutputError(path, "is no file that can be written", "choose another -o")
            self._file = FileIO(path, "r+" if path.exists() else "x+")
        try:
            if not self._system.lock(self._file):
                problem = "is being added to by another run of probe"
                raise OutputError(path, problem, "wait for it, or choose another -o")
            self._end = self._scan()
            if restart:
                self._end = 0
                self._places.clear()
            with writing(path):
                self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> KeptAnswers:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._file.closed:
            with self._writing, writing(self.path), self._file:
                self._system.sync_file(self._file)
            if not self._end:
                self.path.unlink(missing_ok=True)

    def __contains__(self, question: Question) -> bool:
        return question.id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def keep_only(self, ids: Collection[str], *, force: bool) -> None:
        """Know no answers to other questions. Raises OutputError where there are some, unless they
        may go, with `force`."""
        others = self._places.keys() - set(ids)
        if others and not force:
            problem = f"holds {len(others):,} answers to questions that this command does not ask"
            raise OutputError(self.path, problem, _OTHER_WORK)
        for other in others:
            del self._places[other]

    def add(self, question: Question, reply: Reply) -> None:
        """Write an answer. Raises OutputWriteError."""
        text = json.dumps(_record(question, reply), ensure_ascii=False)
        # Half a character in a prompt becomes the escape that JSON has for it.
        line = text.encode(errors="backslashreplace") + b"\n"
        with self._writing:
            write_all(self._file, line, self._end, self.path, self._system)
            self._places[question.id] = (self._end, self._end + len(line))
            self._end += len(line)

    def reply(self, question: Question) -> Reply:
        """The answer that is kept."""
        record = json.loads(self._line(question))
        calls = tuple((name, arguments) for name, arguments in record.get("tool_calls", ()))
        texts = (record["completion"], record.get("reasoning", ""))
        return Reply(*texts, calls, record["finish_reason"])

    def sort(self, questions: Sequence[Question]) -> None:
        """Put the answers in the order of the questions, and drop all others. Ends the use of it.

        The file has all of them whatever happens meanwhile.
        """
        temporary = self.path.with_name(f"{self.path.name}.writing")
        with writing(temporary):
            temporary.unlink(missing_ok=True)
            with FileIO(temporary, "x") as file:
                at = 0
                for line in (self._line(each) for each in questions if each in self):
                    write_all(file, line, at, temporary, self._system)
                    at += len(line)
                self._system.sync_file(file)
        self._file.close()
        with writing(self.path):
            self._system.rename(temporary, self.path)
            self._system.sync_folder(self.path.parent)

    def _line(self, question: Question) -> bytes:
        return read_exact(self._file, *self._places[question.id], self.path, self._system)

    def _scan(self) -> int:
        """Find the lines that are there; return where the last whole one ends."""
        at = 0
        # By the same handle: on Windows a locked file can be read by no other.
        with reading(self.path), open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    # Cut by a kill, unless it is no file of ours at all.
                    if at or line.startswith(b'{"id"'[: len(line)]):
                        return at
                    raise self._no_answers(number)
                self._places.setdefault(self._id(line, number), (at, at + len(line)))
                at += len(line)
        return at

    def _id(self, line: bytes, number: int) -> str:
        try:
            record = json.loads(line)
            known, said = record["id"], (record["completion"], record["finish_reason"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._no_answers(number) from None
        if not all(isinstance(each, str) for each in (known, *said)):
            raise self._no_answers(number)
        return str(known)

    def _no_answers(self, number: int) -> OutputError:
        problem = f"line {number:,} is no answer that probe keeps"
        return OutputError(self.path, problem, "choose another -o")


def _record(question: Question, reply: Reply) -> dict[str, Any]:
    """A line: of what `evaluate` forces, the prompt and the completion, and what else was said."""
    asked: dict[str, Any] = {"prompt": question.prompt}
    if question.prompt is None:
        asked = {"messages": question.body["messages"]}
    told = {"tools": question.tools, "reasoning": reply.reasoning, "tool_calls": reply.tool_calls}
    return {
        "id": question.id,
        "setting": question.setting,
        "index": question.index,
        **asked,
        "completion": reply.text,
        **{name: value for name, value in told.items() if value},
        "finish_reason": reply.finish_reason,
        "source": question.source,
        "record": question.record,
    }
