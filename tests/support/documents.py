"""The documents of the repository: their headings, links and code blocks."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r" *(```+)(.*)")
_NAME = re.compile(r"# ([\w.-]+\.\w+|Dockerfile)(?::.*)?$")
# What a shell puts the output of in place of.
_INNER = r"\$\(([^()]*)\)"
_OPERATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        document: Path of its document in the repository.
        line: Where it begins.
        section: The heading of second rank above it.
        language: First word behind the fence.
        text: What is in it.
    """

    document: str
    line: int
    section: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line is a comment with nothing but the name."""
        found = _NAME.match(self.text.partition("\n")[0])
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    """All documents, by path: what Git tracks, and what it would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    found = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
    return sorted(name for name in set(found) if (REPOSITORY / name).exists())


@functools.cache
def _parts(document: str) -> tuple[tuple[str, ...], tuple[Block, ...], tuple[tuple[int, str], ...]]:
    """Headings, blocks, and lines outside of blocks."""
    headings: list[str] = []
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    section, fence, language, begin, inside = "", "", "", 0, list[str]()
    for number, line in enumerate((REPOSITORY / document).read_text(encoding="utf-8").splitlines(), 1):
        found = _FENCE.match(line)
        if fence:
            if found and found[1] == fence and not found[2].strip():
                blocks.append(Block(document, begin, section, language, "\n".join(inside) + "\n"))
                fence = ""
            else:
                inside.append(line)
        elif found:
            fence, language, begin, inside = found[1], (found[2].split() or [""])[0], number, []
        else:
            prose.append((number, line))
            if heading := re.match(r"(#+) (.+)", line):
                headings.append(heading[2])
                section = heading[2] if len(heading[1]) == 2 else section
    assert not fence, f"{document}:{begin}: the block has no end"
    return tuple(headings), tuple(blocks), tuple(prose)


def blocks(document: str) -> tuple[Block, ...]:
    """The code blocks of a document."""
    return _parts(document)[1]


def prose(document: str) -> tuple[tuple[int, str], ...]:
    """The lines of a document that are in no block, with their numbers."""
    return _parts(document)[2]


def headings(document: str) -> tuple[str, ...]:
    """The headings of a document."""
    return _parts(document)[0]


def anchors(document: str) -> set[str]:
    """Return the anchors that links may name behind #, as GitHub makes them from headings."""
    found: set[str] = set()
    for heading in headings(document):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        name, count = slug, 0
        while name in found:
            count += 1
            name = f"{slug}-{count}"
        found.add(name)
    return found


def links(document: str) -> Iterator[tuple[int, str]]:
    """The targets of a document's links, with their lines."""
    for number, line in prose(document):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            yield number, target


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, in words, without variables before them; those in $(…) first."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    found = [words for inner in re.findall(_INNER, text) for words in commands(inner)]
    for line in re.sub(_INNER, "OUTPUT", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        current: list[str] = []
        for word in [*lexer, ";"]:
            if word in _OPERATORS:
                if current:
                    found.append(current)
                current = []
            elif current or not re.match(r"\w+=", word):
                current.append(word)
    return found


def helm_values(words: list[str]) -> dict[str, Any]:
    """The values that a helm command gives by --set, and by files that are in the repository or named in the call."""
    values: dict[str, Any] = {}
    for option, text in itertools.pairwise(words):
        if option in ("--values", "-f") and (REPOSITORY / text).exists():
            _lay_over(values, yaml.safe_load((REPOSITORY / text).read_text()))
        elif option in ("--set", "--set-string", "--set-json"):
            key, _, value = text.partition("=")
            target = values
            *parents, last = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            if option == "--set" and value.startswith("{") and value.endswith("}"):
                target[last] = value[1:-1].split(",")
            else:
                target[last] = value if option == "--set-string" else _scalar(value)
    return values


def _scalar(text: str) -> Any:
    """As Helm reads --set: whole numbers and booleans, all else text; fractions come by --set-json."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return float(text)
    return {"true": True, "false": False, "null": None}.get(text, text)


def _lay_over(base: dict[str, Any], top: dict[str, Any]) -> None:
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _lay_over(base[key], value)
        else:
            base[key] = value
