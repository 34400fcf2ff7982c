"""The program in a process that stays, attached to a running Ray cluster as a notebook's kernel is.

A job that is started by itself spends most of its time before its first row: Python and its imports, joining Ray, and worker
processes, which Ray gives to one job only. Tests that are about something else share one process and its workers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.jobs import HERE, environment
from tests.support.servers import stop

ROOT = Path(__file__).resolve().parents[2]


class AttachedProgram:
    """Runs one command after the other in one process.

    Args:
        address: The cluster's address.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the program to its end with these arguments; ``--address`` is not needed."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(args).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # the test's time is over: the next test gets another process
            self.close()
            raise
        if not answer:
            raise RuntimeError(f"the attached process has ended with {process.wait()} in {args}")
        code, out, err = json.loads(answer)
        return subprocess.CompletedProcess(args, code, out, err)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            stop(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment(), start_new_session=True,
            )  # fmt: skip
        return self._process


@contextlib.contextmanager
def _redirected(out: int, err: int) -> Iterator[None]:
    """Send what this process and its threads print to two files."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(out, 1)
    os.dup2(err, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


def _exit_code(command: Callable[[], None]) -> int:
    try:
        command()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(address: str) -> None:
    """Join the cluster as the program does, and run the commands that come in as lines of JSON."""
    from batch_inference.cli.app import main
    from batch_inference.pipeline.cluster import _join

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.chdir(HERE)
    _join(address)
    variables, path = dict(os.environ), list(sys.path)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with _redirected(out.fileno(), err.fileno()):
                arguments = json.loads(line)
                sys.argv = ["batch-inference", *arguments]
                # Given as an argument too, since without one this process would be the program, which forks.
                code = _exit_code(functools.partial(main, arguments))
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:] = path
        print(json.dumps([code, *texts]), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
