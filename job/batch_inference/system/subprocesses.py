"""Functions called in another Python process, which may die of them.

Decoders, pyarrow at a damaged file, and the code of a model can crash, hang, or use up the memory. Called in another process,
they leave this one alone: how a call ended arrives here as a value, one of the small classes below.

* :func:`call` calls a function once, in a process group of its own that is killed afterwards.
* :class:`ChildProcess` answers one call after another until it dies.
* :class:`ForkServer` also limits time and memory of each call, and forks another process after each death.

Functions, arguments and answers are pickled; a function is found by its name, so it has to be a module's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any, Generic, NoReturn, TypeAlias, TypeVar

T = TypeVar("T")

# Time for a process to end once nobody listens to it any more; also the time beyond the limits that the kernel enforces.
_GRACE_S = 30.0
# Longer messages are not kept: only the last line is told.
_TAIL_BYTES = 8192
# A protocol that does not copy arrays when they are unpickled.
_PICKLE_PROTOCOL = 5
_END = object()


# --- answers ---


@dataclass(frozen=True)
class Returned(Generic[T]):
    """The function returned ``value``; None at the end of a stream."""

    value: T


@dataclass(frozen=True)
class Yielded(Generic[T]):
    """The function, a generator, yielded ``value``; more may come."""

    value: T


@dataclass(frozen=True)
class InputWanted:
    """The function asks for its next piece of input: see :meth:`ForkServer.send_input`."""


@dataclass(frozen=True)
class Raised:
    """The function raised ``error``."""

    error: Exception


@dataclass(frozen=True)
class Died:
    """The process that ran the function ended before it answered.

    Attributes:
        exit_code: As :mod:`subprocess` has it: negative where a signal ended the process.
        last_line: The last line of its output; empty where there is none, or where it is not captured.
    """

    exit_code: int
    last_line: str = ""

    @property
    def signal(self) -> int | None:
        """The signal that ended the process, or None where it exited."""
        return -self.exit_code if self.exit_code < 0 else None


@dataclass(frozen=True)
class TimedOut:
    """The function did not end within ``seconds``, of CPU time if ``cpu`` is set, else by the clock."""

    seconds: float
    cpu: bool = False


@dataclass(frozen=True)
class ServerEnded:
    """A :class:`ForkServer` itself ended, or no longer answers; ``exit_code`` as in :class:`Died`."""

    exit_code: int


Outcome: TypeAlias = Returned[T] | Raised | Died | TimedOut
StreamOutcome: TypeAlias = Yielded[T] | InputWanted | Returned[T] | Raised | Died | TimedOut


@dataclass(frozen=True)
class Limits:
    """Limits of one call.

    Attributes:
        cpu_s: Seconds of CPU time.
        clock_s: Seconds by the clock.
        memory_mib: Address space, in MiB, beyond what the process uses before the call.
    """

    cpu_s: float
    clock_s: float
    memory_mib: int


# --- this side ---


def call(function: Callable[..., T], *args: Any, timeout_s: float) -> Outcome[T]:
    """Call a function once in a process of its own; kill the process, and all that it started, afterwards.

    Raises:
        OSError: If the process cannot be started.
    """
    process = ChildProcess(function, own_group=True)
    # Large arguments wait for the process to read them, which has to happen within the time as well.
    sender = threading.Thread(target=process.send, args=args, daemon=True)
    sender.start()
    try:
        return process.receive(timeout_s)
    finally:
        process.kill()
        sender.join()
        process.stop()


class _Process:
    """A Python process with this one's ``sys.path``, connected by a pipe.

    Args:
        main: Called there with the other end of the pipe.
        output: Where its stdout and stderr go: ``subprocess.PIPE`` to keep the last line, ``subprocess.DEVNULL``, or None for
            where this process's output goes.
        own_group: Whether it leads a process group of its own, which :meth:`kill` ends; otherwise it ends with this process's.
        environment: Variables to set, beside this process's.
    """

    def __init__(
        self,
        main: Callable[[Connection[Any, Any]], None],
        *,
        output: int | None = subprocess.PIPE,
        own_group: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._own_group = own_group
        self._connection, theirs = Pipe()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from batch_inference.system import subprocesses; subprocesses.serve({theirs.fileno()})"
        )
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - this program itself
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output == subprocess.PIPE else output,
                start_new_session=own_group,
            )
        except OSError:
            self._connection.close()
            raise
        finally:
            theirs.close()
        self._tail = None if self._popen.stdout is None else _Tail(self._popen.stdout)
        self._send(main)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    def kill(self) -> None:
        """Kill the process, with its group if that is its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._own_group:
                os.killpg(self._popen.pid, signal.SIGKILL)
            else:
                self._popen.kill()

    def stop(self, grace_s: float = 0.0) -> int:
        """End the process: close the pipe, and kill the process if it has not ended after ``grace_s``; return its exit code."""
        self._connection.close()
        try:
            self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self._popen.wait()

    def disconnect(self) -> None:
        """Close the pipe, so that the process ends by itself."""
        self._connection.close()

    def _send(self, message: Any) -> None:
        # A process that has ended shows when its answer is received.
        with contextlib.suppress(OSError):
            _send(self._connection, message)

    def _death(self) -> Died:
        exit_code = self.stop(_GRACE_S)
        return Died(exit_code, "" if self._tail is None else self._tail.last_line())


