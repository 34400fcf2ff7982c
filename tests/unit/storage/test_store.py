from __future__ import annotations

import contextlib
import errno
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore import exceptions as obx

from batch_inference.config import StorageConfig
from batch_inference.errors import InfrastructureError, RowError, RowFailure, UserError
from batch_inference.inputs.listing import list_uris
from batch_inference.storage import failures as module
from batch_inference.storage.failures import classify
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.store import Store, exception_line, read_object
from batch_inference.storage.uris import canonical_uri, display_uri, is_local, local_path, split_bucket
from tests.support.privileges import unprivileged

CONFIG = StorageConfig()
ODD = ["plain", "a b", "50%", "a%20b", "x#1", "ü", "[x]", "a?b", "two\nlines", ".hidden", "'\"", "日本"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"), CONFIG)


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


# --- locations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://b/k", "s3://b/k"),
        ("S3://B/K", "s3://B/K"),
        ("s3a://b/k", "s3://b/k"),
        ("s3n://b/k", "s3://b/k"),
        ("gcs://b/k", "gs://b/k"),
        ("abfs://b/k", "az://b/k"),
        ("azure://b", "az://b"),
        ("s3://b/a b%20#?ü", "s3://b/a b%20#?ü"),
        ("/a/b c.jpg", "file:///a/b c.jpg"),
        ("file:///a/%20.jpg", "file:///a/%20.jpg"),
        ("FILE:///a", "file:///a"),
        ("/a/100%.jpg", "file:///a/100%.jpg"),
    ],
)
def test_every_location_has_one_spelling(given: str, expected: str) -> None:
    assert canonical_uri(given) == expected
    assert canonical_uri(expected) == expected


def test_relative_paths_start_here_and_a_tilde_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert canonical_uri("in/a.jpg") == f"file://{tmp_path}/in/a.jpg"
    assert canonical_uri("~/a.jpg") == "file:///home/me/a.jpg"


@pytest.mark.parametrize(
    ("given", "fact", "remedy"),
    [
        ("http://x/y", "scheme http://, which is not supported", "file://, s3://, gs://, az://"),
        ("hdfs://x/y", "scheme hdfs://", "s3://"),
        ("file://a/b", "not an absolute file URI", "file:///a/b"),
        ("s3://", "names no bucket", "s3://BUCKET/PATH"),
        ("gs:///a", "names no bucket", "gs://BUCKET/PATH"),
    ],
)
def test_other_locations_are_refused(given: str, fact: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        canonical_uri(given)
    assert given in caught.value.message
    assert fact in caught.value.message
    assert remedy in caught.value.remedy


def test_parts_of_a_location() -> None:
    assert split_bucket("s3://b/x/y.jpg") == ("s3://b", "x/y.jpg")
    assert split_bucket("az://b") == ("az://b", "")
    assert split_bucket("file:///x/y.jpg") == ("file://", "x/y.jpg")
    assert is_local("file:///x")
    assert not is_local("s3://x")
    assert local_path("file:///x/y z") == "/x/y z"
    assert display_uri("file:///x") == "/x"
    assert display_uri("s3://b/x") == "s3://b/x"


# --- the folder ----------------------------------------------------------------------------------------------------------


def test_objects_are_written_listed_read_and_deleted(store: Store) -> None:
    store.put("predictions/a", b"one")
    store.put("predictions/a", b"three")
    store.put("predictions/b/c", b"")
    store.put("_top", b"x")
    assert store.get("predictions/a") == b"three"
    assert store.get_or_none("predictions/b/c") == b""
    assert store.get_or_none("predictions/none") is None
    with pytest.raises(FileNotFoundError, match="predictions/none"):
        store.get("predictions/none")
    assert {(o.path, o.size) for o in store.objects("predictions")} == {("predictions/a", 5), ("predictions/b/c", 0)}
    assert {o.path for o in store.objects()} == {"predictions/a", "predictions/b/c", "_top"}
    assert list(store.objects("errors")) == []
    store.delete(["predictions/a", "predictions/none", "_top"])
    assert {o.path for o in store.objects()} == {"predictions/b/c"}


def test_prefix_is_a_folder_and_not_the_start_of_a_name(store: Store) -> None:
    store.put("errors/a", b"")
    store.put("errors-old/a", b"")
    assert {o.path for o in store.objects("errors")} == {"errors/a"}


@pytest.mark.parametrize("name", ODD)
def test_output_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / name / "out"), CONFIG)
    store.probe()
    store.put("predictions/x", b"1")
    assert store.create("_commits/x", b"2")
    assert {o.path for o in store.objects()} == {"predictions/x", "_commits/x"}
    assert (tmp_path / name / "out/predictions/x").read_bytes() == b"1"


