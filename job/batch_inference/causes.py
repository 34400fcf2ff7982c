"""Causes of failures: what stores, file systems, Ray and the system answer, and what to do about it.

One table for stores and disks, one for Ray. Each entry says which answers it is for, what becomes of a row that meets one
(``error_type``, ``retryable``), how a job ends that meets one where it cannot go on (exit 2 or 5), the fact in plain words and
the remedy. The first entry that matches counts. Exit 5 asks for the same command again, so an answer that will be the same next
time never leads there: a 4xx or an error of the operating system that no entry names ends with 2.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batch_inference.errors import BatchInferenceError, SystemFault, UserError

# One request without credentials, to hear where a bucket is; a job that fails anyway waits no longer for it.
_REGION_TIMEOUT_S = 5.0
# Errors of a hard link where the file system has none.
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
RAY_LOGS = "/tmp/ray/session_latest/logs"  # noqa: S108

CREDENTIALS = {
    "s3": "Check the credentials in the environment: AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, AWS_PROFILE (one with keys in "
    '~/.aws), or this machine\'s role. For SSO: eval "$(aws configure export-credentials --format env)".',
    "gs": "Check the credentials in the environment: GOOGLE_APPLICATION_CREDENTIALS (a key file), or run where a service account gives "
    "access.",
    "az": "Check the credentials in the environment: AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or run with a managed identity.",
    "file": "Check owner and permissions with ls -ld, and which user this runs as with id.",
    "": "Check the credentials in the environment (AWS_…, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_…).",
}
_RIGHTS = " They must allow list and read on the input, and list, read, write and delete on the output."
_PAYER = " A requester-pays bucket of S3 needs AWS_REQUEST_PAYER=true."
PUT_IF_ABSENT = (
    "Use a store that supports If-None-Match on PUT (S3, GCS, Azure, a recent MinIO or SeaweedFS, a local disk); without it two "
    "drivers could both commit a shard. Inputs may stay where they are."
)
_AGAIN = "start the same command again; it resumes."


@dataclass(frozen=True)
class Facts:
    """What is known about a failure.

    Attributes:
        kinds: Names of the exception's classes.
        errno: The operating system's error number, if there is one.
        status: The HTTP status, if there is one.
        code: The code in a store's answer, "" if there is none.
        text: All that the exception says, with a library's debug dump.
        said: The same in short, for people; holds no credentials.
        verb: What was tried: read, write, create, list or delete.
        scheme: Of the store: file, s3, gs, az, or "" if that is not known.
        answered: Whether the bucket has answered this process before.
    """

    kinds: frozenset[str]
    errno: int | None
    status: int | None
    code: str
    text: str
    said: str
    verb: str = ""
    scheme: str = ""
    answered: bool = False


@dataclass(frozen=True)
class When:
    """An answer that an entry is for: everything that is given must match.

    Attributes:
        kinds: Names of exception classes, alone or with their module.
        errnos: Error numbers of the operating system.
        statuses: HTTP statuses.
        codes: Codes in the answer.
        text: Regular expression, any case, for the exception's whole text.
        verbs: What was tried.
        schemes: Which stores.
        answered: Whether the bucket has answered before.
    """

    kinds: frozenset[str] = frozenset()
    errnos: frozenset[int] = frozenset()
    statuses: frozenset[int] = frozenset()
    codes: frozenset[str] = frozenset()
    text: str = ""
    verbs: frozenset[str] = frozenset()
    schemes: frozenset[str] = frozenset()
    answered: bool | None = None

    def matches(self, facts: Facts) -> bool:
        """Return whether this describes a failure."""
        return (
            (not self.kinds or not self.kinds.isdisjoint(facts.kinds))
            and (not self.errnos or facts.errno in self.errnos)
            and (not self.statuses or facts.status in self.statuses)
            and (not self.codes or facts.code in self.codes)
            and (not self.verbs or facts.verb in self.verbs)
            and (not self.schemes or facts.scheme in self.schemes)
            and (self.answered is None or facts.answered == self.answered)
            and (not self.text or re.search(self.text, facts.text, re.IGNORECASE | re.DOTALL) is not None)
        )


@dataclass(frozen=True)
class Cause:
    """An entry of the tables.

    Attributes:
        says: The fact. It begins the message, and no other entry of the table has it; "" where Ray's words have to do.
        remedy: What to do. ``{credentials}``, ``{rights}``, ``{region}``, ``{free}``, ``{ca}`` and ``{logs}`` are filled in.
        error_type: Of a row that fails of it.
        retryable: Whether such a row may well succeed another time.
        ends: How a job ends that cannot go on.
        when: The answers that it is for.
        detail: Whether the answer's own words follow.
    """

    says: str
    remedy: str
    error_type: str
    retryable: bool
    ends: type[UserError] | type[SystemFault]
    when: tuple[When, ...]
    detail: bool = True

    def matches(self, facts: Facts) -> bool:
        """Return whether this entry is for a failure."""
        return any(when.matches(facts) for when in self.when)


def _user(
    says: str, remedy: str, *when: When, row: str = "REFUSED", retryable: bool = False, detail: bool = True
) -> Cause:
    """An entry that only the user can do something about: exit 2."""
    return Cause(says, remedy, row, retryable, UserError, when, detail)


def _system(says: str, remedy: str, *when: When, row: str = "STORE_UNREACHABLE", retryable: bool = True) -> Cause:
    """An entry for what another try may find gone: exit 5."""
    return Cause(says, remedy, row, retryable, SystemFault, when)


@dataclass(frozen=True)
class Failure:
    """A store's or a disk's exception, sorted.

    Attributes:
        error_type: Of a row that fails of it.
        message: The fact, with the store's own code and words.
        retryable: Whether the same request may well succeed another time.
        remedy: What to do about it.
        ends: How a job ends that cannot go on without what was asked for.
    """

    error_type: str
    message: str
    retryable: bool
    remedy: str = ""
    ends: type[UserError] | type[SystemFault] = SystemFault

    def ending(self, what: str) -> BatchInferenceError:
        """Return what ends the job: ``what`` could not be done."""
        return self.ends(f"{what}: {self.message}", self.remedy)


def _set(*names: Any) -> frozenset[Any]:
    return frozenset(names)


_METADATA_SERVICE = r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal"
_NO_BUCKET = "Check the name of the bucket or container, storage.endpoint_url and the account."
_REMOTE = _set("s3", "gs", "az")

#: What stores, file systems and connections answer. The first entry that matches counts; the last matches everything.
STORES: tuple[Cause, ...] = (
    # --- credentials that a machine's role gives ------------------------------------------------------------------------------
    _system(
        "the metadata service gives no new credentials",
        f"Check the machine's metadata service, then {_AGAIN}",
        When(text=_METADATA_SERVICE, answered=True),
    ),
    _user(
        "there are no credentials in the environment, and this machine has no role that gives some",
        "{credentials} A public bucket: --set storage.anonymous=true.",
        When(text=_METADATA_SERVICE),
        row="UNAUTHENTICATED",
        detail=False,
    ),
    # --- what is not there ----------------------------------------------------------------------------------------------------
    _user(
        "there is no such bucket",
        _NO_BUCKET,
        When(codes=_set("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")),
        row="NOT_FOUND",
    ),
    _system(
        "a part of the upload was lost",
        f"Check that nothing removes unfinished uploads within minutes (a lifecycle rule), then {_AGAIN}",
        When(codes=_set("NoSuchUpload", "InvalidBlockList")),
    ),
    _user(
        "there is no bucket or folder of that name",
        f"Check that the bucket or folder exists. {_NO_BUCKET}",
        When(kinds=_set("FileNotFoundError", "NotADirectoryError", "NotFoundError"), verbs=_set("write", "create")),
        When(statuses=_set(404), verbs=_set("list", "write", "create")),
        row="NOT_FOUND",
    ),
    _user(
        "this is a folder, not a file",
        "Name a file, or give the folder as an input.",
        When(kinds=_set("IsADirectoryError")),
        row="NOT_FOUND",
        detail=False,
    ),
    _user(
        "this is a socket or a device, not a file",
        "Leave it out of the input.",
        When(errnos=_set(errno.ENXIO, errno.ENODEV)),
        row="NOT_FOUND",
        detail=False,
    ),
    _user(
        "there is no such object",
        "Check the location.",
        When(kinds=_set("FileNotFoundError", "NotADirectoryError", "NotFoundError")),
        When(statuses=_set(404)),
        row="NOT_FOUND",
        detail=False,
    ),
    # --- credentials ----------------------------------------------------------------------------------------------------------
    _user(
        "not authenticated: the credentials have expired",
        "Renew the credentials and start the same command again; it resumes. A role renews them by itself.",
        When(codes=_set("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")),
        row="UNAUTHENTICATED",
    ),
    _user(
        "not authenticated: the clocks of this machine and of the store differ by too much",
        "Set the clock (timedatectl set-ntp true), then start the same command again; it resumes.",
        When(codes=_set("RequestTimeTooSkewed", "RequestExpired")),
        row="UNAUTHENTICATED",
    ),
    _user(
        "not authenticated: this role cannot be taken",
        "Check AWS_ROLE_ARN, the role's trust policy and the annotation of the service account, which give the credentials.",
        When(text=r"AssumeRole|InvalidIdentityToken|//sts\.", statuses=_set(400, 401, 403)),
        row="UNAUTHENTICATED",
    ),
    _user(
        "not authenticated: no token is given for these credentials",
        "{credentials}",
        When(
            text=r"invalid_grant|invalid_client|AADSTS\d+|error performing token request", statuses=_set(400, 401, 403)
        ),
        row="UNAUTHENTICATED",
    ),
    _user(
        "access denied: the store does not know this key, or the signature does not match",
        "{credentials}",
        When(
            codes=_set(
                "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo"
            )
        ),
        row="ACCESS_DENIED",
    ),
    _user(
        "access denied: the account is disabled or not paid for",
        "Look at the account and its billing.",
        When(
            codes=_set(
                "AccountIsDisabled", "AllAccessDisabled", "AccountProblem", "UserProjectAccountProblem", "NotSignedUp"
            )
        ),
        When(text=r"billing account .*(?:disabled|absent|closed)", statuses=_set(403)),
        row="ACCESS_DENIED",
    ),
    # --- archived, or billed to who asks --------------------------------------------------------------------------------------
    _user(
        "the object is archived and has to be restored first",
        "Restore it (aws s3api restore-object …, az storage blob set-tier --tier Hot …), then batch-inference retry OUTPUT --error-type "
        "ARCHIVED.",
        When(codes=_set("InvalidObjectState", "BlobArchived", "BlobBeingRehydrated")),
        row="ARCHIVED",
    ),
    _user(
        "the bucket bills who asks, and needs a project for that",
        "Google's requester-pays buckets are not supported: copy the objects (gcloud storage cp --billing-project PROJECT …).",
        When(codes=_set("UserProjectMissing")),
    ),
    # --- region ---------------------------------------------------------------------------------------------------------------
    _user(
        "the bucket is in another region",
        "{region}",
        When(
            codes=_set("PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "InvalidRegion")
        ),
        When(codes=_set("AuthorizationHeaderMalformed"), text=r"region"),
        When(text=r"redirect without location"),
    ),
    # --- certificates ---------------------------------------------------------------------------------------------------------
    _user(
        "the store's certificate is for another host name",
        "Write the host in storage.endpoint_url as the certificate has it: openssl s_client -connect HOST:443 shows it.",
        When(text=r"InvalidCertificate\(\s*NotValidForName"),
    ),
    _user(
        "the store's certificate has expired",
        "Have the certificate renewed; if it is in order, set this machine's clock (timedatectl set-ntp true).",
        When(text=r"InvalidCertificate\(\s*Expired"),
    ),
    _user(
        "the store's certificate is not valid yet",
        "Set this machine's clock (timedatectl set-ntp true).",
        When(text=r"InvalidCertificate\(\s*NotValidYet"),
    ),
    _user(
        "the store's certificate is signed by an authority that this machine does not know",
        "Set SSL_CERT_FILE to a PEM file with the authority's certificate (for s3:// AWS_CA_BUNDLE works as well), on all nodes. {ca}",
        When(text=r"InvalidCertificate\("),
    ),
    _user(
        "the endpoint does not speak TLS",
        "Write http:// in storage.endpoint_url, or a port that has TLS.",
        When(text=r"InvalidContentType|wrong version number"),
    ),
    _user(
        "the store ended the TLS handshake",
        "Look at the TLS settings of the store, or of a proxy before it: it may want a client certificate or another host name.",
        When(text=r"AlertReceived\(|PeerIncompatible\("),
    ),
    # --- put-if-absent --------------------------------------------------------------------------------------------------------
    _user(
        "the store does not honor put-if-absent",
        PUT_IF_ABSENT,
        When(statuses=_set(405, 501), verbs=_set("create"), schemes=_REMOTE),
        When(
            codes=_set(
                "NotImplemented",
                "InvalidArgument",
                "InvalidRequest",
                "MethodNotAllowed",
                "NotSupported",
                "UnsupportedHeader",
                "UnsupportedOperation",
            ),
            verbs=_set("create"),
        ),
    ),
    _user(
        "this file system has no hard links, and no other way to create a file only where there is none",
        "Put the output on another disk or in a bucket (--output); inputs may stay where they are.",
        When(errnos=NO_LINKS | {errno.EINVAL}, verbs=_set("create"), schemes=_set("file")),
    ),
    # --- patience, room, limits -----------------------------------------------------------------------------------------------
    _system(
        "the store asked to slow down",
        f"Lower storage.fetch_concurrency or raise storage.retry_timeout_s, then {_AGAIN}",
        When(statuses=_set(429, 503)),
        When(codes=_set("SlowDown", "ServerBusy", "Throttling", "ThrottlingException", "RequestLimitExceeded")),
        row="THROTTLED",
    ),
    _system(
        "the store is full",
        f"Make room in the store or raise its quota, then {_AGAIN}",
        When(codes=_set("XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded")),
        When(statuses=_set(507)),
    ),
    _system("the disk is full", "Make room: {free}. Then " + _AGAIN, When(errnos=_set(errno.ENOSPC, errno.EDQUOT))),
    _user(
        "the file system is read-only",
        "Choose another --output, or mount it for writing. A disk that could be written before has failed: dmesg tells.",
        When(errnos=_set(errno.EROFS)),
    ),
    _user(
        "too many files are open",
        "Allow more (ulimit -n 65536; in a container the runtime's limit), or lower storage.fetch_concurrency; then "
        + _AGAIN,
        When(errnos=_set(errno.EMFILE, errno.ENFILE)),
        row="STORE_UNREACHABLE",
        retryable=True,
    ),
    _user(
        "the file is too large for this file system",
        "Choose another --output (FAT takes 4 GiB a file), or a lower shard_size.",
        When(errnos=_set(errno.EFBIG)),
    ),
    _system("the disk failed", "Look at its errors in dmesg, then " + _AGAIN, When(errnos=_set(errno.EIO))),
    _system(
        "the network file system has lost the file or its server",
        "Mount it again, then " + _AGAIN,
        When(errnos=_set(errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)),
    ),
    # --- access ---------------------------------------------------------------------------------------------------------------
    _user(
        "access denied",
        "{credentials}{rights}",
        When(kinds=_set("PermissionError"), schemes=_set("file")),
        When(errnos=_set(errno.EACCES, errno.EPERM), schemes=_set("file")),
        When(statuses=_set(403)),
        When(kinds=_set("PermissionError", "PermissionDeniedError")),
        row="ACCESS_DENIED",
    ),
    _user(
        "not authenticated",
        "{credentials}",
        When(statuses=_set(401)),
        When(kinds=_set("UnauthenticatedError")),
        row="UNAUTHENTICATED",
    ),
    # --- names ----------------------------------------------------------------------------------------------------------------
    _user(
        "no store takes such a name",
        "Check the location.",
        When(codes=_set("KeyTooLongError", "InvalidURI", "InvalidUri", "InvalidResourceName", "OutOfRangeInput")),
        When(errnos=_set(errno.ENAMETOOLONG, errno.ELOOP)),
        When(kinds=_set("InvalidPathError", "ValueError")),
        row="INVALID_URI",
    ),
    # --- time and connections -------------------------------------------------------------------------------------------------
    _system(
        "no answer in time",
        f"Check the store and the network (storage.timeout_s), then {_AGAIN}",
        When(codes=_set("RequestTimeout", "OperationTimedOut")),
        When(statuses=_set(408)),
        When(kinds=_set("TimeoutError")),
        # The dump that follows an error of obstore's always speaks of a timeout, the one that it allows for retries.
        When(text=r"timed out|timedout"),
        row="TIMEOUT",
    ),
    _system(
        "there is no host of that name",
        f"Check storage.endpoint_url and the name service, then {_AGAIN}",
        When(text=r"dns error|name or service not known|name resolution"),
    ),
    _system(
        "the store cannot be reached",
        f"Check the store and the network (storage.endpoint_url, HTTPS_PROXY), then {_AGAIN}",
        When(text=r"tcp connect error|connection refused|error sending request|connection reset|broken pipe"),
        When(kinds=_set("ConnectionError")),
    ),
    _system(
        "the operating system had nothing left for it at that moment",
        f"Check memory, processes and network of this machine, then {_AGAIN}",
        When(
            errnos=_set(
                errno.EAGAIN,
                errno.EINTR,
                errno.EBUSY,
                errno.ENOMEM,
                errno.ENOBUFS,
                errno.ENETDOWN,
                errno.ENETUNREACH,
                errno.EHOSTUNREACH,
            )
        ),
    ),
    # --- answers that no entry above names ------------------------------------------------------------------------------------
    _system(
        "something else changed the same object at the same time",
        f"Check that nothing else writes there, then {_AGAIN}",
        When(statuses=_set(409, 412, 425)),
    ),
    _system(
        "the data was damaged on its way",
        f"Check the network and proxies on the way, then {_AGAIN}",
        When(codes=_set("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "Md5Mismatch")),
    ),
    _user(
        "the store has no such operation",
        "Check storage.endpoint_url: what answers there is no complete S3, or another service.",
        When(statuses=_set(405, 501, 505)),
        When(kinds=_set("NotSupportedError")),
    ),
    _user(
        "the store refused the request",
        "Look up the code in the store's documentation; check location, storage.endpoint_url, storage.region and the credentials. The "
        "same request would be refused again.",
        When(statuses=frozenset(range(300, 500))),
    ),
    _user(
        "the endpoint is no address",
        "Write storage.endpoint_url as http://HOST:PORT or https://HOST:PORT.",
        When(text=r"builder error|relative url without a base|url scheme is not allowed|invalid (?:uri|url|authority)"),
    ),
    _user(
        "the operating system refused it",
        "The same would be refused again: look up the error, and try another location if the disk is the cause.",
        When(errnos=frozenset(errno.errorcode)),
    ),
    _system(
        "the store failed", f"Check the store and the network, then {_AGAIN}", When(statuses=frozenset(range(500, 600)))
    ),
    _system("the store could not be used", f"Check the store and the network, then {_AGAIN}", When()),
)

# An answer of S3's or Azure's: all but code and message may repeat what was sent, a token too.
_XML = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error\b.*(?:</Error>|\Z)", re.DOTALL)
_HTML = re.compile(r"<(?:!doctype\s+html|html)\b.*\Z", re.DOTALL | re.IGNORECASE)
_STATUS = re.compile(r"(?:status(?: code)?|response): (\d{3})\b", re.IGNORECASE)
_XML_CODE = re.compile(r"<Code>([^<]*)</Code>", re.IGNORECASE)
_JSON_CODE = re.compile(r'"(?:error|status)"\s*:\s*"([\w.]+)"')
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bOs \{\s*code: (\d+)")
# How long a request took differs from row to row, and the rest of it is said by the fact before.
_NOISE = re.compile(
    r" in [\d.]+(?:ns|µs|ms|s)\b|, max_retries: \d+|, retry_timeout: [\d.]+\w*|^Generic \w+ error: |Error performing list request: "
    r"|Server returned non-2xx status code: "
)
_INNER = re.compile(r'\b(?:message|error): "([^"]+)"')
_INNER_TLS = re.compile(r"\b(InvalidCertificate|InvalidMessage|AlertReceived)\(\s*(\w+)")
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'", re.IGNORECASE)
_IN_REGION = re.compile(r"is in another region: ([\w-]+): ")


def said(exc: BaseException) -> str:
    """Return an exception's message without a library's debug dump, and of a store's answer only the code and the message."""
    text, _, dump = str(exc).partition("\n\nDebug source")

    def xml(answer: re.Match[str]) -> str:
        found = [re.search(rf"<{tag}>([^<]*)</{tag}>", answer[0]) for tag in ("Code", "Message")]
        return ": ".join(part[1].strip() for part in found if part) or "an error without a code"

    def page(answer: re.Match[str]) -> str:
        title = re.search(r"<title>([^<]*)</title>", answer[0], re.IGNORECASE)
        return f"a web page{f' with the title {title[1].strip()!r}' if title else ''}"

    text = _json(_HTML.sub(page, _XML.sub(xml, text)))
    text = _NOISE.sub("", text).replace("  ", " ").strip()
    if text.endswith("error sending request"):
        found = _INNER_TLS.search(dump)
        inner = _INNER.search(dump)
        why = " ".join(found.groups()) if found else inner[1] if inner else ""
        text += f": {why}" if why else ""
    return text


