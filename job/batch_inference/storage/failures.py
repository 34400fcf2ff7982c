"""Failures of stores and disks: their facts, the cause that matches, and the message for people."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from dataclasses import dataclass

from batch_inference.config import StorageConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError, UserError
from batch_inference.storage.causes import CREDENTIALS_REMEDIES, STORE_CAUSES, FailureFacts
from batch_inference.storage.uris import endpoint_of

# For the one request without credentials that asks where a bucket is; a job that fails anyway waits no longer for it.
_REGION_TIMEOUT_S = 5.0
_RIGHTS = " They must allow list and read on the input, and list, read, write and delete on the output."
_PAYER = " A requester-pays bucket of S3 needs AWS_REQUEST_PAYER=true."
# An error of S3's or Azure's. Only code and message are shown, because the rest may repeat the request, a token
# included.
_XML = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error\b.*(?:</Error>|\Z)", re.DOTALL)
_HTML = re.compile(r"<(?:!doctype\s+html|html)\b.*\Z", re.DOTALL | re.IGNORECASE)
_STATUS = re.compile(r"(?:status(?: code)?|response): (\d{3})\b", re.IGNORECASE)
_XML_CODE = re.compile(r"<Code>([^<]*)</Code>", re.IGNORECASE)
_JSON_CODE = re.compile(r'"(?:error|status)"\s*:\s*"([\w.]+)"')
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bOs \{\s*code: (\d+)")
# Durations differ from row to row, and the rest repeats the fact before it.
_NOISE = re.compile(
    r" in [\d.]+(?:ns|µs|ms|s)\b|, max_retries: \d+|, retry_timeout: [\d.]+\w*|^Generic \w+ error: |Error performing list request: "
    r"|Server returned non-2xx status code: "
)
_INNER = re.compile(r'\b(?:message|error): "([^"]+)"')
_INNER_TLS = re.compile(r"\b(InvalidCertificate|InvalidMessage|AlertReceived)\(\s*(\w+)")
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'", re.IGNORECASE)
_IN_REGION = re.compile(r"is in another region: ([\w-]+): ")
# Buckets that have answered this process. If the machine's role gave credentials for them, a metadata service without
# any fails only for the moment.
_reachable: set[str] = set()


@dataclass(frozen=True)
class StoreError:
    """An exception of a store or a disk, classified.

    Attributes:
        error_type: Error type of a row that fails of it.
        message: The fact, with the store's own code and words.
        retryable: Whether the same request may succeed another time.
        remedy: What to do about it.
        error_class: Exception that ends a job that cannot go on without the object.
    """

    error_type: str
    message: str
    retryable: bool
    remedy: str = ""
    error_class: type[UserError] | type[InfrastructureError] = InfrastructureError

    def job_error(self, failed: str) -> BatchInferenceError:
        """Return the exception that ends the job; its message begins with what failed, such as "cannot read x"."""
        return self.error_class(f"{failed}: {self.message}", self.remedy)


def short_message(exc: BaseException) -> str:
    """Return an exception's message without a library's debug dump; a store's answer is cut to code and message."""
    text, _, dump = str(exc).partition("\n\nDebug source")

    def xml(answer: re.Match[str]) -> str:
        parts = [re.search(rf"<{tag}>([^<]*)</{tag}>", answer[0]) for tag in ("Code", "Message")]
        return ": ".join(part[1].strip() for part in parts if part) or "an error without a code"

    def page(answer: re.Match[str]) -> str:
        title = re.search(r"<title>([^<]*)</title>", answer[0], re.IGNORECASE)
        return f"a web page{f' with the title {title[1].strip()!r}' if title else ''}"

    text = _shorten_json(_HTML.sub(page, _XML.sub(xml, text)))
    text = _NOISE.sub("", text).replace("  ", " ").strip()
    if text.endswith("error sending request"):
        tls = _INNER_TLS.search(dump)
        inner = _INNER.search(dump)
        reason = " ".join(tls.groups()) if tls else inner[1] if inner else ""
        text += f": {reason}" if reason else ""
    return text


def _shorten_json(text: str) -> str:
    """Return a message in which a JSON answer of Google's or Azure's is replaced by its message."""
    begin = text.find("{")
    if begin < 0:
        return text
    try:
        answer = json.loads(text[begin:])
    except ValueError:
        return text
    inner = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(inner, dict):
        words = str(inner.get("message", ""))
    else:
        words = ": ".join(str(answer[key]) for key in ("error", "error_description") if answer.get(key))
    return text[:begin] + (words or "an error without a message")


def gather_facts(exc: BaseException, *, verb: str = "", scheme: str = "", reachable: bool = False) -> FailureFacts:
    """Return the facts about an exception of a store, of the operating system or of Ray."""
    text = str(exc)
    short = text.partition("\n\nDebug source")[0]
    status = _STATUS.search(short)
    code = _XML_CODE.search(short) or _JSON_CODE.search(short)
    number = getattr(exc, "errno", None)
    if number is None and (match := _OS_ERROR.search(text)):
        number = int(match[1] or match[2])
    elif number is not None:
        scheme = scheme or "file"  # an exception of Python's own; those of obstore have no number
    exceptions = [base.__name__ for base in type(exc).__mro__]
    exceptions += [f"{base.__module__}.{base.__name__}" for base in type(exc).__mro__]
    return FailureFacts(
        frozenset(exceptions),
        number if isinstance(number, int) else None,
        int(status[1]) if status else None,
        code[1].strip() if code else "",
        text,
        short_message(exc) or type(exc).__name__,
        verb,
        scheme,
        reachable,
    )


