"""Environment variables by which the parts of a deployment talk to each other."""

from __future__ import annotations

#: The configuration as YAML, for a cluster that does not have the file.
CONFIG_VARIABLE = "BATCH_INFERENCE_CONFIG"
#: The run that an attempt belongs to, where something starts attempts by itself: on Kubernetes the RayJob's name.
RUN_VARIABLE = "BATCH_INFERENCE_RUN"
#: Set on clusters that grow on demand, to the longest time in seconds that a job waits for its workers.
WAIT_VARIABLE = "BATCH_INFERENCE_WAIT_FOR_WORKERS_S"