def _json(text: str) -> str:
    """Return a message in which a JSON answer of Google's or Azure's is only what it says."""
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


def facts_of(exc: BaseException, *, verb: str = "", scheme: str = "", answered: bool = False) -> Facts:
    """Return what is known about an exception of a store, of the operating system or of Ray."""
    text = str(exc)
    short = text.partition("\n\nDebug source")[0]
    status = _STATUS.search(short)
    code = _XML_CODE.search(short) or _JSON_CODE.search(short)
    number = getattr(exc, "errno", None)
    if number is None and (found := _OS_ERROR.search(text)):
        number = int(found[1] or found[2])
    elif number is not None:
        scheme = scheme or "file"  # Python's own; those of obstore have no number
    kinds = [kind.__name__ for kind in type(exc).__mro__]
    kinds += [f"{kind.__module__}.{kind.__name__}" for kind in type(exc).__mro__]
    return Facts(
        frozenset(kinds),
        number if isinstance(number, int) else None,
        int(status[1]) if status else None,
        code[1].strip() if code else "",
        text,
        said(exc) or type(exc).__name__,
        verb,
        scheme,
        answered,
    )


def of_store(
    exc: BaseException,
    root: str = "",
    *,
    verb: str = "read",
    answered: bool = False,
    endpoint: str | None = None,
    where: str = "",
) -> Failure:
    """Sort what a store or the operating system raised.

    Args:
        exc: What was raised.
        root: The bucket that was asked, ``file://`` for disks, "" if that is not known.
        verb: What was tried: read, write, create, list or delete.
        answered: Whether the bucket has answered this process before.
        endpoint: The store's URL, if it is not the scheme's own.
        where: The local folder, for what is free there.
    """
    scheme = root.partition("://")[0]
    facts = facts_of(exc, verb=verb, scheme=scheme, answered=answered)
    cause = next(cause for cause in STORES if cause.matches(facts))
    region = ""
    if cause.remedy == "{region}":
        named = _REGION.search(facts.text)
        region = (named[1] or named[2]) if named else _region(root, endpoint) if scheme == "s3" else ""
    words = [cause.says, region, facts.said if cause.detail else ""]
    return Failure(
        cause.error_type,
        ": ".join(word for word in words if word),
        cause.retryable,
        _filled(cause.remedy, facts.scheme, region, where or str(getattr(exc, "filename", None) or "")),
        cause.ends,
    )


