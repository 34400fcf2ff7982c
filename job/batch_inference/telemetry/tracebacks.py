"""Tracebacks of exceptions that a predictor class raised, without the frames of this program."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

#: Maximum length of a traceback, which is stored with each row that failed because of it.
MAX_CHARACTERS = 4000
_PACKAGE = str(Path(__file__).parents[1])
_HEADER = "Traceback (most recent call last):"
_FRAME = re.compile(r'^ *File "(.*)", line (\d+)', re.MULTILINE)
# A class may raise these, too. Ray would take them for the end of the actor or the cancellation of the task.
_PROCESS_EXITS = (SystemExit, KeyboardInterrupt, GeneratorExit)
#: Everything that a predictor class may raise. Panics of Rust packages and asyncio.CancelledError are not an Exception.
PREDICTOR_EXCEPTIONS: tuple[type[BaseException], ...] = (BaseException,)


def format_traceback(exc: BaseException) -> str:
    """Return a traceback as Python prints it (files, lines, causes), without the frames of this program.

    Args:
        exc: The exception.

    Returns:
        At most :data:`MAX_CHARACTERS` characters; the middle of a longer traceback is left out.
    """
    summary = traceback.TracebackException.from_exception(exc, limit=None, compact=True)
    _remove_own_frames(summary)
    text = "".join(summary.format()).strip()
    if len(text) > MAX_CHARACTERS:
        text = f"{text[: MAX_CHARACTERS // 4]}\n  […]\n{text[-(MAX_CHARACTERS - MAX_CHARACTERS // 4 - 10) :]}"
    return text


def _remove_own_frames(summary: traceback.TracebackException | None) -> None:
    """Remove the frames of this program and of the import machinery from a traceback and its causes."""
    if summary is None:
        return
    summary.stack = traceback.StackSummary.from_list(
        [frame for frame in summary.stack if not frame.filename.startswith((_PACKAGE, "<frozen importlib"))]
    )
    for other in (summary.__cause__, summary.__context__, *(getattr(summary, "exceptions", None) or ())):
        _remove_own_frames(other)


def describe_exception(exc: BaseException) -> str:
    """Return one line for an exception: its type and message, or that the class tried to end the process."""
    try:
        text = " ".join(f"{type(exc).__name__}: {exc}".split())[:500]
    except Exception:  # a class of the user's own, whose __str__ raises
        text = type(exc).__name__
    if isinstance(exc, SystemExit):
        return f"the predictor calls sys.exit ({text.rstrip(': ')})"
    if isinstance(exc, _PROCESS_EXITS):
        return f"the predictor raised {text.rstrip(': ')}"
    return text


def with_traceback(message: str, text: str | None) -> str:
    """Return a message with the lines of a traceback below it.

    Args:
        message: The fact.
        text: Traceback of :func:`format_traceback`. With None, or without a frame, the message is returned as it is.
    """
    if not text or not _FRAME.search(text):
        return message
    return message + "\n" + "\n".join(line for line in text.splitlines() if line != _HEADER)


def last_frame(text: str | None) -> str:
    """Return ``file:line`` of the last frame of a traceback, which identifies the fault; "" if there is none."""
    frames = _FRAME.findall(text or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""
