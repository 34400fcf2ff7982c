"""Images as objects, in tar files and in Parquet files of a real S3 store: their rows, and the requests for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import StorageConfig
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store
from tests.support.containers import parquet, tar
from tests.support.images import broken, jpeg
from tests.support.jobs import job_args, start, verified, wait_for
from tests.support.servers import Proxy

Program = Callable[..., subprocess.CompletedProcess[str]]

IMAGES = 300
KINDS = {"files": "", "tar": "part-*.tar", "parquet": "part-*.parquet"}


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Different images, some of them broken."""
    return [broken(n) if n % 50 == 7 else jpeg(n) for n in range(IMAGES)]


def upload(kind: str, images: list[bytes], store: Store) -> None:
    """Images as objects, in three tar files, or in two Parquet files of several row groups."""
    if kind == "files":
        for number, data in enumerate(images):
            store.put(f"{number:04d}.jpg", data)
    elif kind == "tar":
        for part in range(3):
            mine = range(part * 100, part * 100 + 100)
            members = {f"{n:04d}.{end}": images[n] if end == "jpg" else b"7" for n in mine for end in ("jpg", "cls")}
            store.put(f"part-{part}.tar", tar(members, "pax"))
    else:
        for part in range(2):
            store.put(f"part-{part}.parquet", parquet(images[part * 150 : part * 150 + 150], 40))  # type: ignore[arg-type]


def rows(store: Store, table: str) -> list[dict[str, Any]]:
    """Rows of a job's output in the order of its inputs."""
    parts = [pq.read_table(pa.BufferReader(store.get(i.path))) for i in store.objects(table)]
    return pa.concat_tables(parts).sort_by([("shard", "ascending"), ("row", "ascending")]).to_pylist() if parts else []


def gets(proxy: Proxy, folder: str) -> int:
    """Requests for objects of a folder."""
    return sum(method == "GET" and f"/{folder}/" in path and "list-type" not in path for method, path in proxy.requests)


def test_images_in_files_are_predicted_as_those_that_are_objects_with_few_requests(
    images: list[bytes], tmp_path: Path, attached: Program, cluster: dict[str, str], proxy: Proxy
) -> None:
    config = StorageConfig(endpoint_url=proxy.url)
    extra = ["--set", f"storage.endpoint_url={proxy.url}"]
    found: dict[str, list[tuple[int, float | None, str | None]]] = {}
    requests = {}
    for kind, pattern in KINDS.items():
        base = f"s3://tests/{tmp_path.name}"
        upload(kind, images, Store(f"{base}/in-{kind}", config))
        proxy.requests.clear()
        args = job_args(f"{base}/in-{kind}/{pattern}", f"{base}/out-{kind}", shard_size=50)
        done = attached(*args, "--address", cluster["address"], *extra)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "300 of 300 images accounted for, 294 predictions and 6 errors" in done.stdout
        requests[kind] = gets(proxy, f"in-{kind}")
        verified(f"{base}/out-{kind}", attached, *extra)
        output = Store(f"{base}/out-{kind}", config)
        both = [*rows(output, "predictions"), *rows(output, "errors")]
        both.sort(key=lambda row: (row["shard"], row["row"]))
        found[kind] = [(r["shard"] * 50 + r["row"], r.get("mean"), r.get("error_type")) for r in both]
        end = {"files": "/0299.jpg", "tar": "/part-2.tar#0299.jpg", "parquet": "/part-1.parquet#149"}[kind]
        assert both[-1]["uri"] == f"{base}/in-{kind}{end}"
        assert not [name for name in both[0] if name.startswith("_")]
        if kind == "tar":
            assert json.loads(output.get("_job.json"))["passthrough"] == []
            assert json.loads(output.get("_job.json"))["skipped"] == {".cls": 300}
    assert found["files"] == found["tar"] == found["parquet"]
    assert len(found["files"]) == IMAGES
    print("requests for inputs:", requests)
    assert requests["files"] == IMAGES
    # Planning reads three indexes; each of six shards asks once for each file that it reaches into.
    assert requests["tar"] <= 30
    # Two footers and, for each shard and file, one more; then the row groups that a shard reaches into.
    assert requests["parquet"] <= 40


def test_after_a_kill_the_members_of_committed_shards_are_not_read_again(
    images: list[bytes], tmp_path: Path, attached: Program, cluster: dict[str, str], proxy: Proxy
) -> None:
    config = StorageConfig(endpoint_url=proxy.url)
    base = f"s3://tests/{tmp_path.name}"
    upload("tar", images, Store(f"{base}/in", config))
    ledger = Ledger(Store(f"{base}/out", config))
    args = [
        *job_args(f"{base}/in", f"{base}/out", shard_size=10), "--address", cluster["address"],
        "--set", f"storage.endpoint_url={proxy.url}", "--set", "predictor.kwargs.delay_s=0.3",
    ]  # fmt: skip
    log = tmp_path / "log"
    process = start(*args, log=log)
    wait_for(lambda: len(ledger.committed()) >= 4, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what its tasks had asked for
    left = 30 - len(ledger.committed())
    assert 0 < left <= 26
    proxy.requests.clear()
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 of 300 images accounted for, 294 predictions and 6 errors" in done.stdout
    # Ten members of a shard are one range; the archives' headers are not read again.
    assert gets(proxy, "in") == left
    verified(f"{base}/out", attached, "--set", f"storage.endpoint_url={proxy.url}")


def test_a_store_that_asks_to_slow_down_is_asked_less_and_loses_no_row(
    images: list[bytes], tmp_path: Path, attached: Program, cluster: dict[str, str], proxy: Proxy
) -> None:
    config = StorageConfig(endpoint_url=proxy.url)
    base = f"s3://tests/{tmp_path.name}"
    upload("files", images, Store(f"{base}/in", config))
    asked: list[float] = []
    refused = [0]

    def answer(method: str, path: str) -> int | None:
        """All requests for images are refused for a while; after that, those beyond 100 a second."""
        if method != "GET" or "/in/" not in path:
            return None
        now = time.monotonic()
        asked.append(now)
        if now - asked[0] < 4 or sum(now - moment < 0.5 for moment in asked[-60:]) > 50:
            refused[0] += 1
            return 503
        return None

    proxy.answer = answer
    args = job_args(f"{base}/in", f"{base}/out", shard_size=300)
    extra = ["--set", f"storage.endpoint_url={proxy.url}"]
    done = attached(*args, "--address", cluster["address"], *extra)
    proxy.answer = lambda method, path: None
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 of 300 images accounted for, 294 predictions and 6 errors" in done.stdout
    first = sum(moment - asked[0] < 1 for moment in asked)
    later = sum(2 <= moment - asked[0] < 4 for moment in asked)
    print(
        f"refused {refused[0]} of {len(asked)}; in the first second {first}, in the two seconds before the end {later}"
    )
    assert first >= 8
    assert later < first / 2
    # 88 to 160, by how many are under way when the first answer comes; without a throttle 248 and more.
    assert refused[0] < 0.7 * IMAGES
    summary = json.loads(Store(f"{base}/out", config).get("_report/summary.json"))
    assert summary["this_attempt"]["retries"] == refused[0]