def of_rows(fact: str, error_type: str, message: str) -> BatchInferenceError:
    """Return what ends a job in which everything failed at fetching for one reason.

    Args:
        fact: The message of the end.
        error_type: Of the rows.
        message: Theirs, with the fact of the table's entry in it.
    """
    entries = [cause for cause in STORES if cause.error_type == error_type and cause.says in message]
    if not entries:
        # Nothing could be asked: the store could not even be opened, or an older attempt had the rows.
        entries = [cause for cause in STORES if cause.error_type == error_type][-1:] or [STORES[-1]]
    cause = max(entries, key=lambda entry: len(entry.says))
    region = _IN_REGION.search(message)
    return cause.ends(fact, _filled(cause.remedy, "", region[1] if region else ""))


def _filled(remedy: str, scheme: str, region: str = "", path: str = "") -> str:
    if "{" not in remedy:
        return remedy
    where = (
        f"Add --set storage.region={region}, or set AWS_REGION={region}."
        if region
        else "Set storage.region to the bucket's own: aws s3api get-bucket-location --bucket NAME tells it."
    )
    authorities = os.environ.get("SSL_CERT_FILE")
    return remedy.format(
        credentials=CREDENTIALS.get(scheme, CREDENTIALS[""]),
        rights="" if scheme == "file" else _RIGHTS + (_PAYER if scheme in ("s3", "") else ""),
        region=where,
        free=_free(path),
        ca=f"SSL_CERT_FILE is {authorities} now." if authorities else "",
    ).strip()


