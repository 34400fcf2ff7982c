"""Every ``error_type`` of the errors table, with its meaning and its remedy.

The table in the documents is written from it, and a test compares it with the code that raises them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from batch_inference.errors import Stage


@dataclass(frozen=True)
class ErrorType:
    """A type of failed row.

    Attributes:
        stage: The stage that fails.
        name: The value of the column ``error_type``.
        meaning: The fact, for the documents.
        remedy: The way to fix it, for the documents and the verdict.
        retryable: Whether ``batch-inference retry`` includes such rows without options.
    """

    stage: Stage
    name: str
    meaning: str
    remedy: str
    retryable: bool = False


#: Exceptions of resizing have no type of their own: the error type is the name of Python's exception, in capitals.
EXCEPTION = "(an exception's name)"

ERROR_TYPES: tuple[ErrorType, ...] = (
    ErrorType(
        "list", "INVALID_URI", "the line of the manifest is not a location", "Correct the manifest and start a new job."
    ),
    ErrorType(
        "list",
        "NOT_ALLOWED",
        "the location is outside of `input.allowed_prefixes`",
        "Add the location to `input.allowed_prefixes` or remove the line, and start a new job.",
    ),
    ErrorType(
        "list",
        "EMPTY_FILE",
        "the tar or Parquet file has no bytes; its images are not known",
        "Upload it again and start a new job.",
    ),
    ErrorType(
        "list",
        "UNKNOWN_FORMAT",
        "the file has the name of a tar or Parquet file, but other content; the message says what it looks like",
        "Create or upload it again or leave it out, and start a new job.",
    ),
    ErrorType(
        "list",
        "TRUNCATED",
        "the tar or Parquet file ends too early; images before that byte of a tar file are rows of their own, others are not known",
        "Upload it again and start a new job.",
    ),
    ErrorType(
        "list",
        "CORRUPT",
        "the tar or Parquet file is damaged at the byte in the message; images before it in a tar file are rows of their own, "
        "others are not known",
        "Create or upload it again and start a new job.",
    ),
    ErrorType(
        "list",
        "UNREADABLE",
        "the tar or Parquet file cannot be read, or is gone; its images are not known",
        "Make it readable and start a new job.",
    ),
    ErrorType(
        "list",
        "NO_IMAGE_COLUMN",
        "the Parquet file has no column of encoded images, or more than one; the message says which way it can be read",
        "Do what the message says and start a new job.",
    ),
    ErrorType(
        "list",
        "SPARSE_MEMBER",
        "the member of the tar file is stored as a sparse file, in several pieces",
        "Create the archive without `--sparse` and start a new job.",
    ),
    ErrorType(
        "fetch",
        "NOT_FOUND",
        "the object, file, member or value does not exist",
        "Restore it, then `retry --error-type NOT_FOUND`.",
    ),
    ErrorType(
        "fetch",
        "ACCESS_DENIED",
        "the credentials do not allow reading it",
        "Grant read access, then `retry --error-type ACCESS_DENIED`.",
    ),
    ErrorType(
        "fetch",
        "UNAUTHENTICATED",
        "there are no credentials, or they have expired",
        "Provide valid credentials, then `retry --error-type UNAUTHENTICATED`.",
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
        "the store or the system refused the request: another region, a certificate, or a 4xx that has no type of its own",
        "Do what the message says, then `retry --error-type REFUSED`.",
    ),
    ErrorType(
        "fetch",
        "INVALID_URI",
        "no store accepts this name, or it is not a regular file",
        "Correct the name and start a new job.",
    ),
    ErrorType(
        "fetch",
        "TOO_LARGE",
        "the file has more bytes than `preprocess.max_bytes`",
        "Start a new job with a higher limit.",
    ),
    ErrorType(
        "fetch",
        "THROTTLED",
        "the store asked to slow down for longer than `storage.retry_timeout_s`",
        "Lower `storage.fetch_concurrency`, then `retry`.",
        True,
    ),
    ErrorType("fetch", "TIMEOUT", "no answer within `storage.timeout_s`, after all retries", "Run `retry`.", True),
    ErrorType(
        "fetch",
        "STORE_UNREACHABLE",
        "connections failed, or the store returned errors, after all retries",
        "Run `retry`.",
        True,
    ),
    ErrorType(
        "fetch",
        "CHANGED",
        "the object, or the tar or Parquet file, was replaced since the job was planned",
        "Run `retry --error-type CHANGED`, which reads objects as they are now; for members of files start a new job.",
    ),
    ErrorType(
        "fetch",
        "TRUNCATED",
        "the tar or Parquet file ends before this image does",
        "Create the file again and start a new job.",
    ),
    ErrorType(
        "fetch", "CORRUPT", "this part of the Parquet file is damaged", "Create the file again and start a new job."
    ),
    ErrorType(
        "fetch", "UNEXPECTED", "fetching raised an exception that has no type", "Please report it, with the message."
    ),
    ErrorType("decode", "EMPTY_FILE", "the file has no bytes", "Upload it again, then `retry --stage decode`."),
    ErrorType(
        "decode",
        "UNKNOWN_FORMAT",
        "not an image of a known format; the message says what it looks like, and names a command that converts it",
        "Convert it, or leave such files out with `input.extensions`.",
    ),
    ErrorType(
        "decode",
        "UNSUPPORTED_MODE",
        "the pixels have no defined black and white, or the variant is unknown to the decoder",
        "Convert it.",
    ),
    ErrorType(
        "decode",
        "TRUNCATED",
        "the image ends early",
        "Upload it again, then `retry --stage decode`; or start a new job with `preprocess.damaged: accept`.",
    ),
    ErrorType(
        "decode",
        "CORRUPT",
        "the image is damaged",
        "Upload it again, then `retry --stage decode`; or start a new job with `preprocess.damaged: accept`.",
    ),
    ErrorType(
        "decode",
        "TOO_MANY_PIXELS",
        "the image has more pixels than `preprocess.max_pixels`; it was not decoded",
        "Start a new job with a higher limit, unless the image is a decompression bomb.",
    ),
    ErrorType(
        "decode",
        "DECODE_MEMORY",
        "decoding took more memory than `preprocess.decode_memory_mib`, or than was available",
        "Run `retry --error-type DECODE_MEMORY --set preprocess.decode_memory_mib=…`.",
    ),
    ErrorType(
        "decode",
        "DECODE_TIMEOUT",
        "decoding took more CPU time than `preprocess.decode_timeout_s`, or the decoder hangs",
        "Run `retry --error-type DECODE_TIMEOUT --set preprocess.decode_timeout_s=…`.",
    ),
    ErrorType("decode", "DECODER_CRASH", "the decoder's process died of the image", "Convert it; do not trust it."),
    ErrorType("preprocess", EXCEPTION, "resizing failed", "Please report it, with the message."),
    ErrorType(
        "preprocess",
        "UNEXPECTED",
        "decoding raised an exception that has no type",
        "Please report it, with the message.",
    ),
    ErrorType(
        "infer",
        "PREDICTOR_ERROR",
        "the network or the class raised on this image",
        "Fix the class and start a new job, because a changed class is another job.",
    ),
    ErrorType(
        "infer",
        "PREDICTOR_CRASH",
        "the actor's process died of this image twice, when the image was alone",
        "Fix the class, or the library that it calls.",
    ),
    ErrorType(
        "infer",
        "OUT_OF_MEMORY",
        "there was not enough memory for this image alone",
        "Run fewer actors on a GPU, then `retry`.",
        True,
    ),
    ErrorType(
        "infer",
        "NOT_FINITE",
        "the output of the network is infinite or not a number",
        "Compute in float32: start a new job with `inference.precision: float32`, or `inference.embedding_dtype`.",
    ),
    ErrorType(
        "postprocess",
        "OUTPUT_MISMATCH",
        "the class did not return a dictionary of columns with one value an image, or values do not fit the job's columns (`_schema.json`)",
        "Fix the class and start a new job.",
    ),
)


def remedy_of(stage: str, name: str, output: str) -> str:
    """Return the remedy for a type of failed row, with commands that can be typed.

    >>> remedy_of("fetch", "TIMEOUT", "out")
    'Run batch-inference retry out.'
    """
    remedy = next((e.remedy for e in ERROR_TYPES if (e.stage, e.name) == (stage, name)), "")
    return re.sub(r"`([^`]*)`", r"\1", remedy.replace("`retry", f"`batch-inference retry {output}"))
