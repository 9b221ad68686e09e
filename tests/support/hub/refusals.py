"""What the Hub refuses, in the words and header codes by which huggingface_hub tells them apart."""

from __future__ import annotations


class Refusal(Exception):
    """An answer that refuses: status, X-Error-Code (or none), message, further headers."""

    def __init__(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def wrong_token() -> Refusal:
    return Refusal(401, None, "Invalid credentials in Authorization header")


def login_needed() -> Refusal:
    return Refusal(401, None, "Invalid username or password.")


def repository_not_found(*, logged_in: bool) -> Refusal:
    # Who is not logged in is not told whether the repository is private or missing.
    return Refusal(404 if logged_in else 401, "RepoNotFound", "Repository not found")


def gated(repository: str, *, logged_in: bool) -> Refusal:
    message = f"Access to model {repository} is restricted"
    if logged_in:
        message += (
            " and you are not in the authorized list. "
            f"Visit https://huggingface.co/{repository} to ask for access."
        )
        return Refusal(403, "GatedRepo", message)
    message += ". You must have access to it and be authenticated to access it. Please log in."
    return Refusal(401, "GatedRepo", message)


def forbidden(message: str) -> Refusal:
    return Refusal(403, None, message)


def revision_not_found(revision: str) -> Refusal:
    return Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def entry_not_found(path: str, commit: str | None = None) -> Refusal:
    headers = {"X-Repo-Commit": commit} if commit else {}
    return Refusal(404, "EntryNotFound", f"Entry not found: {path}", headers)


def outdated_parent() -> Refusal:
    return Refusal(412, None, "A commit has happened since. Please refresh and try again.")


def conflict(message: str) -> Refusal:
    return Refusal(409, None, message)


def bad_request(message: str) -> Refusal:
    return Refusal(400, None, message)