class ChildProcess(_Process, Generic[T]):
    """A process that answers calls of one function until it dies; it ends when this process does.

    Args:
        function: The function.
        output: As for :mod:`subprocess`: ``PIPE`` keeps the last line of its output for :class:`Died`.
        own_group: Whether it leads a process group of its own, which is killed with it.

    Raises:
        OSError: If the process cannot be started.
    """

    def __init__(
        self, function: Callable[..., T], *, output: int | None = subprocess.PIPE, own_group: bool = False
    ) -> None:
        super().__init__(partial(_answer_calls, function), output=output, own_group=own_group)

    def send(self, *args: Any) -> None:
        """Begin a call with these arguments."""
        self._send(args)

    def receive(self, timeout_s: float | None = None) -> Outcome[T]:
        """Wait for the answer to the call; None: for as long as it takes. A process that died has been stopped."""
        try:
            if not self._connection.poll(timeout_s):
                return TimedOut(timeout_s or 0.0)
            outcome: Outcome[T] = _receive(self._connection)
            return outcome
        except (EOFError, OSError):
            return self._death()


class ForkServer(_Process, Generic[T]):
    """A process that forks another to run a function within limits, and again from its clean self after each death.

    The kernel enforces the limits, whatever the function does. Output goes where this process's goes.

    Args:
        function: ``function(argument)``; for :meth:`send_stream` a generator ``function(argument, take)``.
        limits: Limits of each call; in a stream, of each value.
        import_in_fork: Whether each fork imports the function's module, rather than the server once. For modules that start
            threads, such as pyarrow's: only a process of one thread is safe to fork.

    Raises:
        OSError: If the process cannot be started.
    """

    def __init__(self, function: Callable[..., Any], limits: Limits, *, import_in_fork: bool = False) -> None:
        self._limits = limits
        # One thread: forking is safe, and others would count against the limits.
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        main = partial(_fork_server, pickle.dumps(function), limits, import_in_fork)
        super().__init__(main, output=None, environment=threads)

    def send_call(self, argument: Any) -> None:
        """Begin a call, which is answered by one :data:`Outcome`."""
        self._send(_Call(argument))

    def send_stream(self, argument: bytes) -> None:
        """Begin a stream, which is answered by values and requests for input, then by how it ended.

        Args:
            argument: Pickled; unpickling it does not count against the limits.
        """
        self._send(_Stream(argument))

    def send_input(self, piece: Any) -> None:
        """Answer :class:`InputWanted`. Waiting for a piece of input does not count against the limits."""
        self._send(piece)

    def receive(self) -> StreamOutcome[T] | ServerEnded:
        """Wait for the next answer. After :class:`ServerEnded` the server has been stopped."""
        try:
            if self._connection.poll(self._limits.clock_s + _GRACE_S):
                answer: StreamOutcome[T] = _receive(self._connection)
                return answer
        except (EOFError, OSError):
            pass
        return ServerEnded(self.stop(_GRACE_S))

    def stop(self, grace_s: float = _GRACE_S) -> int:
        """End the server and its fork; return its exit code."""
        return super().stop(grace_s)


