"""Text of strangers (URIs, labels, messages of libraries) as it may go to a terminal."""

from __future__ import annotations

import contextlib
import sys
import unicodedata

# Controls, formatting (among it what reverses the direction of writing), halves of pairs; line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def plain(text: str) -> str:
    r"""Makes visible what would move the cursor, change colours, clear the screen or reorder the text; keeps lines and tabs.

    >>> print(plain("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in _HIDDEN:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode()


def legible_output() -> None:
    r"""Let stdout and stderr take any text: what their encoding does not have is written as ``\u65e5``, not raised as an error.

    Names of files and messages of libraries have characters that a terminal or a log in latin-1, cp1252 or ASCII does not.
    """
    for stream in (sys.stdout, sys.stderr):
        # A stream may be closed, or replaced by one that takes everything.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
