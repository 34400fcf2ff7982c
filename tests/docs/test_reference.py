"""The reference is fresh, and its table of error types is that of the places which raise them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

from batch_inference.error_types import ERROR_TYPES, EXCEPTION
from batch_inference.errors import STAGES
from batch_inference.storage.causes import STORE_CAUSES
from tests.support.documents import REPOSITORY

PACKAGE = REPOSITORY / "job" / "batch_inference"
_MAKERS = ("RowFailure", "RowError")


def _calls() -> list[tuple[str, ast.Call]]:
    """Return the calls that make a failed row, by name."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _MAKERS:
                found.append((ast.unparse(node.func), node))
    return found


def _assigned_in_sandbox() -> Iterator[str]:
    """Yield the error types that the sandbox assigns together with their messages."""
    for node in ast.walk(ast.parse((PACKAGE / "images" / "sandbox.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "(error_type, message)":
            assert isinstance(node.value, ast.Tuple) and isinstance(node.value.elts[0], ast.Constant)
            yield str(node.value.elts[0].value)


def _raised() -> set[tuple[str, str]]:
    found = set()
    for _, call in _calls():
        first = [arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant)]
        if len(first) == 2:
            found.add((first[0], first[1]))
        elif len(first) == 1 and first[0] == "preprocess":
            found.add(("preprocess", EXCEPTION))
    # In a variable, at the one place that raises them.
    found |= {("fetch", cause.error_type) for cause in STORE_CAUSES}
    found |= {("decode", error_type) for error_type in _assigned_in_sandbox()}
    return found | {("infer", "PREDICTOR_ERROR"), ("infer", "OUT_OF_MEMORY")}


def test_error_types_are_those_of_the_program() -> None:
    listed = [(error_type.stage, error_type.name) for error_type in ERROR_TYPES]
    assert len(set(listed)) == len(listed)
    assert set(listed) == _raised()
    order = [STAGES.index(error_type.stage) for error_type in ERROR_TYPES]
    assert order == sorted(order)


def test_retryable_is_what_the_program_says() -> None:
    said = {("fetch", cause.error_type): cause.retryable for cause in STORE_CAUSES}
    for name, call in _calls():
        given = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        if name == "RowFailure" and len(given) >= 2:
            keyword = next((k.value for k in call.keywords if k.arg == "retryable"), None)
            said[given[0], given[1]] = isinstance(keyword, ast.Constant) and keyword.value is True
    said["infer", "OUT_OF_MEMORY"] = True
    for one in ERROR_TYPES:
        assert one.retryable == said.get((one.stage, one.name), False), one


def test_reference_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
