"""Keys that the documents name in their sentences are keys of the configuration or of the charts."""

from __future__ import annotations

import re

import pytest

from batch_inference.config import JobConfig
from tests.support.documents import REPOSITORY, documents, prose

_TABLE = re.findall(r"^\| `([\w.]+)` \|", (REPOSITORY / "helm" / "README.md").read_text(), re.MULTILINE)
KEYS = {*_TABLE, *(key.removeprefix("job.") for key in _TABLE)}
SECTIONS = {key.rpartition(".")[0] for key in KEYS}
# Whose first part is that of a key, and which are something else.
OTHERS = {"job.yaml", "model.eval", "model.state_dict", "storage.yaml", "predictor.py", "shard.parquet"}


@pytest.mark.parametrize("document", [name for name in documents() if name != "CHANGELOG.md"])
def test_keys_are_there(document: str) -> None:
    first = {key.partition(".")[0] for key in KEYS} | set(JobConfig.model_fields)
    wrong = []
    for line, text in prose(document):
        for code in re.findall(r"`([^`]+)`", text):
            key = re.split(r"[:= ]", code)[0].removesuffix(".*")
            if "." in key and key.partition(".")[0] in first and re.fullmatch(r"[A-Za-z_.]+", key):
                inside = any(key.startswith(f"{whole}.") for whole in KEYS)
                if key not in KEYS | SECTIONS | OTHERS and not inside:
                    wrong.append(f"{document}:{line}: there is no key {key}")
    assert wrong == []
