from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore import exceptions as obx

from batch_inference.config import StorageConfig
from batch_inference.errors import RowError
from batch_inference.storage import failures
from batch_inference.storage import fetcher as module
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.read_ahead import ReadAhead, Request
from batch_inference.storage.throttle import Throttle, backoff_s
from tests.support.faulty_s3 import Answer, faulty_s3
from tests.support.waiting import Crowd

SLOW_DOWN = obx.GenericError("Server returned non-2xx status code: 503 Service Unavailable: <Code>SlowDown</Code>")
MODIFIED = "Wed, 01 Jan 2025 00:00:00 GMT"
BROKEN = obx.GenericError("Server returned non-2xx status code: 500 Internal Server Error")


class Result:
    """The result that obstore returns for an object."""

    meta = {"size": 3, "e_tag": "1"}  # noqa: RUF012

    def bytes(self) -> bytes:
        return b"abc"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Make a bucket return these answers in order, then the object; return the waits between the requests."""

    def give(*these: Exception) -> list[float]:
        left, waits = list(these), list[float]()

        def get(*args: Any, **kwargs: Any) -> Result:
            if left:
                raise left.pop(0)
            return Result()

        monkeypatch.setattr(obstore, "get", get)
        monkeypatch.setattr(time, "sleep", waits.append)
        return waits

    return give


@pytest.mark.parametrize("exc", [SLOW_DOWN, BROKEN, obx.GenericError("error sending request")])
def test_transient_failures_are_retried_and_counted(exc: Exception, answers: Callable[..., list[float]]) -> None:
    waits = answers(exc, exc, exc)
    fetcher = Fetcher(StorageConfig())
    assert fetcher.fetch("s3://b/k", 10) == b"abc"
    assert len(waits) == 3
    assert all(0 <= wait <= 0.2 * 2**n for n, wait in enumerate(waits))
    assert fetcher.collect_retries() == 3
    assert fetcher.collect_retries() == 0


def test_failures_are_retried_n_times_and_slow_stores_longer(answers: Callable[..., list[float]]) -> None:
    config = StorageConfig(max_retries=2, retry_timeout_s=60)
    waits = answers(*[BROKEN] * 9)
    with pytest.raises(RowError) as caught:
        Fetcher(config).fetch("s3://b/k", 10)
    assert caught.value.error.error_type == "STORE_UNREACHABLE"
    assert len(waits) == 2
    assert len(answers(*[SLOW_DOWN] * 9)) == 0
    assert Fetcher(config).fetch("s3://b/k", 10) == b"abc"


def test_store_that_only_asks_to_slow_down_is_given_up_in_time(
    answers: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = answers(*[SLOW_DOWN] * 1000)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda wait: (waits.append(wait), clock.__setitem__(0, clock[0] + 5)))
    fetcher = Fetcher(StorageConfig(retry_timeout_s=60))
    with pytest.raises(RowError) as caught:
        fetcher.fetch("s3://b/k", 10)
    assert (caught.value.error.error_type, caught.value.error.retryable) == ("THROTTLED", True)
    assert len(waits) == 13


@pytest.mark.parametrize("place", ["http://169.254.169.254/latest/api/token", "http://metadata.google.internal/token"])
def test_metadata_service_that_fails_is_missing_credentials_only_before_the_store_has_answered(
    place: str, answers: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_reachable", set())
    failing = obx.GenericError(
        f"Generic S3 error: Error performing PUT {place} in 1s - HTTP error: error sending request"
    )
    fetcher = Fetcher(StorageConfig(max_retries=2))
    waits = answers(failing)
    with pytest.raises(RowError) as caught:
        fetcher.fetch("s3://b/k", 10)
    assert (caught.value.error.error_type, caught.value.error.retryable, waits) == ("UNAUTHENTICATED", False, [])
    assert fetcher.fetch("s3://b/k", 10) == b"abc"
    # From now on a role gives credentials, if not always.
    assert len(answers(failing, failing)) == 0
    assert fetcher.fetch("s3://b/k", 10) == b"abc"
    answers(*[failing] * 9)
    with pytest.raises(RowError, match="the metadata service gives no new credentials") as caught:
        fetcher.fetch("s3://b/k", 10)
    assert (caught.value.error.error_type, caught.value.error.retryable) == ("STORE_UNREACHABLE", True)
    with pytest.raises(RowError) as caught:  # another bucket may ask for others
        fetcher.fetch("s3://c/k", 10)
    assert caught.value.error.error_type == "UNAUTHENTICATED"


@pytest.mark.parametrize("exc", [FileNotFoundError("x"), PermissionError("x"), obx.UnauthenticatedError("x")])
def test_permanent_failures_are_not_retried(exc: Exception, answers: Callable[..., list[float]]) -> None:
    waits = answers(exc)
    with pytest.raises(RowError):
        Fetcher(StorageConfig()).fetch("s3://b/k", 10)
    assert waits == []


def test_fetcher_of_a_process_is_shared_for_equal_settings() -> None:
    assert Fetcher.of_process(StorageConfig()) is Fetcher.of_process(StorageConfig())
    assert Fetcher.of_process(StorageConfig()) is not Fetcher.of_process(StorageConfig(timeout_s=5))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 4, b"0123"), (8, 20, b"89"), (10, 12, b""), (50, 60, b""), (-3, 0, b"789"), (-99, 0, b"0123456789")],
)
def test_ranges_of_files(start: int, end: int, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    piece = Fetcher(StorageConfig()).fetch_range(f"file://{tmp_path}/f", start, end)
    assert (bytes(piece.data), piece.size) == (expected, 10)
    first = piece.etag
    (tmp_path / "f").write_bytes(b"0123456789x")
    assert Fetcher(StorageConfig()).fetch_range(f"file://{tmp_path}/f", start, end).etag != first


# --- sizes ---


def test_object_over_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Result] = []

    class Counted(Result):
        def bytes(self) -> bytes:
            read.append(self)
            return super().bytes()

    monkeypatch.setattr(obstore, "get", lambda *args: Counted())
    fetcher = Fetcher(StorageConfig())
    with pytest.raises(RowError, match=r"the file has 3 bytes, more than preprocess\.max_bytes = 2") as caught:
        fetcher.fetch("s3://b/k", 2)
    assert (caught.value.error.error_type, caught.value.error.retryable) == ("TOO_LARGE", False)
    assert read == []
    assert fetcher.fetch("s3://b/k", 3) == b"abc"
    assert len(read) == 1


@pytest.mark.parametrize("data", [b"abcd", b"ab", b""])
def test_answer_of_another_length_than_announced_is_asked_for_again(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Result):
        def bytes(self) -> bytes:
            return data

    results = [Wrong(), Result()]
    monkeypatch.setattr(obstore, "get", lambda *args: results.pop(0))
    monkeypatch.setattr(time, "sleep", lambda wait: None)
    fetcher = Fetcher(StorageConfig())
    assert fetcher.fetch("s3://b/k", 10) == b"abc"
    assert fetcher.collect_retries() == 1


@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("start", [1, -6])
def test_range_of_another_length_than_announced_is_asked_for_again(
    start: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda wait: None)
    with faulty_s3() as server:
        server.objects["k"] = b"0123456"
        wrong = Answer(206, b"1234567"[:length], {"content-range": "bytes 1-3/7", "last-modified": MODIFIED})
        if start < 0:
            wrong.headers["content-range"] = "bytes 1-6/7"
        answers = [wrong]
        server.answer = lambda asked: answers.pop() if answers else None
        fetcher = Fetcher(StorageConfig(endpoint_url=server.endpoint, region="us-east-1", anonymous=True))
        piece = fetcher.fetch_range("s3://b/k", start, 4 if start > 0 else 0)
        assert (bytes(piece.data), piece.size) == (b"123" if start > 0 else b"123456", 7)
        assert fetcher.collect_retries() == 1
        answers = [wrong] * 2
        with pytest.raises(RowError, match=f"the answer has {length} bytes, its headers announce") as caught:
            Fetcher(fetcher._storage.model_copy(update={"max_retries": 1})).fetch_range("s3://b/k", start, 4)
        assert (caught.value.error.error_type, caught.value.error.retryable) == ("STORE_UNREACHABLE", True)


def test_file_that_grows_is_read_up_to_the_size_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"12345")
    real = module.check_size

    def grow(size: int, max_bytes: int) -> None:
        real(size, max_bytes)
        file.write_bytes(b"1234567890")

    monkeypatch.setattr(module, "check_size", grow)
    assert Fetcher(StorageConfig()).fetch(f"file://{file}", 5) == b"12345"
    with pytest.raises(RowError, match="the file has 10 bytes, more than"):
        Fetcher(StorageConfig()).fetch(f"file://{file}", 5)


@pytest.mark.parametrize(("size", "each"), [(10, 3), (10, 10), (0, 3)])
def test_file_that_is_read_in_parts_is_read_whole(
    size: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network disks return less than they are asked for."""
    (tmp_path / "f").write_bytes(b"0123456789"[:size])
    real = os.read
    monkeypatch.setattr(os, "read", lambda file, count: real(file, min(count, each)))
    fetcher = Fetcher(StorageConfig())
    whole, part = fetcher.fetch(f"file://{tmp_path}/f", 10), fetcher.fetch_range(f"file://{tmp_path}/f", 1, 9)
    monkeypatch.undo()
    assert (whole, bytes(part.data)) == (b"0123456789"[:size], b"0123456789"[1 : min(9, size)])


