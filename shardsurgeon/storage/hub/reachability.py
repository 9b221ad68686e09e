"""Whether the Hub can be asked at all, found out within seconds, and work without asking it.

For libraries that talk to the Hub by themselves and try again for half a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from shardsurgeon.storage.connections import HTTP_ERROR, HTTP_LIBRARY
from shardsurgeon.storage.hub.errors import require_sound_settings

# How long the Hub may take to answer.
_ANSWER_SECONDS = 5.0
# After how many seconds a failed connection is tried once more.
_AGAIN_SECONDS = 1.0


def refusal_of_the_hub() -> str:
    """Why the Hub cannot be asked, or "" where it answers or where the user forbids asking it.

    Raises UsageError for settings that no request could be made with.
    """
    if constants.HF_HUB_OFFLINE:
        return ""
    require_sound_settings()
    for is_last in (False, True):
        try:
            # Any answer will do: this asks for nothing.
            get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
        except HTTP_ERROR as error:
            if is_last or isinstance(error, HTTP_LIBRARY.TimeoutException):
                reason = str(error) or type(error).__name__
                return f"{constants.ENDPOINT} cannot be reached ({reason})"
            time.sleep(_AGAIN_SECONDS)
        else:
            break
    return ""


@contextmanager
def hub_offline() -> Iterator[None]:
    """For the time of a `with`, as if the user forbade huggingface_hub to ask the Hub."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
