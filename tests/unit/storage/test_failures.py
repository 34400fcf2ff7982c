"""Each entry of the tables of causes, with answers of stores, file systems and Ray."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import obstore
import pytest
import ray.exceptions as rx
from obstore import exceptions as obx
from obstore.store import AzureStore, GCSStore

from batch_inference.config import StorageConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError, UserError
from batch_inference.output.tally import systemic_failure
from batch_inference.pipeline.ray_errors import RAY, RAY_JOIN, RAY_START, explain_ray_failure, ray_failure
from batch_inference.storage import failures
from batch_inference.storage.causes import STORE_CAUSES, FailureCause
from batch_inference.storage.failures import (
    error_of_failed_rows,
    gather_facts,
    match_store_error,
    short_message,
)
from batch_inference.storage.store import open_bucket
from tests.support.faulty_s3 import Answer, FaultyS3, faulty_s3

CONFIG = StorageConfig(max_retries=0, retry_timeout_s=1, timeout_s=60)


@dataclass(frozen=True)
class Told:
    """An answer and its expected cause."""

    says: str
    ends: type[BatchInferenceError]
    error_type: str
    answer: Answer | BaseException
    scheme: str = "s3"
    verb: str = "read"
    answered: bool = False
    retryable: bool = False
    remedy: str = ""

    def __str__(self) -> str:
        what = self.answer
        name = type(what).__name__ if isinstance(what, BaseException) else f"{what.status}"
        return f"{self.scheme}-{self.verb}-{name}-{self.says[:30]}"


def user(says: str, row: str, answer: Answer | BaseException, **more: Any) -> Told:
    return Told(says, UserError, row, answer, **more)


def system(says: str, row: str, answer: Answer | BaseException, **more: Any) -> Told:
    return Told(says, InfrastructureError, row, answer, **{"retryable": True, **more})


def error(status: int, code: str, message: str = "no", inside: str = "", **headers: str) -> Answer:
    return Answer.error(status, code, message, inside, **headers)


def google(status: int, message: str) -> Answer:
    return Answer(status, json.dumps({"error": {"code": status, "message": message}}).encode())


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/photo.jpg")


def local(number: int) -> obx.GenericError:
    """Return an error of the operating system as obstore reports it."""
    return obx.GenericError(
        f"Generic LocalFileSystem error: Unable to rename file: {os.strerror(number)} (os error {number})"
    )


def connect(dump: str) -> obx.GenericError:
    """Return a failed connection as obstore reports it, with its debug dump."""
    text = "Generic S3 error: Error performing GET https://minio:9000/b/k in 1.5ms - HTTP error: error sending request"
    return obx.GenericError(f"{text}\n\nDebug source:\nGeneric {{ retry_timeout: 1s, {dump} }}")


def tls(what: str) -> obx.GenericError:
    return connect(f"error: Custom {{ kind: InvalidData, error: {what} }}")


METADATA = obx.GenericError(
    "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 6ms - "
    "Server returned non-2xx status code: 404 Not Found: "
)
STS = obx.GenericError(
    "Generic S3 error: Error performing POST https://sts.eu-west-1.amazonaws.com/ in 6ms - Server returned non-2xx status code: 403 "
    "Forbidden: <ErrorResponse><Error><Code>AccessDenied</Code><Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message>"
    "</Error></ErrorResponse>"
)
GOOGLE_TOKEN = obx.GenericError(
    "Generic GCS error: Error performing token request: Error performing POST https://oauth2.googleapis.com/token in 6ms - Server returned "
    'non-2xx status code: 400 Bad Request: {"error":"invalid_grant","error_description":"Invalid JWT Signature."}'
)
AZURE_TOKEN = obx.GenericError(
    "Generic MicrosoftAzure error: Error performing token request: Error performing POST "
    "https://login.microsoftonline.com/t/oauth2 in 6ms - Server returned non-2xx status code: 401 Unauthorized: "
    '{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret"}'
)
REGION = "<Region>eu-west-1</Region>"

TOLD = [
    system("the metadata service gives no new credentials", "STORE_UNREACHABLE", METADATA, answered=True),
    user(
        "there are no credentials in the environment",
        "UNAUTHENTICATED",
        METADATA,
        remedy="aws configure export-credentials",
    ),
    user(
        "there are no credentials in the environment",
        "UNAUTHENTICATED",
        METADATA,
        scheme="gs",
        remedy="GOOGLE_APPLICATION_CREDENTIALS",
    ),
    user("there is no such bucket", "NOT_FOUND", error(404, "NoSuchBucket"), verb="list", remedy="name of the bucket"),
    user("there is no such bucket", "NOT_FOUND", error(404, "NoSuchBucket")),
    user("there is no such bucket", "NOT_FOUND", error(404, "ContainerNotFound"), scheme="az", verb="list"),
    user(
        "there is no such bucket",
        "NOT_FOUND",
        error(404, "NoSuchBucket", "The specified bucket does not exist."),
        scheme="gs",
        verb="create",
    ),
    system("a part of the upload was lost", "STORE_UNREACHABLE", error(404, "NoSuchUpload"), verb="write"),
    user("there is no bucket or folder of that name", "NOT_FOUND", error(404, "Whatever"), verb="list"),
    user("there is no bucket or folder of that name", "NOT_FOUND", FileNotFoundError(), verb="write"),
    user("this is a folder, not a file", "NOT_FOUND", IsADirectoryError(), scheme="file"),
    user("this is a socket or a device", "NOT_FOUND", os_error(errno.ENXIO), scheme="file"),
    user("there is no such object", "NOT_FOUND", error(404, "NoSuchKey")),
    user("there is no such object", "NOT_FOUND", obx.GenericError("status code: 404 Not Found: ")),
    user(
        "not authenticated: the credentials have expired",
        "UNAUTHENTICATED",
        error(400, "ExpiredToken"),
        remedy="same command",
    ),
    user("not authenticated: the clocks", "UNAUTHENTICATED", error(403, "RequestTimeTooSkewed"), remedy="timedatectl"),
    user("not authenticated: this role cannot be assumed", "UNAUTHENTICATED", STS, remedy="AWS_ROLE_ARN"),
    user("not authenticated: no token is issued", "UNAUTHENTICATED", GOOGLE_TOKEN, scheme="gs", remedy="key file"),
    user(
        "not authenticated: no token is issued",
        "UNAUTHENTICATED",
        AZURE_TOKEN,
        scheme="az",
        remedy="AZURE_STORAGE_ACCOUNT_KEY",
    ),
    user(
        "access denied: the store does not know this key",
        "ACCESS_DENIED",
        error(403, "InvalidAccessKeyId"),
        remedy="AWS_ACCESS_KEY_ID",
    ),
    user(
        "access denied: the store does not know this key",
        "ACCESS_DENIED",
        error(403, "AuthenticationFailed"),
        scheme="az",
        remedy="AZURE_",
    ),
    user(
        "access denied: the account is disabled",
        "ACCESS_DENIED",
        error(409, "AccountIsDisabled"),
        scheme="az",
        remedy="billing",
    ),
    user(
        "access denied: the account is disabled",
        "ACCESS_DENIED",
        google(403, "The billing account for the owning project is disabled in state absent"),
        scheme="gs",
    ),
    user(
        "the object is archived",
        "ARCHIVED",
        error(403, "InvalidObjectState"),
        remedy="retry OUTPUT --error-type ARCHIVED",
    ),
    user("the object is archived", "ARCHIVED", error(409, "BlobArchived"), scheme="az", remedy="set-tier"),
    user(
        "the bucket is requester-pays",
        "REFUSED",
        error(400, "UserProjectMissing"),
        scheme="gs",
        remedy="--billing-project",
    ),
    user(
        "the bucket is in another region: eu-west-1",
        "REFUSED",
        error(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1"),
        remedy="--set storage.region=eu-west-1",
    ),
    user(
        "the bucket is in another region: eu-west-1",
        "REFUSED",
        error(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        remedy="AWS_REGION=eu-west-1",
    ),
    user(
        "the bucket is in another region: eu-west-1",
        "REFUSED",
        error(400, "AuthorizationHeaderMalformed", inside=REGION),
        verb="list",
        remedy="AWS_REGION=eu-west-1",
    ),
    user(
        "the bucket is in another region",
        "REFUSED",
        error(400, "IllegalLocationConstraintException"),
        verb="create",
        remedy="get-bucket-location",
    ),
    user(
        "the store's certificate is for another host name",
        "REFUSED",
        tls("InvalidCertificate( NotValidForNameContext {"),
        remedy="storage.endpoint_url",
    ),
    user(
        "the store's certificate has expired", "REFUSED", tls("InvalidCertificate( ExpiredContext {"), remedy="renewed"
    ),
    user(
        "the store's certificate is not valid yet",
        "REFUSED",
        tls("InvalidCertificate( NotValidYetContext {"),
        remedy="clock",
    ),
    user(
        "the store's certificate is signed by an authority",
        "REFUSED",
        tls("InvalidCertificate( UnknownIssuer, )"),
        remedy="SSL_CERT_FILE",
    ),
    user("the endpoint does not speak TLS", "REFUSED", tls("InvalidMessage( InvalidContentType, )"), remedy="http://"),
    user(
        "the store ended the TLS handshake",
        "REFUSED",
        tls("AlertReceived( CertificateRequired, )"),
        remedy="client certificate",
    ),
    user(
        "the store does not honor put-if-absent",
        "REFUSED",
        error(501, "NotImplemented"),
        verb="create",
        remedy="If-None-Match",
    ),
    user(
        "the store does not honor put-if-absent",
        "REFUSED",
        error(400, "InvalidArgument"),
        verb="create",
        remedy="If-None-Match",
    ),
    user(
        "the store does not honor put-if-absent",
        "REFUSED",
        error(405, "MethodNotAllowed"),
        verb="create",
        remedy="If-None-Match",
    ),
    user(
        "this file system has no hard links",
        "REFUSED",
        local(errno.EOPNOTSUPP),
        scheme="file",
        verb="create",
        remedy="--output",
    ),
    system("the store asked to slow down", "THROTTLED", error(503, "SlowDown"), remedy="storage.fetch_concurrency"),
    system("the store asked to slow down", "THROTTLED", error(429, "TooManyRequests"), verb="list"),
    system("the store asked to slow down", "THROTTLED", error(400, "RequestLimitExceeded")),
    system("the store asked to slow down", "THROTTLED", error(503, "ServerBusy"), scheme="az"),
    system("the store is full", "STORE_UNREACHABLE", error(507, "Whatever"), verb="write", remedy="quota"),
    system("the store is full", "STORE_UNREACHABLE", error(400, "QuotaExceeded"), verb="write"),
    system("the disk is full", "STORE_UNREACHABLE", local(errno.ENOSPC), scheme="file", verb="write", remedy="df -h"),
    system("the disk is full", "STORE_UNREACHABLE", local(errno.EDQUOT), scheme="file", verb="create"),
    user("the file system is read-only", "REFUSED", local(errno.EROFS), scheme="file", verb="write", remedy="--output"),
    user(
        "too many files are open",
        "STORE_UNREACHABLE",
        os_error(errno.EMFILE),
        scheme="",
        retryable=True,
        remedy="ulimit -n",
    ),
    user(
        "too many files are open",
        "STORE_UNREACHABLE",
        connect('ConnectError( "tcp open error", Os { code: 24, message: "Too many open files", }'),
        retryable=True,
    ),
    user("the file is too large for this file system", "REFUSED", local(errno.EFBIG), scheme="file", verb="write"),
    system("the disk failed", "STORE_UNREACHABLE", os_error(errno.EIO), scheme="", remedy="dmesg"),
    system(
        "the network file system has lost",
        "STORE_UNREACHABLE",
        os_error(errno.ESTALE),
        scheme="",
        remedy="Mount it again",
    ),
    user("access denied", "ACCESS_DENIED", os_error(errno.EACCES), scheme="", remedy="ls -ld"),
    user("access denied", "ACCESS_DENIED", PermissionError("no"), scheme="file", remedy="ls -ld"),
    user("access denied", "ACCESS_DENIED", local(errno.EACCES), scheme="file", remedy="ls -ld"),
    user("access denied", "ACCESS_DENIED", error(403, "AccessDenied"), remedy="AWS_REQUEST_PAYER=true"),
    user("access denied", "ACCESS_DENIED", error(403, "AccessDenied"), verb="list", remedy="allow list"),
    user(
        "access denied",
        "ACCESS_DENIED",
        google(403, "x@y.iam does not have storage.objects.list access"),
        scheme="gs",
        remedy="service account",
    ),
    user(
        "access denied",
        "ACCESS_DENIED",
        error(403, "AuthorizationPermissionMismatch"),
        scheme="az",
        verb="list",
        remedy="AZURE_",
    ),
    user("access denied", "ACCESS_DENIED", obx.PermissionDeniedError("no")),
    user(
        "not authenticated",
        "UNAUTHENTICATED",
        google(401, "Anonymous caller does not have storage.objects.get access"),
        scheme="gs",
    ),
    user("not authenticated", "UNAUTHENTICATED", obx.UnauthenticatedError("no")),
    user("no store accepts this name", "INVALID_URI", error(400, "KeyTooLongError")),
    user("no store accepts this name", "INVALID_URI", os_error(errno.ENAMETOOLONG), scheme=""),
    user("no store accepts this name", "INVALID_URI", ValueError("embedded null byte"), scheme=""),
    system("no answer in time", "TIMEOUT", error(400, "RequestTimeout"), remedy="storage.timeout_s"),
    system("no answer in time", "TIMEOUT", error(408, "Whatever")),
    system("no answer in time", "TIMEOUT", TimeoutError("x")),
    system("no answer in time", "TIMEOUT", connect("source: TimedOut")),
    system(
        "there is no host of that name",
        "STORE_UNREACHABLE",
        connect('ConnectError( "dns error", Custom { error: "failed to lookup"'),
        remedy="storage.endpoint_url",
    ),
    system(
        "the store cannot be reached",
        "STORE_UNREACHABLE",
        connect('ConnectError( "tcp connect error", Os { code: 111, message: "Connection refused"'),
    ),
    system("the store cannot be reached", "STORE_UNREACHABLE", ConnectionAbortedError()),
    system(
        "the store cannot be reached",
        "STORE_UNREACHABLE",
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ),
    system("the operating system is out of resources", "STORE_UNREACHABLE", os_error(errno.ENOMEM), scheme=""),
    system(
        "something else changed the same object", "STORE_UNREACHABLE", error(409, "OperationAborted"), verb="create"
    ),
    system("the data was damaged in transit", "STORE_UNREACHABLE", error(400, "BadDigest"), verb="write"),
    user(
        "the store does not support this operation",
        "REFUSED",
        error(501, "NotImplemented"),
        verb="list",
        remedy="storage.endpoint_url",
    ),
    user("the store does not support this operation", "REFUSED", obx.NotSupportedError("no")),
    user(
        "the store refused the request",
        "REFUSED",
        error(400, "EntityTooLarge"),
        verb="write",
        remedy="would be refused as well",
    ),
    user("the store refused the request", "REFUSED", error(418, "Teapot"), verb="list"),
    user(
        "the endpoint is not a URL",
        "REFUSED",
        obx.GenericError("Generic S3 error: builder error: relative URL without a base"),
        remedy="http://HOST:PORT",
    ),
    user("the operating system refused it", "REFUSED", os_error(errno.ENOTTY), scheme="", remedy="refused as well"),
    user("the operating system refused it", "REFUSED", local(errno.EINVAL), scheme="file", verb="write"),
    system("the store failed", "STORE_UNREACHABLE", error(500, "InternalError"), remedy="same command"),
    system("the store failed", "STORE_UNREACHABLE", error(502, "BadGateway"), verb="list"),
    system("the store could not be used", "STORE_UNREACHABLE", obx.GenericError("no route"), remedy="same command"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with faulty_s3() as running:
        yield running


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    failures._ask_region.cache_clear()


def bucket(scheme: str, endpoint: str) -> Any:
    """Return a store of a scheme that sends its requests to the tests' server."""
    client: Any = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    if scheme == "az":
        return AzureStore("b", account_name="me", account_key="aGVsbG8=", endpoint=f"{endpoint}/me", **client)
    if scheme == "gs":
        account = {
            "gcs_base_url": endpoint,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        return GCSStore("b", service_account_key=json.dumps(account), **client)
    return open_bucket("s3://b", CONFIG.model_copy(update={"endpoint_url": endpoint}))


def raised(scheme: str, verb: str, answer: Answer, server: FaultyS3) -> Exception:
    """Return the exception that obstore raises for an answer."""
    server.answer = lambda asked: answer
    store = bucket(scheme, server.endpoint)
    ask = {
        "read": lambda: obstore.get(store, "k").bytes(),
        "list": lambda: list(obstore.list(store)),
        "write": lambda: obstore.put(store, "k", b"1", mode="overwrite"),
        "create": lambda: obstore.put(store, "k", b"1", mode="create"),
        "delete": lambda: obstore.delete(store, "k"),
    }[verb]
    with pytest.raises(Exception) as caught:
        ask()
    return caught.value


def exception(told: Told, server: FaultyS3) -> BaseException:
    if isinstance(told.answer, BaseException):
        return told.answer
    return raised(told.scheme, told.verb, told.answer, server)


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_answers_of_stores_and_disks(told: Told, server: FaultyS3) -> None:
    root = {"": "", "file": "file://"}.get(told.scheme, f"{told.scheme}://b")
    failure = match_store_error(
        exception(told, server), root, verb=told.verb, reachable=told.answered, endpoint=server.endpoint
    )
    assert failure.message.startswith(told.says)
    assert (failure.error_type, failure.retryable, failure.error_class) == (told.error_type, told.retryable, told.ends)
    assert told.remedy in failure.remedy
    assert "{" not in failure.remedy + failure.message
    assert "Debug source" not in failure.message
    # Exit 5 asks for the same again, and nothing that ends with 2 does so alone.
    assert ("start the same command again" in failure.remedy) or told.ends is UserError
    ending = failure.job_error("cannot read x")
    assert (type(ending), ending.message, ending.remedy) == (
        told.ends,
        f"cannot read x: {failure.message}",
        failure.remedy,
    )


def test_causes_all_have_a_tested_answer(server: FaultyS3) -> None:
    """Each condition of each entry is the first to match one of the answers above."""
    untold = {(cause.fact, place) for cause in STORE_CAUSES for place in range(len(cause.conditions))}
    for told in TOLD:
        facts = gather_facts(exception(told, server), verb=told.verb, scheme=told.scheme, reachable=told.answered)
        cause = next(cause for cause in STORE_CAUSES if cause.matches(facts))
        place = next(place for place, condition in enumerate(cause.conditions) if condition.matches(facts))
        untold.discard((cause.fact, place))
    assert not untold


@pytest.mark.parametrize("table", [STORE_CAUSES, RAY, RAY_START, RAY_JOIN], ids=["stores", "ray", "start", "join"])
def test_causes_have_distinct_facts_and_a_remedy(table: tuple[FailureCause, ...]) -> None:
    facts = [cause.fact for cause in table]
    assert len(set(facts)) == len(facts)
    for cause in table:
        assert cause.conditions
        assert cause.remedy
        if cause.error_class is InfrastructureError and table is not RAY_JOIN:
            assert "tart the same command again" in cause.remedy, cause.fact
    assert table[-1].matches(gather_facts(RuntimeError("something new")))


@pytest.mark.parametrize("status", [400, 402, 406, 410, 411, 414, 415, 416, 417, 421, 422, 424, 426, 428, 431, 451])
@pytest.mark.parametrize("verb", ["read", "list", "write", "create", "delete"])
def test_unknown_4xx_never_asks_for_the_same_command_again(status: int, verb: str, server: FaultyS3) -> None:
    failure = match_store_error(
        raised("s3", verb, error(status, "SomethingNew", "of tomorrow"), server), "s3://b", verb=verb
    )
    assert failure.error_class is UserError
    assert "SomethingNew: of tomorrow" in failure.message
    assert not failure.retryable


def test_errors_of_the_operating_system_are_all_known() -> None:
    again = {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO),
        *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.ENOBUFS, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE),
        errno.ESHUTDOWN,
    }
    for number in errno.errorcode:
        failure = match_store_error(os_error(number), "file://", verb="write")
        assert (failure.error_class is InfrastructureError) == (number in again), errno.errorcode[number]