def test_folder_that_must_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder") as caught:
        Store(str(tmp_path / "none"), CONFIG, must_exist=True)
    assert caught.value.remedy
    assert not (tmp_path / "none").exists()


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="/file is a file, and an output is a folder"):
            Store(str(tmp_path / place), CONFIG)


def test_store_travels_to_other_processes(store: Store) -> None:
    store.put("a", b"1")
    there = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert there.uri == store.uri
    assert there.get("a") == b"1"


def test_killed_put_leaves_nothing_among_the_predictions(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore writes `x.parquet#1` first; pandas would fail at half of one, and no listing shows it."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "good.parquet")
    store.put("predictions/good.parquet", (tmp_path / "good.parquet").read_bytes())

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(obstore, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put("predictions/half.parquet", b"PAR1")
    assert names(tmp_path / "out/predictions") == ["good.parquet"]
    assert pd.read_parquet(tmp_path / "out/predictions")["a"].tolist() == [1]


def test_simultaneous_puts_leave_nothing(store: Store, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"predictions/{i}", bytes(i)), range(400)))
    assert {(o.path, o.size) for o in store.objects()} == {(f"predictions/{i}", i) for i in range(400)}
    assert names(tmp_path / "out") == ["predictions"]


# --- put-if-absent -------------------------------------------------------------------------------------------------------


def test_one_of_many_threads_creates(store: Store) -> None:
    for attempt in range(20):
        barrier = threading.Barrier(8)

        def create(worker: int, path: str = f"_commits/{attempt}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.create(path, b"%d" % worker * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.get(f"_commits/{attempt}") == b"%d" % won.index(True) * 1000


def _create_all(uri: str, worker: int, barrier: Any, results: Any) -> None:
    store = Store(uri, CONFIG)
    barrier.wait()
    results.put((worker, [n for n in range(50) if store.create(f"_commits/{n}", b"%d" % worker)]))


def test_one_of_several_processes_creates(store: Store) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_create_all, args=(store.uri, w, barrier, results)) for w in range(3)]
    for worker in workers:
        worker.start()
    won = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    assert sorted(n for wins in won.values() for n in wins) == list(range(50))
    for worker, wins in won.items():
        assert all(store.get(f"_commits/{n}") == b"%d" % worker for n in wins)


def test_probe_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.probe()
    assert names(tmp_path / "out") == []


def test_several_drivers_may_probe_at_once(store: Store, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(store.probe) for _ in range(150)]:
            done.result()
    assert names(tmp_path / "out") == []


