"""Footers of Parquet files, tried out in a process that may die of them.

pyarrow ends the process at some damaged footers: what its C++ library raises while it opens the metadata of a column chunk passes a
place that lets no exception through (seen with pyarrow 26). So that another process opens them first; one for many files, and
another one after each death.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq

_GOOD, _DAMAGED = b"1", b"0"


class Trial:
    """Tells of footers whether this process can open them. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def survives(self, footer: bytes) -> bool:
        """Whether every column chunk of a footer can be opened.

        Args:
            footer: The end of a Parquet file, from its metadata on.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None  # noqa: S101
            try:
                process.stdin.write(len(footer).to_bytes(8, "little") + footer)
                process.stdin.flush()
                answer = process.stdout.read(1)
            except BrokenPipeError:
                answer = b""
            if not answer:
                self.close()
            return answer == _GOOD

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}; from batch_inference import footers; footers.serve()",
        ]
        self._process = subprocess.Popen(  # noqa: S603 - this program itself
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        atexit.register(self.close)
        return self._process


def serve() -> None:
    """The other side: reads footers from standard input until its end, answers with one byte each."""
    while len(size := sys.stdin.buffer.read(8)) == 8:
        data = sys.stdin.buffer.read(int.from_bytes(size, "little"))
        sys.stdout.buffer.write(_answer(data))
        sys.stdout.buffer.flush()


def _answer(data: bytes) -> bytes:
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + data))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for column in range(group.num_columns):
                _ = group.column(column).path_in_schema
    except (pa.ArrowException, OSError, ValueError):
        return _DAMAGED
    return _GOOD
