"""The promise under SIGKILL: whatever dies at whatever moment, every input ends as exactly one row.

Mocks would prove nothing here: what is at stake is what a store holds when a process vanishes between two requests, and
what Ray does with the work of an actor that is gone. So real processes are killed, and a proxy before a real S3 server
counts what is read again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from batch_inference.config import StorageConfig
from batch_inference.output import manifest
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store
from tests.support.jobs import find, job_args, start, verified, wait_for
from tests.support.limits import HANG_S
from tests.support.servers import Proxy, stop

Program = Callable[..., subprocess.CompletedProcess[str]]

DRIVER_KILLS = int(os.environ.get("DRIVER_KILLS", "6"))
ACTOR_KILLS = int(os.environ.get("ACTOR_KILLS", "2"))
SHARDS, SHARD_SIZE = 24, 10
# A whole run takes four to eight seconds here, from its start to _SUCCESS.
LAST_MOMENT_S = 7.0
RUN_S = HANG_S


def job(source: str, output: str, url: str, address: str, delay_s: float = 0.03) -> list[str]:
    args = job_args(source, output, shard_size=SHARD_SIZE)
    args += ["--set", f"predictor.args=[{delay_s}]", "--set", f"storage.endpoint_url={url}", "--address", address]
    return args


def uris_of(store: Store, shards: set[int]) -> set[str]:
    return {uri for shard in shards for uri in manifest.read_shard(store, shard)["uri"].to_pylist()}


def test_driver_killed_at_random_moments(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, proxy: Proxy, s3: str, cluster: dict[str, str]
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    source = f"s3://tests/{tmp_path.name}/in"
    images = Store(source, StorageConfig(endpoint_url=s3))
    for file in photos(SHARDS * SHARD_SIZE, bad_percent=5).iterdir():
        images.put(file.name, file.read_bytes())
    kills = jobs = runs = 0
    committed_before_kill: list[int] = []
    while kills < DRIVER_KILLS:
        jobs += 1
        output = f"s3://tests/{tmp_path.name}/out-{jobs}"
        args, done = job(source, output, proxy.url, cluster["address"]), False
        while not done:
            runs += 1
            # Looked at without the proxy, so that only the program's own requests are counted.
            ledger = Ledger(Store(output, StorageConfig(endpoint_url=s3)))
            finished = ledger.committed()
            forbidden = uris_of(ledger.store, finished)
            proxy.requests.clear()
            log = tmp_path / f"run-{runs}.log"
            process = start(*args, log=log)
            kill = kills < DRIVER_KILLS
            # Every other kill waits for the work to be under way: by the clock alone most would meet the start.
            awaited = rng.randrange(1, SHARDS // 3) if kill and kills % 2 else 0
            deadline = time.monotonic() + RUN_S
            while (
                len(ledger.committed()) < len(finished) + awaited
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            moment = (rng.uniform(0.0, 0.3) if awaited else rng.uniform(0.0, LAST_MOMENT_S)) if kill else RUN_S
            try:
                code = process.wait(moment)
                assert code == 0, f"seed {seed}, run {runs}: exit {code}\n{log.read_text()}"
                done = True
                # The counting itself must work: what was left to do has been read through the proxy.
                left = uris_of(ledger.store, set(range(SHARDS)) - finished)
                assert left <= {f"s3:/{path}" for method, path in proxy.requests if method == "GET"}
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait(10)
                assert kill, f"seed {seed}: the last run did not end\n{log.read_text()}"
                kills += 1
                committed_before_kill.append(len(ledger.committed()))
            read = {f"s3:/{path}" for method, path in proxy.requests if method == "GET"}
            again = read & forbidden
            assert not again, (
                f"seed {seed}, run {runs}: images of committed shards were read again: {sorted(again)[:3]}"
            )
        found = verified(output, attached, "--set", f"storage.endpoint_url={s3}")
        assert (found["rows"], found["predictions"], found["errors"]) == (240, 228, 12)
    middle = [n for n in committed_before_kill if 0 < n < SHARDS]
    print(
        f"driver killed {kills} times in {runs} runs of {jobs} jobs (seed {seed}); commits at the kill: {sorted(committed_before_kill)}; "
        "rows lost 0, duplicated 0, committed shards read again 0"
    )
    assert len(middle) >= DRIVER_KILLS // 3, "too few kills met a job in the middle; the moments are badly chosen"


def test_actor_killed(photos: Callable[..., Path], tmp_path: Path, cluster: dict[str, str], attached: Program) -> None:
    """Ray starts another actor and runs its tasks again; the rows that came twice must count once."""
    folder = photos(SHARDS * SHARD_SIZE, bad_percent=5)
    rng = random.Random(7)
    pids = set()
    for run in range(ACTOR_KILLS):
        output, log = tmp_path / f"out-{run}", tmp_path / f"run-{run}.log"
        args = [
            *job_args(folder, output, shard_size=SHARD_SIZE),
            "--set",
            "predictor.args=[0.1]",
            "--address",
            cluster["address"],
        ]
        process = start(*args, log=log)
        try:
            wait_for(lambda out=output: len(list(out.glob("_commits/*"))) >= rng.randrange(1, 16), process, log)
            victim = find(cluster, "ray::MapWorker")
            victim.kill()
            pids.add(victim.pid)
            assert process.wait(RUN_S) == 0, log.read_text()
        finally:
            stop(process)
        found = verified(str(output), attached)
        assert (found["predictions"], found["errors"]) == (228, 12)
    assert len(pids) == ACTOR_KILLS
    print(
        f"actor killed {len(pids)} times in {ACTOR_KILLS} runs: each run finished by itself, rows lost 0, duplicated 0"
    )


def test_writer_killed_ends_the_attempt_and_the_next_one_finishes(
    photos: Callable[..., Path], tmp_path: Path, cluster: dict[str, str], attached: Program
) -> None:
    """A writer that dies loses rows that were not committed."""
    output, log = tmp_path / "out", tmp_path / "log"
    args = [*job_args(photos(240, bad_percent=5), output, shard_size=10), "--set", "predictor.args=[0.1]"]
    args += ["--address", cluster["address"]]
    process = start(*args, log=log)
    try:
        wait_for(lambda: len(list(output.glob("_commits/*"))) >= 3, process, log)
        find(cluster, "ray::ShardWriter").kill()
        assert process.wait(RUN_S) == 5, log.read_text()
    finally:
        stop(process)
    assert "Traceback" not in log.read_text(), log.read_text()
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    verified(str(output), attached)
