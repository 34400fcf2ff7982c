"""A browser, and reports of three jobs: one without errors, one with 30 % errors, and one of a predictor without confidences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import batch_inference
from batch_inference.config import StorageConfig, load_config
from batch_inference.output.ledger import Ledger
from batch_inference.report.build import make_report
from batch_inference.storage.store import Store
from tests.report import browser as browsers
from tests.support import report_outputs
from tests.support.hostile import HOSTILE

LABELS = Path(batch_inference.__file__).with_name("models").joinpath("imagenet-1k.txt").read_text().splitlines()
PLANS = {
    "no-errors": report_outputs.OutputPlan(labels=LABELS, price=2.5),
    "many-errors": report_outputs.OutputPlan(labels=LABELS, failing=0.3, done=0.6, names=HOSTILE),
    "own-predictor": report_outputs.OutputPlan(images=300, custom=True),
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with browsers.start_browser() as started:
        yield started


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the report files by the name of their job."""
    files = {}
    for name, plan in PLANS.items():
        output = report_outputs.make(tmp_path_factory.mktemp(name), plan)
        job = Ledger(Store(str(output), StorageConfig())).require_job()
        report = make_report(str(output), load_config(job.config, {"output": {"uri": str(output)}}))
        assert report.notes == ()
        files[name] = output / "_report/report.html"
    return files
