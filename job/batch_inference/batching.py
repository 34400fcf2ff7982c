"""How many images go through a network at once: found by doubling, halved where memory ends, grown back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

#: On a CPU, where caches decide: 8 to 32 images took the same time each, within 5 %; 64 took 10 to 20 % more, and one
#: by one 1.5 times as much (mobilenet_v3_small and resnet18, float32 and bfloat16).
CPU_BATCH = 16
#: Largest that the search tries.
MOST = 1024
#: Bytes of pixels that a predictor gets at once, and that Ray holds for a call of it; a larger image comes alone. 32 photos of 8 MB (2.8
#: megapixels), the default batch of a class, are as much; 32 of 100 megapixels would be 9.6 GB. A call holds it up to three times: in Ray's
#: shared memory, joined to one array, and in what the class makes of it.
BATCH_BYTES = 256 * 1024 * 1024
#: Number of a row that stands for no input (:func:`~batch_inference.shards.weighted`); the actor leaves it out.
NO_ROW = -1
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


def rows_within(rows: int, image_bytes: int) -> int:
    """Return the size of a batch of at most ``rows`` images of ``image_bytes`` each that keeps to :data:`BATCH_BYTES`; at least 1."""
    return max(1, min(rows, BATCH_BYTES // image_bytes))


def extra_rows(sizes: Iterable[int], rows: int) -> int:
    """Return for how many rows more than they are images count in batches that Ray makes of ``rows`` rows.

    Ray counts rows and not bytes. An image that takes more than its share of :data:`BATCH_BYTES` counts for as many rows as shares it
    takes, up to a whole batch, so that a batch of so many rows has at most :data:`BATCH_BYTES` and one image.

    Args:
        sizes: Bytes of each image.
        rows: Rows of a batch.
    """
    return sum(min(rows, max(1, -(-size * rows // BATCH_BYTES))) - 1 for size in sizes)


def parts_within(sizes: Iterable[int]) -> list[slice]:
    """Return the runs of images, in order and without a gap, of at most :data:`BATCH_BYTES` each; a larger image is its own run.

    Args:
        sizes: Bytes of each image.
    """
    starts, taken, place = [0], 0, -1
    for place, size in enumerate(sizes):
        if taken and taken + size > BATCH_BYTES:
            starts.append(place)
            taken = 0
        taken += size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], place + 1], strict=True)]


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
