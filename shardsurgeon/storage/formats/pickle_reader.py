"""A pickle interpreter that cannot run anything: opcodes in, plain values out.

Python's own unpickler imports whatever a file names and calls it, and cannot bound the memory
that a value takes. This one only stacks values: `torch_objects` has the list of names that a
pickle may use and what becomes of them, and everything else is refused. Every operation is
charged for the memory it takes before the value is made; a container that holds itself and
endless nesting are refused. The opcodes are those that torch.save writes with pickle protocols
1 to 5. https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeAlias

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.torch_objects import TorchObjects
from shardsurgeon.storage.limits import MAX_PICKLE_NBYTES

MAX_OPERATIONS = 1_000_000
MAX_DEPTH = 100
# The values of a pickle may take GROWTH bytes of memory for each of its bytes, which honest files
# stay well below, and FREE_NBYTES more, so that small files may be as verbose as they like.
GROWTH = 32
FREE_NBYTES = 4 * 2**20

_MAX_INTEGER_NBYTES = 9  # the integers of 64 bits, signed and unsigned
_DAMAGED = "the file is damaged: fetch it again"

_Scalar: TypeAlias = str | bytes | int | float | complex | None


def interpret(raw: bytes, objects: TorchObjects, where: str) -> object:
    """The value that the pickle `raw` describes.

    Containers come as dict, list, tuple, set and frozenset; dict keys and set members are
    scalars; no container holds itself and none nests deeper than MAX_DEPTH. Parts may be shared:
    a caller that visits a shared part every time it meets it may not come to an end. Raises
    ScoreError, naming `where`, for anything else.
    """
    if len(raw) > MAX_PICKLE_NBYTES:
        raise ScoreError(
            where,
            f"its pickle has {len(raw):,} bytes, at most {MAX_PICKLE_NBYTES:,} are read",
            "save the scores as tensors, not as lists of numbers",
        )
    return _Machine(raw, objects, where).run()


class _Machine:
    """The stack, the marks and the memo while a pickle is read."""

    def __init__(self, raw: bytes, objects: TorchObjects, where: str) -> None:
        self._raw = raw
        self._at = 0
        self._objects = objects
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
            if self._opcode not in _OPERATIONS:
                self._refuse_opcode()
            nbytes, operation = _OPERATIONS[self._opcode]
            self._charge(_PLACE_NBYTES + nbytes)
            operation(self)
        else:
            self._refuse(
                f"its pickle has more than {MAX_OPERATIONS:,} operations",
                "save the scores as tensors, not as lists of numbers",
            )
        if len(self._stack) != 1 or self._marks:
            self._refuse(f"its pickle ends with {len(self._stack)} values on the stack")
        self._height(self._stack[0], set(), {})
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

    def _height(self, value: object, around: set[int], heights: dict[int, int]) -> int:
        """How many containers deep a value is; 0 for a scalar or a tensor.

        Refuses loops, depth beyond MAX_DEPTH and what may not be part of a result. around: ids
        of the containers that the value lies in; heights: of the containers already seen, so
        that one that is shared is looked into once.
        """
        if not isinstance(value, dict | list | tuple):
            if not isinstance(value, _Scalar) and not isinstance(value, set | frozenset):
                self._objects.require_result(value)
            return 0
        if id(value) in around:
            self._refuse("a container in its pickle holds itself")
        height = heights.get(id(value))
        if len(around) + (height or 1) > MAX_DEPTH:
            self._refuse(f"its pickle nests more than {MAX_DEPTH} containers")
        if height is None:
            around.add(id(value))
            inner = value.values() if isinstance(value, dict) else value
            height = 1 + max((self._height(item, around, heights) for item in inner), default=0)
            around.remove(id(value))
            heights[id(value)] = height
        return height

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
            self._refuse("its pickle appends to something that is not a list")
        target.extend(values)
        self._push(target)

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _set_items(self, values: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(values) % 2:
            self._refuse("its pickle sets items of something that is not a dict")
        self._charge(_ITEM_NBYTES * len(values) // 2)
        for key, value in zip(self._keys(values[::2]), values[1::2], strict=True):
            target[key] = value
        self._push(target)

    def _add_items(self) -> None:
        values = self._pop_to_mark()
        target = self._pop()
        if not isinstance(target, set):
            self._refuse("its pickle adds to something that is not a set")
        self._charge(_ITEM_NBYTES * len(values))
        target.update(self._keys(values))
        self._push(target)

    def _frozen_set(self) -> None:
        values = self._pop_to_mark()
        self._charge(_ITEM_NBYTES * len(values))
        self._push(frozenset(self._keys(values)))

    def _keys(self, values: Iterable[object]) -> list[_Scalar]:
        """The values as keys. Tuples are refused: hashing nested ones could take forever."""
        keys: list[_Scalar] = []
        for value in values:
            if not isinstance(value, _Scalar):
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
        self._push(self._objects.named(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("its pickle names a global by something that is not a string")
        self._push(self._objects.named(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            self._refuse("its pickle calls with something that is not a tuple of arguments")
        for argument in arguments:  # calls copy them, and one that is stored can be copied often
            if isinstance(argument, str | bytes | list | tuple | dict | set | frozenset):
                self._charge(_ITEM_NBYTES * len(argument))
        self._push(self._objects.called(function, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        self._push(self._objects.given_state(target, state))

    # Refusals

    def _refuse_opcode(self) -> NoReturn:
        names = (op.name for op in pickletools.opcodes if ord(op.code) == self._opcode)
        name = next(names, None)
        known = f"opcode {name}" if name else f"unknown opcode 0x{self._opcode:02x}"
        self._refuse(
            f"its pickle uses {known} at byte {self._at - 1:,}, "
            "which no file of tensors needs and which is not carried out",
            "if you trust the file, load it with torch and torch.save only its tensors",
        )

    def _refuse(self, problem: str, remedy: str = _DAMAGED) -> NoReturn:
        raise ScoreError(self._where, problem, remedy)


# A place on the stack and in the container that the value moves to.
_PLACE_NBYTES = 16
# A place in a dict or a set, also for each item of an argument that a call may copy.
_ITEM_NBYTES = 100

_Operation: TypeAlias = Callable[[_Machine], object]


def _constant(value: object) -> _Operation:
    return lambda machine: machine._push(value)


def _number(form: str) -> _Operation:
    return lambda machine: machine._push(machine._number(form))


def _string(length_form: str) -> _Operation:
    return lambda machine: machine._push(machine._text(machine._counted(length_form)))


def _bytes(length_form: str) -> _Operation:
    return lambda machine: machine._push(machine._counted(length_form))


# By pickletools' names: the bytes that the value itself takes on a 64-bit machine, besides its
# place, and what is done. What a string takes for its characters GROWTH covers. EMPTY_LIST and the
# like make a new container each time: containers are filled in place.
_BY_NAME: dict[str, tuple[int, _Operation]] = {
    "PROTO": (0, _Machine._protocol),
    "FRAME": (0, lambda m: m._take(8)),
    "NONE": (0, _constant(None)),
    "NEWTRUE": (0, _constant(True)),
    "NEWFALSE": (0, _constant(False)),
    "BININT": (32, _number("<i")),
    "BININT1": (0, _number("<B")),
    "BININT2": (0, _number("<H")),
    "BINFLOAT": (24, _number(">d")),
    "LONG1": (40, lambda m: m._long("<B")),
    "LONG4": (40, lambda m: m._long("<i")),
    "INT": (40, _Machine._decimal),
    "LONG": (40, _Machine._decimal),
    "SHORT_BINUNICODE": (64, _string("<B")),
    "BINUNICODE": (64, _string("<I")),
    "BINUNICODE8": (64, _string("<Q")),
    "SHORT_BINBYTES": (40, _bytes("<B")),
    "BINBYTES": (40, _bytes("<I")),
    "BINBYTES8": (40, _bytes("<Q")),
    "BYTEARRAY8": (40, _bytes("<Q")),
    "MARK": (40, _Machine._mark),
    "EMPTY_TUPLE": (0, _constant(())),
    "TUPLE1": (56, lambda m: m._tuple(1)),
    "TUPLE2": (64, lambda m: m._tuple(2)),
    "TUPLE3": (72, lambda m: m._tuple(3)),
    "TUPLE": (56, lambda m: m._push(tuple(m._pop_to_mark()))),
    "EMPTY_LIST": (96, lambda m: m._push([])),
    "APPEND": (0, lambda m: m._extend([m._pop()])),
    "APPENDS": (0, lambda m: m._extend(m._pop_to_mark())),
    "EMPTY_DICT": (64, lambda m: m._push({})),
    "SETITEM": (128, _Machine._set_item),
    "SETITEMS": (128, lambda m: m._set_items(m._pop_to_mark())),
    "EMPTY_SET": (224, lambda m: m._push(set())),
    "ADDITEMS": (0, _Machine._add_items),
    "FROZENSET": (224, _Machine._frozen_set),
    "BINPUT": (_ITEM_NBYTES, lambda m: m._put(int(m._number("<B")))),
    "LONG_BINPUT": (_ITEM_NBYTES + 32, lambda m: m._put(int(m._number("<I")))),
    "MEMOIZE": (_ITEM_NBYTES + 32, lambda m: m._put(len(m._memo))),
    "BINGET": (0, lambda m: m._get(int(m._number("<B")))),
    "LONG_BINGET": (0, lambda m: m._get(int(m._number("<I")))),
    "GLOBAL": (200, _Machine._global),
    "STACK_GLOBAL": (200, _Machine._stack_global),
    "REDUCE": (600, _Machine._reduce),
    "BUILD": (0, _Machine._build),
    "BINPERSID": (200, lambda m: m._push(m._objects.persistent(m._pop()))),
}
_OPERATIONS = {ord(op.code): _BY_NAME[op.name] for op in pickletools.opcodes if op.name in _BY_NAME}
