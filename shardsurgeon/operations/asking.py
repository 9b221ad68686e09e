"""Questions to the servers of a probe, many at a time, and what their answers count up to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from shardsurgeon.errors import NetworkError, UsageError
from shardsurgeon.operations.answers import Kind, judged
from shardsurgeon.operations.kept_answers import KeptAnswers, Question, question_id
from shardsurgeon.operations.probe_report import Counts, RefusedReport
from shardsurgeon.operations.prompts import Prompt, Sampling
from shardsurgeon.storage.completions import CompletionServer, QuestionRefused
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.threads import map_in_threads

# Where none of so many questions is answered, the rest is not asked.
_HOPELESS = 20
_MOST_LISTED = 20


def model_of(server: CompletionServer, named: str | None, option: str) -> str:
    """The model to ask a server for. named: what `option` says, None for the only one.

    Raises UsageError where the server has another one, several, or does not say.
    """
    served = server.models()
    if named is not None and named not in served and served:
        problem = f"{server.location} serves {_listed(served)}, and no {named}"
        raise UsageError(option, problem, "name one that it serves")
    if named is None and len(served) != 1:
        several = f"serves {len(served)} models ({_listed(served)})"
        problem = several if served else "does not say which model it serves"
        raise UsageError(server.location, problem, f"name it with {option}")
    return named or served[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", {len(names) - 5} more" if len(names) > 5 else "")


class Served:
    """A model of a server, and what it is asked: for each setting every prompt, in that order.

    Each prompt has a seed of its own, which is the same for every setting and server.
    """

    def __init__(
        self,
        server: CompletionServer,
        model: str,
        prompts: Sequence[Prompt],
        settings: Mapping[str, Sampling],
        seed: int,
    ) -> None:
        self.server, self.model = server, model
        self.questions: list[Question] = []
        for setting, sampling in settings.items():
            for index, prompt in enumerate(prompts):
                body = {"model": model, "messages": prompt.messages, **sampling.body()}
                body |= {"seed": seed + index, "stream": False}
                body |= {"tools": prompt.tools} if prompt.tools else {}
                known = question_id(server.location, body)
                place = (prompt.source, prompt.record, setting, index, prompt.text)
                self.questions.append(Question(body, *place, known))


def digest_of(served: Sequence[Served], *others: object) -> str:
    """What tells one request from others: its questions, and what else it is made of."""
    text = json.dumps([[[each.id for each in side.questions] for side in served], others])
    return hashlib.sha256(text.encode()).hexdigest()


class Side:
    """One served model, what it is asked, and the answers that are kept."""

    def __init__(self, served: Served, kept: KeptAnswers, force: bool) -> None:
        """force: whether answers to other questions may go. Raises OutputError where they stay."""
        self.server, self.questions, self.kept = served.server, served.questions, kept
        kept.keep_only({each.id for each in self.questions}, force=force)
        self._refused: dict[Question, str] = {}
        self._refusing = threading.Lock()

    @property
    def open(self) -> list[Question]:
        """What has no answer yet."""
        return [each for each in self.questions if each not in self.kept]

    def ask(self, question: Question) -> None:
        """Ask it, and keep the answer. Raises what `CompletionServer.complete` raises, and
        NetworkError where the server has refused all that it was asked, which was enough.
        """
        try:
            self.kept.add(question, self.server.complete(question.body, question.where))
        except QuestionRefused as refused:
            with self._refusing:
                self._refused[question] = refused.said
                if len(self._refused) >= _HOPELESS:
                    self._require_answers(self.questions)

    def _require_answers(self, questions: Sequence[Question]) -> None:
        refused = [each for each in questions if each in self._refused]
        if refused and not any(each in self.kept for each in questions):
            problem = f"answers none of {len(refused):,} questions ({self._refused[refused[0]]})"
            raise NetworkError(self.server.location, problem, "ask it for something else")

    def refusals(self) -> tuple[RefusedReport, ...]:
        """The first questions that were refused."""
        refused = [each for each in self.questions if each in self._refused]
        return tuple(
            RefusedReport(self.server.location, each.where, self._refused[each])
            for each in refused[:_MOST_LISTED]
        )

    def answered(self, setting: str) -> tuple[int, int]:
        """How many questions of a setting were answered, and how many refused."""
        asked = [each for each in self.questions if each.setting == setting]
        refused = sum(each in self._refused for each in asked)
        return len(asked) - refused, refused

    def counts(self) -> dict[str, Counts]:
        """By the name of a setting, how many answers fail in which way, and of how many.

        Calls to tools count among the answers to prompts with tools, and where there are some.
        Raises NetworkError where no question of a setting was answered.
        """
        found: dict[str, dict[Kind, tuple[int, int]]] = {}
        with phase("judging answers", len(self.questions)) as at:
            for question in self.questions:
                counts = found.setdefault(question.setting, {})
                if question in self.kept:
                    wrong = judged(self.kept.reply(question), question.tools)
                    for kind in Kind:
                        count, answers = counts.get(kind, (0, 0))
                        if kind is not Kind.BAD_CALL or question.tools:
                            counts[kind] = count + (kind in wrong), answers + 1
                at.advance()
        for setting in found:
            self._require_answers([each for each in self.questions if each.setting == setting])
        return dict(found)


def ask_all(sides: Sequence[Side], at_once: int) -> None:
    """Ask all that is open, both sides in turn. Raises NetworkError where a server fails, which
    says how many answers are kept.
    """
    todo = [[(side, each) for each in side.open] for side in sides]
    total = sum(len(side.questions) for side in sides)
    with phase("asking", total, done=total - sum(map(len, todo))) as at:

        def ask(each: tuple[Side, Question] | None) -> None:
            if each is not None:
                side, question = each
                side.ask(question)
                at.advance()

        in_turn = (each for pair in zip_longest(*todo) for each in pair)
        try:
            map_in_threads(ask, in_turn, at_once, "ask")
        except NetworkError as error:
            if kept := sum(len(side.kept) for side in sides):
                known = f"{kept:,} answers are kept, and the same command goes on"
                error.reword(error.where, error.problem, known)
            raise
