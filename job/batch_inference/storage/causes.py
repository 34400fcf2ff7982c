"""Causes of failures: which answers of stores and disks belong to one cause, and what to do about it.

Each entry of the table says which answers it matches, what becomes of a row that meets one (``error_type``,
``retryable``), how a job ends that cannot go on (exit 2 or 5), the fact in plain words, and the remedy. The first entry
that matches counts. Exit 5 asks for the same command again, so an answer that will be the same next time never leads
there: a 4xx, or an error of the operating system that no entry names, ends with 2. The causes of Ray's failures are a
table of the same form.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any

from batch_inference.errors import InfrastructureError, UserError

# Errors of a hard link on a file system that has none.
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})

CREDENTIALS_REMEDIES = {
    "s3": "Check the credentials in the environment: AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, AWS_PROFILE (one with keys in "
    '~/.aws), or this machine\'s role. For SSO: eval "$(aws configure export-credentials --format env)".',
    "gs": "Check the credentials in the environment: GOOGLE_APPLICATION_CREDENTIALS (a key file), or run where a service account gives "
    "access.",
    "az": "Check the credentials in the environment: AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or run with a managed identity.",
    "file": "Check owner and permissions with ls -ld, and which user this runs as with id.",
    "": "Check the credentials in the environment (AWS_…, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_…).",
}
PUT_IF_ABSENT_REMEDY = (
    "Use a store that supports If-None-Match on PUT (S3, GCS, Azure, a recent MinIO or SeaweedFS, a local disk); without it two "
    "drivers could both commit a shard. Inputs may stay where they are."
)
START_AGAIN = "start the same command again; it resumes."


@dataclass(frozen=True)
class FailureFacts:
    """Facts about an exception, to match with a table.

    Attributes:
        exceptions: Names of the exception's classes, alone and with their module.
        errno: Error number of the operating system, if there is one.
        status: HTTP status, if there is one.
        code: Code in a store's answer, "" if there is none.
        text: The exception's whole text, with a library's debug dump.
        message: The exception in short, for people; holds no credentials.
        verb: Operation that failed: read, write, create, list or delete.
        scheme: Scheme of the store: file, s3, gs, az, or "" if it is not known.
        reachable: Whether the bucket has answered this process before.
    """

    exceptions: frozenset[str]
    errno: int | None
    status: int | None
    code: str
    text: str
    message: str
    verb: str = ""
    scheme: str = ""
    reachable: bool = False


@dataclass(frozen=True)
class Condition:
    """Answers that an entry is for; every field that is set must match.

    Attributes:
        exceptions: Names of exception classes, alone or with their module.
        errnos: Error numbers of the operating system.
        statuses: HTTP statuses.
        codes: Codes in the answer.
        pattern: Regular expression for the exception's whole text; ignores case.
        verbs: Operations that failed.
        schemes: Schemes of stores.
        reachable: Whether the bucket has answered this process before.
    """

    exceptions: frozenset[str] = frozenset()
    errnos: frozenset[int] = frozenset()
    statuses: frozenset[int] = frozenset()
    codes: frozenset[str] = frozenset()
    pattern: str = ""
    verbs: frozenset[str] = frozenset()
    schemes: frozenset[str] = frozenset()
    reachable: bool | None = None

    def matches(self, facts: FailureFacts) -> bool:
        """Return whether this condition describes a failure."""
        return (
            (not self.exceptions or not self.exceptions.isdisjoint(facts.exceptions))
            and (not self.errnos or facts.errno in self.errnos)
            and (not self.statuses or facts.status in self.statuses)
            and (not self.codes or facts.code in self.codes)
            and (not self.verbs or facts.verb in self.verbs)
            and (not self.schemes or facts.scheme in self.schemes)
            and (self.reachable is None or facts.reachable == self.reachable)
            and (not self.pattern or re.search(self.pattern, facts.text, re.IGNORECASE | re.DOTALL) is not None)
        )


@dataclass(frozen=True)
class FailureCause:
    """An entry of the table.

    Attributes:
        fact: The fact, which begins the message and is unique in its table; "" if Ray's own words have to do.
        remedy: What to do. ``{credentials}``, ``{rights}``, ``{region}``, ``{free}``, ``{ca}`` and ``{logs}`` are
            filled in.
        error_type: Error type of a row that fails of it.
        retryable: Whether such a row may succeed another time.
        error_class: Exception that ends a job that cannot go on.
        conditions: Answers that it is for; any one of them must match.
        detail: Whether the answer's own words follow the fact.
    """

    fact: str
    remedy: str
    error_type: str
    retryable: bool
    error_class: type[UserError] | type[InfrastructureError]
    conditions: tuple[Condition, ...]
    detail: bool = True

    def matches(self, facts: FailureFacts) -> bool:
        """Return whether this entry is for a failure."""
        return any(condition.matches(facts) for condition in self.conditions)


def user_cause(
    fact: str,
    remedy: str,
    *conditions: Condition,
    error_type: str = "REFUSED",
    retryable: bool = False,
    detail: bool = True,
) -> FailureCause:
    """Return an entry for a failure that only the user can fix: exit 2."""
    return FailureCause(fact, remedy, error_type, retryable, UserError, conditions, detail)


def infrastructure_cause(
    fact: str, remedy: str, *conditions: Condition, error_type: str = "STORE_UNREACHABLE", retryable: bool = True
) -> FailureCause:
    """Return an entry for a failure that may be gone at the next attempt: exit 5."""
    return FailureCause(fact, remedy, error_type, retryable, InfrastructureError, conditions)


def any_of(*values: Any) -> frozenset[Any]:
    """Return the set of values of which a condition matches any."""
    return frozenset(values)


_METADATA_SERVICE = r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal"
_NO_BUCKET = "Check the name of the bucket or container, storage.endpoint_url and the account."
_REMOTE = any_of("s3", "gs", "az")

#: Failures of stores, file systems and connections. The first entry that matches counts; the last one matches
#: everything.
STORE_CAUSES: tuple[FailureCause, ...] = (
    # --- credentials of a machine's role ---
    infrastructure_cause(
        "the metadata service gives no new credentials",
        f"Check the machine's metadata service, then {START_AGAIN}",
        Condition(pattern=_METADATA_SERVICE, reachable=True),
    ),
    user_cause(
        "there are no credentials in the environment, and this machine has no role that gives some",
        "{credentials} A public bucket: --set storage.anonymous=true.",
        Condition(pattern=_METADATA_SERVICE),
        error_type="UNAUTHENTICATED",
        detail=False,
    ),
    # --- missing objects ---
    user_cause(
        "there is no such bucket",
        _NO_BUCKET,
        Condition(codes=any_of("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")),
        error_type="NOT_FOUND",
    ),
    infrastructure_cause(
        "a part of the upload was lost",
        f"Check that nothing removes unfinished uploads within minutes (a lifecycle rule), then {START_AGAIN}",
        Condition(codes=any_of("NoSuchUpload", "InvalidBlockList")),
    ),
    user_cause(
        "there is no bucket or folder of that name",
        f"Check that the bucket or folder exists. {_NO_BUCKET}",
        Condition(
            exceptions=any_of("FileNotFoundError", "NotADirectoryError", "NotFoundError"),
            verbs=any_of("write", "create"),
        ),
        Condition(statuses=any_of(404), verbs=any_of("list", "write", "create")),
        error_type="NOT_FOUND",
    ),
    user_cause(
        "this is a folder, not a file",
        "Name a file, or give the folder as an input.",
        Condition(exceptions=any_of("IsADirectoryError")),
        error_type="NOT_FOUND",
        detail=False,
    ),
    user_cause(
        "this is a socket or a device, not a file",
        "Leave it out of the input.",
        Condition(errnos=any_of(errno.ENXIO, errno.ENODEV)),
        error_type="NOT_FOUND",
        detail=False,
    ),
    user_cause(
        "there is no such object",
        "Check the location.",
        Condition(exceptions=any_of("FileNotFoundError", "NotADirectoryError", "NotFoundError")),
        Condition(statuses=any_of(404)),
        error_type="NOT_FOUND",
        detail=False,
    ),
    # --- credentials ---
    user_cause(
        "not authenticated: the credentials have expired",
        "Renew the credentials and start the same command again; it resumes. A role renews them by itself.",
        Condition(codes=any_of("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")),
        error_type="UNAUTHENTICATED",
    ),
    user_cause(
        "not authenticated: the clocks of this machine and of the store differ by too much",
        "Set the clock (timedatectl set-ntp true), then start the same command again; it resumes.",
        Condition(codes=any_of("RequestTimeTooSkewed", "RequestExpired")),
        error_type="UNAUTHENTICATED",
    ),
    user_cause(
        "not authenticated: this role cannot be assumed",
        "Check AWS_ROLE_ARN, the role's trust policy and the annotation of the service account, which give the credentials.",
        Condition(pattern=r"AssumeRole|InvalidIdentityToken|//sts\.", statuses=any_of(400, 401, 403)),
        error_type="UNAUTHENTICATED",
    ),
    user_cause(
        "not authenticated: no token is issued for these credentials",
        "{credentials}",
        Condition(
            pattern=r"invalid_grant|invalid_client|AADSTS\d+|error performing token request",
            statuses=any_of(400, 401, 403),
        ),
        error_type="UNAUTHENTICATED",
    ),
    user_cause(
        "access denied: the store does not know this key, or the signature does not match",
        "{credentials}",
        Condition(
            codes=any_of(
                "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo"
            )
        ),
        error_type="ACCESS_DENIED",
    ),
    user_cause(
        "access denied: the account is disabled or not paid for",
        "Check the account and its billing.",
        Condition(
            codes=any_of(
                "AccountIsDisabled", "AllAccessDisabled", "AccountProblem", "UserProjectAccountProblem", "NotSignedUp"
            )
        ),
        Condition(pattern=r"billing account .*(?:disabled|absent|closed)", statuses=any_of(403)),
        error_type="ACCESS_DENIED",
    ),
    # --- archived, or requester pays ---
    user_cause(
        "the object is archived and has to be restored first",
        "Restore it (aws s3api restore-object …, az storage blob set-tier --tier Hot …), then batch-inference retry OUTPUT --error-type "
        "ARCHIVED.",
        Condition(codes=any_of("InvalidObjectState", "BlobArchived", "BlobBeingRehydrated")),
        error_type="ARCHIVED",
    ),
    user_cause(
        "the bucket is requester-pays and needs a billing project",
        "Google's requester-pays buckets are not supported: copy the objects (gcloud storage cp --billing-project PROJECT …).",
        Condition(codes=any_of("UserProjectMissing")),
    ),
    # --- region ---
    user_cause(
        "the bucket is in another region",
        "{region}",
        Condition(
            codes=any_of(
                "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "InvalidRegion"
            )
        ),
        Condition(codes=any_of("AuthorizationHeaderMalformed"), pattern=r"region"),
        Condition(pattern=r"redirect without location"),
    ),
    # --- certificates ---
    user_cause(
        "the store's certificate is for another host name",
        "Write the host in storage.endpoint_url as it is in the certificate: openssl s_client -connect HOST:443 shows it.",
        Condition(pattern=r"InvalidCertificate\(\s*NotValidForName"),
    ),
    user_cause(
        "the store's certificate has expired",
        "Have the certificate renewed; if it is in order, set this machine's clock (timedatectl set-ntp true).",
        Condition(pattern=r"InvalidCertificate\(\s*Expired"),
    ),
    user_cause(
        "the store's certificate is not valid yet",
        "Set this machine's clock (timedatectl set-ntp true).",
        Condition(pattern=r"InvalidCertificate\(\s*NotValidYet"),
    ),
    user_cause(
        "the store's certificate is signed by an authority that this machine does not know",
        "Set SSL_CERT_FILE to a PEM file with the authority's certificate (for s3:// AWS_CA_BUNDLE works as well), on all nodes. {ca}",
        Condition(pattern=r"InvalidCertificate\("),
    ),
    user_cause(
        "the endpoint does not speak TLS",
        "Write http:// in storage.endpoint_url, or a port with TLS.",
        Condition(pattern=r"InvalidContentType|wrong version number"),
    ),
    user_cause(
        "the store ended the TLS handshake",
        "Check the TLS settings of the store, or of a proxy before it: it may require a client certificate or another host name.",
        Condition(pattern=r"AlertReceived\(|PeerIncompatible\("),
    ),
    # --- put-if-absent ---
    user_cause(
        "the store does not honor put-if-absent",
        PUT_IF_ABSENT_REMEDY,
        Condition(statuses=any_of(405, 501), verbs=any_of("create"), schemes=_REMOTE),
        Condition(
            codes=any_of(
                "NotImplemented",
                "InvalidArgument",
                "InvalidRequest",
                "MethodNotAllowed",
                "NotSupported",
                "UnsupportedHeader",
                "UnsupportedOperation",
            ),
            verbs=any_of("create"),
        ),
    ),
    user_cause(
        "this file system has no hard links, and no other way to create a file only if it is absent",
        "Put the output on another disk or in a bucket (--output); inputs may stay where they are.",
        Condition(errnos=NO_HARD_LINKS | {errno.EINVAL}, verbs=any_of("create"), schemes=any_of("file")),
    ),
    # --- throttling, space, limits ---
    infrastructure_cause(
        "the store asked to slow down",
        f"Lower storage.fetch_concurrency or raise storage.retry_timeout_s, then {START_AGAIN}",
        Condition(statuses=any_of(429, 503)),
        Condition(codes=any_of("SlowDown", "ServerBusy", "Throttling", "ThrottlingException", "RequestLimitExceeded")),
        error_type="THROTTLED",
    ),
    infrastructure_cause(
        "the store is full",
        f"Make room in the store or raise its quota, then {START_AGAIN}",
        Condition(codes=any_of("XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded")),
        Condition(statuses=any_of(507)),
    ),
    infrastructure_cause(
        "the disk is full",
        "Make room: {free}. Then " + START_AGAIN,
        Condition(errnos=any_of(errno.ENOSPC, errno.EDQUOT)),
    ),
    user_cause(
        "the file system is read-only",
        "Choose another --output, or mount it for writing. If it was writable before, the disk has failed: see dmesg.",
        Condition(errnos=any_of(errno.EROFS)),
    ),
    user_cause(
        "too many files are open",
        "Allow more (ulimit -n 65536; in a container the runtime's limit), or lower storage.fetch_concurrency; then "
        + START_AGAIN,
        Condition(errnos=any_of(errno.EMFILE, errno.ENFILE)),
        error_type="STORE_UNREACHABLE",
        retryable=True,
    ),
    user_cause(
        "the file is too large for this file system",
        "Choose another --output (FAT takes 4 GiB a file), or a lower shard_size.",
        Condition(errnos=any_of(errno.EFBIG)),
    ),
    infrastructure_cause(
        "the disk failed", "Check dmesg for its errors, then " + START_AGAIN, Condition(errnos=any_of(errno.EIO))
    ),
    infrastructure_cause(
        "the network file system has lost the file or its server",
        "Mount it again, then " + START_AGAIN,
        Condition(errnos=any_of(errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)),
    ),
    # --- access ---
    user_cause(
        "access denied",
        "{credentials}{rights}",
        Condition(exceptions=any_of("PermissionError"), schemes=any_of("file")),
        Condition(errnos=any_of(errno.EACCES, errno.EPERM), schemes=any_of("file")),
        Condition(statuses=any_of(403)),
        Condition(exceptions=any_of("PermissionError", "PermissionDeniedError")),
        error_type="ACCESS_DENIED",
    ),
    user_cause(
        "not authenticated",
        "{credentials}",
        Condition(statuses=any_of(401)),
        Condition(exceptions=any_of("UnauthenticatedError")),
        error_type="UNAUTHENTICATED",
    ),
    # --- names ---
    user_cause(
        "no store accepts this name",
        "Check the location.",
        Condition(
            codes=any_of("KeyTooLongError", "InvalidURI", "InvalidUri", "InvalidResourceName", "OutOfRangeInput")
        ),
        Condition(errnos=any_of(errno.ENAMETOOLONG, errno.ELOOP)),
        Condition(exceptions=any_of("InvalidPathError", "ValueError")),
        error_type="INVALID_URI",
    ),
    # --- time and connections ---
    infrastructure_cause(
        "no answer in time",
        f"Check the store and the network (storage.timeout_s), then {START_AGAIN}",
        Condition(codes=any_of("RequestTimeout", "OperationTimedOut")),
        Condition(statuses=any_of(408)),
        Condition(exceptions=any_of("TimeoutError")),
        # The dump that follows an error of obstore's always speaks of a timeout, the one that it allows for retries.
        Condition(pattern=r"timed out|timedout"),
        error_type="TIMEOUT",
    ),
    infrastructure_cause(
        "there is no host of that name",
        f"Check storage.endpoint_url and the name service, then {START_AGAIN}",
        Condition(pattern=r"dns error|name or service not known|name resolution"),
    ),
    infrastructure_cause(
        "the store cannot be reached",
        f"Check the store and the network (storage.endpoint_url, HTTPS_PROXY), then {START_AGAIN}",
        Condition(pattern=r"tcp connect error|connection refused|error sending request|connection reset|broken pipe"),
        Condition(exceptions=any_of("ConnectionError")),
    ),
    infrastructure_cause(
        "the operating system is out of resources at the moment",
        f"Check memory, processes and network of this machine, then {START_AGAIN}",
        Condition(
            errnos=any_of(
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
    # --- all other answers ---
    infrastructure_cause(
        "something else changed the same object at the same time",
        f"Check that nothing else writes there, then {START_AGAIN}",
        Condition(statuses=any_of(409, 412, 425)),
    ),
    infrastructure_cause(
        "the data was damaged in transit",
        f"Check the network and its proxies, then {START_AGAIN}",
        Condition(codes=any_of("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "Md5Mismatch")),
    ),
    user_cause(
        "the store does not support this operation",
        "Check storage.endpoint_url: the server there is not a complete S3, or another service.",
        Condition(statuses=any_of(405, 501, 505)),
        Condition(exceptions=any_of("NotSupportedError")),
    ),
    user_cause(
        "the store refused the request",
        "Look up the code in the store's documentation; check location, storage.endpoint_url, storage.region and the credentials. A "
        "retry would be refused as well.",
        Condition(statuses=frozenset(range(300, 500))),
    ),
    user_cause(
        "the endpoint is not a URL",
        "Write storage.endpoint_url as http://HOST:PORT or https://HOST:PORT.",
        Condition(
            pattern=r"builder error|relative url without a base|url scheme is not allowed|invalid (?:uri|url|authority)"
        ),
    ),
    user_cause(
        "the operating system refused it",
        "A retry would be refused as well: look up the error, and try another location if the disk is the cause.",
        Condition(errnos=frozenset(errno.errorcode)),
    ),
    infrastructure_cause(
        "the store failed",
        f"Check the store and the network, then {START_AGAIN}",
        Condition(statuses=frozenset(range(500, 600))),
    ),
    infrastructure_cause(
        "the store could not be used", f"Check the store and the network, then {START_AGAIN}", Condition()
    ),
)
