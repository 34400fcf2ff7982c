"""The report: one HTML page about a job, made from the files of its output, with thumbnails of some of its inputs.

Its numbers come from the ledger and never from a running driver.
"""
