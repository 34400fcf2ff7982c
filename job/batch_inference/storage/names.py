r"""Escape names of local files and tar members, which are bytes, for columns, messages and URIs, which are text.

A name in UTF-8 stays as it is. A byte that is not part of UTF-8 becomes ``\xHH``, with two lowercase hexadecimal
digits. A backslash that begins such an escape becomes ``\x5c``, so that no two names have the same text. Keys of object
stores are text and never escaped.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

_LOOKS_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")


def escape_name(name: bytes) -> str:
    r"""Return the text of a name.

    >>> print(escape_name(b"caf\xe9.jpg"), escape_name(b"caf\\xe9.jpg"), escape_name("café.jpg".encode()))
    caf\xe9.jpg caf\x5cxe9.jpg café.jpg
    """
    text = name.decode("utf-8", "surrogateescape")
    if "\\x" in text:
        text = _LOOKS_ESCAPED.sub(r"\\x5c", text)
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unescape_name(text: str) -> bytes:
    r"""Return the name of a text; raise ValueError if the text cannot be one.

    >>> unescape_name(r"caf\xe9.jpg")
    b'caf\xe9.jpg'
    """
    name = text.encode("utf-8", "surrogateescape")
    return _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), name) if b"\\x" in name else name


def text_of_path(path: str) -> str:
    """Return the text of a path that a function of the operating system returned."""
    return path if path.isascii() and "\\x" not in path else escape_name(os.fsencode(path))


def path_of_text(text: str) -> str:
    """Return the path of a text, for functions of the operating system."""
    return text if text.isascii() and "\\x" not in text else os.fsdecode(unescape_name(text))


def canonical_name(text: str) -> str:
    r"""Return the canonical one of the texts of a name; raise ValueError if the text cannot be one.

    >>> canonical_name(r"caf\xc3\xa9.jpg")
    'café.jpg'
    """
    return escape_name(unescape_name(text)) if "\\x" in text or not is_utf8(text) else text


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; a command-line argument in another encoding cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def percent_decode(text: str) -> str | None:
    """Return a text with its percent escapes decoded, as in ``Path.as_uri()``; None if it has none.

    >>> percent_decode("a%20b%25.jpg"), percent_decode("100%.jpg")
    ('a b%.jpg', None)
    """
    return escape_name(unquote_to_bytes(unescape_name(text))) if _PERCENT.search(text) else None
