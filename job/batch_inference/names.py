r"""Names of local files and tar members are bytes; columns, messages and URIs hold text. One escape between the two, one-to-one.

A name that is UTF-8 stays as it is. A byte that is not part of UTF-8 becomes ``\xHH``, two lowercase hexadecimal digits. A backslash
that begins a text of that form becomes ``\x5c``, so that no two names share a text. Keys of object stores are text and never escaped.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

_LOOKS_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")


def escaped(name: bytes) -> str:
    r"""Return the text that stands for a name.

    >>> print(escaped(b"caf\xe9.jpg"), escaped(b"caf\\xe9.jpg"), escaped("café.jpg".encode()))
    caf\xe9.jpg caf\x5cxe9.jpg café.jpg
    """
    text = name.decode("utf-8", "surrogateescape")
    if "\\x" in text:
        text = _LOOKS_ESCAPED.sub(r"\\x5c", text)
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unescaped(text: str) -> bytes:
    r"""Return the name that a text stands for; raises ValueError where a text cannot be one.

    >>> unescaped(r"caf\xe9.jpg")
    b'caf\xe9.jpg'
    """
    name = text.encode("utf-8", "surrogateescape")
    return _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), name) if b"\\x" in name else name


def of_path(path: str) -> str:
    """Return the text for a path as the operating system's functions give it."""
    return path if path.isascii() and "\\x" not in path else escaped(os.fsencode(path))


def to_path(text: str) -> str:
    """Return the path that a text stands for, as the operating system's functions take it."""
    return text if text.isascii() and "\\x" not in text else os.fsdecode(unescaped(text))


def canonical(text: str) -> str:
    r"""Return the one spelling among texts that stand for the same name; raises ValueError where a text cannot be one.

    >>> canonical(r"caf\xc3\xa9.jpg")
    'café.jpg'
    """
    return escaped(unescaped(text)) if "\\x" in text or not is_text(text) else text


def is_text(text: str) -> bool:
    """Return whether Python took all of a text from valid UTF-8; an argument of another encoding is not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def percent_decoded(text: str) -> str | None:
    """Return a text with its percent escapes decoded, as in ``Path.as_uri()``; None if it has none.

    >>> percent_decoded("a%20b%25.jpg"), percent_decoded("100%.jpg")
    ('a b%.jpg', None)
    """
    return escaped(unquote_to_bytes(unescaped(text))) if _PERCENT.search(text) else None
