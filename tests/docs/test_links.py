"""No document has a dead link, and each can be reached from the first."""

from __future__ import annotations

import posixpath
import re

import pytest

from tests.support.documents import REPOSITORY, anchors, documents, links

# Where the charts' packages, Git's folders and the like begin.
_ELSEWHERE = re.compile(r"[a-z]+:")


def _target(document: str, link: str) -> tuple[str, str]:
    path, _, anchor = link.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), path)) if path else document, anchor


@pytest.mark.parametrize("document", documents())
def test_links_and_anchors_are_there(document: str) -> None:
    dead = []
    for line, link in links(document):
        if _ELSEWHERE.match(link):
            continue
        path, anchor = _target(document, link)
        outside = path.startswith("..")
        if outside or not (REPOSITORY / path).exists():
            dead.append(f"{document}:{line}: there is no {path}")
        elif anchor and anchor not in anchors(path):
            dead.append(f"{document}:{line}: {path} has no heading for #{anchor}")
    assert dead == []


def test_each_document_is_reached_from_the_first() -> None:
    seen, todo = {"README.md"}, ["README.md"]
    while todo:
        document = todo.pop()
        for _, link in links(document):
            path = _target(document, link)[0]
            readme = posixpath.join(path, "README.md")
            path = readme if (REPOSITORY / readme).exists() else path
            if path.endswith(".md") and path not in seen and (REPOSITORY / path).exists():
                seen.add(path)
                todo.append(path)
    assert set(documents()) - seen == set()
