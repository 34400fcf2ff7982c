"""Canonical URIs of objects and files, and their form for people."""

from __future__ import annotations

import os
import re
from pathlib import Path

from batch_inference.config import StorageConfig
from batch_inference.errors import UserError
from batch_inference.storage import names
from batch_inference.storage.names import is_utf8
from batch_inference.storage.spellings import AZURE_SCHEMES, azure_uri, https_remedy, pipe_remedy

SCHEMES = ("file", "s3", "gs", "az")
WILDCARDS = re.compile(r"[*?\[]")
# Variables of the endpoint if storage.endpoint_url is not set; one for each store, for jobs that use several.
_ENDPOINT_VARIABLES = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
# In presigned URLs of S3 and GCS and in URLs with a SAS of Azure, which open the object for everyone who has them.
_SIGNATURE = re.compile(r"[?&](?:x-amz-signature|x-amz-security-token|x-goog-signature|sig)=", re.IGNORECASE)
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az"}


def canonical_uri(uri: str) -> str:
    """Return the one spelling of a location, with its scheme.

    A local path becomes ``file:///absolute/path``. Names stay as they are and are never percent-encoded; bytes of a
    local name that are not UTF-8 are escaped (:mod:`names`).

    >>> canonical_uri("s3a://bucket/a.jpg")
    's3://bucket/a.jpg'

    Raises:
        UserError: For a scheme that is not one of file, s3, gs, az.
    """
    scheme, sign, rest = uri.partition("://")
    if not sign:
        return _canonical_path(uri)
    scheme = scheme.lower()
    if scheme in AZURE_SCHEMES and "@" in rest.partition("/")[0]:
        return azure_uri(uri)
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in SCHEMES:
        if scheme.startswith("pipe:"):
            raise UserError(f"{uri} is a command, and commands are not run", pipe_remedy(uri))
        # The message leaves it out, because messages are logged.
        shown = uri.partition("?")[0] + "?…" if _SIGNATURE.search(uri) else uri
        raise UserError(
            f"{shown} has the scheme {scheme}://, which is not supported",
            https_remedy(uri) or "Use a local path or one of " + ", ".join(s + "://" for s in SCHEMES) + ".",
        )
    bucket = rest.partition("/")[0]
    # The message leaves it out, because messages are logged.
    if scheme != "file" and ":" in bucket and "@" in bucket:
        raise UserError(
            f"a {scheme}:// URI has credentials before its bucket {bucket.rpartition('@')[2]}",
            "Give them in the environment; a URI is stored with the job and in each row.",
        )
    # Runs for each input. Hardly any has a "=", and looking for it takes a tenth of the pattern's time.
    if scheme != "file" and "=" in rest and _SIGNATURE.search(rest):
        raise UserError(
            f"a {scheme}:// URI of {bucket} has a signature behind its name",
            "Name the object alone, and give credentials in the environment; a URI is stored with the job and in each row.",
        )
    if scheme == "file":
        return _canonical_file(uri, rest)
    if not rest.partition("/")[0]:
        raise UserError(f"{uri} names no bucket", f"Write {scheme}://BUCKET/PATH.")
    if not is_utf8(rest):
        raise UserError(f"{uri} is not UTF-8, as names in object stores are", "Correct the location.")
    return f"{scheme}://{rest}"


def _canonical_file(uri: str, rest: str) -> str:
    if rest[:10].lower() == "localhost/":
        rest = rest[9:]
    if not rest.startswith("/"):
        raise UserError(f"{uri} is not an absolute file URI", f"Write file:///{rest} or a plain path.")
    if "\\x" not in rest and rest.isascii():
        return f"file://{rest}"
    try:
        return f"file://{names.canonical_name(rest)}"
    except ValueError:
        raise UserError(f"{uri!a} holds characters that no file name can have", "Correct the location.") from None


def _canonical_path(path: str) -> str:
    if path[:6].lower() == "file:/":
        return canonical_uri(f"file://{path[5:]}")
    if path.startswith("pipe:") and not os.path.lexists(path):
        raise UserError(f"{path} is a command, and commands are not run", pipe_remedy(path))
    try:
        absolute = str(Path(path).expanduser().absolute())
        # The path as it was typed, unless only its escape, as messages and tables show it, leads to a file.
        if "\\x" in absolute and not os.path.lexists(absolute) and os.path.lexists(names.path_of_text(absolute)):
            return f"file://{names.canonical_name(absolute)}"
        return f"file://{names.text_of_path(absolute)}"
    except RuntimeError:
        raise UserError(f"{path} begins with the home folder of an unknown user", "Write its path.") from None
    except ValueError:
        raise UserError(f"{path!a} holds characters that no file name can have", "Correct the location.") from None


def is_local(uri: str) -> bool:
    """Return whether a canonical URI is on the local disk."""
    return uri.startswith("file://")


def local_path(uri: str) -> str:
    """Return the path of a canonical ``file://`` URI, for functions of the operating system."""
    return names.path_of_text(uri[len("file://") :])


def is_file(uri: str) -> bool:
    """Return whether a canonical URI is a file on the local disk."""
    return is_local(uri) and Path(local_path(uri)).is_file()


def display_uri(uri: str) -> str:
    """Return a location as a person would type it, without the scheme if it is local."""
    return uri[len("file://") :] if is_local(uri) else uri


def split_bucket(uri: str) -> tuple[str, str]:
    """Split a canonical URI into ``scheme://bucket`` and the key below it."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return "file://", rest.lstrip("/")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def endpoint_of(scheme: str, storage: StorageConfig) -> str | None:
    """Return the URL of a store that is not the scheme's own; None for the scheme's own."""
    return storage.endpoint_url or os.environ.get(_ENDPOINT_VARIABLES.get(scheme, ""))
