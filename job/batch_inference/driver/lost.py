"""The verdict on a driver that ended without one, given by its parent process."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from batch_inference.config import load_config
from batch_inference.driver.events import AttemptInfo, Events
from batch_inference.driver.progress import Progress
from batch_inference.driver.recorder import Recorder
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store


def record_lost_driver(facts: dict[str, Any], failure: BatchInferenceError) -> Progress:
    """Leave the verdict beside the output of a driver that ended without one, as far as the store takes it.

    Args:
        facts: The driver's words about itself (:func:`~batch_inference.driver.supervision.tell_parent`).
        failure: The verdict.

    Returns:
        The counts of the ledger; none where it cannot be read.
    """
    progress = Progress()
    # The verdict is given in any case; errors of the store are no news.
    with contextlib.suppress(Exception):
        output = {"output": {"uri": facts["output"]}, "storage": facts["storage"]}
        ledger = Ledger(Store(facts["output"], load_config(None, output).storage, must_exist=True))
        job = ledger.require_job()
        config = load_config(job.config, output)
        attempt = AttemptInfo(os.environ.get(RUN_VARIABLE, ""), facts["attempt"], facts["started"])
        events = Events(attempt.started, Recorder(config, ledger.store, job, attempt))
        events.progress.resume(job, ledger.commits(), {})
        events.failed(failure)
        progress = events.progress
    return progress
