"""A model in an object store or any other place that fsspec has a filesystem for.

`s3://bucket/model`, `gs://…`, `memory://…`: listed by the filesystem, read by its byte ranges.
The filesystems retry by themselves; what they give up on is retried here. They wait by rules of
their own, so every call has a time limit here: a part that does not come within it is asked for
again in smaller ones, down to the least rate.

A file is compared with the listing by its size and, where it is listed again, by its stamp. An ETag
is the MD5 of the content in some stores and settings and nothing of the kind in others, so content
is not compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from shardsurgeon.errors import (
    CheckpointError,
    NetworkError,
    ShardSurgeonError,
    SourceReadError,
    UsageError,
    install,
    keep_secret,
    redacted,
)
from shardsurgeon.storage.formats.strict_json import is_text, is_whole_number
from shardsurgeon.storage.http import kept_words, parse_address, printable, secrets_of
from shardsurgeon.storage.retry import (
    RetryableError,
    RetryPolicy,
    Waits,
    retry,
    stream_pieces,
)
from shardsurgeon.storage.source import (
    CHUNK_NBYTES,
    Source,
    SourceFile,
    is_left_behind,
    require_inside,
    unusual,
)
from shardsurgeon.storage.threads import call_in_time

# Bytes that are asked of a filesystem at once; they pass through memory.
_PART_NBYTES = 8 << 20
# Of a store without an end only so many seconds' worth of a listing is waited for.
_LISTING_SECONDS = 60.0
# What filesystems call the value that changes with a file's content, the most reliable first.
_STAMPS = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "checksum"),
    *("LastModified", "last_modified", "mtime", "updated", "modified", "created"),
)
# Scheme → the extra of pyproject.toml that reads it.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_RETRY_POLICY = RetryPolicy()


class StoreSource(Source):
    """The files below one folder of a store. Safe to use from several threads.

    name: the folder's; location: the address without login and query.
    """

    is_remote = True

    def __init__(self, url: str, policy: RetryPolicy = _RETRY_POLICY) -> None:
        """url: the folder, or a safetensors file in it.

        Raises UsageError where no installed package knows such addresses. Nothing is asked yet.
        """
        parts = parse_address(url)
        self.location = printable(url).rstrip("/")
        self.name = parts.path.rpartition("/")[2] or parts.netloc or "model"
        self._policy, self._waits = policy, Waits(policy)
        self._part_nbytes = _PART_NBYTES
        for secret in secrets_of(url):
            keep_secret(secret)
        folder = url.rstrip("/")
        if folder.endswith(".safetensors"):
            folder = folder.rpartition("/")[0]
            self.location = self.location.rpartition("/")[0]
        self._system, root = _filesystem(folder, self.location)
        self._root = root.rstrip("/")

    def list(self) -> tuple[SourceFile, ...]:
        """Every file below the folder as it is now, sorted by name.

        The stamp is the etag, or whatever the store has in its place. Raises CheckpointError
        where there is nothing or access is refused, NetworkError where the store is not reached.
        """
        found = retry(self._found, self.location, self._policy.brief(), self._waits)
        odd: dict[str, str] = {}
        files = [
            self._describe(path, facts, odd)
            for path, facts in found.items()
            if not path.endswith("/")
        ]
        self.odd = odd
        kept = [file for file in files if file is not None]
        if not kept:
            problem = "there is no such folder, or it is empty"
            raise CheckpointError(self.location, problem, "give the folder that holds the model")
        return tuple(sorted(kept, key=lambda file: file.name))

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) of a file, in requests of 8 MiB, or less where that is slow.

        Raises SourceReadError where the file is missing or shorter, NetworkError where trying
        again did not help, CheckpointError where access is refused. That a file changed and is
        as long as before is found only by listing it again.
        """
        where = f"{self.location}/{name}"
        require_inside(name, self.location)

        @contextmanager
        def request(at: int) -> Iterator[Iterator[bytes]]:
            yield self._pieces(name, where, at, end)

        return stream_pieces(request, where, begin, end, self._policy, self._waits)

    def _pieces(self, name: str, where: str, begin: int, end: int) -> Iterator[bytes]:
        path, part_nbytes = f"{self._root}/{name}", self._part_nbytes
        for at in range(begin, end, part_nbytes):
            stop = min(at + part_nbytes, end)
            data = self._part(path, where, at, stop)
            for offset in range(0, len(data), CHUNK_NBYTES):
                yield data[offset : offset + CHUNK_NBYTES]
            if len(data) < stop - at:
                self._require_length(path, where, end)
                raise RetryableError(f"{len(data):,} of {stop - at:,} bytes came")

    def _part(self, path: str, where: str, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of a file, by one request; fewer where it ends before."""
        policy = self._policy
        call = partial(self._system.cat_file, path, start=begin, end=end)
        with _asking(where):
            try:
                data: bytes = call_in_time(call, policy.window)
            except TimeoutError as error:
                least = int(policy.least_rate * policy.window)
                most = policy.slow_windows if end - begin <= least else None
                self._part_nbytes = max((end - begin) // 8, least)
                raise RetryableError(str(error) or "timed out", most=most) from error
        return data

    def _require_length(self, path: str, where: str, end: int) -> None:
        """Raise SourceReadError where a file really ends before `end`."""
        with _asking(where):
            self._system.invalidate_cache()
            info = partial(self._system.info, path)
            nbytes = call_in_time(info, self._policy.window).get("size")
        if is_whole_number(nbytes) and nbytes < end:
            raise SourceReadError(where, f"ends at byte {nbytes:,}, byte {end:,} was expected")

    def _found(self) -> dict[str, dict[str, Any]]:
        """What the store lists, by path."""
        with _asking(self.location):
            self._system.invalidate_cache()
            find = partial(self._system.find, self._root, detail=True)
            try:
                found: dict[str, dict[str, Any]] = call_in_time(find, _LISTING_SECONDS)
            except FileNotFoundError:
                return {}  # some filesystems raise for a folder that is not there, some do not
            except TimeoutError as error:
                problem = f"could not be listed: {error}"
                remedy = "give the folder that holds the model, and nothing above it"
                raise NetworkError(self.location, problem, remedy) from error
            return found

    def _describe(self, path: str, facts: dict[str, Any], odd: dict[str, str]) -> SourceFile | None:
        """A listed file; None for what is not a file of the model. odd: is told of names that no
        file here can have."""
        name = path.removeprefix(self._root).removeprefix("/")
        nbytes = facts.get("size")
        if facts.get("type") != "file" or not name or is_left_behind(name):
            return None
        if ".." not in name.split("/") and (what := unusual(name)) is not None:
            odd[name] = what
            return None
        require_inside(name, self.location)
        if not is_text(name) or redacted(name) != name:
            problem = f"the store lists a name that no file has: {name!r}"
            raise CheckpointError(self.location, problem)
        if not is_whole_number(nbytes):
            raise CheckpointError(f"{self.location}/{name}", "the store does not say its size")
        stamps = (str(facts[key]).strip('"') for key in _STAMPS if facts.get(key))
        return SourceFile(name, nbytes, kept_words(next(stamps, "")))


def _filesystem(url: str, location: str) -> tuple[Any, str]:
    """The filesystem for an address, and the path of the address there. Raises UsageError."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        system, root = url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = install(extra) if extra else printable(str(error))
        raise UsageError(location, f"no package for {scheme}:// is installed", remedy) from error
    except ValueError as error:
        problem = f"{scheme}:// is not a known kind of address"
        raise UsageError(location, problem, "give a folder, org/name, or a URL") from error
    return system, str(root)


@contextmanager
def _asking(where: str) -> Iterator[None]:
    """Turn what a filesystem raises into our errors, or into RetryableError where that may help."""
    try:
        yield
    except (RetryableError, ShardSurgeonError):
        raise
    except FileNotFoundError as error:
        raise SourceReadError(where, "there is no such file") from error
    except PermissionError as error:
        raise _refused(where, error) from error
    except Exception as error:
        kind = type(error)
        if "Credential" in kind.__name__:
            raise _refused(where, error) from error
        # A builtin error other than OSError is no failure of the network: filesystems raise them
        # over an answer of another shape than they expect; or it is a bug here.
        if kind.__module__ == "builtins" and not isinstance(error, OSError):
            if isinstance(error, MemoryError) or not _is_foreign(error):
                raise
            problem = f"the store's answer makes no sense ({kind.__name__}: {error})"
            raise SourceReadError(where, printable(problem), "check the address") from error
        raise RetryableError(printable(str(error)) or kind.__name__) from error


def _is_foreign(error: BaseException) -> bool:
    """Whether an error was raised inside a library, and not by how it is called here."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return not str(raised_in).startswith("shardsurgeon.")


def _refused(where: str, error: Exception) -> CheckpointError:
    problem = f"the store refuses access ({printable(str(error)) or type(error).__name__})"
    return CheckpointError(where, problem, "check the login for it, such as AWS_PROFILE")
