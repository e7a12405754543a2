"""Objects under one address, through obstore (S3, Google Cloud Storage, Azure).

Credentials, regions and endpoints are the environment variables that obstore takes, such as
`AWS_ACCESS_KEY_ID` or `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import DSparkError
from pipeline.remote.address import Address
from pipeline.text import one_line

Result = TypeVar("Result")

# Bytes of one request: a broken connection costs no more than these again.
PART_BYTES = 8 * 2**20
# Requests at once. One stream of an object store is far slower than its line.
THREADS = 16
# Tries of a request, besides obstore's own for errors of the server, and the first wait between them.
TRIES, FIRST_WAIT_S = 4, 0.5
# obstore waits between its own tries from a tenth of a second to fifteen, all in all no longer than this.
RETRY_SECONDS = 30.0
# Codes and words of S3, Azure and Google Cloud Storage for it.
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")


class StoreError(DSparkError):
    """An object can't be read or written. The message has its URL and the store's reason."""


class MissingObjectError(StoreError):
    """There is no such object."""


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    name: str
    """Relative to the address."""
    bytes: int
    modified: datetime


class Objects:
    """The objects under an address. Names are relative to it. Safe to use from several threads.

    Raises:
        DSparkError: obstore is not installed, or does not take the address.
    """

    def __init__(self, address: Address):
        self.address = address
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise DSparkError(
                f"{address} needs the obstore package: pip install 'dspark-pipeline[remote]'"
            ) from None
        self._obstore = obstore
        try:
            # No client_options: they would hide those of the environment, such as a proxy.
            retry = {"retry_timeout": timedelta(seconds=RETRY_SECONDS)}
            self._store = from_url(address.url, retry_config=retry)
        except Exception as error:  # a kind of its own for every scheme
            raise DSparkError(f"{address} can't be used: {_reason(error)}") from None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="objects")

    def url(self, name: str) -> str:
        """Return an object's URL, for messages."""
        return f"{self.address}/{name}"

    def read(self, name: str) -> bytes:
        """Return a whole object, a small one.

        Raises:
            MissingObjectError: there is none of that name.
            StoreError: it can't be read.
        """
        return self._try("read", name, lambda: bytes(self._obstore.get(self._store, name).bytes()))

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], write: Callable[[int, Any], object]
    ) -> None:
        """Read byte ranges of an object in parts, several at once, and hand them over in any order.

        Args:
            ranges: first byte and end of each.
            write: called with the offset in the object and the bytes of every part, from several threads.

        Raises:
            MissingObjectError, StoreError: see `read`; a part is shorter than asked for.
        """
        parts = [
            (begin, min(begin + PART_BYTES, stop))
            for start, stop in ranges
            for begin in range(start, stop, PART_BYTES)
        ]

        def fetch(part: tuple[int, int]) -> None:
            write(part[0], self._try("read", name, partial(self._range, name, *part)))

        futures = [self._threads.submit(fetch, part) for part in parts]
        try:
            for future in futures:
                future.result()
        finally:  # nothing is written once this has returned
            for future in futures:
                future.cancel()
            wait(futures)

    def _range(self, name: str, start: int, stop: int) -> Any:
        data = self._obstore.get_range(self._store, name, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"got {len(data)} bytes from {start} on, expected {stop - start}")
        return data

    def write(self, name: str, data: bytes | Path, before: Callable[[], object] = lambda: None) -> str:
        """Write an object, from memory or from a file, over any of that name. Raises StoreError.

        Args:
            before: called before each try; a StoreError that it raises ends them.

        Returns:
            Its tag, as of `tag`; empty if the store does not say.
        """

        def put() -> Any:
            before()
            if isinstance(data, Path) and not data.exists():
                raise StoreError(f"{data} is gone, which was to become {self.url(name)}")
            return self._obstore.put(self._store, name, data)

        return self._try("written", name, put)["e_tag"] or ""

    def tag(self, name: str) -> str:
        """Return what the store calls an object's present bytes (its ETag); empty if it has no word for it.

        Raises:
            MissingObjectError: there is no object of that name.
            StoreError: it can't be asked.
        """
        return self._try("read", name, lambda: self._obstore.head(self._store, name))["e_tag"] or ""

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of that name; return whether the one that is there is ours.

        It is, too, if an earlier try wrote it and only its answer was lost; so `data` should be of this
        process alone.

        Raises:
            StoreError: it can't be written, or the store has no conditional writes.
        """
        from obstore.exceptions import AlreadyExistsError

        def put() -> bool:
            try:
                self._obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
            except NotImplementedError:
                raise self._unconditional() from None
            return True

        try:
            return self._try("written", name, put) or self.read(name) == data
        except MissingObjectError:  # just removed
            return False

    def require_conditional(self, name: str) -> None:
        """Check by an object of this name, removed again, that the store has conditional writes.

        Some accept the condition and write over what is there.

        Raises:
            StoreError: it has none.
        """
        self.create(name, b"1")
        if self.create(name, b"2"):
            raise self._unconditional()
        self.remove([name])

    def _unconditional(self) -> StoreError:
        return StoreError(
            f"{self.address} has no conditional writes, by which workers claim their shards: write to a "
            f"directory, then copy the cache by `dspark sync DIRECTORY {self.address}`"
        )

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """Yield the objects whose names begin with a folder's name. Raises StoreError."""
        pages = self._try("read", prefix, lambda: iter(self._obstore.list(self._store, prefix or None)))
        while True:
            page = self._try("read", prefix, lambda: next(pages, None))
            if page is None:
                return
            for entry in page:
                yield Listed(entry["path"], entry["size"], entry["last_modified"])

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; those that are missing are none the less. Raises StoreError."""
        if names:
            self._try("removed", names[0], lambda: self._obstore.delete(self._store, list(names)))

    def _try(self, verb: str, name: str, work: Callable[[], Result]) -> Result:
        """Do a request again after a wait, as long as another try may help."""
        from obstore import exceptions

        hopeless = (
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
            exceptions.NotSupportedError,
            exceptions.InvalidPathError,
        )
        for attempt in range(TRIES):
            try:
                return work()
            except StoreError:
                raise
            except FileNotFoundError as error:
                if verb == "written" or _NO_BUCKET.search(str(error)):
                    raise StoreError(
                        f"{self.address} is in a bucket that does not exist: create it, or check the address"
                    ) from None
                raise MissingObjectError(f"{self.url(name)} does not exist") from None
            except Exception as error:  # obstore's are of many kinds
                if attempt == TRIES - 1 or isinstance(error, hopeless):
                    raise StoreError(
                        f"{self.url(name)} can't be {verb} ({_reason(error)}): check the address, the "
                        "credentials and the connection, then run the same command again"
                    ) from None
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError


def _reason(error: BaseException) -> str:
    """Return the store's reason, without the parameters of URLs: some are signatures."""
    return one_line(re.sub(r"\?[^\s)]*", "", str(error).partition("Debug source:")[0]), 400)
