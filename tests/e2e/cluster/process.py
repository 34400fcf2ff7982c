"""Other programs: started, bounded in time, and ended with everything that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.support.limits import HANG_S


class CommandError(RuntimeError):
    """A command failed or ran out of time; the message ends with the last lines that it printed."""


def say(message: str) -> None:
    """Tells the person at the terminal what is going on; standard output stays free for results."""
    print(f"{time.strftime('%H:%M:%S')} cluster: {message}", file=sys.stderr, flush=True)


def run(
    *command: str | Path,
    timeout: float = HANG_S,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
    check: bool = True,
) -> str:
    """Runs a command and returns what it printed, standard error included.

    Args:
        command: the program and its arguments.
        timeout: seconds after which the command and its children are killed: by then it hangs.
        env: variables on top of this process's own.
        cwd: folder to run in.
        stdin: text or an open file to read from; nothing by default, so that no command waits for a person.
        stdout: where standard output goes instead of the returned text.
        check: whether a failure raises.
    """
    text = stdin.encode() if isinstance(stdin, str) else None
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.PIPE if text is not None else stdin if stdin is not None else subprocess.DEVNULL,  # type: ignore[arg-type]
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE if stdout else subprocess.STDOUT,
        start_new_session=True,  # A group of its own, so that a compiler's children end with it.
    )
    ended = True
    try:
        out, err = process.communicate(text, timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        ended = False
        out, err = process.communicate(timeout=10)  # What it said before tells where it hung.
    except BaseException:
        kill(process)
        raise
    printed = ((out or b"") + (err or b"")).decode(errors="replace")
    if not ended or (check and process.returncode != 0):
        what = f"exit {process.returncode}" if ended else f"no end after {timeout:.0f} s"
        tail = "\n".join(printed.strip().splitlines()[-30:])
        raise CommandError(f"{what}: {' '.join(map(str, command))}\n{tail}")
    return printed


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
