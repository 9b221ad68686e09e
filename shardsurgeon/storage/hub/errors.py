"""The Hub's answers, and the network's, as errors with a remedy: for reading and for writing.

The same status means different things to the two. No token gets into a message: quoted is what the
server says about a request, never the request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardsurgeon.errors import (
    CheckpointError,
    InputError,
    PublishError,
    ShardSurgeonError,
    UsageError,
    redacted,
)
from shardsurgeon.storage.connections import HTTP_ERROR, raise_if_passing, status_line
from shardsurgeon.storage.http import raise_if_hopeless
from shardsurgeon.storage.retry import RetryableError, RetryPolicy, retry

LOG_IN = "log in with `hf auth login`"
LOG_IN_TO_PUSH = f"{LOG_IN}, or set HF_TOKEN"
_AGAIN = "run the same command again: what has been uploaded is not uploaded twice"
# The statuses of a server that has not begun to do what it was asked for.
_UNDONE = (429, 503)
# huggingface_hub tries uploads again by itself, before we do.
RETRY_POLICY = RetryPolicy(tries=5)

# Of what a server says, so many characters are shown.
_MOST_WORDS = 200
# What huggingface_hub raises over an answer of another shape than it expects.
_SENSELESS = (ValueError, TypeError, AttributeError, LookupError, RecursionError, AssertionError)

_Answer = TypeVar("_Answer")

_BAD_TOKEN = "Invalid credentials"  # what the Hub says of a token that it does not know
_PLAIN = re.compile(r"[\x21-\x7e]+")


def require_sound_settings() -> None:
    """Raise UsageError for a token or an endpoint that no request could be made with."""
    token = get_token()
    if token is not None and not _PLAIN.fullmatch(token):
        problem = "the token holds characters that no token has"
        raise UsageError("HF_TOKEN", problem, f"correct it, or {LOG_IN} again")
    address = urlsplit(constants.ENDPOINT)
    if address.scheme not in ("http", "https") or not address.hostname:
        problem = f"{constants.ENDPOINT!r} is not a web address"
        raise UsageError("HF_ENDPOINT", problem, "write it like https://huggingface.co")


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what a push to `repo_id` raises into one of our errors.

    UsageError for what the user can correct (token, permission, names), PublishError for the rest.
    An exception that comes from neither the Hub nor the network is a bug and passes unchanged.
    """
    try:
        yield
    except ShardSurgeonError:
        raise
    except Exception as error:
        translated = _translated(error, repo_id)
        if translated is None:
            raise
        raise translated from error


def with_retries(call: Callable[[], _Answer], repo_id: str, *, repeatable: bool = True) -> _Answer:
    """The result of `call`, tried again while the server is busy or the connection breaks.

    repeatable: whether `call` may be done twice; where not, it is tried again only if the server
    says that nothing was done. Raises NetworkError where trying again did not help, and
    PublishError where the answer is of another shape than huggingface_hub expects.
    """

    def once() -> _Answer:
        try:
            return call()
        except Exception as error:
            _raise_if_ours(error, repeatable)
            _raise_if_passing(error, repeatable)
            raise_if_hopeless(error, urlsplit(constants.ENDPOINT).hostname or repo_id)
            if _is_senseless(error):
                problem = f"{constants.ENDPOINT} does not answer as a Hub does"
                told = f"{type(error).__name__}: {_last_line(error)}"
                raise PublishError(repo_id, f"{problem} ({told})", "check HF_ENDPOINT") from error
            raise

    return retry(once, repo_id, RETRY_POLICY)


def _raise_if_ours(error: Exception, repeatable: bool) -> None:
    """Raise the error of a guarded connection, also behind one of huggingface_hub's threads."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ShardSurgeonError):
            raise cause
        if isinstance(cause, RetryableError):
            # A server that names a wait has done nothing yet.
            if repeatable or cause.wait:
                raise cause
            raise _gave_up(cause, "the Hub") from error
        cause = cause.__cause__


def _is_senseless(error: Exception) -> bool:
    """Whether huggingface_hub stumbled over an answer; not what it raises on purpose."""
    meant = isinstance(error, HFValidationError) or re.search(r"README\.md|LFS", str(error))
    return isinstance(error, _SENSELESS) and not meant


def _raise_if_passing(error: Exception, repeatable: bool) -> None:
    """Raise RetryableError where another try may succeed."""
    response = _response(error)
    if response is None:
        if repeatable and _is_broken_connection(error):
            raise RetryableError(_last_line(error) or type(error).__name__) from error
    elif repeatable or response.status_code in _UNDONE:
        raise_if_passing(response)


def _response(error: BaseException | None) -> Any:
    """The server's answer behind an exception or behind what caused it, None for none."""
    for _ in range(5):
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__ if error is not None else None
    return None


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a connection broke, also behind an error of huggingface_hub's threads."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # The HTTP library's own errors, and the system's.
    if isinstance(error, HTTP_ERROR | ConnectionError | TimeoutError):
        return True
    # When one request fails, huggingface_hub closes the client that all of them share.
    closed = isinstance(error, RuntimeError) and "closed" in str(error)
    return closed or (error.__cause__ is not None and _is_broken_connection(error.__cause__))


