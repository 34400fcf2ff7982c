"""The start of a job, at which two things happen at the same time: Ray's processes come up, and the model is inspected."""

from __future__ import annotations

import sys

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError
from batch_inference.pipeline.engine import Engine, resolve_engine
from batch_inference.system.subprocesses import ChildProcess, Died, Outcome, Raised, Returned, TimedOut

# Enough to download weights of many gigabytes over a slow line.
_TIMEOUT_S = 3600.0


class EngineResolver:
    """Resolves the engine in the background; a context manager.

    A model is inspected in a process of its own. Importing its libraries takes seconds, in which threads of the driver would wait
    for each other, and the driver needs none of them. A user's predictor is imported in this process at once, since it may need
    the main thread and travels to the actors from here.

    Args:
        config: The job.
        engine: The engine, if it is known already.

    Raises:
        UserError: If there is no such predictor.
    """

    def __init__(self, config: JobConfig, engine: Engine | None = None) -> None:
        self._config = config
        self._engine = engine or (resolve_engine(config) if config.predictor is not None else None)
        self._process = ChildProcess(resolve_engine) if self._engine is None else None
        self._received: Outcome[Engine] | None = None

    def __enter__(self) -> EngineResolver:
        if self._process is not None:
            self._process.send(self._config)
        return self

    def __exit__(self, *args: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.stop()

    def result(self) -> Engine:
        """Return the engine as soon as it is there.

        Raises:
            BatchInferenceError: Any error of :func:`~batch_inference.pipeline.engine.resolve_engine`.
            InfrastructureError: If the process ended without an answer.
        """
        if self._engine is not None:
            return self._engine
        match self._outcome():
            case Returned(value=engine):
                self._engine = engine
                return engine
            case Raised(BatchInferenceError() as error):
                raise error
            case TimedOut(seconds):
                raise InfrastructureError(
                    f"the model could not be inspected within {seconds:,.0f} s",
                    "Look for a download that stands still, or a model's own code that waits for something.",
                )
            case Died(exit_code, last_line):
                reason = f"the process ended with code {exit_code}: {last_line or 'no message'}"
            case Raised(error):
                reason = f"{type(error).__name__}: {error}"
        raise InfrastructureError(
            f"the model could not be inspected: {reason[:350]}",
            "Look for too little memory; importing torch and the model alone should show the same.",
        )

    def _outcome(self) -> Outcome[Engine]:
        if self._received is None:
            assert self._process is not None  # noqa: S101
            self._received = self._process.receive(_TIMEOUT_S)
            # It ends by itself while Ray starts.
            self._process.disconnect()
        return self._received


def starts_ray(address: str | None) -> bool:
    """Return whether a job at ``address`` starts its own Ray, rather than joining one or using this process's."""
    if address not in (None, "local"):
        return False
    ray = sys.modules.get("ray")
    return ray is None or not ray.is_initialized()
