"""At least 20 injections of each kind into whole jobs on this machine; `make test-faults` writes the table."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.faults.report import Outcome
from tests.support.jobs import find, job_args, start, verified, wait_for
from tests.support.servers import Proxy, stop

Program = Callable[..., subprocess.CompletedProcess[str]]
Record = Callable[[Outcome], None]
IMAGES, SHARD, TIMES = 240, 10, 20
PATIENT = ["--set", "storage.retry_timeout_s=60", "--set", "storage.timeout_s=2"]


class Inputs:
    """Images in a bucket, and jobs over them through a proxy."""

    def __init__(self, folder: Path, name: str, proxy: Proxy, direct: str, address: str) -> None:
        self.uri, self.proxy, self.address = f"s3://tests/{name}", proxy, address
        self.names = sorted(file.name for file in folder.iterdir())
        self.direct = StorageConfig(endpoint_url=direct)
        store = Store(f"{self.uri}/in", self.direct)
        for file in folder.iterdir():
            store.put(file.name, file.read_bytes())

    def args(self, output: str = "out", *more: str, delay_s: float = 0.0) -> list[str]:
        return [
            *job_args(f"{self.uri}/in", f"{self.uri}/{output}", shard_size=SHARD),
            "--set", f"predictor.args=[{delay_s}]", "--set", f"storage.endpoint_url={self.proxy.url}",
            "--address", self.address, *PATIENT, *more,
        ]  # fmt: skip

    def rows(self, output: str = "out") -> tuple[Counter[str], dict[str, str]]:
        """Rows of each input, and the error types of those that failed; read past the proxy, from the committed files."""
        store = Store(f"{self.uri}/{output}", self.direct)
        seen: Counter[str] = Counter()
        failed: dict[str, str] = {}
        for kind in ("predictions", "errors"):
            for info in list(store.objects(kind)):
                table = pd.read_parquet(io.BytesIO(store.get(info.path)))
                names = [uri.rpartition("/")[2] for uri in table["uri"]]
                seen.update(names)
                if kind == "errors":
                    failed |= dict(zip(names, table["error_type"], strict=True))
        return seen, failed

    def missing_and_duplicated(self, output: str = "out") -> tuple[int, int]:
        seen, _ = self.rows(output)
        assert set(seen) <= set(self.names)
        return sum(name not in seen for name in self.names), sum(count > 1 for count in seen.values())

    def verified(self, program: Program, output: str = "out") -> None:
        verified(f"{self.uri}/{output}", program, "--set", f"storage.endpoint_url={self.direct.endpoint_url}")


@pytest.fixture
def inputs(photos: Callable[..., Path], tmp_path: Path, proxy: Proxy, s3: str, cluster: dict[str, str]) -> Inputs:
    return Inputs(photos(IMAGES), tmp_path.name, proxy, s3, cluster["address"])


class Injector:
    """Answers every n-th matching request badly, until it has done so often enough."""

    def __init__(self, what: int | str, method: str, part: str, times: int, every: int) -> None:
        self.done = 0
        self._what, self._method, self._part, self._times, self._every = what, method, part, times, every
        self._met = 0
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> int | str | None:
        if method != self._method or self._part not in path:
            return None
        with self._lock:
            self._met += 1
            if self._met % self._every or self.done >= self._times:
                return None
            self.done += 1
            return self._what


STORE_FAULTS = [
    # what, method, part of the path, times, every n-th
    ("input: 500 internal error", 500, "GET", "/in/", 40, 3),
    ("input: 503 slow down", 503, "GET", "/in/", 40, 3),
    ("input: 429 too many requests", 429, "GET", "/in/", 40, 3),
    ("input: connection reset before the answer", Proxy.RESET, "GET", "/in/", 40, 3),
    ("input: connection cut in the middle of the body", Proxy.CUT, "GET", "/in/", 40, 3),
    ("input: no answer within the time limit", Proxy.SILENT, "GET", "/in/", 20, 5),
    ("manifest shard: 503", 503, "GET", "/_manifest/shard-", 20, 2),
    ("data file: 500", 500, "PUT", "/predictions/", 20, 2),
    ("data file: written, answer lost", Proxy.LOST, "PUT", "/predictions/", 20, 2),
    ("commit: 503", 503, "PUT", "/_commits/", 20, 2),
    ("commit: made, answer lost", Proxy.LOST, "PUT", "/_commits/", 20, 2),
    ("commit: connection reset", Proxy.RESET, "PUT", "/_commits/", 20, 2),
]


@pytest.mark.parametrize(
    ("fault", "what", "method", "part", "times", "every"), STORE_FAULTS, ids=[f[0] for f in STORE_FAULTS]
)
def test_a_store_that_fails_now_and_then_costs_no_row(
    fault: str, what: int | str, method: str, part: str, times: int, every: int,
    inputs: Inputs, proxy: Proxy, program: Program, record: Record,
) -> None:  # fmt: skip
    injector = Injector(what, method, part, times, every)
    proxy.answer = injector
    begun = time.monotonic()
    done = program(*inputs.args())
    seconds = time.monotonic() - begun
    proxy.answer = lambda method, path: None
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    lost, duplicated = inputs.missing_and_duplicated()
    _, failed = inputs.rows()
    record(
        Outcome(
            fault, "sent again; no row fails", injector.done, injector.done - len(failed), lost, duplicated, seconds
        )
    )
    assert injector.done >= TIMES
    assert (failed, lost, duplicated) == ({}, 0, 0)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("gone since planning", "NOT_FOUND"), ("access denied", "ACCESS_DENIED"), ("fails for good", "STORE_UNREACHABLE")],
)
def test_an_object_that_cannot_be_had_is_one_row(
    fault: str, expected: str, inputs: Inputs, proxy: Proxy, program: Program, record: Record
) -> None:
    chosen = set(random.Random(1).sample(inputs.names, TIMES))
    status = {"NOT_FOUND": 404, "ACCESS_DENIED": 403, "STORE_UNREACHABLE": 500}[expected]
    proxy.answer = lambda method, path: status if method == "GET" and path.rpartition("/")[2] in chosen else None
    done = program(*inputs.args("out", "--set", "storage.max_retries=1"))
    proxy.answer = lambda method, path: None
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    lost, duplicated = inputs.missing_and_duplicated()
    _, failed = inputs.rows()
    held = sum(failed.get(name) == expected for name in chosen)
    record(
        Outcome(
            f"input: {fault}", f"one row {expected}, its neighbours keep theirs", len(chosen), held, lost, duplicated
        )
    )
    assert failed == dict.fromkeys(chosen, expected)
    assert (lost, duplicated) == (0, 0)


def test_an_object_that_was_replaced_since_planning_is_one_row_until_it_is_meant(
    inputs: Inputs, proxy: Proxy, program: Program, record: Record
) -> None:
    chosen = random.Random(5).sample(inputs.names, TIMES)
    replaced_when_planned(inputs, proxy, chosen)
    done = program(*inputs.args())
    proxy.answer = lambda method, path: None
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    _, failed = inputs.rows()
    held = sum(failed.get(name) == "CHANGED" for name in chosen)
    assert failed == dict.fromkeys(chosen, "CHANGED")
    begun = time.monotonic()
    endpoint = ["--set", f"storage.endpoint_url={proxy.url}", "--address", inputs.address, "--dashboard-host", "none"]
    done = program("retry", f"{inputs.uri}/out", "--error-type", "CHANGED", *endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    lost, duplicated = inputs.missing_and_duplicated()
    record(
        Outcome(
            "input: replaced since planning", "one row CHANGED; a retry takes what is there",
            len(chosen), held, lost, duplicated, time.monotonic() - begun,
        )
    )  # fmt: skip
    assert (inputs.rows()[1], lost, duplicated) == ({}, 0, 0)


def replaced_when_planned(inputs: Inputs, proxy: Proxy, names: list[str]) -> None:
    """Other images in their place at the moment when the plan is made, before any of them is read."""
    store = Store(f"{inputs.uri}/in", inputs.direct)

    def answer(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/_job.json"):
            for number, name in enumerate(names):
                image = io.BytesIO()
                Image.new("RGB", (48, 32), (number, 0, 0)).save(image, "JPEG")
                store.delete([name])
                store.put(name, image.getvalue())

    proxy.answer = answer


def test_an_image_that_kills_the_predictor_is_one_row(inputs: Inputs, program: Program, record: Record) -> None:
    chosen = sorted(random.Random(3).sample(inputs.names, TIMES))
    white = io.BytesIO()
    Image.new("RGB", (48, 32), "white").save(white, "JPEG")
    store = Store(f"{inputs.uri}/in", inputs.direct)
    for name in chosen:
        store.delete([name])
        store.put(name, white.getvalue())
    begun = time.monotonic()
    done = program(*inputs.args("out", "--set", "predictor=predictors:DiesOfWhite"))
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    lost, duplicated = inputs.missing_and_duplicated()
    _, failed = inputs.rows()
    held = sum(failed.get(name) == "PREDICTOR_CRASH" for name in chosen)
    record(
        Outcome(
            "an image kills the predictor's process", "one row, its neighbours keep theirs",
            len(chosen), held, lost, duplicated, seconds,
        )
    )  # fmt: skip
    assert failed == dict.fromkeys(chosen, "PREDICTOR_CRASH")
    assert (lost, duplicated) == (0, 0)


def test_failed_rows_are_predictions_after_a_retry(
    inputs: Inputs, proxy: Proxy, program: Program, record: Record
) -> None:
    chosen = set(random.Random(2).sample(inputs.names, 2 * TIMES))
    proxy.answer = lambda method, path: 500 if method == "GET" and path.rpartition("/")[2] in chosen else None
    done = program(*inputs.args("out", "--set", "storage.max_retries=0"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(inputs.rows()[1]) == chosen
    proxy.answer = lambda method, path: None
    begun = time.monotonic()
    endpoint = ["--set", f"storage.endpoint_url={proxy.url}", "--address", inputs.address, "--dashboard-host", "none"]
    done = program("retry", f"{inputs.uri}/out", "--stage", "fetch", *endpoint)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    inputs.verified(program)
    lost, duplicated = inputs.missing_and_duplicated()
    _, failed = inputs.rows()
    record(
        Outcome(
            "retry --stage fetch",
            "each failed row a prediction",
            len(chosen),
            len(chosen - set(failed)),
            lost,
            duplicated,
            seconds,
        )
    )
    assert (failed, lost, duplicated) == ({}, 0, 0)


@pytest.mark.parametrize(
    ("fault", "what", "code"), [("credentials expire", 400, 2), ("the store stops", 503, 5)], ids=["expired", "stopped"]
)
def test_a_job_that_ends_in_the_middle_resumes(
    fault: str, what: int, code: int, inputs: Inputs, proxy: Proxy, program: Program, record: Record
) -> None:
    """Again and again at another request, until the job is done: nothing that was committed is done again."""
    rng = random.Random(3)
    held = times = 0
    longest = 0.0
    job = 0
    impatient = ["--set", "storage.max_retries=0", "--set", "storage.retry_timeout_s=1"]
    while times < TIMES:
        job += 1
        for _ in range(6):
            left = rng.randrange(5, 250)

            def answer(method: str, path: str) -> int | None:
                nonlocal left
                left -= 1
                return what if left < 0 else None

            proxy.answer = answer
            done = program(*inputs.args(f"out-{job}", *impatient))
            if left >= 0:
                break  # done before it was to happen
            times += 1
            held += done.returncode == code and "Traceback" not in done.stdout + done.stderr
            assert done.returncode in (0, code), done.stdout + done.stderr
            if done.returncode == 0:
                break
        proxy.answer = lambda method, path: None
        begun = time.monotonic()
        done = program(*inputs.args(f"out-{job}"))
        longest = max(longest, time.monotonic() - begun)
        assert done.returncode == 0, done.stdout + done.stderr
        inputs.verified(program, f"out-{job}")
    lost, duplicated = map(
        sum, zip(*(inputs.missing_and_duplicated(f"out-{j}") for j in range(1, job + 1)), strict=True)
    )
    record(
        Outcome(
            f"{fault} in the middle", f"exit {code} with the reason; resumes", times, held, lost, duplicated, longest
        )
    )
    assert (held, lost, duplicated) == (times, 0, 0)


KILLS = [
    ("driver killed", None, signal.SIGKILL),
    ("driver: SIGTERM", None, signal.SIGTERM),
    ("actor killed", "ray::MapWorker", signal.SIGKILL),
    ("read task killed", "ray::ReadShards", signal.SIGKILL),
    ("writer killed", "ray::ShardWriter", signal.SIGKILL),
]


@pytest.mark.parametrize(("fault", "title", "number"), KILLS, ids=[k[0] for k in KILLS])
def test_a_process_that_is_killed_costs_no_row(
    fault: str, title: str | None, number: signal.Signals,
    inputs: Inputs, cluster: dict[str, str], program: Program, record: Record, tmp_path: Path,
) -> None:  # fmt: skip
    """Any process may die at any moment; if the attempt ends with it, the next one resumes."""
    rng = random.Random(4)
    times = held = job = lost = duplicated = 0
    longest = 0.0
    while times < TIMES:
        job += 1
        log = tmp_path / f"{job}.log"
        store = Store(f"{inputs.uri}/out-{job}", inputs.direct)
        while True:
            process = start(*inputs.args(f"out-{job}", delay_s=0.08), log=log)
            try:
                before = len(list(store.objects("_commits")))
                awaited = before + rng.randrange(1, 5)
                # The last few shards are left to an attempt that lives.
                doomed = awaited <= 2 * SHARD and times < TIMES
                if doomed:
                    wait_for(
                        lambda n=awaited, p=process, s=store: (
                            p.poll() is not None or len(list(s.objects("_commits"))) >= n
                        ),
                        _Alive,
                        log,
                    )
                    time.sleep(rng.uniform(0, 0.3))
                if doomed and process.poll() is None and _kill(process, cluster, title, number):
                    times += 1
                    begun = time.monotonic()
                    code = process.wait(120)
                    allowed = {None: {-9, 130}, "ray::ShardWriter": {5, 0}}.get(title, {0})
                    held += code in allowed
                    assert code in allowed, log.read_text()
                    longest = max(longest, time.monotonic() - begun)
                else:
                    code = process.wait(120)
                if code == 0:
                    break
            finally:
                stop(process)
        inputs.verified(program, f"out-{job}")
        one = inputs.missing_and_duplicated(f"out-{job}")
        lost, duplicated = lost + one[0], duplicated + one[1]
    promise = "resumes" if title in (None, "ray::ShardWriter") else "goes on by itself"
    record(Outcome(fault, promise, times, held, lost, duplicated, longest))
    assert (held, lost, duplicated) == (times, 0, 0)


class _Alive:
    """In a process's place for `wait_for`, whose condition looks at the process itself."""

    @staticmethod
    def poll() -> None:
        return None


