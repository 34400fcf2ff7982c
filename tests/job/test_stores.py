"""Azure's and Google's stores, each against a server: what test_kills, test_races and test_exit_codes show of S3."""

from __future__ import annotations

import http.client
import io
import json
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from batch_inference.config import StorageConfig
from batch_inference.inputs.listing import list_uris
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store
from tests.support import emulators
from tests.support.images import jpeg
from tests.support.jobs import job_args, start, verified
from tests.support.limits import HANG_S
from tests.support.servers import Proxy

Program = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class ObjectStore:
    """A store that runs here.

    Attributes:
        bucket: Its root, such as ``az://tests``.
        endpoint: What ``storage.endpoint_url`` is for it.
        proxy: Stands before the server, and counts or injects.
        other_credentials: Environment of somebody whom it does not know.
        denied: What its refusal of those says.
    """

    bucket: str
    endpoint: str
    proxy: Proxy
    other_credentials: dict[str, str]
    denied: str

    @property
    def config(self) -> StorageConfig:
        return StorageConfig(endpoint_url=self.endpoint, max_retries=2)

    @property
    def args(self) -> list[str]:
        return ["--set", f"storage.endpoint_url={self.endpoint}"]


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with emulators.azure_server(tmp_path_factory.mktemp("azurite")) as url:
        server, _, account = url.rpartition("/")
        proxy = Proxy(server)
        other = {"AZURE_STORAGE_ACCOUNT_KEY": "AAAA"}
        yield ObjectStore("az://tests", f"{proxy.url}/{account}", proxy, other, "AuthorizationFailure")
        proxy.close()


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory, google_key: RSAPublicKey) -> Iterator[ObjectStore]:
    folder = tmp_path_factory.mktemp("gcs")
    emulators.google_key_file(folder / "other.json")
    with emulators.google_server(folder, google_key) as front:
        other = {"GOOGLE_APPLICATION_CREDENTIALS": str(folder / "other.json")}
        yield ObjectStore("gs://tests", front.url, front, other, "AuthenticationRequired")


@pytest.fixture(params=["azure", "google"])
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    found: ObjectStore = request.getfixturevalue(request.param)
    yield found
    found.proxy.answer = lambda method, path: None


def upload(store: ObjectStore, folder: str, photos: Path) -> str:
    source = f"{store.bucket}/{folder}"
    target = Store(source, store.config)
    for file in photos.iterdir():
        target.put(file.name, file.read_bytes())
    return source


def test_job_is_killed_and_resumes_with_each_input_once(
    store: ObjectStore,
    photos: Callable[..., Path],
    tmp_path: Path,
    attached: Program,
    cluster: dict[str, str],
) -> None:
    """Listed, read whole and by ranges, committed by put-if-absent, killed after the first commits, resumed, verified."""
    source = upload(store, f"{tmp_path.name}/in", photos(60, bad_percent=5))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(20):
            data, member = jpeg(number), tarfile.TarInfo(f"{number:02d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    Store(source, store.config).put("members.tar", archive.getvalue())
    output = f"{store.bucket}/{tmp_path.name}/out"
    args = [
        *job_args(source, output), "--set", "predictor.args=[0.05]", "--address", cluster["address"], *store.args,
    ]  # fmt: skip
    ledger = Ledger(Store(output, store.config))
    process = start(*args, log=tmp_path / "first.log")
    deadline = time.monotonic() + HANG_S
    while len(ledger.committed()) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, (tmp_path / "first.log").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = ledger.committed()
    assert 2 <= len(before) < 8
    store.proxy.requests.clear()
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    found = verified(output, attached, *store.args)
    assert (found["rows"], found["predictions"], found["errors"], found["uncommitted"]) == (80, 77, 3, [])
    commits = [json.loads(ledger.store.get(info.path)) for info in ledger.store.objects("_commits")]
    assert len(commits) == 8
    kept = {commit["shard"] for commit in commits if commit["shard"] in before}
    assert kept == before, "what was committed before the kill stands"


def test_one_of_many_writers_creates(store: ObjectStore, tmp_path: Path) -> None:
    """Eight at once, twenty times: put-if-absent as commits need it; the probe of each run asks for the same."""
    folder = Store(f"{store.bucket}/{tmp_path.name}", store.config)
    folder.probe()
    for race in range(20):
        barrier = threading.Barrier(8)

        def create(writer: int, path: str = f"_commits/{race}", barrier: threading.Barrier = barrier) -> bool:
            mine = Store(folder.uri, store.config)
            barrier.wait()
            return mine.create(path, f"{writer}".encode())

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(create, range(8)))
        assert sum(made) == 1
        assert folder.get(f"_commits/{race}") == f"{made.index(True)}".encode()


def test_store_that_ignores_put_if_absent_ends_with_2(
    store: ObjectStore, photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    store.proxy.ignore_put_if_absent = True
    try:
        output = f"{store.bucket}/{tmp_path.name}/out"
        done = attached(*job_args(photos(4), output), "--address", cluster["address"], *store.args)
    finally:
        store.proxy.ignore_put_if_absent = False
    assert done.returncode == 2, done.stdout + done.stderr
    assert "put-if-absent" in done.stdout


def test_wrong_credentials_end_with_2(store: ObjectStore, tmp_path: Path, program: Program) -> None:
    Store(f"{store.bucket}/{tmp_path.name}/in", store.config).put("a.jpg", jpeg(1))
    done = program(
        "plan", f"{store.bucket}/{tmp_path.name}/in", "--set", "inference.gpus_per_actor=0", *store.args,
        env=store.other_credentials,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert store.denied in done.stderr
    assert "credentials" in done.stderr.partition("remedy:")[2]


def test_missing_bucket_ends_with_2(store: ObjectStore, tmp_path: Path, program: Program) -> None:
    missing = store.bucket.replace("tests", "no-such-bucket")
    done = program("plan", f"{missing}/in", "--set", "inference.gpus_per_actor=0", *store.args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert missing in done.stderr
    output = program(*job_args(tmp_path, f"{missing}/out"), *store.args)
    assert output.returncode == 2, output.stdout + output.stderr


def test_store_that_asks_to_slow_down_loses_no_row(
    store: ObjectStore, photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    source = upload(store, f"{tmp_path.name}/in", photos(40))
    refused = 0

    def answer(method: str, path: str) -> int | None:
        nonlocal refused
        if method == "GET" and path.partition("?")[0].endswith("jpg") and refused < 30:
            refused += 1
            return 503 if refused % 2 else 429
        return None

    store.proxy.answer = answer
    output = f"{store.bucket}/{tmp_path.name}/out"
    done = attached(*job_args(source, output), "--address", cluster["address"], *store.args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert refused == 30
    found = verified(output, attached, *store.args)
    assert (found["rows"], found["predictions"]) == (40, 40)


def test_an_odd_key_is_a_row_and_does_not_end_the_listing(google: ObjectStore, tmp_path: Path) -> None:
    """obstore, which lists, refuses such keys; Azure's are refused with what to do."""
    folder = tmp_path.name
    for key in ("a.jpg", "/b.jpg", "./c.jpg", "z.jpg"):
        connection = http.client.HTTPConnection(*google.proxy.target)
        name = quote(f"{folder}/{key}", safe="")
        connection.request("POST", f"/upload/storage/v1/b/tests/o?uploadType=media&name={name}", jpeg(1))
        assert connection.getresponse().status == 200
    found = {uri.uri for uri in list_uris(f"{google.bucket}/{folder}", True, google.config)}
    assert found == {f"{google.bucket}/{folder}/{key}" for key in ("a.jpg", "/b.jpg", "./c.jpg", "z.jpg")}
