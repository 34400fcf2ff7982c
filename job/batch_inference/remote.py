"""The driver inside the cluster, for addresses of Ray Client.

Ray Data does not work through Ray Client, so the whole driver goes to the cluster as an actor and this process follows it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from batch_inference.cluster import connected
from batch_inference.config import JobConfig
from batch_inference.driver import Attempt, RunResult, interruptible
from batch_inference.errors import BatchInferenceError, SystemFault
from batch_inference.identity import Engine, resolve_engine
from batch_inference.pipeline import explain_ray_failure
from batch_inference.progress import Snapshot


class RemoteDriver:
    """Runs one attempt in a thread of a Ray actor."""

    def __init__(self, config: JobConfig, engine: Engine | None) -> None:
        self._config = config
        self._engine = engine
        self._snapshot = Snapshot()
        self._outcome: RunResult | BatchInferenceError | None = None
        threading.Thread(target=self._run, name="driver", daemon=True).start()

    def poll(self) -> tuple[Snapshot, RunResult | BatchInferenceError | None]:
        """Where the run stands, and how it ended once it has."""
        return self._snapshot, self._outcome

    def _run(self) -> None:
        try:
            self._outcome = Attempt(self._config, self._keep, self._engine).run(None, None)
        except BatchInferenceError as exc:
            self._outcome = exc
        except BaseException as exc:
            self._outcome = explain_ray_failure(exc)

    def _keep(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot


def run_in_cluster(config: JobConfig, address: str, on_progress: Callable[[Snapshot], None] | None) -> RunResult:
    """Runs a job by a driver inside the cluster; it ends with this process.

    Raises:
        BatchInferenceError: Whatever the driver raised.
        SystemFault: If the connection is lost.
    """
    import time

    # A predictor's module is here and travels by value; a model's files are looked for where the driver runs.
    engine = resolve_engine(config) if config.predictor is not None else None
    with connected(config, address, None), interruptible():
        import ray

        driver: Any = ray.remote(num_cpus=0, max_restarts=0)(RemoteDriver).remote(config, engine)
        try:
            while True:
                snapshot, outcome = ray.get(driver.poll.remote(), timeout=120)
                if on_progress:
                    on_progress(snapshot)
                if isinstance(outcome, RunResult):
                    return outcome
                if outcome is not None:
                    raise outcome
                time.sleep(0.5)
        except (ConnectionError, ray.exceptions.RayError) as exc:
            raise SystemFault(
                f"the driver in the cluster at {address} was lost: {type(exc).__name__}",
                "Start the same command again; it resumes.",
            ) from exc
        finally:
            with contextlib.suppress(Exception):
                ray.kill(driver)
