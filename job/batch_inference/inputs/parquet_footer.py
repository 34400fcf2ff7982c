"""Footers of Parquet files, tried in a process that may die of them.

pyarrow ends the process at some damaged footers: its C++ library raises an exception while it opens the metadata of a column
chunk, in a function that lets no exception through (seen with pyarrow 26). Another process therefore opens them first: one
process for many files, and a new one after each death.
"""

from __future__ import annotations

import atexit
import subprocess
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.system.subprocesses import ChildProcess, Died, Returned


class FooterProbe:
    """Tells of footers whether this process can open them. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: ChildProcess[bool] | None = None

    def survives(self, footer: bytes) -> bool:
        """Return whether every column chunk of a footer can be opened.

        Args:
            footer: The end of a Parquet file, from its metadata on.
        """
        with self._lock:
            process = self._process or self._start()
            process.send(footer)
            match process.receive():
                case Returned(value=readable):
                    return readable
                case Died():
                    self.close()
            return False

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.stop()
            self._process = None

    def _start(self) -> ChildProcess[bool]:
        self._process = ChildProcess(_is_readable, output=subprocess.DEVNULL)
        atexit.register(self.close)
        return self._process


def _is_readable(footer: bytes) -> bool:
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        for group_index in range(metadata.num_row_groups):
            group = metadata.row_group(group_index)
            for column in range(group.num_columns):
                _ = group.column(column).path_in_schema
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True
