from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import batch_inference
from batch_inference.errors import RowError, RowFailure, UserError
from batch_inference.system.subprocesses import (
    ChildProcess,
    Died,
    ForkServer,
    InputWanted,
    Limits,
    Raised,
    Returned,
    ServerEnded,
    TimedOut,
    Yielded,
    _Call,
    _ForkPipe,
    call,
)
from tests.support.child_functions import (
    TimersWhenReceived,
    echo,
    timers_of_call,
    timers_of_stream,
)
from tests.support.limits import HANG_S
from tests.support.waiting import wait_until

# The package of the checkout under test.
PACKAGE = Path(__file__).parents[3] / "job" / "batch_inference" / "__init__.py"
LIMITS = Limits(cpu_s=1, clock_s=30, memory_mib=256)
# The kernel may take as long as it likes.
LONG = Limits(cpu_s=1000, clock_s=2000, memory_mib=256)


class UnpicklableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def add(first: int, second: int) -> int:
    return first + second


def fail(name: str) -> None:
    errors: dict[str, Exception] = {
        "user": UserError("no such file", "Name another."),
        "row": RowError("decode", "CORRUPT", "the  file\nis damaged", True, "Convert it", "line 1"),
        "unpicklable": UnpicklableError(1, 2),
    }
    raise errors[name]


def die(how: str) -> None:
    print("on stdout", flush=True)
    print("before the end\n\n", file=sys.stderr, flush=True)
    if how == "exit":
        sys.exit("the last words")
    os.kill(os.getpid(), signal.SIGKILL)


def package_file() -> str:
    return str(batch_inference.__file__)


def talk() -> int:
    for _ in range(2000):
        print("x" * 1000)
    return len(sys.path)


def spawn_and_wait(file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(file).write_text(str(child.pid))
    child.wait()


def misbehave(how: str) -> int:
    if how == "compute":
        while True:
            pass
    if how == "sleep":
        time.sleep(600)
    if how == "memory":
        return len(bytes(1 << 30))
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(3)
    return os.getpid()


def doubled(count: int, take: Callable[[], int]) -> Iterator[int]:
    for _ in range(count):
        yield 2 * take()


def has_ended(pid: int) -> bool:
    try:
        return b"Z" in Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2][:3]
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def fork_server(function: Callable[..., Any], limits: Limits = LIMITS) -> Iterator[ForkServer[Any]]:
    server: ForkServer[Any] = ForkServer(function, limits)
    try:
        yield server
    finally:
        server.stop()


def test_call_returns_what_the_function_does() -> None:
    assert call(add, 1, 2, timeout_s=HANG_S) == Returned(3)


