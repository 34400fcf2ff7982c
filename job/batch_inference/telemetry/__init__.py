"""Logs, metrics and tracebacks, and the context that every process of a run needs for them.

Metrics are defined here; each wing logs and counts for itself.
"""