def test_file_without_a_size_is_read_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file may never end."""
    reads: list[int] = []

    def endless(file: int, count: int) -> bytes:
        reads.append(count)
        return bytes(4) if len(reads) < 100 else b""

    monkeypatch.setattr(os, "read", endless)
    with pytest.raises(RowError, match=r"more bytes than preprocess\.max_bytes = 10") as caught:
        Fetcher(StorageConfig()).fetch("file:///proc/self/status", 10)
    monkeypatch.undo()
    assert caught.value.error.error_type == "TOO_LARGE"
    assert len(reads) == 3  # 12 bytes


# --- throttle ------------------------------------------------------------------------------------------------------------


def test_throttle_halves_when_asked_to_slow_down_and_recovers_one_by_one() -> None:
    throttle = Throttle(16)
    throttle.refused(time.monotonic())
    assert throttle.limit == 8
    # Those that were under way together are one sign, not eight.
    throttle.refused(0.0)
    assert throttle.limit == 8
    throttle.refused(time.monotonic())
    throttle.refused(time.monotonic())
    throttle.refused(time.monotonic())
    throttle.refused(time.monotonic())
    assert throttle.limit == 1
    throttle.succeeded()
    assert throttle.limit == 2
    for _ in range(4):
        throttle.succeeded()
    assert 3 <= throttle.limit <= 4
    for _ in range(1000):
        throttle.succeeded()
    assert throttle.limit == 16


def test_throttle_never_exceeds_its_limit() -> None:
    throttle = Throttle(8)
    throttle.refused(time.monotonic())
    crowd = Crowd(4)

    def work() -> None:
        for _ in range(5):
            with throttle, crowd:
                pass

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd.most == 4


@given(st.integers(1, 1000))
def test_waits_are_bounded(tries: int) -> None:
    assert 0 <= backoff_s(tries) <= 10


# --- read-ahead ----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests() -> None:
    def request(number: int) -> Request:
        def read() -> bytes:
            time.sleep(0.002 * (number % 3))
            if number % 7 == 3:
                raise RowError("fetch", "NOT_FOUND", f"none {number}")
            if number % 7 == 5:
                raise ZeroDivisionError("oops")
            return str(number).encode()

        return Request(read)

    ahead = ReadAhead((request(n) for n in range(50)), 5)
    for number in range(50):
        answer = ahead.next_answer()
        kind = {3: "NOT_FOUND", 5: "UNEXPECTED"}.get(number % 7)
        assert (answer.error and answer.error.error_type) == kind
        assert answer.data == (b"" if kind else str(number).encode())
    with pytest.raises(IndexError):
        ahead.next_answer()
    ahead.close()


@pytest.mark.parametrize(("known", "most"), [(True, 3), (False, 8)])
def test_read_ahead_is_limited_in_number_and_bytes(known: bool, most: int) -> None:
    asked: list[int] = []

    def requests() -> Iterator[Request]:
        for number in range(100):
            asked.append(number)
            yield Request(lambda: bytes(1000), 1000 if known else None)

    ahead = ReadAhead(requests(), 4, max_bytes=2500)
    ahead.send()
    assert len(asked) == most  # sizes that are not known are learnt
    for taken in range(1, 51):
        ahead.next_answer()
        if taken > 10:
            assert len(asked) - taken <= 3
    ahead.close()


def test_request_larger_than_the_limit_is_sent() -> None:
    ahead = ReadAhead(iter([Request(lambda: bytes(5000), 5000)] * 3), 4, max_bytes=100)
    assert [len(ahead.next_answer().data) for _ in range(3)] == [5000] * 3
    ahead.close()
