"""What a message tells the user to do can be done: every option it names is one of the command."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT
from tests.cli.test_options import WITH_MODEL, commands
from tests.cli.transcript import _SPOILT

PACKAGE = ROOT / "shardsurgeon"
OPTIONS = {" ".join(words): options | {"--help"} for words, options in commands()}
SCORES = [name for name in OPTIONS if name.startswith("scores ")]
MODELS = [" ".join(line[: 2 if line[0] == "scores" else 1]) for line in WITH_MODEL.values()]
# Whose messages the strings of a module are, where they do not name a command themselves. The
# longest prefix counts.
SPEAKERS = {
    "checkpoint/": [*MODELS, "push"],
    "checkpoint/open.py": MODELS,
    "checkpoint/sampling.py": ["apply", "probe"],
    "checkpoint/side_files.py": ["plan", "apply"],
    "checkpoint/transformers_model.py": ["verify"],
    "cli/apply.py": ["apply"],
    "cli/blend.py": ["scores blend"],
    "cli/calibrate.py": ["calibrate"],
    "cli/estimate.py": ["calibrate"],
    "cli/evaluate.py": ["evaluate"],
    "cli/fit.py": ["fit"],
    "cli/gpus.py": ["plan", "apply"],
    "cli/main.py": list(OPTIONS),
    "cli/options.py": ["plan", "apply"],
    "cli/plan.py": ["plan"],
    "cli/probe.py": ["probe"],
    "cli/scores.py": ["scores plot"],
    "execution/": ["apply"],
    "families/": [*MODELS, "push"],
    "layerwise/": ["calibrate"],
    "operations/evaluate.py": ["evaluate"],
    "operations/measured.py": ["evaluate"],
    "operations/asking.py": ["probe"],
    "operations/intervals.py": ["probe"],
    "operations/page.py": ["report"],
    "operations/page_content.py": ["report"],
    "operations/page_subject.py": ["report"],
    "operations/kept_answers.py": ["probe"],
    "operations/probe.py": ["probe"],
    "operations/probe_report.py": ["probe"],
    "operations/prompts.py": ["probe"],
    "operations/apply.py": ["apply"],
    "operations/materialize.py": ["materialize"],
    "operations/places.py": ["apply", "materialize"],
    "operations/prune.py": ["plan", "apply"],
    "operations/push.py": ["push", "apply"],
    "operations/push_files.py": ["push"],
    "operations/written.py": ["push"],
    "operations/recipe.py": ["run"],
    "operations/request.py": ["apply"],
    "operations/blend.py": ["scores blend"],
    "operations/scores.py": ["scores compare"],
    "operations/verify.py": ["apply"],
    "pruning/": ["plan", "apply"],
    "pruning/generation_config.py": ["apply"],
    "pruning/machines.py": ["fit", "plan"],
    "scores/blending.py": ["scores blend"],
    "scores/checks.py": ["plan", "apply"],
    "scores/files.py": ["scores convert"],
    "scores/rankings.py": ["plan", "apply"],
    "scores/table.py": ["plan", "apply", "scores show", "scores compare"],
    # No command but those that copy a model's files refuses links.
    "storage/source.py": ["plan", "apply", "verify", "push"],
    "storage/files.py": ["plan", "calibrate", *(n for n in SCORES if "--out" in OPTIONS[n])],
    "storage/completions.py": ["probe"],
    "storage/hub/errors.py": ["push", "apply"],
    "cli/layers.py": ["plan"],
    "cli/values.py": ["plan", "apply"],
    "cli/families.py": ["inspect", "plan", "apply"],
    "units.py": ["plan", "apply", "scores compare"],
    "storage/hub/repository.py": ["push", "apply"],
}
# Options of one function of a module whose other messages are everybody's.
NARROWER = {
    ("cli/gpus.py", "--gpus"): ["plan", "report"],
    ("operations/push.py", "--revision"): ["push", "apply"],
    ("operations/scores.py", "--seed"): ["scores random"],
    ("operations/scores.py", "--family"): ["scores show", "scores convert"],
    ("operations/scores.py", "--model"): ["scores show", "scores convert"],
    ("storage/files.py", "-o"): [name for name in OPTIONS if "--out" in OPTIONS[name]],
    ("storage/hub/repository.py", "--restart"): ["apply"],
}
# Command lines of a card, of a page and of another program, and spellings of options.
ELSEWHERE = {"operations/model_card.py", "operations/python_calls.py"}
ELSEWHERE |= {"operations/page_commands.py", "operations/serving.py", "cli/push.py"}
ELSEWHERE |= {"pruning/fit.py", "serving/pruned.py", "serving/vllm_plugin.py"}
# Options of another command, which no message names.
ELSEWHERE |= {"operations/push_view.py"}


def strings(tree: ast.AST) -> Iterator[str]:
    """The text of each string that is no docstring, an f-string as a whole."""
    whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in whole for part in ast.walk(node) if part is not node}
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(x.value) for x in node.values if isinstance(x, ast.Constant))
        elif isinstance(node, ast.Constant) and id(node) not in inside | alone:
            yield node.value if isinstance(node.value, str) else ""


def named(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])(?:--[a-z][a-z-]*[a-z]|-o)(?![\w-])", text)


def commands_named(text: str) -> list[str]:
    """The commands that a message names, as `apply`, (apply --x) or `scores merge --x`."""
    found = re.findall(r"(?:[`(]|shardsurgeon )((?:scores )?[a-z-]+)(?=[` ])", text)
    return [name for name in found if name in OPTIONS]


def speakers(module: str, option: str) -> list[str]:
    if (module, option) in NARROWER:
        return NARROWER[module, option]
    prefixes = [prefix for prefix in SPEAKERS if module.startswith(prefix)]
    assert prefixes, f"{module} names {option}: say in SPEAKERS which commands print it"
    return SPEAKERS[max(prefixes, key=len)]


def said() -> Iterator[tuple[str, str, str]]:
    """(module, message, option) of every option that a message of the package names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module not in ELSEWHERE:
            for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
                if " " in text or not module.startswith("cli/"):  # where options are declared
                    yield from ((module, text, option) for option in named(text))


def test_every_option_of_a_message_is_one_of_the_commands_that_print_it() -> None:
    found = list(said())
    assert len(found) > 100
    for module, text, option in found:
        for command in commands_named(text) or speakers(module, option):
            assert option in OPTIONS[command], f"{module}: `{command}` has no {option}: {text}"


@pytest.mark.parametrize("case", _SPOILT)
def test_what_is_said_of_a_broken_model_names_options_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", model)
    shutil.copy(model / "scores.pt", tmp_path / "scores.pt")
    _SPOILT[case](model)
    monkeypatch.chdir(tmp_path)
    for name, words in WITH_MODEL.items():
        if name not in ("calibrate", "evaluate"):  # which need torch
            command = MODELS[list(WITH_MODEL).index(name)]
            main([*words, "--model", "model"])
            line = capsys.readouterr().err
            assert set(named(line)) <= OPTIONS[command] | {"--model"}, line
