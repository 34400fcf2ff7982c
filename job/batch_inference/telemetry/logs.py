"""Log lines: text for a person, JSON for a cluster's log store."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import structlog

from batch_inference.text import printable


class _StderrLogger:
    """A logger that looks up stderr for each line, since a live display replaces it for a while."""

    def msg(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    log = debug = info = warning = warn = error = critical = msg


# Fields of every JSON line of this process, such as the run and the attempt. Those of a thread come from structlog.contextvars.
_bound: dict[str, Any] = {}
_format = "text"


def bind(**fields: Any) -> None:
    """Add fields to every line that this process logs as JSON."""
    _bound.update(fields)


def log_format() -> str:
    """Return the log format of this process: ``text`` or ``json``."""
    return _format


def _add_bound_fields(logger: Any, method: str, event: Any) -> Any:
    return {**event, **{key: value for key, value in _bound.items() if key not in event}}


def _make_printable(logger: Any, method: str, event: Any) -> Any:
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}


def configure(style: str, *, quiet: bool = False) -> None:
    """Set up logging for the program.

    Args:
        style: ``text`` or ``json``.
        quiet: Log only warnings and errors. Otherwise JSON has a line for each shard, too.
    """
    global _format
    _format = style
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if style == "json":
        shared.append(_add_bound_fields)
        timestamper = structlog.processors.TimeStamper(fmt="iso", utc=True)
        rendering: list[Any] = [timestamper, structlog.processors.JSONRenderer()]
        _convert_stdlib_logs([*shared, timestamper])
    else:
        colors = sys.stderr.isatty()
        rendering = [
            _make_printable,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0, pad_level=False),
        ]
    level = logging.DEBUG if style == "json" else logging.INFO
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING if quiet else level),
        logger_factory=lambda *args: _StderrLogger(),
        cache_logger_on_first_use=False,
    )


def _convert_stdlib_logs(processors: list[Any]) -> None:
    """Render the records of the package's ``logging`` loggers as JSON, too."""
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
def stdout_as_log_lines() -> Iterator[None]:
    """Turn everything that is written to stdout in this block into log lines.

    Ray prints the reports of its nodes to stdout (a task is retried, a worker was killed because memory ran out), even with
    ``log_to_driver`` off. They would end up among the lines of the verdict, or inside a JSON answer.
    """
    with contextlib.redirect_stdout(_LoggingStream(sys.stdout)):
        yield


class _LoggingStream:
    """A stream whose lines are logged. Every other attribute is the wrapped stream's: a user's module may configure it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        from rich.text import Text

        # Ray writes a message in one call. Some end with the last lines of a log, which are in Ray's log files, too.
        first, *more = [line.strip() for line in Text.from_ansi(text).plain.splitlines() if line.strip()] or [""]
        if first:
            structlog.get_logger().warning("from Ray", text=first, **({"more_lines": len(more)} if more else {}))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
