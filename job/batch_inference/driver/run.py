"""Run a job: on this machine, or in a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable

from batch_inference.config import JobConfig
from batch_inference.driver.attempt import Attempt
from batch_inference.driver.progress import Progress
from batch_inference.driver.result import RunResult
from batch_inference.driver.signals import interruptible
from batch_inference.pipeline.cluster import is_client_address


def run(
    config: JobConfig,
    *,
    address: str | None = None,
    dashboard_host: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    force_retry: bool = False,
) -> RunResult:
    """Run a job, or what is left of it.

    Args:
        config: The job.
        address: Ray cluster to use; None starts one on this machine for the time of the job. ``ray://`` runs the driver
            inside the cluster, where paths of local files are the cluster's.
        dashboard_host: Address that a started cluster's dashboard listens on; None for no dashboard.
        on_progress: Called at every change of phase and with every block of rows; must return quickly.
        force_retry: Retry even if an earlier attempt of this run failed with an error that a retry cannot fix.

    Returns:
        The counts, which add up.

    Raises:
        UserError: Configuration, input, credentials, model or predictor (exit code 2).
        ErrorThresholdExceeded: Too many rows failed (3).
        AccountingError: Rows are missing or duplicated (4).
        InfrastructureError: Store or cluster failed; try again (5).
        JobInterruptedError: SIGINT or SIGTERM (130).
    """
    # Ray sets RAY_ADDRESS for a Ray job to the cluster that it is part of.
    address = address or os.environ.get("RAY_ADDRESS")
    if is_client_address(address):
        from batch_inference.driver.remote import run_in_cluster

        return run_in_cluster(config, str(address), on_progress, force_retry=force_retry)
    with interruptible():
        attempt = Attempt(config, on_progress or (lambda progress: None), force_retry=force_retry)
        return attempt.run(address, dashboard_host)
