"""What every function called from Python does about its arguments and its errors, and their types.

Arguments of a wrong type are a UsageError that names them, numbers of numpy become Python's, and
messages say `ratio=` where the command line says `--ratio`.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import (
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from shardsurgeon.errors import ShardSurgeonError, UsageError

AnyPath = str | PathLike[str]
RoundingName: TypeAlias = Literal["floor", "nearest", "ceil"]
MtpName: TypeAlias = Literal["router-norm", "last", "keep", "drop"]
AllocationName: TypeAlias = Literal["uniform", "global", "waterfill"]
ListsName: TypeAlias = Literal["kept", "dropped", "best-first", "worst-first"]


@runtime_checkable
class Array(Protocol):
    """What turns into an array of numpy: one itself, a tensor of torch."""

    def __array__(self) -> Any:
        """The array."""
        ...


KvDtypeName: TypeAlias = Literal["auto", "fp8"]

# Scores without a file: `{layer: numbers}`, `{layer: {metric: numbers}}`, or a row for each layer.
ScoreValues: TypeAlias = Mapping[Any, Any] | Array | Sequence[Any]


class PlanOptions(TypedDict, total=False):
    """What `plan` takes besides the ratio; each is explained there."""

    keep: int | None
    target_size: int | str | None
    fit: str | None
    gpus: str | None
    context: int | None
    sequences: int
    kv_dtype: KvDtypeName
    tensor_parallel: int | None
    expert_parallel: bool
    plan_file: AnyPath | None
    rounding: RoundingName | None
    multiple_of: int | None
    metric: str | None
    preserve_super_experts: bool
    mtp: MtpName
    allocate: AllocationName
    allow_nonuniform: bool
    lists: ListsName | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    sampling: Mapping[str, float] | None
    out: AnyPath | None
    max_shard_size: int | str | None
    family: AnyPath | None
    follow_links: bool
    evaluation: AnyPath | None


P = ParamSpec("P")
T = TypeVar("T")

# Options whose keyword has another name. Those of all the functions are added below: the error
# of one may be about an argument of another.
_SPELLED = {"-o": "out", "--plan": "plan_file"}
_KEYWORDS: dict[str, inspect.Parameter] = {}
_HINTS: list[Callable[[], dict[str, Any]]] = []
_OPTION = re.compile(r"(?<![\w-])(?:--[a-z][a-z-]*|-o)(?![\w-])")
# What may stand behind an option, and be its value.
_VALUE = re.compile(r"[ =]([^\s,;:()]+)")
# Commands to be typed in a shell stay as they are.
_SHELL = re.compile(r"(`(?:shardsurgeon|pip|hf) [^`]*`)")

_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number", str: "text"}
# What is wanted; of our own classes, by name, where one comes from.
_WANTED: Mapping[Any, str] = {
    **_KINDS,
    bool: "True or False",
    PathLike: "a path",
    Mapping: "a dict",
    Array: "an array",
    Callable: "a function",
    "Checkpoint": "what open_checkpoint returns",
    "Scores": "what read_scores returns",
    "Pruning": "what plan returns",
}


def as_text(path: AnyPath | None) -> str | None:
    """A path where a text is wanted, as `family` is, which may also say `auto`."""
    return None if path is None else fspath(path)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function for callers from Python; it raises UsageError for arguments of wrong
    types, and what it raises itself in Python's words.
    """
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        # What one function is given first may be an option of another.
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or name not in _KEYWORDS:
            _KEYWORDS[name] = parameter

    @functools.cache
    def hints() -> dict[str, Any]:
        # Not of what it returns, whose type may be imported for type checkers alone.
        named = {name: of.annotation for name, of in signature.parameters.items()}
        named = {name: hint for name, hint in named.items() if hint is not inspect.Parameter.empty}
        holder = types.SimpleNamespace(__annotations__=named)
        return get_type_hints(holder, function.__globals__)

    _HINTS.append(hints)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        try:
            for name, value in bound.arguments.items():
                if name in hints():
                    bound.arguments[name] = fitted(name, value, hints()[name])
            return function(*bound.args, **bound.kwargs)
        except ShardSurgeonError as error:
            # What -o says is `path` where that is what the function is given; so for --plan.
            others = {"-o": "path", "--plan": "plan_files"}
            own = {option: name for option, name in others.items() if name in signature.parameters}
            spelled = {**_SPELLED, **own}
            parts = (in_python(part, spelled) for part in (error.problem, error.remedy))
            error.reword(_where(error.where, spelled), *parts)
            raise

    return called


