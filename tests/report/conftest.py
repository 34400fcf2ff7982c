"""A browser, and reports of three jobs: one without errors, one with 30 % of them, and one of a predictor without confidences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import batch_inference
from batch_inference.config import StorageConfig, load_config
from batch_inference.ledger import Ledger
from batch_inference.report import make
from batch_inference.storage import Store
from tests.report import browser as browsers
from tests.report import outputs
from tests.unit.test_report import HOSTILE

LABELS = Path(batch_inference.__file__).with_name("imagenet-1k.txt").read_text().splitlines()
PLANS = {
    "no-errors": outputs.Plan(labels=LABELS, price=2.5),
    "many-errors": outputs.Plan(labels=LABELS, failing=0.3, done=0.6, names=HOSTILE),
    "own-predictor": outputs.Plan(images=300, custom=True),
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with browsers.started() as started:
        yield started


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Report files by the name of their job."""
    made = {}
    for name, plan in PLANS.items():
        output = outputs.make(tmp_path_factory.mktemp(name), plan)
        job = Ledger(Store(str(output), StorageConfig())).require_job()
        found = make(str(output), load_config(job.config, {"output": {"uri": str(output)}}))
        assert found.notes == ()
        made[name] = output / "_report/report.html"
    return made
