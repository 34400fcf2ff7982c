"""The driver's memory, and time and memory of planning, must not grow with the number of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.images import broken, jpeg
from tests.support.jobs import PROGRAM, environment, job_args, start, verified

Program = Callable[..., subprocess.CompletedProcess[str]]

IMAGES = int(os.environ.get("SCALE_IMAGES", "100000"))
LINES = 1_000_000
MIB = 1024 * 1024
# The driver itself, with Ray, takes some 300 MiB; a result row kept for each image would show as more than this.
MAX_GROWTH_MIB = 64
MAX_PLAN_MIB = 2048


def test_100_000_images_in_flat_memory(tmp_path: Path, attached: Program, cluster: dict[str, str]) -> None:
    folder = tmp_path / "photos"
    # Hard links to a few real JPEGs: as many files, without as many megabytes.
    sources = [jpeg(seed, (32, 24)) for seed in range(20)]
    for part in range(-(-IMAGES // 10000)):
        sub = folder / f"{part:03d}"
        sub.mkdir(parents=True)
        for kind, data in enumerate(sources):
            (sub / f".source-{kind}").write_bytes(data)
        (sub / ".source-bad").write_bytes(broken(2))
        for index in range(min(10000, IMAGES - part * 10000)):
            kind = "bad" if index % 1000 == 999 else str(index % 20)
            os.link(sub / f".source-{kind}", sub / f"{index:05d}.jpg")
    log = tmp_path / "log"
    args = [
        *job_args(folder, tmp_path / "out", shard_size=1000),
        "--set",
        "inference.batch_size=256",
        "--address",
        cluster["address"],
    ]
    begun = time.monotonic()
    process = start(*args, log=log)
    driver = psutil.Process(process.pid)
    samples: list[tuple[int, int]] = []
    while process.poll() is None:
        assert time.monotonic() - begun < 1200, log.read_text()
        try:
            memory = driver.memory_info().rss
        except psutil.NoSuchProcess:
            break
        samples.append((len(list((tmp_path / "out/_commits").glob("*"))), memory))
        time.sleep(0.5)
    seconds = time.monotonic() - begun
    assert process.wait() == 0, log.read_text()
    shards = IMAGES // 1000
    early = max(memory for done, memory in samples if shards * 0.1 <= done <= shards * 0.5)
    late = max(memory for done, memory in samples if done > shards * 0.5)
    found = verified(str(tmp_path / "out"), attached)
    assert (found["rows"], found["errors"]) == (IMAGES, IMAGES // 1000)
    print(
        f"{IMAGES:,} images in {seconds:.0f} s; driver memory {early / MIB:.0f} MiB at most in the first half, "
        f"{late / MIB:.0f} MiB in the second"
    )
    assert (late - early) / MIB < MAX_GROWTH_MIB, samples


def test_a_manifest_of_a_million_lines_is_planned_in_bounded_memory(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    with manifest.open("w") as file:
        file.write("uri,id\n")
        file.writelines(f"s3://bucket/photos/{i % 1000:04d}/image-{i:09d}.jpg,{i:09d}\n" for i in range(LINES))
    command = [PROGRAM, "plan", "--manifest", str(manifest), "--set", "predictor=predictors:MeanColor", "--json"]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=Path(__file__).parent)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert json.loads(text)["inputs"] == LINES
    print(f"{LINES:,} manifest lines planned in {time.monotonic() - begun:.1f} s with {usage.ru_maxrss / 1024:.0f} MiB")
    assert usage.ru_maxrss / 1024 < MAX_PLAN_MIB


def test_writing_the_plan_of_a_million_lines_stays_in_bounded_memory(tmp_path: Path) -> None:
    """`plan` writes nothing; a run writes the manifest too, in a process of its own so that its memory can be read."""
    code = (
        "import sys, pyarrow as pa\n"
        "from batch_inference.config import JobConfig\n"
        "from batch_inference.output.ledger import Ledger\n"
        "from batch_inference.output.records import JobRecord, now\n"
        "from batch_inference.storage.store import Store\n"
        f"table = pa.table({{'uri': [f's3://bucket/photos/image-{{i:09d}}.jpg' for i in range({LINES})]}})\n"
        "config = JobConfig()\n"
        "ledger = Ledger(Store(sys.argv[1], config.storage))\n"
        f"job = JobRecord(config.model_dump(mode='json'), '', {{}}, {LINES // 1000}, {LINES}, '', {{}}, now())\n"
        "ledger.complete_manifest(ledger.create_job(table, job, 'a'))\n"
    )
    process = subprocess.Popen([str(Path(PROGRAM).with_name("python")), "-c", code, str(tmp_path / "out")])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert len(list((tmp_path / "out/_manifest").glob("shard-*.parquet"))) == LINES // 1000
    assert usage.ru_maxrss / 1024 < MAX_PLAN_MIB


def test_the_measurement_of_the_driver_runs(tmp_path: Path) -> None:
    """`make bench-scale`, small: every step, `verify` among them, on an output made without workers."""
    command = [sys.executable, "-m", "tests.bench.scale", "--most", "10000", "--driver-rows", "2000"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert [step["step"] for step in figures["steps"]][2:] == [
        "plan",
        "collect",
        "status",
        "resume",
        "finish",
        "verify",
    ]
    assert figures["steps"][-1]["rows"] == 10_000
