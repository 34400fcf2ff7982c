"""Every ``error_type`` that the errors table may hold: what it means, and what to do about it.

The documents' table is made of it, and a test compares it with the places that raise them.
"""

from __future__ import annotations

import re
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
        "list",
        "EMPTY_FILE",
        "the tar or Parquet file has no bytes; its images are not known",
        "Upload it again; a new job.",
    ),
    ErrorType(
        "list",
        "UNKNOWN_FORMAT",
        "the file is named like a tar or Parquet file and is something else; the message says what it looks like",
        "Make or upload it again, or leave it out; a new job.",
    ),
    ErrorType(
        "list",
        "TRUNCATED",
        "the tar or Parquet file ends too early; images before that place in a tar file are rows of their own, others are not known",
        "Upload it again; a new job.",
    ),
    ErrorType(
        "list",
        "CORRUPT",
        "the tar or Parquet file is damaged at the byte in the message; images before it in a tar file are rows of their own, "
        "others are not known",
        "Make or upload it again; a new job.",
    ),
    ErrorType(
        "list",
        "UNREADABLE",
        "the tar or Parquet file may not be read, or is gone; its images are not known",
        "Make it readable; a new job.",
    ),
    ErrorType(
        "list",
        "NO_IMAGE_COLUMN",
        "the Parquet file has no column of encoded images, or more than one; the message says which way it can be read",
        "As the message says; a new job.",
    ),
    ErrorType(
        "list",
        "SPARSE_MEMBER",
        "the tar file's member is stored as a sparse file, which is not in one piece",
        "Make the archive without `--sparse`; a new job.",
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
    ErrorType(
        "fetch",
        "ARCHIVED",
        "the object is in an archive class (Glacier, Deep Archive, Azure's archive tier) and has to be restored first",
        "Restore it, then `retry --error-type ARCHIVED`.",
    ),
    ErrorType(
        "fetch",
        "REFUSED",
        "the store or the system refuses such requests: another region, a certificate, an answer of 4xx that has no type of its own",
        "Do what the message says, then `retry --error-type REFUSED`.",
    ),
    ErrorType(
        "fetch", "INVALID_URI", "no store takes such a name, or it is no regular file", "Correct the name; a new job."
    ),
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
        "not an image of a known format; the message says what it looks like and names a command that converts it",
        "Convert it, or leave such files out by `input.extensions`.",
    ),
    ErrorType(
        "decode",
        "UNSUPPORTED_MODE",
        "an image whose pixels have no defined black and white, or a variant that the decoder does not know",
        "Convert it.",
    ),
    ErrorType(
        "decode",
        "TRUNCATED",
        "the image ends early",
        "Upload it again, then `retry --stage decode`; or a new job with `preprocess.damaged: accept`.",
    ),
    ErrorType(
        "decode",
        "CORRUPT",
        "the image is damaged",
        "Upload it again, then `retry --stage decode`; or a new job with `preprocess.damaged: accept`.",
    ),
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
        "what the class returned is no dictionary of columns with one value an image, or does not fit the job's columns (`_schema.json`)",
        "Fix the class; a new job.",
    ),
)


def remedy_of(stage: str, name: str, output: str) -> str:
    """Return what to do about a kind of failed row, with commands that can be typed.

    >>> remedy_of("fetch", "TIMEOUT", "out")
    'batch-inference retry out.'
    """
    found = next((one.remedy for one in ERROR_TYPES if (one.stage, one.name) == (stage, name)), "")
    return re.sub(r"`([^`]*)`", r"\1", found.replace("`retry", f"`batch-inference retry {output}"))
