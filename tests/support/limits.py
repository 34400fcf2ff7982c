"""Limits in seconds that end a hang and decide nothing else: ten times what a machine with other work beside it needs.

A test whose subject is a limit sets its own. A test has none by a mark: `tests/conftest.py` gives each the one of its folder.
"""

from __future__ import annotations

# One wait in a test: for a program, a server, a file, a pod.
HANG_S = 1800

# A whole test with its fixtures, of which the first of a session may start servers, by the folder under tests/. The image of the
# job is built in a fixture.
TEST_S = {
    "unit": 1800,
    "docs": 1800,
    "charts": 3600,
    "report": 3600,
    "job": 3600,
    "e2e": 7200,
    "faults": 7200,
    "platform": 7200,
}
