"""Outputs for reports: written by the real ledger and writer, with photos, and with invented times and predictions."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from batch_inference.cli.demo import make_photos
from batch_inference.config import JobConfig
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.output import manifest
from batch_inference.output.attempts import AttemptRecord
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, JobRecord
from batch_inference.storage.store import Store

BEGUN = datetime(2026, 11, 3, 8, 12, tzinfo=timezone.utc)
_FAILURES = (
    ("decode", "TRUNCATED", "the JPEG file ends early, at 24,108 bytes (image file is truncated (18 bytes not processed))"),
    ("decode", "UNKNOWN_FORMAT", "not an image of a known format: it looks like an HTML page, starting with '<!DOCTYPE html>'"),
    ("fetch", "NOT_FOUND", "there is no such object"),
    ("fetch", "TIMEOUT", "the store did not answer within 60 s"),
    ("infer", "PREDICTOR_ERROR", "RuntimeError: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
)  # fmt: skip
_TOP_K = pa.list_(pa.struct([("class_idx", pa.int32()), ("label", pa.string()), ("confidence", pa.float32())]))


@dataclass
class OutputPlan:
    """The properties of an output.

    Attributes:
        images: Number of inputs.
        failing: Share of the inputs that fail.
        shard_size: Inputs per shard.
        done: Share of the shards that are committed.
        labels: Names of the classes.
        price: Price of a GPU-hour, or None.
        names: Names of the first inputs, in place of photos.
        custom: Whether a custom predictor wrote the columns, without confidences.
    """

    images: int = 2000
    failing: float = 0.0
    shard_size: int = 50
    done: float = 1.0
    labels: list[str] = field(default_factory=lambda: [f"class {i}" for i in range(1000)])
    price: float | None = None
    names: list[str] = field(default_factory=list)
    custom: bool = False


def make(folder: Path, plan: OutputPlan) -> Path:
    """Write photos and an output; return the output's folder."""
    rng = np.random.default_rng(5)
    uris = _photos(folder / "photos", plan.images - len(plan.names))
    uris = [*plan.names, *uris]
    output = folder / "predictions"
    config = JobConfig.model_validate(
        {
            "input": {"uris": [f"file://{folder / 'photos'}"]},
            "output": {"uri": str(output)},
            "model": {"name": "efficientnet_b0"},
            "shard_size": plan.shard_size,
            "report": {"gpu_hour_price": plan.price},
        }
    )
    ledger = Ledger(Store(str(output), config.storage))
    shards = -(-len(uris) // plan.shard_size)
    job = JobRecord(
        config.model_dump(mode="json"), "", {"model.name": "efficientnet_b0", "model.weights": "DEFAULT"}, shards, len(uris), "",
        {"batch-inference": "0.1.0", "python": "3.11.7", "ray": "2.60.0", "torch": "2.14.0"}, BEGUN.isoformat(timespec="milliseconds"),
        skipped={".txt": 12, "": 3}, duplicates=7,
    )  # fmt: skip
    job = ledger.create_job(pa.table({"uri": pa.array(uris, pa.string())}), job, "first")
    ledger.complete_manifest(job)
    time = BEGUN + timedelta(seconds=70)
    last = round(shards * plan.done)
    commits = []
    for shard in range(last):
        # The first attempt loses its cluster after a third; the second one comes an hour later.
        if shard == shards // 3:
            time += timedelta(hours=1)
        time += timedelta(seconds=float(rng.uniform(1.5, 2.5) if shard < shards // 2 else rng.uniform(1.0, 1.6)))
        attempt = "3f9a01c2" if shard < shards // 3 else "b7724e10"
        commits.append(_commit(ledger, shard, attempt, time, plan, rng))
    _write_attempts(ledger.store, commits, plan)
    if last == shards:
        totals = {
            "rows": job.rows,
            "predictions": sum(c.predictions for c in commits),
            "errors": sum(c.errors for c in commits),
        }
        ledger.finish(job, commits, {**totals, "shards": shards, "files": sum(len(c.files) for c in commits)})
    return output


def _photos(folder: Path, count: int) -> list[str]:
    """Write parts of the demo's photos under `count` names, and return their URIs."""
    make_photos(folder / "whole")
    rng = np.random.default_rng(1)
    sources = [p for p in sorted((folder / "whole").iterdir()) if not p.name.startswith("broken")]
    kept = []
    for number in range(60):
        with Image.open(sources[number % len(sources)]) as image:
            side = int(rng.uniform(0.5, 0.95) * min(image.size))
            left, top = (int(rng.uniform(0, length - side)) for length in image.size)
            part = image.convert("RGB").crop((left, top, left + side, top + side)).resize((256, 256))
        kept.append(folder / f"part-{number:02d}.jpg")
        part.save(kept[-1], "JPEG", quality=85)
    uris = []
    for number in range(count):
        name = folder / f"2026-{1 + number % 12:02d}" / f"IMG_{number:06d}.jpg"
        name.parent.mkdir(exist_ok=True)
        os.link(kept[int(rng.integers(len(kept)))], name)
        uris.append(name.as_uri())
    return uris


def _commit(
    ledger: Ledger, shard: int, attempt: str, time: datetime, plan: OutputPlan, rng: np.random.Generator
) -> Commit:
    rows = manifest.read_shard(ledger.store, shard).num_rows
    bad = rng.random(rows) < plan.failing
    good = np.flatnonzero(~bad)
    writer = ShardWriter(ledger.store, attempt, "zstd")
    if len(good):
        writer.add(shard, _predictions(shard, good, plan, rng))
    failures = [_FAILURES[int(k)] for k in rng.choice(len(_FAILURES), bad.sum(), p=[0.5, 0.2, 0.15, 0.05, 0.1])]
    errors = pa.table(
        {
            "row": pa.array(np.flatnonzero(bad), pa.int32()),
            "stage": pa.array([k[0] for k in failures], pa.string()),
            "error_type": pa.array([k[1] for k in failures], pa.string()),
            "message": pa.array([k[2] for k in failures], pa.string()),
            "retryable": pa.array([k[1] == "TIMEOUT" for k in failures], pa.bool_()),
        }
    )
    commit = replace(writer.write(shard, errors), committed_at=time.isoformat(timespec="milliseconds"))
    assert ledger.commit(commit)
    return commit


def _predictions(shard: int, rows: np.ndarray, plan: OutputPlan, rng: np.random.Generator) -> pa.Table:
    count = len(rows)
    row_columns = {"shard": pa.array([shard] * count, pa.int32()), "row": pa.array(rows, pa.int32())}
    if plan.custom:
        points = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(count * 8), pa.float32()), 8)
        boxes = pa.array([rng.random((2, 4)).tolist() for _ in range(count)], pa.list_(pa.list_(pa.float32())))
        return pa.table(
            {
                **row_columns,
                "embedding": points,
                "boxes": boxes,
                "sharpness": pa.array(np.where(rng.random(count) < 0.02, np.nan, rng.normal(10, 3, count))),
                "faces": pa.array(rng.poisson(1.2, count), pa.int16()),
            }
        )
    classes = np.minimum(rng.zipf(1.35, count) - 1, len(plan.labels) - 1)
    confidence = np.where(rng.random(count) < 0.7, rng.beta(6, 1.2, count), rng.beta(2, 3, count)).astype(np.float32)
    labels = [plan.labels[int(c)] for c in classes]
    best = [
        [{"class_idx": int(c), "label": label, "confidence": float(p)}]
        for c, label, p in zip(classes, labels, confidence, strict=True)
    ]
    return pa.table(
        {
            **row_columns,
            "predicted_class_idx": pa.array(classes, pa.int32()),
            "label": pa.array(labels, pa.string()),
            "confidence": pa.array(confidence, pa.float32()),
            "top_k": pa.array(best, _TOP_K),
        }
    )


def _write_attempts(store: Store, commits: list[Commit], plan: OutputPlan) -> None:
    sentence = (
        "Decode-bound: the 4 GPU actors were busy 43 % of the time and waited for pixels, decoding kept 91 % of its 8 CPUs busy; add "
        "CPUs (cpuWorkers.replicas in the chart), or take fewer actors."
    )
    for attempt in dict.fromkeys(commit.attempt for commit in commits):
        attempt_commits = [commit for commit in commits if commit.attempt == attempt]
        first, last = (
            datetime.fromisoformat(commit.committed_at) for commit in (attempt_commits[0], attempt_commits[-1])
        )
        working = (last - first).total_seconds() + 2
        rows = sum(commit.rows for commit in attempt_commits)
        started = first - timedelta(seconds=2)
        ended = "succeeded" if plan.done == 1 and commits[-1] is attempt_commits[-1] else "running"
        AttemptRecord(
            attempt, ended, (started - timedelta(seconds=64)).isoformat(timespec="milliseconds"),
            started.isoformat(timespec="milliseconds"),
            last.isoformat(timespec="milliseconds"), working + 64, working, rows, rows * 118_000, 3,
            {"fetch": 0.021 * rows, "decode": 7.2 * working, "infer": 1.7 * working, "driver": 0.08 * working},
            {"fetch": 0.34, "decode": 0.91, "infer": 0.43, "driver": 0.08}, 4, 4.0, 4.0, "decode", sentence,
        ).write(store)  # fmt: skip
