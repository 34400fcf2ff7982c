"""Functions that tests call in other processes; few imports, so that these start quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def echo(value: Any) -> Any:
    return value


def number_of_bytes(data: bytes) -> int:
    return len(data)


def pieces(name: str, take: Callable[[], Any]) -> Iterator[Any]:
    """Yield the name and what is taken, until that is None."""
    yield name
    while (piece := take()) is not None:
        yield name, piece


def die(how: str, take: Callable[[], Any]) -> Iterator[Any]:
    """Die by a signal, after a value or a piece of input if so told, in as many processes as told; note each one in a file.

    Args:
        how: Number of the signal, "at once", "value" or "input", number of processes, file; with commas between them.
        take: Returns the next piece of input.
    """
    number, after, deaths, file = how.split(",", 3)
    with Path(file).open("a") as notes:
        notes.write("begun\n")
    if after == "value":
        yield "value"
    elif after == "input":
        take()
    if Path(file).read_text().count("begun") <= int(deaths):
        os.kill(os.getpid(), int(number))
    yield "end"


def timers() -> tuple[float, float]:
    """Return the seconds that are left of the limits of this process: of CPU time, and of the clock; 0 for no limit."""
    return signal.getitimer(signal.ITIMER_PROF)[0], signal.getitimer(signal.ITIMER_REAL)[0]


class TimersWhenReceived:
    """Becomes the :func:`timers` of the process that receives it, at that moment."""

    def __reduce__(self) -> tuple[Any, ...]:
        return timers, ()


class TimersWhenSent:
    """Becomes the :func:`timers` of the process that sends it, at that moment."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (timers(),)


def timers_of_call(received: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the argument, and the timers now."""
    return received, timers()


def timers_of_stream(argument: Any, take: Callable[[], Any]) -> Iterator[Any]:
    """Yield the timers while a value is made, before and after input, and when input arrives and a value is sent."""
    yield timers()
    yield take(), timers()
    yield TimersWhenSent()
    yield timers()
