"""Text of strangers (URIs, labels, messages of libraries) as it may go to a terminal."""

from __future__ import annotations

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
