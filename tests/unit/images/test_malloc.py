from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
COUNT = """
import resource, sys
import numpy as np
from batch_inference.images import malloc
if sys.argv[1] == "with":
    assert malloc.keep_activation_memory() and malloc.keep_image_memory()
    malloc.keep_activation_memory.cache_clear()
    malloc.keep_activation_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(50_000_000 // 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("with", "without")
    }
    assert found["with"] < found["without"] / 10


def test_other_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_inference.images import malloc

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc._set_options({-1: 1}) is False
