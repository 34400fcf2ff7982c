"""Log lines: for a person, or as JSON for a cluster's log store."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import structlog

from batch_inference.terminal import plain


class _Stderr:
    """Prints to whatever stderr is now: a live display puts itself in between."""

    def msg(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    log = debug = info = warning = warn = error = critical = msg


# What every JSON line of this process says, such as the run and the attempt; a thread's own come by structlog.contextvars.
_bound: dict[str, Any] = {}
_format = "text"


def bind(**fields: Any) -> None:
    """Puts fields into every line that this process logs as JSON."""
    _bound.update(fields)


def log_format() -> str:
    """How this process logs: ``text`` or ``json``."""
    return _format


def _with_bound(logger: Any, method: str, event: Any) -> Any:
    return {**event, **{key: value for key, value in _bound.items() if key not in event}}


def _made_plain(logger: Any, method: str, event: Any) -> Any:
    return {key: plain(value) if isinstance(value, str) else value for key, value in event.items()}


def configure(style: str, *, quiet: bool = False) -> None:
    """Sets up logging for the program.

    Args:
        style: ``text`` or ``json``.
        quiet: Only warnings and errors. Without it, JSON has a line for each shard, too.
    """
    global _format
    _format = style
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if style == "json":
        shared.append(_with_bound)
        tail: list[Any] = [structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()]
        _take_over([*shared, tail[0]])
    else:
        colors = sys.stderr.isatty()
        tail = [
            _made_plain,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0, pad_level=False),
        ]
    level = logging.DEBUG if style == "json" else logging.INFO
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING if quiet else level),
        logger_factory=lambda *args: _Stderr(),
        cache_logger_on_first_use=False,
    )


def _take_over(processors: list[Any]) -> None:
    """What the package's modules say by Python's own logging becomes JSON, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=processors,
        )
    )
    package = logging.getLogger("batch_inference")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)


@contextlib.contextmanager
def stdout_as_lines() -> Iterator[None]:
    """Makes log lines of what is written to stdout meanwhile.

    Ray prints there what its nodes report (a task that is tried again, a worker killed for want of memory), whatever
    ``log_to_driver`` says; it would stand among the lines of the verdict, or within a JSON answer.
    """
    with contextlib.redirect_stdout(_Lines(sys.stdout)):
        yield


class _Lines:
    """Is like the stream in every other respect: a user's module may want to set it up."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        from rich.text import Text

        # A message comes whole; some bring the last lines of a log along, which are in Ray's log files, too.
        first, *more = [line.strip() for line in Text.from_ansi(text).plain.splitlines() if line.strip()] or [""]
        if first:
            structlog.get_logger().warning("from Ray", text=first, **({"more_lines": len(more)} if more else {}))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
