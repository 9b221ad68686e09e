"""What the values of a pickle take in memory, counted before they are made.

One byte of a pickle can ask for an empty set of 216 bytes, five for a copy of a dict of any size.
pickles.py charges every operation its price and stops where the sum exceeds the allowance.
"""

from __future__ import annotations

import pickletools

# The allowance: this many bytes for each of the pickle's, which honest files stay well below,
# and a start that lets small ones be as wordy as they like.
GROWTH = 32
FREE_NBYTES = 4 * 2**20

ITEM_NBYTES = 100
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
