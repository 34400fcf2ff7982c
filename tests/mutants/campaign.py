"""Learn which tests run which lines, then run them against mutants, in copies of the checkout."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.operators import Mutant, mutants_of

# Parts of a checkout that are copied; all others are linked to.
COPIED = ("job", "tests", "pyproject.toml")
LEFT_OUT = (".git", ".venv", "build", "dist")


@dataclass(frozen=True)
class Tree:
    """A checkout: the modules to change, and the tests of their wings.

    Attributes:
        root: Its folder.
        modules: Paths below the package.
    """

    root: Path
    modules: Sequence[str]

    def source(self, module: str) -> str:
        """Return the text of a module."""
        return (self.root / "job/batch_inference" / module).read_text(encoding="utf-8")

    def mutants(self, module: str) -> list[Mutant]:
        """Return the mutants of a module."""
        return mutants_of(module, self.source(module))

    def test_files(self, modules: Sequence[str]) -> list[str]:
        """Return the unit tests of all wings with a module to change that can reach one of some modules, the longest file first."""
        wings = {module.partition("/")[0] for module in self.modules}
        files = [file for wing in wings for file in (self.root / "tests/unit" / wing).glob("test_*.py")]
        wanted = {self.root / "job/batch_inference" / module for module in modules}
        imports: dict[Path, set[Path]] = {}
        return [
            str(file.relative_to(self.root))
            for file in sorted(files, key=lambda file: (-file.stat().st_size, file))
            if wanted & self._reached([file], imports)
        ]

    def digests(self, files: Iterable[str]) -> dict[str, str]:
        """Return for each file of tests a hash of all that its tests can reach."""
        imports: dict[Path, set[Path]] = {}
        found = {}
        for name in files:
            roots = [self.root / name, *(self.root / part for part in ("tests/conftest.py", "tests/mutants/plugin.py"))]
            digest = hashlib.sha256()
            for file in sorted({root for root in roots if root.exists()} | self._reached(roots, imports)):
                digest.update(f"{file.relative_to(self.root)} ".encode() + hashlib.sha256(file.read_bytes()).digest())
            found[name] = digest.hexdigest()
        return found

    def _reached(self, files: list[Path], imports: dict[Path, set[Path]]) -> set[Path]:
        """Return what files import, directly or not; ``imports`` keeps what is known already."""
        reached: set[Path] = set()
        waiting = [file for file in files if file.exists()]
        while waiting:
            current = waiting.pop()
            if current not in imports:
                imports[current] = self._imports(current)
            for found in imports[current] - reached:
                reached.add(found)
                waiting.append(found)
        return reached

    def _imports(self, file: Path) -> set[Path]:
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        roots = (self.root / "job", self.root)
        paths = [
            root / f"{name.replace('.', '/')}{end}"
            for name in names
            for root in roots
            for end in (".py", "/__init__.py")
        ]
        return {path for path in paths if path.is_file()}

    def copy(self, target: Path) -> None:
        """Copy the checkout."""
        target.mkdir()
        for path in self.root.iterdir():
            if path.name in COPIED and path.is_dir():
                shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.name in COPIED:
                shutil.copy(path, target / path.name)
            elif path.name not in LEFT_OUT:
                (target / path.name).symlink_to(path.resolve())
        subprocess.run([sys.executable, "-m", "compileall", "-q", "job", "tests"], cwd=target, check=False)
        for module in self.modules:
            for stale in (target / "job/batch_inference" / module).parent.glob(
                f"__pycache__/{Path(module).stem}.*.pyc"
            ):
                stale.unlink()


@dataclass
class Outcome:
    """The result of a mutant.

    Attributes:
        mutant: It.
        status: ``killed``, ``timed out``, ``survived`` or ``uncovered``.
        by: The test that noticed it.
        message: The end of what that test says.
        tests: Number of tests that run its line.
    """

    mutant: Mutant
    status: str
    by: str = ""
    message: str = ""
    tests: int = 0


@dataclass
class Knowledge:
    """What is known of the tests.

    Attributes:
        seconds: Time of each test that passes.
        lines: For each module and line, the tests that run it.
        functions: For each module, the tests that run any of its lines.
        digests: For each file of tests, a hash of all that it can reach.
        failing: Tests that fail without a mutation.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    functions: dict[str, set[str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)

    def add(self, answer: dict[str, Any]) -> None:
        """Take the answer of a worker to a file of tests without a mutation."""
        failed = {e["failed"]: e["message"] for e in answer["events"] if "failed" in e}
        self.failing |= failed
        for event in answer["events"]:
            if "seconds" in event and event["test"] not in failed:
                self.seconds[event["test"]] = self.seconds.get(event["test"], 0.0) + event["seconds"]
        skipped = {e["test"] for e in answer["events"] if e.get("outcome") == "skipped"} | set(failed)
        for event in answer["events"]:
            if "lines" in event and event["test"] not in skipped:
                for module, line in event["lines"]:
                    self.functions.setdefault(module, set()).add(event["test"])
                    self.lines.setdefault(module, {}).setdefault(line, set()).add(event["test"])

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the line of a mutant: those of the module's wing, then the others; each the quickest first."""
        lines = self.lines.get(mutant.module, {})
        tests = set().union(*(lines.get(number, set()) for number in mutant.lines))
        if not mutant.function and not tests:
            # Other modules may use it.
            tests = self.functions.get(mutant.module, set())
        ordered = sorted(tests, key=lambda test: (self.seconds[test], test))
        own = f"tests/unit/{mutant.module.partition('/')[0]}/"
        return sorted(ordered, key=lambda test: not test.startswith(own))


class Worker:
    """A process in a copy of the checkout that answers requests: see tests/mutants/worker.py for its kinds."""

    def __init__(self, root: Path, kind: str, files: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.worker", kind, *files],
            cwd=root,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root / "job"), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; return its answer."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


class Copy:
    """A copy of the checkout with its workers, which are started when they are needed.

    Args:
        tree: The checkout.
        root: Where the copy is made.
        files: The tests.
    """

    def __init__(self, tree: Tree, root: Path, files: list[str]) -> None:
        self._files = files
        self.root = root
        tree.copy(root)
        self._workers: dict[str, Worker] = {}

    def ask(self, kind: str, **request: Any) -> dict[str, Any]:
        """Ask a worker of a kind."""
        if kind not in self._workers:
            self._workers[kind] = Worker(self.root, kind, self._files if kind == "ready" else ())
        return self._workers[kind].ask(**request)

    def try_mutant(self, mutant: Mutant, tests: list[str], seconds: dict[str, float]) -> dict[str, Any]:
        """Run tests against a mutant until one fails."""
        request: dict[str, Any] = {
            "module": mutant.module,
            "function": mutant.function,
            "source": mutant.source,
            "order": tests,
        }
        request["seconds"] = {test: seconds[test] for test in tests}
        answer = self.ask("ready", **request) if mutant.function else {"unpatched": True}
        if not answer["unpatched"]:
            return answer
        # Each process imports the tests, so that those that are likely to notice go first, by themselves.
        own = f"tests/unit/{mutant.module.partition('/')[0]}/"
        for group in ([t for t in tests if t.startswith(own)], [t for t in tests if not t.startswith(own)]):
            if group:
                answer = self.ask("fresh", **request | {"order": group})
                if answer["failed"] or answer["timed_out"]:
                    break
        return answer

    def stop(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.stop()


class Campaign:
    """Runs tests in several workers at a time; a context manager.

    Args:
        tree: The checkout.
        modules: Those that are changed, of the tree's.
        folder: Where results are kept.
        jobs: Number of workers.
        fresh: Whether kept results are ignored.
    """

    def __init__(self, tree: Tree, modules: Sequence[str], folder: Path, jobs: int, *, fresh: bool = False) -> None:
        self._files = tree.test_files(modules)
        self._tree, self._jobs, self._fresh = tree, jobs, fresh
        self._cache = folder / "cache"
        self._cache.mkdir(parents=True, exist_ok=True)
        self.knowledge = Knowledge()
        self._copies: list[Copy] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="mutants-")
        # Some tests become another user.
        Path(self._temporary.name).chmod(0o755)

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *args: object) -> None:
        for copy in self._copies:
            copy.stop()
        self._temporary.cleanup()

    def _each(self, tasks: list[Any], call: Any) -> None:
        """Call ``call(copy, task)`` for all tasks, each copy one at a time."""
        while tasks and len(self._copies) < self._jobs:
            self._copies.append(Copy(self._tree, Path(self._temporary.name) / str(len(self._copies)), self._files))
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        failures: list[BaseException] = []

        def work(copy: Copy) -> None:
            try:
                while not failures:
                    call(copy, waiting.get_nowait())
            except queue.Empty:
                pass
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=[copy], daemon=True) for copy in self._copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _kept(self, name: str, *parts: str) -> tuple[Path, Any]:
        """Return where a result is kept, and what is there."""
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        path = self._cache / f"{name}-{digest}.json"
        return path, json.loads(path.read_text()) if path.exists() and not self._fresh else None

    def learn(self) -> None:
        """Run all tests without a mutation."""
        begun = time.monotonic()
        tasks = []
        self.knowledge.digests = self._tree.digests(self._files)
        for file in self._files:
            path, kept = self._kept("tests", file, self.knowledge.digests[file], *self._tree.modules)
            if kept is None:
                tasks.append((file, path))
            else:
                self.knowledge.add(kept)

        def learn_file(copy: Copy, task: tuple[str, Path]) -> None:
            file, path = task
            answer = copy.ask("fresh", files=[file], modules=list(self._tree.modules))
            if not any("end" in event for event in answer["events"]):
                raise RuntimeError(f"{file} does not run: {answer['message']}")
            self.knowledge.add(answer)
            if not answer["failed"]:
                path.write_text(json.dumps(answer))

        self._each(tasks, learn_file)
        known = self.knowledge
        assert known.seconds, "no test has passed"
        print(
            f"{len(known.seconds)} tests take {sum(known.seconds.values()):.0f} s without a mutation "
            f"({time.monotonic() - begun:.0f} s now)",
            flush=True,
        )
        for test, message in known.failing.items():
            print(f"left out, since it fails without a mutation: {test}\n{message}", flush=True)

    def run(self, mutants: list[Mutant], until: float = math.inf) -> list[Outcome]:
        """Run the tests of each mutant; return the outcomes in the same order, without those not begun ``until`` then."""
        outcomes: dict[int, Outcome] = {}
        tasks = []
        for index, mutant in enumerate(mutants):
            tests = self.knowledge.tests_of(mutant)
            path, kept = self._kept("mutant", mutant.module, mutant.source)
            if not tests:
                outcomes[index] = Outcome(mutant, "uncovered")
            elif kept is not None and self._holds(kept, tests):
                outcomes[index] = Outcome(mutant, *kept["outcome"])
            else:
                tasks.append((index, mutant, tests, path))
        # What was run before comes first, and slow ones last; otherwise by chance, so that the first are a fair sample.
        tasks.sort(key=lambda task: (not task[3].exists(), not task[1].function, task[3].name))
        print(f"{len(mutants)} mutants, {len(tasks)} of them to be run", flush=True)
        begun = time.monotonic()

        def run_one(copy: Copy, task: tuple[int, Mutant, list[str], Path]) -> None:
            index, mutant, tests, path = task
            if time.monotonic() > until:
                return
            outcomes[index] = outcome = self._run_one(copy, mutant, tests)
            kept = {"tests": self._digests(tests), "outcome": [*asdict(outcome).values()][1:]}
            path.write_text(json.dumps(kept))
            done = len(outcomes) - (len(mutants) - len(tasks))
            if outcome.status == "survived" or done % 50 == 0:
                print(
                    f"[{done}/{len(tasks)}, {time.monotonic() - begun:.0f} s] {outcome.status}: "
                    f"{mutant.module}:{mutant.line} {mutant.after}",
                    flush=True,
                )

        self._each(tasks, run_one)
        return [outcomes[index] for index in sorted(outcomes)]

    def _run_one(self, copy: Copy, mutant: Mutant, tests: list[str]) -> Outcome:
        compile(mutant.source, mutant.module, "exec", dont_inherit=True)
        answer = copy.try_mutant(mutant, tests, self.knowledge.seconds)
        if answer["timed_out"]:
            return Outcome(mutant, "timed out", answer["timed_out"], "", len(tests))
        if answer["failed"]:
            return Outcome(mutant, "killed", answer["failed"], answer["message"], len(tests))
        return Outcome(mutant, "survived", tests=len(tests))

    def _digests(self, tests: list[str]) -> dict[str, str]:
        return {file: self.knowledge.digests[file] for file in {test.partition("::")[0] for test in tests}}

    def _holds(self, kept: dict[str, Any], tests: list[str]) -> bool:
        """Return whether a kept outcome is what another run would give: the test that noticed is as it was, or all are."""
        now, by = self._digests(tests), kept["outcome"][1].partition("::")[0]
        if kept["outcome"][0] == "survived":
            return bool(kept["tests"] == now)
        return by in now and kept["tests"].get(by) == now[by]