def _free(path: str) -> str:
    """Return what is free on the disk of ``path``, or how to find out."""
    while path and not os.path.exists(path) and path != os.path.dirname(path):  # noqa: PTH110, PTH120
        path = os.path.dirname(path)  # noqa: PTH120
    if not path:
        return "df -h shows what is free, df -i how many files"
    usage = shutil.disk_usage(path)
    return (
        f"{usage.free:,} of {usage.total:,} bytes are free on the disk of {path} (df -h; df -i for the number of files)"
    )


@functools.lru_cache(maxsize=64)
def _region(root: str, endpoint: str | None) -> str:
    """Ask a bucket for its region, once and without credentials; "" where it does not say."""
    import urllib.error
    import urllib.request

    base = (endpoint or "https://s3.us-east-1.amazonaws.com").rstrip("/")
    if not base.startswith(("http://", "https://")):
        return ""
    request = urllib.request.Request(f"{base}/{root.partition('://')[2]}", method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_REGION_TIMEOUT_S) as answer:  # noqa: S310
            found = answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as exc:
        found = exc.headers.get("x-amz-bucket-region")
    except (OSError, ValueError):
        found = None
    return found if found and re.fullmatch(r"[\w-]{1,40}", found) else ""


# --- Ray ------------------------------------------------------------------------------------------------------------------

