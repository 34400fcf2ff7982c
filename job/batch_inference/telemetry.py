"""What every process of a run has to know so that its log lines and its metrics say whose they are."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference import logs
from batch_inference.metrics import meter


@dataclass(frozen=True)
class Telemetry:
    """Travels with tasks and actors.

    Attributes:
        run: The run's name: on Kubernetes the RayJob's, elsewhere the start of the job's fingerprint.
        attempt: Of the job's driver.
        log_format: ``text`` or ``json``, as the driver logs.
    """

    run: str
    attempt: str
    log_format: str

    def begin(self) -> None:
        """In a task's or an actor's process, once or more often."""
        meter.begin(self.run)
        if self.log_format == "json":
            logs.configure("json")
            logs.bind(run=self.run, attempt=self.attempt)