def test_region_that_no_answer_names_is_asked_for_once(server: FaultyS3) -> None:
    exc = raised("s3", "read", error(301, "PermanentRedirect"), server)
    server.asked.clear()
    server.answer = lambda asked: error(403, "AccessDenied", x_amz_bucket_region="ap-south-1")
    for _ in range(3):
        assert "AWS_REGION=ap-south-1" in match_store_error(exc, "s3://b", endpoint=server.endpoint).remedy
    assert [(asked.method, "authorization" in asked.headers) for asked in server.asked] == [("HEAD", False)]
    failures._ask_region.cache_clear()
    server.answer = lambda asked: error(301, "PermanentRedirect", x_amz_bucket_region="x; rm -rf /")
    assert "get-bucket-location" in match_store_error(exc, "s3://b", endpoint=server.endpoint).remedy


def test_full_disk_is_named_with_its_free_space(tmp_path: Any) -> None:
    failure = match_store_error(local(errno.ENOSPC), "file://", verb="write", where=str(tmp_path / "not/yet/there"))
    assert f"bytes are free on the disk of {tmp_path}" in failure.remedy


def test_job_ends_with_the_cause_of_its_rows(server: FaultyS3) -> None:
    for told in TOLD:
        if told.error_type in ("NOT_FOUND", "INVALID_URI", "ARCHIVED") or told.verb != "read":
            continue
        failure = match_store_error(
            exception(told, server), "s3://b", reachable=told.answered, endpoint=server.endpoint
        )
        ending = systemic_failure("everything", "fetch", failure.error_type, " ".join(failure.message.split())[:500])
        assert type(ending) is failure.error_class
        assert failure.message[:100] in ending.message
        assert "{" not in ending.remedy
    region = match_store_error(
        raised("s3", "read", error(400, "AuthorizationHeaderMalformed", inside=REGION), server), "s3://b"
    )
    assert "AWS_REGION=eu-west-1" in error_of_failed_rows("everything", region.error_type, region.message).remedy
    assert isinstance(error_of_failed_rows("x", "UNAUTHENTICATED", "cannot open s3://b: no account"), UserError)
    assert isinstance(error_of_failed_rows("x", "STORE_UNREACHABLE", ""), InfrastructureError)