def _kill(process: subprocess.Popen[bytes], cluster: dict[str, str], title: str | None, number: signal.Signals) -> bool:
    if title is None:
        process.send_signal(number)
        return True
    # Tasks are short: between two of them nobody is there to be killed.
    until = time.monotonic() + 3
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(find(cluster, title).pid, number)
            return True
    return False


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of a few MiB, which only root can make; its end is a failure like any other."""
    folder.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_attempt_and_the_next_one_resumes(
    photos: Callable[..., Path], cluster: dict[str, str], program: Program, record: Record, tmp_path: Path
) -> None:
    folder = photos(IMAGES)
    names = {file.name for file in folder.iterdir()}
    held = lost = duplicated = 0
    longest = 0.0
    for place in range(TIMES):
        with small_disk(tmp_path / f"disk-{place}", 4) as disk:
            args = [*job_args(folder, disk / "out", shard_size=SHARD), "--address", cluster["address"]]
            assert program(*args, "--set", "input.limit=10").returncode == 0  # imported, warmed up; then other jobs
            args[3] = str(disk / "job")
            ballast = disk / "ballast"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            # So much is left that the job gets to a place of its own each time: from its first file to the last shards,
            # for it takes a page for each of its files, three a shard and a few before and after them.
            ballast.write_bytes(b"0" * (free - 4096 * (4 + 3 * place)))
            done = program(*args)
            text = done.stdout + done.stderr
            held += done.returncode == 5 and "No space left" in text and "Traceback" not in text
            assert done.returncode == 5, f"place {place}: exit code {done.returncode}\n{text}"
            ballast.unlink()
            begun = time.monotonic()
            done = program(*args)
            longest = max(longest, time.monotonic() - begun)
            assert done.returncode == 0, done.stdout + done.stderr
            verified(str(disk / "job"), program)
            files = [*disk.glob("job/predictions/*"), *disk.glob("job/errors/*")]
            seen = Counter(uri.rpartition("/")[2] for file in files for uri in pd.read_parquet(file)["uri"])
            lost += len(names - set(seen))
            duplicated += sum(count > 1 for count in seen.values())
    record(Outcome("output's disk full", "exit 5 with the reason; resumes", TIMES, held, lost, duplicated, longest))
    assert (held, lost, duplicated) == (TIMES, 0, 0)


def test_two_drivers_at_once_make_one_result(inputs: Inputs, program: Program, record: Record, tmp_path: Path) -> None:
    lost = duplicated = held = 0
    for place in range(TIMES):
        logs = [tmp_path / f"{place}-{i}.log" for i in range(2)]
        processes = [start(*inputs.args(f"out-{place}"), log=log) for log in logs]
        codes = [process.wait(150) for process in processes]
        assert codes == [0, 0], [log.read_text() for log in logs]
        inputs.verified(program, f"out-{place}")
        one = inputs.missing_and_duplicated(f"out-{place}")
        lost, duplicated, held = lost + one[0], duplicated + one[1], held + (one == (0, 0))
    record(Outcome("two drivers at once", "one result", TIMES, held, lost, duplicated))
    assert (held, lost, duplicated) == (TIMES, 0, 0)
