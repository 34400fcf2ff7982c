"""How many images go through a network at once: found by doubling, halved where memory ends, grown back."""

from __future__ import annotations

from collections.abc import Callable

#: On a CPU, where caches decide: 8 to 32 images took the same time each, within 5 %; 64 took 10 to 20 % more, and one
#: by one 1.5 times as much (mobilenet_v3_small and resnet18, float32 and bfloat16).
CPU_BATCH = 16
#: Largest that the search tries.
MOST = 1024
#: A doubling has to bring so much more images a second, or it only costs memory.
WORTH = 1.04
#: Share of the memory that is free for the network which the search may fill; the rest is for fragments and neighbours.
MARGIN = 0.85
# So many batches in a row have to work before a halved size grows again.
_PATIENCE = 64
_NO_MEMORY = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "can't allocate memory",
    "not enough memory",
)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an exception says that there is no memory, of the device or of the host, and nothing worse.

    PyTorch raises its own type for its allocator only; cuBLAS, cuDNN and the CPU's allocator raise RuntimeError.
    """
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    return isinstance(exc, RuntimeError) and any(words in str(exc).lower() for words in _NO_MEMORY)


class BatchSize:
    """The size in use.

    Args:
        wanted: Where it starts, and the most it grows back to.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.current = wanted
        self._worked = 0

    def halve(self, failed: int) -> None:
        """After a batch of ``failed`` images found no memory."""
        self.current = max(1, min(self.current, failed) // 2)
        self._worked = 0

    def worked(self) -> None:
        """After a batch; doubles the size when many have worked since memory ended."""
        if self.current < self.wanted:
            self._worked += 1
            if self._worked >= _PATIENCE:
                self.current = min(self.wanted, 2 * self.current)
                self._worked = 0


def search(measure: Callable[[int], tuple[float, int]], idle: int, limit: int, most: int = MOST) -> int:
    """Finds the batch size of a device by doubling.

    Args:
        measure: Runs a batch of so many images; gives its seconds and the most bytes in use meanwhile. Raises what
            :func:`is_out_of_memory` knows where there is no memory.
        idle: Bytes in use without a batch, for the weights.
        limit: Bytes there are.
        most: Largest size.

    Returns:
        The smallest size that is nearly as fast as the largest which fits within :data:`MARGIN`; at least 1.
    """
    best, best_rate, size = 1, 0.0, 4
    while size <= most:
        failed = False
        try:
            seconds, peak = measure(size)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            failed = True
        if failed or peak - idle > MARGIN * (limit - idle):
            break
        rate = size / max(seconds, 1e-9)
        if rate < WORTH * best_rate:
            break
        best, best_rate = size, rate
        # Activations grow with the batch, so the next size is known not to fit before it is tried.
        if 2 * (peak - idle) > MARGIN * (limit - idle):
            break
        size *= 2
    return best
