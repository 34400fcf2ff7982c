"""Log lines: for a person, or as JSON for a cluster's log store."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import structlog

from batch_inference.terminal import plain


class _Stderr:
    """Prints to whatever stderr is now: a live display puts itself in between."""

    def msg(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    log = debug = info = warning = warn = error = critical = msg


def _made_plain(logger: Any, method: str, event: Any) -> Any:
    return {key: plain(value) if isinstance(value, str) else value for key, value in event.items()}


def configure(style: str, *, quiet: bool = False) -> None:
    """Sets up logging for the program.

    Args:
        style: ``text`` or ``json``.
        quiet: Only warnings and errors.
    """
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if style == "json":
        tail: list[Any] = [structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()]
    else:
        colors = sys.stderr.isatty()
        tail = [
            _made_plain,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0, pad_level=False),
        ]
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING if quiet else logging.INFO),
        logger_factory=lambda *args: _Stderr(),
        cache_logger_on_first_use=False,
    )


@contextlib.contextmanager
def stdout_as_lines() -> Iterator[None]:
    """Makes log lines of what is written to stdout meanwhile.

    Ray prints there what its nodes report (a task that is tried again, a worker killed for want of memory), whatever
    ``log_to_driver`` says; it would stand among the lines of the verdict, or within a JSON answer.
    """
    with contextlib.redirect_stdout(_Lines()):
        yield


class _Lines(io.TextIOBase):
    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        from rich.text import Text

        for line in Text.from_ansi(text).plain.splitlines():
            if line.strip():
                structlog.get_logger().info("from Ray", text=line.strip())
        return len(text)
