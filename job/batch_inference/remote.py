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

from batch_inference.cluster import connected
from batch_inference.config import JobConfig
from batch_inference.driver import Attempt, RunResult, interruptible
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError, Interrupted, SystemFault
from batch_inference.identity import Engine, resolve_engine
from batch_inference.pipeline import explain_ray_failure
from batch_inference.progress import Snapshot

# For the rows that come next and the commits of what is complete, when this process is told to end; Kubernetes leaves 30 s.
_STOP_S = 20.0
_POLL_S = 120.0


class RemoteDriver:
    """Runs one attempt in a thread of a Ray actor."""

    def __init__(self, config: JobConfig, engine: Engine | None, force_retry: bool, run_name: str) -> None:
        os.environ[RUN_VARIABLE] = run_name
        self._snapshot = Snapshot()
        self._outcome: RunResult | BatchInferenceError | None = None
        self._attempt = Attempt(config, self._keep, engine, force_retry=force_retry)
        threading.Thread(target=self._run, name="driver", daemon=True).start()

    def poll(self) -> tuple[Snapshot, RunResult | BatchInferenceError | None]:
        """Where the run stands, and how it ended once it has."""
        return self._snapshot, self._outcome

    def stop(self) -> None:
        """Ends the run as a signal does."""
        self._attempt.stop()

    def _run(self) -> None:
        try:
            self._outcome = self._attempt.run(None, None)
        except BatchInferenceError as exc:
            self._outcome = exc
        except KeyboardInterrupt:
            self._outcome = Interrupted(
                "stopped", "Run the same command again: it resumes with the shards that are left."
            )
        except BaseException as exc:
            self._outcome = explain_ray_failure(exc)

    def _keep(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot


def run_in_cluster(
    config: JobConfig, address: str, on_progress: Callable[[Snapshot], None] | None, *, force_retry: bool = False
) -> RunResult:
    """Runs a job by a driver inside the cluster; it ends with this process.

    Raises:
        BatchInferenceError: Whatever the driver raised.
        SystemFault: If the connection is lost.
    """
    # A predictor's module is here and travels by value; a model's files are looked for where the driver runs.
    engine = resolve_engine(config) if config.predictor is not None else None
    with connected(config, address, None), interruptible():
        import ray

        remote = ray.remote(num_cpus=0, max_restarts=0)(RemoteDriver)
        driver: Any = remote.remote(config, engine, force_retry, os.environ.get(RUN_VARIABLE, ""))
        try:
            return _followed(driver, on_progress)
        except KeyboardInterrupt:
            # What comes of it is not asked: whatever it is, the reason of the end is the signal.
            with contextlib.suppress(Exception):
                until = time.monotonic() + _STOP_S
                ray.get(driver.stop.remote(), timeout=_STOP_S)
                _followed(driver, on_progress, until)
            raise
        except (ConnectionError, ray.exceptions.RayError) as exc:
            raise SystemFault(
                f"the driver in the cluster at {address} was lost: {type(exc).__name__}",
                "Start the same command again; it resumes.",
            ) from exc
        finally:
            with contextlib.suppress(Exception):
                ray.kill(driver)


def _followed(driver: Any, on_progress: Callable[[Snapshot], None] | None, until: float = float("inf")) -> RunResult:
    """How a run ends, raised if it is an error; raises TimeoutError where it has not by a moment of ``time.monotonic``."""
    import ray

    while (left := until - time.monotonic()) > 0:
        snapshot, outcome = ray.get(driver.poll.remote(), timeout=min(_POLL_S, left))
        if on_progress:
            on_progress(snapshot)
        if isinstance(outcome, RunResult):
            return outcome
        if outcome is not None:
            raise outcome
        time.sleep(0.5)
    raise TimeoutError
