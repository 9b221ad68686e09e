"""The result's generation_config.json, where the user asked for sampling settings in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardsurgeon.checkpoint.sampling import DO_SAMPLE, generation_members, token_ids
from shardsurgeon.errors import ConfigError
from shardsurgeon.storage.formats.json_edit import Document, Insert, Path

# What means nothing where nothing is drawn.
_OF_DRAWING = ("temperature", "top_p", "top_k", "min_p")


def with_sampling(
    raw: bytes | None, settings: Mapping[str, float], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], bytes]:
    """(the members that are written, the file with them).

    raw: the source's file, of which every byte stays but for these members; None where the result
    would have none, and gets one with the token ids of the source's config beside them. With a
    setting that needs it comes do_sample: true where the source says nothing of it, false with
    temperature 0, which transformers takes in no other way. Raises ConfigError, naming `where`,
    for a file that is no JSON object.
    """
    document = Document.parse(b"{}" if raw is None else raw, where)
    present = document.value
    if not isinstance(present, dict):
        remedy = "correct it, leave it behind with --exclude, or leave out --sampling"
        raise ConfigError(where, "is no JSON object, so it takes no sampling settings", remedy)
    members = generation_members(settings)
    greedy = members.get("temperature") == 0
    if greedy or (present.get(DO_SAMPLE) is None and not members.keys().isdisjoint(_OF_DRAWING)):
        members[DO_SAMPLE] = not greedy
    if raw is None:
        return members, (json.dumps(token_ids(config) | members, indent=2) + "\n").encode()
    changes: dict[Path, object] = {
        (key,): value if key in present else Insert(value) for key, value in members.items()
    }
    return members, document.edit(changes)
