"""The frame of `make test`: what it is going to do, the tiers one after the other, and a table of the results.

It runs before `.venv` exists, so it imports nothing but the standard library and `tests.e2e.cluster`, which does the same.
"""