def _translated(error: Exception, repo_id: str) -> ShardSurgeonError | None:
    if isinstance(error, LocalTokenNotFoundError):
        return UsageError(repo_id, "there is no Hugging Face token to push with", LOG_IN_TO_PUSH)
    if isinstance(error, OfflineModeIsEnabled):
        return UsageError("HF_HUB_OFFLINE", "is set, and pushing needs the network", "unset it")
    if isinstance(error, HFValidationError):
        return UsageError(repo_id, "is not a repository id", "write it like org/name")
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _translated(error.__cause__, repo_id) or _gave_up(error, repo_id)
    if isinstance(error, ValueError) and "README.md" in str(error):
        problem = f"the Hub does not take its metadata: {_last_line(error)}"
        return UsageError("README.md", problem, "correct the card, or push with --no-card")
    response = _response(error)
    if response is not None:
        return _refused_write(error, response.status_code, repo_id)
    if isinstance(error, OSError) and error.filename:
        return PublishError(str(error.filename), f"cannot be read ({error.strerror})", _AGAIN)
    # The answers of the LFS server come as ValueError; hf_xet has RuntimeErrors of its own.
    refused_by_lfs = isinstance(error, ValueError) and "LFS" in str(error)
    if refused_by_lfs or _is_broken_connection(error) or isinstance(error, RuntimeError | OSError):
        return _gave_up(error, repo_id)
    return None


def refused_read(
    error: HfHubHTTPError, where: str, repo_id: str, revision: str | None = None
) -> InputError:
    """The error for an answer to a reader that trying again would not change.

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


def _unseen() -> tuple[str, str]:
    """The Hub does not tell a missing repository from one that must not be seen."""
    seen = "this login may see" if get_token() else "can be seen without a login"
    problem = f"{constants.ENDPOINT} has no such model that {seen}"
    private = "log in with one that may" if get_token() else LOG_IN
    return problem, f"check the name; if it is private, {private} (`hf auth login`)"


def _words(error: HfHubHTTPError) -> str:
    line = status_line(error.response)
    words = _cut(error.server_message or "")
    return f"{line}: {words}" if words else line


def _refused_write(error: Exception, status: int, repo_id: str) -> ShardSurgeonError:
    """The error for an answer to a push."""
    said = _said(error)
    if isinstance(error, RevisionNotFoundError):
        return UsageError(repo_id, f"has no such revision{said}", "look at its branches")
    if isinstance(error, RepositoryNotFoundError):
        problem = f"is not there, or the token may not see it (HTTP {status})"
        return UsageError(repo_id, problem, "check the name and the token's permissions")
    if status == 401:
        return UsageError(repo_id, f"the Hub refused the token (HTTP 401{said})", LOG_IN_TO_PUSH)
    if status == 403:
        problem = f"the token may not write there (HTTP 403{said})"
        remedy = "use a token with write access, a repository of your own, or --create-pr"
        return UsageError(repo_id, problem, remedy)
    if status in (400, 404, 409, 422):
        return UsageError(repo_id, f"the Hub refused (HTTP {status}{said})", "see what it says")
    return PublishError(
        repo_id, f"the Hub did not answer as it should (HTTP {status}{said})", _AGAIN
    )


def _gave_up(error: Exception, repo_id: str) -> PublishError:
    what = _last_line(error) or type(error).__name__
    return PublishError(repo_id, f"the upload broke off ({what})", _AGAIN)


def _said(error: BaseException) -> str:
    """What the server says, cut to a readable length."""
    message = getattr(error, "server_message", None)
    if not message and isinstance(error.__cause__, Exception):
        return _said(error.__cause__)
    words = _cut(str(message or ""))
    return f": {words}" if words else ""


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(lines[-1]) if lines else ""


def _cut(words: str) -> str:
    """Words of a server, on one line and cut to a readable length; a token is not cut in two."""
    return redacted(" ".join(words.split()))[:_MOST_WORDS]
