"""Settings of glibc's allocator: keep freed memory in the process instead of returning it to the system after each image.

By default glibc maps large blocks again for each image, and the system fills every page with zeros at the first access: 140 page
faults an image while decoding, a quarter of its time; 440 to 2,400 in a forward pass on a CPU, 10 to 20 % of its time.
"""

from __future__ import annotations

import ctypes
from functools import cache

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MIB = 1 << 20


@cache
def keep_image_memory() -> bool:
    """Keep the memory of decoded images; blocks of 32 MiB and more, of giant images, are still returned at once.

    Returns:
        Whether the C library accepted it; only glibc does.
    """
    return _set_options({_M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 128 * _MIB})


@cache
def keep_activation_memory() -> bool:
    """Keep the memory of a network on the CPU, whose activations have the same size in each batch.

    Returns:
        As :func:`keep_image_memory`.
    """
    return _set_options({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 1024 * _MIB})


def _set_options(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(name, value) for name, value in options.items()])