def test_tests_and_their_processes_import_the_checkout_under_test(tmp_path: Path) -> None:
    """Not the installed package, which may be that of another checkout."""
    assert Path(package_file()) == PACKAGE
    assert call(package_file, timeout_s=HANG_S) == Returned(str(PACKAGE))
    # In another folder, since Python imports from its own first.
    command = [sys.executable, "-c", "import batch_inference; print(batch_inference.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == PACKAGE


def test_exception_arrives_with_its_attributes() -> None:
    outcome = call(fail, "user", timeout_s=HANG_S)
    assert isinstance(outcome, Raised) and isinstance(outcome.error, UserError)
    assert (outcome.error.message, outcome.error.remedy) == ("no such file", "Name another.")
    outcome = call(fail, "row", timeout_s=HANG_S)
    assert isinstance(outcome, Raised) and isinstance(outcome.error, RowError)
    message = "the file is damaged. Convert it"
    assert outcome.error.error == RowFailure("decode", "CORRUPT", message, True, "line 1")
    assert (outcome.error.fact, outcome.error.remedy) == ("the file is damaged", "Convert it")


def test_exception_that_cannot_be_pickled_arrives_as_text() -> None:
    outcome = call(fail, "unpicklable", timeout_s=HANG_S)
    assert isinstance(outcome, Raised)
    assert str(outcome.error) == "UnpicklableError: 1 and 2"


def test_process_that_dies_leaves_its_exit_code_and_last_line() -> None:
    assert call(die, "exit", timeout_s=HANG_S) == Died(1, "the last words")
    killed = call(die, "kill", timeout_s=HANG_S)
    assert killed == Died(-signal.SIGKILL, "before the end")
    assert isinstance(killed, Died) and killed.signal == signal.SIGKILL


def test_much_output_does_not_block_the_process() -> None:
    assert call(talk, timeout_s=HANG_S) == Returned(len(sys.path))


def test_timeout_kills_all_processes_of_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pid"
    receive = ChildProcess.receive

    def once_there_are_two(self: ChildProcess[Any], timeout_s: float | None = None) -> Any:
        wait_until(lambda: file.exists() and bool(file.read_text()))
        return receive(self, timeout_s)

    monkeypatch.setattr(ChildProcess, "receive", once_there_are_two)
    assert call(spawn_and_wait, str(file), timeout_s=0.1) == TimedOut(0.1)
    wait_until(lambda: has_ended(int(file.read_text())))


def test_arguments_that_the_process_does_not_read_do_not_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are larger than a pipe holds."""
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert call(len, bytes(10 << 20), timeout_s=1) == TimedOut(1)


def test_process_answers_several_calls_and_ends_with_its_pipe() -> None:
    process = ChildProcess(add)
    for number in range(3):
        process.send(number, 1)
        assert process.receive(HANG_S) == Returned(number + 1)
    process.disconnect()
    assert process.stop(HANG_S) == 0
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [("crash", Died(-signal.SIGSEGV)), ("exit", Died(3)), ("compute", TimedOut(1, cpu=True)), ("sleep", TimedOut(2))],
)
def test_fork_that_dies_is_replaced(how: str, expected: Died | TimedOut) -> None:
    with fork_server(misbehave, Limits(1, 2 if how == "sleep" else 60, 256)) as server:
        server.send_call("no")
        first = server.receive()
        server.send_call(how)
        assert server.receive() == expected
        server.send_call("no")
        second = server.receive()
        assert isinstance(first, Returned) and isinstance(second, Returned) and first != second


def test_memory_limit_raises_memory_error() -> None:
    with fork_server(misbehave) as server:
        server.send_call("memory")
        outcome = server.receive()
        assert isinstance(outcome, Raised) and isinstance(outcome.error, MemoryError)


def test_stream_asks_for_its_input() -> None:
    with fork_server(doubled) as server:
        for _ in range(2):
            server.send_stream(pickle.dumps(2))
            for piece in (5, 7):
                assert server.receive() == InputWanted()
                server.send_input(piece)
                assert server.receive() == Yielded(2 * piece)
            assert server.receive() == Returned(None)


def test_time_limits_hold_while_a_call_runs_and_at_no_other_time() -> None:
    """Neither the caller's time between two calls counts, nor that in which it provides input or works on a value."""
    with fork_server(timers_of_call, LONG) as server:
        for _ in range(2):
            server.send_call(TimersWhenReceived())
            outcome = server.receive()
            assert isinstance(outcome, Returned)
            received, running = outcome.value
            assert received == (0, 0)
            assert min(running) > 0
    with fork_server(timers_of_stream, LONG) as server:
        server.send_stream(pickle.dumps(None))
        assert min(value_of(server.receive())) > 0
        assert server.receive() == InputWanted()
        server.send_input(TimersWhenReceived())
        waiting, running = value_of(server.receive())
        assert waiting == (0, 0)
        assert min(running) > 0
        assert server.receive() == Yielded((0, 0))
        assert min(value_of(server.receive())) > 0
        assert server.receive() == Returned(None)


def value_of(outcome: object) -> Any:
    assert isinstance(outcome, Yielded)
    return outcome.value


def test_fork_killed_in_the_middle_of_a_message_is_not_replaced() -> None:
    """Another one would take the rest, bytes of an untrusted image, for a message, and unpickle it."""
    with fork_server(echo, LONG) as server:
        server.send_call("whole")
        assert server.receive() == Returned("whole")
        pipe = server._connection.fileno()
        image = pickle.dumps(_Call("forged"))
        rest = struct.pack("!i", len(image)) + image
        os.write(pipe, struct.pack("!i", 1000 + len(rest)) + bytes(1000))
        while bytes_in(pipe, termios.TIOCOUTQ):
            time.sleep(0.01)  # until the fork has read it
        kill_fork_of(server)
        with contextlib.suppress(ConnectionError):
            os.write(pipe, rest)
        assert server.receive() == ServerEnded(0)


def test_fork_killed_in_the_middle_of_an_answer_is_not_replaced() -> None:
    with fork_server(echo, LONG) as server:
        server.send_call(bytes(10 << 20))  # more than the pipe holds
        while not bytes_in(server._connection.fileno(), termios.FIONREAD):
            time.sleep(0.01)  # until the fork has begun to answer
        kill_fork_of(server)
        assert server.receive() == ServerEnded(0)


def bytes_in(pipe: int, direction: int) -> int:
    """Return how many bytes in a pipe have not been read, by this side or by the other."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, direction, bytes(4)))[0])


def kill_fork_of(server: ForkServer[Any]) -> None:
    (fork,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    os.kill(int(fork), signal.SIGKILL)
    wait_until(lambda: has_ended(int(fork)))


def test_message_that_cannot_be_received_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes next in the pipe is the rest of it."""
    sent: list[bytes] = []
    received: Iterator[Exception | bytes] = iter([MemoryError(), pickle.dumps("the rest")])

    class Full:
        def recv_bytes(self) -> bytes:
            data = next(received)
            if isinstance(data, Exception):
                raise data
            return data

        def send_bytes(self, data: bytes) -> None:
            sent.append(data)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as caught:
        _ForkPipe(Full()).receive()  # type: ignore[arg-type]
    assert caught.value.code == 0
    (answer,) = map(pickle.loads, sent)
    assert isinstance(answer, Raised) and isinstance(answer.error, MemoryError)
    assert len(list(received)) == 1


def test_server_that_ends_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with fork_server(misbehave) as server:
        server.send_call("no")
        assert server.receive() == ServerEnded(1)
