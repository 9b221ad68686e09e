"""What an interrupted run left that this one need not do again.

`execution` asks once, before it begins. The journal says what was done; what is on the disk must
agree with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from shardsurgeon.execution.journal import Done
from shardsurgeon.execution.moves import Range, joined
from shardsurgeon.execution.surgeryplan import OutputShard
from shardsurgeon.execution.workplace import Workplace


@dataclass(frozen=True, slots=True)
class Leftovers:
    """By the shards' file names.

    whole: finished, size in bytes. sent: taken away, size in bytes. parts: the ranges that a
    download has brought, ascending, apart from one another.
    """

    whole: dict[str, int]
    sent: dict[str, int]
    parts: dict[str, list[Range]]

    @property
    def shards(self) -> int:
        """How many shards need no work but, perhaps, to be sent."""
        return len(self.whole) + len(self.sent)

    @property
    def nbytes(self) -> int:
        """How many bytes are done."""
        parts = (end - begin for ranges in self.parts.values() for begin, end in ranges)
        return sum(self.whole.values()) + sum(self.sent.values()) + sum(parts)


def find_leftovers(shards: Sequence[OutputShard], place: Workplace, done: Done) -> Leftovers:
    """What of these shards is done."""
    found = Leftovers({}, {}, {})
    for shard in shards:
        name, nbytes = shard.file, shard.nbytes
        written = _written(shard, done)
        if name in done.sent:
            found.sent[name] = nbytes
        # A kill may come between a file's name and the journal's line about it.
        elif (name in done.finished or written == [(0, nbytes)]) and place.has(
            name, nbytes, shard.header
        ):
            found.whole[name] = nbytes
        elif written and place.has_part(name, nbytes):
            found.parts[name] = written
    return found


def layout(shard: OutputShard) -> str:
    """Digest of the header: two shards of one run that share it have their tensors in one place."""
    return hashlib.sha256(shard.header).hexdigest()[:16]


def _written(shard: OutputShard, done: Done) -> list[Range]:
    part = done.parts.get(shard.file)
    return joined(part.ranges) if part and part.layout == layout(shard) else []
