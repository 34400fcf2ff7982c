"""Other spellings of locations: Azure's own schemes, HTTPS addresses of object stores, pipes, and groups in braces."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from batch_inference.errors import UserError

#: Schemes of Hadoop's drivers for Azure, ``scheme://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH``.
AZURE_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
_AZURE_HOST = re.compile(r"([a-z0-9]+)\.(?:dfs|blob)\.core\.(?:windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)")
_S3_HOST = re.compile(
    r"(?:(.+)\.)?s3(?:[.-](?:dualstack\.)?([a-z]{2}(?:-[a-z]+)+-\d+)|-accelerate(?:\.dualstack)?)?\.amazonaws\.com(?:\.cn)?"
)
_GOOGLE_HOST = re.compile(r"(?:(.+)\.)?storage\.(?:googleapis|cloud\.google)\.com")
_MAX_EXPANDED = 100_000
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def azure_uri(uri: str) -> str:
    """Return the ``az://`` spelling of a URI that names its storage account.

    Raises:
        UserError: If the account is not the environment's, or the URI names none.
    """
    scheme, _, rest = uri.partition("://")
    authority, _, key = rest.partition("/")
    container, _, host = authority.rpartition("@")
    match = _AZURE_HOST.fullmatch(host.lower())
    if not match or not container or ":" in container:
        raise UserError(
            f"a {scheme}:// URI names {host or 'no host'}, which is not CONTAINER@ACCOUNT.dfs.core.windows.net",
            "Write az://CONTAINER/PATH, and set AZURE_STORAGE_ACCOUNT_NAME to the account.",
        )
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if account != match[1]:
        raise UserError(
            f"{uri} is in the storage account {match[1]}, and AZURE_STORAGE_ACCOUNT_NAME is {account or 'not set'}",
            f"Set AZURE_STORAGE_ACCOUNT_NAME={match[1]} with its credentials; az://{container}/{key} then means the same.",
        )
    return f"az://{container}/{key}"


def https_remedy(uri: str) -> str | None:
    """Return what to write instead of an HTTPS address of an object store; None for any other address."""
    try:
        parts = urlsplit(uri)
        host = (parts.hostname or "").lower()
    except ValueError:
        return None
    path = unquote(parts.path).lstrip("/")
    if match := _AZURE_HOST.fullmatch(host):
        return f"Write az://{path} and set AZURE_STORAGE_ACCOUNT_NAME={match[1]}."
    if match := _GOOGLE_HOST.fullmatch(host):
        return f"Write gs://{_in_bucket(match[1], path)}."
    if match := _S3_HOST.fullmatch(host):
        region = f" and set AWS_REGION={match[2]}" if match[2] else ""
        return f"Write s3://{_in_bucket(match[1], path)}{region}."
    return None


def _in_bucket(bucket: str | None, path: str) -> str:
    return f"{bucket}/{path}" if bucket else path


def pipe_remedy(text: str) -> str:
    """Return what to write instead of a WebDataset command that reads a file."""
    match = re.search(r"(?:s3|gs|gcs|az|abfss?|https?|file)://[^\s'\"|;]+", text)
    return (
        f"Write {match[0]} alone."
        if match
        else "Write the location of the file alone, such as s3://BUCKET/x-{000..099}.tar."
    )


# --- braces ---


def has_braces(text: str) -> bool:
    """Return whether a text has groups such as ``{000..099}`` or ``{a,b}``."""
    return any(_choices(group[1]) for group in _GROUP.finditer(text))


def expand_braces(text: str) -> list[str]:
    """Expand groups in braces into all their texts, in order; numbers keep their leading zeros.

    >>> expand_braces("x-{08..10}.{tar,TAR}")
    ['x-08.tar', 'x-08.TAR', 'x-09.tar', 'x-09.TAR', 'x-10.tar', 'x-10.TAR']

    Raises:
        UserError: If there are more than 100,000.
    """
    texts = [""]
    position = 0
    for group in _GROUP.finditer(text):
        choices = _choices(group[1])
        if not choices:
            continue
        if len(texts) * len(choices) > _MAX_EXPANDED:
            raise UserError(
                f"the braces of {text} stand for more than {_MAX_EXPANDED:,} names",
                "Write a glob such as *.tar instead.",
            )
        before = text[position : group.start()]
        texts = [f"{start}{before}{choice}" for start in texts for choice in choices]
        position = group.end()
    return [start + text[position:] for start in texts]


def _choices(group: str) -> range | list[str]:
    if match := _RANGE.fullmatch(group):
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= _MAX_EXPANDED:
            return range(_MAX_EXPANDED + 1)
        width = max(len(match[1]), len(match[2])) if "0" in (match[1][0], match[2][0]) else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [f"{number:0{width}d}" for number in numbers]
    return group.split(",") if "," in group else []
