"""The tests that a change can affect, for `make test CHANGED=1`.

Files are connected by the imports in them, and by the modules, programs and paths that their strings name: half of the tests
start something (`batch-inference`, `python -m batch_inference`, `helm/generate.py`) or read a document. A test is chosen if it
reaches a changed file. Rules add what no file names. In doubt, too much is chosen.

Libraries see less. pytest-testmon needs the database of an earlier run, and traces Python that runs in pytest's process: no
program that a test starts, no Ray worker, no chart, no document. pytest-picked runs the test files that changed, and no others.
grimp, which comes with import-linter, finds imports between packages but nothing in strings, and is not there before `.venv` is.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tiers.figures import REPOSITORY, TIERS

# Files that every test depends on.
EVERYTHING = re.compile(r"Makefile|pyproject\.toml|requirements(-dev)?\.lock|tests/conftest\.py|\.ci/.*")
PACKAGE = "job/batch_inference"
TESTS_OF_TOOLS = ("tests/unit/project/test_tiers.py", "tests/unit/project/test_mutants.py")
# Modules that the commands of pods run before the job itself.
POD_COMMANDS = ("__main__.py", "environment.py", "cli/", "kubernetes/", "preflight/")


@dataclass(frozen=True)
class Rule:
    """Tests that depend on files without naming them.

    Attributes:
        files: The files, as a regular expression.
        tests: The tests, as a regular expression.
        why: Why, after "because".
    """

    files: str
    tests: str
    why: str


RULES = (
    Rule(r".*", r"tests/.*/test_house\.py", "it reads all files"),
    Rule(r".*\.md", r"tests/docs/.*", "they read all documents"),
    Rule(r"(helm|k8s)/.*", r"tests/docs/.*", "documents name values of the charts"),
    Rule(r"helm/.*", r"tests/charts/.*", "the charts changed"),
    Rule(r"k8s/.*", r"tests/charts/.*", "manifests beside the charts changed"),
    Rule(rf"{PACKAGE}/kubernetes/(capacity\.py|presets/.*)", r"tests/charts/.*", "the charts compute the same sizes"),
    Rule(r"docker/kind/.*", r"tests/charts/.*", "they run programs that are pinned there"),
    Rule(r"docker/kind/.*|\.github/.*", r"tests/.*/test_workflows\.py", "it lints the workflows"),
    Rule(r"(docker|helm|k8s)/.*", r"tests/e2e/.*", "the cluster runs the image and the charts"),
    Rule(r"tests/e2e/(?!test_).*", r"tests/e2e/.*", "helpers of the cluster changed"),
    Rule(r"tests/(poison|support/azurite)/.*", r"tests/job/.*", "whole jobs meet these decoders and stores"),
    Rule(rf"{PACKAGE}/({'|'.join(map(re.escape, POD_COMMANDS))}).*", r"tests/e2e/.*", "pods run these commands"),
)


@dataclass(frozen=True)
class Choice:
    """What a tier runs.

    Attributes:
        tests: Files or folders, for pytest; None for nothing, empty for all of the tier.
        why: The reason, as one line.
    """

    tests: tuple[str, ...] | None
    why: str


def changed_files(repository: Path = REPOSITORY) -> tuple[list[str], str]:
    """Return the files that differ from the merge base with main, or on main itself from the last commit but one; and that base."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(repository), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    main = next((name for name in ("origin/main", "main") if git("rev-parse", "--verify", "--quiet", name)), "HEAD")
    base, what = git("merge-base", "HEAD", main) or "HEAD", f"the merge base with {main}"
    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    # Without --no-renames a moved file would be named by its new path only.
    files = git("diff", "--name-only", "--no-renames", base).splitlines() + untracked
    if not files and base == git("rev-parse", "HEAD"):
        base, what = "HEAD~1", "the commit before the last"
        files = git("diff", "--name-only", "--no-renames", base).splitlines()
    return sorted(set(files)), f"{what} ({git('rev-parse', '--short', base)})"