def test_secrets_and_dumps_stay_out_of_messages() -> None:
    text = "status code: 400 Bad Request: <Error><Code>A</Code><Message>b</Message><Token>hunter2</Token></Error>\n\nDebug source:\nhunter2"
    assert short_message(obx.GenericError(text)) == "status code: 400 Bad Request: A: b"
    page = "status code: 502 Bad Gateway: <html><head><title>502 Squid</title></head><body>" + "x" * 9999
    assert (
        short_message(obx.GenericError(page)) == "status code: 502 Bad Gateway: a web page with the title '502 Squid'"
    )
    assert short_message(GOOGLE_TOKEN).endswith("400 Bad Request: invalid_grant: Invalid JWT Signature.")
    assert (
        short_message(obx.GenericError("Error performing GET http://h/b/k in 4.479321ms - x"))
        == "Error performing GET http://h/b/k - x"
    )
    assert short_message(connect('message: "Connection refused"')).endswith("error sending request: Connection refused")
    assert short_message(obx.GenericError("odd {brace")) == "odd {brace"


def test_refused_connection_and_unknown_host_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Exception) as caught:
        obstore.get(bucket("s3", f"http://127.0.0.1:{port}"), "k")
    failure = match_store_error(caught.value, "s3://b")
    assert failure.message.startswith("the store cannot be reached")
    assert failure.message.endswith("Connection refused")
    with pytest.raises(Exception) as caught:
        obstore.get(bucket("s3", "http://nowhere.invalid"), "k")
    assert match_store_error(caught.value, "s3://b").message.startswith("there is no host of that name")


