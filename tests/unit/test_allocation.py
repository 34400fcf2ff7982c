from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
COUNT = """
import resource, sys
import numpy as np
from batch_inference import allocation
if sys.argv[1] == "with":
    assert allocation.for_network() and allocation.for_images()
    allocation.for_network.cache_clear()
    allocation.for_network()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(50_000_000 // 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_memory_is_used_again_without_faults() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("with", "without")
    }
    assert found["with"] < found["without"] / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_inference import allocation

    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    assert allocation._set({-1: 1}) is False
