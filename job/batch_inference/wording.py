"""Texts and numbers for people: a stranger's text can't hide anything in them, nor say what is secret."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from markupsafe import Markup

from batch_inference.terminal import plain

#: Where there is no number.
NO_NUMBER = "\N{EN DASH}"
_SECRET_KEY = re.compile(
    r"passw|secret|token|credential|api_?key|access_?key|private_?key|authorization", re.IGNORECASE
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*@")
_SIGNED = re.compile(r"(?i)([?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|token|key|password)=)[^&\s]+")


def shown(text: str, most: int = 240) -> str:
    """Text of a stranger's: without credentials, with its controls made visible, its middle left out where it is long.

    >>> shown("https://me:pw@host/a")
    'https://***@host/a'
    """
    text = plain(_SIGNED.sub(r"\1***", _USER_INFO.sub("***@", text[: 20 * most])))
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"


def describe_skipped(skipped: dict[str, int]) -> list[str]:
    """Say what was left out, the most first, from counts by file name ending or by kind.

    >>> describe_skipped({".txt": 12, "": 1, "folder markers": 3})
    ['12 files ending with .txt', '3 folder markers', '1 file ending with nothing']
    >>> describe_skipped({".jpg ": 1, "link": 1})
    ["1 file ending with '.jpg '", '1 link to no image']
    """
    return [_left_out(kind, n) for kind, n in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))]


def _left_out(kind: str, n: int) -> str:
    if kind == "link":
        return f"{n:,} {'link' if n == 1 else 'links'} to no image"
    if kind and not kind.startswith("."):
        return f"{n:,} {kind}"
    # A space at the end would not be seen.
    shown = repr(kind) if kind != kind.strip() else kind or "nothing"
    return f"{n:,} {'file' if n == 1 else 'files'} ending with {shown}"


def last_line(text: str, most: int = 300) -> str:
    r"""The last line with a word in it, where a traceback has its message.

    >>> last_line("Traceback (most recent call last):\n  ...\nValueError: no\n")
    'ValueError: no'
    """
    lines = [line.strip() for line in text.splitlines() if any(char.isalnum() for char in line)]
    return (lines or ["nothing"])[-1][:most]


def masked(value: Any, key: str = "") -> Any:
    """A configuration without what looks like a secret; the program has none of its own, but arguments of predictors may.

    >>> masked({"api_token": "abc", "actors": 2})
    {'api_token': '***', 'actors': 2}
    """
    if isinstance(value, dict):
        return {k: masked(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(v, key) for v in value]
    if isinstance(value, str):
        return "***" if value and _SECRET_KEY.search(key) else _SIGNED.sub(r"\1***", _USER_INFO.sub("***@", value))
    return value


def percent(part: float, whole: float) -> str:
    """A share for people; small ones are not rounded to nothing, nor large ones to everything.

    >>> percent(1, 100_000), percent(99_999, 100_000), percent(1, 3)
    ('< 0.1 %', '> 99.9 %', '33.3 %')
    """
    if not whole:
        return NO_NUMBER
    value = 100 * part / whole
    if 0 < value < 0.1:
        return "< 0.1 %"
    if 99.9 < value < 100:
        return "> 99.9 %"
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %"


def figure(value: float | None) -> str:
    """A measured number, to three or four digits.

    >>> figure(1234.5), figure(12.34), figure(0.01234)
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


def whole(value: float) -> str:
    """A round number of an axis."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def count_of(count: float, noun: str) -> str:
    """A number of things.

    >>> count_of(1, "shard"), count_of(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def moment(when: datetime) -> str:
    """A moment, to the minute, in UTC."""
    return when.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def name_of(uri: str) -> str:
    """The last part of a URI."""
    return shown(uri.rstrip("/").rpartition("/")[2] or uri, 60)


def breakable(text: str) -> Markup:
    """Text in which a line may break after underscores.

    >>> breakable("UNKNOWN_<FORMAT>")
    Markup('UNKNOWN_<wbr>&lt;FORMAT&gt;')
    """
    return Markup("_<wbr>").join(text.split("_"))