# --- Ray -----------------------------------------------------------------------------------------------------------------


def task_error(cause: Exception) -> BaseException:
    """Return a task's exception as Ray raises it to a caller that waits for the task."""
    error: Any = rx.RayTaskError("f", f"Traceback\n{type(cause).__name__}: {cause}", cause)
    made: BaseException = error.as_instanceof_cause()
    return made


class _Died(rx.ActorDiedError):
    """Return an exception that Ray creates in native code, with its own message."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)

    def __str__(self) -> str:
        return str(self.args[0])


def bare(kind: type[BaseException], text: str = "x") -> BaseException:
    """Return an exception of Ray's whose constructor has more arguments than the test needs."""
    return type(
        kind.__name__,
        (kind,),
        {"__init__": lambda self: None, "__str__": lambda self: text, "__module__": kind.__module__},
    )()  # type: ignore[no-any-return]


DIED = "The actor died unexpectedly before finishing this task. Worker exit type: {}. Worker exit detail: {}"
RAY_TOLD: list[tuple[BaseException, type[BatchInferenceError], str, str]] = [
    (rx.OutOfMemoryError("killed"), InfrastructureError, "a node ran out of memory", "inference.actors"),
    (
        _Died(DIED.format("NODE_OUT_OF_MEMORY", "running low on memory")),
        InfrastructureError,
        "a node ran out of memory",
        "batch_size",
    ),
    (rx.OutOfDiskError("x"), InfrastructureError, "a disk of the cluster is full", "df -h"),
    (rx.ObjectStoreFullError("x"), InfrastructureError, "Ray's object store is full", "shared memory"),
    (
        _Died(DIED.format("INTENDED_USER_EXIT", "Worker exits by an user request.")),
        UserError,
        "the predictor ended its own",
        "sys.exit",
    ),
    (rx.AsyncioActorExit(), UserError, "the predictor ended its own process", "exit_actor"),
    (bare(rx.NodeDiedError), InfrastructureError, "a node of the cluster was lost", "kubectl get nodes"),
    (_Died("The actor died because its node has died."), InfrastructureError, "a node of the cluster was lost", "spot"),
    (bare(rx.LocalRayletDiedError), InfrastructureError, "a node of the cluster was lost", "same command"),
    (bare(rx.OwnerDiedError), InfrastructureError, "data in Ray's memory was lost", "OOMKilled"),
    (rx.RuntimeEnvSetupError("pip"), UserError, "the environment of the workers", "runtime_env"),
    (rx.TaskUnschedulableError("x"), UserError, "no node of the cluster can run", "ray status"),
    (bare(rx.AuthenticationError), UserError, "the cluster refused the connection", "RAY_AUTH_TOKEN"),
    (rx.TaskCancelledError(), InfrastructureError, "a task was canceled", "KeyboardInterrupt"),
    (task_error(ModuleNotFoundError("No module named 'mine'")), UserError, "workers cannot import", "on every node"),
    (
        RuntimeError("Traceback\nModuleNotFoundError: No module named 'x'"),
        UserError,
        "workers cannot import",
        "on every node",
    ),
    (
        _Died(DIED.format("SYSTEM_ERROR", "connection error code 2. End of file.")),
        InfrastructureError,
        "a process of the job died",
        "dmesg",
    ),
    (rx.WorkerCrashedError(), InfrastructureError, "a process of the job died", "same command"),
    (bare(rx.RaySystemError, "System error: x"), InfrastructureError, "Ray itself failed", "logs are in"),
    (rx.GetTimeoutError("x"), InfrastructureError, "Ray itself failed", "same command"),
    (task_error(KeyError("shape")), InfrastructureError, "Ray failed: RayTaskError(KeyError)", "report it"),
]


