"""The chart renders, and the operator accepts, every installation in the documents."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml

from tests.charts import check
from tests.charts.oracle import ask
from tests.charts.render import HelmError, Values, merged, render, render_text
from tests.support.documents import Block, blocks, commands, documents, helm_values, prose

INSTALLED = [
    pytest.param(block, words, id=f"{block}-{words[2]}")
    for document in documents()
    for block in blocks(document)
    if block.language == "sh"
    for words in commands(block.text)
    if words[:2] in (["helm", "install"], ["helm", "upgrade"]) and words[3].startswith("helm/")
]


def _written(block: Block, words: list[str]) -> Values:
    """Return values from files that the document itself shows."""
    values: Values = {}
    shown = {other.file: other.text for other in blocks(block.document) if other.language == "yaml"}
    for option, file in itertools.pairwise(words):
        if option in ("--values", "-f") and file in shown:
            values = merged(values, yaml.safe_load(shown[file]))
    return values


def test_some_are_there() -> None:
    assert len(INSTALLED) >= 4


@pytest.mark.parametrize(("block", "words"), INSTALLED)
def test_documented_installs_are_rendered_and_accepted(block: Block, words: list[str]) -> None:
    values = merged(_written(block, words), helm_values(words))
    chart = words[3].rpartition("/")[2]
    text = render_text(chart, values, name=words[2])
    checked, errors = ask(text)
    assert errors == []
    assert len(checked) == (0 if values.get("schedule") else 1)
    check.valid(render(chart, values, name=words[2]))


@pytest.mark.parametrize(
    ("inference", "heading"),
    [
        ({"gpus_per_actor": "0.5"}, "`got string, want number`"),
        ({"actor": 1}, "`additional properties … not allowed`"),
        ({"gpus_per_actor": 3, "cpus_per_actor": 0.00001}, "`… problems in the values:`"),
    ],
)
def test_helm_messages_are_in_troubleshooting(inference: Values, heading: str) -> None:
    assert f"### {heading}" in [line for _, line in prose("docs/troubleshooting.md")]
    with pytest.raises(HelmError) as caught:
        render_text("rayjob", {"job": {"inference": inference}, "workers": {"cpus": 1}})
    assert re.search(heading.strip("`").replace("…", ".*"), str(caught.value))
