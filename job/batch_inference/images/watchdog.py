"""A watchdog over decoders that run in this process, which ends if one of them does not."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from batch_inference.system.subprocesses import Limits


class Watchdog:
    """Ends this process if decoding or unpacking an image exceeds its time, so that the shard is prepared again in a sandbox.

    A context manager around each image; threads may share it. Decoders let other threads run while they work, so that a
    thread can look at the clocks.

    Args:
        limits: Limits of one image; ``memory_mib`` is not used.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._starts: dict[int, _Start] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="decode-watchdog", daemon=True).start()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self._starts[thread] = _Start.of_thread(thread)

    def __exit__(self, *args: object) -> None:
        self._starts.pop(threading.get_ident(), None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within: waiting for a store has limits of its own."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def _watch(self) -> None:
        limits = self._limits
        while not self._stopped.wait(min(1.0, limits.cpu_s / 4, limits.clock_s / 4)):
            for start in list(self._starts.values()):
                if start.cpu_s_since() > limits.cpu_s:
                    self._end_process(f"decoding did not end within {limits.cpu_s:g} s of CPU time")
                if time.monotonic() - start.clock > limits.clock_s:
                    self._end_process(f"decoding hangs: it did not end within {limits.clock_s:g} s")

    @staticmethod
    def _end_process(reason: str) -> None:
        print(reason, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(1)


@dataclass(frozen=True)
class _Start:
    """The moment when a thread began with an image, by the clock and by the thread's own CPU time.

    Attributes:
        cpu_clock: The thread's clock of CPU time; None where the system has no such clock.
        cpu: Its reading at that moment.
        clock: The reading of ``time.monotonic`` at that moment.
    """

    cpu_clock: int | None
    cpu: float
    clock: float

    @classmethod
    def of_thread(cls, thread: int) -> _Start:
        """Return this moment, for the calling thread."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return cls(None, 0.0, time.monotonic())
        cpu_clock = time.pthread_getcpuclockid(thread)
        return cls(cpu_clock, time.clock_gettime(cpu_clock), time.monotonic())

    def cpu_s_since(self) -> float:
        """Return the seconds of CPU time since then; without such a clock, the seconds since then."""
        if self.cpu_clock is None:
            return time.monotonic() - self.clock
        try:
            return time.clock_gettime(self.cpu_clock) - self.cpu
        except OSError:
            return 0.0  # the thread has ended since, and the image with it