@pytest.mark.parametrize(("exc", "ends", "says", "remedy"), RAY_TOLD, ids=lambda one: type(one).__name__)
def test_exceptions_of_ray_while_a_job_runs(
    exc: BaseException, ends: type[BatchInferenceError], says: str, remedy: str
) -> None:
    failure = explain_ray_failure(exc)
    assert type(failure) is ends
    assert says in failure.message
    assert remedy in failure.remedy
    assert "{" not in failure.remedy


def test_causes_of_ray_all_have_a_tested_answer() -> None:
    for table, known in ((RAY, [told[0] for told in RAY_TOLD]), (RAY_START, [told[0] for told in START_TOLD])):
        untold = {(cause.fact, place) for cause in table for place in range(len(cause.conditions))}
        for exc in known:
            facts = gather_facts(exc)
            cause = next(cause for cause in table if cause.matches(facts))
            untold.discard(
                (
                    cause.fact,
                    next(place for place, condition in enumerate(cause.conditions) if condition.matches(facts)),
                )
            )
        assert not untold


def test_class_of_torch_is_not_mistaken_for_rays() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert (
        "a node ran out of memory"
        not in explain_ray_failure(task_error(OutOfMemoryError("CUDA out of memory"))).message
    )


def test_innermost_exception_counts_first() -> None:
    assert explain_ray_failure(task_error(UserError("the cause", "fix it"))).message == "the cause"
    outer = RuntimeError("a wrapper")
    outer.__cause__ = rx.ObjectStoreFullError("x")
    assert "Ray's object store is full" in explain_ray_failure(outer).message


