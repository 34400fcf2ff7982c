"""The context that every process of a run gets, so that its log lines and metrics name the run and the attempt."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.telemetry import logs
from batch_inference.telemetry.metrics import meter


@dataclass(frozen=True)
class Telemetry:
    """The part of a run's context that travels with tasks and actors.

    Attributes:
        run: Name of the run: on Kubernetes the RayJob's name, elsewhere the start of the job's fingerprint.
        attempt: Identifier of the driver's attempt.
        log_format: ``text`` or ``json``, as the driver logs.
    """

    run: str
    attempt: str
    log_format: str

    def set_up(self) -> None:
        """Set up logs and metrics in the process of a task or an actor; may be called again."""
        meter.set_run(self.run)
        if self.log_format == "json":
            logs.configure("json")
            logs.bind(run=self.run, attempt=self.attempt)
