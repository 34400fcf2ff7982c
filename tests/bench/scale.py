"""Limits of the driver: rows a second, and time and memory for 10^4 to 10^7 inputs.

Everything that a job does outside its workers, each step in a process of its own so that its memory can be read: listing,
planning from a manifest, collecting and committing rows as the workers send them, resuming with 99 % committed, ``status``,
``verify``. Nothing is decoded and no network runs; the rows are made beforehand.

Run: make bench-scale, or python -m tests.bench.scale --most 100000 for a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARD = 1000
BLOCKS = (1000, 250, 64)
TREE_MOST = 100_000
CLASSES = 1000


# --- what the steps work on ---


def _uris(rows: int) -> pa.Array:
    """Names as photo archives have them, about 60 bytes each."""
    import pyarrow.compute as pc

    number = pa.array(np.arange(rows))
    text = pc.utf8_lpad(number.cast(pa.string()), 9, "0")
    folder = pc.utf8_slice_codeunits(text, 0, 5)
    return pc.binary_join_element_wise("s3://bucket-of-photos/archive/", folder, "/image-", text, ".jpg", "")


def _write_manifest(path: Path, rows: int) -> None:
    with pq.ParquetWriter(path, pa.schema([("uri", pa.string())]), compression="zstd") as writer:
        every = _uris(rows)
        for start in range(0, rows, 1_000_000):
            writer.write_table(pa.table({"uri": every.slice(start, 1_000_000)}))


def _config(folder: Path, **more: Any) -> Any:
    from batch_inference.config import JobConfig

    return JobConfig(
        output={"uri": str(folder / "out")},
        inference={"gpus_per_actor": 0, "actors": 1},
        shard_size=SHARD,
        **{"input": {"manifest": str(folder / "list.parquet")}, **more},
    )


def _engine() -> Any:
    from batch_inference.images.transform import Transform
    from batch_inference.pipeline.engine import Engine

    return Engine(None, Transform(), {"model.name": "none"}, False)  # the built-in classifier's, which nothing calls


def _result_table(rows: int) -> pa.Table:
    """Rows as the actors send them: the built-in classifier's columns with five classes each, one in a hundred failed."""
    from batch_inference.pipeline.factories import CLASSIFIER_SCHEMA, _classifier_table
    from batch_inference.pipeline.schemas import RESULT_SCHEMA

    rng = np.random.default_rng(0)
    labels = pa.array([f"label number {i}" for i in range(CLASSES)])
    top = rng.integers(0, CLASSES, (rows, 5)).astype(np.int32)
    scores = np.sort(rng.random((rows, 5), np.float32), axis=1)[:, ::-1].copy()
    predictions = _classifier_table(
        {"predicted_class_idx": top[:, 0], "confidence": scores[:, 0], "top_k_idx": top, "top_k_confidence": scores},
        labels,
    )
    failed = np.arange(rows) % 100 == 50
    texts = {"stage": "decode", "error_type": "TRUNCATED", "message": "the file ends after 4,000 bytes"}
    columns = {
        "shard": np.zeros(rows, np.int32), "row": np.arange(rows, dtype=np.int32),
        **{name: pa.array([text if bad else None for bad in failed]) for name, text in texts.items()},
        "retryable": np.zeros(rows, bool), "bytes": np.full(rows, 110_000),
        **{name: rng.random(rows, np.float32) for name in ("fetch_s", "decode_s", "infer_s")},
    }  # fmt: skip
    arrays = [
        pa.array(columns[f.name]).cast(f.type) if f.name in columns else pa.nulls(rows, f.type) for f in RESULT_SCHEMA
    ]
    place = pa.array(np.arange(rows), mask=failed)
    arrays += [predictions[name].combine_chunks().take(place) for name in CLASSIFIER_SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=pa.schema([*RESULT_SCHEMA, *CLASSIFIER_SCHEMA]))


def _blocks(rows: dict[int, int], block: int) -> Iterator[pa.Table]:
    """The tables of all shards, four shards at a time in turns, as several tasks send theirs."""
    whole = _result_table(SHARD)
    numbers = list(rows)
    for start in range(0, len(numbers), 4):
        group = numbers[start : start + 4]
        for first in range(0, SHARD, block):
            for shard in group:
                part = whole.slice(first, min(block, max(0, rows[shard] - first)))
                if part.num_rows:
                    yield part.set_column(0, part.schema.field(0), pa.array(np.full(part.num_rows, shard, np.int32)))


# --- the steps: each runs in a process of its own and prints one JSON line ---


def step_manifest(folder: Path, rows: int) -> dict[str, Any]:
    """Writes the manifest of the steps that follow; in a process of its own, since a child's peak starts at its parent's size."""
    _write_manifest(folder / "list.parquet", rows)
    return {"seconds": 0.0, "rows": rows}