class _Tail(threading.Thread):
    """Reads a process's output until it ends, so that it never blocks, and keeps the last bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(name="subprocess-output", daemon=True)
        self._stream = stream
        self._tail = b""
        self.start()

    def run(self) -> None:
        """Read until the end."""
        with self._stream:
            while data := os.read(self._stream.fileno(), 65536):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def last_line(self) -> str:
        """Return the last line; call this once the process has ended."""
        # Processes that it started may hold its output open.
        self.join(1.0)
        return "".join(self._tail.decode(errors="replace").strip().splitlines()[-1:])


# --- the other side ---


@dataclass(frozen=True)
class _Call:
    """A request of :meth:`ForkServer.send_call`."""

    argument: Any


@dataclass(frozen=True)
class _Stream:
    """A request of :meth:`ForkServer.send_stream`."""

    argument: bytes


def serve(descriptor: int) -> None:
    """Run in the started process: receive what to do, and do it until nobody asks any more."""
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        main: Callable[[Connection[Any, Any]], None] = _receive(connection)
    except (EOFError, ConnectionError):
        return
    main(connection)


def _answer_calls(function: Callable[..., Any], connection: Connection[Any, Any]) -> None:
    while True:
        try:
            args = _receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            answer: Outcome[Any] = Returned(function(*args))
        except Exception as exc:
            answer = _raised(exc)
        with contextlib.suppress(ConnectionError):
            _send(connection, answer)


def _fork_server(pickled: bytes, limits: Limits, import_in_fork: bool, connection: Connection[Any, Any]) -> None:
    """Fork a process that answers, and another whenever one has died of a request, until nobody asks any more."""
    function = None if import_in_fork else pickle.loads(pickled)  # noqa: S301 - from :class:`ForkServer`
    pipe = _ForkPipe(connection)
    while True:
        child = os.fork()
        if child == 0:
            _answer_within_limits(function or pickle.loads(pickled), limits, pipe)  # noqa: S301 - as above
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if exit_code == 0 or not pipe.busy:
            return
        try:
            _send(connection, _how_it_died(exit_code, limits))
        except OSError:
            return


class _ForkPipe:
    """A fork's end of the pipe.

    A fork that dies while it waits for a message, or in the middle of one, ends the server too. Another fork would read the
    rest of the message as one of its own, and an answer that nobody asked for would be taken for that to the next request.

    Args:
        connection: The server's end, which forks inherit.
    """

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._busy = mmap.mmap(-1, 1)  # shared with the server

    @property
    def busy(self) -> bool:
        """Whether a request has been received to its end and its next answer has not been begun."""
        return self._busy[0] == 1

    def receive(self) -> Any:
        """Receive a message; end this process if nobody asks any more, or if the message cannot be received."""
        try:
            message = _receive(self._connection)
        except (EOFError, ConnectionError):
            os._exit(0)
        except Exception as exc:
            try:
                _send(self._connection, _raised(exc))
            finally:
                os._exit(0)
        self._busy[0] = 1
        return message

    def send(self, answer: Any) -> None:
        """Send an answer; end this process if nobody listens any more."""
        data = _pickled(answer)
        self._busy[0] = 0
        try:
            self._connection.send_bytes(data)
        except ConnectionError:
            os._exit(0)
        # After a value the function goes on without being asked.
        self._busy[0] = isinstance(answer, Yielded)


def _how_it_died(exit_code: int, limits: Limits) -> Died | TimedOut:
    if exit_code == -signal.SIGPROF:
        return TimedOut(limits.cpu_s, cpu=True)
    if exit_code == -signal.SIGALRM:
        return TimedOut(limits.clock_s)
    return Died(exit_code)


def _answer_within_limits(function: Callable[..., Any], limits: Limits, pipe: _ForkPipe) -> NoReturn:
    _limit_memory(limits.memory_mib)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    while True:
        request = pipe.receive()
        answer: StreamOutcome[Any]
        match request:
            case _Stream(argument):
                answer = _answer_stream(function, argument, limits, pipe)
            case _Call(argument):
                answer = _answer_call(function, argument, limits)
        pipe.send(answer)


def _answer_call(function: Callable[..., Any], argument: Any, limits: Limits) -> Returned[Any] | Raised:
    try:
        with _timers(limits):
            return Returned(function(argument))
    except Exception as exc:
        return _raised(exc)


def _answer_stream(
    function: Callable[..., Iterable[Any]], pickled: bytes, limits: Limits, pipe: _ForkPipe
) -> Returned[None] | Raised:
    """Send each value as soon as it is there."""
    _limit_memory(None)
    argument = pickle.loads(pickled)  # noqa: S301 - from :class:`ForkServer`
    _limit_memory(limits.memory_mib)

    def take() -> Any:
        # Providing the input has limits of its own.
        _set_timers(0, 0)
        pipe.send(InputWanted())
        piece = pipe.receive()
        _set_timers(limits.cpu_s, limits.clock_s)
        return piece

    try:
        values = iter(function(argument, take))
        while True:
            with _timers(limits):
                value = next(values, _END)
            if value is _END:
                return Returned(None)
            pipe.send(Yielded(value))
    except Exception as exc:
        return _raised(exc)


def _raised(error: Exception) -> Raised:
    """Return an answer that can be unpickled: not every exception can."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - just written
    except Exception:
        return Raised(RuntimeError(f"{type(error).__name__}: {error}"))
    return Raised(error)


@contextlib.contextmanager
def _timers(limits: Limits) -> Iterator[None]:
    """End this process if something takes longer; the kernel does, even if the interpreter is blocked."""
    _set_timers(limits.cpu_s, limits.clock_s)
    try:
        yield
    finally:
        _set_timers(0, 0)


def _set_timers(cpu_s: float, clock_s: float) -> None:
    """Start the timer of CPU time, which ends in SIGPROF, and that of the clock, in SIGALRM; 0 stops a timer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, clock_s)


def _limit_memory(mib: int | None) -> None:
    """Limit the address space to what is in use now and ``mib`` more, None for no limit; where the system can."""
    try:
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_AS)
        limit = maximum
        if mib is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + mib * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, maximum))
    except (ImportError, OSError, ValueError):
        return


# --- both sides ---


def _pickled(message: Any) -> bytes:
    return pickle.dumps(message, _PICKLE_PROTOCOL)


def _send(connection: Connection[Any, Any], message: Any) -> None:
    connection.send_bytes(_pickled(message))


def _receive(connection: Connection[Any, Any]) -> Any:
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - between processes of this program
