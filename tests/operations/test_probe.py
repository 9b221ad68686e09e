"""A probe of scripted servers: counts, comparisons, what is kept, resumed, refused, and the key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.errors import (
    DatasetError,
    InputError,
    NetworkError,
    OutputError,
    ShardSurgeonError,
    UsageError,
)
from shardsurgeon.operations.probe import ProbeRequest, probe
from shardsurgeon.operations.probe_report import FailureReport, ProbeReport
from shardsurgeon.operations.prompts import Sampling
from shardsurgeon.storage.retry import RetryPolicy
from tests.cli.standins import ROOT
from tests.support.completions import ScriptedServer, prompt_of

FAST = RetryPolicy(tries=3, first_wait=0.01, longest_wait=0.02)
LOOP = "I see. " + "And then it says so again. " * 20
KEY = "sk-secret-0123456789abcdef"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here lie chats.jsonl, 100 conversations that end in an answer, and other.jsonl, 10 texts."""
    monkeypatch.chdir(tmp_path)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "what a person answered"},
            ]
        }
        for number in range(100)
    ]
    write("chats.jsonl", chats)
    write("other.jsonl", [{"text": f"text {number}"} for number in range(10)])
    return tmp_path


def write(name: str, records: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def number_of(question: dict[str, Any]) -> int:
    return int(prompt_of(question).split()[1])


def loops_in_seven(question: dict[str, Any]) -> str:
    return LOOP if number_of(question) % 100 < 7 else f"The answer is {number_of(question)}."


def probed(
    url: str, prompts: str = "chats.jsonl:100", out: str = "probe.json", **options: Any
) -> ProbeReport:
    kept = {name: options.pop(name) for name in ("force", "restart") if name in options}
    return probe(url, ProbeRequest(prompts, **options), out, **kept, policy=FAST)


def failures(report: ProbeReport, setting: int = 0) -> dict[str, FailureReport]:
    return {each.kind: each for each in report.settings[setting].failures}


def counts(report: ProbeReport, setting: int = 0) -> dict[str, int]:
    found = failures(report, setting)
    return {kind: each.count for kind, each in found.items() if each.count}


def answers(name: str = "probe.answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_bytes().splitlines()]


# Counting


def test_seven_loops_of_a_hundred_are_seven_percent_with_their_interval() -> None:
    with ScriptedServer(loops_in_seven) as server:
        report = probed(server.url)
    assert counts(report) == {"loops": 7}
    loops = failures(report)["loops"]
    assert (loops.answers, loops.share) == (100, 0.07)
    # By hand: (0.07 + z²/200 ± z sqrt(0.0651/100 + z²/40000)) / (1 + z²/100) with z = 1.96.
    assert (loops.low, loops.high) == pytest.approx((0.0343, 0.1375), abs=5e-5)
    title = "tiny: 7 of 100 answers loop, 7.00 % [3.43 %, 13.75 %] -> probe.json"
    assert report.title == title


def test_every_kind_of_failure_is_counted() -> None:
    said: list[Any] = [
        "Paris.",
        LOOP,
        {"content": "cut", "finish_reason": "length"},
        "",
        {"content": None, "reasoning_content": "Hm, or", "finish_reason": "length"},
        {"content": "<think>Hm, or", "finish_reason": "length"},
        {"content": "Rome.", "reasoning": "Hm."},
        [{"text": "in parts"}],
    ]
    write("eight.jsonl", [{"prompt": f"question {number}"} for number in range(8)])

    def script(question: dict[str, Any]) -> Any:
        found = said[number_of(question)]
        return {"content": found} if isinstance(found, list) else found

    with ScriptedServer(script) as server:
        report = probed(server.url, "eight.jsonl:8")
    assert counts(report) == {"loops": 1, "cut by length": 3, "empty": 1, "thinking unclosed": 2}
    kept = {record["prompt"]: record for record in answers()}
    assert kept["question 6"]["reasoning"] == "Hm."
    assert kept["question 7"]["completion"] == "in parts"


def test_calls_are_judged_where_a_record_brings_tools_and_only_there() -> None:
    good = {"function": {"name": "weather", "arguments": '{"at": "Rome"}'}}
    calls = [
        [good],
        [{"function": {"name": "weather", "arguments": '{"at": "Ro'}}],
        [{"function": {"name": "wether", "arguments": "{}"}}],
        [good, {"function": {"name": "weather", "arguments": {"at": "Rome"}}}],
        ["odd"],
    ]
    asked = [{"role": "user", "content": "question 0"}]
    past = [
        *({"role": "assistant", "content": "", "tool_calls": [good]},),
        {"role": "tool", "content": "rain"},
    ]
    records = [
        {"messages": [{"role": "user", "content": f"question {n}"}], "tools": TOOLS}
        for n in range(len(calls))
    ]
    write("calls.jsonl", [*records, {"messages": [*asked, *past]}])

    def script(question: dict[str, Any]) -> dict[str, Any]:
        if "tools" not in question:
            return {"content": '<tool_call>{"name": "weather"}</tool_call>'}
        assert question["tools"] == TOOLS
        return {"content": None, "tool_calls": calls[number_of(question)]}

    with ScriptedServer(script) as server:
        report = probed(server.url, "calls.jsonl:6")
        (resent,) = (each for each in server.questions if "tools" not in each)
    assert (failures(report)["bad tool calls"].count, counts(report).get("empty")) == (3, None)
    assert failures(report)["bad tool calls"].answers == 5
    # A past call goes out as it must: its arguments are text.
    assert resent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": "Rome"}'


def test_everything_that_decides_the_sampling_is_sent_and_the_last_answer_is_not() -> None:
    with ScriptedServer(loops_in_seven) as server:
        base = Sampling(temperature=0.7, repetition_penalty=1.1, max_tokens=99)
        probed(server.url, "chats.jsonl:2", base=base, seed=7)
    first, second = sorted(server.questions, key=lambda question: question["seed"])
    assert (first["seed"], second["seed"]) == (7, 8)
    assert [message["role"] for message in first["messages"]] == ["user"]
    del first["messages"]
    assert first == {
        "model": "tiny",
        "seed": 7,
        "stream": False,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "repeat_penalty": 1.1,
        "max_tokens": 99,
    }


# Comparing


def test_settings_are_counted_apart_and_compared_with_the_base() -> None:
    def script(question: dict[str, Any]) -> str:
        return "Well." if question["min_p"] else loops_in_seven(question)

    with ScriptedServer(script) as server:
        report = probed(server.url, others=[{"min_p": 0.05}, {"top_k": 20, "temperature": 1}])
    assert [each.name for each in report.settings] == [
        "base",
        "min_p=0.05",
        "top_k=20,temperature=1",
    ]
    assert [counts(report, n) for n in range(3)] == [{"loops": 7}, {}, {"loops": 7}]
    fewer, same = (failures(report, n)["loops"].to_base for n in (1, 2))
    assert fewer and fewer.verdict == "fewer" and fewer.difference == -0.07
    assert same and same.verdict == "undecided"
    # Of 7 % each, an interval of 2 points takes so many answers.
    assert same.answers_needed and 4900 < same.answers_needed < 5100


def test_the_original_is_asked_the_same_or_taken_from_its_own_probe() -> None:
    with (
        ScriptedServer(loops_in_seven) as server,
        ScriptedServer(lambda q: "Yes.", ("big",)) as big,
    ):
        both = probed(server.url, against=big.url, out="both.json")
        assert sorted(server.prompts()) == sorted(big.prompts())
        assert {each["model"] for each in big.questions} == {"big"}
        probed(big.url, out="big.json")
        again = probed(server.url, against="big.json", others=[{"min_p": 0.1}])
    # That probe had no such setting.
    assert failures(again, 1)["loops"].to_original is None
    assert len(answers("both.answers.jsonl")) == len(answers("both.original.answers.jsonl")) == 100
    assert both.original and (both.original.model, both.original.where) == ("big", big.url)
    for report in (both, again):
        loops = failures(report)["loops"].to_original
        assert loops and (loops.count, loops.answers, loops.verdict) == (0, 100, "more")
        # By Newcombe's formula out of the two intervals [3.43, 13.75] and [0, 3.70].
        assert (loops.low, loops.high) == pytest.approx((0.0186, 0.1375), abs=1e-4)


def test_nothing_is_said_to_be_the_same_unless_the_interval_is_narrow() -> None:
    with ScriptedServer(lambda q: "Yes.") as server, ScriptedServer(lambda q: "No.") as other:
        wide = probed(server.url, against=other.url)
        narrow = probed(server.url, against=other.url, detect=0.1, out="narrow.json")
    wide_loops, loops = (failures(each)["loops"].to_original for each in (wide, narrow))
    assert wide_loops and (wide_loops.verdict, wide_loops.answers_needed) == ("undecided", 381)
    assert loops and (loops.verdict, loops.answers_needed) == ("no difference", None)


def test_a_probe_of_other_prompts_or_sampling_is_no_original() -> None:
    with ScriptedServer(loops_in_seven) as server:
        probed(server.url, "other.jsonl:10", out="other.json")
        probed(server.url, "chats.jsonl:10", out="ten.json", base=Sampling(min_p=0.1))
        Path("no.json").write_text('{"settings": [{"sampling": 3}]}')
        asked = len(server.questions)
        for name, says in (
            ("other.json", "asked other prompts, or with another seed"),
            ("ten.json", "sampled otherwise: min_p 0.1, not 0; probe both"),
            ("no.json", "is no report of a probe"),
            ("nowhere.json", "cannot be read"),
        ):
            with pytest.raises(UsageError, match=says):
                probed(server.url, "chats.jsonl:10", against=name)
        with pytest.raises(UsageError, match="asked 10 questions, this command asks 100"):
            probed(server.url, against="ten.json")
        with pytest.raises(OutputError, match="is read by this command"):
            probed(server.url, "other.jsonl:10", against="other.json", out="other.json")
        assert len(server.questions) == asked
    assert not Path("probe.json").exists()


# What is kept


def test_the_answers_are_records_with_a_prompt_and_a_completion() -> None:
    with ScriptedServer(lambda q: "Grüße, 你好 \U0001f389\ud800\u2028!") as server:
        probed(server.url, "chats.jsonl:2,other.jsonl:1")
    chat, _, text = answers()
    assert chat["messages"][0]["role"] == "user" and "prompt" not in chat
    assert (text["prompt"][:5], "messages" in text) == ("text ", False)
    # Half a character is none; all others are kept.
    assert chat["completion"] == text["completion"] == "Grüße, 你好 \U0001f389\ufffd\u2028!"
    assert (chat["setting"], chat["index"], text["index"]) == ("base", 0, 2)
    assert text["source"].startswith("other.jsonl@sha256:")
    assert "Grüße" in Path("probe.answers.jsonl").read_text(encoding="utf-8")


def test_a_prompt_with_half_a_character_is_kept_as_it_is() -> None:
    Path("half.jsonl").write_text('{"text": "\\ud83d and more"}\n')
    with ScriptedServer(lambda q: "Yes.") as server:
        probed(server.url, "half.jsonl:1")
        assert server.prompts() == ["\ud83d and more"]
    assert [each["prompt"] for each in answers()] == server.prompts()


def test_the_same_command_asks_nothing_again_and_its_files_stay_the_same() -> None:
    with ScriptedServer(loops_in_seven) as server:
        first = probed(server.url, at_once=7)
        files = {path: path.read_bytes() for path in Path().glob("probe*")}
        again = probed(server.url, at_once=3)
        assert len(server.questions) == 100
    assert (first.written, again.written) == (True, False)
    assert (first.resumed, again.resumed) == (0, 100)
    assert {path: path.read_bytes() for path in Path().glob("probe*")} == files
    assert [each["index"] for each in answers()] == list(range(100))


def test_another_model_under_the_same_name_is_asked_with_restart() -> None:
    with ScriptedServer(loops_in_seven) as server:
        probed(server.url)
        server.script = lambda question: LOOP
        assert counts(probed(server.url)) == {"loops": 7}
        assert counts(probed(server.url, restart=True)) == {"loops": 100}
    assert {each["completion"] for each in answers()} == {LOOP}


def test_more_answers_go_on_from_those_that_are_there() -> None:
    with ScriptedServer(loops_in_seven) as server:
        probed(server.url, "other.jsonl:10")
        with pytest.raises(OutputError, match="replace another probe with --force"):
            probed(server.url, "other.jsonl:25")
        report = probed(server.url, "other.jsonl:25", force=True)
        assert len(server.questions) == 25
        assert (report.records, report.samples) == (10, 25)
        with pytest.raises(OutputError, match="holds 25 answers to questions that"):
            Path("probe.json").unlink()
            probed(server.url, "chats.jsonl:5")
        probed(server.url, "chats.jsonl:5", force=True)
    assert len(answers()) == 5


def test_of_a_killed_run_only_what_was_in_flight_is_asked_again(folder: Path) -> None:
    free, hold, answered = threading.Semaphore(30), threading.Event(), threading.Semaphore(0)

    def script(question: dict[str, Any]) -> str:
        if not free.acquire(blocking=False):
            answered.release()
            hold.wait(30)
        return loops_in_seven(question)

    with ScriptedServer(script) as server:
        words = ["probe", server.url, "--prompts", "chats.jsonl:100", "-o", "probe.json"]
        words += ["--parallel", "4"]
        command = [sys.executable, "-m", "shardsurgeon", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                reached = all(answered.acquire(timeout=60) for _ in range(4))
                kept = Path("probe.answers.jsonl").read_bytes().count(b"\n")
            finally:
                process.kill()
        assert reached
        assert (kept, len(server.questions)) == (30, 34)
        # As if the kill had come within a write.
        with Path("probe.answers.jsonl").open("ab") as file:
            file.write(b'{"id": "0123", "compl')
        hold.set()
        assert main(words) == 0
        assert len(server.questions) == 34 + 70
        in_flight = [text for text in server.prompts() if server.prompts().count(text) > 1]
    assert len(set(in_flight)) == 4
    report = json.loads(Path("probe.json").read_text())
    assert report["settings"][0]["failures"][0]["count"] == 7
    assert len(answers()) == 100


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_a_stopped_run_ends_soon_and_says_that_the_same_command_resumes() -> None:
    asked, over = threading.Semaphore(0), threading.Event()

    def script(question: dict[str, Any]) -> str:
        asked.release()
        over.wait(60)
        return "at last"

    with ScriptedServer(script) as server:
        words = ["probe", server.url, "--prompts", "other.jsonl:10", "-o", "probe.json", "-q"]
        command = [sys.executable, "-m", "shardsurgeon", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
            try:
                assert all(asked.acquire(timeout=60) for _ in range(10))
                run.send_signal(signal.SIGINT)
                _, said = run.communicate(timeout=20)
            finally:
                run.kill()
        over.set()
    assert (run.returncode, said) == (130, "shardsurgeon: stopped; the same command resumes\n")
    assert not list(Path().glob("probe*"))


def test_two_runs_do_not_add_to_the_same_answers() -> None:
    def script(question: dict[str, Any]) -> str:
        with pytest.raises(OutputError, match="added to by another run"):
            probed(server.url, "other.jsonl:1")
        return "Yes."

    with ScriptedServer(script) as server:
        assert failures(probed(server.url, "other.jsonl:1"))["empty"].answers == 1


@pytest.mark.parametrize("content", ["a text\n", '{"a": 1}\n', '{"id": "a", "completion": 3', "x"])
def test_a_file_that_is_no_answers_stays(content: str) -> None:
    Path("probe.answers.jsonl").write_text(content)
    with ScriptedServer(loops_in_seven) as server:
        if content.startswith('{"id"'):
            probed(server.url, "other.jsonl:1")
            return
        for force in (False, True):
            with pytest.raises(OutputError, match="line 1 is no answer that probe keeps"):
                probed(server.url, "other.jsonl:1", force=force)
    assert Path("probe.answers.jsonl").read_text() == content


# Servers that fail


def test_a_server_that_goes_leaves_its_answers_and_the_same_command_goes_on() -> None:
    free = threading.Semaphore(40)

    def script(question: dict[str, Any]) -> Any:
        return loops_in_seven(question) if free.acquire(blocking=False) else (503, {}, "text/html")

    with ScriptedServer(script) as server:
        with pytest.raises(NetworkError) as caught:
            probed(server.url, at_once=5)
        assert "503 Service Unavailable" in str(caught.value)
        kept = len(answers())
        assert caught.value.remedy == f"{kept} answers are kept, and the same command goes on"
        assert 35 <= kept <= 40
        assert not Path("probe.json").exists()
        free.release(100)
        assert counts(probed(server.url, at_once=5)) == {"loops": 7}


def test_questions_that_are_refused_are_counted_and_named_and_no_answers() -> None:
    def script(question: dict[str, Any]) -> Any:
        refused = {"object": "error", "message": "maximum context length is 8 tokens"}
        if number_of(question) == 50:
            return (500, {"error": {"message": "engine"}}, "application/json")
        return (400, refused) if number_of(question) > 97 else loops_in_seven(question)

    with ScriptedServer(lambda q: script(q)) as server:
        report = probed(server.url)
    (base,) = report.settings
    assert (base.answers, base.refused, failures(report)["loops"].answers) == (97, 3, 97)
    said = {each.record.rpartition(" ")[2]: each.said for each in report.refusals}
    assert said == {
        "50": "500 Internal Server Error, 3 times",
        "98": "400 Bad Request: maximum context length is 8 tokens",
        "99": "400 Bad Request: maximum context length is 8 tokens",
    }
    assert len(answers()) == 97


def test_a_server_that_refuses_everything_is_not_asked_to_the_end() -> None:
    with ScriptedServer(lambda q: (400, {"detail": "no chat template"})) as server:
        with pytest.raises(
            NetworkError, match=r"answers none of 20 questions \(400 Bad Request: no"
        ):
            probed(server.url, at_once=1)
        assert len(server.questions) == 20
        with pytest.raises(NetworkError, match="answers none of 3 questions"):
            probed(server.url, "other.jsonl:3")


def test_a_server_that_fails_at_everything_is_not_taken_for_one_that_refuses() -> None:
    free = threading.Semaphore(10)

    def script(question: dict[str, Any]) -> Any:
        return "Yes." if free.acquire(blocking=False) else (500, {})

    with ScriptedServer(script) as server, pytest.raises(NetworkError) as caught:
        probed(server.url, at_once=1)
    assert "answers 500 Internal Server Error to 5 questions in a row" in str(caught.value)


def test_a_server_that_is_slow_gets_one_line() -> None:
    over = threading.Event()

    def script(question: dict[str, Any]) -> str:
        over.wait(30)
        return "at last"

    with ScriptedServer(script) as server:
        begun = time.monotonic()
        with pytest.raises(NetworkError, match=r"2 tries in a row \(no answer within 0.2 s\)"):
            probed(server.url, "other.jsonl:2", seconds=0.2)
        assert time.monotonic() - begun < 25
        over.set()


def test_a_huge_answer_is_judged_and_one_without_an_end_is_refused() -> None:
    with ScriptedServer(lambda q: "so it goes on and on and " * 100_000) as server:
        assert counts(probed(server.url, "other.jsonl:1")) == {"loops": 1}
    says = pytest.raises(NetworkError, match="answers with more than 12,582,912 bytes")
    with ScriptedServer(lambda q: "x" * (13 << 20)) as server, says:
        probed(server.url, "other.jsonl:1", out="huge.json")


# What cannot be asked


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"prompts": "chats.jsonl:0"}, "--prompts: 'chats.jsonl:0' asks for no sample"),
        ({"prompts": "empty.jsonl:1"}, "empty.jsonl, record 0: its text is empty"),
        ({"prompts": "said.jsonl:1"}, "said.jsonl, record 0: holds nothing that a user says"),
        ({"prompts": "chats.jsonl:2", "field": "question"}, "has no field 'question'"),
        ({"out": "probe.txt"}, "probe.txt: does not end in .json"),
        ({"out": "no/probe.json"}, "there is no folder no"),
        ({"detect": 2}, "--detect: 2 is not between 0 and 1"),
        ({"at_once": 0}, "--parallel: 0 is not between 1 and 1024"),
        ({"seconds": 0}, "--timeout: 0 is not above 0"),
        ({"seed": -1}, "--seed: -1 is not between"),
        ({"others": [{"mirostat": 1}]}, "--sampling: 'mirostat' is no setting; choose temperature"),
        ({"others": [{"top_k": 1.5}]}, "--sampling: top_k is 1.5; give a whole number"),
        ({"others": [{"min_p": 2}]}, "--min-p: 2 cannot be; give between 0 and 1"),
        ({"others": [{"min_p": 0.0}]}, "--sampling: 'min_p=0' changes nothing, or is given twice"),
        ({"against_model": "a"}, "--against-model: is for a server, and --against names none"),
        ({"against_key_env": "A", "against": "a.json"}, "--against-key-env: is for a server"),
        ({"api_key_env": "NOT_SET"}, "--api-key-env: the variable NOT_SET is not set"),
        ({"served_model": "big"}, "--served-model: http://.* serves tiny, and no big"),
        (
            {"prompts": "other.jsonl:11", "base": Sampling(temperature=0)},
            "--samples: 11 answers to",
        ),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_asked(
    options: dict[str, Any], says: str
) -> None:
    write("empty.jsonl", [{"text": " "}])
    write("said.jsonl", [{"messages": [{"role": "assistant", "content": "I say"}]}])
    with ScriptedServer(loops_in_seven) as server:
        with pytest.raises(InputError, match=says):
            probed(server.url, **options)
        assert server.questions == []
    assert not list(Path().glob("probe*"))


def test_the_model_itself_is_no_original() -> None:
    says = pytest.raises(UsageError, match="names the server and the model that are probed")
    with ScriptedServer(loops_in_seven) as server, says:
        probed(server.url, against=server.url)


def test_a_server_of_several_models_is_asked_for_the_one_that_is_named() -> None:
    with ScriptedServer(loops_in_seven, ("tiny", "big")) as server:
        with pytest.raises(
            UsageError, match=r"serves 2 models \(tiny, big\); name it with --served"
        ):
            probed(server.url)
        probed(server.url, "other.jsonl:1", served_model="big")
        assert server.questions[0]["model"] == "big"
        probed(
            server.url,
            "other.jsonl:1",
            served_model="big",
            against=server.url,
            against_model="tiny",
            out="both.json",
        )
    # Both servers are asked at a time.
    assert sorted(asked["model"] for asked in server.questions[1:]) == ["big", "tiny"]


def test_a_server_that_lists_no_models_is_asked_for_the_one_that_is_named() -> None:
    with ScriptedServer(loops_in_seven, (404, {"detail": "Not Found"})) as server:
        with pytest.raises(UsageError, match="does not say which model it serves; name it with"):
            probed(server.url)
        assert probed(server.url, "other.jsonl:1", served_model="x").model == "x"


# The key


def test_a_key_goes_where_it_is_for_and_is_found_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScriptedServer(loops_in_seven) as server, ScriptedServer(lambda q: "Yes.") as other:
        words = ["probe", server.url, "--prompts", "other.jsonl:3", "--against", other.url]
        assert main([*words, "-o", "probe.json", "--api-key-env", "THE_KEY", "-v", "--json"]) == 0
        assert set(server.keys) == {f"Bearer {KEY}"} and set(other.keys) == {None}
        words += ["--against-key-env", "THE_KEY", "-o", "second.json"]
        assert main(words) == 0
        # Nobody has named one for the first server.
        assert server.keys[-1] is None and other.keys[-1] == f"Bearer {KEY}"
    printed = "".join(capsys.readouterr())
    assert KEY not in printed
    for path in Path().iterdir():
        assert KEY.encode() not in path.read_bytes(), path


def test_one_key_is_for_both_models_of_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    with ScriptedServer(loops_in_seven, ("a", "b")) as server:
        probed(
            server.url,
            "other.jsonl:1",
            served_model="a",
            against=server.url,
            against_model="b",
            api_key_env="THE_KEY",
        )
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_key_that_is_refused_echoed_or_typed_by_mistake_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("ODD", "two words")
    refusal = (401, {"error": {"message": f"Incorrect API key: {KEY}"}})
    lines = []
    for models, script, variable in (
        (refusal, loops_in_seven, "THE_KEY"),
        (refusal, loops_in_seven, None),
        (("tiny",), lambda q: f"Your key is {KEY}", "THE_KEY"),
        (("tiny",), loops_in_seven, KEY),
        (("tiny",), loops_in_seven, "ODD"),
        ((401, {"error": "no such key"}), loops_in_seven, "THE_KEY"),
        (("tiny",), lambda q: (403, {}), "THE_KEY"),
    ):
        with ScriptedServer(script, models) as server, pytest.raises(ShardSurgeonError) as caught:
            probed(server.url, "other.jsonl:1", api_key_env=variable)
        lines.append(str(caught.value).replace(server.url, "URL"))
    assert lines == [
        "URL: does not accept the key that it was sent (401 Unauthorized: Incorrect API key: ***); "
        "name the environment variable that holds its key, as in --api-key-env NAME",
        "URL: wants a key (401 Unauthorized: Incorrect API key: ***); name the environment "
        "variable that holds its key, as in --api-key-env NAME",
        "URL: holds the token or the login that its server was sent; do not trust that server; "
        "change the token",
        "--api-key-env: is not the name of an environment variable; put the key into one, and "
        "name it here",
        "--api-key-env: the variable ODD holds what no key is made of; export ODD first",
        "URL: does not accept the key that it was sent (401 Unauthorized: no such key); name the "
        "environment variable that holds its key, as in --api-key-env NAME",
        "URL: does not accept the key that it was sent (403 Forbidden); name the environment "
        "variable that holds its key, as in --api-key-env NAME",
    ]
    assert KEY not in "".join(lines)
    for path in Path().iterdir():
        assert KEY.encode() not in path.read_bytes(), path


def test_a_dataset_without_a_prompt_is_an_input_error() -> None:
    write("bad.jsonl", [{"id": 3}])
    with ScriptedServer(loops_in_seven) as server, pytest.raises(DatasetError, match="record 0"):
        probed(server.url, "bad.jsonl:1")
