"""Batch sizes: a search by doubling, a size that is halved after an out-of-memory error, and the limit in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

#: Images per batch on a CPU, where the caches decide: measured with mobilenet_v3_small and resnet18 in float32 and bfloat16, batches
#: of 8 to 32 images took the same time per image within 5 %, batches of 64 took 10 to 20 % more, single images 1.5 times as much.
CPU_BATCH_SIZE = 16
#: Largest size that the search tries.
MAX_BATCH_SIZE = 1024
#: Maximum bytes of pixels that a predictor gets in one call, unless a single image is larger. 256 MiB hold 32 photos of 8 MB (2.8
#: megapixels), the default batch of a class; 32 photos of 100 megapixels would take 9.6 GB. A call holds the pixels up to three times:
#: in Ray's shared memory, joined to one array, and in the class's own copy.
MAX_BATCH_BYTES = 256 * 1024 * 1024
#: Index of a row that stands for no input (:func:`~batch_inference.pipeline.datasource.with_padding_rows`); the actor drops it.
PADDING_ROW = -1
#: A doubled batch must be this much faster per image; otherwise it only costs memory.
MIN_SPEEDUP = 1.04
#: Share of the network's free memory that the search may fill; the rest is for fragmentation and for other processes.
MEMORY_SHARE = 0.85
# Number of batches in a row that must succeed before a halved size grows again.
_GROW_AFTER = 64
_OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "can't allocate memory",
    "not enough memory",
)


class BatchSize:
    """The batch size in use.

    Args:
        target: Size to start with, and the maximum that it grows back to.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.current = target
        self._successes = 0

    def halve(self, failed: int) -> None:
        """Halve the size after a batch of ``failed`` images ran out of memory."""
        self.current = max(1, min(self.current, failed) // 2)
        self._successes = 0

    def record_success(self) -> None:
        """Count a batch that fit; double a halved size after 64 of them in a row."""
        if self.current < self.target:
            self._successes += 1
            if self._successes >= _GROW_AFTER:
                self.current = min(self.target, 2 * self.current)
                self._successes = 0


def search_batch_size(
    measure: Callable[[int], tuple[float, int]],
    idle_bytes: int,
    limit_bytes: int,
    max_size: int = MAX_BATCH_SIZE,
) -> int:
    """Return the best batch size of a device, by doubling it from 4 for as long as that pays.

    Args:
        measure: Runs a batch of the given size and returns its duration in seconds and its peak memory in bytes. It raises
            an exception that :func:`is_out_of_memory` recognizes if the batch does not fit.
        idle_bytes: Memory in use without a batch, for the weights.
        limit_bytes: Memory of the device that the network may use.
        max_size: Largest size to try.

    Returns:
        The smallest size whose double fits no more into :data:`MEMORY_SHARE` of the memory, or is not faster per image
        by :data:`MIN_SPEEDUP`; at least 1.

    Raises:
        Exception: Whatever ``measure`` raises for another reason than memory.
    """
    best, best_rate, size = 1, 0.0, 4
    budget = MEMORY_SHARE * (limit_bytes - idle_bytes)
    while size <= max_size:
        out_of_memory = False
        try:
            seconds, peak_bytes = measure(size)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            out_of_memory = True
        if out_of_memory or peak_bytes - idle_bytes > budget:
            break
        rate = size / max(seconds, 1e-9)
        if rate < MIN_SPEEDUP * best_rate:
            break
        best, best_rate = size, rate
        # Activations grow with the batch: the next size is known not to fit before it is tried.
        if 2 * (peak_bytes - idle_bytes) > budget:
            break
        size *= 2
    return best


def is_out_of_memory(exc: BaseException) -> bool:
    """Return whether an exception says that the device or the host has too little memory, and nothing worse.

    PyTorch raises its own type only for its own allocator; cuBLAS, cuDNN and the CPU's allocator raise RuntimeError.
    """
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    return isinstance(exc, RuntimeError) and any(words in str(exc).lower() for words in _OUT_OF_MEMORY_TEXTS)


def max_batch_rows(rows: int, image_bytes: int) -> int:
    """Return how many of ``rows`` images of ``image_bytes`` each fit into :data:`MAX_BATCH_BYTES`; at least 1."""
    return max(1, min(rows, MAX_BATCH_BYTES // image_bytes))


def padding_rows(sizes: Iterable[int], rows: int) -> int:
    """Return the number of padding rows that images need so that Ray's batches of ``rows`` rows stay within :data:`MAX_BATCH_BYTES`.

    Ray counts rows and not bytes. An image that takes more than its share of :data:`MAX_BATCH_BYTES` therefore counts as many rows
    as the shares that it takes, at most a full batch. A batch then has at most :data:`MAX_BATCH_BYTES` plus one image.

    Args:
        sizes: Bytes of each image.
        rows: Rows of a batch.
    """
    return sum(min(rows, max(1, -(-size * rows // MAX_BATCH_BYTES))) - 1 for size in sizes)


def split_by_bytes(sizes: Iterable[int]) -> list[slice]:
    """Split images into consecutive slices of at most :data:`MAX_BATCH_BYTES` each; a larger image has its own slice.

    Args:
        sizes: Bytes of each image.
    """
    starts, slice_bytes, index = [0], 0, -1
    for index, size in enumerate(sizes):
        if slice_bytes and slice_bytes + size > MAX_BATCH_BYTES:
            starts.append(index)
            slice_bytes = 0
        slice_bytes += size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], index + 1], strict=True)]
