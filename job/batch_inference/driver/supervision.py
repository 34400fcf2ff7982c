"""A small parent process that outlives the driver, so that a job that starts Ray itself always ends with a verdict.

When Ray's raylet or GCS is killed, Ray's native code ends every process that is connected to it, the driver included: with exit
code 1, and no exception, message or hook of Python's. The driver itself may also be killed, as the system does when memory runs
out. So ``run``, ``retry``, ``demo`` and ``preflight`` fork before anything else: the child is the driver. The parent only waits,
passes signals on, and prints the verdict if the child ended without one. The fork costs some milliseconds, and no memory beyond
what the interpreter has loaded by then.

Linux only. Elsewhere, from Python (:func:`batch_inference.run`) and on a cluster (``--address``, ``RAY_ADDRESS``, Ray jobs) the
driver has no such parent; on Kubernetes the submitter's pod does its work.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Commands that start a Ray of their own.
COMMANDS = ("run", "retry", "demo", "preflight")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
# File descriptor on which this process, a driver, writes to its parent; None where it has none.
_parent: int | None = None


@dataclass(frozen=True)
class Ending:
    """The end of a driver that left no exit code of the program's.

    Attributes:
        code: Its exit code, negative where a signal ended it.
        facts: Its words about itself until then, by :func:`tell_parent`.
    """

    code: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """The end in words, to follow "the driver's process"."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"was ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was ended by signal {-self.code}"


def is_needed(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether a command starts a Ray on this machine; ``argv`` is without the program's name."""
    if sys.platform != "linux" or not argv or argv[0] not in COMMANDS or environment.get("RAY_ADDRESS"):
        return False
    return not any(word == "--address" or word.startswith("--address=") for word in argv)


def is_supervised() -> bool:
    """Return whether this process is a driver with such a parent."""
    return _parent is not None


def tell_parent(**facts: Any) -> None:
    """Tell the parent, where there is one, what it needs for a verdict; a few hundred bytes at most, since it reads at the end."""
    if _parent is not None:
        with contextlib.suppress(OSError):
            os.write(_parent, json.dumps(facts).encode() + b"\n")


def supervised(explain: Callable[[Ending], int]) -> None:
    """Fork. Return in the child, which goes on as the driver; in the parent wait for it, and never return.

    Where the system has no process to spare, return without a parent.

    The child ends with its parent, however that ends: ``kill -9`` of the process that was started leaves no driver behind. Both are
    in one process group, so that a terminal's signals reach both; those that a process sends are passed on.

    Args:
        explain: Called in the parent if the child ended without :func:`tell_parent` of its exit code; prints the verdict and returns
            the exit code.
    """
    global _parent
    read, write = os.pipe()
    parent = os.getpid()
    # Blocked in the parent for good, which waits for them; what comes before the child unblocks them is not lost to either.
    waited_for = {signal.SIGCHLD, *_PASSED_ON}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some programs leave it, children vanish without a code
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    try:
        child = os.fork()
    except OSError:
        # The user's limit of processes; the driver goes on by itself, and soon says what it can't start.
        os.close(read)
        os.close(write)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
        return
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before the line above
            os._exit(1)
        os.close(read)
        _parent = write
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
        return
    os.close(write)
    code, passed_on = _wait(child, waited_for)
    facts = _read_facts(read)
    if "exit_code" in facts:
        # Whatever happened to the process after that, such as a crash of native code at its end.
        raise SystemExit(facts["exit_code"])
    if -code in passed_on:
        # It did not handle signals yet; this process ends as it did.
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
        os.kill(parent, -code)
        raise SystemExit(128 - code)  # the first process of a container, which no signal ends
    signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
    raise SystemExit(explain(Ending(code, facts)))


def _read_facts(pipe: int) -> dict[str, Any]:
    """Return what the child has told."""
    facts: dict[str, Any] = {}
    # Not to the pipe's end: a process that the driver has left behind may still hold the other side.
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError), os.fdopen(pipe, "rb") as lines:
        for line in lines:
            facts |= json.loads(line)
    return facts


def _wait(child: int, signals: set[signal.Signals]) -> tuple[int, set[int]]:
    """Return the child's exit code, negative for a signal, and the signals that this process was sent meanwhile."""
    sent: set[int] = set()
    while True:
        info = signal.sigwaitinfo(signals)
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status), sent
            continue
        sent.add(info.si_signo)
        # Above 0 it comes from the kernel: Ctrl-C, which the whole group has got.
        if info.si_code <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, info.si_signo)
