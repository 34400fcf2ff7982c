"""A program that answers lines of JSON with lines of JSON; it is started once and used often."""

from __future__ import annotations

import atexit
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any


class Service:
    """A running program; it ends with this process, whose end closes its standard input.

    Args:
        program: The program.
    """

    def __init__(self, program: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        atexit.register(self.close)

    def ask(self, question: Any) -> Any:
        """Sends one question and waits for its answer; the test's own time limit is the only one."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self._process.args!r} has ended: {self._errors.read().decode(errors='replace')}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the program."""
        self._process.kill()
        self._process.wait()
