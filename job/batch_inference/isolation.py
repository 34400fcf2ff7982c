"""Images decoded one at a time, and row groups of Parquet files unpacked, in a process that may die of them.

Both happen in the tasks' own processes, which costs nothing extra. Where such a process has died or hung, its shard is done again by
way of this module: a helper process, forked anew from a clean one after each death, with limits on time and memory that the kernel
enforces. What kills it becomes the row's failure, or that of the row group's rows that were not unpacked yet; its neighbours keep
their pixels.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import numpy as np

from batch_inference.config import PreprocessConfig
from batch_inference.decoding import Pixels, pixels_of
from batch_inference.errors import RowError, RowFailure, SystemFault
from batch_inference.transform import Transform

if TYPE_CHECKING:
    from batch_inference.fetcher import Answer
    from batch_inference.parquet_files import Pages, Value

#: A decoder may take ``decode_timeout_s`` of CPU time, and this many times as long by the clock. Its CPU time is its own, however
#: busy the node is; by the clock an image that is only slow there would fail. A decoder that sleeps or waits uses no CPU, and ends
#: by the clock: ten times is more than a node's other processes, or its swapping, make of any image that is fast enough elsewhere.
HANG_FACTOR = 10
# Beyond the limit that the kernel enforces; then something is wrong with the helper itself.
_GRACE_S = 30.0
# What the helper is asked to do, and its word that all values have been sent.
_IMAGE, _PAGES, _DONE = "image", "pages", "done"
_REMEDY = (
    "Look for too little memory or too many processes on that node; then start the same command again, it resumes."
)
# An image that was killed may have been its neighbours' victim (the system was out of memory), so that it gets another chance.
_TRIES_IF_KILLED = 2


class Helper:
    """Decodes images, or unpacks row groups, in a process of its own; a context manager. It does one thing at a time.

    Args:
        preprocess: Limits; ``decode_timeout_s`` and ``decode_memory_mib`` among them.
        transform: What the model expects, or None for images at their own size.
        hang_s: Seconds by the clock after which a decoder that hangs is ended; None for :data:`HANG_FACTOR` times its CPU time.
    """

    def __init__(self, preprocess: PreprocessConfig, transform: Transform | None, hang_s: float | None = None) -> None:
        self._preprocess = preprocess
        self._transform = transform
        self._limits = _Limits.of(preprocess.decode_timeout_s, hang_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *args: object) -> None:
        self._stop()

    def pixels(self, data: bytes) -> Pixels:
        """What :func:`~batch_inference.decoding.pixels_of` gives.

        Raises:
            RowFailure: What that raises; and ``decode`` DECODER_CRASH, DECODE_TIMEOUT or DECODE_MEMORY where the process died.
            SystemFault: If the helper itself does not work.
        """
        for left in reversed(range(_TRIES_IF_KILLED)):
            answer = self._ask(data)
            if isinstance(answer, RowError):
                raise _failure(answer)
            if isinstance(answer, tuple):
                shape, pixels, damaged = answer
                return Pixels(np.frombuffer(pixels, np.uint8).reshape(shape), damaged)
            if answer != signal.SIGKILL or not left:
                raise self._death(answer, "decod", "the image")
        raise AssertionError  # the last try has returned or raised

    def _ask(self, data: bytes) -> Any:
        """The helper's answer; or the signal, or minus the exit code, with which the process that decodes has died."""
        self._tell((_IMAGE, data))
        return self._hear()

    def unpack(self, pages: Pages, take: Callable[[], Answer]) -> Iterator[Value]:
        """What :func:`~batch_inference.parquet_files.unpacked` gives.

        Raises:
            RowFailure: What ended it, as from :func:`~batch_inference.parquet_files.failure_of`; and ``decode`` DECODER_CRASH,
                DECODE_TIMEOUT or DECODE_MEMORY where the process died.
            SystemFault: If the helper itself does not work.
        """
        clean, taken, left = False, 0, _TRIES_IF_KILLED
        request = pickle.dumps(pages)
        try:
            self._tell((_PAGES, request))
            while True:
                answer = self._hear()
                if answer is None:
                    part = take()
                    taken += 1
                    self._tell(replace(part, data=bytes(part.data)))
                elif isinstance(answer, int):
                    left -= 1
                    if answer == signal.SIGKILL and not taken and left:
                        # Before it had done anything: for others' memory, and nothing is used up.
                        self._stop()
                        self._tell((_PAGES, request))
                        continue
                    # Whoever is killed may be others' victim, and there is no second try any more.
                    raise _failure(
                        replace(self._death(answer, "unpack", "its pages").error, retryable=answer == signal.SIGKILL)
                    )
                elif isinstance(answer, RowError):
                    raise _failure(answer)
                elif answer == _DONE:
                    clean = True
                    return
                else:
                    yield answer
        finally:
            # What it was sent may still lie there, and the next request would begin in the middle of it.
            if not clean:
                self._stop()

    def _tell(self, what: Any) -> None:
        connection = self._connection or self._start()
        # One that has ended shows when it is heard.
        with contextlib.suppress(OSError):
            connection.send(what)

    def _hear(self) -> Any:
        connection = self._connection
        assert connection is not None  # noqa: S101
        try:
            if connection.poll(self._limits.clock_s + _GRACE_S):
                return connection.recv()
        except (EOFError, OSError):
            pass
        return self._ended()

    def _ended(self) -> int:
        """Ends a helper that does not answer any more; the signal that counts as what the process that decodes has died of."""
        code = self._stop()
        if code > 0:
            raise SystemFault(
                f"the process that decodes images alone ended by itself, with code {code}: its messages are in the log of the "
                "worker process",
                _REMEDY,
            )
        return signal.SIGKILL

    def _start(self) -> Connection[Any, Any]:
        here, there = Pipe()
        command = [sys.executable, "-c", f"from batch_inference import isolation; isolation.serve({there.fileno()})"]
        # One thread: forking is safe, and others would count against the limits.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this program itself
                command, pass_fds=[there.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        except OSError as exc:
            here.close()
            raise SystemFault(
                f"the process that decodes images alone cannot be started: {exc}",
                _REMEDY,
            ) from None
        finally:
            there.close()
        # One that has ended already shows when it is asked.
        with contextlib.suppress(OSError):
            here.send_bytes(pickle.dumps((sys.path, self._preprocess, self._transform, self._limits)))
        self._connection = here
        return here

    def _stop(self) -> int:
        """Ends the helper; its exit code, negative where a signal ended it."""
        code = 0
        if self._process is not None and self._connection is not None:
            # The processes end when nobody is at the other side any more.
            self._connection.close()
            try:
                code = self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
            self._process = self._connection = None
        return code

    def _death(self, number: int, doing: str, what: str) -> RowFailure:
        """Args: a signal, or minus an exit code; and what was done to what, such as "decod" (...ing, ...ed) to "the image"."""
        config = self._preprocess
        if number == signal.SIGPROF:
            limit = f"preprocess.decode_timeout_s = {config.decode_timeout_s:g} seconds of CPU time"
            return RowFailure("decode", "DECODE_TIMEOUT", f"{doing}ing {what} did not end within {limit}")
        if number == signal.SIGALRM:
            limit = f"{self._limits.clock_s:g} s, in which it used less CPU time than preprocess.decode_timeout_s"
            return RowFailure("decode", "DECODE_TIMEOUT", f"{doing}ing {what} hangs: it did not end within {limit}")
        process = f"the process that {doing}ed {what} alone"
        if number == signal.SIGKILL:
            return RowFailure("decode", "DECODE_MEMORY", f"{process} was killed, as when memory ends")
        how = signal.Signals(number).name if number > 0 else f"exit code {-number}"
        return RowFailure("decode", "DECODER_CRASH", f"{process} died: {how}")


@dataclass(frozen=True)
class _Limits:
    """How long one image may take.

    Attributes:
        cpu_s: Seconds of CPU time.
        clock_s: Seconds by the clock.
    """

    cpu_s: float
    clock_s: float

    @classmethod
    def of(cls, cpu_s: float, clock_s: float | None) -> _Limits:
        return cls(cpu_s, HANG_FACTOR * cpu_s if clock_s is None else clock_s)


def _failure(error: RowError) -> RowFailure:
    return RowFailure(error.stage, error.error_type, error.message, error.retryable)


def serve(descriptor: int) -> None:
    """The helper: forks a process that answers, and another whenever one has died, until nobody asks any more."""
    connection: Connection[Any, Any] = Connection(descriptor)
    sys.path[:], preprocess, transform, limits = pickle.loads(connection.recv_bytes())  # noqa: S301 - from :class:`Helper`
    while True:
        child = os.fork()
        if child == 0:
            _answer(connection, preprocess, transform, limits)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        try:
            connection.send(-status)
        except OSError:
            return


def _answer(
    connection: Connection[Any, Any], preprocess: PreprocessConfig, transform: Transform | None, limits: _Limits
) -> None:
    _limit_memory(preprocess.decode_memory_mib)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    while True:
        try:
            kind, data = connection.recv()
        except EOFError:
            os._exit(0)
        answer: Any
        if kind == _PAGES:
            answer = _unpack(connection, data, preprocess, limits)
        else:
            with _timed(limits):
                answer = _decode(data, preprocess, transform)
        connection.send(answer)


def _decode(data: bytes, preprocess: PreprocessConfig, transform: Transform | None) -> tuple[Any, ...] | RowError:
    try:
        pixels, damaged = pixels_of(data, preprocess, transform)
        return pixels.shape, pixels.tobytes(), damaged
    except RowFailure as exc:
        return exc.error
    except MemoryError:
        return RowFailure("decode", "DECODE_MEMORY", "not enough memory to decode the image").error
    except Exception as exc:
        return RowFailure("preprocess", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error


def _unpack(
    connection: Connection[Any, Any], data: bytes, preprocess: PreprocessConfig, limits: _Limits
) -> str | RowError:
    """Sends each value as soon as it is there, and None where it needs the next bytes of the file."""
    _limit_memory(None)
    from batch_inference.parquet_files import failure_of, unpacked

    pages = pickle.loads(data)  # noqa: S301 - from :class:`Helper`
    _limit_memory(preprocess.decode_memory_mib)

    def take() -> Answer:
        # Fetching has limits of its own, and is none of the decoder's time.
        _set_timers(0, 0)
        connection.send(None)
        try:
            answer: Answer = connection.recv()
        except EOFError:
            os._exit(0)
        _set_timers(limits.cpu_s, limits.clock_s)
        return answer

    values = unpacked(pages, take)
    try:
        while True:
            with _timed(limits):
                value = next(values, None)
            if value is None:
                return _DONE
            connection.send(value)
    except Exception as exc:
        return failure_of(exc)


@contextlib.contextmanager
def _timed(limits: _Limits) -> Iterator[None]:
    """End this process where something takes longer; the kernel does, whatever holds the interpreter up."""
    _set_timers(limits.cpu_s, limits.clock_s)
    try:
        yield
    finally:
        _set_timers(0, 0)


def _set_timers(cpu_s: float, clock_s: float) -> None:
    """Start the timer of CPU time, which ends in SIGPROF, and that of the clock, SIGALRM; 0 stops one."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, clock_s)


def _limit_memory(mib: int | None) -> None:
    """Address space beyond what is in use now, None for no limit; where the system knows no such limit there is none."""
    try:
        import resource
        from pathlib import Path

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if mib is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + mib * 1024 * 1024, most))
        else:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        return


class Watch:
    """Ends this process where decoding an image, or unpacking one, does not end, so that its shard is done again with care.

    The decoders let other threads run while they work, so that a thread can look at the clocks.

    Args:
        limit_s: Seconds of CPU time that one image may take.
        hang_s: As for :class:`Helper`.
    """

    def __init__(self, limit_s: float, hang_s: float | None = None) -> None:
        self._limits = _Limits.of(limit_s, hang_s)
        self._begun: dict[int, _Moment] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="decode-watch", daemon=True).start()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self._begun[thread] = _Moment.of_thread(thread)

    def __exit__(self, *args: object) -> None:
        self._begun.pop(threading.get_ident(), None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is waited for meanwhile and has limits of its own."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def end(self) -> None:
        """Stops watching."""
        self._ended.set()

    def _look(self) -> None:
        limits = self._limits
        while not self._ended.wait(min(1.0, limits.cpu_s / 4, limits.clock_s / 4)):
            for begun in list(self._begun.values()):
                if begun.cpu_s() > limits.cpu_s:
                    self._end_process(f"decoding did not end within {limits.cpu_s:g} s of CPU time")
                if time.monotonic() - begun.clock > limits.clock_s:
                    self._end_process(f"decoding hangs: it did not end within {limits.clock_s:g} s")

    @staticmethod
    def _end_process(reason: str) -> None:
        print(reason, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(1)


@dataclass(frozen=True)
class _Moment:
    """When a thread has begun with something, on the clock of its own CPU time and on everybody's.

    Attributes:
        cpu_clock: The thread's; None where the system has no such clock.
        cpu: What that showed.
        clock: What ``time.monotonic`` showed.
    """

    cpu_clock: int | None
    cpu: float
    clock: float

    @classmethod
    def of_thread(cls, thread: int) -> _Moment:
        """Now, in the calling thread."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return cls(None, 0.0, time.monotonic())
        clock = time.pthread_getcpuclockid(thread)
        return cls(clock, time.clock_gettime(clock), time.monotonic())

    def cpu_s(self) -> float:
        """Seconds of CPU time since then; without such a clock, seconds."""
        if self.cpu_clock is None:
            return time.monotonic() - self.clock
        try:
            return time.clock_gettime(self.cpu_clock) - self.cpu
        except OSError:
            return 0.0  # the thread has ended since, and the image with it