class Graph:
    """Which files use which.

    Args:
        repository: The checkout.
    """

    def __init__(self, repository: Path = REPOSITORY) -> None:
        listed = ("git", "-C", str(repository), "ls-files", "--cached", "--others", "--exclude-standard")
        lines = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
        self.files = sorted({name for name in lines if (repository / name).is_file()})
        self._modules = {_module(name): name for name in self.files if name.endswith(".py")}
        self._folders = {str(folder) for name in self.files for folder in Path(name).parents} - {"."}
        self.users: dict[str, set[str]] = {}
        for name in self._modules.values():
            for used in self._used(name, ast.parse((repository / name).read_text(encoding="utf-8"))):
                self.users.setdefault(used, set()).add(name)

    def _used(self, name: str, tree: ast.Module) -> Iterator[str]:
        nodes = list(ast.walk(tree))
        # The package's own strings are messages, and the files that these tools name are examples or all there are.
        silent = name.startswith((f"{PACKAGE}/", "tests/tiers/", "tests/mutants/")) or name in TESTS_OF_TOOLS
        comments = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from self._of_modules(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield from self._of_modules([inner if inner in self._modules else node.module])
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and not silent
                and id(node) not in comments
            ):
                yield from self._of_text(node.value)
        # What jobs do is the tier job's affair; a cluster's tests are about how pods start them (see RULES).
        if not name.startswith("tests/e2e/") and _starts_program(nodes):
            yield f"{PACKAGE}/__main__.py"
        if _is_test(name):
            yield from (f"{folder}/conftest.py" for folder in Path(name).parents)

    def _of_modules(self, names: Iterable[str]) -> Iterator[str]:
        # Not the packages that they are in: what an __init__.py imports for others is not used by these.
        yield from (self._modules[name] for name in names if name in self._modules)

    def _of_text(self, text: str) -> Iterator[str]:
        for name in re.findall(r"\b(?:batch_inference|tests)(?:\.\w+)+", text):
            # The last word may be a name in the module.
            yield from self._of_modules([name, name.rpartition(".")[0], f"{name}.__main__"])
        for path in re.findall(r"[\w.-]+(?:/[\w.-]+)+|[\w-]+\.md", text):
            if path in self._folders and path != PACKAGE:
                yield from (file for file in self.files if file.startswith(f"{path}/"))
            yield path

    def neighbors(self, name: str) -> Iterator[str]:
        """Yield the modules beside a file that affects them without an import: data, a module that is gone, or __init__.py."""
        folder = next((path for path in Path(name).parents if f"{path}/__init__.py" in self.files), None)
        imported = name in self._modules.values() and not name.endswith("/__init__.py")
        if name.startswith(f"{PACKAGE}/") and not imported:
            yield from (file for file in self._modules.values() if Path(file).parent == folder)

    def affected(self, changed: Iterable[str]) -> dict[str, str]:
        """Map each file that a change reaches to the changed file that it is reached from."""
        reached = {name: name for name in changed}
        reached |= {near: name for name in list(reached) for near in self.neighbors(name) if near not in reached}
        queue = list(reached)
        while queue:
            name = queue.pop()
            for user in sorted(self.users.get(name, ())):
                if user not in reached:
                    reached[user] = reached[name]
                    queue.append(user)
        return reached


def _module(name: str) -> str:
    parts = Path(name.removeprefix("job/")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _starts_program(nodes: Iterable[ast.AST]) -> bool:
    """Say whether a module names the program as one to start: after a folder, or after -m."""
    for node in nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            words = [node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "with_name":
            words = node.args
        elif isinstance(node, (ast.List, ast.Tuple)):
            words = [word for flag, word in itertools.pairwise(node.elts) if _constant(flag) == "-m"]
        else:
            continue
        if {"batch-inference", "batch_inference"} & {_constant(word) for word in words}:
            return True
    return False


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _is_test(name: str) -> bool:
    return Path(name).name.startswith("test_") and name.endswith(".py")


def _fixtures(name: str, files: Collection[str]) -> str | None:
    """Return the folder whose tests may use a file that lies among tests, if none of them names it."""
    if not name.startswith("tests/") or name.endswith(".md"):
        return None
    for folder in map(str, list(Path(name).parents)[:-2]):
        if any(file.startswith(f"{folder}/") and _is_test(file) for file in files):
            return folder
    return None


def choose(changed: Collection[str], graph: Graph | None = None) -> dict[str, Choice]:
    """Return what each tier runs for a change."""
    names = [tier.name for tier in TIERS]
    if not changed:
        return {name: Choice(None, "nothing changed") for name in names}
    for name in sorted(changed):
        if EVERYTHING.fullmatch(name):
            return {tier: Choice((), f"{name} changed") for tier in names}
    graph = graph or Graph()
    reached = graph.affected(changed)
    reasons = {name: f"{origin} changed" for name, origin in reached.items() if _is_test(name) and name in graph.files}
    wholes = [(rule.tests, rule.why) for rule in RULES if any(re.fullmatch(rule.files, name) for name in changed)]
    for name in sorted(changed):
        folder = _fixtures(name, graph.files)
        if folder and not any(reached[test] == name for test in reasons if test.startswith(f"{folder}/")):
            wholes.append((f"{folder}/.*", f"{name} changed"))
    for where, why in wholes:
        for file in graph.files:
            if _is_test(file) and re.fullmatch(where, file):
                reasons.setdefault(file, why)
    chosen = {"setup": Choice((), "the tools"), "lint": Choice((), "every change")}
    for tier in TIERS:
        if tier.folders:
            chosen[tier.name] = _choice(tier.folders, graph.files, reasons)
    return chosen


def _choice(folders: tuple[str, ...], files: Collection[str], reasons: dict[str, str]) -> Choice:
    tests = [file for file in files if _is_test(file) and file.startswith(tuple(f"{folder}/" for folder in folders))]
    picked = [file for file in tests if file in reasons]
    if not picked:
        return Choice(None, "no test of it uses what changed")
    why = list(dict.fromkeys(reasons[file] for file in picked))
    text = "; ".join(why[:3]) + (f"; and {len(why) - 3} more reasons" if len(why) > 3 else "")
    count = f"all {len(tests)}" if len(picked) == len(tests) else f"{len(picked)} of {len(tests)}"
    return Choice(() if len(picked) == len(tests) else tuple(picked), f"{count} files: {text}")
