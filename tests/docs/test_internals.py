"""The documents for people who change the program name modules, functions and wings that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.documents import REPOSITORY, documents, prose

PACKAGE = REPOSITORY / "job" / "batch_inference"
ARCHITECTURE = "docs/internals/architecture.md"
INTERNALS = ["CONTRIBUTING.md", *(name for name in documents() if name.startswith("docs/internals/"))]
# Where a path may start.
ROOTS = (REPOSITORY, PACKAGE)
_ROOM = re.compile(r"(\d+)\. \*\*`([\w/]+\.py)`\*\*(?:, `([\w.]+)`)?")


def _definitions(module: str) -> set[str]:
    """Return the functions and classes of a module, and the methods as `Class.method`."""
    found = set()
    for node in ast.parse((PACKAGE / module).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("document", INTERNALS)
def test_paths_exist(document: str) -> None:
    missing = []
    for line, text in prose(document):
        for path in re.findall(r"`([\w.*/-]+/[\w.*-]+\.(?:py|tpl|yaml|toml|txt|md|png|lock))`", text):
            if not any(list(root.glob(path)) for root in ROOTS):
                missing.append(f"{document}:{line}: there is no {path}")
    assert missing == []


def test_rooms_of_an_image_are_in_the_code() -> None:
    rooms = [found.groups() for _, text in prose(ARCHITECTURE) if (found := _ROOM.match(text))]
    assert [int(number) for number, _, _ in rooms] == list(range(1, len(rooms) + 1))
    assert 10 <= len(rooms) <= 15
    for _, module, name in rooms:
        assert name is None or name in _definitions(module), f"{module} has no {name}"


def test_table_names_every_wing() -> None:
    named = {found[1] for _, text in prose(ARCHITECTURE) if (found := re.match(r"\| `(\w+)/` \|", text))}
    assert named == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_figure_names_modules_that_exist() -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)<", (REPOSITORY / "docs/internals/architecture.svg").read_text())
    modules = [text for text in texts if re.fullmatch(r"[a-z]+/[a-z_]+", text)]
    assert len(modules) > 10
    assert [module for module in modules if not (PACKAGE / f"{module}.py").exists()] == []
