"""The process that runs a job: it plans, resumes, starts the pipeline, collects its rows, commits them and records progress.

What rows go through lives in `pipeline`, what the output folder holds in `output`.
"""
