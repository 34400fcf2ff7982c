"""Run tests in forked processes; requests and answers are lines of JSON.

A worker is started inside a copy of the checkout, so that a mutant is written to a file of the copy, where the processes that tests
start find it as well. There are two kinds:

* ``fresh``: everything is imported but the package and the tests, which each process imports by itself.
* ``ready``: pytest has collected all tests. A mutant of a function becomes the code of that function in the process that runs the
  tests; this is ten times as fast.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.mutants.plugin import Lines, Reporter, Settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "job" / "batch_inference"
# A mutant may allocate without end.
MEMORY_BYTES = 6 * 2**30
# A test is taken to hang after this much CPU time, or this multiple of the time it takes without a mutation; one that waits after
# ten times as much by the clock, since the machine may be busy.
PATIENCE_S, PATIENCE_FACTOR = float(os.environ.get("MUTANTS_PATIENCE_S", "10")), 5.0
WAITING_FACTOR = 10.0


class Patience:
    """Tells when a test hangs.

    Args:
        pid: The process that runs the tests.
        seconds: Time of each test without a mutation; None: it never hangs.
    """

    def __init__(self, pid: int, seconds: dict[str, float] | None) -> None:
        self._pid, self._seconds = pid, seconds
        self.begin("import")

    def begin(self, test: str) -> None:
        """Note that a test begins."""
        self.test, self._begun = test, time.monotonic()
        # Asked for once the test is slow: looking for the processes takes longer than most tests.
        self._used: float | None = None

    def _cpu_s(self) -> float:
        """Return the CPU time of the process and of those below it."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    total += times.user + times.system
        return total

    @property
    def over(self) -> bool:
        """Whether the test hangs."""
        if self._seconds is None:
            return False
        used = self._cpu_s()
        self._used = used if self._used is None else self._used
        limit_s = PATIENCE_S + PATIENCE_FACTOR * self._seconds.get(self.test, 0.0)
        return used - self._used > limit_s or time.monotonic() - self._begun > WAITING_FACTOR * limit_s


