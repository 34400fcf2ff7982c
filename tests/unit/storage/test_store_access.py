"""Access to stores: certificates, profiles of ~/.aws, regions, put-if-absent on unusual disks and stores."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore import exceptions as obx

from batch_inference.config import StorageConfig
from batch_inference.errors import InfrastructureError, RowError, UserError
from batch_inference.inputs.listing import list_uris
from batch_inference.storage import failures
from batch_inference.storage import store as storage_store
from batch_inference.storage.aws_profiles import load_profile
from batch_inference.storage.causes import NO_HARD_LINKS
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.store import Store, open_bucket, read_object
from tests.support.certificates import Authority, authority
from tests.support.faulty_s3 import Answer, Asked, faulty_s3

AWS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ENDPOINT_URL"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    *(
        "AWS_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "AWS_REQUEST_PAYER",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    ),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    failures._ask_region.cache_clear()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def at(endpoint: str | None, **more: Any) -> StorageConfig:
    return StorageConfig(endpoint_url=endpoint, max_retries=0, retry_timeout_s=1, timeout_s=60, **more)


# --- certificates --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_own_certificate_authority_is_trusted(
    variable: str, keys: None, trusted: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(trusted.file))
    with faulty_s3(trusted.server(tmp_path)) as server:
        server.objects["k"] = b"1"
        assert read_object("s3://b/k", at(server.endpoint), "the manifest") == b"1"


@pytest.mark.parametrize(
    ("certificate", "known", "says", "remedy"),
    [
        ({}, False, "signed by an authority that this machine does not know", "SSL_CERT_FILE"),
        ({"ends": -1, "begins": -2}, True, "the store's certificate has expired", "renewed"),
        ({"begins": 1, "ends": 2}, True, "the store's certificate is not valid yet", "clock"),
        ({"address": "127.0.0.9"}, True, "the store's certificate is for another host name", "storage.endpoint_url"),
    ],
)
def test_invalid_certificate_is_named(
    certificate: dict[str, Any], known: bool, says: str, remedy: str, keys: None, trusted: Authority, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if known:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted.file))
    with faulty_s3(trusted.server(tmp_path, **certificate)) as server:
        with pytest.raises(UserError, match=says) as caught:
            list(list_uris("s3://b/p/", True, at(server.endpoint)))
        with pytest.raises(RowError, match=says) as row:
            Fetcher(at(server.endpoint)).fetch("s3://b/k", 1000)
    assert remedy in caught.value.remedy
    assert (row.value.error.error_type, row.value.error.retryable) == ("REFUSED", False)


def test_endpoint_without_tls_is_named(keys: None) -> None:
    with faulty_s3() as server, pytest.raises(UserError, match="the endpoint does not speak TLS"):
        list(list_uris("s3://b/p/", True, at(server.endpoint.replace("http:", "https:"))))


def test_missing_certificate_bundle_is_named(keys: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere.pem")
    with pytest.raises(UserError, match=r"AWS_CA_BUNDLE is /nowhere\.pem, which cannot be read"):
        open_bucket("s3://b", at(None))
    (tmp_path / "empty.pem").write_text("none")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "empty.pem"))
    with pytest.raises(UserError, match="cannot open s3://b"):
        open_bucket("s3://b", at(None))


# --- profiles ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def aws(tmp_path: Path) -> Callable[..., None]:
    """Return a function that writes the files of ~/.aws."""

    def write(credentials: str = "", config: str = "") -> None:
        folder = tmp_path / "home/.aws"
        folder.mkdir(exist_ok=True)
        (folder / "credentials").write_text(credentials)
        (folder / "config").write_text(config)

    return write


KEYS = """
[default]
aws_access_key_id = first
aws_secret_access_key = s1

[work]
aws_access_key_id=second
aws_secret_access_key=s2
aws_session_token = t
"""
CONFIG = """
[default]
region = eu-north-1
[profile work]
region = ap-south-1
s3 =
    addressing_style = path