def mark_reachable(root: str) -> None:
    """Note that a bucket has answered."""
    _reachable.add(root)


def classify(
    exc: Exception, root: str = "", storage: StorageConfig | None = None, *, verb: str = "read", where: str = ""
) -> StoreError:
    """Classify an exception of a store or of the operating system, with what this process knows of the bucket.

    Args:
        exc: The exception.
        root: The bucket that was asked, ``file://`` for disks, "" if it is not known.
        storage: Settings of the store.
        verb: Operation that failed: read, write, create, list or delete.
        where: The local folder, to tell how much space is free.
    """
    endpoint = endpoint_of(root.partition("://")[0], storage) if storage else None
    return match_store_error(exc, root, verb=verb, reachable=root in _reachable, endpoint=endpoint, where=where)


def match_store_error(
    exc: BaseException,
    root: str = "",
    *,
    verb: str = "read",
    reachable: bool = False,
    endpoint: str | None = None,
    where: str = "",
) -> StoreError:
    """Classify an exception of a store or of the operating system by the table of causes.

    Args:
        exc: The exception.
        root: The bucket that was asked, ``file://`` for disks, "" if it is not known.
        verb: Operation that failed: read, write, create, list or delete.
        reachable: Whether the bucket has answered this process before.
        endpoint: URL of the store, if it is not the scheme's own.
        where: The local folder, to tell how much space is free.
    """
    scheme = root.partition("://")[0]
    facts = gather_facts(exc, verb=verb, scheme=scheme, reachable=reachable)
    cause = next(cause for cause in STORE_CAUSES if cause.matches(facts))
    region = ""
    if cause.remedy == "{region}":
        named = _REGION.search(facts.text)
        region = (named[1] or named[2]) if named else _ask_region(root, endpoint) if scheme == "s3" else ""
    parts = [cause.fact, region, facts.message if cause.detail else ""]
    return StoreError(
        cause.error_type,
        ": ".join(part for part in parts if part),
        cause.retryable,
        _fill_in(cause.remedy, facts.scheme, region, where or str(getattr(exc, "filename", None) or "")),
        cause.error_class,
    )


def error_of_failed_rows(fact: str, error_type: str, message: str) -> BatchInferenceError:
    """Return the error that ends a job in which all fetches failed for one reason.

    Args:
        fact: Message of the error.
        error_type: Error type of the rows.
        message: Message of the rows, which contains the fact of the table's entry.
    """
    entries = [cause for cause in STORE_CAUSES if cause.error_type == error_type and cause.fact in message]
    if not entries:
        # The store could not even be opened, or an older attempt made the rows.
        entries = [cause for cause in STORE_CAUSES if cause.error_type == error_type][-1:] or [STORE_CAUSES[-1]]
    cause = max(entries, key=lambda entry: len(entry.fact))
    region = _IN_REGION.search(message)
    return cause.error_class(fact, _fill_in(cause.remedy, "", region[1] if region else ""))


def _fill_in(remedy: str, scheme: str, region: str = "", path: str = "") -> str:
    if "{" not in remedy:
        return remedy
    region_remedy = (
        f"Add --set storage.region={region}, or set AWS_REGION={region}."
        if region
        else "Set storage.region to the bucket's own: aws s3api get-bucket-location --bucket NAME tells it."
    )
    certificates = os.environ.get("SSL_CERT_FILE")
    return remedy.format(
        credentials=CREDENTIALS_REMEDIES.get(scheme, CREDENTIALS_REMEDIES[""]),
        rights="" if scheme == "file" else _RIGHTS + (_PAYER if scheme in ("s3", "") else ""),
        region=region_remedy,
        free=_free_space(path),
        ca=f"SSL_CERT_FILE is {certificates} now." if certificates else "",
    ).strip()


def _free_space(path: str) -> str:
    """Return in words how much space is free on the disk of ``path``, or how to find out."""
    while path and not os.path.exists(path) and path != os.path.dirname(path):  # noqa: PTH110, PTH120
        path = os.path.dirname(path)  # noqa: PTH120
    if not path:
        return "df -h shows what is free, df -i how many files"
    usage = shutil.disk_usage(path)
    return (
        f"{usage.free:,} of {usage.total:,} bytes are free on the disk of {path} (df -h; df -i for the number of files)"
    )


@functools.lru_cache(maxsize=64)
def _ask_region(root: str, endpoint: str | None) -> str:
    """Ask a bucket for its region, once and without credentials; return "" if it does not say."""
    import urllib.error
    import urllib.request

    base = (endpoint or "https://s3.us-east-1.amazonaws.com").rstrip("/")
    if not base.startswith(("http://", "https://")):
        return ""
    request = urllib.request.Request(f"{base}/{root.partition('://')[2]}", method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_REGION_TIMEOUT_S) as answer:  # noqa: S310
            region = answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as exc:
        region = exc.headers.get("x-amz-bucket-region")
    except (OSError, ValueError):
        region = None
    return region if region and re.fullmatch(r"[\w-]{1,40}", region) else ""
