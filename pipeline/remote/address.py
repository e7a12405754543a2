"""The place of a cache: a directory, or a URL in an object store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.config import show
from pipeline.errors import UsageError

SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class Address:
    """A prefix in an object store, such as `s3://bucket/caches/example`."""

    url: str
    """Without a slash at the end."""

    def __str__(self) -> str:
        return self.url


Place = Path | Address
"""Directory or address of a cache."""


def parse_place(text: str) -> Place:
    """Return the place that a command's option names: a path, `file://`, `s3://`, `gs://` or `az://`.

    Raises:
        UsageError: another scheme; a URL without a bucket, with credentials or with parameters.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return Path(text)
    if scheme == "file":
        if urlsplit(text).netloc not in ("", "localhost"):
            raise UsageError(f"{show(text)} names another host: expected file:///PATH")
        return Path(unquote(urlsplit(text).path))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{show(text)} has the scheme {scheme}://: expected a path, file://, {known}")
    bucket, _, folder = rest.partition("/")
    # Not shown: what stands there may be a secret.
    if "@" in rest or ":" in bucket or "?" in rest or "#" in rest:
        raise UsageError(
            f"a {scheme}:// URL of a cache has no credentials and no parameters: give these as the store's "
            f"environment variables, and {scheme}://BUCKET/FOLDER alone"
        )
    if not bucket or "//" in folder or ".." in folder.split("/"):
        raise UsageError(f"{show(text)} is no place for a cache: expected {scheme}://BUCKET/FOLDER")
    return Address(text.rstrip("/"))
