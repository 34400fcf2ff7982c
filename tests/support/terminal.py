"""The program on a terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

COLUMNS = 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(
    *args: str, cwd: Path | None = None, program: tuple[str, ...] = ("-m", "batch_inference"), **env: str
) -> str:
    """Return what a terminal receives from the program, or from another of Python's, control characters included."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    plain = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "CI")
    }
    command = [sys.executable, *program, *args]
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env={**plain, "TERM": "xterm-256color", **env},
    ):
        os.close(follower)
        said = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # what Linux says where the other side has closed
                break
            if not piece:
                break
            said += piece
        os.close(leader)
    return said.decode().replace("\r\n", "\n")
