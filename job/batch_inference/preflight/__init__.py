"""Checks before a job: stores, nodes, a trial on a few images, golden samples, and a forecast of time and cost.

Nothing here commits a shard; the check that rows do not depend on each other is in `pipeline`.
"""