# What the processes of the tests inherit.
TEMPORARY = ROOT / "tmp"
ENVIRONMENT = {
    "TMPDIR": str(TEMPORARY),
    "PYTHONPATH": str(ROOT / "job"),
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
PR_SET_CHILD_SUBREAPER = 36
PARENT = os.getppid()
WORDS = [
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--assert=plain",
    "-q",
    "-s",
    "--basetemp",
    str(ROOT / "tmp/pytest"),
]


def preload() -> None:
    """Import what the package and the tests import from elsewhere, once for all processes."""
    from _pytest.config import default_plugins

    names = {f"_pytest.{name}" for name in default_plugins} | {"pytest_timeout", "hypothesis.stateful"}
    for file in (
        *PACKAGE.rglob("*.py"),
        *(ROOT / "tests" / "support").glob("*.py"),
        *(ROOT / "tests/unit").rglob("*.py"),
    ):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    for name in sorted(names):
        if name.partition(".")[0] not in ("batch_inference", "tests"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run(call: Callable[[int], int], seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """Run tests in a process of their own, by a function that gets a pipe; return how it ended, and what it told."""
    shutil.rmtree(TEMPORARY, ignore_errors=True)
    TEMPORARY.mkdir()
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        _child(call, theirs)
    os.close(theirs)
    answer: dict[str, Any] = {"events": [], "failed": None, "message": "", "timed_out": None}
    try:
        _listen(ours, pid, answer, Patience(pid, seconds))
    finally:
        os.close(ours)
        kill_children()
    ended = any("end" in event for event in answer["events"])
    if not ended and not answer["failed"] and not answer["timed_out"]:
        answer |= {"failed": "the process died", "message": (ROOT / "log").read_text(errors="replace")[-1000:]}
    return answer


def _listen(pipe: int, pid: int, answer: dict[str, Any], patience: Patience) -> None:
    """Take the events of a process until it ends, or has run one test for too long."""
    left = b""
    while True:
        if os.getppid() != PARENT:
            # Nobody waits for an answer.
            kill_children()
            os._exit(1)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if not select.select([pipe], [], [], 1.0)[0]:
            # Its own children may keep the pipe open.
            if ended:
                return
            if patience.over:
                answer["timed_out"] = patience.test
                return
            continue
        data = os.read(pipe, 1 << 16)
        *lines, left = (left + data).split(b"\n")
        for event in map(json.loads, lines):
            if "failed" in event:
                answer["failed"] = answer["failed"] or event["failed"]
                answer["message"] = answer["message"] or event["message"]
            elif "begun" in event:
                patience.begin(event["begun"])
            answer["events"].append(event)
        if not data or (answer["events"] and "end" in answer["events"][-1]):
            return


def kill_children() -> None:
    """End all processes that come from here, those included that have left their parent."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _child(call: Callable[[int], int], pipe: int) -> None:
    """Run the tests in this process, which never returns."""
    try:
        log = os.open(ROOT / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(log, standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = call(pipe)
        os.write(pipe, json.dumps({"end": code}).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


# --- fresh processes ---


def learn(request: dict[str, Any], pipe: int) -> int:
    """Run a file of tests without a mutation; tell which lines each test runs."""
    lines = Lines({str(PACKAGE / module): module for module in request["modules"]})
    return int(pytest.main([*request["files"], *WORDS], [Reporter(pipe, None, lines)]))


def imported(request: dict[str, Any], pipe: int) -> int:
    """Import the package with a mutant, then run the tests."""
    files = sorted({name.partition("::")[0] for name in request["order"]})
    return int(pytest.main([*files, *WORDS], [Reporter(pipe, request["order"])]))


# --- processes in which all tests are collected ---


class Server:
    """A plugin of pytest that answers requests once the tests are collected, instead of running them."""

    def __init__(self, requests: Iterator[dict[str, Any]], answer: Callable[[dict[str, Any]], None]) -> None:
        self._requests = requests
        self._answer = answer

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Answer requests until there are no more."""
        gc.collect()
        gc.freeze()
        items = list(session.items)
        for request in self._requests:
            self._answer(with_mutant(request, partial(_patched, session, items, request)))
        return True


def _patched(session: pytest.Session, items: list[pytest.Item], request: dict[str, Any], pipe: int) -> int:
    """Change a function in this process, then run tests that are collected already."""
    if not replace_code(request["module"], request["function"], request["source"]):
        os.write(pipe, json.dumps({"unpatched": True}).encode() + b"\n")
        return 0
    reporter = Reporter(pipe, request["order"])
    session.config.pluginmanager.register(reporter)
    reporter.pytest_collection_modifyitems(items)
    session.items = items
    for index, item in enumerate(items):
        after = items[index + 1] if index + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
    return 0


def replace_code(module: str, function: str, source: str) -> bool:
    """Give a function of an imported module the code of a mutant; return False if that cannot be."""
    imported_module = sys.modules.get("batch_inference." + module.removesuffix(".py").replace("/", "."))
    if not function or imported_module is None:
        return False
    code = compile(source, str(PACKAGE / module), "exec", dont_inherit=True)
    found: Any = imported_module
    for name in function.split("."):
        found = vars(found).get(name)
        inner = [const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name]
        if len(inner) != 1:
            return False
        (code,) = inner
        if not isinstance(found, type):
            break
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    if not isinstance(found, FunctionType) or found.__code__.co_freevars != code.co_freevars:
        return False
    if hasattr(found, "__wrapped__"):
        return False
    found.__code__ = code
    return True


# --- requests ---


def with_mutant(request: dict[str, Any], call: Callable[[int], int]) -> dict[str, Any]:
    """Run tests while a mutant is in the file of its module."""
    file = PACKAGE / request["module"]
    original = file.read_bytes()
    file.write_text(request["source"], encoding="utf-8")
    try:
        answer = run(call, request["seconds"])
    finally:
        file.write_bytes(original)
    answer["unpatched"] = any("unpatched" in event for event in answer["events"])
    del answer["events"]
    return answer


def main(kind: str, files: list[str]) -> None:
    """Answer requests until there are no more."""
    os.chdir(ROOT)
    TEMPORARY.mkdir(exist_ok=True)
    os.environ |= ENVIRONMENT
    tempfile.tempdir = None
    sys.path[:] = [str(ROOT), ENVIRONMENT["PYTHONPATH"], *(p for p in sys.path if p not in ("", str(ROOT)))]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests = map(json.loads, os.fdopen(os.dup(0)))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if kind == "ready":
        os.dup2(os.open(ROOT / "ready.log", os.O_WRONLY | os.O_CREAT), 1)
        # Collecting registers no reporter, so that hypothesis gets its settings here.
        pytest.main([*files, *WORDS], [Settings(), Server(requests, send)])
        return
    preload()
    for request in requests:
        if "modules" in request:
            send(run(partial(learn, request)))
        else:
            send(with_mutant(request, partial(imported, request)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    # Some libraries complain at the end of a process that was forked so often.
    os._exit(0)