def step_list_store(folder: Path, rows: int) -> dict[str, Any]:
    """Listing a bucket whose store answers at once: what remains is ours."""
    import obstore

    from batch_inference.inputs.find import find_inputs

    def answer(*args: Any, **kwargs: Any) -> Iterator[list[dict[str, Any]]]:
        for start in range(0, rows, 1000):
            yield [
                {"path": f"archive/{i // 10000:05d}/image-{i:09d}.jpg", "size": 1, "e_tag": f'"{i:032x}"'}
                for i in range(start, min(rows, start + 1000))
            ]

    config = _config(
        folder, input={"uris": ["s3://bucket-of-photos/archive/"]}, storage={"region": "x", "anonymous": True}
    )

    def head(bucket: Any, path: str) -> dict[str, str]:
        return {"e_tag": f'"{int(path[-13:-4]):032x}"'}

    with mock.patch.object(obstore, "list", answer), mock.patch.object(obstore, "head", head):
        begun = time.perf_counter()
        found = find_inputs(config)
    return {"seconds": time.perf_counter() - begun, "rows": found.table.num_rows}


def step_list_tree(folder: Path, rows: int) -> dict[str, Any]:
    """Listing a tree of files on a local disk, a thousand in each folder."""
    from batch_inference.inputs.find import find_inputs

    tree = folder / "tree"
    for i in range(0, rows, 1000):
        (tree / f"{i // 1000:04d}").mkdir(parents=True)
        for j in range(i, min(rows, i + 1000)):
            (tree / f"{i // 1000:04d}" / f"image-{j:09d}.jpg").touch()
    begun = time.perf_counter()
    found = find_inputs(_config(folder, input={"uris": [str(tree)]}))
    seconds = time.perf_counter() - begun
    shutil.rmtree(tree)
    return {"seconds": seconds, "rows": found.table.num_rows}


def step_plan(folder: Path, rows: int) -> dict[str, Any]:
    """Reading a manifest, cutting it into shards, writing these: all that a run does before it starts Ray."""
    from batch_inference.driver.events import AttemptInfo
    from batch_inference.driver.job import create_job
    from batch_inference.inputs.find import find_inputs
    from batch_inference.output.ledger import Ledger
    from batch_inference.storage.store import open_output

    config = _config(folder)
    begun = time.perf_counter()
    ledger = Ledger(open_output(config))
    job = create_job(config, AttemptInfo(""), ledger, _engine(), find_inputs(config))
    ledger.complete_manifest(job)
    return {"seconds": time.perf_counter() - begun, "rows": job.rows}


def _collect(folder: Path, keep: Callable[[int, int], bool], block: int) -> tuple[int, float]:
    from batch_inference.driver import execute
    from batch_inference.driver.events import AttemptInfo, Events
    from batch_inference.driver.job import Planned
    from batch_inference.driver.recorder import Recorder
    from batch_inference.driver.resume import Todo
    from batch_inference.output.ledger import Ledger
    from batch_inference.pipeline.bottleneck import planned_timings
    from batch_inference.storage.store import open_output

    config = _config(folder)
    ledger = Ledger(open_output(config))
    job = ledger.require_job()
    todo = Todo(tuple(s for s in range(job.shards) if keep(s, job.shards)), {}, is_first=False)
    attempt = AttemptInfo("")
    recorder = Recorder(config, ledger.store, job, attempt)
    events = Events(attempt.started, recorder)
    planned = Planned(ledger, job, _engine(), None)
    execution = execute.Execution(config, attempt, planned, todo, events, recorder, threading.Event())
    record = recorder.begin_work(events.progress, planned_timings(config, len(todo)))

    def fake(spec: Any) -> Iterator[pa.Table]:
        yield from _blocks(dict(spec.rows), block)

    with mock.patch.object(execute, "results", fake):
        begun = time.perf_counter()
        execution.work(record)
        seconds = time.perf_counter() - begun
    return sum(job.rows_of(s) for s in todo.pending), seconds