def fitted(name: str, value: Any, hint: Any) -> Any:
    """The value as the hint wants it. Raises UsageError, naming the argument, where it is none."""
    for kind in _alternatives(hint):
        fits, found = _fit(value, kind)
        if fits:
            return found
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if isinstance(value, str) and all(get_origin(kind) is Literal for kind in kinds):
        raise UsageError(name, f"{value!r} is none of {', '.join(_choices(hint))}")
    words = dict.fromkeys(_wanted(kind) for kind in kinds)
    if "a path" in words:
        words.pop("text", None)
    problem = "is None" if value is None else f"{_short(value)} is {_kind(value)}"
    raise UsageError(name, problem, f"give {' or '.join(words)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a hint lists."""
    literals = (kind for kind in _alternatives(hint) if get_origin(kind) is Literal)
    return tuple(choice for kind in literals for choice in get_args(kind))


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a kind, and the value as that kind has it."""
    origin = get_origin(kind)
    if kind is Any:
        return True, value
    if origin is Literal:
        return value in get_args(kind) if isinstance(value, str) else False, value
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        number = isinstance(value, wanted) and not isinstance(value, bool)
        return number, kind(value) if number else value
    if origin in (list, tuple, Sequence):
        return _fit_list(value, kind)
    if origin is Callable:
        return callable(value), value
    return isinstance(value, origin or kind), value


def _fit_list(value: Any, kind: Any) -> tuple[bool, Any]:
    shape: Any = getattr(value, "shape", None)
    if shape:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return False, value
    of = [each for each in get_args(kind) if each is not ...]
    fixed = get_origin(kind) is tuple and ... not in get_args(kind)
    if fixed and len(of) != len(value):
        return False, value
    items = []
    for number, item in enumerate(value):
        tries = (_fit(item, each) for each in _alternatives(of[number] if fixed else of[0]))
        found = next((found for fits, found in tries if fits), None)
        if found is None:
            return False, value
        items.append(found)
    return True, tuple(items) if get_origin(kind) is tuple else items


def _wanted(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if origin is tuple and ... not in get_args(kind):
        return f"a tuple of {len(get_args(kind))} numbers"
    if origin in (list, tuple, Sequence):
        return "a list"
    return _WANTED.get(origin) or _WANTED[origin.__name__]


def _kind(value: Any) -> str:
    return _KINDS.get(type(value)) or f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _where(where: str, spelled: Mapping[str, str]) -> str:
    """The place of an error: a file stays one, an option is a keyword's name."""
    if where == "SCORES":
        return "scores"
    return _keyword(where, spelled) or where if _OPTION.fullmatch(where) else where


def in_python(text: str, spelled: Mapping[str, str] = _SPELLED) -> str:
    """A message of the command line with keywords in place of its options.

    spelled: option → keyword, of those whose keyword has another name.
    """
    parts = _SHELL.split(text)
    return "".join(part if n % 2 else _worded(part, spelled) for n, part in enumerate(parts))


def _worded(text: str, spelled: Mapping[str, str]) -> str:
    out, cursor = [], 0
    for found in _OPTION.finditer(text):
        if found.start() < cursor or (name := _keyword(found[0], spelled)) is None:
            continue
        value, end = _value(name, found[0], text, found.end())
        out += [text[cursor : found.start()], f"{name}={value}"]
        cursor = end
    return re.sub(r"\bSCORES\b", "scores", "".join([*out, text[cursor:]]))


def _keyword(option: str, spelled: Mapping[str, str]) -> str | None:
    """The keyword that an option is; None where it is none of any function."""
    name = spelled.get(option) or option.removeprefix("--").replace("-", "_")
    names = (name, name.removeprefix("no_"))
    return next((keyword for keyword in names if keyword in _KEYWORDS), None)


def _value(name: str, option: str, text: str, end: int) -> tuple[str, int]:
    """What is written behind `name=`, and where the option and its value end in the text."""
    found = _VALUE.match(text, end)
    word = found[1].rstrip(".") if found else ""
    choices = {choice for hints in _HINTS for choice in _choices(hints().get(name))}
    # A word for a value, or a number; and what is more than a word of the sentence.
    if word and (re.fullmatch(r"[A-Z][A-Z_]+", word) or word.replace(".", "").isdigit()):
        return word, end + 1 + len(word)
    if word and (word in choices or re.search(r"[\d._/*]", word)):
        return f'"{word}"', end + 1 + len(word)
    if isinstance(_KEYWORDS[name].default, bool):
        return str(not option.startswith("--no-")), end
    return "", end