def test_probe_refuses_a_store_that_overwrites(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def ignoring(target: Any, path: str, data: bytes, *, mode: str) -> Any:
        return real(target, path, data, mode="overwrite")

    monkeypatch.setattr(obstore, "put", ignoring)
    with pytest.raises(UserError) as caught:
        store.probe()
    assert "does not honor put-if-absent: a second create of the same object succeeded" in caught.value.message
    assert "If-None-Match" in caught.value.remedy
    assert list(store.objects()) == []


def test_probe_refuses_a_store_that_denies_and_overwrites(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def lying(target: Any, path: str, data: bytes, *, mode: str) -> Any:
        there = store.get_or_none(path) is not None
        real(target, path, data, mode="overwrite")
        if there:
            raise obx.AlreadyExistsError("there already")

    monkeypatch.setattr(obstore, "put", lying)
    with pytest.raises(UserError, match="changed its content"):
        store.probe()


def test_probe_refuses_a_store_that_only_says_that_it_wrote(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def silent(target: Any, path: str, data: bytes, *, mode: str) -> None:
        with contextlib.suppress(obx.AlreadyExistsError):
            real(target, path, data, mode=mode)

    monkeypatch.setattr(obstore, "put", silent)
    with pytest.raises(UserError, match="a second create of the same object succeeded"):
        store.probe()


def test_probe_names_the_reason_if_nothing_can_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(obstore, "put", denied)
    with pytest.raises(UserError, match=r"cannot create .*access denied: .*Permission denied") as caught:
        store.probe()
    assert "ls -ld" in caught.value.remedy


# --- failures ------------------------------------------------------------------------------------------------------------

FAILURES = [
    (FileNotFoundError("x"), "NOT_FOUND", False),
    (NotADirectoryError("x"), "NOT_FOUND", False),
    (IsADirectoryError("x"), "NOT_FOUND", False),
    (obx.NotFoundError("x"), "NOT_FOUND", False),
    (PermissionError("x"), "ACCESS_DENIED", False),
    (obx.PermissionDeniedError("x"), "ACCESS_DENIED", False),
    (obx.GenericError("Server returned non-2xx status code: 403 Forbidden"), "ACCESS_DENIED", False),
    (obx.UnauthenticatedError("x"), "UNAUTHENTICATED", False),
    (obx.GenericError("status: 401 Unauthorized"), "UNAUTHENTICATED", False),
    (obx.InvalidPathError("x"), "INVALID_URI", False),
    (ValueError("embedded null byte"), "INVALID_URI", False),
    (OSError(errno.ENAMETOOLONG, "File name too long"), "INVALID_URI", False),
    (OSError(errno.ELOOP, "Too many levels of symbolic links"), "INVALID_URI", False),
    (TimeoutError("x"), "TIMEOUT", True),
    (obx.GenericError("error sending request: operation timed out"), "TIMEOUT", True),
    (obx.GenericError("Server returned non-2xx status code: 503"), "THROTTLED", True),
    (obx.GenericError("status code: 503 Service Unavailable: SlowDown"), "THROTTLED", True),
    (obx.GenericError("status code: 429 Too Many Requests"), "THROTTLED", True),
    (obx.GenericError("status code: 500\n\nDebug source:\n retry_timeout: 120s"), "STORE_UNREACHABLE", True),
    (obx.GenericError("error sending request\n\nDebug source:\n source: TimedOut"), "TIMEOUT", True),
    (ConnectionRefusedError("x"), "STORE_UNREACHABLE", True),
    (OSError(errno.EIO, "Input/output error"), "STORE_UNREACHABLE", True),
]


@pytest.mark.parametrize(
    ("exc", "kind", "retryable"), FAILURES, ids=[f"{type(f[0]).__name__}-{f[1]}" for f in FAILURES]
)
def test_exceptions_are_of_few_kinds(exc: Exception, kind: str, retryable: bool) -> None:
    found = classify(exc)
    assert (found.error_type, found.retryable) == (kind, retryable)
    assert found.message


def test_messages_lose_the_librarys_debug_dump() -> None:
    assert classify(obx.GenericError("no route\n\nDebug source:\nGeneric { 10 lines }")).message.endswith(": no route")


@pytest.mark.parametrize("verb", ["get", "put", "create", "objects", "delete"])
@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (obx.PermissionDeniedError("x"), UserError),
        (obx.UnauthenticatedError("x"), UserError),
        (obx.GenericError("503"), InfrastructureError),
        (TimeoutError("x"), InfrastructureError),
    ],
)
def test_methods_distinguish_user_errors_from_infrastructure_errors(
    verb: str, exc: Exception, expected: type[Exception], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise exc

    for name in ("get", "put", "list", "delete", "open_reader"):
        monkeypatch.setattr(obstore, name, fail)
    calls: dict[str, Any] = {
        "get": lambda: store.get("a"),
        "put": lambda: store.put("a", b""),
        "create": lambda: store.create("a", b""),
        "objects": lambda: list(store.objects()),
        "delete": lambda: store.delete(["a"]),
    }
    with pytest.raises(expected) as caught:
        calls[verb]()
    assert display_uri(store.uri) in str(caught.value)
    assert getattr(caught.value, "remedy", "")


@pytest.mark.parametrize(
    "exc",
    [obx.AlreadyExistsError("x"), obx.PreconditionError("x"), obx.GenericError("Response: 412 Precondition Failed")],
)
def test_failed_precondition_means_that_another_was_first(
    exc: Exception, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise exc

    monkeypatch.setattr(obstore, "put", fail)
    assert store.create("a", b"") is False


# --- inputs --------------------------------------------------------------------------------------------------------------


def failed(uri: str, max_bytes: int = 1000) -> RowFailure:
    with pytest.raises(RowError) as caught:
        Fetcher(StorageConfig(max_retries=0)).fetch(uri, max_bytes)
    return caught.value.error


@pytest.mark.parametrize("name", ODD)
def test_files_of_any_name_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"content")
    assert Fetcher(CONFIG).fetch(f"file://{tmp_path}/{name}", 1000) == b"content"
    assert Fetcher(CONFIG).fetch(f"{tmp_path}/{name}", 1000) == b"content"


def test_unreadable_file_is_a_failure_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"12345")
    assert failed(f"{tmp_path}/none") == RowFailure("fetch", "NOT_FOUND", "there is no such object")
    assert failed(f"{tmp_path}/file/below") == RowFailure("fetch", "NOT_FOUND", "there is no such object")
    assert failed(f"{tmp_path}") == RowFailure("fetch", "NOT_FOUND", "this is a folder, not a file")
    assert failed(f"{tmp_path}/loop").error_type == "INVALID_URI"
    assert failed(f"{tmp_path}/{'x' * 300}").error_type == "INVALID_URI"
    assert failed(f"{tmp_path}/a\0b").error_type == "INVALID_URI"
    assert failed("ftp://x/y").error_type == "INVALID_URI"
    assert failed(f"{tmp_path}/file", 4) == RowFailure(
        "fetch", "TOO_LARGE", "the file has 5 bytes, more than preprocess.max_bytes = 4"
    )
    assert Fetcher(CONFIG).fetch(f"{tmp_path}/file", 5) == b"12345"


def test_file_that_may_not_be_read_is_denied(public_path: Path) -> None:
    (public_path / "file").write_bytes(b"1")
    (public_path / "file").chmod(0)
    with unprivileged():
        kind = failed(f"{public_path}/file").error_type
    assert kind == "ACCESS_DENIED"


@pytest.mark.parametrize(
    ("exc", "kind", "retryable"), FAILURES, ids=[f"{type(f[0]).__name__}-{f[1]}" for f in FAILURES]
)
def test_failures_of_a_bucket_are_failures_of_the_row(
    exc: Exception, kind: str, retryable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise exc

    monkeypatch.setattr(obstore, "get", fail)
    error = failed("s3://bucket/key.jpg")
    assert (error.stage, error.error_type, error.retryable) == ("fetch", kind, retryable)
    assert "\n" not in error.message


def test_read_object_returns_content_or_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.csv").write_bytes(b"uri\n")
    assert read_object(f"{tmp_path}/list.csv", CONFIG, "the manifest") == b"uri\n"
    with pytest.raises(UserError, match=r"cannot read the manifest .*none\.csv: there is no such object"):
        read_object(f"{tmp_path}/none.csv", CONFIG, "the manifest")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise obx.GenericError("503")

    monkeypatch.setattr(obstore, "get", fail)
    with pytest.raises(InfrastructureError, match="cannot read the weights"):
        read_object("s3://b/w.pt", CONFIG, "the weights")


def test_row_failures_are_one_short_line() -> None:
    error = RowError("fetch", "TIMEOUT", "a\n  b\t" + "x" * 1000, True).error
    assert error.message.startswith("a b x")
    assert len(error.message) == 500


def test_many_threads_write_into_a_local_folder_at_once(tmp_path: Path) -> None:
    """The staging folder may disappear between the two steps of another writer."""
    from concurrent.futures import ThreadPoolExecutor

    store = Store(str(tmp_path), StorageConfig())
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda i: store.put(f"data/{i}", b"x"), range(2000)):
            pass
    assert len(list((tmp_path / "data").iterdir())) == 2000
    assert not (tmp_path / "_staging").exists()


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="credentials before its bucket photos") as caught:
        canonical_uri("s3://key:hunter2@photos/1.jpg")
    assert "hunter2" not in str(caught.value)
    assert canonical_uri("az://container@account.example/1.jpg")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/1.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=hunter2",
        "gs://photos/1.jpg?x-goog-signature=hunter2",
        "az://photos/1.jpg?sv=1&sig=hunter2",
        "az://me:hunter2@photos/1.jpg",
    ],
)
def test_signed_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        canonical_uri(uri)
    assert "hunter2" not in str(caught.value)
    assert caught.value.remedy
    assert canonical_uri("s3://photos/what?.jpg") == "s3://photos/what?.jpg"


