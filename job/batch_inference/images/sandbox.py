"""Functions called in a process that may die of an image, within limits on time and memory.

Tasks decode images and unpack row groups of Parquet files in their own processes, which costs nothing extra. If such a process
has died or hung, its shard is prepared again by way of this module: a helper process, forked from a clean one after each death,
with limits that the kernel enforces. What kills it becomes the failure of one row, or of the rows of a row group that were not
unpacked yet. All other rows keep their pixels.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from batch_inference.config import PreprocessConfig
from batch_inference.errors import InfrastructureError, RowError
from batch_inference.system.subprocesses import (
    Died,
    ForkServer,
    InputWanted,
    Limits,
    Raised,
    Returned,
    ServerEnded,
    StreamOutcome,
    TimedOut,
    Yielded,
)

#: Limit by the clock, as a multiple of ``decode_timeout_s``, which limits CPU time. CPU time does not depend on how busy the node
#: is; the clock's does, and an image that is only slow on a busy node must not fail. A decoder that sleeps or waits uses no CPU, so
#: that only the clock ends it. Other processes or swapping do not make a fast image ten times slower than ``decode_timeout_s``.
HANG_FACTOR = 10
_REMEDY = (
    "Look for too little memory or too many processes on that node; then start the same command again, it resumes."
)
# An image whose process was killed gets another try: the system was out of memory, perhaps because of other processes.
_TRIES_IF_KILLED = 2

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def decode_limits(config: PreprocessConfig, hang_s: float | None = None) -> Limits:
    """Return the limits of decoding one image.

    Args:
        config: ``decode_timeout_s`` and ``decode_memory_mib`` are used.
        hang_s: Limit in seconds by the clock; None: :data:`HANG_FACTOR` times the limit of CPU time.
    """
    clock_s = HANG_FACTOR * config.decode_timeout_s if hang_s is None else hang_s
    return Limits(config.decode_timeout_s, clock_s, config.decode_memory_mib)


@dataclass(frozen=True)
class Activity:
    """The words for a function in messages.

    Attributes:
        infinitive: Such as "decode".
        gerund: Such as "decoding".
        past: Such as "decoded".
        object: Such as "the image".
    """

    infinitive: str
    gerund: str
    past: str
    object: str


DECODING = Activity("decode", "decoding", "decoded", "the image")
UNPACKING = Activity("unpack", "unpacking", "unpacked", "its pages")


class _Sandbox:
    """A helper process that runs one function within limits; a context manager. It does one thing at a time.

    The process is started by the first call. One that has died is replaced by the next call.

    Args:
        function: The function, which is pickled.
        limits: Limits of each call.
        activity: The function's words in messages.
        import_in_fork: As for :class:`~batch_inference.system.subprocesses.ForkServer`.
    """

    def __init__(
        self, function: Callable[..., Any], limits: Limits, activity: Activity, *, import_in_fork: bool = False
    ) -> None:
        self._import_in_fork = import_in_fork
        self._function = function
        self._limits = limits
        self._activity = activity
        self._server: ForkServer[Any] | None = None

    def __exit__(self, *args: object) -> None:
        self._stop()

    def _running(self) -> ForkServer[Any]:
        """Return the helper process; start it if there is none."""
        if self._server is None:
            try:
                self._server = ForkServer(self._function, self._limits, import_in_fork=self._import_in_fork)
            except OSError as exc:
                raise InfrastructureError(
                    f"the process that decodes images alone cannot be started: {exc}",
                    _REMEDY,
                ) from None
        return self._server

    def _receive(self) -> StreamOutcome[Any]:
        outcome = self._running().receive()
        if not isinstance(outcome, ServerEnded):
            return outcome
        self._server = None
        if outcome.exit_code > 0:
            raise InfrastructureError(
                f"the process that decodes images alone ended by itself, with code {outcome.exit_code}: "
                "its messages are in the log of the worker process",
                _REMEDY,
            )
        return Died(-signal.SIGKILL)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _failure(self, outcome: Died | TimedOut, *, retryable: bool = False) -> RowError:
        """Return the row's failure when the process died."""
        doing = f"{self._activity.gerund} {self._activity.object}"
        process = f"the process that {self._activity.past} {self._activity.object} alone"
        match outcome:
            case TimedOut(seconds, cpu=True):
                limit = f"preprocess.decode_timeout_s = {seconds:g} seconds of CPU time"
                error_type, message = "DECODE_TIMEOUT", f"{doing} did not end within {limit}"
            case TimedOut(seconds):
                limit = f"{seconds:g} s, in which it used less CPU time than preprocess.decode_timeout_s"
                error_type, message = "DECODE_TIMEOUT", f"{doing} hangs: it did not end within {limit}"
            case Died(signal=signal.SIGKILL):
                error_type, message = "DECODE_MEMORY", f"{process} was killed, as when memory ends"
            case Died(exit_code):
                cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
                error_type, message = "DECODER_CRASH", f"{process} died: {cause}"
        return RowError("decode", error_type, message, retryable)