_LOGS = "Ray's logs are in {logs}."
_JOIN_TOKEN = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the cluster's token."  # noqa: S105 - no token
_FOLDER = "Set RAY_TMPDIR to a short folder that you may write to, such as /tmp/ray-$USER."

#: How Ray fails to start on this machine.
RAY_START: tuple[Cause, ...] = (
    _user(
        "the folder of Ray's sockets has too long a name",
        _FOLDER,
        When(text=r"AF_UNIX|validate_socket_filename|path too long"),
    ),
    _system(
        "there is no room for Ray on the disk or in /dev/shm",
        "Make room (df -h /tmp /dev/shm), or set RAY_TMPDIR to a short folder on a larger disk; then start the same command again.",
        When(errnos=_set(errno.ENOSPC, errno.EDQUOT)),
        When(text=r"no space left|ENOSPC|disk quota"),
    ),
    _user("Ray's folder may not be written to", _FOLDER, When(kinds=_set("PermissionError"))),
    _user(
        "the file system of Ray's folder is read-only",
        _FOLDER,
        When(errnos=_set(errno.EROFS)),
        When(text=r"read-only file system"),
    ),
    _user(
        "the memory or /dev/shm is too small for Ray's object store",
        "Give the container more shared memory: docker run --shm-size=4g, in Kubernetes an emptyDir with medium Memory on /dev/shm.",
        When(text=r"object store memory|object_store_memory|/dev/shm|plasma"),
    ),
    _system(
        "a port that Ray needs is in use",
        "End the Ray that runs here already (ray stop), or take --dashboard-host none; then start the same command again.",
        When(errnos=_set(errno.EADDRINUSE)),
        When(text=r"address already in use|failed to (?:listen|bind)|port .*(?:in use|occupied)"),
    ),
    _user(
        "this machine has no such address",
        "Set --dashboard-host to an address of this machine, or to none.",
        When(errnos=_set(errno.EADDRNOTAVAIL)),
        When(kinds=_set("gaierror")),
        When(text=r"cannot assign requested address|name or service not known"),
    ),
    _user(
        "the system allows no more processes or open files",
        "Raise the limits (ulimit -u, ulimit -n; in a container the runtime's pids limit), then start the same command again.",
        When(errnos=_set(errno.EAGAIN, errno.EMFILE, errno.ENFILE)),
        When(text=r"resource temporarily unavailable|can't start new thread|too many open files|pthread_create"),
    ),
    _system(
        "Ray did not come up in time",
        f"The machine is busy or out of memory: start the same command again. {_LOGS}",
        When(text=r"timed out|timeout"),
    ),
    _system(
        "",
        f"Check --dashboard-host, free space in /tmp and /dev/shm, and start the same command again. {_LOGS}",
        When(),
    ),
)