EXPIRED = """Generic S3 error: Server returned non-2xx status code: 400 Bad Request: <?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><Token-0>hunter2</Token-0></Error>

Debug source:
..."""


def test_expired_credentials_are_no_failure_of_the_store_and_are_not_repeated() -> None:
    failure = classify(obx.GenericError(EXPIRED))
    assert (failure.error_type, failure.retryable) == ("UNAUTHENTICATED", False)
    assert failure.message.endswith("400 Bad Request: ExpiredToken: The provided token has expired.")
    assert "hunter2" not in exception_line(obx.GenericError(EXPIRED))


def test_answer_that_is_cut_is_not_repeated_either() -> None:
    assert classify(obx.GenericError(f"{EXPIRED[:-60]}")).error_type == "UNAUTHENTICATED"
    assert "hunter2" not in classify(obx.GenericError(EXPIRED.partition("</Token")[0])).message


@pytest.mark.parametrize("status", [503, 500])
def test_store_that_is_down_during_listing_is_no_user_error(status: int) -> None:
    class Down(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Down) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        storage = StorageConfig(endpoint_url=endpoint, anonymous=True, max_retries=0, retry_timeout_s=1)
        with pytest.raises(InfrastructureError, match=r"cannot list s3://photos/") as caught:
            list(list_uris("s3://photos/", True, storage))
        server.shutdown()
    assert "start the same command again" in caught.value.remedy