def step_collect(folder: Path, rows: int, block: int = SHARD) -> dict[str, Any]:
    """Rows from the workers to commits: collected, checked, written as Parquet, committed; all but the last 1 % of shards."""
    count, seconds = _collect(folder, lambda s, n: s < n - max(1, n // 100), block)
    return {"seconds": seconds, "rows": count, "rows_per_s": count / seconds}


def step_status(folder: Path, rows: int) -> dict[str, Any]:
    """``status`` on 99 % of the commits."""
    from batch_inference.output.status import status

    begun = time.perf_counter()
    found = status(str(folder / "out"))
    return {"seconds": time.perf_counter() - begun, "rows": found.predictions + found.errors}


def step_resume(folder: Path, rows: int) -> dict[str, Any]:
    """A second start with 99 % committed, until it knows what is left; then the rest, so that the job can be finished."""
    from batch_inference.driver.progress import Progress
    from batch_inference.output.ledger import Ledger
    from batch_inference.storage.store import open_output

    config = _config(folder)
    begun = time.perf_counter()
    ledger = Ledger(open_output(config))
    job = ledger.require_job()
    ledger.complete_manifest(job)
    commits = ledger.commits()
    Progress().resume(job, commits, {})
    pending = sorted(set(range(job.shards)) - {c.shard for c in commits})
    seconds = time.perf_counter() - begun
    _collect(folder, lambda s, n: s in set(pending), SHARD)
    return {"seconds": seconds, "rows": sum(c.rows for c in commits)}


def step_finish(folder: Path, rows: int) -> dict[str, Any]:
    """The end of a job: recount, sweep, ``_SUCCESS``."""
    from batch_inference.driver.events import AttemptInfo, Events
    from batch_inference.driver.finish import finish
    from batch_inference.driver.job import Planned
    from batch_inference.driver.recorder import Recorder
    from batch_inference.output.ledger import Ledger
    from batch_inference.storage.store import open_output

    config = _config(folder)
    begun = time.perf_counter()
    ledger, attempt = Ledger(open_output(config)), AttemptInfo("")
    planned = Planned(ledger, ledger.require_job(), _engine(), None)
    recorder = Recorder(config, ledger.store, planned.job, attempt)
    result = finish(config, attempt, planned, Events(attempt.started, recorder), recorder, None)
    return {"seconds": time.perf_counter() - begun, "rows": result.rows}


def step_verify(folder: Path, rows: int) -> dict[str, Any]:
    """``verify`` on the finished output: every row of every file."""
    from batch_inference.output.verify import verify

    begun = time.perf_counter()
    found = verify(str(folder / "out"))
    if not found.ok:
        raise SystemExit(f"verify found: {found.problems}")
    return {"seconds": time.perf_counter() - begun, "rows": found.rows}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    name.removeprefix("step_"): call for name, call in list(globals().items()) if name.startswith("step_")
}
CHAIN = ("plan", "collect", "status", "resume", "finish", "verify")


# --- the whole ---


def _run_step(step: str, folder: Path, rows: int, *more: str) -> dict[str, Any]:
    """Runs a step in a process of its own; its figures with wall time, CPU time and peak memory."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.scale",
        "--step",
        step,
        "--rows",
        str(rows),
        "--folder",
        str(folder),
        *more,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"step {step} with {rows:,} rows failed with exit code {process.returncode}")
    out = {"step": step, **json.loads(text.splitlines()[-1])}
    return out | {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def _measure(step: str, folder: Path, rows: int, *more: str) -> dict[str, Any]:
    """Runs a step and prints its figures."""
    out = _run_step(step, folder, rows, *more)
    print(
        f"{step:<12} {out['rows']:>12,} rows {out['seconds']:>9.2f} s {out['cpu_s']:>9.2f} CPU s {out['peak_mib']:>8,.0f} MiB"
        + (f" {out['rows_per_s']:>10,.0f} rows/s" if "rows_per_s" in out else ""),
        flush=True,
    )
    return out


def _driver_rates(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Rows a second through the driver for several sizes of result tables."""
    found = []
    for block in BLOCKS:
        _run_step("manifest", folder, rows)
        for step in ("plan", "collect"):
            more = ("--block", str(block)) if step == "collect" else ()
            figures = _measure(step, folder, rows, *more)
        found.append({**figures, "block": block})
        shutil.rmtree(folder / "out")
    return found


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Scale of the driver's side", "",
        f"{report['machine']}; shards of {SHARD:,}; local disk. CPU s and MiB (peak) are of the whole process, imports included.", "",
        "## Rows a second through the driver", "",
        "| rows a result table | rows | seconds | rows/s | peak MiB |", "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['block']:,} | {r['rows']:,} | {r['seconds']:.1f} | {r['rows_per_s']:,.0f} | {r['peak_mib']:,.0f} |"
            for r in report["driver"]
        ),
        "", "## Time and memory by number of inputs", "",
        "| step | inputs | seconds | CPU s | peak MiB | µs an input |", "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['step']} | {r['rows']:,} | {r['seconds']:.2f} | {r['cpu_s']:.2f} | {r['peak_mib']:,.0f} "
            f"| {1e6 * r['seconds'] / r['rows']:.2f} |"
            for r in report["steps"]
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Runs everything, or one step of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10_000_000, help="largest number of inputs (default 10,000,000)")
    parser.add_argument("--driver-rows", type=int, default=300_000, help="rows for the driver's rate (default 300,000)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of scale.md and scale.json")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench/scale"), help="working folder, removed afterwards"
    )
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        more = {"block": args.block} if args.block else {}
        print(json.dumps(STEPS[args.step](args.folder, args.rows, **more)))
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    report: dict[str, Any] = {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}", "steps": []}
    report["driver"] = _driver_rates(args.folder, args.driver_rows) if args.driver_rows else []
    rows = 10_000
    while rows <= args.most:
        report["steps"].append(_measure("list_store", args.folder, rows))
        if rows <= TREE_MOST:
            report["steps"].append(_measure("list_tree", args.folder, rows))
        _run_step("manifest", args.folder, rows)
        report["steps"] += [_measure(step, args.folder, rows) for step in CHAIN]
        shutil.rmtree(args.folder / "out")
        rows *= 10
    shutil.rmtree(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scale.json").write_text(json.dumps(report, indent=1))
    (args.out / "scale.md").write_text(_markdown(report))
    print(_markdown(report))


if __name__ == "__main__":
    main()