class SandboxedFunction(_Sandbox, Generic[Argument, Result]):
    """A function of one argument, called in a helper process within limits; a context manager.

    Args:
        function: The function, which is pickled.
        limits: Limits of each call.
        activity: The function's words in messages.
    """

    def __init__(self, function: Callable[[Argument], Result], limits: Limits, activity: Activity = DECODING) -> None:
        super().__init__(function, limits, activity)

    def __enter__(self) -> SandboxedFunction[Argument, Result]:
        return self

    def __call__(self, argument: Argument) -> Result:
        """Call the function.

        Raises:
            RowError: Stage ``decode`` with DECODER_CRASH, DECODE_TIMEOUT or DECODE_MEMORY if the process died.
            Exception: Any exception that the function raised.
            InfrastructureError: If the helper process itself does not work.
        """
        tries = _TRIES_IF_KILLED
        while True:
            self._running().send_call(argument)
            tries -= 1
            match self._receive():
                case Returned(value):
                    result: Result = value
                    return result
                case Raised(MemoryError()):
                    message = f"not enough memory to {self._activity.infinitive} {self._activity.object}"
                    raise RowError("decode", "DECODE_MEMORY", message)
                case Raised(error):
                    raise error
                case Died(signal=signal.SIGKILL) if tries:
                    continue
                case Died() | TimedOut() as outcome:
                    raise self._failure(outcome)


class SandboxedGenerator(_Sandbox, Generic[Argument, Result]):
    """A generator, run in a helper process within limits that hold for each value; a context manager.

    Args:
        function: ``function(argument, take)``, which is pickled; ``take()`` gives it the next piece of its input.
        limits: Limits of each value.
        activity: The function's words in messages.
    """

    def __init__(
        self,
        function: Callable[[Argument, Callable[[], Any]], Iterator[Result]],
        limits: Limits,
        activity: Activity = UNPACKING,
    ) -> None:
        # Its module may start threads when it is imported, as pyarrow does.
        super().__init__(function, limits, activity, import_in_fork=True)

    def __enter__(self) -> SandboxedGenerator[Argument, Result]:
        return self

    def __call__(self, argument: Argument, take: Callable[[], Any]) -> Iterator[Result]:
        """Yield the generator's values, each as soon as it is there.

        Args:
            argument: The function's; it is pickled, so it should be small.
            take: Called here whenever the function asks for the next piece of its input, which is pickled as well.

        Raises:
            RowError: Stage ``decode`` with DECODER_CRASH, DECODE_TIMEOUT or DECODE_MEMORY if the process died.
            Exception: Any exception that the function raised.
            InfrastructureError: If the helper process itself does not work.
        """
        finished, begun, tries = False, False, _TRIES_IF_KILLED
        request = pickle.dumps(argument)
        try:
            self._running().send_stream(request)
            while True:
                match self._receive():
                    case Yielded(value):
                        begun = True
                        yield value
                    case InputWanted():
                        begun = True
                        self._running().send_input(take())
                    case Returned():
                        finished = True
                        return
                    case Raised(error):
                        raise error
                    case Died() | TimedOut() as outcome:
                        tries -= 1
                        killed = isinstance(outcome, Died) and outcome.signal == signal.SIGKILL
                        if not killed or begun or not tries:
                            # Input that was taken is gone, and values would come twice, so there is no second try here; another
                            # job may have one.
                            raise self._failure(outcome, retryable=killed)
                        # Killed before it did anything, because of other processes' memory.
                        self._stop()
                        self._running().send_stream(request)
        finally:
            # Input may still be on its way to the process, and the next request would begin in the middle of it.
            if not finished:
                self._stop()