def test_reachable_store_without_credentials_fails_for_the_moment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise obx.GenericError("Error performing PUT http://169.254.169.254/latest/api/token - HTTP error")

    put = obstore.put
    monkeypatch.setattr(module, "_reachable", set())
    monkeypatch.setattr(obstore, "put", failing)
    with pytest.raises(UserError, match="there are no credentials in the environment"):
        store.create("a", b"")
    monkeypatch.setattr(obstore, "put", put)
    store.create("a", b"")
    monkeypatch.setattr(obstore, "put", failing)
    with pytest.raises(InfrastructureError, match="the metadata service gives no new credentials"):
        store.create("b", b"")
    # Tasks get the store again for each shard.
    with pytest.raises(InfrastructureError, match="the metadata service gives no new credentials"):
        pickle.loads(pickle.dumps(store)).create("c", b"")  # noqa: S301


def test_create_whose_answer_was_lost_finds_its_own_object(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put
    lost: list[str] = []

    def losing(target: Any, path: str, data: bytes, *, mode: str) -> Any:
        done = real(target, path, data, mode=mode)
        if path not in lost:
            lost.append(path)
            raise obx.AlreadyExistsError("sent again, and there already")
        return done

    monkeypatch.setattr(obstore, "put", losing)
    store.probe()
    assert len(lost) == 1


@pytest.mark.parametrize(
    ("root", "variable"),
    [("s3://b", "AWS_ENDPOINT_URL"), ("gs://b", "GOOGLE_BASE_URL"), ("az://b", "AZURE_STORAGE_ENDPOINT")],
)
def test_endpoint_is_the_configured_one_or_the_environments(
    root: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv(variable, "http://127.0.0.1:9/variable")
    for config, expected in (
        (StorageConfig(anonymous=True, max_retries=0), "variable"),
        (StorageConfig(anonymous=True, max_retries=0, endpoint_url="http://127.0.0.1:9/key"), "key"),
    ):
        # Nobody listens there; the message says which address was asked.
        with pytest.raises(InfrastructureError, match=f"http://127.0.0.1:9/{expected}/"):
            Store(f"{root}/out", config).get("a")
