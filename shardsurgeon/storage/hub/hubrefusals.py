"""What the Hub answers when it says no, as one line with a remedy.

For `hub`, and for whoever publishes there. Nothing here ever holds a token: what is quoted is
what the server says about the request, not the request.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardsurgeon.errors import CheckpointError, InputError, UsageError
from shardsurgeon.storage.httpranges import status_line

LOG_IN = "log in with `hf auth login`"
_BAD_TOKEN = "Invalid credentials"
_PLAIN = re.compile(r"[\x21-\x7e]+")


def refusal(
    error: HfHubHTTPError, where: str, repo_id: str, revision: str | None = None
) -> InputError:
    """The error for an answer that no other try would change.

    where: the repository or the file that was asked for; revision: the one that was asked for.
    """
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        also = "" if get_token() else f", then {LOG_IN}"
        remedy = f"accept its conditions at {page}{also}"
        return CheckpointError(where, "is gated, and this login may not read it", remedy)
    if isinstance(error, RevisionNotFoundError):
        problem = f"there is no revision {revision or 'of this name'}"
        return CheckpointError(where, problem, "name a branch, a tag or a commit hash")
    if isinstance(error, DisabledRepoError):
        return CheckpointError(where, "is disabled by the Hub", "ask its owner")
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(where, "there is no such file", "check the repository")
    response = error.response
    if response.status_code == 401 and _BAD_TOKEN in response.headers.get("X-Error-Message", ""):
        problem = f"{constants.ENDPOINT} does not accept the token that it was given"
        return UsageError(where, problem, f"correct or unset HF_TOKEN, or {LOG_IN} again")
    if isinstance(error, RepositoryNotFoundError) or response.status_code == 401:
        return CheckpointError(where, *_unseen())
    if response.status_code == 404:
        problem = f"{constants.ENDPOINT} does not answer as a Hub does ({status_line(response)})"
        return CheckpointError(where, problem, "check HF_ENDPOINT")
    remedy = "check that the token may read it" if response.status_code == 403 else ""
    return CheckpointError(where, f"the Hub refuses it ({_words(error)})", remedy)


def require_sound_settings() -> None:
    """Raise UsageError for a token or an endpoint that no request could be made with."""
    token = get_token()
    if token is not None and not _PLAIN.fullmatch(token):
        problem = "the token holds characters that none has"
        raise UsageError("HF_TOKEN", problem, f"correct it, or {LOG_IN} again")
    address = urlsplit(constants.ENDPOINT)
    if address.scheme not in ("http", "https") or not address.hostname:
        problem = f"{constants.ENDPOINT!r} is no web address"
        raise UsageError("HF_ENDPOINT", problem, "write it like https://huggingface.co")


def _unseen() -> tuple[str, str]:
    """The Hub does not tell a missing repository from one that must not be seen."""
    seen = "this login may see" if get_token() else "can be seen without a login"
    problem = f"{constants.ENDPOINT} has no such model that {seen}"
    private = "log in with one that may" if get_token() else LOG_IN
    return problem, f"check the name; if it is private, {private} (`hf auth login`)"


def _words(error: HfHubHTTPError) -> str:
    line = status_line(error.response)
    words = (error.server_message or "").strip()
    return f"{line}: {words}" if words else line
