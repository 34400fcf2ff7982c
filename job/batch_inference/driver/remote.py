"""The driver inside the cluster, for addresses of Ray Client.

Ray Data does not work through Ray Client, so the whole driver goes to the cluster as an actor and this process follows it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from batch_inference.config import JobConfig
from batch_inference.driver.attempt import Attempt
from batch_inference.driver.progress import Progress
from batch_inference.driver.result import RunResult
from batch_inference.driver.signals import interruptible
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError, InfrastructureError, JobInterruptedError
from batch_inference.pipeline.cluster import connected
from batch_inference.pipeline.engine import Engine, resolve_engine
from batch_inference.pipeline.ray_errors import explain_ray_failure

# Time for the next rows and the commits of complete shards when this process is told to end; Kubernetes leaves 30 s.
_STOP_S = 20.0
_POLL_S = 120.0


class RemoteDriver:
    """Runs one attempt in a thread of a Ray actor."""

    def __init__(self, config: JobConfig, engine: Engine | None, force_retry: bool, run_name: str) -> None:
        os.environ[RUN_VARIABLE] = run_name
        self._progress = Progress()
        self._outcome: RunResult | BatchInferenceError | None = None
        self._attempt = Attempt(config, self._keep, engine, force_retry=force_retry)
        threading.Thread(target=self._run, name="driver", daemon=True).start()

    def poll(self) -> tuple[Progress, RunResult | BatchInferenceError | None]:
        """Return the progress, and the result or error once the run has ended."""
        return self._progress, self._outcome

    def stop(self) -> None:
        """End the run as a signal does."""
        self._attempt.stop()

    def _run(self) -> None:
        try:
            self._outcome = self._attempt.run(None, None)
        except BatchInferenceError as exc:
            self._outcome = exc
        except KeyboardInterrupt:
            self._outcome = JobInterruptedError(
                "stopped", "Run the same command again: it resumes with the shards that are left."
            )
        except BaseException as exc:
            self._outcome = explain_ray_failure(exc)

    def _keep(self, progress: Progress) -> None:
        self._progress = progress


def run_in_cluster(
    config: JobConfig, address: str, on_progress: Callable[[Progress], None] | None, *, force_retry: bool = False
) -> RunResult:
    """Run a job by a driver inside the cluster; it ends with this process.

    Raises:
        BatchInferenceError: If the driver raised it.
        InfrastructureError: If the connection is lost.
    """
    # The module of a predictor is here and travels by value; files of a model are read where the driver runs.
    engine = resolve_engine(config) if config.predictor is not None else None
    with connected(config, address, None), interruptible():
        import ray

        remote = ray.remote(num_cpus=0, max_restarts=0)(RemoteDriver)
        driver: Any = remote.remote(config, engine, force_retry, os.environ.get(RUN_VARIABLE, ""))
        try:
            return _follow(driver, on_progress)
        except KeyboardInterrupt:
            # The result does not matter: the reason of the end is the signal.
            with contextlib.suppress(Exception):
                deadline = time.monotonic() + _STOP_S
                ray.get(driver.stop.remote(), timeout=_STOP_S)
                _follow(driver, on_progress, deadline)
            raise
        except (ConnectionError, ray.exceptions.RayError) as exc:
            raise InfrastructureError(
                f"the driver in the cluster at {address} was lost: {type(exc).__name__}",
                "Start the same command again; it resumes.",
            ) from exc
        finally:
            with contextlib.suppress(Exception):
                ray.kill(driver)


def _follow(driver: Any, on_progress: Callable[[Progress], None] | None, deadline: float = float("inf")) -> RunResult:
    """Return the result of a run or raise its error; raise TimeoutError at ``deadline``, by ``time.monotonic``."""
    import ray

    while (left := deadline - time.monotonic()) > 0:
        progress, outcome = ray.get(driver.poll.remote(), timeout=min(_POLL_S, left))
        if on_progress:
            on_progress(progress)
        if isinstance(outcome, RunResult):
            return outcome
        if outcome is not None:
            raise outcome
        time.sleep(0.5)
    raise TimeoutError
