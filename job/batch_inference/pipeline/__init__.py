"""The way of the rows through Ray Data: datasource, preparation tasks, actors, their cluster; the fingerprint and the bottleneck.

Collecting rows and committing shards is the work of `driver`.
"""
