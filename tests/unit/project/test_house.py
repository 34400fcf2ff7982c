"""The layout and the words that CONTRIBUTING.md and docs/internals/architecture.md promise."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGE = REPOSITORY / "job" / "batch_inference"
TESTS = REPOSITORY / "tests"
GROUND = {"__init__", "__main__", "config", "environment", "error_types", "errors", "text", "version"}
# Words that have plainer ones: fix, again or from scratch, someone who, untrusted.
WORDS = re.compile(r"\b(mend(s|ed|ing)?|anew|who" + r"ever|strang" + r"ers?)\b", re.IGNORECASE)
BEGINNINGS = re.compile(r"(What|The same|Who" + r"ever)\b")
# Options are a table, of which each line is one option.
TABLES_OF_OPTIONS = {"run", "plan", "preflight", "retry", "submit"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def lines_of(node: ast.FunctionDef | ast.ClassDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def test_top_folder_has_what_every_wing_may_know_only() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == GROUND


def test_functions_and_classes_are_short() -> None:
    long = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and lines_of(node) > 60:
                if name.startswith("cli/") and node.name in TABLES_OF_OPTIONS:
                    continue
                long.append(f"{name}:{node.lineno} {node.name}: {lines_of(node)} lines, at most 60")
            if isinstance(node, ast.ClassDef) and lines_of(node) > 250:
                long.append(f"{name}:{node.lineno} {node.name}: {lines_of(node)} lines, at most 250")
    assert long == []


def test_wings_say_what_lives_there_and_what_does_not() -> None:
    for file in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        assert len(re.findall(r"\.(?=\s|$)", docstring)) == 2, f"{file}: two sentences"


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node) or ""
                assert not BEGINNINGS.match(docstring), f"{name}: {docstring.splitlines()[0]}"


def test_words_that_need_a_second_reading_are_nowhere() -> None:
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    lines = []
    for name in listed.splitlines():
        file = REPOSITORY / name
        if (
            file.suffix not in (".py", ".md", ".yaml", ".tpl", ".txt", ".html", ".toml", ".json", "")
            or not file.is_file()
        ):
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if WORDS.search(line) and file != Path(__file__):
                lines.append(f"{name}:{number}: {line.strip()[:100]}")
    assert lines == []


def imports() -> Iterator[tuple[Path, ast.ImportFrom]]:
    for file in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                yield file, node


def test_no_test_module_is_imported_by_another() -> None:
    for file, node in imports():
        names = [(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)]
        if (node.module or "").startswith("tests"):
            assert not [name for name in names if re.match(r"test_\w+$", name)], f"{file}:{node.lineno}"


def test_tests_import_by_absolute_names() -> None:
    for file, node in imports():
        assert node.level == 0, f"{file}:{node.lineno}"


@pytest.mark.parametrize("wing", sorted(folder.parent.name for folder in PACKAGE.glob("*/__init__.py")))
def test_each_wing_has_its_tests(wing: str) -> None:
    assert list((TESTS / "unit" / wing).glob("test_*.py"))