#: How joining a Ray cluster fails.
RAY_JOIN: tuple[Cause, ...] = (
    _user(
        "the cluster has another version of Ray or Python",
        "Install the cluster's versions here, or use this program's image for its nodes.",
        When(text=r"version mismatch|versions? .{0,80}(?:differ|mismatch|incompatible|does not match)"),
    ),
    _user("the cluster refused the connection", _JOIN_TOKEN, When(text=r"auth|token")),
    _system(
        "",
        "Check the address and the port (10001 for ray://, 6379 otherwise), that versions are equal, and that the cluster's token is in "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token if it asks for one.",
        When(),
    ),
)

#: How Ray fails while a job runs.
RAY: tuple[Cause, ...] = (
    _system(
        "a node ran out of memory, and Ray ended a process to save the node",
        "Lower inference.actors or inference.batch_size, run fewer tasks at a time (--set preprocess.cpus_per_task=2), or give the nodes "
        f"more memory; then {_AGAIN}",
        When(kinds=_set("ray.exceptions.OutOfMemoryError")),
        When(text=r"NODE_OUT_OF_MEMORY|ray\.exceptions\.OutOfMemoryError|running low on memory"),
    ),
    _system(
        "a disk of the cluster is full",
        f"Make room where Ray keeps its objects and logs (df -h {{logs}}), then {_AGAIN}",
        When(kinds=_set("OutOfDiskError")),
    ),
    _system(
        "Ray's object store is full",
        f"Give the nodes more memory and shared memory (/dev/shm), or lower inference.batch_size; then {_AGAIN}",
        When(kinds=_set("ObjectStoreFullError")),
    ),
    _user(
        "the predictor ended its own process",
        "Remove sys.exit, os._exit or ray.actor.exit_actor from the predictor: it would end so each time.",
        When(
            kinds=_set("RayActorError", "WorkerCrashedError"),
            text=r"INTENDED_USER_EXIT|exit_actor|SystemExit|sys\.exit",
        ),
        When(kinds=_set("AsyncioActorExit")),
    ),
    _system(
        "a node of the cluster was lost",
        f"Look at the nodes (spot capacity, kubectl get nodes, OOMKilled pods), then {_AGAIN}",
        When(kinds=_set("NodeDiedError", "LocalRayletDiedError")),
        When(text=r"\bnode (?:has )?(?:died|was lost|is dead)|node it was running on|raylet (?:has )?died"),
    ),
    _system(
        "data in Ray's memory was lost with its process or node",
        f"Look for OOMKilled pods and lost nodes, then {_AGAIN}",
        When(kinds=_set("ObjectLostError", "PlasmaObjectNotAvailable")),
    ),
    _user(
        "the environment of the workers could not be made",
        "A package or file that the cluster's runtime_env names is not there: correct it.",
        When(kinds=_set("RuntimeEnvSetupError")),
    ),
    _user(
        "no node of the cluster can run what the job asks for",
        "Compare inference.* and preprocess.cpus_per_task with what ray status shows; add such nodes, or ask for less.",
        When(kinds=_set("TaskUnschedulableError", "ActorUnschedulableError")),
    ),
    _user("the cluster refused the connection", _JOIN_TOKEN, When(kinds=_set("AuthenticationError"))),
    _system(
        "a task was canceled",
        f"Something outside of the job stopped it, or the predictor raised KeyboardInterrupt: look at the class. Then {_AGAIN}",
        When(kinds=_set("TaskCancelledError")),
    ),
    _user(
        "workers cannot import what the job needs",
        "Install the same packages, and the predictor's module, on every node (in Kubernetes: in the image).",
        When(kinds=_set("ModuleNotFoundError")),
        When(text=r"ModuleNotFoundError: No module named"),
    ),
    _system(
        "a process of the job died",
        "Native code crashed, or the system ended it for its memory (dmesg, OOMKilled). Start the same command again: it resumes, and "
        f"finds the image if one is the cause. {_LOGS}",
        When(kinds=_set("RayActorError", "WorkerCrashedError")),
    ),
    _system(
        "Ray itself failed",
        f"Start the same command again; it resumes. {_LOGS}",
        When(kinds=_set("RaySystemError", "RpcError", "ray.exceptions.GetTimeoutError")),
    ),
    _system(
        "",
        f"Start the same command again; it resumes. If it ends so each time, please report it with what the logs say. {_LOGS}",
        When(),
    ),
)


def of_ray(
    table: Sequence[Cause], chain: Iterable[BaseException], what: str, words: str, logs: str = RAY_LOGS
) -> BatchInferenceError:
    """Return what ends the job for a failure of Ray's.

    Args:
        table: One of the tables above.
        chain: The exception and those under it.
        what: Begins the message ("Ray failed").
        words: What Ray said, for the message's end.
        logs: Where Ray's logs are.
    """
    known = [facts_of(exc) for exc in chain]
    cause = next(cause for cause in table if any(cause.matches(facts) for facts in known))
    message = ": ".join(part for part in (what, cause.says, words) if part)
    return cause.ends(message, cause.remedy.replace("{logs}", logs))
