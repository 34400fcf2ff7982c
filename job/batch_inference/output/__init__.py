"""The output folder: ledger, manifest, retries, crash journals, schema and data files, attempt records; also status, verify and diff.

Nothing here reads images or runs a model; the driver decides when to write.
"""
