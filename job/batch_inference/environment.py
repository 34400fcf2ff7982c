"""Environment variables that the parts of a deployment use to talk to each other."""

from __future__ import annotations

#: The configuration as YAML, for a cluster that does not have the file.
CONFIG_VARIABLE = "BATCH_INFERENCE_CONFIG"
#: Name of the run that an attempt belongs to: on Kubernetes the RayJob's name.
RUN_VARIABLE = "BATCH_INFERENCE_RUN"
#: Maximum time in seconds that a job waits for its workers; set on clusters that grow on demand.
WAIT_VARIABLE = "BATCH_INFERENCE_WAIT_FOR_WORKERS_S"
