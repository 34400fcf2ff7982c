"""Every ``error_type`` that the errors table may hold: what it means, and what to do about it.

The documents' table is made of it, and a test compares it with the places that raise them.
"""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.errors import Stage


@dataclass(frozen=True)
class ErrorType:
    """A kind of failed row.

    Attributes:
        stage: Where it happens.
        name: As it stands in the column ``error_type``.
        meaning: What has happened.
        remedy: What to do about it.
        retryable: Whether ``batch-inference retry`` does such rows again without being asked for them by name.
    """

    stage: Stage
    name: str
    meaning: str
    remedy: str
    retryable: bool = False


#: Exceptions of resizing have no kind of their own: the name of Python's exception, in capitals.
EXCEPTION = "(an exception's name)"

ERROR_TYPES: tuple[ErrorType, ...] = (
    ErrorType("list", "INVALID_URI", "the line of the manifest is no location", "Correct the manifest; a new job."),
    ErrorType(
        "list",
        "NOT_ALLOWED",
        "it lies outside of `input.allowed_prefixes`",
        "Allow the place, or leave the line out; a new job.",
    ),
    ErrorType(
        "fetch",
        "NOT_FOUND",
        "there is no such object, file, member or bytes",
        "Restore it, then `retry --error-type NOT_FOUND`.",
    ),
    ErrorType(
        "fetch",
        "ACCESS_DENIED",
        "the credentials may not read it",
        "Allow it, then `retry --error-type ACCESS_DENIED`.",
    ),
    ErrorType(
        "fetch",
        "UNAUTHENTICATED",
        "there are no credentials, or they have expired",
        "Give valid ones, then `retry --error-type UNAUTHENTICATED`.",
    ),
    ErrorType("fetch", "INVALID_URI", "no store takes such a name", "Correct the name; a new job."),
    ErrorType("fetch", "TOO_LARGE", "more bytes than `preprocess.max_bytes`", "A new job with a higher limit."),
    ErrorType(
        "fetch",
        "THROTTLED",
        "the store asked to slow down, longer than `storage.retry_timeout_s`",
        "Fewer requests (`storage.fetch_concurrency`), then `retry`.",
        True,
    ),
    ErrorType("fetch", "TIMEOUT", "no answer within `storage.timeout_s`, after all retries", "`retry`.", True),
    ErrorType(
        "fetch",
        "STORE_UNREACHABLE",
        "connections failed, or the store answered with errors, after all retries",
        "`retry`.",
        True,
    ),
    ErrorType(
        "fetch",
        "CHANGED",
        "the object, or the tar or Parquet file, was replaced since the job was planned",
        "`retry --error-type CHANGED` takes objects as they are now; a new job for members of files.",
    ),
    ErrorType(
        "fetch", "TRUNCATED", "the tar or Parquet file ends before this image does", "Make the file anew; a new job."
    ),
    ErrorType("fetch", "CORRUPT", "this part of the Parquet file is damaged", "Make the file anew; a new job."),
    ErrorType(
        "fetch", "UNEXPECTED", "fetching raised something that has no kind", "Look at the message; please report it."
    ),
    ErrorType("decode", "EMPTY_FILE", "the file has no bytes", "Upload it again, then `retry --stage decode`."),
    ErrorType(
        "decode",
        "UNKNOWN_FORMAT",
        "not an image of a known format; the message says what it looks like",
        "Convert it, or leave such files out by `input.extensions`.",
    ),
    ErrorType(
        "decode",
        "UNSUPPORTED_MODE",
        "an image whose pixels have no defined black and white, or a variant that the decoder does not know",
        "Convert it.",
    ),
    ErrorType("decode", "TRUNCATED", "the image ends early", "Upload it again, then `retry --stage decode`."),
    ErrorType("decode", "CORRUPT", "the image is damaged", "Upload it again, then `retry --stage decode`."),
    ErrorType(
        "decode",
        "TOO_MANY_PIXELS",
        "more pixels than `preprocess.max_pixels`; it was not decoded",
        "A new job with a higher limit, if the image is no bomb.",
    ),
    ErrorType(
        "decode",
        "DECODE_MEMORY",
        "more memory than `preprocess.decode_memory_mib` allows, or than there is",
        "`retry --error-type DECODE_MEMORY --set preprocess.decode_memory_mib=…`.",
    ),
    ErrorType(
        "decode",
        "DECODE_TIMEOUT",
        "it took more CPU time than `preprocess.decode_timeout_s`, or the decoder hangs",
        "`retry --error-type DECODE_TIMEOUT --set preprocess.decode_timeout_s=…`.",
    ),
    ErrorType("decode", "DECODER_CRASH", "the decoder's process died of it", "Convert it; do not trust it."),
    ErrorType("preprocess", EXCEPTION, "resizing failed", "Look at the message; please report it."),
    ErrorType(
        "preprocess",
        "UNEXPECTED",
        "decoding raised something that has no kind",
        "Look at the message; please report it.",
    ),
    ErrorType(
        "infer",
        "PREDICTOR_ERROR",
        "the network or the class raised on this image",
        "Mend the class: a new job, for a changed class is another.",
    ),
    ErrorType(
        "infer",
        "PREDICTOR_CRASH",
        "the actor's process died of this image twice, when it was alone",
        "Mend the class or the library under it.",
    ),
    ErrorType(
        "infer", "OUT_OF_MEMORY", "there was no memory for this image alone", "Fewer actors a GPU, then `retry`.", True
    ),
    ErrorType(
        "infer",
        "NOT_FINITE",
        "the network's output is infinite or not a number",
        "Compute in float32: a new job with `inference.precision: float32`, or `inference.embedding_dtype`.",
    ),
    ErrorType(
        "postprocess",
        "OUTPUT_MISMATCH",
        "what the class returned is no dictionary of columns with one value an image",
        "Mend the class; a new job.",
    ),
)