[sso-session x]
sso_region = us-east-1
"""


def signed(endpoint: str | None, server: Any) -> str:
    """Return the header that signs a request; it contains the key's name and the region."""
    server.objects["k"] = b"1"
    server.asked.clear()
    assert read_object("s3://b/k", at(endpoint), "the manifest") == b"1"
    return str(server.asked[-1].headers["authorization"])


def test_profile_keys_and_region_sign_the_request(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    aws(KEYS, CONFIG)
    with faulty_s3() as server:
        assert "Credential=first/" in (header := signed(server.endpoint, server))
        assert "/eu-north-1/" in header
        monkeypatch.setenv("AWS_PROFILE", "work")
        assert "Credential=second/" in (header := signed(server.endpoint, server))
        assert "/ap-south-1/" in header
        assert server.asked[-1].headers["x-amz-security-token"] == "t"
        monkeypatch.setenv("AWS_REGION", "us-west-2")
        assert "/us-west-2/" in signed(server.endpoint, server)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "third")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3")
        assert "Credential=third/" in signed(server.endpoint, server)


def test_files_of_profiles_may_lie_elsewhere_and_name_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_s3() as server:
        (tmp_path / "c").write_text(
            f"[profile p]\nendpoint_url = {server.endpoint}\naws_access_key_id=k\naws_secret_access_key=s\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "c"))
        monkeypatch.setenv("AWS_PROFILE", "p")
        assert "Credential=k/" in signed(None, server)
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert load_profile(False).endpoint_url is None


@pytest.mark.parametrize(
    "way",
    ["sso_session = x", "sso_start_url = https://x", "credential_process = /bin/x", "role_arn = arn:aws:iam::1:role/x"],
)
def test_profile_that_needs_tools_of_aws_says_how(
    way: str, aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws("", f"[profile work]\n{way}\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(UserError, match=f"has no keys but {way.partition(' ')[0]}") as caught:
        open_bucket("s3://b", at(None))
    assert 'eval "$(aws configure export-credentials --profile work --format env)"' in caught.value.remedy
    open_bucket("s3://b", at(None, anonymous=True))
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    assert load_profile(False).keys == {}


def test_missing_profile_is_named_with_existing_ones(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "wrok")
    with pytest.raises(UserError, match=r"AWS_PROFILE is 'wrok', and neither ~/\.aws/config nor") as caught:
        open_bucket("s3://b", at(None))
    assert "aws configure" in caught.value.remedy
    aws(KEYS, CONFIG)
    with pytest.raises(UserError) as caught:
        open_bucket("s3://b", at(None))
    assert caught.value.remedy.startswith("Choose one of default, work")


def test_invalid_profile_file_is_named_without_its_lines(aws: Callable[..., None]) -> None:
    aws("aws_secret_access_key = hunter2\n")
    with pytest.raises(UserError, match="is not a valid file of profiles") as caught:
        open_bucket("s3://b", at(None))
    assert "hunter2" not in str(caught.value) + caught.value.remedy
    assert caught.value.__suppress_context__


# --- answers of a whole store --------------------------------------------------------------------------------------------


def regions(asked: Asked) -> Answer | None:
    return Answer.error(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1")


@pytest.mark.parametrize("what", ["list", "store", "row", "manifest"])
def test_right_region_is_named_wherever_a_bucket_is_used(what: str, keys: None) -> None:
    with faulty_s3() as server:
        server.answer = regions
        config = at(server.endpoint)
        use: dict[str, Callable[[], Any]] = {
            "list": lambda: list(list_uris("s3://b/p/", True, config)),
            "store": lambda: Store("s3://b/out", config).probe(),
            "row": lambda: Fetcher(config).fetch("s3://b/k", 1000),
            "manifest": lambda: read_object("s3://b/m.csv", config, "the manifest"),
        }
        with pytest.raises((UserError, RowError), match="the bucket is in another region: eu-west-1") as caught:
            use[what]()
    if isinstance(caught.value, UserError):
        assert "--set storage.region=eu-west-1" in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument"), (405, "MethodNotAllowed")]
)
def test_store_that_refuses_put_if_absent_is_refused_at_once(status: int, code: str, keys: None) -> None:
    def refusing(asked: Asked) -> Answer | None:
        return Answer.error(status, code) if "if-none-match" in asked.headers else None

    with faulty_s3() as server:
        server.answer = refusing
        with pytest.raises(UserError, match="does not honor put-if-absent") as caught:
            Store("s3://b/out", at(server.endpoint)).probe()
    assert "If-None-Match" in caught.value.remedy


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_simultaneous_writes_are_sent_again_and_are_no_commit_of_another(
    code: str, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reports each 409 as an existing object; no object exists yet."""
    monkeypatch.setattr(storage_store.time, "sleep", lambda seconds: None)
    answers = [Answer.error(409, code), Answer.error(409, code), None]
    with faulty_s3() as server:
        server.answer = lambda asked: answers.pop(0) if asked.method == "PUT" else None
        assert Store("s3://b/out", at(server.endpoint)).create("_commits/1", b"x") is True
        assert server.objects == {"out/_commits/1": b"x"}
        server.answer = lambda asked: Answer.error(409, code) if asked.method == "PUT" else None
        with pytest.raises(InfrastructureError, match="something else changed the same object"):
            Store("s3://b/out", at(server.endpoint)).create("_commits/2", b"x")


def test_disabled_account_is_no_commit_of_another(keys: None) -> None:
    with faulty_s3() as server:
        server.answer = lambda asked: Answer.error(409, "AccountIsDisabled") if asked.method == "PUT" else None
        with pytest.raises(UserError, match="the account is disabled"):
            Store("s3://b/out", at(server.endpoint)).create("_commits/1", b"x")
        server.objects["out/_commits/1"] = b"y"
        assert Store("s3://b/out", at(server.endpoint)).create("_commits/1", b"x") is False


def test_archived_objects_are_rows_of_their_own_and_good_ones_are_read(keys: None) -> None:
    with faulty_s3() as server:
        server.objects = {"old/1": b"1", "young/1": b"2"}
        server.answer = lambda asked: (
            Answer.error(403, "InvalidObjectState") if asked.key.startswith("old") and asked.method == "GET" else None
        )
        fetcher = Fetcher(at(server.endpoint))
        with pytest.raises(RowError) as caught:
            fetcher.fetch("s3://b/old/1", 1000)
        assert fetcher.fetch("s3://b/young/1", 1000) == b"2"
    assert (caught.value.error.error_type, caught.value.error.retryable) == ("ARCHIVED", False)


def test_requester_pays_is_set_by_the_environment_and_named_in_the_remedy(
    keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paid(asked: Asked) -> Answer | None:
        return None if asked.headers.get("x-amz-request-payer") == "requester" else Answer.error(403, "AccessDenied")

    with faulty_s3() as server:
        server.objects["p/1"] = b"1"
        server.answer = paid
        with pytest.raises(UserError, match="access denied") as caught:
            list(list_uris("s3://b/p/", True, at(server.endpoint)))
        assert "AWS_REQUEST_PAYER=true" in caught.value.remedy
        monkeypatch.setenv("AWS_REQUEST_PAYER", "true")
        assert [found.uri for found in list_uris("s3://b/p/", True, at(server.endpoint))] == ["s3://b/p/1"]


@pytest.mark.parametrize("uri", ["s3://b/", "s3://b/p/", "s3://b/p/a.jpg"])
def test_missing_bucket_is_no_empty_folder(uri: str, keys: None) -> None:
    with faulty_s3() as server:
        server.answer = lambda asked: Answer.error(404, "NoSuchBucket", "The specified bucket does not exist")
        with pytest.raises(UserError, match="there is no such bucket") as caught:
            list(list_uris(uri, True, at(server.endpoint)))
        server.answer = lambda asked: None
        assert list(list_uris(uri, True, at(server.endpoint))) == []
    assert "storage.endpoint_url" in caught.value.remedy


# --- disks ---------------------------------------------------------------------------------------------------------------


def no_links(number: int) -> Callable[..., Any]:
    """Behave as obstore.put does on a disk without hard links."""
    real = obstore.put

    def put(target: Any, path: str, data: bytes, *, mode: str) -> Any:
        if mode == "create":
            raise obx.GenericError(
                f"Generic LocalFileSystem error: Unable to rename file: {os.strerror(number)} (os error {number})\n\nDebug source:\n"
            )
        return real(target, path, data, mode=mode)

    return put


@pytest.mark.parametrize("number", sorted(NO_HARD_LINKS), ids=errno.errorcode.get)
def test_disk_without_hard_links_keeps_the_promise(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstore, "put", no_links(number))
    store = Store(str(tmp_path / "out"), StorageConfig())
    store.probe()
    assert store.create("_commits/a", b"1" * 5000) is True
    assert store.create("_commits/a", b"2") is False
    assert store.get("_commits/a") == b"1" * 5000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_commits"]
    assert [path.name for path in (tmp_path / "out/_commits").iterdir()] == ["a"]


def test_one_of_many_threads_creates_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore, "put", no_links(errno.EPERM))
    for attempt in range(20):
        barrier = threading.Barrier(8)

        def create(worker: int, path: str = f"_commits/{attempt}", barrier: threading.Barrier = barrier) -> bool:
            store = Store(str(tmp_path / "out"), StorageConfig())
            barrier.wait()
            return store.create(path, b"%d" % worker * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert (tmp_path / f"out/_commits/{attempt}").read_bytes() == b"%d" % won.index(True) * 1000


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_disk_with_neither_hard_links_nor_rename_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.renameat2: Any = self.refuse if number == errno.EINVAL else None

        def refuse(self, *args: Any) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(obstore, "put", no_links(errno.EPERM))
    monkeypatch.setattr(storage_store.ctypes, "CDLL", Libc)
    store = Store(str(tmp_path / "out"), StorageConfig())
    with pytest.raises(UserError, match="this file system has no hard links, and no other way") as caught:
        store.probe()
    assert "--output" in caught.value.remedy
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_full_disk_is_named_with_folder_and_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise obx.GenericError(
            "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)"
        )

    store = Store(str(tmp_path / "out"), StorageConfig())
    monkeypatch.setattr(obstore, "put", full)
    for write in (store.put, store.create):
        with pytest.raises(InfrastructureError, match="the disk is full") as caught:
            write("predictions/a", b"1")
        assert f"bytes are free on the disk of {tmp_path}/out" in caught.value.remedy
        assert "same command again" in caught.value.remedy


@pytest.mark.parametrize(
    ("number", "ends", "says"),
    [(errno.ENOSPC, InfrastructureError, "the disk is full"), (errno.EROFS, UserError, "the file system is read-only")],
)
def test_folder_that_cannot_be_created_says_why(
    number: int, ends: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ends, match=f"cannot create the folder .*{says}"):
        Store(str(tmp_path / "out"), StorageConfig())


def test_read_only_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: Any, **kwargs: Any) -> None:
        raise obx.GenericError(
            "Generic LocalFileSystem error: Unable to open file /x#1: Read-only file system (os error 30)"
        )

    store = Store(str(tmp_path / "out"), StorageConfig())
    monkeypatch.setattr(obstore, "put", read_only)
    with pytest.raises(UserError, match="the file system is read-only"):
        store.probe()


def test_socket_among_the_inputs_is_no_failure_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # a socket has a short name
        made.bind("s.jpg")
    with pytest.raises(RowError) as caught:
        Fetcher(StorageConfig()).fetch(f"file://{tmp_path}/s.jpg", 1000)
    assert (caught.value.error.error_type, caught.value.error.retryable) == ("INVALID_URI", False)
    assert "a socket" in caught.value.error.message
