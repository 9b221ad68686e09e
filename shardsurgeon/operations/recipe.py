"""A recipe: what to calibrate, plan, apply and push, as the tables of one TOML file.

    model = "/models/Kimi-K2.5"

    [calibrate]                      # a table for each command, its options as keys
    dataset = "chats.jsonl"
    out = "scores.pt"

    [apply]
    ratio = 0.65

    [push]
    repo-id = "me/Kimi-K2.5-REAP-65pct"

Paths are read from the recipe's folder. A step that names no scores takes those of the step
before, and `apply` without a selection takes the keep-lists that `plan` saved. The result keeps a
copy, with names in place of paths and the SHA-256 of what they named: run beside the same files,
with the same model, it gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardsurgeon.checkpoint.checkpoint import Checkpoint
from shardsurgeon.errors import InputError, UsageError, redacted
from shardsurgeon.storage.files import sha256_of
from shardsurgeon.storage.formats.index import CONFIG_NAME
from shardsurgeon.storage.formats.strict_toml import read_toml
from shardsurgeon.storage.limits import RECIPE
from shardsurgeon.storage.open import address_of

STEPS = ("calibrate", "plan", "apply", "push")
Options = dict[str, Any]

_DATASET = "dataset"
# Options that name a file or folder to read. Some may also be words, or names on the Hub.
_READ = (
    *(_DATASET, "scores", "plan", "evaluation", "extend", "tokenizer", "family", "model", "card"),
    "pruned",
)
_SELECTIONS = ("ratio", "keep", "target-size", "plan")
_OF_THE_COMMAND_LINE = ("json", "progress", "quiet", "verbose", "dry-run")
# What decides a result's bytes is kept with it; how it was made on one machine is not.
_NOT_KEPT = {
    "calibrate": ("memory", "activation-budget", "force", "restart", "model"),
    "plan": ("force", "model", "evaluation"),
    "apply": (
        *("model", "out", "workers", "verify", "restart", "push-to-hub", "stream-push"),
        *("disk-budget", "private", "revision", "create-pr", "card", "no-card", "view"),
    ),
}
_HEADING = (
    "# How this model was pruned. Beside the files that are named here, it is done again by\n"
    "#   shardsurgeon run recipe.toml --model MODEL\n"
)
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN = (str, int, float)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe says.

    path: the file; model: of all steps, None for the current folder; steps: the options of each
    command, by their long names without dashes, in the order of STEPS; sha256: of files that the
    steps name and of the model's config.json, by name, in hex.
    """

    path: Path
    model: str | None
    steps: Mapping[str, Options]
    sha256: Mapping[str, str]

    def with_words(self, model: str | None, out: str | None) -> Recipe:
        """With the model, and the place of the result, that the command line gives."""
        steps = dict(self.steps)
        if out is not None:
            if "apply" not in steps:
                raise UsageError("--out", f"{self.path} has no [apply]", "leave it out")
            # Where the user stands counts for what is typed.
            steps["apply"] = steps["apply"] | {"out": os.path.abspath(out)}
        return replace(self, model=self.model if model is None else model, steps=steps)

    def options(self, step: str) -> Options:
        """The options of a step, its files where they lie and what earlier steps give filled in."""
        options = {name: self._placed(name, value) for name, value in self.steps[step].items()}
        if self.model is not None and step != "push":
            options.setdefault("model", self._placed("model", self.model))
        if step in ("plan", "apply") and not {"scores", "plan"} & options.keys():
            options |= self._chosen_from(step, options)
        return options

    def _chosen_from(self, step: str, options: Options) -> Options:
        """The scores or keep-lists that the steps before leave to a step that names none."""
        plan = self.steps.get("plan", {})
        if step == "apply" and "out" in plan and not options.keys() & set(_SELECTIONS):
            return {"plan": self._placed("out", plan["out"])}
        for before in ("plan", "calibrate"):
            key = "out" if before == "calibrate" else "scores"
            if before != step and key in self.steps.get(before, {}):
                return {"scores": self._placed(key, self.steps[before][key])}
        return {}

    def _placed(self, name: str, value: Any) -> Any:
        """A value with paths as they are read from the current folder."""
        if not isinstance(value, str):
            return value
        if name == _DATASET:
            from shardsurgeon.layerwise.datasets import renamed

            return renamed(value, self._found)
        if name == "out":
            return str(Path(self.path.parent, value))
        return self._found(value) if name in _READ else value

    def _found(self, name: str) -> str:
        place = str(Path(self.path.parent, os.path.expanduser(name)))
        return place if os.path.exists(place) else name

    def steps_to_do(self) -> Iterator[str]:
        """The steps, in order, without those whose result lies here with the SHA-256 recorded."""
        names = list(self.steps)
        made = [names.index(name) for name in ("calibrate", "plan") if self._is_made(name)]
        yield from names[max(made, default=-1) + 1 :]

    def _is_made(self, step: str) -> bool:
        out = self.steps.get(step, {}).get("out")
        recorded = self.sha256.get(Path(out).name) if isinstance(out, str) else None
        if recorded is None:
            return False
        place = Path(self._placed("out", out))
        return place.is_file() and sha256_of(place) == recorded

    def require_recorded(self, step: str, made: Collection[str]) -> None:
        """Raise InputError where a file that a step reads is not the one that was recorded.

        made: paths of files that this very run has written.
        """
        for path, digest in self._files_read(self.options(step)):
            recorded = self.sha256.get(Path(path).name)
            if recorded is not None and path not in made and not recorded.startswith(digest):
                raise self._another(path, digest, recorded)

    def _another(self, path: str, digest: str, recorded: str) -> InputError:
        problem = f"has sha256 {digest[:12]}…, {self.path} was written for {recorded[:12]}…"
        return InputError(path, problem, "give it the file of that time, or leave [sha256] out")

    def _files_read(self, options: Options) -> Iterator[tuple[str, str]]:
        """(path, SHA-256) of the files that options name; of a folder of data, its first digits."""
        for name, value in options.items():
            if name == _DATASET:
                from shardsurgeon.layerwise.datasets import local_parts

                yield from local_parts(value)
            elif name in _READ and isinstance(value, str) and os.path.isfile(value):
                yield value, sha256_of(Path(value))

    def copy_for(
        self, checkpoint: Checkpoint, score_files: Sequence[tuple[str, str, str]]
    ) -> bytes:
        """The recipe as the result of its `apply` keeps it.

        score_files: as `execution.plan.Plan` has them. Raises InputError where the recipe was
        recorded for another model, UsageError where two files that it names have one name.
        """
        digest, recorded = checkpoint.config_sha256, self.sha256.get(CONFIG_NAME)
        if recorded not in (None, digest):
            raise self._another(f"{checkpoint.location}/{CONFIG_NAME}", digest, recorded or "")
        source = checkpoint.source
        tables: dict[str, Options] = {"": {"model": address_of(source)}}
        if source.local_path(CONFIG_NAME) is not None:
            tables[""]["model"] = source.name
        names = {path: name.rpartition("/")[2] for name, path, _ in score_files}
        digests = {CONFIG_NAME: digest}
        for step in self.steps:
            if step == "push" or (step == "plan" and "out" not in self.steps[step]):
                continue
            options = self.options(step)
            for path, sha256 in (*self._files_read(options), *_written(step, options)):
                name = _name(path, names)
                if digests.setdefault(name, sha256) != sha256:
                    problem = f"names two files that are called {name}"
                    raise UsageError(self.path, problem, "give one of them another name")
            tables[step] = {
                name: _named(name, value, names)
                for name, value in options.items()
                if name in self.steps[step] and name not in _NOT_KEPT[step]
            }
            if step == "calibrate" and (dtype := _dtype_picked(options)):
                tables[step]["dtype"] = dtype
        tables["sha256"] = {**self.sha256, **digests}
        return (_HEADING + _toml(tables)).encode()


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe. Raises UsageError, naming file and place, for what is none."""
    where = Path(path)
    document = read_toml(where, RECIPE, UsageError, "no recipe is so large")
    steps: dict[str, Options] = {}
    for name, table in document.items():
        if name not in (*STEPS, "model", "sha256"):
            problem = f"has a part '{name}', known are model, {', '.join(STEPS)} and sha256"
            raise UsageError(where, problem)
        if (name == "model") == isinstance(table, dict):
            raise UsageError(where, f"{name} is {'a table' if name == 'model' else 'no table'}")
    for step in STEPS:
        if step in document:
            steps[step] = _sound_options(where, step, document[step])
    if not steps:
        raise UsageError(where, "holds no step", f"write a table [{'], ['.join(STEPS)}]")
    model, sha256 = document.get("model"), document.get("sha256", {})
    if model is not None and not isinstance(model, str):
        raise UsageError(where, f"model is {model!r}, no text")
    if not all(isinstance(each, str) and len(each) >= 12 for each in sha256.values()):
        raise UsageError(where, "[sha256] holds something that is no SHA-256")
    _require_order(where, steps)
    return Recipe(where, model, steps, sha256)


def _sound_options(where: Path, step: str, options: Options) -> Options:
    for name, value in options.items():
        each = value if isinstance(value, list) else [value]
        if name in _OF_THE_COMMAND_LINE:
            remedy = f"give it to `shardsurgeon run` or to `shardsurgeon {step}`"
            raise UsageError(where, f"[{step}] {name} is of the command line", remedy)
        if not all(isinstance(one, _PLAIN) for one in each):
            problem = f"[{step}] {name} is neither a text nor a number, nor a list of those"
            raise UsageError(where, problem)
    return options


def _require_order(where: Path, steps: Mapping[str, Options]) -> None:
    """Raise UsageError where a step has nothing to work on."""
    sends = {"push-to-hub", "stream-push"} & steps.get("apply", {}).keys()
    if "push" in steps and sends:
        problem = f"[apply] {min(sends)} pushes, and so does [push]"
        raise UsageError(where, problem, "leave one of them out")
    if "push" in steps and "apply" not in steps and "pruned" not in steps["push"]:
        raise UsageError(where, "[push] has nothing to push", "add [apply], or say pruned = ")


def _written(step: str, options: Options) -> Iterator[tuple[str, str]]:
    """(path, SHA-256) of the file that a step before `apply` has made."""
    out = options.get("out")
    if step != "apply" and isinstance(out, str) and os.path.isfile(out):
        yield out, sha256_of(Path(out))


def _dtype_picked(calibrate: Options) -> str | None:
    """The dtype of a calibration that names none: another machine might pick another."""
    out = calibrate.get("out")
    if "dtype" in calibrate or not isinstance(out, str) or not os.path.isfile(out):
        return None
    from shardsurgeon.layerwise.calibration_file import find_calibration

    found = find_calibration(out)
    return found.dtypes[0] if found is not None and len(found.dtypes) == 1 else None


def _name(path: str, names: Mapping[str, str]) -> str:
    """What a file is called in the copy: as it lies in calibration/, if it does."""
    return names.get(os.path.abspath(path), Path(path).name)


def _named(option: str, value: Any, names: Mapping[str, str]) -> Any:
    """A value of the copy: names of files and folders in place of paths."""
    if not isinstance(value, str):
        return value
    if option == _DATASET:
        from shardsurgeon.layerwise.datasets import renamed

        return redacted(renamed(value, lambda part: _name(part, names) if _is_here(part) else part))
    if option == "out" or (option in _READ and _is_here(value)):
        return _name(value, names)
    return redacted(value)


def _is_here(name: str) -> bool:
    return os.path.exists(name)


def _toml(tables: Mapping[str, Options]) -> str:
    """TOML of tables of plain values; "" is the top."""
    parts = []
    for name, table in tables.items():
        lines = [f"[{name}]"] if name else []
        lines += [f"{_key(key)} = {_value(value)}" for key, value in table.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        # JSON escapes as TOML does, but for DEL; what is no text (in a name of a file) is marked.
        text = value.encode("utf-8", "backslashreplace").decode()
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
