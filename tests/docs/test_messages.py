"""Headings of troubleshooting.md are messages of the program, the charts or Ray.

`…` in a heading stands for anything. What the programs of others say (Helm, Kubernetes, KubeRay) is in sections of their own and
not compared, but for Ray, which is installed.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.support.documents import REPOSITORY, prose

DOCUMENT = "docs/troubleshooting.md"
OWN = {"Before the job starts", "While it runs"}
# Of others, by the name of the section; Ray's are looked for, and so are the chart's.
CHART = {"… problems in the values:"}
RAY = {"No available node types can fulfill resource request", "object_store_memory"}


def _quoted() -> list[tuple[str, str]]:
    """Sections and messages, in order."""
    section, found = "", []
    for _, line in prose(DOCUMENT):
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("### "):
            message = re.fullmatch(r"### `(.+)`", line)
            assert message, f"{line}: a heading here is a message"
            found.append((section, message[1]))
    return found


@functools.cache
def _texts() -> tuple[str, ...]:
    """Every text of the program's source, with … where values are put in."""
    found: set[str] = set()
    for file in sorted((REPOSITORY / "job" / "batch_inference").rglob("*.py")):
        found.update(_of(ast.parse(file.read_text())))
    return tuple(found)


def _of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)) and (text := _text(node)):
            yield text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "…") + (_text(node.right) or "…")
    return ""


def _is_printed(message: str) -> bool:
    """Whether a message is made of texts of the source: all of its pieces in order, in one text or in a few that follow each other.

    A part by itself must be long enough to say something.
    """
    pieces = [piece.strip(" :") for piece in message.split("…") if piece.strip(" :;,.")]

    def from_here(start: int) -> bool:
        return start == len(pieces) or any(
            len("".join(pieces[start:end])) >= 8 and _in_one_text(tuple(pieces[start:end])) and from_here(end)
            for end in range(len(pieces), start, -1)
        )

    return from_here(0)


@functools.cache
def _in_one_text(pieces: tuple[str, ...]) -> bool:
    pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
    return any(pattern.search(text) for text in _texts())


@pytest.mark.parametrize("message", [message for section, message in _quoted() if section in OWN])
def test_messages_of_the_program_are_in_its_source(message: str) -> None:
    assert _is_printed(message), f"{DOCUMENT} quotes what is in no text of job/batch_inference"


def test_missing_message_is_found() -> None:
    assert not _is_printed("the moon is … of cheese")
    assert not _is_printed("… of … rows succeeded = … %")


def test_messages_of_the_chart_are_in_it() -> None:
    text = (REPOSITORY / "helm/common/templates/_check.tpl").read_text()
    assert {message for _, message in _quoted()} >= CHART
    assert '"problems"' in text and "in the values:" in text


def test_messages_of_ray_are_in_its_source() -> None:
    assert {message for _, message in _quoted()} >= RAY
    for message in RAY:
        folder = Path(ray.__file__).parent
        files = [*folder.glob("autoscaler/**/*.py"), *folder.glob("_private/*.py")]
        assert any(message in file.read_text(errors="replace") for file in files), message


def test_messages_have_one_entry_each() -> None:
    messages = [message for _, message in _quoted()]
    assert len(set(messages)) == len(messages)
