"""Text for people: untrusted text made safe to print, and numbers, times and counts in one format."""

from __future__ import annotations

import contextlib
import re
import sys
import unicodedata
from datetime import datetime, timezone
from typing import Any

from markupsafe import Markup

#: Stands where there is no number.
NO_NUMBER = "\N{EN DASH}"

# Controls, formatting (including what reverses the writing direction), surrogates, line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SECRET_KEY = re.compile(
    r"passw|secret|token|credential|api_?key|access_?key|private_?key|authorization", re.IGNORECASE
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*@")
_SIGNED_PARAMETER = re.compile(r"(?i)([?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|token|key|password)=)[^&\s]+")
# One and several of what is counted under a reason; the outputs keep the reasons.
_SKIP_NOUNS = {
    "link": ("link to no image", "links to no image"),
    "special file": ("special file", "special files"),
    "folder markers": ("folder marker", "folder markers"),
    "not regular files": ("file that is not regular", "files that are not regular"),
    "files of earlier outputs": ("file of an earlier output", "files of earlier outputs"),
}


# --- untrusted text ---


def printable(text: str) -> str:
    r"""Escape characters that would move the cursor, change colors, clear the screen or reorder the text.

    Line breaks and tabs stay.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape_hidden(char) for char in text)


def _escape_hidden(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in _HIDDEN_CATEGORIES:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode()


def escape_unencodable_output() -> None:
    r"""Let stdout and stderr take any text: a character that their encoding lacks is written as ``\u65e5``.

    File names and messages of libraries have characters that a terminal or a log in latin-1, cp1252 or ASCII lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        # A stream may be closed, or replaced by one that takes everything.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def safe_excerpt(text: str, max_length: int = 240) -> str:
    """Return untrusted text without credentials, with hidden characters escaped, and its middle cut out if it is long.

    >>> safe_excerpt("https://me:pw@host/a")
    'https://***@host/a'
    """
    text = printable(_mask_credentials(text[: 20 * max_length]))
    if len(text) <= max_length:
        return text
    return f"{text[: max_length * 2 // 3]} … {text[-(max_length // 3) :]}"


def file_name(uri: str) -> str:
    """Return the last part of a URI, safe to print."""
    return safe_excerpt(uri.rstrip("/").rpartition("/")[2] or uri, 60)


def mask_secrets(value: Any, key: str = "") -> Any:
    """Return a configuration in which values that look like secrets are replaced by ``***``.

    The configuration has no secrets of its own, but the arguments of a predictor may be some.

    >>> mask_secrets({"api_token": "abc", "actors": 2})
    {'api_token': '***', 'actors': 2}
    """
    if isinstance(value, dict):
        return {k: mask_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(v, key) for v in value]
    if isinstance(value, str):
        return "***" if value and _SECRET_KEY.search(key) else _mask_credentials(value)
    return value


def _mask_credentials(text: str) -> str:
    """Replace user names, passwords and signatures in the URIs of a text."""
    return _SIGNED_PARAMETER.sub(r"\1***", _USER_INFO.sub("***@", text))


def last_line(text: str, max_length: int = 300) -> str:
    r"""Return the last line with a word in it, which in a traceback is the message.

    >>> last_line("Traceback (most recent call last):\n  ...\nValueError: no\n")
    'ValueError: no'
    """
    lines = [line.strip() for line in text.splitlines() if any(char.isalnum() for char in line)]
    return (lines or ["nothing"])[-1][:max_length]


def allow_breaks(text: str) -> Markup:
    """Return text as HTML in which a line may break after underscores.

    >>> allow_breaks("UNKNOWN_<FORMAT>")
    Markup('UNKNOWN_<wbr>&lt;FORMAT&gt;')
    """
    return Markup("_<wbr>").join(text.split("_"))


# --- numbers, times and counts ---


def format_number(value: float | None) -> str:
    """Return a measured number with three or four digits.

    >>> format_number(1234.5), format_number(12.34), format_number(0.01234)
    ('1,234', '12.3', '0.0123')
    """
    if value is None:
        return NO_NUMBER
    size = abs(value)
    if size >= 1e15:
        return f"{value:.3g}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}"


def format_tick(value: float) -> str:
    """Return the label of a tick on an axis."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def format_percent(part: float, total: float) -> str:
    """Return a share in percent; a small one is not rounded to 0, and one below the total is not rounded to 100.

    >>> format_percent(1, 100_000), format_percent(99_999, 100_000), format_percent(1, 3)
    ('< 0.1 %', '> 99.9 %', '33.3 %')
    """
    if not total:
        return NO_NUMBER
    value = 100 * part / total
    if 0 < value < 0.1:
        return "< 0.1 %"
    if 99.9 < value < 100:
        return "> 99.9 %"
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %"


def format_count(count: float, noun: str) -> str:
    """Return a count with its noun.

    >>> format_count(1, "shard"), format_count(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float | None) -> str:
    """Return a duration in hours, minutes and seconds.

    >>> format_duration(3725)
    '1 h 02 min'
    """
    if seconds is None:
        return "unknown"
    full_seconds = int(seconds)
    if full_seconds < 60:
        return f"{full_seconds} s"
    if full_seconds < 3600:
        return f"{full_seconds // 60} min {full_seconds % 60:02d} s"
    return f"{full_seconds // 3600} h {full_seconds % 3600 // 60:02d} min"


def format_time(when: datetime) -> str:
    """Return a time to the minute, in UTC."""
    return when.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def describe_skipped(skipped: dict[str, int]) -> list[str]:
    """Say which files were skipped, most frequent first, from counts by file name ending or by reason.

    >>> describe_skipped({".txt": 12, "": 1, "folder markers": 3})
    ['12 files ending with .txt', '3 folder markers', '1 file ending with nothing']
    >>> describe_skipped({".jpg ": 1, "link": 1, "folder markers": 1})
    ["1 file ending with '.jpg '", '1 folder marker', '1 link to no image']
    """
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return [_describe_skip(reason, count) for reason, count in ranked]


def _describe_skip(reason: str, count: int) -> str:
    if reason in _SKIP_NOUNS:
        return f"{count:,} {_SKIP_NOUNS[reason][count != 1]}"
    if reason and not reason.startswith("."):
        return f"{count:,} {reason}"
    # Quoted where a space at its end would not be seen.
    ending = repr(reason) if reason != reason.strip() else reason or "nothing"
    return f"{count:,} {'file' if count == 1 else 'files'} ending with {ending}"
