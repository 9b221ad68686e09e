"""Who asks, and what they may see and change."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.hub import refusals
from tests.support.hub.contents import Repository


@dataclass(frozen=True)
class Account:
    """A user as a token shows them; a read token changes nothing anywhere."""

    name: str
    organizations: tuple[str, ...] = ()
    may_write: bool = True

    def owns(self, namespace: str) -> bool:
        """Whether repositories of this namespace are theirs."""
        return namespace == self.name or namespace in self.organizations


def require_sight(account: Account | None, repository: Repository | None) -> Repository:
    """The repository, unless it is missing or hidden from this account."""
    if repository is None or (repository.private and not _is_owner(account, repository)):
        raise refusals.repository_not_found(logged_in=account is not None)
    return repository


def require_files(account: Account | None, repository: Repository) -> None:
    """Refuse what lies behind a gate: the listing is public, the files are not."""
    accepted = account is not None and account.name in repository.accepted
    if repository.gated and not accepted and not _is_owner(account, repository):
        raise refusals.gated(repository.id, logged_in=account is not None)


def require_login(account: Account | None) -> Account:
    """The account; refuses a request without a token."""
    if account is None:
        raise refusals.login_needed()
    return account


def require_write_access(
    account: Account | None, repository: Repository, *, as_pull: bool = False
) -> None:
    """Refuse those who may not write here. Every write token may open a pull request."""
    account = require_login(account)
    if not account.may_write or not (as_pull or _is_owner(account, repository)):
        raise refusals.forbidden(
            "Forbidden: you must use a write token to upload to a repository."
            if not account.may_write
            else f"You don't have the rights to write to {repository.id}"
        )


def require_namespace(account: Account | None, namespace: str) -> Account:
    """Refuse who may not create repositories here."""
    account = require_login(account)
    if not account.may_write or not account.owns(namespace):
        raise refusals.forbidden(
            f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        )
    return account


def _is_owner(account: Account | None, repository: Repository) -> bool:
    return account is not None and account.owns(repository.id.split("/")[0])
