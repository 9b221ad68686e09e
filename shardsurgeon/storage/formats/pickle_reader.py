"""A pickle interpreter that cannot run anything: opcodes in, plain values out.

Python's own unpickler imports whatever a file names and calls it, and cannot bound the memory
that a value takes. This one only stacks values: what a global, a call or a persistent id means is
decided by a fixed list of names, and everything else is refused. Every operation is charged for
the memory it takes before the value is made; a container inside itself and endless nesting are
refused. The opcodes are those that torch.save writes with pickle protocols 1 to 5.
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeAlias

from shardsurgeon.errors import ScoreError

# The allowance: this many bytes for each of the pickle's, which honest files stay well below,
# and a start that lets small ones be as wordy as they like.
GROWTH = 32
FREE_NBYTES = 4 * 2**20

ITEM_NBYTES = 100

MAX_DEPTH = 100
_DAMAGED = "the file is damaged: fetch it again"

MAX_NBYTES = 16 * 2**20
MAX_OPERATIONS = 1_000_000
_MAX_INTEGER_NBYTES = 9  # the integers of 64 bits, signed and unsigned

_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}

Scalar: TypeAlias = str | bytes | int | float | complex | None

"""A place in a dict or a set, also for each item of an argument that a call may copy."""

# A place on the stack and in the container it moves to.
_PLACE_NBYTES = 16
# What the value itself takes on a 64-bit machine; the bytes that strings have in the pickle are
# covered by the allowance.
_MADE_NBYTES = {
    "BININT": 32,
    "BINFLOAT": 24,
    "LONG1": 40,
    "LONG4": 40,
    "INT": 40,
    "LONG": 40,
    "SHORT_BINUNICODE": 64,
    "BINUNICODE": 64,
    "BINUNICODE8": 64,
    "SHORT_BINBYTES": 40,
    "BINBYTES": 40,
    "BINBYTES8": 40,
    "BYTEARRAY8": 40,
    "MARK": 40,
    "TUPLE1": 56,
    "TUPLE2": 64,
    "TUPLE3": 72,
    "TUPLE": 56,
    "EMPTY_LIST": 96,
    "EMPTY_DICT": 64,
    "EMPTY_SET": 224,
    "FROZENSET": 224,
    "SETITEM": 128,
    "SETITEMS": 128,
    "BINPUT": ITEM_NBYTES,
    "LONG_BINPUT": ITEM_NBYTES + 32,
    "MEMOIZE": ITEM_NBYTES + 32,
    "GLOBAL": 200,
    "STACK_GLOBAL": 200,
    "REDUCE": 600,
    "BINPERSID": 200,
}

OPERATION_NBYTES = [0] * 256
"""By opcode."""

for _operation in pickletools.opcodes:
    OPERATION_NBYTES[ord(_operation.code)] = _PLACE_NBYTES + _MADE_NBYTES.get(_operation.name, 0)


def check_nesting(root: object, leaf: Callable[[object], None], where: str) -> None:
    """Raise ScoreError for loops and for depth beyond MAX_DEPTH; show `leaf` what is neither
    a container nor a plain scalar.

    Looks into each container once, however often it is shared.
    """
    heights: dict[int, int] = {}
    open_ids = {id(root)}
    path = [_Visit(root, _inner_containers(root, leaf))]
    while path:
        visit = path[-1]
        child = next(visit.inner, None)
        if child is None:
            path.pop()
            open_ids.remove(id(visit.container))
            heights[id(visit.container)] = visit.height
            if path:
                path[-1].height = max(path[-1].height, visit.height + 1)
            continue
        known = heights.get(id(child))
        if id(child) in open_ids:
            raise ScoreError(where, "a container in its pickle holds itself", _DAMAGED)
        if len(path) + (known or 1) > MAX_DEPTH:
            raise ScoreError(where, f"its pickle nests more than {MAX_DEPTH} containers", _DAMAGED)
        if known is None:
            open_ids.add(id(child))
            path.append(_Visit(child, _inner_containers(child, leaf)))
        else:
            visit.height = max(visit.height, known + 1)


@dataclass(slots=True)
class _Visit:
    """A container being looked into; height: floors found in it so far, itself included."""

    container: object
    inner: Iterator[object]
    height: int = 1


def _inner_containers(container: object, leaf: Callable[[object], None]) -> Iterator[object]:
    """The containers right inside; what is none is shown to `leaf`."""
    values: Iterable[object] = (container,)
    if isinstance(container, dict):
        values = container.values()
    elif isinstance(container, list | tuple):
        values = container
    for value in values:
        if isinstance(value, dict | list | tuple):
            yield value
        elif not isinstance(value, str | bytes | int | float | complex | set | frozenset | None):
            leaf(value)


class Meaning(Protocol):
    """What the words in a pickle stand for. Every method raises ScoreError for what it refuses."""

    def named(self, module: str, name: str) -> object:
        """What the global `module.name` becomes."""
        ...

    def called(self, function: object, arguments: tuple[object, ...]) -> object:
        """What calling `function`, a result of `named`, on `arguments` becomes."""
        ...

    def given_state(self, target: object, state: object) -> object:
        """What `target` becomes when the pickle sets its state."""
        ...

    def persistent(self, key: object) -> object:
        """What the persistent id `key` stands for."""
        ...

    def leaf(self, value: object) -> None:
        """Refuse a value made by the methods above that may not be part of the result."""
        ...


def interpret(raw: bytes, meaning: Meaning, where: str) -> object:
    """The value that the pickle `raw` describes.

    Containers come as dict, list, tuple, set and frozenset; dict keys and set members are
    scalars; no container holds itself and none nests deeper than nesting.MAX_DEPTH. Parts may be
    shared, so whoever walks the value must not follow it without bound. Raises ScoreError,
    naming `where`, for anything else.
    """
    if len(raw) > MAX_NBYTES:
        raise ScoreError(
            where,
            f"its pickle has {len(raw):,} bytes, at most {MAX_NBYTES:,} are read",
            "save the scores as tensors, not as lists of numbers",
        )
    machine = _Machine(raw, meaning, where)
    value = machine.run()
    check_nesting(value, meaning.leaf, where)
    return value


class _Machine:
    """The stack, the marks and the memo while a pickle is read."""

    def __init__(self, raw: bytes, meaning: Meaning, where: str) -> None:
        self._raw = raw
        self._at = 0
        self._meaning = meaning
        self._where = where
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._opcode = 0
        self._nbytes_left = GROWTH * len(raw) + FREE_NBYTES

    def run(self) -> object:
        """Read to STOP and return what is on the stack."""
        for _ in range(MAX_OPERATIONS):
            self._opcode = self._take(1)[0]
            if self._opcode == ord("."):
                break
            operation = _OPERATIONS.get(self._opcode)
            if operation is None:
                self._refuse_opcode()
            self._charge(OPERATION_NBYTES[self._opcode])
            operation(self)
        else:
            self._refuse(
                f"its pickle has more than {MAX_OPERATIONS:,} operations",
                "save the scores as tensors, not as lists of numbers",
            )
        if len(self._stack) != 1 or self._marks:
            self._refuse(f"its pickle ends with {len(self._stack)} values on the stack")
        return self._stack[0]

    def _charge(self, nbytes: int) -> None:
        """Take from the memory that the values may have."""
        self._nbytes_left -= nbytes
        if self._nbytes_left < 0:
            self._refuse(
                f"its pickle has {len(self._raw):,} bytes and its values would take more than "
                f"{GROWTH} times as much memory",
                "save the scores as tensors, not as lists of numbers",
            )

    # Reading the stream

    def _take(self, nbytes: int) -> bytes:
        end = self._at + nbytes
        if end > len(self._raw):
            self._refuse(
                f"its pickle breaks off after {len(self._raw):,} bytes, {end:,} are needed"
            )
        taken = self._raw[self._at : end]
        self._at = end
        return taken

    def _skip(self, nbytes: int) -> None:
        self._take(nbytes)

    def _number(self, form: str) -> int | float:
        value: int | float = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _counted(self, length_form: str) -> bytes:
        return self._take(int(self._number(length_form)))

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at)
        if end < 0:
            self._refuse("its pickle breaks off within a line")
        return self._text(self._take(end + 1 - self._at)[:-1])

    def _text(self, raw: bytes) -> str:
        try:
            # Python pickles lone surrogates this way.
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self._refuse("a string in its pickle is not UTF-8")

    # The stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            self._refuse("its pickle takes a value from an empty stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        if not self._marks:
            self._refuse("its pickle misses a mark")
        begin = self._marks.pop()
        values = self._stack[begin:]
        del self._stack[begin:]
        return values

    # Opcodes

    def _protocol(self) -> None:
        version = self._take(1)[0]
        if version > 5:
            self._refuse(
                f"its pickle is of protocol {version}, 5 is the highest known",
                "save it again with torch.save and its default protocol",
            )

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(values)))

    def _extend(self, values: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            self._refuse("its pickle appends to something that is no list")
        target.extend(values)
        self._push(target)

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _set_items(self, values: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(values) % 2:
            self._refuse("its pickle sets items of something that is no dict")
        self._charge(ITEM_NBYTES * len(values) // 2)
        for key, value in zip(self._keys(values[::2]), values[1::2], strict=True):
            target[key] = value
        self._push(target)

    def _add_items(self) -> None:
        values = self._pop_to_mark()
        target = self._pop()
        if not isinstance(target, set):
            self._refuse("its pickle adds to something that is no set")
        self._charge(ITEM_NBYTES * len(values))
        target.update(self._keys(values))
        self._push(target)

    def _frozen_set(self) -> None:
        values = self._pop_to_mark()
        self._charge(ITEM_NBYTES * len(values))
        self._push(frozenset(self._keys(values)))

    def _keys(self, values: Iterable[object]) -> list[Scalar]:
        """The values as keys. Hashing nested tuples could take forever, so they are none."""
        keys: list[Scalar] = []
        for value in values:
            if not (value is None or isinstance(value, str | bytes | int | float | complex)):
                self._refuse(
                    f"its pickle uses a {type(value).__name__} as key",
                    "use layer numbers or names as keys and save it again",
                )
            keys.append(value)
        return keys

    def _long(self, length_form: str) -> None:
        nbytes = int(self._number(length_form))
        if not 0 <= nbytes <= _MAX_INTEGER_NBYTES:
            self._refuse(f"its pickle holds an integer of {nbytes:,} bytes")
        self._push(int.from_bytes(self._take(nbytes), "little", signed=True))

    def _decimal(self) -> None:
        line = self._line()
        digits = line.removesuffix("L")
        if line in ("00", "01"):  # how protocol 1 spells False and True
            self._push(line == "01")
        elif digits.isascii() and digits.removeprefix("-").isdigit() and len(digits) <= 20:
            self._push(int(digits))
        else:
            self._refuse(f"its pickle holds the malformed integer {line[:40]!r}")

    def _put(self, number: int) -> None:
        value = self._pop()
        self._memo[number] = value
        self._push(value)

    def _get(self, number: int) -> None:
        if number not in self._memo:
            self._refuse(f"its pickle refers to value {number}, which it has not stored")
        self._push(self._memo[number])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._push(self._meaning.named(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("its pickle names a global by something that is no string")
        self._push(self._meaning.named(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            self._refuse("its pickle calls with something that is no tuple of arguments")
        for argument in arguments:  # calls copy them, and one that is stored can be copied often
            if isinstance(argument, str | bytes | list | tuple | dict | set | frozenset):
                self._charge(ITEM_NBYTES * len(argument))
        self._push(self._meaning.called(function, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        self._push(self._meaning.given_state(target, state))

    def _persistent(self) -> None:
        self._push(self._meaning.persistent(self._pop()))

    # Refusals

    def _refuse_opcode(self) -> NoReturn:
        name = _NAMES.get(self._opcode)
        known = f"opcode {name}" if name else f"unknown opcode 0x{self._opcode:02x}"
        self._refuse(
            f"its pickle uses {known} at byte {self._at - 1:,}, "
            "which no file of tensors needs and which is not carried out",
            "if you trust the file, load it with torch and torch.save only its tensors",
        )

    def _refuse(self, problem: str, remedy: str = _DAMAGED) -> NoReturn:
        raise ScoreError(self._where, problem, remedy)


_Operation: TypeAlias = Callable[[_Machine], None]


def _constant(value: object) -> _Operation:
    return lambda machine: machine._push(value)


def _number(form: str) -> _Operation:
    return lambda machine: machine._push(machine._number(form))


def _string(length_form: str) -> _Operation:
    return lambda machine: machine._push(machine._text(machine._counted(length_form)))


def _bytes(length_form: str) -> _Operation:
    return lambda machine: machine._push(machine._counted(length_form))


# By pickletools' names. EMPTY_… make a new value each time: containers are filled in place.
_BY_NAME: dict[str, _Operation] = {
    "PROTO": _Machine._protocol,
    "FRAME": lambda m: m._skip(8),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "BININT": _number("<i"),
    "BININT1": _number("<B"),
    "BININT2": _number("<H"),
    "BINFLOAT": _number(">d"),
    "LONG1": lambda m: m._long("<B"),
    "LONG4": lambda m: m._long("<i"),
    "INT": _Machine._decimal,
    "LONG": _Machine._decimal,
    "SHORT_BINUNICODE": _string("<B"),
    "BINUNICODE": _string("<I"),
    "BINUNICODE8": _string("<Q"),
    "SHORT_BINBYTES": _bytes("<B"),
    "BINBYTES": _bytes("<I"),
    "BINBYTES8": _bytes("<Q"),
    "BYTEARRAY8": _bytes("<Q"),
    "MARK": _Machine._mark,
    "EMPTY_TUPLE": _constant(()),
    "TUPLE1": lambda m: m._tuple(1),
    "TUPLE2": lambda m: m._tuple(2),
    "TUPLE3": lambda m: m._tuple(3),
    "TUPLE": lambda m: m._push(tuple(m._pop_to_mark())),
    "EMPTY_LIST": lambda m: m._push([]),
    "APPEND": lambda m: m._extend([m._pop()]),
    "APPENDS": lambda m: m._extend(m._pop_to_mark()),
    "EMPTY_DICT": lambda m: m._push({}),
    "SETITEM": _Machine._set_item,
    "SETITEMS": lambda m: m._set_items(m._pop_to_mark()),
    "EMPTY_SET": lambda m: m._push(set()),
    "ADDITEMS": _Machine._add_items,
    "FROZENSET": _Machine._frozen_set,
    "BINPUT": lambda m: m._put(int(m._number("<B"))),
    "LONG_BINPUT": lambda m: m._put(int(m._number("<I"))),
    "MEMOIZE": lambda m: m._put(len(m._memo)),
    "BINGET": lambda m: m._get(int(m._number("<B"))),
    "LONG_BINGET": lambda m: m._get(int(m._number("<I"))),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": lambda m: m._push(m._meaning.persistent(m._pop())),
}
_OPERATIONS: dict[int, _Operation] = {
    ord(op.code): _BY_NAME[op.name] for op in pickletools.opcodes if op.name in _BY_NAME
}
