"""One small change at a time: every mutant of a module's source, as text to put in its place.

Left alone is what no test should pin: docstrings, annotations, decorators, the words of messages
(f-strings, what is raised, variables named like words), `__repr__`, and code for type checkers.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
# A function and what is called instead with the same arguments.
CALLED = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "lcm": "gcd",
    "gcd": "lcm",
    "floor": "ceil",
    "ceil": "floor",
}
# A function and the one argument that is left of a call of it.
UNWRAPPED = {"sorted": "list", "reversed": "list", "abs": "", "set": "list", "frozenset": "list"}
EMPTY = {
    "int": "0",
    "float": "0.0",
    "str": '""',
    "bytes": 'b""',
    "list": "[]",
    "dict": "{}",
    "tuple": "()",
    "set": "set()",
    "frozenset": "frozenset()",
}
WORDS = {"problem", "problems", "remedy", "remedies", "message", "note", "said"}
SILENT = {"__repr__", "__str__"}


@dataclass(frozen=True)
class Mutant:
    """A change of one module.

    path: of the module below the root; function: which one it is in, "" outside of all; line: its
    number and, stripped, its text; before, after: what is changed, on one line; begin, end: the
    bytes that `code` replaces; lines: first and last of those that a test must reach to see it.
    """

    path: str
    function: str
    line: int
    text: str
    before: str
    after: str
    begin: int
    end: int
    code: str
    lines: tuple[int, int]
    repeated: int = 1

    @property
    def name(self) -> str:
        """What stays the same while other code of the module changes."""
        number = f" #{self.repeated}" if self.repeated > 1 else ""
        where = f"{self.path}::{self.function or 'module'}{number}"
        return f"{where} | {self.text} | {self.before} -> {self.after}"

    def applied(self, source: bytes) -> bytes:
        """The module with the change."""
        return source[: self.begin] + self.code.encode() + source[self.end :]

    def compiles(self, source: bytes) -> bool:
        """Whether the module is one with the change."""
        try:
            ast.parse(self.applied(source))
        except SyntaxError:
            return False
        return True

    def rank(self, seed: int) -> str:
        """Its place in the sample of a seed, whatever other mutants there are."""
        return hashlib.sha256(f"{seed} {self.name}".encode()).hexdigest()


def mutants(path: str, source: bytes) -> list[Mutant]:
    """Every mutant of a module, in the order of the source."""
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    for one in _Walk(path, source).mutants():
        seen[one.name] = seen.get(one.name, 0) + 1
        found.append(replace(one, repeated=seen[one.name]))
    return found


class _Walk:
    """Goes through the tree of one module."""

    def __init__(self, path: str, source: bytes) -> None:
        self._path = path
        self._source = source
        self._rows = source.splitlines(keepends=True)
        self._starts = [sum(map(len, self._rows[:row])) for row in range(len(self._rows) + 1)]

    def mutants(self) -> Iterator[Mutant]:
        yield from self._below(ast.parse(self._source), None, (), None, None)

    def _below(
        self,
        node: ast.AST,
        parent: ast.AST | None,
        names: tuple[str, ...],
        statement: ast.stmt | None,
        function: ast.FunctionDef | None,
    ) -> Iterator[Mutant]:
        if isinstance(node, ast.stmt):
            statement = node
        if statement is not None:
            for changed, code in _changes(node, parent, function):
                yield self._mutant(changed, code, names, statement)
        inner = names
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*names, node.name)
        if isinstance(node, ast.FunctionDef):
            function = node
        for child in _children(node):
            yield from self._below(child, node, inner, statement, function)

    def _mutant(
        self, node: ast.expr | ast.stmt, code: str, names: tuple[str, ...], statement: ast.stmt
    ) -> Mutant:
        begin = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if body else statement.end_lineno or 0
        return Mutant(
            path=self._path,
            function=".".join(names),
            line=node.lineno,
            text=self._rows[node.lineno - 1].decode().strip(),
            before=_short(self._source[begin:end].decode()),
            after=_short(code),
            begin=begin,
            end=end,
            code=f"({code})" if isinstance(node, ast.expr) else code,
            lines=(statement.lineno, max(last, statement.lineno)),
        )


def _short(code: str) -> str:
    one = " ".join(code.split())
    return one if len(one) <= 60 else one[:57] + "..."


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below in which changes are looked for."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.pattern):
        return
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if WORDS.intersection(t.id for t in targets if isinstance(t, ast.Name)):
            return
    if isinstance(node, ast.FunctionDef) and node.name in SILENT:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            children = value if isinstance(value, list) else [value]
            yield from (child for child in children if isinstance(child, ast.AST))


def _changes(
    node: ast.AST, parent: ast.AST | None, function: ast.FunctionDef | None
) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """(node, code to put in its place) of every change at this node."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                changed = deepcopy(node)
                changed.ops[place] = COMPARED[type(operator)]()
                yield node, ast.unparse(changed)
        case ast.BoolOp():
            changed = deepcopy(node)
            changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, ast.unparse(changed)
        case ast.UnaryOp(op=ast.Not()):
            yield node, ast.unparse(node.operand)
        case ast.BinOp() | ast.AugAssign() if type(node.op) in CALCULATED:
            if not _joins_text(node):
                changed = deepcopy(node)
                changed.op = CALCULATED[type(node.op)]()
                yield node, ast.unparse(changed)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
            yield node, str(value - 1)
        case ast.Call():
            yield from ((node, code) for code in _other_calls(node))
        case ast.Subscript(slice=ast.Slice() as cut):
            for end in ("lower", "upper"):
                if getattr(cut, end) is not None:
                    changed = deepcopy(node)
                    setattr(changed.slice, end, None)
                    yield node, ast.unparse(changed)
        case ast.comprehension():
            yield from ((test, "True") for test in node.ifs)
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()) | ast.Raise():
            # The one statement under an `if` goes with its condition.
            if not (isinstance(parent, ast.If) and parent.body == [node]):
                yield node, "pass"
        case ast.Continue() | ast.Break():
            yield node, "pass"
        case ast.Return() if function is not None:
            if (code := _other_result(node, function)) is not None:
                yield node, f"return {code}"
    if isinstance(node, ast.If | ast.IfExp):
        yield node.test, "True"
        yield node.test, "False"


def _joins_text(node: ast.BinOp | ast.AugAssign) -> bool:
    parts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(part, ast.JoinedStr)
        or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in parts
    )


def _other_calls(node: ast.Call) -> Iterator[str]:
    """What to call instead."""
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if name in CALLED and node.args:
        changed = deepcopy(node)
        if isinstance(changed.func, ast.Attribute):
            changed.func.attr = CALLED[name]
        else:
            changed.func = ast.Name(CALLED[name])
        yield ast.unparse(changed)
    if name == "lcm":
        yield f"math.prod([{', '.join(map(ast.unparse, node.args))}])"
    if isinstance(called, ast.Name) and name in UNWRAPPED and node.args:
        yield f"{UNWRAPPED[name]}({ast.unparse(node.args[0])})"


def _other_result(node: ast.Return, function: ast.FunctionDef) -> str | None:
    """What to return instead; None where it is returned already."""
    if node.value is None:
        return None
    value = ast.unparse(node.value)
    kind = ast.unparse(function.returns) if function.returns else ""
    if kind == "bool":
        # A constant is changed by itself.
        return None if isinstance(node.value, ast.Constant) else f"not ({value})"
    other = EMPTY.get(kind.split("[")[0], "None")
    return None if other == value else other
