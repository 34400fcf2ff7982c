"""Tracebacks of what a predictor class raised, without the frames of this program."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

#: Characters of one traceback; it stands beside each row that failed of it.
MOST = 4000
_PACKAGE = str(Path(__file__).parent)
_HEADER = "Traceback (most recent call last):"
_PLACE = re.compile(r'^ *File "(.*)", line (\d+)', re.MULTILINE)
# Ends of a process, as a class may raise them; Ray would take them for an actor that is gone or a task that was cancelled.
_ENDINGS = (SystemExit, KeyboardInterrupt, GeneratorExit)
#: Whatever a class raises that is its own fault. Panics of Rust packages and asyncio.CancelledError are no Exception, either.
FAULTS: tuple[type[BaseException], ...] = (BaseException,)


def told(exc: BaseException) -> str:
    """Return a traceback as Python prints it: files, lines, causes; frames of this program left out.

    Args:
        exc: What was raised.

    Returns:
        At most :data:`MOST` characters; of a longer one the middle is left out.
    """
    found = traceback.TracebackException.from_exception(exc, limit=None, compact=True)
    _leave_out(found)
    text = "".join(found.format()).strip()
    if len(text) > MOST:
        text = f"{text[: MOST // 4]}\n  […]\n{text[-(MOST - MOST // 4 - 10) :]}"
    return text


def _leave_out(found: traceback.TracebackException | None) -> None:
    """Take the frames of this program, and of the import machinery, out of a traceback and its causes."""
    if found is None:
        return
    found.stack = traceback.StackSummary.from_list(
        [f for f in found.stack if not f.filename.startswith((_PACKAGE, "<frozen importlib"))]
    )
    for other in (found.__cause__, found.__context__, *(getattr(found, "exceptions", None) or ())):
        _leave_out(other)


def named(exc: BaseException) -> str:
    """Return one line for an exception: its type and message, and what a class means by ending the process."""
    try:
        text = " ".join(f"{type(exc).__name__}: {exc}".split())[:500]
    except Exception:  # a class of the user's own, whose __str__ raises
        text = type(exc).__name__
    if isinstance(exc, SystemExit):
        return f"the predictor calls sys.exit ({text.rstrip(': ')})"
    if isinstance(exc, _ENDINGS):
        return f"the predictor raised {text.rstrip(': ')}"
    return text


def with_place(message: str, text: str | None) -> str:
    """Return a message with the lines of a traceback below it, for a person.

    Args:
        message: The fact.
        text: Of :func:`told`; None or empty: the message alone.
    """
    if not text or not _PLACE.search(text):
        return message
    return message + "\n" + "\n".join(line for line in text.splitlines() if line != _HEADER)


def place(text: str | None) -> str:
    """Return file and line of the last frame, by which faults are told apart; "" where there is none."""
    found = _PLACE.findall(text or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
