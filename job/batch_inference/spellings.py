"""Other spellings of locations in object stores: Azure's own schemes, and HTTPS addresses."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from batch_inference.errors import UserError

#: Schemes of Hadoop's drivers, ``scheme://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH``.
AZURE_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
_AZURE_HOST = re.compile(r"([a-z0-9]+)\.(?:dfs|blob)\.core\.(?:windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)")
_S3_HOST = re.compile(
    r"(?:(.+)\.)?s3(?:[.-](?:dualstack\.)?([a-z]{2}(?:-[a-z]+)+-\d+)|-accelerate(?:\.dualstack)?)?\.amazonaws\.com(?:\.cn)?"
)
_GOOGLE_HOST = re.compile(r"(?:(.+)\.)?storage\.(?:googleapis|cloud\.google)\.com")


def azure(uri: str) -> str:
    """Return the ``az://`` spelling of a URI that names its storage account.

    Raises:
        UserError: If the account is not the one of the environment, or the URI does not name one.
    """
    scheme, _, rest = uri.partition("://")
    place, _, key = rest.partition("/")
    container, _, host = place.rpartition("@")
    known = _AZURE_HOST.fullmatch(host.lower())
    if not known or not container or ":" in container:
        raise UserError(
            f"a {scheme}:// URI names {host or 'no host'}, which is not CONTAINER@ACCOUNT.dfs.core.windows.net",
            "Write az://CONTAINER/PATH, and set AZURE_STORAGE_ACCOUNT_NAME to the account.",
        )
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if account != known[1]:
        raise UserError(
            f"{uri} is in the storage account {known[1]}, and AZURE_STORAGE_ACCOUNT_NAME is {account or 'not set'}",
            f"Set AZURE_STORAGE_ACCOUNT_NAME={known[1]} with its credentials; az://{container}/{key} then means the same.",
        )
    return f"az://{container}/{key}"


def of_https(uri: str) -> str | None:
    """Return what to write in place of an HTTPS address of an object store, None for any other address."""
    try:
        parts = urlsplit(uri)
        host = (parts.hostname or "").lower()
    except ValueError:
        return None
    path = unquote(parts.path).lstrip("/")
    if found := _AZURE_HOST.fullmatch(host):
        return f"Write az://{path} and set AZURE_STORAGE_ACCOUNT_NAME={found[1]}."
    if found := _GOOGLE_HOST.fullmatch(host):
        return f"Write gs://{_below(found[1], path)}."
    if found := _S3_HOST.fullmatch(host):
        region = f" and set AWS_REGION={found[2]}" if found[2] else ""
        return f"Write s3://{_below(found[1], path)}{region}."
    return None


def _below(bucket: str | None, path: str) -> str:
    return f"{bucket}/{path}" if bucket else path


def of_pipe(text: str) -> str:
    """Return what to write in place of a command of WebDataset's that reads a file."""
    found = re.search(r"(?:s3|gs|gcs|az|abfss?|https?|file)://[^\s'\"|;]+", text)
    return (
        f"Write {found[0]} alone."
        if found
        else "Write the location of the file alone, such as s3://BUCKET/x-{000..099}.tar."
    )


# --- braces ---

_MOST_EXPANDED = 100_000
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def has_braces(text: str) -> bool:
    """Return whether a text has groups such as ``{000..099}`` or ``{a,b}``."""
    return any(_choices(found[1]) for found in _GROUP.finditer(text))


def expanded(text: str) -> list[str]:
    """Return every text that groups in braces stand for, in order; numbers keep their zeros.

    >>> expanded("x-{08..10}.{tar,TAR}")
    ['x-08.tar', 'x-08.TAR', 'x-09.tar', 'x-09.TAR', 'x-10.tar', 'x-10.TAR']

    Raises:
        UserError: If that is more than 100,000.
    """
    out = [""]
    position = 0
    for found in _GROUP.finditer(text):
        choices = _choices(found[1])
        if not choices:
            continue
        if len(out) * len(choices) > _MOST_EXPANDED:
            raise UserError(
                f"the braces of {text} stand for more than {_MOST_EXPANDED:,} names",
                "Write a glob such as *.tar instead.",
            )
        before = text[position : found.start()]
        out = [f"{start}{before}{choice}" for start in out for choice in choices]
        position = found.end()
    return [start + text[position:] for start in out]


def _choices(group: str) -> range | list[str]:
    if found := _RANGE.fullmatch(group):
        first, last = int(found[1]), int(found[2])
        if abs(last - first) >= _MOST_EXPANDED:
            return range(_MOST_EXPANDED + 1)
        width = max(len(found[1]), len(found[2])) if "0" in (found[1][0], found[2][0]) else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [f"{number:0{width}d}" for number in numbers]
    return group.split(",") if "," in group else []