START_TOLD: list[tuple[BaseException, type[BatchInferenceError], str, str]] = [
    (
        OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /a"),
        UserError,
        "too long a name",
        "RAY_TMPDIR",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), InfrastructureError, "there is no room for Ray", "df -h"),
    (RuntimeError("gcs_server: No space left on device"), InfrastructureError, "there is no room for Ray", "df -h"),
    (
        PermissionError(errno.EACCES, "Permission denied", "/scratch/ray/session_x"),
        UserError,
        "may not be written to",
        "RAY_TMPDIR",
    ),
    (OSError(errno.EROFS, "Read-only"), UserError, "is read-only", "RAY_TMPDIR"),
    (RuntimeError("mkdir: Read-only file system"), UserError, "is read-only", "RAY_TMPDIR"),
    (
        ValueError(
            "Attempting to cap object store memory usage at 1000 bytes, but the minimum allowed is 78643200 bytes."
        ),
        UserError,
        "too small for Ray's",
        "--shm-size",
    ),
    (OSError(errno.EADDRINUSE, "x"), InfrastructureError, "a port that Ray needs is in use", "ray stop"),
    (
        RuntimeError("Failed to bind to 127.0.0.1:8265"),
        InfrastructureError,
        "a port that Ray needs",
        "--dashboard-host none",
    ),
    (OSError(errno.EADDRNOTAVAIL, "x"), UserError, "no such address", "--dashboard-host"),
    (socket.gaierror(-2, "Name or service not known"), UserError, "no such address", "--dashboard-host"),
    (RuntimeError("cannot assign requested address"), UserError, "no such address", "--dashboard-host"),
    (BlockingIOError(errno.EAGAIN, "x"), UserError, "no more processes", "ulimit -u"),
    (RuntimeError("can't start new thread"), UserError, "no more processes", "ulimit -u"),
    (
        RuntimeError("The current node timed out during startup."),
        InfrastructureError,
        "did not come up in time",
        "same command",
    ),
    (
        RuntimeError("something new"),
        InfrastructureError,
        "Ray did not start on this machine: something new",
        "--dashboard-host",
    ),
]


@pytest.mark.parametrize(("exc", "ends", "says", "remedy"), START_TOLD)
def test_failures_of_rays_start(exc: BaseException, ends: type[BatchInferenceError], says: str, remedy: str) -> None:
    failure = ray_failure(RAY_START, [exc], "Ray did not start on this machine", " ".join(str(exc).split()))
    assert type(failure) is ends
    assert says in failure.message
    assert remedy in failure.remedy


@pytest.mark.parametrize(
    ("text", "ends", "says"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.9.0 Python: 3.9.1", UserError, "another version"),
        ("Python minor versions differ between client (3.11) and server (3.9)", UserError, "another version"),
        ("invalid auth token", UserError, "the cluster refused the connection"),
        ("ray client connection timeout", InfrastructureError, "ray client connection timeout"),
    ],
)
def test_failures_to_join_a_cluster(text: str, ends: type[BatchInferenceError], says: str) -> None:
    failure = ray_failure(RAY_JOIN, [ConnectionError(text)], "cannot join", text)
    assert type(failure) is ends
    assert says in failure.message
